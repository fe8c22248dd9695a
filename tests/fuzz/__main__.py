"""``python -m tests.fuzz --count 100000``: damaged and hostile files, and what the readers make of them.

An input passes if it is read, or refused with a sentence of ours, within its time and memory, and nothing else happens:
no code of the file runs, no module is imported for it, no process is started, nothing is written outside of its folder.
A failure is repeated with ``--kind KIND --first NUMBER --count 1``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Of all inputs; resuming trains for some steps, the others read only.
SHARES = {"layout": 0.45, "transformers": 0.15, "cache": 0.2, "config": 0.05, "checkpoint": 0.147, "resume": 0.003}
# The promise: reading takes no more memory than this multiple of the file, besides what any reading takes.
MULTIPLE, BESIDES = 4, 32 * 2**20
SECONDS = 20
AT_A_TIME = 5000  # in one process

# Audit events of programs that are started and of connections that are made.
OUTWARD = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen"}
OUTWARD |= {"socket.connect", "socket.getaddrinfo"}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONWARNINGS": "ignore",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    "CUDA_VISIBLE_DEVICES": "",
}


class TooSlow(BaseException):
    pass


def memory(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


class Watch:
    """Notes what reading a file must not do, while it is armed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.armed, self.found = folder, False, ""
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event in OUTWARD:
            self.found = f"{event}{arguments!r:.200}"
        elif event == "import" and arguments[0].split(".")[0] == "canary":
            self.found = "an import of canary"
        elif event == "open" and isinstance(path := arguments[0], str) and isinstance(flags := arguments[2], int):
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not path.startswith(("/dev/", "/proc/"))
            if writes and not Path(path).resolve().is_relative_to(self.folder.resolve()):
                self.found = f"writing {path}"

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self.armed, self.found = True, ""
        try:
            yield
        finally:
            self.armed = False


def wrong_with(error: BaseException) -> str:
    """What keeps an exception from being a sentence of ours; nothing if it is one."""
    frames = traceback.extract_tb(error.__traceback__)
    text = str(error)
    if not isinstance(error, ValueError | OSError):
        return type(error).__name__
    ours = frames and Path(frames[-1].filename).is_relative_to(ROOT / "sat")
    if not ours or not (frames[-1].line or "").startswith("raise "):  # what int() says of a text is no sentence of ours
        return f"{type(error).__name__} that is not ours"
    if not text.strip() or "\n" in text or len(text) > 3000:
        return f"{type(error).__name__} of {len(text)} characters"
    if any(word in text for word in ("MemoryError", "allocate", "out of memory", "RecursionError")):
        return "memory"
    return ""


def work(kind: str, first: int, count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Read some inputs in this process."""
    import torch

    from tests.fuzz.targets import target

    torch.set_num_threads(1)
    here = target(kind, folder)
    place = folder / "input" / f"input{here.suffix}"
    place.parent.mkdir(parents=True)
    os.chdir(folder)
    tempfile.tempdir = str(folder)
    (folder / "canary.py").write_text("class C:\n    pass\n")
    sys.path.insert(0, str(folder))
    canary, watch = folder / "canary", Watch(folder)

    def too_slow(*_: Any) -> None:
        raise TooSlow

    signal.signal(signal.SIGALRM, too_slow)
    result: dict[str, Any] = {
        "inputs": 0,
        "read": 0,
        "refused": 0,
        "failures": [],
        "largest_growth": 0,
    }
    for index in [-1, *range(first, first + count)]:
        # The first is valid, and takes what the libraries take once.
        data = here.seeds[-1] if index < 0 else here.make(Random(f"{seed} {kind} {index}"))
        place.write_bytes(data)
        (folder / "at").write_text(str(index))
        torch.manual_seed(0)
        Path("/proc/self/clear_refs").write_text("5")
        before, wrong = memory("VmRSS"), ""
        limit = memory("VmSize") + 2**30
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        signal.alarm(SECONDS)
        try:
            with watch():
                here.read(place)
            result["read"] += index >= 0
        except TooSlow:
            wrong = f"more than {SECONDS} s"
        except BaseException as error:
            wrong = wrong_with(error) or ("it is refused" if index < 0 else "")
            wrong = (
                wrong and f"{wrong}: {str(error)[:300]} at {traceback.format_tb(error.__traceback__)[-1].strip()[:300]}"
            )
            result["refused"] += index >= 0
        finally:
            signal.alarm(0)
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        growth = max(memory("VmHWM") - before, 0)
        if growth > BESIDES + MULTIPLE * len(data) and kind != "resume" and index >= 0:  # which trains, besides reading
            wrong = wrong or f"{growth:,} bytes of memory for a file of {len(data):,}"
        if watch.found:
            wrong = watch.found
        if canary.exists():
            canary.unlink()
            wrong = "code of the file ran"
        if index < 0:
            if wrong:
                raise RuntimeError(f"a valid {kind} file fails: {wrong}")
            continue
        result["inputs"] += 1
        result["largest_growth"] = max(result["largest_growth"], growth)
        if wrong:
            result["failures"].append({"kind": kind, "number": index, "what": wrong})
    return result


def apart(kind: str, first: int, count: int, seed: int) -> dict[str, Any]:
    """The same in a process of its own, which may crash."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.fuzz", "--work", folder, "--kind", kind, "--first", str(first)]
        command += ["--count", str(count), "--seed", str(seed)]
        environment = {**os.environ, **ENVIRONMENT, "TMPDIR": folder}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return found
        at = Path(folder) / "at"
        number = int(at.read_text()) if at.is_file() else first
        what = f"the process ended with {done.returncode}: {done.stderr.strip()[-600:]}"
    if number < first:
        raise RuntimeError(f"{kind}: {what}")
    failed = {"inputs": 1, "read": 0, "refused": 0, "failures": [{"kind": kind, "number": number, "what": what}]}
    rest = first + count - number - 1
    parts = [failed | {"largest_growth": 0}]
    parts += [apart(kind, first, number - first, seed)] if number > first else []
    parts += [apart(kind, number + 1, rest, seed)] if rest else []
    return total(parts)


def total(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What several processes found."""
    together: dict[str, Any] = {name: sum(part[name] for part in parts) for name in ("inputs", "read", "refused")}
    together["failures"] = [failure for part in parts for failure in part["failures"]]
    return together | {"largest_growth": max(part["largest_growth"] for part in parts)}


def here(kind: str, first: int, count: int, seed: int) -> dict[str, Any]:
    """The same in this process, which then need not start anew for each kind."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return work(kind, first, count, seed, Path(folder))
        finally:
            os.chdir(ROOT)  # out of the folder that goes now
            tempfile.tempdir = None


def run(
    count: int,
    seed: int,
    kinds: list[str],
    first: int = 0,
    jobs: int = 1,
    read: Callable[[str, int, int, int], dict[str, Any]] = apart,
) -> dict[str, Any]:
    """All kinds by their shares."""
    start, share = time.time(), sum(SHARES[kind] for kind in kinds)
    wanted = {kind: max(1, round(count * SHARES[kind] / share)) for kind in kinds}
    pieces = [
        (kind, first + begin, min(AT_A_TIME, wanted[kind] - begin))
        for kind in kinds
        for begin in range(0, wanted[kind], AT_A_TIME)
    ]
    # An alarm rings in the main thread alone.
    with ThreadPoolExecutor(jobs) as threads:
        each = threads.map if read is apart else map
        found = list(each(lambda piece: (piece[0], read(*piece, seed)), pieces))
    by_kind = {kind: total([result for name, result in found if name == kind]) for kind in kinds}
    everything = total(list(by_kind.values()))
    return {
        "seed": seed,
        **{name: everything[name] for name in ("inputs", "read", "refused", "failures")},
        "kinds": {kind: {k: v for k, v in part.items() if k != "failures"} for kind, part in by_kind.items()},
        "allowed_memory": f"{MULTIPLE} times the file and {BESIDES / 2**20:.0f} MiB",
        "seconds": round(time.time() - start),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="inputs of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=list(SHARES), help="only this one; may be repeated")
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each kind")
    parser.add_argument("--jobs", type=int, default=1, help="processes beside each other")
    parser.add_argument("--here", action="store_true", help="in this process, which a crash then ends")
    parser.add_argument("--save", metavar="NAME", help="write experiments/results/NAME.json")
    parser.add_argument("--work", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    kinds = arguments.kind or list(SHARES)
    if arguments.work:
        print(json.dumps(work(kinds[0], arguments.first, arguments.count, arguments.seed, Path(arguments.work))))
        return
    result = run(
        arguments.count, arguments.seed, kinds, arguments.first, arguments.jobs, here if arguments.here else apart
    )
    print(json.dumps(result, indent=1))
    if arguments.save:
        from experiments.record import save

        save(arguments.save, f"python -m tests.fuzz --count {arguments.count} --seed {arguments.seed}", result)
    raise SystemExit(bool(result["failures"]))


if __name__ == "__main__":
    main()
