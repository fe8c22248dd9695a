# The Arena: its settings, runs beside each other, going on, and the table beside the published figures.
import json
import threading
from pathlib import Path

import pytest

from experiments import accuracy, accuracy_settings, arena, record
from sat import cli
from sat.runs import shipped_configs

SHORT = ["--seeds", "0", "1"]


@pytest.fixture
def started(monkeypatch, tmp_path) -> list[list[str]]:
    """The commands that were executed, each of which leaves a summary; the data are not read."""
    commands: list[list[str]] = []

    def execute(command, log, environment):
        assert environment == {"OMP_NUM_THREADS": "1"}
        commands.append(command)
        folder = Path(command[command.index("--output_dir") + 1]) / command[command.index("--name") + 1] / "now"
        folder.mkdir(parents=True)
        attention = command[command.index("--model.attention") + 1]
        summary = {
            "attention": attention,
            "steps": 7,
            "density": 0.1 if attention == "adaptive" else None,
            "test_accuracy": {"final": {"dense": 0.5, "structure": 0.25, "adaptive": 0.75}[attention]},
            "median_step_ms": {attention: 2.0},
            "peak_memory_mib": {"process": 100},
            "training_seconds": 3.0,
        }
        (folder / "summary.json").write_text(json.dumps(summary))
        return 0

    monkeypatch.setattr(accuracy, "execute", execute)
    monkeypatch.setattr(accuracy, "prepare", lambda task, options, folder: accuracy.Data(None, {"train": 1}, 256, 0.5))
    monkeypatch.chdir(tmp_path)
    return commands


def measure(*arguments: str) -> list[dict]:
    arena.main([*arguments, "--out", "out"])
    return json.loads(Path("out/arena_small.json").read_text())["runs"]


@pytest.mark.parametrize("scale", ["small", "paper"])
@pytest.mark.parametrize("task", accuracy_settings.ARENA)
@pytest.mark.parametrize("method", arena.DEFAULT_METHODS)
def test_the_training_takes_every_setting(scale, task, method):
    known = accuracy_settings.ARENA[task]
    own = accuracy_settings.overrides(scale, task, method, known.small_steps if scale == "small" else None, {})
    run = accuracy.Run(task, method, 0, own, None, {}, None, None, 0.5)
    args, _ = cli.parse(run.command(Path("nowhere"), "run", own, None)[3:])
    assert args.model.attention == {"sat": "adaptive", "window": "structure"}.get(method, "dense")
    config = accuracy_settings.flat(accuracy_settings.read_config(shipped_configs() / known.config))
    changed = {name for name, value in own.items() if name in config and config[name] != value}
    if scale == "paper":
        # As the config stands, but for the method.
        assert not [name for name in changed if not name.startswith(("model.attention", "model.pruned", "sparsity."))]
        assert method == "sat" or not [name for name in changed if name.startswith("sparsity.")]
    else:
        assert own["trainer.max_steps"] == known.small_steps


@pytest.mark.parametrize("task", accuracy_settings.ARENA_TASKS["small"])
def test_the_window_is_as_dense_as_the_task_says(task):
    own = accuracy_settings.overrides("small", task, "window", 1000, {})
    length = 512 if task == "text" else 256
    found = accuracy_settings.density(accuracy_settings.settings(task, own, {}), length)
    assert found == pytest.approx(0.1, rel=0.1)


def test_runs_beside_each_other_are_all_kept_and_not_done_again(started, monkeypatch, capsys):
    together = threading.Barrier(2, timeout=60)  # passed only by two at a time
    execute = accuracy.execute

    def waits(*arguments):
        together.wait()
        return execute(*arguments)

    monkeypatch.setattr(accuracy, "execute", waits)
    runs = measure(*SHORT, "--tasks", "listops", "image", "--jobs", "2")
    assert len(runs) == len(started) == 12
    assert {(r["task"], r["method"], r["seed"]) for r in runs} == {
        (task, method, seed) for task in ("listops", "image") for method in arena.DEFAULT_METHODS for seed in (0, 1)
    }
    printed = capsys.readouterr().out
    assert "12 runs, 0 of them done before" in printed
    assert "published: BigBird" in printed
    assert len(measure(*SHORT, "--tasks", "listops", "image", "--jobs", "2")) == 12
    assert len(started) == 12


def test_a_failed_run_beside_others_does_not_stop_them(started, monkeypatch, capsys):
    execute = accuracy.execute

    def fails(command, log, environment):
        if "dense" in command:
            log.write_text("out of memory\n")
            return 1
        return execute(command, log, environment)

    monkeypatch.setattr(accuracy, "execute", fails)
    with pytest.raises(SystemExit, match=r"experiments\.arena: 2 of the runs failed; the same command tries them"):
        measure(*SHORT, "--tasks", "listops", "--jobs", "2")
    assert "listops, dense, seed 0 failed: out of memory" in " ".join(capsys.readouterr().out.split())
    assert len(started) == 4


def test_no_run_begins_after_the_minutes(started, capsys):
    with pytest.raises(SystemExit, match="nothing has been measured yet"):
        measure(*SHORT, "--minutes", "0", "--jobs", "2")
    assert started == []
    assert "0 minutes are over; the same command trains the 18 that are left" in capsys.readouterr().out


def test_rows_have_ours_above_those_published(started):
    header, rows = arena.rows(measure(*SHORT, "--tasks", "pathfinder", "listops", "--methods", "dense", "sat"))
    assert header == ["", "listops", "pathfinder", "pathfinder: hidden tokens found"]
    assert rows[:2] == [
        ["dense", *["0.500 ± 0.000 (2)"] * 3],
        ["sat", *["0.750 ± 0.000 (2)"] * 3],
    ]
    assert ["published: Transformer", "0.364", "0.714", ""] in rows


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--jobs", "0"], "--jobs is 0, expected at least 1"),
        (["--tasks", "digits"], "invalid choice: 'digits'"),
    ],
)
def test_bad_options_are_refused_with_a_sentence(capsys, arguments, said):
    with pytest.raises(SystemExit):
        arena.main(arguments)
    assert said in capsys.readouterr().err


def test_data_that_are_not_there(tmp_path):
    with pytest.raises(SystemExit, match=r"experiments\.arena: no data for the task text: there is no folder .*imdb"):
        arena.main(["--tasks", "text", "--data", str(tmp_path), "--out", str(tmp_path)])


def test_two_at_once_would_lose_each_others_results(started, tmp_path):
    with (
        record.alone(Path("out/arena_small.json")),
        pytest.raises(SystemExit, match=r"another process is measuring for out/arena_small\.json; wait for it, or"),
    ):
        measure(*SHORT, "--tasks", "listops")
    assert started == []
    assert len(measure(*SHORT, "--tasks", "listops", "--methods", "dense")) == 2


def option(command: list[str], name: str) -> str | None:
    return command[command.index(name) + 1] if name in command else None


@pytest.mark.parametrize(("task", "share"), [("pathfinder", 0.4), ("text", 0.25)])
def test_a_task_is_pretrained_and_goes_on_between_the_two(started, monkeypatch, task, share):
    good, runs = accuracy.execute, []

    def execute(command, log, environment):
        runs.append(command)
        if len(runs) == 2:  # interrupted after the pretraining
            return 130
        return good(command, log, environment)

    monkeypatch.setattr(accuracy, "execute", execute)
    arguments = ["--tasks", task, "--methods", "dense", "--seeds", "0"]
    with pytest.raises(SystemExit, match="interrupted"):
        measure(*arguments)
    (found,) = measure(*arguments)
    assert [option(command, "--name") for command in runs] == ["pretraining", "run", "run"]
    assert [option(command, "--data.hide") for command in runs] == [str(share), None, None]
    assert option(runs[0], "--init_from") is None
    assert option(runs[2], "--init_from") == str(Path(option(runs[0], "--output_dir") or "") / "pretraining" / "now")
    assert option(runs[0], "--trainer.max_steps") != option(runs[2], "--trainer.max_steps")
    assert found["summary"]["training_seconds"] == 6.0  # of both
    assert found["summary"]["pretraining"]["steps"] == 7
    assert found["options"]["pretraining.data.hide"] == share
    for command in runs:
        cli.parse(command[3:])


def test_methods_of_a_pretrained_task_have_all_but_their_own_settings_in_common(started):
    runs = measure("--tasks", "pathfinder", "--seeds", "0")
    assert {run["method"] for run in runs} == {"dense", "window", "sat"}
    header, lines = arena.rows(runs)
    assert header[:2] == ["", "pathfinder"]
    assert [line[1] for line in lines if line[0] in ("dense", "window", "sat")] == [
        "0.500 (1)",
        "0.750 (1)",
        "0.250 (1)",
    ]
