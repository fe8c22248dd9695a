"""How much memory a call takes on a CPU: the most that a process of its own held, beyond what it held before."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

Make = Callable[..., tuple[Callable[[], Any], Callable[[], Any]]]


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a module returns in a process of its own; None where the system ended that process."""
    # The server has imported PyTorch once; each process that it forks is as fresh as a new one, within a second.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.gpu_suite.attention"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:  # the system ended it, as it does with what wants too much memory
            return None


def peak_mib(make: Make, *arguments: Any, threads: int) -> float | None:
    """MiB that a call takes beyond its inputs, results included; None if there was not enough for it.

    Args:
        make: a function of a module, which makes, from ``arguments``, the call and a small one of the same kind.
            Libraries allocate at their first call: the small one runs first and is not counted.
        arguments: of ``make``; they are sent to the process.
        threads: of PyTorch.
    """
    found: float | None = alone(_peak, make, arguments, threads)
    return found


def _peak(make: Make, arguments: tuple[Any, ...], threads: int) -> float:
    torch.set_num_threads(threads)
    call, small = make(*arguments)
    small()
    # From here on, and not since the beginning, where the system lets a process say so.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _high_water_mib()
    call()
    return round(_high_water_mib() - before, 1)


def _high_water_mib() -> float:
    """Most memory that this process has held so far. (getrusage would include its parent's, from before the exec.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024
