"""What all pictures share: colours, how a matrix of blocks becomes cells, how numbers are written."""

from __future__ import annotations

import io
import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from sat.files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backend_bases import RendererBase

INK = "#222222"
FAINT = "#767676"
RULE = "#c8c8c8"
KEPT = "#1f4e79"
PRUNED = "#eef1f5"
REACHED = "#00664a"
# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow: too pale for a line.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DPI = 200

KEPT_COLORS = LinearSegmentedColormap.from_list("kept", [PRUNED, KEPT])
REACHED_COLORS = LinearSegmentedColormap.from_list("reached", [PRUNED, REACHED])
# From light to dark like the others, in other colours: how much attention is not which blocks.
ATTENTION_COLORS = colormaps["YlOrBr"]
# Of cells that stand for several blocks, one of which is kept: as much of the dark colour at least.
FAINTEST = 0.45
# A tenth of what uniform attention would give is as good as nothing.
LEAST_ATTENTION = 0.1


class Drawing(Figure):
    """A figure that shows itself in a notebook, also where nobody has imported pyplot; a dollar in it is a dollar."""

    def draw(self, renderer: RendererBase) -> None:
        """Names may hold whatever a file says: only what Matplotlib writes itself, powers of ten, is mathematics."""
        for text in self.findobj(Text):
            if "$" in text.get_text() and not text.get_text().startswith("$\\mathdefault"):
                text.set_parse_math(False)
        super().draw(renderer)

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=100)
        return file.getvalue()


def attention_scale(largest: float) -> LogNorm:
    """From a tenth of uniform attention to the next round number above ``largest``, logarithmic."""
    exponent = math.floor(math.log10(max(largest, 2.0)))
    top = next(digit * 10**exponent for digit in (1, 2, 5, 10) if digit * 10**exponent >= max(largest, 2.0) * 0.999)
    return LogNorm(LEAST_ATTENTION, top, clip=True)


def cells(matrix: Tensor, most: int) -> tuple[Tensor, int]:
    """The means of square groups of blocks, so small that no side has more than ``most`` of them.

    Args:
        matrix: ``[M, N]``, bool or float.
        most: cells a side.

    Returns:
        float32 ``[m, n]``, and how many blocks the side of a group has; 1 leaves the matrix as it is.
    """
    side = math.ceil(max(matrix.shape) / most)
    # The last group of a row may be smaller; it is divided by the blocks that it has.
    means = F.avg_pool2d(matrix.float()[None, None], side, ceil_mode=True)[0, 0] if side > 1 else matrix.float()
    return means.cpu(), side


def shades(shares: Tensor) -> Tensor:
    """How dark a cell is drawn, 0 to 1, by the share of its blocks that are kept: a single one can be seen."""
    return (FAINTEST + (1 - FAINTEST) * shares) * (shares > 0)


def layout_pixels(mask: Tensor, most: int = 256) -> np.ndarray:
    """The layouts of all heads beside each other, in the colours of :func:`plot_layouts`.

    Args:
        mask: bool ``[H, M, N]``.
        most: cells a side, for each head; above it, several blocks share one.

    Returns:
        uint8 ``[height, width, 3]``.
    """
    return _beside([KEPT_COLORS(shades(cells(head, most)[0]).numpy()) for head in mask])


def attention_pixels(over_uniform: Tensor, most: int = 256) -> np.ndarray:
    """The attention of all heads beside each other, in the colours of :func:`plot_layer`.

    Args:
        over_uniform: ``[H, M, N]``, each block's attention, as a multiple of uniform attention.
        most: as for :func:`layout_pixels`.

    Returns:
        uint8 ``[height, width, 3]``.
    """
    scale = attention_scale(float(over_uniform.max()))
    return _beside([ATTENTION_COLORS(scale(cells(head, most)[0].numpy())) for head in over_uniform])


def _beside(panels: list[np.ndarray]) -> np.ndarray:
    """Panels ``[m, n, 4]`` of 0 to 1, enlarged until they can be looked at, with white between them."""
    zoom = max(1, 160 // max(panels[0].shape[:2]))
    gap = np.full((panels[0].shape[0] * zoom, 4, 3), 255, dtype=np.uint8)
    parts = []
    for panel in panels:
        pixels = (255 * panel[..., :3]).round().astype(np.uint8)
        parts += [pixels.repeat(zoom, 0).repeat(zoom, 1), gap]
    return np.concatenate(parts[:-1], 1)


def panels(
    rows: int,
    columns: int,
    edge: float,
    *,
    left: float,
    top: float,
    gaps: tuple[float, float],
    right: float = 0.2,
    least_width: float = 0.0,
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of square panels, all measures in inches, with the labels that all panels share.

    Placed by hand: automatic layouts take seconds for two hundred panels, and let headings overlap.
    """
    bottom = 0.6
    across, down = gaps
    end = left + columns * edge + (columns - 1) * across
    width = max(end + right, least_width)
    height = top + rows * edge + (rows - 1) * down + bottom
    figure = Drawing(figsize=(width, height), facecolor="white")
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
    figure.text((left + end) / 2 / width, 0.17 / height, "key position (tokens)", **label)
    figure.text(0.17 / width, (bottom + height - top) / 2 / height, "query position (tokens)", rotation=90, **label)
    return figure, grid


def marks(length: int, count: int) -> list[int]:
    """Ticks from 0 to the end in equal parts, so that the end itself, the sequence length, can be read."""
    parts = next((parts for parts in (count, 4, 2) if parts <= count and length % parts == 0), 1)
    return [length * i // parts for i in range(parts + 1)]


def heading(figure: Figure, title: str, note: str) -> None:
    """A heading and, smaller, how to read the picture; measured in inches from the upper left corner."""
    width, height = figure.get_size_inches()
    figure.text(0.1 / width, 1 - 0.12 / height, title, fontsize=11, color=INK, fontweight="bold", va="top")
    figure.text(0.1 / width, 1 - 0.36 / height, note, fontsize=8, color=FAINT, va="top")


def line_colors(count: int) -> list[str]:
    """Distinct colours for a few layers; beyond them a scale from the first layer (dark) to the last (light)."""
    if count <= len(LINES):
        return list(LINES[:count])
    scale = colormaps["viridis"]
    return [
        "#{:02x}{:02x}{:02x}".format(*(int(255 * c) for c in scale(0.9 * i / (count - 1))[:3])) for i in range(count)
    ]


def density_text(value: float) -> str:
    """``.050``, in the way tables print shares; ``1`` for everything."""
    text = f"{value:.3f}" if value >= 0.001 or value == 0 else f"{value:.1e}"
    return "1" if text == "1.000" else text.removeprefix("0")


def percent(share: float) -> str:
    """In whole percent."""
    return f"{share * 100:.0f} %"


def thousands(value: float) -> str:
    """A whole number with thin spaces between thousands."""
    return f"{value:,.0f}".replace(",", "\u2009")


def written(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """The figure, which is written as a PNG if there is a path; an existing file is replaced whole or not at all."""
    if path is not None:
        with written_whole(path) as temporary:
            figure.savefig(temporary, format="png", dpi=DPI)
    return figure
