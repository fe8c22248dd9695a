"""Matrices of blocks: which are kept, what was attended to, how far information travels."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from torch import Tensor

from sat.layout import BlockLayout
from sat.plots.style import (
    ATTENTION_COLORS,
    FAINT,
    INK,
    KEPT_COLORS,
    LEAST_ATTENTION,
    REACHED_COLORS,
    RULE,
    attention_scale,
    cells,
    density_text,
    heading,
    marks,
    panels,
    percent,
    shades,
    written,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Cells an inch: fewer than pixels, so that none falls between them.
CELLS = 150


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
        names, each = list(layouts), list(layouts.values())
    else:
        names, each = [f"layer {i}" for i in range(len(layouts))], list(layouts)
    if not each:
        raise ValueError("plot_layouts got no layout to draw; a model has layouts once it has left the dense phase")
    if captured is not None and len(captured) != len(each):
        raise ValueError(f"captured holds one share a layer: got {len(captured)} shares for {len(each)} layouts")
    held = [math.nan] * len(each) if captured is None else [float(share) for share in captured]

    heads = max(layout.num_heads for layout in each)
    figure, grouped = _draw_layers(names, each, held) if heads == 1 else _draw_heads(names, each, held, heads)
    heading(figure, title or "Attention blocks kept", _note(each, grouped))
    return written(figure, path)


def plot_layer(
    layout: BlockLayout | None,
    over_uniform: Tensor | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    block_size: int,
    held: Sequence[tuple[float, float]] | None = None,
    largest: float | None = None,
    title: str | None = None,
) -> Figure:
    """Draw one layer: what each head attended to, and beside it which blocks were kept.

    With a layout a head, each head has a column: attention above, blocks below. With one layout for all heads, the
    panels follow each other: the blocks, the mean of the heads, each head.

    Args:
        layout: the blocks kept; None: all.
        over_uniform: ``[H, M, N]``, each block's mean attention weight as a multiple of uniform attention; None where
            it is unknown.
        path: PNG file to write; an existing one is replaced whole or not at all. None writes nothing.
        block_size: edge of a block in tokens.
        held: for each head of the layout, which share of its attention the kept blocks hold, and which they could hold
            at most, 0 to 1.
        largest: end of the scale of attention, so that layers can be compared; by default its largest value here.
        title: heading of the figure.

    Raises:
        ValueError: there is neither a layout nor attention, or the two are of different sizes.
    """
    if layout is None and over_uniform is None:
        raise ValueError("plot_layer needs a layout or attention to draw, got neither")
    if layout is not None and over_uniform is not None and layout.shape != tuple(over_uniform.shape[1:]):
        raise ValueError(
            f"the layout has {layout.shape[0]} x {layout.shape[1]} blocks, the attention {over_uniform.shape[1]} x "
            f"{over_uniform.shape[2]}; give those of one layer"
        )
    columns = _columns(layout, over_uniform, held)
    high, wide = len(columns[0]), min(len(columns), 6)
    bands = -(-len(columns) // wide)
    edge = {1: 3.0, 2: 2.5, 3: 2.1, 4: 1.9}.get(wide, 1.5)
    figure, grid = panels(
        bands * high,
        wide,
        edge,
        left=0.85,
        top=0.9 if over_uniform is None else 1.05,
        gaps=(0.16, 0.3),
        right=0.2 if over_uniform is None else 0.95,
        least_width=5.4,
    )
    scale = None if over_uniform is None else attention_scale(float(over_uniform.max()) if largest is None else largest)
    grouped = False
    for band in range(bands):
        for place in range(wide):
            column = columns[band * wide + place] if band * wide + place < len(columns) else []
            for row in range(high):
                axes = grid[band * high + row][place]
                if not column:
                    axes.remove()
                    continue
                name, matrix = column[row]
                if matrix.dtype == torch.bool:
                    grouped |= _matrix(axes, matrix, block_size, edge, ticks=2)
                else:
                    _matrix(axes, matrix, block_size, edge, 2, ATTENTION_COLORS, scale)
                axes.set_title(name, fontsize=7, color=INK, pad=2.5)
                axes.tick_params(labelbottom=row == high - 1 and band == bands - 1, labelleft=place == 0)
    if scale is not None:
        _color_bar(figure, grid[0][-1] if len(columns) >= wide else grid[0][0], scale)
    kind = "" if layout is None else _note([layout], grouped)
    heading(figure, title or "What a layer attends to", "\n".join(filter(None, [kind, _attention_note(over_uniform)])))
    return written(figure, path)


def plot_carried(
    before: Sequence[BlockLayout],
    after: Sequence[BlockLayout],
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Draw layouts that have been carried to longer sequences, each below what it was.

    Args:
        before: one a layer, in order.
        after: one a layer, of as many heads, or of 1 if they have become alike.
        path: PNG file to write; an existing one is replaced whole or not at all. None writes nothing.
        title: heading of the figure.

    Raises:
        ValueError: there is no layout, or there are not as many after as before.
    """
    if not before or len(before) != len(after):
        raise ValueError(f"plot_carried needs a layout after for each before, got {len(before)} and {len(after)}")
    columns = []
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        heads = max(old.num_heads, new.num_heads)
        for head in range(heads):
            who = f"layer {index} · head {head}" if heads > 1 else f"layer {index}"
            columns.append([(who, each, each.mask[head % each.num_heads]) for each in (old, new)])
    wide = min(len(columns), 4)
    bands, edge = -(-len(columns) // wide), 2.6
    figure, grid = panels(bands * 2, wide, edge, left=0.85, top=0.95, gaps=(0.22, 0.4), least_width=5.4)
    grouped = False
    for index, axes in enumerate(axes for row in grid for axes in row):
        row, place = divmod(index, wide)
        number = row // 2 * wide + place
        if number >= len(columns):
            axes.remove()
            continue
        who, layout, mask = columns[number][row % 2]
        grouped |= _matrix(axes, mask, layout.block_size, edge, ticks=2)
        text = f"{who} · " if row % 2 == 0 else ""
        text += f"{density_text(float(mask.float().mean()))} of {mask.shape[0]} x {mask.shape[1]} blocks"
        axes.set_title(text, fontsize=7.5, color=INK, pad=2.5, loc="left")
        axes.tick_params(labelleft=place == 0)
    note = "above as it was learned, below as it is used here; dark = kept, light = skipped"
    note += "\nwhere a cell stands for several blocks, the darker the more are kept" if grouped else ""
    heading(figure, title or "Layouts carried to longer sequences", note)
    return written(figure, path)


def plot_reach(
    maps: Mapping[str, Tensor],
    path: str | os.PathLike[str] | None = None,
    *,
    block_size: int,
    shares: Sequence[float],
    title: str | None = None,
) -> Figure:
    """Draw which positions have heard of which others after each layer.

    Args:
        maps: name of a panel -> bool ``[M, M]``, see :class:`sat.connectivity.Reach`.
        path: PNG file to write; an existing one is replaced whole or not at all. None writes nothing.
        block_size: edge of a block in tokens.
        shares: for each panel, the share of the pairs that are reached, 0 to 1.
        title: heading of the figure.
    """
    columns = min(len(maps), 4)
    rows, edge = -(-len(maps) // columns), 2.1
    figure, grid = panels(rows, columns, edge, left=0.85, top=0.85, gaps=(0.2, 0.34), least_width=5.4)
    places = [axes for row in grid for axes in row]
    for index, (name, known) in enumerate(maps.items()):
        axes = places[index]
        _matrix(axes, known, block_size, edge, 2, REACHED_COLORS)
        axes.set_title(f"{name} · {percent(shares[index])}", fontsize=7.5, color=INK, pad=2.5, loc="left")
        axes.tick_params(labelbottom=index + columns >= len(maps), labelleft=index % columns == 0)
    for axes in places[len(maps) :]:
        axes.remove()
    heading(figure, title or "Who has heard of whom", "dark = these keys have reached these queries; light = not yet")
    return written(figure, path)


def _columns(
    layout: BlockLayout | None, over_uniform: Tensor | None, held: Sequence[tuple[float, float]] | None
) -> list[list[tuple[str, Tensor]]]:
    """Panels from left to right; of each, what stands below each other: name and matrix."""
    kept = []
    for head, mask in enumerate(layout.mask if layout is not None else ()):
        text = f"{density_text(_density(mask))} kept"
        if held is not None:
            text += f" · holds {percent(held[head][0])} of {percent(held[head][1])}"
        kept.append((text, mask))
    if over_uniform is None:
        each = ["all heads"] if len(kept) == 1 else [f"head {head}" for head in range(len(kept))]
        return [[(f"{name} · {text}", mask)] for name, (text, mask) in zip(each, kept, strict=True)]
    attention = [(f"head {head}", matrix) for head, matrix in enumerate(over_uniform)]
    if len(kept) == len(attention):
        return [[above, below] for above, below in zip(attention, kept, strict=True)]
    mean = [("attention, mean of heads", over_uniform.mean(0))] if len(attention) > 1 else []
    return [[panel] for panel in [*kept[:1], *mean, *attention]]


def _draw_layers(names: list[str], layouts: list[BlockLayout], held: list[float]) -> tuple[Figure, bool]:
    """One large panel a layer, at most four in a row; and whether a cell stands for several blocks."""
    columns = min(len(layouts), 4)
    rows = -(-len(layouts) // columns)
    edge = 3.6 if columns == 1 else 2.6
    # Room for the heading, and for a panel title of one line or of two.
    lines = 0.24 if all(map(math.isnan, held)) else 0.4
    alike = _of_one_size(layouts)  # otherwise each panel has numbers of its own
    gaps = (0.22 if alike else 0.55, 0.4 + lines)
    figure, grid = panels(rows, columns, edge, left=0.85, top=0.6 + lines, gaps=gaps)
    grouped = False
    for index, axes in enumerate(axes for row in grid for axes in row):
        if index >= len(layouts):
            axes.remove()
            continue
        layout = layouts[index]
        grouped |= _matrix(axes, layout.mask[0], layout.block_size, edge, ticks=4)
        share = "" if math.isnan(held[index]) else f"\nholds {percent(held[index])} of attention"
        text = f"{names[index]} · density {density_text(layout.density)}{share}"
        axes.set_title(text, fontsize=8.5, color=INK, loc="left", pad=4)
        # At the end of a last row that is not full, the panel above keeps its numbers.
        axes.tick_params(
            labelbottom=not alike or index + columns >= len(layouts), labelleft=not alike or index % columns == 0
        )
    return figure, grouped


def _of_one_size(layouts: Sequence[BlockLayout]) -> bool:
    """Whether all are of as many tokens."""
    return len({(*layout.shape, layout.block_size) for layout in layouts}) == 1


def _draw_heads(names: list[str], layouts: list[BlockLayout], held: list[float], heads: int) -> tuple[Figure, bool]:
    """One row a layer, one column a head; small panels that share their numbers; and whether cells are groups."""
    rows = len(layouts)
    edge = 2.2 if heads <= 3 else 1.35 if heads <= 8 else 0.95
    alike = _of_one_size(layouts)
    figure, grid = panels(rows, heads, edge, left=1.95, top=0.85, gaps=(0.1, 0.26 if alike else 0.44))
    grouped = False
    for row, (name, layout) in enumerate(zip(names, layouts, strict=True)):
        mask = layout.mask
        for head, axes in enumerate(grid[row]):
            if head >= layout.num_heads:
                axes.remove()
                continue
            grouped |= _matrix(axes, mask[head], layout.block_size, edge, ticks=2)
            # Under a head that the next layer does not have, too.
            last = not alike or row == rows - 1 or head >= layouts[row + 1].num_heads
            axes.tick_params(labelbottom=last, labelleft=head == 0)
            density = density_text(_density(mask[head]))
            who = "all heads" if layout.num_heads == 1 else f"head {head}" if row == 0 else ""
            axes.set_title(f"{who} · {density}" if who else density, fontsize=7, color=INK, pad=2.5)
        share = "" if math.isnan(held[row]) else f"\nholds {percent(held[row])}\nof attention"
        box = grid[row][0].get_position()
        figure.text(
            0.42 / figure.get_figwidth(),
            (box.y0 + box.y1) / 2,
            f"{name}\ndensity {density_text(layout.density)}{share}",
            fontsize=8,
            color=INK,
            va="center",
            linespacing=1.35,
        )
    return figure, grouped


def _density(mask: Tensor) -> float:
    return int(mask.count_nonzero()) / mask.numel()


def _matrix(
    axes: Axes,
    matrix: Tensor,
    block_size: int,
    edge: float,
    ticks: int,
    colors: Colormap = KEPT_COLORS,
    scale: Normalize | None = None,
) -> bool:
    """A matrix of blocks, with both axes in tokens; query 0 is at the top. Returns whether cells are groups.

    Bools are drawn so that a lone block can still be seen where a panel has fewer pixels than blocks.
    """
    means, side = cells(matrix, int(edge * CELLS))
    size = side * block_size
    height, width = matrix.shape[0] * block_size, matrix.shape[1] * block_size
    axes.imshow(
        (shades(means) if matrix.dtype == torch.bool else means).numpy(),
        cmap=colors,
        norm=Normalize(0, 1) if scale is None else scale,
        extent=(0, means.shape[1] * size, means.shape[0] * size, 0),
        interpolation="nearest",
    )
    axes.set_xlim(0, width)  # a last group may be larger than what is left for it
    axes.set_ylim(height, 0)
    axes.set_xticks(marks(width, ticks))
    axes.set_yticks(marks(height, ticks))
    # The outer numbers stay inside their panel, where they cannot run into those of the next.
    numbers = axes.get_xticklabels()
    numbers[0].set_horizontalalignment("left")
    numbers[-1].set_horizontalalignment("right")
    axes.tick_params(labelsize=7, length=2, width=0.6, color=FAINT, labelcolor=FAINT)
    for spine in axes.spines.values():
        spine.set(color=RULE, linewidth=0.6)
    return side > 1


def _color_bar(figure: Figure, beside: Axes, scale: Normalize) -> None:
    """The scale of attention, right of a panel and as high as it."""
    box, width = beside.get_position(), figure.get_figwidth()
    axes = figure.add_axes((box.x1 + 0.14 / width, box.y0, 0.11 / width, box.height))
    bar = figure.colorbar(ScalarMappable(scale, ATTENTION_COLORS), cax=axes)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} ×"))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.set_ticks([LEAST_ATTENTION, 1, float(scale.vmax or 1)])
    bar.ax.tick_params(labelsize=7, length=2, width=0.6, color=FAINT, labelcolor=FAINT)
    bar.outline.set_visible(False)


def _note(layouts: Sequence[BlockLayout], grouped: bool) -> str:
    """How to read the cells."""
    sizes = " or ".join(f"{size} × {size}" for size in sorted({layout.block_size for layout in layouts}))
    if grouped:
        return f"a cell = several blocks of {sizes} tokens, the darker the more are kept; light = none is"
    return f"one cell = a block of {sizes} tokens; dark = kept, light = skipped"


def _attention_note(over_uniform: Tensor | None) -> str:
    return "" if over_uniform is None else "brown = attention; 1 × is what it would be if spread evenly"
