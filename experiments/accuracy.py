"""Does it reach the accuracy, and what does it cost: methods over tasks and seeds, all else equal.

    python -m experiments.accuracy --data FOLDER                     # small: some five hours of one CPU core
    python -m experiments.accuracy --tasks digits                    # embedded in scikit-learn, nothing to download
    python -m experiments.accuracy --scale paper --tasks cifar10 --data FOLDER --minutes 9.5          # on a GPU
    python -m experiments.accuracy --scale paper --steps 10000 ...   # as long as the paper trained
    python -m experiments.accuracy --jobs 2 --data FOLDER            # two at a time: their steps take longer
    python -m experiments.accuracy --table                           # what has been measured so far

FOLDER holds a folder for each task: cifar10, inaturalist, ag_news, yelp_reviews; without --data, all but inaturalist
come from the Hugging Face hub. Each run is kept in the results as it ends. The command given again leaves out what is
there, trains what is missing, and goes on in the middle of a run that was cut off. Runs with other settings, or on
other data, are never counted together.

small: sequences of 256 tokens, 1,000 steps of 32 (AG News: 2,000) on one CPU thread, two to nine minutes a run. The
paper's method is dense for the first tenth of the steps, SAT until its choice of blocks has settled, which is sooner;
then a tenth of the blocks are kept (of 8 tokens, 32 x 32 of them). paper: configs/*_paper.yaml with fewer steps, see
docs/paper.md.
Writes accuracy_SCALE.json, and figures of accuracy and cost in plots/ beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from rich.console import Console

from experiments import accuracy_show, record
from experiments.accuracy_settings import (
    DEFAULT_METHODS,
    DEFAULT_TASKS,
    EVERY_TASK,
    METHODS,
    TASKS,
    Settings,
    density,
    overrides,
    pretraining,
    read_structures,
    settings,
)
from sat.data import DATASETS

One = TypeVar("One")  # a run, of this experiment or of another


class Data(NamedTuple):
    """What is known of a task's data once they have been prepared."""

    path: Path | None
    samples: dict[str, int]
    seq_len: int
    most_frequent: float  # share of the test samples that are of the most frequent class


def prepare(task: str, options: Settings, folder: Path | None) -> Data:
    """Read the data and fill the cache, so that no run that is timed has to.

    Raises:
        ValueError, OSError: there are no such data; a sentence.
    """
    own = EVERY_TASK[task].folder
    path = folder / own if folder is not None and own is not None else None
    if path is not None and not path.is_dir():
        raise FileNotFoundError(f"no data for the task {task}: there is no folder {path}; correct --data or --tasks")
    section = {name.removeprefix("data."): value for name, value in options.items() if name.startswith("data.")}
    arguments = section if path is None else {**section, "path": str(path)}
    data = DATASETS[arguments.pop("name")](**arguments)
    data.prepare_data()
    data.setup("fit")
    loaders: dict[str, Any] = {
        "train": data.train_dataloader(),
        "validation": data.val_dataloader(),
        "test": data.test_dataloader(),
    }
    labels = torch.cat([batch["labels"] for batch in loaders["test"]])
    most_frequent = labels.bincount().max().item() / len(labels)
    samples = {name: len(loader.dataset) for name, loader in loaders.items()}
    return Data(path, samples, data.seq_len, round(most_frequent, 4))


class Run(NamedTuple):
    """One training."""

    task: str
    method: str
    seed: int
    own: Settings  # what it has otherwise than its config
    before: Settings | None  # the same of the run that pretrains it, if one does
    options: Settings
    density: float | None  # None: that will be learned
    path: Path | None
    most_frequent: float  # see Data

    def is_like(self, done: dict[str, Any]) -> bool:
        return all(done[name] == getattr(self, name) for name in ("task", "method", "seed", "options"))

    def command(self, folder: Path, name: str, own: Settings, init_from: Path | None) -> list[str]:
        """Of the training, or of the one before, which goes on where it was cut off."""
        arguments = ["--config", EVERY_TASK[self.task].config, "--output_dir", str(folder), "--name", name]
        arguments += ["--seed", str(self.seed), *([] if self.path is None else ["--data.path", str(self.path)])]
        for option, value in own.items():
            arguments += [f"--{option}", value if isinstance(value, str) else json.dumps(value)]
        if any(folder.glob(f"{name}/*/checkpoints")):
            arguments += ["--ckpt_path", "last"]
        if init_from is not None:  # also for one that was stopped before its first checkpoint, and begins anew
            arguments += ["--init_from", str(init_from)]
        return [sys.executable, "-m", "sat.train", *arguments]


def execute(command: list[str], log: Path, environment: dict[str, str]) -> int:
    """The exit status of another program, whose output goes to the log."""
    with log.open("a") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
        try:
            return process.wait()
        except KeyboardInterrupt:  # the terminal has sent it to the training too, which saves what it has
            process.wait()
            raise


def train(run: Run, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """The summary of one run, in a process of its own: memory is then its own, too.

    Raises:
        RuntimeError: it failed, with its last line and the place of its log.
        KeyboardInterrupt: it was interrupted.
    """
    digest = hashlib.sha256(json.dumps(run.options, sort_keys=True).encode()).hexdigest()[:8]
    place = folder / f"{run.task}-{run.method}-{run.seed}-{digest}"
    place.mkdir(parents=True, exist_ok=True)
    log = place / "log.txt"

    def finish(name: str, own: Settings, init_from: Path | None = None) -> Path:
        """The summary of a run of this name, which is trained if it is not there yet."""
        if not (ended := [*place.glob(f"{name}/*/summary.json")]):
            status = execute(run.command(place, name, own, init_from), log, environment)
            if status in (130, 143, -2, -15):  # by Ctrl-C or SIGTERM
                raise KeyboardInterrupt
            if status:
                last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
                if status < 0:  # its last line is no cause then
                    last = f"ended by {signal.Signals(-status).name}, which a lack of memory does, too, after: {last}"
                raise RuntimeError(f"{run.task}, {run.method}, seed {run.seed} failed: {last} ({log})")
            ended = [*place.glob(f"{name}/*/summary.json")]
        return ended[0]

    before = None if run.before is None else finish("pretraining", run.before)
    summary: dict[str, Any] = json.loads(finish("run", run.own, before and before.parent).read_text())
    if before is not None:
        own = json.loads(before.read_text())
        kept = ("steps", "density", "training_seconds", "median_step_ms", "peak_memory_mib", "test_accuracy")
        summary["pretraining"] = {name: own[name] for name in kept}
        summary["training_seconds"] += own["training_seconds"]
    shutil.rmtree(place)
    return summary


def read_runs(file: Path) -> list[dict[str, Any]]:
    """What has been measured so far; see :func:`record.read_runs`."""
    return record.read_runs(file, {"task", "method", "seed", "density", "options", "summary"})


def plan(args: argparse.Namespace) -> list[Run]:
    """The runs that are asked for, their data prepared and their settings checked.

    Raises:
        ValueError, OSError: something is not what it should be; a sentence.
    """
    structures = read_structures(args.structure)
    methods = [*args.methods, *structures]
    runs = []
    for task in args.tasks:
        known = EVERY_TASK[task]
        steps = args.steps or (known.small_steps if args.scale == "small" else known.steps)
        if steps is None and task in TASKS:
            raise ValueError(f"the task {task} is there for --scale small only; choose others with --tasks")
        own = {method: overrides(args.scale, task, method, steps, structures) for method in methods}
        data = prepare(task, settings(task, own[methods[0]], {}), args.data)
        for method in methods:
            before = pretraining(args.scale, task, own[method])
            options = settings(task, own[method], data.samples, before)
            share = density(options, data.seq_len)
            runs += [
                Run(task, method, seed, own[method], before, options, share, data.path, data.most_frequent)
                for seed in args.seeds
            ]
    # Seed by seed, so that a run of the experiment that is cut short has something of everything.
    return sorted(runs, key=lambda run: args.seeds.index(run.seed))


def finished(
    runs: Sequence[One], work: Callable[[One], dict[str, Any]], jobs: int, may_begin: Callable[[int], bool]
) -> Iterator[tuple[One, dict[str, Any] | RuntimeError, float]]:
    """Each run as it ends, with its summary or what it failed with, and the seconds it took.

    Args:
        runs: in the order in which they begin.
        work: trains one.
        jobs: so many at a time.
        may_begin: asked before each, with the number of those that have not begun yet; after a no, none begins.
    """

    def timed(run: One) -> tuple[One, dict[str, Any] | RuntimeError, float]:
        start = time.monotonic()
        try:
            result: dict[str, Any] | RuntimeError = work(run)
        except RuntimeError as error:
            result = error
        return run, result, time.monotonic() - start

    waiting = list(runs)
    if jobs == 1:  # in this thread, which Ctrl-C reaches
        while waiting and may_begin(len(waiting)):
            yield timed(waiting.pop(0))
        return
    with ThreadPoolExecutor(jobs) as pool:
        going: set[Future[Any]] = set()
        while True:
            while waiting and len(going) < jobs:
                if may_begin(len(waiting)):
                    going.add(pool.submit(timed, waiting.pop(0)))
                else:
                    waiting = []
            if not going:
                return
            done, going = wait(going, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()


def measure(
    wanted: list[Run], runs: list[dict[str, Any]], args: argparse.Namespace, begun: float, console: Console
) -> list[str]:
    """Train what is missing; each run is saved with the others as it ends. Gives a sentence for each that failed."""
    missing = [run for run in wanted if not any(run.is_like(done) for done in runs)]
    console.print(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them done before", highlight=False)
    environment = {"OMP_NUM_THREADS": "1"} if args.scale == "small" else {}
    failures: list[str] = []
    took: list[float] = []

    def may_begin(rest: int) -> bool:
        if args.minutes is None or (time.monotonic() - begun) / 60 < args.minutes:
            return True
        console.print(f"{args.minutes:g} minutes are over; the same command trains the {rest} that are left")
        return False

    def work(run: Run) -> dict[str, Any]:
        return train(run, args.out / "runs" / f"{args.experiment}_{args.scale}", environment)

    for index, (run, summary, seconds) in enumerate(finished(missing, work, args.jobs, may_begin), 1):
        name = f"{index}/{len(missing)}: {run.task}, {run.method}, seed {run.seed}"
        if isinstance(summary, RuntimeError):
            failures.append(str(summary))
            console.print(str(summary), highlight=False, soft_wrap=True)
            continue
        took.append(seconds)
        runs.append(
            {
                "task": run.task,
                "method": run.method,
                "seed": run.seed,
                # A layout that was never learned has all blocks.
                "density": run.density or summary["density"] or 1.0,
                "most_frequent_class": run.most_frequent,
                "commit": record.environment()["commit"],
                "options": run.options,
                "summary": summary,
            }
        )
        command = f"python -m experiments.{args.experiment} --scale {args.scale} --data FOLDER"
        command += f" --jobs {args.jobs}" if args.jobs > 1 else ""
        device = "cpu" if args.scale == "small" else None
        record.save(f"{args.experiment}_{args.scale}", command, {"runs": runs}, args.out, device=device)
        left = statistics.mean(took) * (len(missing) - index) / args.jobs / 60
        found = f"accuracy {summary['test_accuracy']['final']:.3f}, {seconds:.0f} s"
        console.print(f"{name}: {found}; about {left:.0f} min left", highlight=False)
    return failures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=list(DEFAULT_TASKS), default="small")
    parser.add_argument("--data", type=Path, help="folder with a folder for each task; from the hub when not given")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), help="all but one: digits small, inaturalist paper")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=DEFAULT_METHODS)
    parser.add_argument(
        "--structure", type=Path, nargs="+", default=[], metavar="FILE.json", help="more methods, in DeepSpeed's words"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="0 1 2 when small, 0 at the paper's scale")
    parser.add_argument("--steps", type=int, help="of each run (default: by task)")
    parser.add_argument("--jobs", type=int, default=1, help="runs beside each other (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="begin no run when so many are over")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder for results and figures")
    parser.add_argument("--prepare", action="store_true", help="only read the data and fill the cache")
    parser.add_argument("--table", action="store_true", help="only show what has been measured")
    args = parser.parse_args(argv)
    args.tasks = args.tasks or DEFAULT_TASKS[args.scale]
    args.seeds = args.seeds or ([0, 1, 2] if args.scale == "small" else [0])
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}, expected at least 1; 2 train two at a time")
    conduct("accuracy", args)


def conduct(experiment: str, args: argparse.Namespace) -> None:
    """Train, save and show what is asked for, as an experiment of this name; ends with a sentence where it cannot."""
    args.experiment = experiment
    # Each once, however often it was named.
    args.tasks, args.methods, args.seeds = (list(dict.fromkeys(x)) for x in (args.tasks, args.methods, args.seeds))
    try:
        failures = _work(args, Console())
    except KeyboardInterrupt:
        raise SystemExit(f"experiments.{experiment}: interrupted; the same command goes on from here") from None
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"experiments.{experiment}: {' '.join(str(error).split())}") from error
    if failures:
        raise SystemExit(
            f"experiments.{experiment}: {len(failures)} of the runs failed; the same command tries them again"
        )


def _work(args: argparse.Namespace, console: Console) -> list[str]:
    if args.steps is not None and args.steps < 10:
        raise ValueError(f"--steps must be at least 10, got {args.steps}; a tenth of them are dense")
    if min(args.seeds) < 0:
        raise ValueError(f"--seeds must be at least 0, got {min(args.seeds)}")
    name = f"{args.experiment}_{args.scale}"
    file = args.out / f"{name}.json"
    begun, runs, failures = time.monotonic(), read_runs(file), []
    if not args.table:
        if args.scale == "paper" and not args.prepare and not torch.cuda.is_available():
            raise ValueError("--scale paper takes days without a GPU, and none is seen here; use --scale small")
        wanted = plan(args)
        if args.prepare:
            console.print(f"prepared: {', '.join(args.tasks)}")
            return []
        with record.alone(file):
            runs = read_runs(file)  # that may have come while the data were prepared
            failures = measure(wanted, runs, args, begun, console)
    if not runs:
        raise ValueError(f"nothing has been measured yet ({file}); run it without --table")
    if args.steps is not None:
        runs = [run for run in runs if run["options"]["trainer.max_steps"] == args.steps]
        if not runs:
            raise ValueError(f"no run in {file} has {args.steps} steps; leave --steps or --table out")
    accuracy_show.show(runs, [*METHODS], args.out / "plots", name, console)
    return failures


if __name__ == "__main__":
    main()
