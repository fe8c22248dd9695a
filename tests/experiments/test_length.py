# Length: exponents, what is measured, going on after a cut, and the training that it starts.
import json
import sys

import pytest
import torch

from experiments import length, memory
from sat import cli


@pytest.fixture(autouse=True)
def same_threads():
    """The command chooses a number of threads; the tests after these have theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def case(tokens, ms, mib):
    return {"length": tokens, "sat": {"ms": ms, "peak_mib": mib}, "fused dense": {}}


def test_the_exponent_is_the_slope_in_logarithms():
    cases = [case(n, 5.0, 3 * n**1.5) for n in (1024, 2048)] + [case(n, n**2 / 7, 3 * n**1.5) for n in (4096, 16384)]
    assert length.exponent(cases, "sat", "peak_mib") == 1.5
    assert length.exponent(cases, "sat", "ms", 4096) == 2
    assert length.exponent(cases, "fused dense", "ms") is None


def test_both_ways_take_the_same_tensors_and_ours_keeps_eight_blocks_a_row():
    torch.manual_seed(0)
    dense, ours = (length.call(way, 512)() for way in (length.DENSE, length.OURS))  # 8 x 8 blocks: all are kept
    for a, b in zip(dense, ours, strict=True):
        torch.testing.assert_close(a, b)
    layouts = []
    original = length.block_sparse_attention

    def seen(*args, **options):
        layouts.append(args[3])
        return original(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(length, "block_sparse_attention", seen)
        length.call(length.OURS, 1024)()
    assert layouts[0].nnz == 2 * 16 * 8


def test_a_layout_is_measured_with_all_its_indices():
    found = length.layout("window", 1000, 64, 2)
    assert found["kept_blocks"] == 2 * (7 * 16 - 2 * (1 + 2 + 3))  # 16 blocks, the last of them partial
    assert found["mib"] == round(4 * (2 * found["kept_blocks"] + 2 * 2 * 17) / 2**20, 2)


@pytest.mark.parametrize("name", length.TRAINING)
def test_the_training_takes_the_settings(monkeypatch, name):
    def execute(command, log, environment):
        args, _ = cli.parse(command[3:])
        assert (args.trainer.max_steps, args.data.image_size, args.data.batch_size) == (length.STEPS, 128, 1)
        log.write_text("first\nno memory is left\n")
        return 1

    monkeypatch.setattr(length, "execute", execute)
    with pytest.raises(RuntimeError, match="on Path-X ended with status 1: no memory is left"):
        length.training(name, 1)


def run(monkeypatch, folder, *options):
    words = ["--rounds", "2", "--threads", "1", "--out", str(folder), "--parts", "attention", *options]
    monkeypatch.setattr(sys, "argv", ["length", *words])
    length.main()
    return json.loads((folder / "length_cpu.json").read_text())


def test_a_run_that_was_cut_off_goes_on(monkeypatch, tmp_path, capsys):
    measured = []

    def attention(tokens, rounds, threads):
        measured.append(tokens)
        if tokens == 192 and measured.count(192) == 1:
            raise KeyboardInterrupt
        return {"length": tokens} | {way: {"ms": tokens / 2, "peak_mib": 1.0} for way in (length.OURS, length.DENSE)}

    monkeypatch.setattr(length, "attention", attention)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path, "--lengths", "64", "192")
    found = run(monkeypatch, tmp_path, "--lengths", "64", "192")
    assert measured == [64, 192, 192]
    assert [case["length"] for case in found["attention"]] == [64, 192]
    assert found["exponents"]["sat"]["ms"] == {"all": 1.0, "from 4096": None}
    assert "1/2: attention, length 64: was measured before" in capsys.readouterr().out
    run(monkeypatch, tmp_path, "--lengths", "64", "192")  # all is there: measured anew
    assert measured[3:] == [64, 192]
    # What was not asked for stays.
    monkeypatch.setattr(length, "TRAINING", ["one"])
    monkeypatch.setattr(
        length, "training", lambda name, threads: {"name": name, "median_step_ms": {}, "peak_memory_mib": {}}
    )
    found = run(monkeypatch, tmp_path, "--parts", "training")
    assert [row["name"] for row in found["training"]] == ["one"]
    assert found["complete"] == ["training"]  # not attention of all the usual lengths
    assert [case["length"] for case in found["attention"]] == [64, 192]
    # Under other circumstances neither goes on nor writes over it.
    before = (tmp_path / "length_cpu.json").read_text()
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, "--lengths", "64", "--rounds", "3")
    assert "has figures of ('attention', 192), ('training', 'one') too" in capsys.readouterr().err
    assert (tmp_path / "length_cpu.json").read_text() == before


def test_attention_is_measured_in_processes_of_their_own(monkeypatch):
    asked = []

    def alone(function, *arguments):
        asked.append((function.__name__, arguments))
        return function(*arguments)

    monkeypatch.setattr(memory, "alone", alone)
    monkeypatch.setattr(memory, "_peak", lambda make, arguments, threads: 4.0)
    found = length.attention(128, 2, 1)
    assert [arguments[0] for name, arguments in asked if name == "times"] == ["sat", "fused dense"]
    assert found["sat"]["calls"] == 2
    assert found["sat"]["ms"] > 0
    assert found["fused dense"]["peak_mib"] == 4.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lengths", "100"], "--lengths has 100, expected multiples of 64"),
        (["--rounds", "1"], "are 1 and 2, expected at least 2 rounds and 1 thread"),
        (["--parts", "nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_bad_options_are_refused_with_a_sentence(monkeypatch, capsys, options, said):
    monkeypatch.setattr(sys, "argv", ["length", *options])
    with pytest.raises(SystemExit):
        length.main()
    assert said in capsys.readouterr().err
