"""The fixed structures of sat.patterns, drawn with the line of code that makes each.

python -m experiments.draw_structures            (a few seconds; writes docs/structures.png)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from sat.layout import BlockLayout
from sat.patterns import BigBird, Dense, Fixed, Longformer, SlidingWindow, Structure, Variable
from sat.plots import DPI, FAINT, INK, KEPT, PRUNED

TOKENS = 256

# Title of a panel, the code below it, and what this code makes. All heads share one layout.
STRUCTURES: dict[str, tuple[str, Structure]] = {
    "Fixed": ("Fixed(8)", Fixed(8)),
    "Fixed, causal": ("Fixed(8, attention='unidirectional')", Fixed(8, attention="unidirectional")),
    "Fixed, rows too": ("Fixed(8, horizontal_global_attention=True)", Fixed(8, horizontal_global_attention=True)),
    "Variable": (
        "Variable(8, local_window_blocks=[2, 3, 5],\nglobal_block_indices=[0, 9])",
        Variable(8, local_window_blocks=[2, 3, 5], global_block_indices=[0, 9]),
    ),
    "BigBird": ("BigBird(8)", BigBird(8)),
    "Longformer": ("Longformer(8, global_block_indices=[0, 8])", Longformer(8, global_block_indices=[0, 8])),
    "SlidingWindow": ("SlidingWindow(8)", SlidingWindow(8)),
    "Dense": ("Dense(8)", Dense(8)),
}


def panel(axes: Axes, title: str, code: str, layout: BlockLayout) -> None:
    rows, columns = layout.shape
    axes.imshow(layout.mask[0].numpy(), cmap=ListedColormap([PRUNED, KEPT]), vmin=0, vmax=1, interpolation="nearest")
    # White lines between the blocks, so that they can be counted.
    axes.set_xticks([column - 0.5 for column in range(columns + 1)], minor=True)
    axes.set_yticks([row - 0.5 for row in range(rows + 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.7)
    axes.tick_params(which="minor", length=0)
    axes.tick_params(which="major", length=2, width=0.6, labelsize=7, color=FAINT, labelcolor=FAINT)
    axes.set_xticks(range(0, columns, 5))
    axes.set_yticks(range(0, rows, 5))
    axes.spines[:].set_visible(False)
    axes.set_xlabel("key block", fontsize=8, color=INK, labelpad=2)
    axes.set_ylabel("query block", fontsize=8, color=INK, labelpad=2)
    axes.text(0, 1.16, title, transform=axes.transAxes, fontsize=10, fontweight="bold", color=INK)
    axes.text(
        1, 1.16, f"keeps {layout.density * 100:.0f} %", transform=axes.transAxes, fontsize=8, ha="right", color=INK
    )
    axes.text(0, 1.13, code, fontsize=6.3, family="monospace", color=FAINT, va="top", transform=axes.transAxes)


def draw(path: Path) -> Figure:
    """Draw all structures and write the picture."""
    # Without pyplot: no global state and no display.
    figure = Figure(figsize=(11, 6.4), facecolor="white")
    grid = figure.subplots(2, 4, gridspec_kw={"wspace": 0.24, "hspace": 0.42})
    figure.subplots_adjust(left=0.045, right=0.99, bottom=0.07, top=0.84)
    for axes, (title, (code, structure)) in zip(grid.flat, STRUCTURES.items(), strict=True):
        panel(axes, title, code, structure.layout(TOKENS))
    figure.text(
        0.045, 0.965, f"Fixed structures, {TOKENS} tokens in blocks of 16", fontsize=12, color=INK, weight="bold"
    )
    figure.text(
        0.045, 0.938, "dark = kept, light = skipped; the query in row i sees the dark keys", fontsize=8, color=FAINT
    )
    figure.savefig(path, dpi=DPI)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", type=Path, default=Path(__file__).parents[1] / "docs" / "structures.png")
    path = parser.parse_args().path
    draw(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
