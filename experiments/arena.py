"""The Long Range Arena: dense attention, a window and SAT on its tasks, beside what was published.

    python -m experiments.arena --data FOLDER --jobs 2                # small: two to three hours of two cores
    python -m experiments.arena --tasks listops --seeds 0             # drawn, nothing to download
    python -m experiments.arena --scale paper --data FOLDER           # the configs lra_*.yaml as they stand, on a GPU
    python -m experiments.arena --table                               # what has been measured so far

FOLDER holds a folder for each task that is not drawn: imdb, cifar10, lra_retrieval (the released
new_aan_pairs.*.tsv); without --data, imdb and cifar10 come from the Hugging Face hub. Each run is kept in the results
as it ends. The command given again leaves out what is there, trains what is missing, and goes on in the middle of a run
that was cut off.

small: ListOps of 100 to 250 tokens, the first 512 bytes of reviews (text), and Pathfinder at 16 x 16 pixels, with the
sizes and the settings of SAT of experiments.accuracy; a tenth of the blocks of 8 tokens. Text and Pathfinder are
learned in two runs, each with the attention of its method: first to find hidden tokens (Amos et al. 2024), then the
task. These figures cannot be compared with those published, only with each other. --tasks image is CIFAR-10 at 16 x 16
pixels, as in experiments.accuracy. With several jobs, times of steps are those of jobs beside each other. Writes
arena_SCALE.json, and figures of accuracy and cost in plots/ beside it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments import accuracy, accuracy_show, record
from experiments.accuracy_settings import ARENA, ARENA_TASKS, METHODS

DEFAULT_METHODS = ["dense", "window", "sat"]
# Tay et al. 2021; the two of FlashAttention: Dao et al. 2022. Shares of 1.
PUBLISHED = {
    "Transformer": {"listops": 0.364, "text": 0.643, "retrieval": 0.575, "image": 0.424, "pathfinder": 0.714},
    "Longformer": {"listops": 0.356, "text": 0.629, "retrieval": 0.569, "image": 0.422, "pathfinder": 0.697},
    "BigBird": {"listops": 0.361, "text": 0.640, "retrieval": 0.593, "image": 0.408, "pathfinder": 0.749},
    "FlashAttention": {"listops": 0.376, "text": 0.639, "retrieval": 0.814, "image": 0.435, "pathfinder": 0.727},
    "block-sparse FlashAttention": {
        "listops": 0.370,
        "text": 0.630,
        "retrieval": 0.813,
        "image": 0.436,
        "pathfinder": 0.733,
    },
}


def rows(runs: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: accuracies of ours, mean and deviation over the seeds, then those published.

    Beside the task of a pretrained model stands what share of the hidden tokens its pretraining found.
    """
    measured, _ = accuracy_show.comparable(runs, METHODS)
    tasks = [task for task in ARENA if task in measured]
    methods = [name for name in METHODS if any(name in own for own in measured.values())]
    header, columns = [""], []
    for task in tasks:
        header.append(task)
        published = [f"{values[task]:.3f}" for values in PUBLISHED.values()]
        found = [accuracy_show.accuracies(measured[task].get(method, [])) for method in methods]
        columns.append([*map(_spread, found), *published])
        before = [_pretrained(measured[task].get(method, [])) for method in methods]
        if any(before):
            header.append(f"{task}: hidden tokens found")
            columns.append([*map(_spread, before), *[""] * len(PUBLISHED)])
    names = [*methods, *(f"published: {name}" for name in PUBLISHED)]
    return header, [list(line) for line in zip(names, *columns, strict=True)]


def _pretrained(runs: Sequence[dict[str, Any]]) -> list[float]:
    return [run["summary"]["pretraining"]["test_accuracy"]["final"] for run in runs if "pretraining" in run["summary"]]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread} ({len(values)})"


def show(file: Path, scale: str, console: Console) -> None:
    """Ours beside the published ones."""
    header, lines = rows(accuracy.read_runs(file))
    note = " (other lengths and models: not to be compared)" if scale == "small" else ""
    table = Table(title=f"test accuracy, and as published{note}", title_justify="left")
    for name in header:
        table.add_column(name, justify="right" if name else "left")
    for line in lines:
        table.add_row(*line)
    console.print(table)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=list(ARENA_TASKS), default="small")
    parser.add_argument("--data", type=Path, help="folder with a folder for each task that is not drawn")
    parser.add_argument(
        "--tasks", nargs="+", choices=list(ARENA), help="listops, text and pathfinder when small, else all"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=DEFAULT_METHODS, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs beside each other (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="begin no run when so many are over")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder for results and figures")
    parser.add_argument("--prepare", action="store_true", help="only read or draw the data and fill the cache")
    parser.add_argument("--table", action="store_true", help="only show what has been measured")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}, expected at least 1; 2 train two at a time")
    args.tasks, args.steps, args.structure = args.tasks or ARENA_TASKS[args.scale], None, []
    accuracy.conduct("arena", args)
    if not args.prepare:
        show(args.out / f"arena_{args.scale}.json", args.scale, Console())


if __name__ == "__main__":
    main()
