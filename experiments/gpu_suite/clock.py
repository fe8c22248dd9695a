"""Times and memory, side by side in one run.

Two times are taken. ``ms`` is the device's: it is kept busy until all calls of a batch have been launched, so that
launching costs nothing. ``wall_ms`` is what a caller waits for, call after call, launches included. For every function
the same, in turn, round after round; the median is over rounds. Inputs are not rotated: they are to be larger than the
cache, or the figures say how large they were.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from experiments.gpu_suite.case import sentence

Function = Callable[[], Any]
ASSUMED_CLOCK = 2e9  # cycles a second; only how long the device is kept waiting depends on it


class Times(NamedTuple):
    """Milliseconds a call, one for each round."""

    device: list[float]
    wall: list[float]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def spread(values: list[float]) -> dict[str, float]:
    """Least, median and largest, to 4 digits."""
    three = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in three.items()}


def works(functions: Mapping[str, Function], device: str) -> tuple[dict[str, Function], dict[str, str]]:
    """The functions that ran twice, and what those said that did not.

    An error that has broken the device is raised anew by the synchronization after it, and ends the case.
    """
    running, errors = {}, {}
    for name, function in functions.items():
        try:
            for _ in range(2):
                function()
            synchronize(device)
            running[name] = function
        except Exception as error:
            errors[name] = sentence(error)
        if name in errors and device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    return running, errors


def _wall(function: Function, calls: int, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start) / calls


def _device(function: Function, calls: int, launch_seconds: float) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(int(ASSUMED_CLOCK * min(0.2, 1.5 * calls * launch_seconds)))
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def measure(functions: Mapping[str, Function], device: str, rounds: int = 7, batch_ms: float = 8.0) -> dict[str, Times]:
    """Time functions that have run before, in turn. Short ones are called several times a round, up to ``batch_ms``."""
    times = {name: Times([], []) for name in functions}
    calls, launch = {}, {}
    for name, function in functions.items():
        synchronize(device)
        start = time.perf_counter()
        function()
        launch[name] = time.perf_counter() - start
        synchronize(device)
        calls[name] = max(1, min(20, int(batch_ms / 1e3 / (time.perf_counter() - start))))
    for _ in range(rounds):
        for name, function in functions.items():
            wall = _wall(function, calls[name], device)
            times[name].wall.append(wall)
            times[name].device.append(_device(function, calls[name], launch[name]) if device == "cuda" else wall)
    return times


def peak_mib(function: Function, device: str) -> float | None:
    """Most memory that a call held beyond what was held before it, its results included; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)


def figures(functions: Mapping[str, Function], device: str, rounds: int = 7) -> tuple[dict[str, Any], dict[str, Times]]:
    """Times and memory of each function that runs, and the error of each that does not."""
    running, errors = works(functions, device)
    memory = {name: peak_mib(function, device) for name, function in running.items()}
    times = measure(running, device, rounds)
    found: dict[str, Any] = {name: {"error": error} for name, error in errors.items()}
    for name, (on_device, wall) in times.items():
        found[name] = {"ms": spread(on_device), "wall_ms": spread(wall), "peak_mib": memory[name]}
    return found, times


def faster(times: Mapping[str, Times], slow: str, fast: str, *, wall: bool = False) -> float | None:
    """How many times faster: the median over the rounds of the ratio within a round; None if one did not run."""
    if slow not in times or fast not in times:
        return None
    pairs = zip(*((times[name].wall if wall else times[name].device) for name in (slow, fast)), strict=True)
    return round(statistics.median(a / b for a, b in pairs), 3)


_ceilings: dict[tuple[str, torch.dtype], dict[str, float]] = {}


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Matrix rate in this dtype (TFLOP/s) and bandwidth (TB/s) of this device, measured once in a process.

    A product of two square matrices of random numbers, and a copy, counting bytes read and bytes written.
    """
    if (device, dtype) not in _ceilings:
        cuda = device == "cuda"
        side, items = (8192, 2**31) if cuda else (256, 2**20)
        if dtype == torch.float32:
            side //= 2
        left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        source = torch.empty(items, device=device, dtype=torch.uint8).random_(256)
        target = torch.empty_like(source)
        functions: dict[str, Function] = {"matmul": lambda: left @ right, "copy": lambda: target.copy_(source)}
        for function in functions.values():
            function()
        times = measure(functions, device, rounds=9)
        product, copy = (statistics.median(times[name].device) for name in ("matmul", "copy"))
        _ceilings[device, dtype] = {
            "matmul_tflops": round(2 * side**3 / product / 1e9, 3),
            "copy_tb_s": round(2 * items / copy / 1e9, 4),
        }
    return _ceilings[device, dtype]
