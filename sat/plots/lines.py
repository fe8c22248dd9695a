"""What is measured from step to step: the statistics that decide when to switch, and how well training goes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from sat.plots.style import FAINT, INK, Drawing, heading, line_colors, thousands, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_statistics(
    steps: Sequence[int],
    skewness: Sequence[Sequence[float]],
    relative_change: Sequence[Sequence[float]],
    path: str | os.PathLike[str] | None = None,
    *,
    theta: float | None,
    delta: float | None,
    agreement: Sequence[Sequence[float]] | None = None,
    least_agreement: float | None = None,
    switch_steps: Sequence[int | None] | None = None,
    names: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the statistics that decide when a layer leaves the dense phase, with their thresholds.

    A layer may switch where its skewness is at least ``theta`` and its relative change is below ``delta``: where both
    lines run through the shaded regions.

    Args:
        steps: training steps at which the statistics were taken, ascending.
        skewness: ``[layers][steps]``, the skewness of each layer's attention scores; NaN where undefined.
        relative_change: ``[layers][steps]``, how much the distance between successive score matrices changed, in
            percent; NaN where undefined. Drawn on a logarithmic scale, on which a change of 0 has no place; left out
            where it is undefined throughout because the agreement is the rule.
        path: PNG file to write; an existing one is replaced whole or not at all. None writes nothing.
        theta: threshold of the skewness; None: there is none.
        delta: threshold of the relative change, in percent; None: there is none.
        agreement: ``[layers][steps]``, the share of the blocks that would be kept which would have been kept before,
            0 to 1, NaN where undefined; a panel of its own. None: it was not the rule.
        least_agreement: its threshold; None: there is none.
        switch_steps: per layer, the step at which it left the dense phase; None where it has not.
        names: per layer, its name in the legend; "layer 0" and so on if left out.
        title: heading of the figure.

    Raises:
        ValueError: there is no step or no layer, or the lengths do not agree.
    """
    layers = len(skewness)
    if not len(steps) or not layers:
        raise ValueError(f"plot_statistics needs at least one step and one layer, got {len(steps)} and {layers}")
    switches = [None] * layers if switch_steps is None else list(switch_steps)
    labels = [f"layer {i}" for i in range(layers)] if names is None else list(names)
    for what, given in (("relative_change", relative_change), ("switch_steps", switches), ("names", labels)):
        if len(given) != layers:
            raise ValueError(f"{what} has {len(given)} entries, but skewness has {layers}: one a layer")
    drawn = {"skewness": skewness, "relative_change": relative_change}
    drawn |= {"agreement": agreement} if agreement is not None else {}
    for what, rows in drawn.items():
        for i, row in enumerate(rows, 1):
            if len(row) != len(steps):
                raise ValueError(f"{what} of layer {i} has {len(row)} values for {len(steps)} steps")

    if agreement is not None and all(value != value for row in relative_change for value in row):
        del drawn["relative_change"]  # it was not measured
    figure = Drawing(figsize=(9.2, 2.7 * len(drawn)), facecolor="white")
    panels = figure.subplots(len(drawn), 1, sharex=True)
    places = dict(zip(drawn, panels, strict=True))
    upper, lower = places["skewness"], places.get("relative_change")
    figure.subplots_adjust(left=0.095, right=0.72, bottom=0.18 / len(drawn), top=1 - 0.28 / len(drawn), hspace=0.12)
    colors = line_colors(layers)
    for color, skew in zip(colors, skewness, strict=True):
        upper.plot(steps, skew, color=color, linewidth=1.3, **_points(skew))
    if theta is not None:
        _threshold(upper, theta, f"at least θ = {theta:g}", above=True)
    if lower is not None:
        for color, change in zip(colors, relative_change, strict=True):
            positive = [value if value > 0 else math.nan for value in change]
            lower.plot(steps, positive, color=color, linewidth=0.9, **_points(positive))
        lower.set_yscale("log")
        lower.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        lower.set_ylabel("relative change\nof the distance (%)", fontsize=9, color=INK)
        if delta is not None:
            _threshold(lower, delta, f"below δ = {delta:g} %", above=False)
    if agreement is not None:
        for color, shares in zip(colors, agreement, strict=False):
            places["agreement"].plot(steps, shares, color=color, linewidth=1.3, **_points(shares))
        places["agreement"].set_ylim(-0.02, 1.02)
        places["agreement"].set_ylabel("agreement of\nthe chosen blocks", fontsize=9, color=INK)
        if least_agreement is not None:
            _threshold(places["agreement"], least_agreement, f"at least {least_agreement:g}", above=True)

    # One line for all layers that switched together; what a line of another colour means stands in the legend.
    together = len(set(switches)) == 1 and switches[0] is not None
    for step, color in [(switches[0], INK)] if together else zip(switches, colors, strict=True):
        if step is not None:
            for axes in panels:
                axes.axvline(step, color=color, linewidth=1.0, linestyle="-" if together else (0, (1, 1)), zorder=1)
    if together:
        _name_switch(upper, switches[0] or 0, "all layers switch" if layers > 1 else "the layer switches")
    elif any(step is not None for step in switches):
        ends = ["still dense" if step is None else f"switches at {thousands(step)}" for step in switches]
        labels = [f"{label}, {end}" for label, end in zip(labels, ends, strict=True)]

    upper.set_ylabel("skewness of the scores", fontsize=9, color=INK)
    _step_axis(panels[-1], steps)
    figure.align_ylabels()
    for axes in panels:
        _plain(axes)
    figure.legend(
        upper.get_lines()[:layers],
        labels,
        loc="upper left",
        bbox_to_anchor=(0.725, 0.87),
        fontsize=8,
        frameon=False,
        labelcolor=INK,
        handlelength=1.4,
        ncols=-(-layers // 24),
    )
    note = "shaded = criterion met; a layer may switch when it is met"
    note += " in both panels" if theta is not None else ", whatever its skewness"
    if agreement is not None:
        note = "shaded = criterion met: the blocks that would be kept have settled"
    elif delta is None:
        note = "statistics of each layer's attention; the thresholds are not known"
    heading(figure, title or "When to leave the dense phase", note)
    return written(figure, path)


def plot_training(
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    path: str | os.PathLike[str] | None = None,
    *,
    switch_steps: Sequence[int | None] = (),
    gave_up: int | None = None,
    title: str | None = None,
) -> Figure:
    """Draw loss, accuracy and the time of a step over the training, with the switch to sparse attention.

    Args:
        curves: steps and values by name: ``train/loss``, ``val/loss``, ``train/acc``, ``val/acc``, ``val/f1``,
            ``train/step_ms`` (milliseconds). Others are left out, and so are panels without a curve.
        path: PNG file to write; an existing one is replaced whole or not at all. None writes nothing.
        switch_steps: per layer, the step at which it left the dense phase; None where it has not.
        gave_up: the step at which all went back to dense attention; None: they have not.
        title: heading of the figure.

    Raises:
        ValueError: there is none of these curves.
    """
    wanted = {
        "loss\n(cross entropy, nats)": ("train/loss", "val/loss"),
        "accuracy\n(share of right answers)": ("train/acc", "val/acc", "val/f1"),
        "time of a step\n(ms)": ("train/step_ms",),
    }
    drawn = {label: [name for name in names if name in curves] for label, names in wanted.items()}
    drawn = {label: names for label, names in drawn.items() if names}
    if not drawn:
        raise ValueError(f"plot_training draws loss, accuracy and step times, got {', '.join(curves) or 'nothing'}")
    height = 1.15 + 1.65 * len(drawn)
    figure = Drawing(figsize=(9.2, height), facecolor="white")
    places = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.095, right=0.72, bottom=0.5 / height, top=1 - 0.72 / height, hspace=0.16)
    styles: dict[str, dict[str, Any]] = {
        "train/loss": {"color": FAINT, "linewidth": 0.9, "label": "training batches"},
        "val/loss": {"color": INK, "linewidth": 1.6, "label": "validation data"},
        "val/f1": {"color": INK, "linewidth": 1.6, "linestyle": (0, (2, 1)), "label": "validation data, F1"},
        "train/step_ms": {"color": INK, "linewidth": 1.2, "label": "training step"},
    }
    styles |= {"train/acc": styles["train/loss"], "val/acc": styles["val/loss"]}
    switches = sorted({step for step in switch_steps if step is not None})
    for axes, (label, names) in zip(places, drawn.items(), strict=True):
        for name in names:
            steps, values = curves[name]
            axes.plot(steps, values, **_points(values), **styles[name])
        for step in switches:
            axes.axvline(step, color=INK, linewidth=1.0, linestyle="-" if len(switches) == 1 else (0, (1, 1)), zorder=1)
        if "loss" not in label and min((v for name in names for v in curves[name][1]), default=0) >= 0:
            axes.set_ylim(bottom=0)
        axes.set_ylabel(label, fontsize=9, color=INK)
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(1.01, 1.02),
            fontsize=8,
            frameon=False,
            labelcolor=INK,
            handlelength=1.4,
        )
        _plain(axes)
    every = [step for names in drawn.values() for name in names for step in curves[name][0]]
    _step_axis(places[-1], every)
    figure.align_ylabels()
    if switches:
        what = "the switch to sparse attention" if len(switches) == 1 else "from here on, layers switch"
        what = "some layers switch" if None in switch_steps and len(switches) == 1 else what
        _name_switch(places[0], switches[0], what)
    note = "left of the line dense attention, right of it sparse" if len(switches) == 1 else ""
    if gave_up is not None:
        for axes in places:
            axes.axvline(gave_up, color=INK, linewidth=1.0, linestyle=(0, (4, 2)), zorder=1)
        note = f"dense attention again from step {thousands(gave_up)} on (dashed line)"
    elif None in switch_steps:
        note = ""
    heading(figure, title or "How training went", note)
    return written(figure, path)


def _points(values: Sequence[float]) -> dict[str, Any]:
    """Dots where there are few numbers: a line has no width at a single one."""
    return {"marker": "o", "markersize": 2.5} if sum(value == value for value in values) < 25 else {}


def _name_switch(axes: Axes, step: int, what: str) -> None:
    """Words above the line that marks a switch, on the side where there is room."""
    first, last = axes.get_xlim()
    axes.annotate(
        f"{what} at step {thousands(step)}",
        (step, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 4),
        textcoords="offset points",
        fontsize=8,
        color=INK,
        ha="right" if step > (first + last) / 2 else "left",
        annotation_clip=False,
    )


def _step_axis(axes: Axes, steps: Sequence[int]) -> None:
    axes.set_xlabel("training step", fontsize=9, color=INK)
    single = len(set(steps)) == 1
    round_steps = MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True)
    axes.xaxis.set_major_locator(FixedLocator(list(steps[:1])) if single else round_steps)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: thousands(value)))


def _plain(axes: Axes) -> None:
    """Two thin axes, small numbers."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=FAINT, linewidth=0.6)
    axes.tick_params(labelsize=8, length=3, width=0.6, color=FAINT, labelcolor=FAINT)
    axes.tick_params(which="minor", length=0)
    axes.margins(x=0.01)


def _threshold(axes: Axes, value: float, label: str, *, above: bool) -> None:
    """A dashed line, and the side of it on which the criterion is met, shaded."""
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log":
        low, high = min(low, value / 3), max(high, value * 3)
    else:
        room = 0.15 * (max(high, value) - min(low, value) or 1.0)
        low, high = min(low, value) - room, max(high, value) + room
    axes.set_ylim(low, high)
    axes.axhline(value, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    axes.axhspan(value, high if above else low, color="#e6eef5", linewidth=0, zorder=0)
    # Inside the shading, at the left: where training starts, no line has reached it yet.
    axes.annotate(
        label,
        (0, value),
        xycoords=("axes fraction", "data"),
        xytext=(5, 4 if above else -4),
        textcoords="offset points",
        fontsize=8,
        color=INK,
        va="bottom" if above else "top",
    )
