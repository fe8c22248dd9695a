# Scaling: what is measured at a length, break-even, memory, and going on after a cut.
import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from experiments import memory, scaling

SMALL = scaling.Shape(0, head_dim=8, block_size=16, dtype=torch.float32, heads=2, tokens=256)


@pytest.fixture(autouse=True)
def small_shape(monkeypatch):
    monkeypatch.setitem(scaling.SHAPES, "cpu", SMALL)


@pytest.fixture(autouse=True)
def same_threads():
    """The commands choose a number of threads; the tests after these have theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def allocate(mib):
    return lambda: torch.ones(mib * 2**18).sum(), lambda: torch.ones(1).sum()


def die(mib):
    return lambda: os.kill(os.getpid(), 9), lambda: None


def test_memory_is_that_of_the_call_and_a_killed_process_has_none():
    assert memory.peak_mib(allocate, 50, threads=1) == pytest.approx(50, abs=3)
    assert memory.peak_mib(die, 0, threads=1) is None


def row(density, fused, explicit=2.0):
    return {"way": "sat", "density": density, "faster_than": {"fused dense": fused, "explicit dense": explicit}}


def test_break_even_is_where_sat_is_neither_faster_nor_slower():
    """By hand: SAT takes 1 / 2 of dense at .2 and 1 / .8 = 1.25 of it at .5: as long at .2 + .3 * .5 / .75 = .4."""
    rows = [row(1.0, 0.5), row(0.2, 2.0), row(0.5, 0.8), {"way": "fused dense"}]
    assert scaling.break_even(rows, "fused dense") == pytest.approx(0.4)
    assert scaling.break_even(rows, "explicit dense") is None
    assert scaling.break_even([row(0.2, None), row(0.5, 0.8)], "fused dense") is None


@pytest.mark.parametrize(
    ("fused", "even", "said"),
    [
        ([3.0, 2.0], None, "faster throughout"),
        ([0.9, 0.5], None, "slower throughout"),
        ([2.0, 0.8], 0.4, "0.40"),
        ([None, 0.5], None, "not measured"),
    ],
)
def test_break_even_in_words(fused, even, said):
    case = {"rows": [row(0.2, fused[0]), row(0.5, fused[1])], "break_even": {"fused dense": even}}
    assert scaling.even_text(case, "fused dense") == said


def test_a_length_is_measured_in_every_way(monkeypatch):
    monkeypatch.setattr(memory, "peak_mib", lambda make, way, shape, threads: way.density)
    monkeypatch.setitem(scaling.LARGEST_SCORES, "cpu", 256 * 2 * 128 * 4)
    # 8 x 8 blocks: the diagonal alone is an eighth of them, 4 blocks a row are half.
    case = scaling.measure(128, [0.01, 0.1, 1.0], "cpu", rounds=1)
    assert (case["length"], case["batch"]) == (128, 2)
    assert [r["way"] for r in case["rows"]] == ["fused dense", "explicit dense", "sat", "sat", "sat"]
    ours = case["rows"][2:]
    assert [(r["density"], r["kept_blocks_a_row"]) for r in ours] == [(0.125, 1), (0.5, 4), (1, 8)]
    assert [r["peak_mib"] for r in ours] == [0.01, 0.5, 1.0]
    assert all(len(r) == len(scaling.HEADER) for r in scaling.cells(case))
    monkeypatch.setitem(scaling.LARGEST_SCORES, "cpu", 256 * 2 * 128 * 4 - 1)
    assert "explicit dense" not in scaling.measure(128, [1.0], "cpu", rounds=1)["break_even"]


def test_ways_agree_where_all_blocks_are_kept():
    shape = dataclasses.replace(SMALL, length=64)
    outs = [scaling.step(way.attend(shape, "cpu")[0], shape, "cpu")() for way in (
        scaling.Way("sat", 1.0), scaling.Way(scaling.FUSED), scaling.Way(scaling.EXPLICIT))]  # fmt: skip
    for other in outs[1:]:
        torch.testing.assert_close(outs[0], other)


def run(monkeypatch, folder: Path, *options):
    words = ["--rounds", "1", "--threads", "1", "--densities", "0.5", "--out", str(folder), *options]
    monkeypatch.setattr(sys, "argv", ["scaling", *words])
    scaling.main()
    return json.loads((folder / "scaling_cpu.json").read_text())


def test_a_run_that_was_cut_off_goes_on(monkeypatch, tmp_path, capsys):
    measured = []

    def measure(length, densities, device, rounds):
        measured.append(length)
        if length == 96 and measured.count(96) == 1:
            raise KeyboardInterrupt
        return {"length": length, "batch": 1, "rows": [row(0.5, 2.0)], "break_even": {"fused dense": None}}

    monkeypatch.setattr(scaling, "measure", measure)
    lengths = ["--lengths", "64", "96"]
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path, *lengths)
    found = run(monkeypatch, tmp_path, *lengths)
    assert [case["length"] for case in found["cases"]] == measured[:2] == [64, 96]
    assert measured == [64, 96, 96]
    assert "length 64 was measured before" in capsys.readouterr().out
    # All is there: measured anew. With other settings: nothing to go on with.
    run(monkeypatch, tmp_path, *lengths)
    assert measured[3:] == [64, 96]
    run(monkeypatch, tmp_path, "--lengths", "64", "96", "32", "--rounds", "2")
    assert measured[5:] == [64, 96, 32]
    (tmp_path / "scaling_cpu.json").write_text("{ damaged")
    run(monkeypatch, tmp_path, *lengths)
    assert measured[8:] == [64, 96]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lengths", "100"], "--lengths has 100, expected multiples of 16"),
        (["--densities", "0.5", "2"], "--densities has 2.0, expected shares"),
        (["--threads", "0"], "expected at least 1"),
        (["--device", "cuda"], "needs a CUDA GPU"),
    ],
)
def test_bad_options_are_refused_with_a_sentence(monkeypatch, capsys, options, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["scaling", *options])
    with pytest.raises(SystemExit):
        scaling.main()
    assert said in capsys.readouterr().err
