"""SIGTERM, and SIGUSR1 of SLURM: the step is finished and saved, and the status says which signal it was."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from tests.interruption import processes
from tests.interruption.conftest import COMMAND, RESUME, assert_same_run, run_folder

STEP = "sat.module:ClassificationModule.training_step"


def saved_step(folder: Path) -> int:
    return torch.load(run_folder(folder) / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


@pytest.mark.parametrize("when", [(STEP, 5), ("sat.monitor:Monitor._measure_switch", 1)], ids=["step", "switch"])
def test_sigterm_finishes_the_step_and_saves(whole: Path, place: Path, when: tuple[str, int]):
    step = 5 if when[0] == STEP else 9
    status, output = processes.run(place, COMMAND, ("send", *when, signal.SIGTERM))
    assert status == 143, output
    assert f"sat.train: interrupted at step {step}; go on with --ckpt_path runs/tiny/" in output
    assert saved_step(place) == step
    if step == 9:
        assert processes.run(place, RESUME)[0] == 0
        assert_same_run(whole, place)


@pytest.mark.parametrize("number", [pytest.param(1, marks=pytest.mark.long), 5])
def test_sigterm_to_the_whole_job_does_not_end_those_that_load_its_data(place: Path, number: int):
    command = [*COMMAND, "--data.num_workers", "2"]
    status, output = processes.run(place, command, ("send_job", STEP, number, signal.SIGTERM))
    assert status == 143, output
    assert saved_step(place) == number


def test_sigterm_while_validating_before_the_first_step(place: Path):
    validation = "sat.module:ClassificationModule.validation_step"
    status, output = processes.run(place, COMMAND, ("send", validation, 1, signal.SIGTERM))
    assert (status, "interrupted at step 0" in output) == (143, True), output


def test_sigterm_while_testing_leaves_at_once(place: Path):
    test = "sat.module:ClassificationModule.test_step"
    status, output = processes.run(place, COMMAND, ("send", test, 1, signal.SIGTERM))
    assert status == 143, output
    assert "interrupted while testing; go on with" in output
    assert saved_step(place) == 20


@pytest.mark.parametrize(
    ("received", "expected"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)]
)
def test_a_second_signal_leaves_at_once(place: Path, received: signal.Signals, expected: int):
    status, output = processes.run(place, COMMAND, ("second_signal", STEP, 5, received))
    assert status == expected, output
    assert "Traceback" not in output
    assert "stopped at once; go on with" in output
    assert saved_step(place) == 3  # of the regular saves


@pytest.mark.parametrize("array", [False, pytest.param(True, marks=pytest.mark.long)])
def test_sigusr1_of_slurm_queues_the_job_again(whole: Path, place: Path, monkeypatch: pytest.MonkeyPatch, array: bool):
    tool = place / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho "$@" > "$(dirname "$0")/asked"\n')
    tool.chmod(0o755)
    job = {"SLURM_JOB_ID": "71", "PATH": f"{tool.parent}:{os.environ['PATH']}"}
    if array:
        job |= {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "4"}
    faults = ("environment", job), ("send", STEP, 5, signal.SIGUSR1)
    status, output = processes.run(place, COMMAND, *faults)
    assert status == 128 + signal.SIGUSR1, output
    assert (tool.parent / "asked").read_text() == f"requeue {'70_4' if array else '71'}\n"
    assert saved_step(place) == 5
    assert not list(place.rglob("hpc_ckpt*"))  # Lightning's way of it
    if not array:
        assert processes.run(place, RESUME, ("environment", job))[0] == 0
        assert_same_run(whole, place)


@pytest.mark.parametrize("resumed", [False, pytest.param(True, marks=pytest.mark.long)])
def test_sigusr1_before_the_first_step_queues_the_job_again(place: Path, resumed: bool):
    """It leaves nothing that the job would go on with, or the checkpoint that it goes on from; twice is as once."""
    tool = place / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\nkill -USR1 $PPID\nsleep .3\necho "$@" > "$(dirname "$0")/asked"\n')
    tool.chmod(0o755)
    if resumed:
        assert processes.run(place, COMMAND, ("send", STEP, 5, signal.SIGTERM))[0] == 143
    job = {"SLURM_JOB_ID": "71", "PATH": f"{tool.parent}:{os.environ['PATH']}"}
    reading = "sat.checkpoints:read_state" if resumed else "sat.data.base:SequenceDataModule.prepare_data"
    arguments = RESUME if resumed else COMMAND
    status, output = processes.run(place, arguments, ("environment", job), ("send", reading, 1, signal.SIGUSR1))
    assert status == 128 + signal.SIGUSR1, output
    assert "interrupted before the first step; nothing was begun" in output
    assert "Traceback" not in output
    assert (tool.parent / "asked").read_text() == "requeue 71\n"
    if resumed:
        assert saved_step(place) == 5
    else:
        assert not (place / "runs").exists() or not list((place / "runs").iterdir())


def test_a_job_that_cannot_be_queued_again_says_so(place: Path):
    job = {"SLURM_JOB_ID": "71", "PATH": str(place)}
    status, output = processes.run(place, COMMAND, ("environment", job), ("send", STEP, 5, signal.SIGUSR1))
    assert status == 128 + signal.SIGUSR1, output
    assert "the job 71 is not queued again" in output
    assert saved_step(place) == 5
