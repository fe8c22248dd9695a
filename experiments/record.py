"""Where and with what something was measured, and an honest clock."""

from __future__ import annotations

import argparse
import fcntl
import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from sat.files import written_whole

RESULTS = Path(__file__).parent / "results"
# Of the results: one that a reader does not know was written by another version of these experiments.
FORMAT = 1


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep others from adding to the same results meanwhile, whose file each writes whole.

    Args:
        path: of the results.

    Raises:
        BlockingIOError: another process does so; a sentence.
    """
    folder = path.parent / "runs"  # which git ignores
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{path.stem}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however that ends
        except BlockingIOError as error:
            raise BlockingIOError(
                f"another process is measuring for {path}; wait for it, or give another --out"
            ) from error
        yield


def lose_nothing(path: Path, there: Callable[[Any], Collection[Any]], wanted: Collection[Any]) -> None:
    """Refuse to write a part of what a file holds over all of it.

    Args:
        path: of the results.
        there: from a file's content to what it has measured.
        wanted: what is to be measured.

    Raises:
        ValueError: the file has more; a sentence.
    """
    try:
        lost = [each for each in there(json.loads(path.read_text())) if each not in wanted]
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or none that anybody could use
        return
    if lost:
        raise ValueError(
            f"{path} has figures of {', '.join(map(str, lost))} too, which would be lost; measure these as well, or "
            f"give another --out"
        )


def read_runs(file: Path, fields: Collection[str]) -> list[dict[str, Any]]:
    """The runs that a file of results has; none where there is no file.

    Args:
        file: of the results.
        fields: that each run has.

    Raises:
        ValueError: the file is none of this experiment.
    """
    if not file.is_file():
        return []
    try:
        runs: list[dict[str, Any]] = json.loads(file.read_text())["runs"]
        if not all(set(fields) <= run.keys() for run in runs):
            raise ValueError(f"a run lacks one of {', '.join(sorted(fields))}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} holds no results of this experiment ({error}); give another --out") from error
    return runs


def environment(device: str | None = None) -> dict[str, Any]:
    """Device, versions, commit and day.

    Args:
        device: "cpu" names the processor also where there is a GPU, which is named otherwise.
    """
    cpu = next((x.split(": ")[1] for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), "")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    # But for the results themselves, which change as they are measured.
    changes = _git(
        "status", "--porcelain", "sat", "configs", "experiments", ":!experiments/results/", ":!experiments/RESULTS.md"
    )
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"{cpu or platform.processor()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if changes else ""),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """End with a sentence where a GPU was asked for and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA GPU, and PyTorch finds none here; leave it out to measure on the CPU")


def device_slug(device: str) -> str:
    """The device in a file's name: "cpu", or the GPU's name."""
    if device == "cpu":
        return device
    return re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()).strip("_")


def _git(*arguments: str) -> str:
    """What git says of these experiments; nothing where there is no git, or no repository."""
    root = Path(__file__).parents[1]
    try:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        ).stdout.strip()
    except FileNotFoundError:
        return ""


def interleaved(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each function, called in turn, ``rounds`` times after one call that is not counted.

    In turn, so that whatever slows the machine for a while slows all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for index in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if index:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median, and the spread as quartiles."""
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median_ms": round(middle, 2), "quartiles_ms": [round(low, 2), round(high, 2)]}  # type: ignore[dict-item]


def ratio(times: Mapping[str, list[float]], slow: str, fast: str) -> float:
    """How many times faster one function is: the median over the rounds of the ratio within a round."""
    return round(statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True)), 2)


def note_of(path: Path) -> dict[str, Any]:
    """What somebody has written into a file of results, as ``note``; nothing where nobody has."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return {"note": json.loads(path.read_text())["note"]}
    return {}


def save(
    name: str, command: str, figures: Mapping[str, Any], folder: Path = RESULTS, *, device: str | None = None
) -> Path:
    """Write ``experiments/results/name.json``, or into another folder; whole or not at all.

    A ``note`` that somebody has written into the file before stays, such as where the data came from.

    Args:
        name: of the file.
        command: what makes it.
        figures: what was measured.
        folder: made if it is not there.
        device: as for :func:`environment`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    content = {**note_of(path), "format": FORMAT, "command": command, **environment(device), **figures}
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    return path
