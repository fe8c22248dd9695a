"""Floor 4: pictures of what was learned and of how the moment to switch was found.

Figures are made without pyplot: no global state, no display, safe in any process. Every figure is returned, and
written as a PNG where a path is given. A colour means the same thing in every picture.
"""

from sat.plots.layouts import plot_carried, plot_layer, plot_layouts, plot_reach
from sat.plots.lines import plot_statistics, plot_training
from sat.plots.style import DPI, FAINT, INK, KEPT, LINES, PRUNED, RULE, attention_pixels, layout_pixels

__all__ = [
    "DPI",
    "FAINT",
    "INK",
    "KEPT",
    "LINES",
    "PRUNED",
    "RULE",
    "attention_pixels",
    "layout_pixels",
    "plot_carried",
    "plot_layer",
    "plot_layouts",
    "plot_reach",
    "plot_statistics",
    "plot_training",
]
