# The comparison of what was estimated with what was measured, and bad input.
import json

import pytest

from experiments import estimates, record

ESTIMATED = {
    "dense_steps": [100, 300],
    "training_seconds": [50.0, 90.0],
    "kinds": {
        "dense": {"milliseconds": 12.0, "peak_mib": 300.0},
        "sparse": {"milliseconds": 4.0, "peak_mib": 250.0},
    },
}


def trained(switch, seconds):
    return {
        "transitions": [{"step": switch}] if switch else [],
        "steps": 300,
        "training_seconds": seconds,
        "peak_memory_mib": {"process": 240.0},
        "median_step_ms": {"dense": 10.0, "sparse": 5.0, "warm-up": 7.0},
    }


def test_the_time_is_compared_for_the_dense_steps_that_there_were():
    found = estimates.compared(ESTIMATED, trained(200, 56.0))
    assert found == {
        "training, s": {"estimated": 70.0, "measured": 56.0, "error": 0.25},
        "peak memory, MiB": {"estimated": 300.0, "measured": 240.0, "error": 0.25},
        "dense step, ms": {"estimated": 12.0, "measured": 10.0, "error": 0.2},
        "sparse step, ms": {"estimated": 4.0, "measured": 5.0, "error": -0.2},
    }
    without_switch = estimates.compared(ESTIMATED, trained(None, 90.0))
    assert without_switch["training, s"]["error"] == 0


def test_a_method_without_a_switch_has_one_time():
    one = {**ESTIMATED, "dense_steps": [300, 300], "training_seconds": [60.0, 60.0]}
    assert estimates.compared(one, trained(None, 50.0))["training, s"]["error"] == 0.2


def test_each_task_is_saved_as_it_ends_and_one_without_data_is_left_out(tmp_path, monkeypatch, capsys):
    def command(arguments, folder):
        if "lra_listops.yaml" in arguments:
            raise RuntimeError("no memory is left")
        return ESTIMATED if "--estimate" in arguments else trained(200, 56.0)

    monkeypatch.setattr(estimates, "command", command)
    with pytest.raises(RuntimeError, match="no memory"):
        estimates.main(["--out", str(tmp_path)])
    found = json.loads((tmp_path / "estimates.json").read_text())
    assert list(found["tasks"]) == ["quickstart"]
    assert found["format"] == record.FORMAT
    assert "lra_image is left out" in capsys.readouterr().out


def test_data_without_the_folder_is_refused_before_any_work(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        estimates.main(["--data", str(tmp_path)])
    assert ended.value.code == 2
    assert "no folder cifar10" in capsys.readouterr().err
