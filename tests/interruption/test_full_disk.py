"""A full disk and a folder that cannot be written end in a sentence, and what was saved before stays whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.interruption import processes
from tests.interruption.conftest import (
    COMMAND,
    RESUME,
    assert_nothing_is_half_written,
    assert_same_run,
    run_folder,
)

MIB = 1 << 20


def sentence(status: int, output: str) -> str:
    if status == processes.NOT_PERMITTED:
        pytest.skip("no file system may be mounted here")
    assert "Traceback" not in output, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("sat.train: "), output
    return last


@pytest.mark.parametrize(
    ("place_of_failure", "expected", "saved"),
    [
        pytest.param(("sat.saving:SaveLast.save", 2), "last.ckpt cannot be written (No space left", 3, id="last"),
        pytest.param(
            ("lightning.pytorch.callbacks:ModelCheckpoint._save_checkpoint", 1),
            "best.ckpt cannot be written (No space left",
            6,
            id="best",
            marks=pytest.mark.long,
        ),
        pytest.param(
            ("lightning.pytorch.loggers:CSVLogger.save", 1), "(No space left", None, id="log", marks=pytest.mark.long
        ),
        pytest.param(("sat.runs:save_layouts", 1), "cannot be written (No space left", 20, id="layouts"),
        pytest.param(
            ("sat.runs:write_summary", 1),
            "summary.json cannot be written (No space left",
            20,
            id="summary",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_disk_that_fills_up(
    whole: Path, place: Path, place_of_failure: tuple[str, int], expected: str, saved: int | None
):
    faults = ("small_disk", "runs", 8 * MIB), ("full_at", "runs", *place_of_failure)
    status, output = processes.run(place, COMMAND, *faults)
    message = sentence(status, output)
    assert status == 1
    assert expected in message
    (place / "runs_kept" / "filler").unlink()
    shutil.copytree(place / "runs_kept", place / "runs", dirs_exist_ok=True)
    assert_nothing_is_half_written(place)
    assert not list(place.rglob(".*.tmp"))
    last = run_folder(place) / "checkpoints" / "last.ckpt"
    if saved is None:
        assert not last.exists()
    else:
        assert torch.load(last, weights_only=True)["global_step"] == saved
        assert f"the last good checkpoint is {last.relative_to(place)}" in message
    if saved in (None, 3):
        status, output = processes.run(place, RESUME)
        assert status == 0, output
        assert_same_run(whole, place)


@pytest.mark.parametrize(
    ("folder", "place_of_failure", "expected"),
    [
        ("runs", "sat.train:written_whole", "config.yaml cannot be written (No space left on device)"),
        ("cache", "sat.data.cache:_write", ".safetensors cannot be written (No space left on device)"),
    ],
)
def test_a_disk_that_is_full_at_the_start(place: Path, folder: str, place_of_failure: str, expected: str):
    faults = ("small_disk", folder, MIB), ("full_at", folder, place_of_failure, 1)
    status, output = processes.run(place, COMMAND, *faults)
    assert expected in sentence(status, output)
    assert status == 2
    assert [path.name for path in (place / f"{folder}_kept").iterdir()] == ["filler"]


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("runs", "cannot write to the run folder runs/tiny/"),
        ("cache", "cannot be written to cache (Read-only file system); pass a writable folder as --data.cache_dir"),
    ],
)
def test_a_folder_that_is_read_only(place: Path, folder: str, expected: str):
    status, output = processes.run(place, COMMAND, ("small_disk", folder, MIB), ("read_only", folder))
    assert expected in sentence(status, output)
    assert status == 2


def test_a_run_that_has_become_read_only_is_not_resumed(whole: Path, place: Path):
    shutil.copytree(whole / "runs", place / "runs")
    status, output = processes.run(place, RESUME, ("small_disk", "runs", 8 * MIB), ("read_only", "runs"))
    message = sentence(status, output)
    assert "cannot write to the run folder" in message
    assert "(Read-only file system); choose another --output_dir" in message
    assert status == 2
