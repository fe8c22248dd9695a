"""Trainings in processes of their own that can be killed anywhere; apart from the tests, since each process imports it.

They are forked from one process that has imported everything, which is why a training takes a second and not ten.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

PREPARED = multiprocessing.get_context("forkserver")
# Also what a training imports while it runs.
PREPARED.set_forkserver_preload(
    [
        "sat.train",
        "tests.interruption.processes",
        "torch.utils.tensorboard",
        "pandas",
        "matplotlib.backends.backend_agg",
    ]
)

ROOT = Path(__file__).parents[2]
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_RDONLY, MS_REMOUNT, MS_REC, MS_PRIVATE = 1, 32, 16384, 1 << 18
NOT_PERMITTED = 77

Fault = tuple[Any, ...]


def start(folder: Path, arguments: list[str], *faults: Fault) -> Any:
    """``python -m sat.train ARGUMENTS`` in ``folder``, with some faults; its output goes to ``folder/output``.

    A fault is the name of a function below and its arguments.
    """
    process = PREPARED.Process(target=_train, args=(folder, arguments, faults))
    process.start()
    return process


def run(folder: Path, arguments: list[str], *faults: Fault) -> tuple[int, str]:
    """The same to its end: exit status, as of :attr:`multiprocessing.Process.exitcode`, and output."""
    process = start(folder, arguments, *faults)
    process.join(120)
    assert process.exitcode is not None, "still running after two minutes"
    return process.exitcode, (folder / "output").read_text()


def _train(folder: Path, arguments: list[str], faults: tuple[Fault, ...]) -> None:
    os.chdir(folder)
    output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch

    from sat import saving, train

    assert Path(train.__file__).is_relative_to(ROOT), f"{train.__file__} is not what is to be tested; start from {ROOT}"
    torch.set_num_threads(1)
    saving.SaveLast.__init__.__defaults__ = (3,)  # saves every three steps, not every hundred
    status = 1
    try:
        for name, *values in faults:
            globals()[name](*values)
        train.main(arguments)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    for name, *values in faults:
        if name == "small_disk":  # which goes with the process
            shutil.copytree(values[0], f"{values[0]}_kept")
    sys.stdout.flush()
    os._exit(status)


def _before(target: str, number: int, act: Callable[[], None]) -> None:
    """Do something before the ``number``-th call of a function or method, ``module:name`` or ``module:class.name``."""
    module, _, name = target.partition(":")
    *outer, name = name.split(".")
    holder: Any = importlib.import_module(module)
    for each in outer:
        holder = getattr(holder, each)
    original = getattr(holder, name)
    calls = 0

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return original(*args, **kwargs)

    setattr(holder, name, called)


def environment(variables: dict[str, str]) -> None:
    """Set environment variables."""
    os.environ.update(variables)


def send_job(target: str, number: int, received: signal.Signals) -> None:
    """The same to all processes of the job, as schedulers do it; those that load data are among them."""
    os.setpgid(0, 0)
    _before(target, number, lambda: os.killpg(0, received))


def send(target: str, number: int, received: int) -> None:
    """The process gets a signal before the ``number``-th call of a function."""
    _before(target, number, lambda: os.kill(os.getpid(), received))


def killed_at_write(pattern: str, number: int, half: bool) -> None:
    """``kill -9`` when the ``number``-th file whose name matches is written: in the middle, or before it is moved."""
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "os.rename" and Path(os.fspath(args[1])).match(pattern):
            seen += 1
            if seen == number:
                if half:
                    os.truncate(args[0], Path(args[0]).stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed_at_event(number: int) -> None:
    """``kill -9`` before the ``number``-th time that this process opens, moves or removes a file below its folder."""
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in WRITING and _writes(event, args):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def count_events(path: str) -> None:
    """Write into a file how many events ``killed_at_event`` can choose from."""
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in WRITING and _writes(event, args):
            seen += 1

    sys.addaudithook(hook)
    from sat import train

    main = train.main

    def counted(*args: Any) -> Any:
        result = main(*args)
        Path(path).write_text(str(seen))
        return result

    train.main = counted


WRITING = ("open", "os.rename", "os.remove", "os.mkdir")


def _writes(event: str, args: tuple[Any, ...]) -> bool:
    if isinstance(args[0], int):
        return False
    below = Path(os.fsdecode(args[0])).absolute().is_relative_to(Path.cwd())
    return below and (event != "open" or bool(args[2] & (os.O_WRONLY | os.O_RDWR)))


def _call(function: Any, *args: Any) -> None:
    if function(*args) != 0:
        number = ctypes.get_errno()
        if number in (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOSPC, errno.EINVAL):
            os._exit(NOT_PERMITTED)
        raise OSError(number, os.strerror(number))


def small_disk(folder: str, size: int) -> None:
    """Put a disk of so many bytes of its own under a folder, which only this process sees; what was there is on it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0:
        _call(libc.unshare, CLONE_NEWNS)
    else:
        ids = os.getuid(), os.getgid()
        _call(libc.unshare, CLONE_NEWNS | CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {ids[0]} 1")
        Path("/proc/self/gid_map").write_text(f"0 {ids[1]} 1")
    _call(libc.mount, b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    place = Path(folder).absolute()
    saved = place.with_name(f"{folder}_before")
    place.mkdir(exist_ok=True)
    shutil.copytree(place, saved)
    _call(libc.mount, b"tmpfs", bytes(place), b"tmpfs", 0, f"size={size}".encode())
    shutil.copytree(saved, place, dirs_exist_ok=True)
    shutil.rmtree(saved)


def read_only(folder: str) -> None:
    """Let that disk be read only."""
    libc = ctypes.CDLL(None, use_errno=True)
    _call(libc.mount, b"tmpfs", bytes(Path(folder).absolute()), b"tmpfs", MS_REMOUNT | MS_RDONLY, None)


def full_at(folder: str, target: str, number: int) -> None:
    """Fill that disk to its last bytes before the ``number``-th call of a function."""

    def fill() -> None:
        with suppress(OSError), (Path(folder) / "filler").open("wb", buffering=0) as file:
            for size in (1 << 16, 1 << 9, 1):
                with suppress(OSError):
                    while file.write(bytes(size)):
                        pass

    _before(target, number, fill)


def second_signal(target: str, number: int, received: int) -> None:
    """The process gets a signal twice, the second one later than what counts as the same."""

    def twice() -> None:
        from sat import saving

        os.kill(os.getpid(), received)
        saving.SAME_SIGNAL = -1.0
        os.kill(os.getpid(), received)

    _before(target, number, twice)
