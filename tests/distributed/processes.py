"""Real processes for the tests of this folder: forked from one server that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

TIMEOUT = 120  # seconds until what still runs counts as hanging


class Outcome(NamedTuple):
    """What a process left: exit status (negative: the signal), what it printed, and what its function returned."""

    status: int
    out: str
    error: str
    value: Any


def launch(count: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Outcome]:
    """Run ``function(*arguments)``, one of tests/distributed/work.py, in so many processes that make up one job.

    As torchrun starts them: the environment says who is who. They work in ``folder``. A process that has not ended
    after ``TIMEOUT`` seconds fails the test, unless it has stopped itself.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.work"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = [folder / f"process{time.monotonic_ns()}_{rank}" for rank in range(count)]
    processes = [
        context.Process(target=_work, args=(rank, count, port, str(folder), str(place), function, arguments))
        for rank, place in enumerate(places)
    ]
    for process in processes:
        process.start()
    until = time.monotonic() + TIMEOUT
    while time.monotonic() < until and any(p.is_alive() and not _is_frozen(p.pid) for p in processes):
        time.sleep(0.05)
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive() and not _is_frozen(process.pid)]
    for process in processes:
        process.kill()
        process.join()
    outcomes = []
    for process, place in zip(processes, places, strict=True):
        value = place.with_suffix(".value")
        outcomes.append(
            Outcome(
                process.exitcode or 0,
                place.with_suffix(".out").read_text(),
                place.with_suffix(".err").read_text(),
                pickle.loads(value.read_bytes()) if value.is_file() else None,
            )
        )
        for suffix in (".out", ".err", ".value"):
            place.with_suffix(suffix).unlink(missing_ok=True)
    assert not hanging, f"ranks {hanging} hang: {outcomes}"
    return outcomes


def _is_frozen(pid: int | None) -> bool:
    """Whether a process has stopped itself."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _work(
    rank: int, count: int, port: int, folder: str, place: str, function: Callable[..., Any], arguments: tuple
) -> None:
    for number, suffix in ((1, ".out"), (2, ".err")):
        file = os.open(place + suffix, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    os.chdir(folder)
    if count > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    rank_zero_only.rank = rank  # read from the environment when Lightning was imported, which the server did
    torch.set_num_threads(1)
    status = 0
    try:
        value = function(*arguments)
        Path(place + ".value").write_bytes(pickle.dumps(value))
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 99
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # what the server's imports have registered for the end of the process is not ours
