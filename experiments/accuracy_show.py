"""What ``experiments.accuracy`` has measured: a table a task, and figures of accuracy and of cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from sat.plots import FAINT, INK, LINES, RULE
from sat.plots.style import Drawing, density_text, heading, thousands, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Run = dict[str, Any]
Rows = dict[str, dict[str, list[Run]]]  # the runs of each method by task

# In all pictures of experiments: a colour means the same in all.
COLORS = {"sat": LINES[0], "dense": LINES[1], "other": FAINT}
IN_COLORS = "blue = ours, orange = dense, grey = other references"
# Rules that are others' though they run in our attention.
PUBLISHED = ("sat-paper", "gram (paper)")

# What is the method's own; all else must be the same for runs to be compared.
OF_THE_METHOD = ("model.attention", "model.pruned", "sparsity.", "pretraining.sparsity.")


def comparable(runs: Sequence[Run], order: Sequence[str]) -> tuple[Rows, list[Run]]:
    """The runs of each task and method that can be counted together: those like the newest of the task.

    Args:
        runs: in the order in which they were measured.
        order: the methods in the order to show them in; others follow.

    Returns:
        The runs by task and method, and those that are left out because other settings or data went into them, or
        because they have no accuracy.
    """
    rows: Rows = {}
    chosen: set[int] = set()
    measured = [run for run in runs if is_share(run["summary"]["test_accuracy"]["final"])]
    for task in dict.fromkeys(run["task"] for run in measured):
        of_task = [run for run in measured if run["task"] == task]
        alike = [run for run in of_task if _shared(run) == _shared(of_task[-1])]
        found = {run["method"] for run in alike}
        rows[task] = {}
        for method in [*(name for name in order if name in found), *sorted(found - set(order))]:
            own = [run for run in alike if run["method"] == method]
            rows[task][method] = [run for run in own if run["options"] == own[-1]["options"]]
            chosen |= {id(run) for run in rows[task][method]}
    return rows, [run for run in runs if id(run) not in chosen]


def _shared(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run["options"].items() if not name.startswith(OF_THE_METHOD)}


def is_share(value: object) -> bool:
    """Whether it is an accuracy: a number, and not NaN."""
    return isinstance(value, int | float) and 0 <= value <= 1


def is_ours(run: Run) -> bool:
    """Whether it has learned its layouts, and not by the paper's rules."""
    return run["summary"].get("attention") == "adaptive" and run["method"] not in PUBLISHED


def accuracies(runs: Sequence[Run]) -> list[float]:
    """Of the final model on the test data, for each seed."""
    return [run["summary"]["test_accuracy"]["final"] for run in runs]


def phases(runs: Sequence[Run], name: str) -> tuple[float | None, float | None]:
    """Medians over the seeds of something that a summary has by phase.

    Returns:
        That of a dense phase before a sparse one, and that of the phase that a run is mostly in. Without phases, or
        where the whole process was measured, only the latter.
    """
    own: dict[str, list[float]] = {}
    for run in runs:
        for phase, value in run["summary"][name].items():
            own.setdefault(phase, []).append(value)
    medians = {phase: statistics.median(values) for phase, values in own.items()}
    before = medians.pop("dense") if len(medians) > 1 and "dense" in medians else None
    return before, next(iter(medians.values()), None)


def most_frequent(methods: Mapping[str, Sequence[Run]]) -> float | None:
    """The accuracy of always answering the most frequent class; None of runs that do not say it."""
    known = [run["most_frequent_class"] for runs in methods.values() for run in runs if "most_frequent_class" in run]
    return known[-1] if known else None


def seconds(runs: Sequence[Run]) -> float:
    """The whole training time, median over the seeds."""
    return statistics.median(run["summary"]["training_seconds"] for run in runs)


def _switch(runs: Sequence[Run]) -> str:
    """At which steps the runs became sparse."""
    if runs[0]["summary"]["attention"] not in ("adaptive", "spion"):
        return ""
    steps = {t["step"] for run in runs for t in run["summary"].get("transitions", [])}
    never = sum(bool(run["summary"].get("not_switched")) for run in runs)
    parts = [thousands(min(steps)) if len(steps) == 1 else f"{min(steps)} to {max(steps)}"] if steps else []
    return ", ".join([*parts, *([f"{never} never"] if never else [])])


def _two(values: tuple[float | None, float | None], form: Callable[[float], str]) -> str:
    return " → ".join(form(value) for value in values if value is not None)


def _share(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def tables(rows: Rows) -> list[Table]:
    """One a task: a row a method."""
    result = []
    for task, methods in rows.items():
        options = next(iter(methods.values()))[0]["options"]
        title = f"{task}: {options['trainer.max_steps']:,} steps of {options['data.batch_size']}"
        title += f", target density {options['sparsity.density']:g}"
        if (frequent := most_frequent(methods)) is not None:
            title += f"; always the most frequent class: {_share(frequent)}"
        table = Table(title=title, title_justify="left", padding=(0, 0))  # so that it fits into 80 columns
        table.add_column("method")
        for name in ("density", "test accuracy", "seeds", "switch", "step, ms", "peak MiB", "train, s"):
            table.add_column(name, justify="right")
        for method, runs in methods.items():
            found = accuracies(runs)
            spread = f" ± {_share(statistics.stdev(found))}" if len(found) > 1 else ""
            table.add_row(
                method,
                density_text(statistics.mean(run["density"] for run in runs)),
                f"{_share(statistics.mean(found))}{spread}",
                str(len(found)),
                _switch(runs),
                _two(phases(runs, "median_step_ms"), lambda value: f"{value:.1f}"),
                _two(phases(runs, "peak_memory_mib"), lambda value: f"{value:,.0f}"),
                f"{seconds(runs):.0f}",
            )
        result.append(table)
    return result


def show(runs: Sequence[Run], order: Sequence[str], folder: Path, name: str, console: Console) -> None:
    """Print the tables and write the figures ``NAME_accuracy.png`` and ``NAME_cost.png``."""
    rows, left_out = comparable(runs, order)
    for table in tables(rows):
        console.print(table)
    console.print("accuracy: final model, mean ± standard deviation; the others: medians; dense → sparse phase")
    if left_out:
        others = sorted({f"{run['task']}, {run['method']}" for run in left_out})
        why = "because of other settings or data, or without accuracy"
        console.print(f"not counted, {why}: {len(left_out)} runs ({'; '.join(others)})")
    folder.mkdir(parents=True, exist_ok=True)
    for kind, figure in (("accuracy", plot_accuracy), ("cost", plot_cost)):
        figure(rows, folder / f"{name}_{kind}.png")
    console.print(f"figures: {folder}", highlight=False, soft_wrap=True)


def plot_accuracy(rows: Rows, path: Path) -> None:
    """A panel a task, a line a method: each seed, and mean and standard deviation."""
    figure, places = _panels(rows, 1)
    for axes, (task, methods) in zip(places[0], rows.items(), strict=True):
        for line, runs in enumerate(methods.values()):
            found = accuracies(runs)
            mean = statistics.mean(found)
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            color = _color(runs)
            axes.plot([mean - spread, mean + spread], [line, line], color=color, linewidth=1.4, solid_capstyle="butt")
            axes.plot(mean, line, "o", color=color, markersize=6)
            axes.plot(found, [line] * len(found), "o", color="white", markersize=2.6, markeredgecolor=INK, mew=0.5)
        _dress(axes, task, methods, "test accuracy")
    note = f"{IN_COLORS}; in brackets the density; points and lines: mean and deviation over seeds, rings: each"
    heading(figure, "Accuracy by method", note)
    written(figure, path)


def plot_cost(rows: Rows, path: Path) -> None:
    """A column a task: time of a step and peak memory by phase, and the time of the whole training."""
    figure, places = _panels(rows, 3)
    by_phase = {"median_step_ms": "time of a step (ms)", "peak_memory_mib": "peak memory (MiB)"}
    for column, (task, methods) in enumerate(rows.items()):
        for place, (name, label) in zip(places, by_phase.items(), strict=False):
            for line, runs in enumerate(methods.values()):
                before, own = phases(runs, name)
                height = 0.62 if before is None else 0.31
                if own is not None:
                    middle = line if before is None else line + height / 2
                    place[column].barh(middle, own, height, color=_color(runs))
                if before is not None:
                    place[column].barh(line - height / 2, before, height, color=RULE)
            _dress(place[column], task, methods, label)
        for line, runs in enumerate(methods.values()):
            places[2][column].barh(line, seconds(runs), 0.62, color=_color(runs))
        _dress(places[2][column], task, methods, "whole training (s)")
    note = f"{IN_COLORS}, light grey: the dense phase before a sparse one; medians over the seeds"
    heading(figure, "What a method costs", note)
    written(figure, path)


def _color(runs: Sequence[Run]) -> str:
    return COLORS["sat" if is_ours(runs[0]) else "dense" if runs[0]["density"] == 1 else "other"]


def _panels(rows: Rows, count: int) -> tuple[Drawing, list[list[Axes]]]:
    """``count`` rows of panels, a column a task, all measures in inches."""
    lines = max(len(methods) for methods in rows.values())
    width, height = 1.0 + 2.9 * len(rows), 0.75 + count * (0.62 + 0.26 * lines)
    figure = Drawing(figsize=(max(width, 5.6), height), facecolor="white")
    places = figure.subplots(count, len(rows), squeeze=False)
    left, right = 0.95 / max(width, 5.6), 1 - 0.2 / max(width, 5.6)
    figure.subplots_adjust(
        left=left, right=right, bottom=0.5 / height, top=1 - 0.8 / height, wspace=0.55, hspace=0.62 / (0.26 * lines)
    )
    return figure, [list(row) for row in places]


def _dress(axes: Axes, task: str, methods: dict[str, list[Run]], label: str) -> None:
    names = [f"{name} ({density_text(statistics.mean(r['density'] for r in runs))})" for name, runs in methods.items()]
    axes.set_yticks(range(len(methods)), names)
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.set_title(task, fontsize=9, color=INK, loc="left")
    axes.set_xlabel(label, fontsize=8, color=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set(color=FAINT, linewidth=0.6)
    axes.tick_params(labelsize=7, length=3, width=0.6, color=FAINT, labelcolor=INK)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=RULE, linewidth=0.4)
    axes.set_axisbelow(True)
