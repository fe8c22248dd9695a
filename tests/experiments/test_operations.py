# The three operations and the whole, measured on shapes that take milliseconds.
import json
import sys

import pytest
import torch

from experiments import operations
from experiments.gpu_suite import layouts
from tests.ops import oracle

TASK = operations.Task("tiny", 64, 16, 0.5, 3)


@pytest.fixture(autouse=True)
def same_threads():
    """The commands choose a number of threads; the tests after these have theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_all_ways_of_an_operation_compute_what_it_replaces():
    """The dense ones on a layout with all blocks, and the whole on a sparse one by the oracle."""
    layout = layouts.learned_like(4, 1.0, 1, 16, "cpu")
    for name, computed in operations.ways(layout, 64, 2, "cpu", "torch").items():
        if name in ("SDDMM", "attention"):
            ours = computed[operations.OURS]
            out = ours.function(*ours.inputs)
            for other in computed.values():
                theirs = other.function(*other.inputs)
                if theirs.shape != out.shape:  # scores in full, and ours in blocks
                    theirs = theirs.unflatten(3, (4, 16)).unflatten(2, (4, 16)).transpose(3, 4).flatten(1, 3)
                torch.testing.assert_close(out, theirs)
    sparse = layouts.learned_like(4, 0.5, 1, 16, "cpu")
    whole = operations.ways(sparse, 64, 2, "cpu", "torch")["attention"][operations.OURS]
    expected = oracle.attention(*(x.double() for x in whole.inputs), sparse)
    torch.testing.assert_close(whole.function(*whole.inputs).double(), expected, atol=1e-5, rtol=1e-5)


def test_backward_runs_through_one_graph_again_and_again():
    made = []

    def square(x):
        made.append(1)
        return x * x

    x = torch.tensor([1.0, 2.0], requires_grad=True)
    call = operations.Way(square, [x], torch.ones(2)).call("backward")
    assert [call()[0].tolist() for _ in range(3)] == [[2, 4]] * 3
    assert len(made) == 1


def test_every_operation_is_measured_both_ways(monkeypatch):
    monkeypatch.setitem(operations.LARGEST_SCORES, "cpu", 2 * 2 * 64 * 64 * 4)
    found = operations.measure(TASK, "cpu", rounds=1)
    assert (found["batch"], found["batch_of_the_task"], found["density"]) == (2, 3, 0.5)
    assert list(found["operations"]) == ["SDDMM", "softmax", "SpMM", "attention"]
    for modes in found["operations"].values():
        for mode in operations.MODES:
            times = modes[mode]["times"]
            for other, faster in modes[mode]["faster_than"].items():
                ratio = times[other]["ms"]["median"] / times[operations.OURS]["ms"]["median"]
                assert faster == pytest.approx(ratio, rel=0.01, abs=5e-4)  # of a single round
    assert all(len(row) == len(operations.HEADER) for row in operations.rows(found))
    assert len(operations.rows(found)) == 6


def test_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(operations, "TASKS", (TASK,))
    monkeypatch.setattr(sys, "argv", ["operations", "--rounds", "1", "--threads", "1", "--out", str(tmp_path)])
    operations.main()
    found = json.loads((tmp_path / "operations_cpu.json").read_text())
    assert found["command"].startswith("python -m experiments.operations --rounds 1")
    assert (found["threads"], found["seed"], found["shape"]["dtype"]) == (1, 0, "float32")
    assert [task["name"] for task in found["tasks"]] == ["tiny"]
    assert "1/1: tiny, 64 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"), [(["--device", "cuda"], "needs a CUDA GPU"), (["--rounds", "0"], "--rounds is 0")]
)
def test_bad_options_are_refused_with_a_sentence(monkeypatch, capsys, options, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["operations", *options])
    with pytest.raises(SystemExit):
        operations.main()
    assert said in capsys.readouterr().err


def test_some_tasks_are_not_written_over_all(monkeypatch, tmp_path, capsys):
    other = operations.Task("other", 32, 16, 0.5, 3)
    monkeypatch.setattr(operations, "TASKS", (TASK, other))
    options = ["operations", "--rounds", "1", "--threads", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", options)
    operations.main()
    before = (tmp_path / "operations_cpu.json").read_text()
    monkeypatch.setattr(sys, "argv", [*options, "--tasks", "tiny"])
    with pytest.raises(SystemExit):
        operations.main()
    assert "has figures of other too, which would be lost" in capsys.readouterr().err
    assert (tmp_path / "operations_cpu.json").read_text() == before
