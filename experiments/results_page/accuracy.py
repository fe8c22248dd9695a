"""What training comes to: methods and rules over tasks and seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from experiments.accuracy_show import PUBLISHED, comparable, most_frequent
from experiments.arena import rows as arena_rows
from experiments.gpu_suite.case import number
from experiments.results_page import pictures
from experiments.results_page.page import FEWEST_SEEDS, Content, Shown, listed, markdown, mean, points

Run = dict[str, Any]
# Where runs do not say what their attention is: these are no rules of ours.
REFERENCES = ("dense", "window", "bigbird", "random")


class Grid:
    """The values of a metric by method (a row) and task (a column), each in the order of the runs."""

    def __init__(self, runs: Sequence[Run], row: str, metric: Callable[[Run], float]) -> None:
        if not runs:
            raise ValueError("no run is in it")
        self.tasks = list(dict.fromkeys(str(run["task"]) for run in runs))
        self.methods = list(dict.fromkeys(str(run[row]) for run in runs))
        self.values: dict[tuple[str, str], list[float]] = {}
        self.ours: list[str] = []
        for run in runs:
            method = str(run[row])
            self.values.setdefault((method, str(run["task"])), []).append(float(metric(run)))
            attention = run.get("summary", {}).get("attention")
            own = attention == "adaptive" if attention is not None else method not in REFERENCES
            if own and method not in PUBLISHED and method not in self.ours:
                self.ours.append(method)

    def means(self, task: str) -> dict[str, float]:
        """By method, where there is a run of the task."""
        measured = [method for method in self.methods if (method, task) in self.values]
        return {method: statistics.mean(self.values[method, task]) for method in measured}

    def noise(self, task: str, *methods: str) -> float:
        """The standard deviation of a difference of single runs; infinite where a method has one only."""
        both = [self.values[method, task] for method in methods]
        return math.hypot(*(statistics.stdev(x) for x in both)) if all(len(x) > 1 for x in both) else math.inf

    def table(self, row: str) -> str:
        """Mean, deviation and number."""
        rows = [[m, *(mean(self.values.get((m, task), [])) for task in self.tasks)] for m in self.methods]
        return markdown([row, *self.tasks], rows)

    def short(self) -> list[str]:
        """Who does better than the best of ours, by task; what has not been run often enough."""
        found, ahead = [], False
        for task in self.tasks:
            means = self.means(task)
            ours = {method: value for method, value in means.items() if method in self.ours}
            others = {method: value for method, value in means.items() if method not in self.ours}
            if not ours or not others:
                continue
            best = max(ours, key=lambda method: ours[method])
            better = {method: value for method, value in others.items() if value > ours[best]}
            ahead |= not better
            if better:
                said = []
                for method, value in sorted(better.items(), key=lambda pair: -pair[1]):
                    within = " (less than the spread of the seeds)" if self.is_noise(task, method, best) else ""
                    said.append(f"{method} by {points(value - ours[best])}{within}")
                found.append(f"{task}: better than the best of ours ({best}, {ours[best]:.3f}) is {', '.join(said)}.")
        if ahead and not found:
            found.append("No reference has a higher mean than the best of ours on any task.")
        if not any(method not in self.ours for method in self.methods):
            found.append("No reference was run beside these, which are all ours.")
        elif len(self.ours) > 1:
            found.append("The best of ours is picked by the figures shown, which favours ours.")
        few = sorted({len(values) for values in self.values.values() if len(values) < FEWEST_SEEDS})
        if few:
            found.append(f"Some means are of {few[0]} run{'s' if few[0] > 1 else ''} only.")
        missing = [f"{m} on {t}" for m in self.methods for t in self.tasks if (m, t) not in self.values]
        if missing:
            found.append(f"Not run: {listed(missing)}.")
        return found

    def is_noise(self, task: str, one: str, other: str) -> bool:
        """Whether two means differ by less than single runs do."""
        means, noise = self.means(task), self.noise(task, one, other)
        return abs(means[one] - means[other]) < noise < math.inf


def accuracy(content: Content) -> Shown:
    """Test accuracy of the final models, by method and task, and what they cost."""
    by_task, others = comparable(content["runs"], [])
    left_out = {id(run) for run in others}
    runs = [run for run in content["runs"] if id(run) not in left_out]
    grid = Grid(runs, "method", lambda run: run["summary"]["test_accuracy"]["final"])
    picture = pictures.grid(grid.values, grid.tasks, grid.methods, grid.ours, "test accuracy of the final model")
    text = [grid.table("test accuracy")]
    constant = {task: most_frequent(methods) for task, methods in by_task.items()}
    if said := [f"{task} {share:.3f}" for task, share in constant.items() if share is not None]:
        text.append(f"Always answering the most frequent class: {', '.join(said)}.")
    text += sampling_errors(runs)
    if left_out:
        count = len(left_out)
        runs_left = f"{count} run{'s' if count > 1 else ''}"
        text.append(
            f"Left out: {runs_left} with other settings, or on other data, than the newest of their task, or without "
            f"an accuracy."
        )
    rows, slower = costs(runs, grid.ours)
    header = ["task", "method", "blocks kept", "dense phase, step ms", "step ms", "peak MiB", "training s"]
    table = markdown(header, rows, left=(0, 1))
    if "--jobs" in content.get("command", ""):
        table += "\n\nRuns went on beside each other, on shared cores: no measure of how fast a method is."
    text.append(f"<details><summary>What a run costs (medians)</summary>\n\n{table}\n\n</details>")
    short = grid.short()
    if slower:
        short.append(f"A step of ours is slower than one of the dense method, which runs by itself: {listed(slower)}.")
    return Shown(text, short, {"Test accuracy by method and task": picture})


def sampling_errors(runs: Sequence[Run]) -> list[str]:
    """How far a single accuracy is uncertain because the test samples are so many and no more, by task."""
    groups: dict[tuple[str, int], list[float]] = {}
    for run in runs:
        samples = run.get("options", {}).get("samples", {}).get("test")
        if samples:
            groups.setdefault((run["task"], samples), []).append(run["summary"]["test_accuracy"]["final"])
    said = []
    for (task, samples), found in groups.items():
        share = statistics.mean(found)
        said.append(f"{task} {points(math.sqrt(share * (1 - share) / samples))} ({samples:,} samples)")
    if not said:
        return []
    return [f"One standard error of a single accuracy, from the number of test samples: {', '.join(said)}."]


def arena(content: Content) -> Shown:
    """The Arena's tasks, and the published accuracies below ours."""
    shown = accuracy(content)
    header, rows = arena_rows(content["runs"])
    shown.text.insert(1, markdown(header, rows))
    options = content["runs"][-1]["options"]
    if options["trainer.accelerator"] == "cpu":
        shown.text.insert(2, "Shorter sequences and smaller models than those published: the two cannot be compared.")
    return shown


def costs(runs: Sequence[Run], ours: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """A row for each task and method, and where steps of ours take longer than those of the method ``dense``."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["task"], run["method"]), []).append(run)
    rows, own_ms = [], {}
    for key, group in groups.items():
        times = [run["summary"].get("median_step_ms", {}) for run in group]
        first = [t["dense"] for t in times if len(t) > 1 and "dense" in t]  # before a sparse phase
        rest = [[ms for phase, ms in t.items() if len(t) == 1 or phase != "dense"] for t in times]
        own = [ms for values in rest for ms in values]
        memory = [max(run["summary"].get("peak_memory_mib", {}).values(), default=None) for run in group]
        seconds = [run["summary"].get("training_seconds") for run in group]
        kept = [run.get("density", run["summary"].get("density")) for run in group]
        rows.append([*key, *(middle(x) for x in (kept, first, own, memory, seconds))])
        if own:
            own_ms[key] = statistics.median(own)
    slower = [
        f"{task}, {method} ({number(ms)} ms for {number(own_ms[task, 'dense'])} ms)"
        for (task, method), ms in own_ms.items()
        if method in ours and ms > own_ms.get((task, "dense"), math.inf)
    ]
    return rows, slower


def middle(values: Sequence[float | None]) -> str:
    """The median of those that are known."""
    known = [value for value in values if value is not None]
    return number(statistics.median(known)) if known else ""


def masks(content: Content) -> Shown:
    """Accuracy by rule and task, and what the layouts hold of the attention; of each task's newest settings."""
    newest = {run["task"]: run["settings"] for run in content["runs"]}
    runs = [run for run in content["runs"] if run["settings"] == newest[run["task"]]]
    grid = Grid(runs, "rule", lambda run: run["accuracy"])
    settings = [f"{task} {', '.join(f'{name} {x:g}' for name, x in newest[task].items())}" for task in grid.tasks]
    text = [f"Settings: {'; '.join(settings)}.", grid.table("accuracy")]
    held: dict[str, list[float]] = {}
    for run in runs:
        if "best_mass" in run:
            held.setdefault(str(run["rule"]), []).append(run["captured_mass"] / run["best_mass"])
    shares = [f"{rule} {statistics.mean(x):.0%}" for rule, x in held.items()]
    if shares:
        text.append(f"Attention held on validation data at the switch, of the most possible: {', '.join(shares)}.")
    picture = pictures.grid(grid.values, grid.tasks, grid.methods, grid.ours, "accuracy")
    return Shown(text, grid.short(), {"Accuracy by rule and task": picture})


def block_choice(content: Content) -> Shown:
    """Accuracy of a pretrained model without further training, by rule."""
    rules = list(dict.fromkeys(row["rule"] for row in content["rules"]))
    cases: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in content["rules"]:
        cases.setdefault((row["block_size"], row["density"], row["kept"]), {})[row["rule"]] = row["accuracy"]
    rows = [[*case, *(f"{found[r]:.3f}" if r in found else "" for r in rules)] for case, found in cases.items()]
    header = ["blocks of", "density", "always kept", *rules]
    dense = content["dense"]
    loss = [dense - max(found.values()) for found in cases.values()]
    worst = [dense - min(found.values()) for found in cases.values()]
    short = [
        f"Dense attention has {dense:.3f}: even the best rule loses {points(min(loss))} to {points(max(loss))}, the "
        f"worst up to {points(max(worst))}.",
        "One model, one draw of the pictures observed: no spread is known.",
    ]
    return Shown([markdown(header, rows, left=(2,)), f"Dense: {dense:.3f}."], short)


def fine_tuning(content: Content) -> Shown:
    """Dense against SAT from the same pretrained weights."""
    runs = content["runs"]
    methods = list(dict.fromkeys(run["method"] for run in runs))
    metrics = sorted({name for run in runs for name in run["summary"] if name.startswith("test_")})
    rows, short = [], []
    for method in methods:
        own = [run["summary"] for run in runs if run["method"] == method]
        steps = {
            phase: [s["median_step_ms"][phase] for s in own if phase in s["median_step_ms"]]
            for phase in ("dense", "sparse")
        }
        times = [f"{statistics.median(values):.0f}" if values else "" for values in steps.values()]
        memory = [max(s["peak_memory_mib"].values()) for s in own]
        row = [method, *(mean([s[name]["final"] for s in own if name in s]) for name in metrics), *times]
        rows.append([*row, f"{statistics.median(memory):.0f}"])
    seeds = {m: {run["seed"] for run in runs if run["method"] == m} for m in ("dense", "adaptive")}
    common = set.intersection(*seeds.values())
    for name in metrics:
        final = {
            m: [r["summary"][name]["final"] for r in runs if r["method"] == m and r["seed"] in common] for m in seeds
        }
        if common:
            lost = statistics.mean(final["dense"]) - statistics.mean(final["adaptive"])
            if lost > 0:
                short.append(f"{name.removeprefix('test_')}: SAT is {points(lost)} below dense attention.")
    if len(common) < FEWEST_SEEDS:
        short.append(f"Seeds that both were trained with: {', '.join(map(str, sorted(common))) or 'none'} only.")
    peaks = {
        m: statistics.median(max(r["summary"]["peak_memory_mib"].values()) for r in runs if r["method"] == m)
        for m in seeds
        if seeds[m]
    }
    if common and peaks["adaptive"] > peaks["dense"]:
        more = peaks["adaptive"] / peaks["dense"] - 1
        short.append(f"The whole training of SAT, with its dense phase, takes {more:.0%} more memory than a dense one.")
    speedups = [r["summary"]["sparse_step_speedup"] for r in runs if "sparse_step_speedup" in r["summary"]]
    if speedups and statistics.median(speedups) < 1:
        share = statistics.median(speedups)
        short.append(f"A sparse step takes longer than a dense one: {share:.2f} times as fast, median over the runs.")
    header = ["method", *(name.replace("_", " ") for name in metrics), "dense step ms", "sparse step ms", "peak MiB"]
    text = [markdown(header, rows)]
    if any((run.get("jobs") or 1) > 1 for run in runs):
        text.append("Runs went on beside each other, on shared cores: no measure of how fast a method is.")
    return Shown(text, short)
