"""sat.train in several processes: the layouts and weights of one process, one folder, restarts, deaths."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sat.layout import BlockLayout
from sat.train import _lost_a_process
from tests.distributed import work
from tests.distributed.processes import Outcome, launch

SINGLE = ["--trainer.precision", "32-true"]  # Lightning rounds float64 weights to float32 when it loads them
FISHER = ["--sparsity.mask", "fisher", "--sparsity.per_head", "true", "--sparsity.share_budget", "true"]
FISHER += ["--sparsity.revise_interval", "3", "--sparsity.revise_share", "0.5", "--sparsity.keep_diagonal", "false"]
SWITCH = 9  # the criterion is always met, as soon as it is defined: at the third observation


def train(folder: Path, processes: int, *options: object, batch: int = 16, **events: Any) -> list[Outcome]:
    """``batch`` samples a step, shared by the processes."""
    arguments = ["--config", "tiny.yaml", "--trainer.devices", processes, "--data.batch_size", batch // processes]
    return launch(processes, folder, work.run, [*arguments, *options], events.get("kill"), events.get("interrupt"))


def run_folder(folder: Path, name: str = "tiny") -> Path:
    (found,) = (folder / "runs" / name).iterdir()
    return found


def last(folder: Path, name: str = "tiny") -> dict[str, Any]:
    return torch.load(run_folder(folder, name) / "checkpoints" / "last.ckpt", weights_only=True)


def layouts(folder: Path, name: str = "tiny") -> list[BlockLayout]:
    found = [BlockLayout.load(path) for path in sorted((run_folder(folder, name) / "layouts").iterdir())]
    assert len(found) == 2
    return found


def assert_same_run(folder: Path, name: str, other: str, exactly: bool = False) -> None:
    """Layouts to the block; weights to the bit, or up to what PyTorch takes for rounding in their precision."""
    assert layouts(folder, name) == layouts(folder, other)
    one, two = last(folder, name), last(folder, other)
    assert one["global_step"] == two["global_step"] == 20
    for key, tensor in one["state_dict"].items():
        if exactly or not tensor.is_floating_point():
            assert torch.equal(tensor, two["state_dict"][key]), key
        else:
            torch.testing.assert_close(two["state_dict"][key], tensor, msg=lambda text, key=key: f"{key}: {text}")
    summaries = [json.loads((run_folder(folder, n) / "summary.json").read_text()) for n in (name, other)]
    for key in ("test_accuracy", "validation_accuracy", "best_checkpoint", "validated_at"):
        assert summaries[0][key] == summaries[1][key], key


def succeeded(outcomes: list[Outcome]) -> list[Outcome]:
    assert [o.status for o in outcomes] == [0] * len(outcomes), outcomes
    return outcomes


@pytest.mark.parametrize(
    ("processes", "options"),
    [
        pytest.param(2, [], id="ddp", marks=pytest.mark.long),  # those after it hold it
        pytest.param(
            2, ["--trainer.accumulate_grad_batches", 2, "--trainer.val_check_interval", 14, *FISHER], id="accumulated"
        ),
        # Not in float64, which Lightning refuses.
        pytest.param(2, ["--trainer.strategy", "fsdp2", "--trainer.precision", "32-true"], id="fsdp2"),
        pytest.param(4, [], id="four", marks=pytest.mark.long),
        pytest.param(
            4, ["--trainer.strategy", "fsdp2", "--trainer.precision", "32-true"], id="fsdp2-4", marks=pytest.mark.long
        ),
    ],
)
def test_processes_reach_what_one_reaches(folder, processes, options):
    alike = [*(SINGLE if "fsdp2" in options else []), *(FISHER if FISHER[1] in options else [])]
    (one,) = succeeded(train(folder, 1, "--name", "one", *alike))
    accumulated = 2 if "--trainer.accumulate_grad_batches" in options else 1
    first, *others = succeeded(train(folder, processes, *options, batch=16 // accumulated))
    assert_same_run(folder, "one", "tiny")
    # Rank 0 speaks for all, and all that is written lies in its folder.
    assert first.out.count("Switch to sparse attention at step 9") == 1
    assert str(run_folder(folder).relative_to(folder)) in first.out
    assert all(other.out == "" and other.error == "" for other in others)
    assert json.loads((run_folder(folder) / "summary.json").read_text())["processes"] == processes
    assert [p.name for p in (run_folder(folder) / "csv").iterdir()] == ["version_0"]
    revisions = first.out.count("layouts changed at step")
    assert revisions == one.out.count("layouts changed at step")
    assert (revisions > 1) == (FISHER[1] in options)


@pytest.mark.parametrize(
    "kills",
    [
        # While rank 1 has its layouts and rank 0 waits for their hash.
        pytest.param([(1, "switch", SWITCH)], id="switch"),
        # Also in the dense phase; and in the sparse phase, rank 0.
        pytest.param([(1, "step", 6), (1, "switch", SWITCH), (0, "step", 17)], id="all", marks=pytest.mark.long),
    ],
)
def test_a_job_that_is_killed_goes_on(folder, kills):
    options = [*SINGLE, "--model.dropout", 0.1]  # each process draws its own
    succeeded(train(folder, 2, "--name", "whole", *options))
    resume: list[object] = []
    for kill in kills:
        outcomes = train(folder, 2, *options, *resume, kill=kill)
        dead, alive = outcomes[kill[0]], outcomes[1 - kill[0]]
        assert dead.status == -signal.SIGKILL
        assert alive.status == 1
        assert "another process of this run has stopped or does not answer, and the run stops; go on " in alive.error
        assert "--ckpt_path last" in alive.error
        assert "Traceback" not in alive.error
        assert last(folder)["global_step"] == kill[2] // 4 * 4
        resume = ["--ckpt_path", "last"]
    succeeded(train(folder, 2, *options, *resume))
    assert_same_run(folder, "whole", "tiny", exactly=True)
    first, second = last(folder)["callbacks"]["ExactResume"]["ranks"]
    assert not torch.equal(first["cpu"], second["cpu"])


def test_a_process_that_does_not_answer_stops_the_job_after_the_timeout(folder):
    alive, _ = train(folder, 2, "--process_timeout", 4, kill=(1, "freeze", 6))
    assert alive.status == 1
    assert "another process of this run has stopped or does not answer, and the run stops; go on with" in alive.error


@pytest.mark.parametrize(
    ("before", "after"),
    [(2, 1), pytest.param(1, 2, marks=pytest.mark.long), pytest.param(2, 4, marks=pytest.mark.long)],
)
def test_goes_on_in_another_number_of_processes(folder, before, after):
    succeeded(train(folder, 1, "--name", "whole", *SINGLE))
    stopped = train(folder, before, *SINGLE, interrupt=(before - 1, 6))
    assert [o.status for o in stopped] == [130] + [0] * (before - 1)
    assert "interrupted at step 6; go on with --ckpt_path" in stopped[0].error
    assert all(o.error == "" for o in stopped[1:])
    resume = [*SINGLE, "--ckpt_path", "last"]
    (refused, *_) = train(folder, after, *resume, batch=64)
    assert refused.status == 2
    assert f"on 16 samples at a time, {16 // before} in each of {before} process" in refused.error
    assert f"go on with --data.batch_size {16 // after}" in refused.error
    (refused, *_) = train(folder, after, *resume, "--trainer.accumulate_grad_batches", 2)
    assert "accumulate_grad_batches=1, this run has 2" in refused.error
    succeeded(train(folder, after, *resume))
    assert_same_run(folder, "whole", "tiny")


def test_other_layouts_in_one_process_stop_the_run(folder):
    outcomes = launch(2, folder, work.run_tampered, ["--config", "tiny.yaml", "--trainer.devices", 2])
    for outcome in outcomes:
        assert outcome.status == 1
        assert (
            "the layout of model.encoder.layers.1.attention differs between processes at step 9: rank 1 of 2 has "
            in (outcome.error)
        )
        assert "Traceback" not in outcome.error


def test_the_command_starts_its_processes_itself(folder):
    command = [sys.executable, "-m", "sat.train", "--config", "tiny.yaml", "--trainer.devices", "2"]
    command += ["--trainer.strategy", "ddp", "--trainer.max_steps", "100000", "--process_timeout", "50"]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder
    )
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if "right after" in line:
            break
    until = time.monotonic() + 60
    while not list(folder.glob("runs/tiny/*/checkpoints/last.ckpt")) and time.monotonic() < until:
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.is_file():
        process.kill()
        pytest.skip("the children of a process cannot be found here")
    (child,) = map(int, children.read_text().split())
    os.kill(child, signal.SIGKILL)
    out, error = process.communicate(timeout=60)
    if "terminated with code -9" not in error:  # Lightning looks every 5 seconds, and then ends rank 0 as well
        assert process.returncode == 1
        assert "sat.train: the process of rank 1 was ended by SIGKILL, and the run stops; go on with" in error
    assert "Traceback" not in error
    assert (printed + out).count("results go to") == 1
    assert (run_folder(folder) / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:33", True),
        ("Application timeout caused pair closure", True),  # without the place, when a link is cut
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
    ],
)
def test_errors_of_gloo_are_told_from_others(text, lost):
    assert _lost_a_process(RuntimeError(text)) is lost
