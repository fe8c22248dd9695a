"""``kill -9`` at any moment: what is resumed becomes the run that was never interrupted, bit for bit."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.interruption import processes
from tests.interruption.conftest import COMMAND, RESUME, assert_nothing_is_half_written, assert_same_run

KILLED = -signal.SIGKILL
STEP = "sat.module:ClassificationModule.training_step"
SWITCH = "sat.monitor:Monitor._measure_switch"


def resumed(folder: Path) -> None:
    """Go on to the end; anew only where nothing had been begun."""
    begun = any((folder / "runs").glob("tiny/*/checkpoints"))
    status, output = processes.run(folder, RESUME if begun else COMMAND)
    assert status == 0, output


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(("send", STEP, 6, signal.SIGKILL), id="dense", marks=pytest.mark.long),
        pytest.param(("send", SWITCH, 1, signal.SIGKILL), id="switch"),
        pytest.param(("killed_at_write", "last.ckpt", 4, True), id="checkpoint"),
        pytest.param(("killed_at_write", "layer1.safetensors", 1, False), id="layout", marks=pytest.mark.long),
        pytest.param(("killed_at_write", "cache/*.safetensors", 1, True), id="cache"),
    ],
)
def test_killed_at_a_chosen_moment(whole: Path, place: Path, fault: processes.Fault):
    status, output = processes.run(place, COMMAND, fault)
    assert status == KILLED, output
    assert_nothing_is_half_written(place)
    resumed(place)
    assert_same_run(whole, place)
    assert not list((place / "runs").rglob(".*.tmp"))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(50))
def test_killed_at_a_random_moment(whole: Path, place: Path, seed: int):
    """Even seeds: before a random access to the run's or the cache's files; odd ones: after a random time."""
    chance = random.Random(seed)
    if seed % 2:
        begin = time.monotonic()
        assert processes.run(place, COMMAND)[0] == 0
        duration = time.monotonic() - begin
        (place / "runs").rename(place / "runs_whole")
        if chance.random() < 0.3:
            (place / "cache").rename(place / "cache_whole")
        process = processes.start(place, COMMAND)
        time.sleep(chance.uniform(0, duration))
        process.kill()
        process.join()
    else:
        events = int((whole / "events").read_text())
        assert events > 50
        status, output = processes.run(place, COMMAND, ("killed_at_event", chance.randint(1, events)))
        assert status == KILLED, output
    assert_nothing_is_half_written(place)
    resumed(place)
    assert_same_run(whole, place)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again(whole: Path, place: Path, seed: int):
    chance = random.Random(seed)
    kills = 0
    while True:
        begun = any((place / "runs").glob("tiny/*/checkpoints"))
        process = processes.start(place, RESUME if begun else COMMAND)
        process.join(chance.uniform(0.5, 2.5) + 0.2 * kills)  # later each time, so that it comes to an end
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
        assert_nothing_is_half_written(place)
    assert process.exitcode == 0, (place / "output").read_text()
    assert_same_run(whole, place)
