"""Floor 4: pictures of what was learned and of how the moment to switch was found.

Figures are made without pyplot: no global state, no display, safe in any process. Every figure is returned, and
written as a PNG where a path is given.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from sat.files import written_whole
from sat.layout import BlockLayout

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#222222"
FAINT = "#767676"
RULE = "#c8c8c8"
KEPT = "#1f4e79"
PRUNED = "#eef1f5"
# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow: too pale for a line.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DPI = 200


def plot_layouts(
    layouts: Sequence[BlockLayout] | Mapping[str, BlockLayout],
    path: str | os.PathLike[str] | None = None,
    *,
    captured: Sequence[float] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw which blocks of the attention matrix each layer, or each head of each layer, keeps.

    Layers with one layout for all heads stand side by side, one panel a layer. As soon as a layer has a layout a head,
    there is one row a layer and one column a head.

    Args:
        layouts: one layout a layer, in order; a mapping names the layers, a sequence calls them "layer 0" and so on.
        path: PNG file to write; an existing one is replaced whole or not at all. None writes nothing.
        captured: per layer, the share of the attention mass that lies in the kept blocks, 0 to 1; NaN where unknown.
        title: heading of the figure.

    Raises:
        ValueError: there is no layout, or ``captured`` has another length than ``layouts``.
    """
    if isinstance(layouts, Mapping):
        names, panels = list(layouts), list(layouts.values())
    else:
        names, panels = [f"layer {i}" for i in range(len(layouts))], list(layouts)
    if not panels:
        raise ValueError("plot_layouts got no layout to draw; a model has layouts once it has left the dense phase")
    if captured is not None and len(captured) != len(panels):
        raise ValueError(f"captured holds one share a layer: got {len(captured)} shares for {len(panels)} layouts")
    held = [math.nan] * len(panels) if captured is None else [float(share) for share in captured]

    heads = max(layout.num_heads for layout in panels)
    figure = _draw_layers(names, panels, held) if heads == 1 else _draw_heads(names, panels, held, heads)
    sizes = " or ".join(f"{size} × {size}" for size in sorted({layout.block_size for layout in panels}))
    note = f"one cell = a block of {sizes} tokens; dark = kept, light = skipped"
    _head(figure, title or "Attention blocks kept", note)
    if path is not None:
        with written_whole(path) as temporary:
            figure.savefig(temporary, format="png", dpi=DPI)
    return figure


def plot_statistics(
    steps: Sequence[int],
    skewness: Sequence[Sequence[float]],
    relative_change: Sequence[Sequence[float]],
    path: str | os.PathLike[str] | None = None,
    *,
    theta: float | None,
    delta: float,
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
            percent; NaN where undefined. Drawn on a logarithmic scale, on which a change of 0 has no place.
        path: PNG file to write; an existing one is replaced whole or not at all. None writes nothing.
        theta: threshold of the skewness; None: there is none.
        delta: threshold of the relative change, in percent.
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
    for what, rows in (("skewness", skewness), ("relative_change", relative_change)):
        for i, row in enumerate(rows, 1):
            if len(row) != len(steps):
                raise ValueError(f"{what} of layer {i} has {len(row)} values for {len(steps)} steps")

    figure = Figure(figsize=(9.2, 5.4), facecolor="white")
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.subplots_adjust(left=0.095, right=0.72, bottom=0.09, top=0.86, hspace=0.12)
    colors = _colors(layers)
    marker = "o" if len(steps) == 1 else None
    for color, skew, change in zip(colors, skewness, relative_change, strict=True):
        upper.plot(steps, skew, color=color, linewidth=1.3, marker=marker)
        positive = [value if value > 0 else math.nan for value in change]
        lower.plot(steps, positive, color=color, linewidth=0.9, marker=marker)
    lower.set_yscale("log")
    lower.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if theta is not None:
        _threshold(upper, theta, f"at least θ = {theta:g}", above=True)
    _threshold(lower, delta, f"below δ = {delta:g} %", above=False)

    # One line for all layers that switched together; what a line of another colour means stands in the legend.
    together = len(set(switches)) == 1 and switches[0] is not None
    for step, color in [(switches[0], INK)] if together else zip(switches, colors, strict=True):
        if step is not None:
            for axes in (upper, lower):
                axes.axvline(step, color=color, linewidth=1.0, linestyle="-" if together else (0, (1, 1)), zorder=1)
    if together:
        who = "all layers switch" if layers > 1 else "the layer switches"
        upper.annotate(
            f"{who} at step {_thousands(switches[0] or 0)}",
            (switches[0] or 0, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            fontsize=8,
            color=INK,
            ha="right",
            annotation_clip=False,
        )
    elif any(step is not None for step in switches):
        ends = ["still dense" if step is None else f"switches at {_thousands(step)}" for step in switches]
        labels = [f"{label}, {end}" for label, end in zip(labels, ends, strict=True)]

    upper.set_ylabel("skewness of the scores", fontsize=9, color=INK)
    lower.set_ylabel("relative change\nof the distance (%)", fontsize=9, color=INK)
    lower.set_xlabel("training step", fontsize=9, color=INK)
    lower.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True) if len(steps) > 1 else FixedLocator(list(steps)))
    lower.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _thousands(value)))
    figure.align_ylabels()
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set(color=FAINT, linewidth=0.6)
        axes.tick_params(labelsize=8, length=3, width=0.6, color=FAINT, labelcolor=FAINT)
        axes.tick_params(which="minor", length=0)
        axes.margins(x=0.01)
    figure.legend(
        upper.get_lines()[:layers],
        labels,
        loc="upper left",
        bbox_to_anchor=(0.725, 0.87),
        fontsize=8,
        frameon=False,
        labelcolor=INK,
        handlelength=1.4,
    )
    _head(
        figure,
        title or "When to leave the dense phase",
        "shaded = criterion met; a layer may switch when it is met"
        + (" in both panels" if theta is not None else ", whatever its skewness"),
    )
    if path is not None:
        with written_whole(path) as temporary:
            figure.savefig(temporary, format="png", dpi=DPI)
    return figure


def _draw_layers(names: list[str], layouts: list[BlockLayout], held: list[float]) -> Figure:
    """One large panel a layer, at most four in a row."""
    columns = min(len(layouts), 4)
    rows = -(-len(layouts) // columns)
    edge = 3.6 if columns == 1 else 2.6
    # Room for the heading, and for a panel title of one line or of two.
    lines = 0.24 if all(map(math.isnan, held)) else 0.4
    figure, grid = _grid(rows, columns, edge, left=0.85, top=0.6 + lines, gaps=(0.22, 0.4 + lines))
    for index, axes in enumerate(axes for row in grid for axes in row):
        if index >= len(layouts):
            axes.remove()
            continue
        layout = layouts[index]
        _blocks(axes, layout, 0, ticks=4)
        share = "" if math.isnan(held[index]) else f"\nholds {_percent(held[index])} of attention"
        heading = f"{names[index]} · density {_density(layout.density)}{share}"
        axes.set_title(heading, fontsize=8.5, color=INK, loc="left", pad=4)
        # At the end of a last row that is not full, the panel above keeps its numbers.
        axes.tick_params(labelbottom=index + columns >= len(layouts), labelleft=index % columns == 0)
    return figure


def _draw_heads(names: list[str], layouts: list[BlockLayout], held: list[float], heads: int) -> Figure:
    """One row a layer, one column a head; small panels that share their numbers."""
    rows = len(layouts)
    edge = 2.2 if heads <= 3 else 1.35 if heads <= 8 else 0.95
    figure, grid = _grid(rows, heads, edge, left=1.95, top=0.85, gaps=(0.1, 0.26))
    for row, (name, layout) in enumerate(zip(names, layouts, strict=True)):
        for head, axes in enumerate(grid[row]):
            if head >= layout.num_heads:
                axes.remove()
                continue
            _blocks(axes, layout, head, ticks=2)
            axes.tick_params(labelbottom=row == rows - 1, labelleft=head == 0)
            density = _density(float(layout.mask[head].float().mean()))
            who = "all heads" if layout.num_heads == 1 else f"head {head}" if row == 0 else ""
            axes.set_title(f"{who} · {density}" if who else density, fontsize=7, color=INK, pad=2.5)
        share = "" if math.isnan(held[row]) else f"\nholds {_percent(held[row])}\nof attention"
        box = grid[row][0].get_position()
        figure.text(
            0.42 / figure.get_figwidth(),
            (box.y0 + box.y1) / 2,
            f"{name}\ndensity {_density(layout.density)}{share}",
            fontsize=8,
            color=INK,
            va="center",
            linespacing=1.35,
        )
    return figure


def _grid(
    rows: int, columns: int, edge: float, *, left: float, top: float, gaps: tuple[float, float]
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of square panels, all measures in inches, with the labels that all panels share.

    Placed by hand: automatic layouts take seconds for two hundred panels, and let headings overlap.
    """
    right, bottom = 0.2, 0.6
    across, down = gaps
    width = left + columns * edge + (columns - 1) * across + right
    height = top + rows * edge + (rows - 1) * down + bottom
    figure = Figure(figsize=(width, height), facecolor="white")
    grid = [
        [
            figure.add_axes(
                (
                    (left + column * (edge + across)) / width,
                    1 - (top + row * (edge + down) + edge) / height,
                    edge / width,
                    edge / height,
                )
            )
            for column in range(columns)
        ]
        for row in range(rows)
    ]
    label: dict[str, Any] = {"fontsize": 9, "color": INK, "ha": "center", "va": "center"}
    figure.text((left + width - right) / 2 / width, 0.17 / height, "key position (tokens)", **label)
    figure.text(0.17 / width, (bottom + height - top) / 2 / height, "query position (tokens)", rotation=90, **label)
    return figure, grid


def _blocks(axes: Axes, layout: BlockLayout, head: int, ticks: int) -> None:
    """One head's blocks, with both axes in tokens; query 0 is at the top, as in a matrix."""
    rows, columns = layout.shape
    height, width = rows * layout.block_size, columns * layout.block_size
    axes.imshow(
        layout.mask[head].cpu().numpy(),
        cmap=ListedColormap([PRUNED, KEPT]),
        vmin=0,
        vmax=1,
        extent=(0, width, height, 0),
        # Where a panel has fewer pixels than blocks, a lone block gets fainter instead of vanishing.
        interpolation="auto",
        interpolation_stage="rgba",
    )
    axes.set_xticks(_marks(width, ticks))
    axes.set_yticks(_marks(height, ticks))
    # The outer numbers stay inside their panel, where they cannot run into those of the next.
    numbers = axes.get_xticklabels()
    numbers[0].set_horizontalalignment("left")
    numbers[-1].set_horizontalalignment("right")
    axes.tick_params(labelsize=7, length=2, width=0.6, color=FAINT, labelcolor=FAINT)
    for spine in axes.spines.values():
        spine.set(color=RULE, linewidth=0.6)


def _marks(length: int, count: int) -> list[int]:
    """Ticks from 0 to the end in equal parts, so that the end itself, the sequence length, can be read."""
    parts = next((parts for parts in (count, 4, 2) if parts <= count and length % parts == 0), 1)
    return [length * i // parts for i in range(parts + 1)]


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


def _head(figure: Figure, title: str, note: str) -> None:
    """A heading and, smaller, how to read the picture; measured in inches from the upper left corner."""
    width, height = figure.get_size_inches()
    figure.text(0.1 / width, 1 - 0.12 / height, title, fontsize=11, color=INK, fontweight="bold", va="top")
    figure.text(0.1 / width, 1 - 0.36 / height, note, fontsize=8, color=FAINT, va="top")


def _colors(count: int) -> list[str]:
    """Distinct colours for a few layers; beyond them a scale from the first layer (dark) to the last (light)."""
    if count <= len(LINES):
        return list(LINES[:count])
    scale = colormaps["viridis"]
    return [
        "#{:02x}{:02x}{:02x}".format(*(int(255 * c) for c in scale(0.9 * i / (count - 1))[:3])) for i in range(count)
    ]


def _density(value: float) -> str:
    """``.050``, in the way tables print shares; ``1`` for everything."""
    text = f"{value:.3f}" if value >= 0.001 or value == 0 else f"{value:.1e}"
    return "1" if text == "1.000" else text.removeprefix("0")


def _percent(share: float) -> str:
    return f"{share * 100:.0f} %"


def _thousands(value: float) -> str:
    return f"{value:,.0f}".replace(",", "\u2009")
