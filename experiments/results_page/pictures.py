"""The pictures of the page. A colour means the same in all: blue is ours, orange and purple are dense attention."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from experiments import length as by_length
from experiments import operations as by_operation
from experiments import scaling as over_length
from experiments.accuracy_show import COLORS as OF_METHODS
from experiments.accuracy_show import IN_COLORS
from sat.plots import FAINT, INK, LINES, RULE
from sat.plots.style import Drawing, heading, thousands

COLORS = {**OF_METHODS, "fused dense": LINES[1], "explicit dense": LINES[3]}
LITTLE: dict[str, Any] = {"fontsize": 8, "color": INK}


def plain(axes: Axes) -> None:
    """Two thin axes, small numbers."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=FAINT, linewidth=0.6)
    axes.tick_params(labelsize=8, length=3, width=0.6, color=FAINT, labelcolor=INK)
    axes.tick_params(which="minor", length=0)
    axes.set_axisbelow(True)


def grid(
    values: Mapping[tuple[str, str], Sequence[float]],
    tasks: Sequence[str],
    methods: Sequence[str],
    ours: Sequence[str],
    metric: str,
) -> Figure:
    """Every run as a small dot and the mean of its method as a large one; a panel for each task."""
    height = 1.3 + 0.24 * len(methods)
    figure = Drawing(figsize=(1.9 + 2.0 * len(tasks), height), facecolor="white")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    width = figure.get_figwidth()
    figure.subplots_adjust(left=1.75 / width, right=1 - 0.15 / width, bottom=0.5 / height, top=1 - 0.75 / height)
    for axes, task in zip(panels, tasks, strict=True):
        for place, method in enumerate(methods):
            own = values.get((method, task), [])
            if own:
                color = COLORS["sat" if method in ours else "dense" if method == "dense" else "other"]
                axes.plot(own, [place] * len(own), ".", color=color, markersize=3, alpha=0.5)
                axes.plot(statistics.mean(own), place, "o", color=color, markersize=5)
        axes.set_title(task, loc="left", pad=3, **LITTLE)
        axes.set_xlabel(metric if task == tasks[0] else "", **LITTLE)
        axes.grid(axis="y", color=RULE, linewidth=0.4)
        plain(axes)
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].set_ylim(len(methods) - 0.5, -0.5)
    heading(figure, metric[:1].upper() + metric[1:], IN_COLORS)
    return figure


def operations(tasks: Sequence[Mapping[str, Any]]) -> Figure:
    """How many times faster than the dense operation; left of 1, the dense one is faster."""
    rows = [
        (name, other) for name, modes in tasks[0]["operations"].items() for other in modes["forward"]["faster_than"]
    ]
    height = 1.5 + 0.34 * len(rows)
    figure = Drawing(figsize=(9.2, height), facecolor="white")
    panels = figure.subplots(1, 2, sharey=True, sharex=True)
    figure.subplots_adjust(left=0.22, right=0.84, bottom=0.55 / height, top=1 - 0.8 / height, wspace=0.08)
    for axes, mode in zip(panels, by_operation.MODES, strict=True):
        for task, marker in zip(tasks, "os^Dvp", strict=False):
            ratios = [
                task["operations"].get(name, {}).get(mode, {}).get("faster_than", {}).get(other) for name, other in rows
            ]
            places = [place for place, ratio in enumerate(ratios) if ratio]
            known = [ratio for ratio in ratios if ratio]
            own = [rows[place][1] == by_operation.PARTS for place in places]
            colors = [
                COLORS["other" if ours else "sat" if ratio >= 1 else "dense"]
                for ratio, ours in zip(known, own, strict=True)
            ]
            axes.scatter(known, places, c=colors, marker=marker, s=22, linewidths=0, alpha=0.9, label=task["name"])
        axes.axvline(1, color=INK, linewidth=0.8)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_title(mode, loc="left", pad=3, **LITTLE)
        axes.set_xlabel("times faster", **LITTLE)
        axes.grid(axis="y", color=RULE, linewidth=0.4)
        plain(axes)
    panels[0].set_yticks(range(len(rows)), [f"{name} / {other}" for name, other in rows])
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    legend = panels[1].legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=8, frameon=False, labelcolor=INK)
    for handle in legend.legend_handles:
        handle.set_color(COLORS["sat"])
    note = (
        "blue = SAT is faster, orange = the dense one is, grey = ours in one kernel against ours in three; logarithmic"
    )
    heading(figure, "Operations: SAT against dense", note)
    return figure


def scaling(cases: Sequence[Mapping[str, Any]]) -> Figure:
    """Time, memory, and the density at which fused dense attention is as fast, over the length."""
    figure = Drawing(figsize=(11, 4.4), facecolor="white")
    panels = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.055, right=0.985, bottom=0.12, top=0.8, wspace=0.55)
    measures = {
        "forward + backward (ms)": lambda row: row.get("ms", {}).get("median"),
        "memory beyond the inputs (MiB)": lambda row: row.get("peak_mib"),
    }
    lengths = [case["length"] for case in cases]
    for axes, (label, value) in zip(panels, measures.items(), strict=False):
        lines = curves(cases, value)
        ends = {name: line[-1] for name, line in lines.items()}
        for name, line in lines.items():
            ours = name.startswith("sat")
            style: dict[str, Any] = {"linewidth": 0.9 if ours else 1.8, "color": COLORS["sat" if ours else name]}
            if name == "sat, same":
                style |= {"linewidth": 1.8, "linestyle": (0, (2, 1))}
            axes.plot(*zip(*line, strict=True), marker="o", markersize=2.5, **style)
        axes.set_yscale("log")
        named = {f"{over_length.PER_ROW} blocks a row" if x == "sat, same" else x: y for x, y in ends.items()}
        for (name, (x, y)), height in zip(named.items(), apart(axes, [y for _, y in named.values()]), strict=True):
            color = COLORS.get(name, COLORS["sat"])
            place: dict[str, Any] = {"xytext": (1.04, height), "textcoords": "axes fraction", "va": "center"}
            thin = {"arrowstyle": "-", "color": RULE, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
            axes.annotate(name.removeprefix("sat "), (x, y), fontsize=6.5, color=color, arrowprops=thin, **place)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylabel(label, **LITTLE)
    last = panels[2]
    even = [(case["length"], case["break_even"].get(over_length.FUSED)) for case in cases]
    known = [(length, density) for length, density in even if density is not None]
    if known:
        at, line = [length for length, _ in known], [density for _, density in known]
        last.plot(at, line, color=INK, marker="o", markersize=3, linewidth=1.2)
        last.fill_between(at, line, color=COLORS["sat"], alpha=0.15, linewidth=0)
        last.fill_between(at, line, 1, color=COLORS["fused dense"], alpha=0.15, linewidth=0)
    last.text(0.5, 0.04, "SAT is faster", transform=last.transAxes, ha="center", fontsize=8, color=COLORS["sat"])
    other = {"transform": last.transAxes, "ha": "center", "va": "top", "fontsize": 8, "color": COLORS["fused dense"]}
    last.text(0.5, 0.96, "fused dense is faster", **other)
    last.set_ylim(0, 1)
    last.set_ylabel("density", **LITTLE)
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_xlim(min(lengths) / 1.2, max(lengths) * 1.2)
        axes.xaxis.set_major_locator(FixedLocator(lengths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: thousands(value)))
        axes.set_xlabel("sequence length (tokens)", **LITTLE)
        plain(axes)
    note = "blue = SAT, by density; dashed = the same number of blocks a row; every length has as many tokens in all"
    heading(figure, "Over the sequence length", note)
    return figure


def length(cases: Sequence[Mapping[str, Any]]) -> Figure:
    """Time and memory over the length, both logarithmic: a straight line is a power of it."""
    figure = Drawing(figsize=(8.4, 3.6), facecolor="white")
    figure.subplots_adjust(left=0.08, right=0.87, bottom=0.14, top=0.78, wspace=0.6)
    lengths = [case["length"] for case in cases]
    measures = {"ms": "forward + backward (ms)", "peak_mib": "memory beyond the inputs (MiB)"}
    for axes, (name, label) in zip(figure.subplots(1, 2), measures.items(), strict=True):
        for way in (by_length.OURS, by_length.DENSE):
            line = [(case["length"], case[way][name]) for case in cases if case[way].get(name)]
            if not line:
                continue
            axes.plot(*zip(*line, strict=True), marker="o", markersize=3, linewidth=1.6, color=COLORS[way])
            power = by_length.exponent(cases, way, name, by_length.FROM)
            grows = "" if power is None else f"\nlength^{power:g}"
            place: dict[str, Any] = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(f"{way}{grows}", line[-1], fontsize=7.5, color=COLORS[way], annotation_clip=False, **place)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(lengths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: thousands(value)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        low, high = axes.get_ylim()
        # A tick at each power of ten is too few where there is hardly more than one.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("sequence length (tokens)", **LITTLE)
        axes.set_ylabel(label, **LITTLE)
        axes.tick_params(axis="x", labelrotation=0)
        plain(axes)
    note = f"SAT keeps {by_length.PER_ROW} blocks a row; powers fitted from {by_length.FROM:,} tokens on; logarithmic"
    heading(figure, "Over the length of a sequence", note)
    return figure


def apart(axes: Axes, values: Sequence[float], gap: float = 0.036) -> list[float]:
    """Heights for names beside the ends of lines, in shares of the axes: near these values, none on another."""
    to_share = (axes.transData + axes.transAxes.inverted()).transform
    heights = [float(to_share((1, value))[1]) for value in values]
    order = sorted(range(len(values)), key=heights.__getitem__)
    for below, above in pairwise(order):
        heights[above] = max(heights[above], heights[below] + gap)
    return heights


def curves(cases: Sequence[Mapping[str, Any]], value: Any) -> dict[str, list[tuple[int, float]]]:
    """Length and value by way: dense by name, SAT by the density asked for, and SAT with the same blocks a row."""
    found: dict[str, list[tuple[int, float]]] = {}
    for case in cases:
        for row in case["rows"]:
            measured = value(row)
            if measured is None or measured <= 0:
                continue
            names = [row["way"]]
            if row["way"] == over_length.OURS:
                # Of short sequences no layout may be as sparse as was asked: that point is of another line.
                fits = abs(row["density"] - row["asked"]) <= 0.1 * row["asked"]
                names = [f"sat {row['asked']:g}"] if fits else []
                names += ["sat, same"] if row["kept_blocks_a_row"] == over_length.PER_ROW else []
            for name in names:
                found.setdefault(name, []).append((case["length"], measured))
    # Of as many blocks a row, each length has a density of its own.
    return {name: line for name, line in found.items() if len(line) > 1 or len(cases) == 1}
