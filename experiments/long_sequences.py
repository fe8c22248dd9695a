"""ListOps and Pathfinder as they are drawn: how fast, and pictures to try one's eyes on.

python -m experiments.long_sequences             (half a minute; writes docs/pathfinder.png and
                                                  experiments/results/long_sequences_cpu.json)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import record
from sat.data.listops import draw as draw_expressions
from sat.data.pathfinder.contours import SETTINGS, chunk_size, draw_some, settings_of
from sat.plots import DPI, FAINT, INK

EXPRESSIONS = 20_000
COLUMNS = 6


def draw(path: Path) -> Figure:
    """Some pictures of each of the Arena's sizes, with their labels below."""
    sizes = [size for size in SETTINGS if size >= 32]
    figure = Figure(figsize=(8.4, 6.3), facecolor="white")
    grid = figure.subplots(len(sizes), COLUMNS, gridspec_kw={"wspace": 0.06, "hspace": 0.2})
    figure.subplots_adjust(left=0.06, right=0.99, bottom=0.04, top=0.99)
    for row, size in zip(grid, sizes, strict=True):
        drawn = draw_some(settings_of(size), COLUMNS, np.random.default_rng(1))
        for axes, picture, label in zip(row, drawn.pictures, drawn.labels, strict=True):
            axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel("1: one contour" if label else "0: two contours", fontsize=7, color=FAINT, labelpad=2)
        row[0].set_ylabel(f"{size} x {size}", fontsize=9, color=INK)
    figure.savefig(path, dpi=DPI)
    return figure


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and the seconds that one core computed for it, whatever else the machine did meanwhile."""
    begin = time.process_time()
    result = work()
    return result, time.process_time() - begin


def measure() -> dict[str, Any]:
    """Samples a second of one core."""
    _, seconds = timed(lambda: draw_expressions(EXPRESSIONS, 500, 2000, 0))
    rows: dict[str, Any] = {
        "ListOps, 500 to 2,000 tokens": {"samples": EXPRESSIONS, "per_second": round(EXPRESSIONS / seconds)}
    }
    for settings in SETTINGS.values():
        draw_some(settings, 1, np.random.default_rng(0))  # what is computed once
        drawn, seconds = timed(partial(draw_some, settings, chunk_size(settings), np.random.default_rng(1)))
        shown = np.isfinite(drawn.paddles[:, 2 * settings.contour_length :: settings.distractor_length, 0])
        rows[f"Pathfinder, {settings.size} x {settings.size} pixels"] = {
            "samples": len(drawn.labels),
            "per_second": round(len(drawn.labels) / seconds),
            "distractors": round(float(shown.sum(1).mean()), 2),
            "distractors_at_most": settings.num_distractors,
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", type=Path, default=Path(__file__).parents[1] / "docs" / "pathfinder.png")
    path = parser.parse_args().path
    draw(path)
    print(f"wrote {path}")
    note = "Seconds that one core computed, on a machine that did other work meanwhile."
    figures = {"note": note, "drawn": measure()}
    print(f"wrote {record.save('long_sequences_cpu', 'python -m experiments.long_sequences', figures, device='cpu')}")


if __name__ == "__main__":
    main()
