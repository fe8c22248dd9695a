from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from sat.layout import BlockLayout
from sat.plots import plot_layouts, plot_statistics

STEPS = list(range(0, 100, 10))


def layout(heads: int = 1, rows: int = 8, columns: int = 8, block_size: int = 32) -> BlockLayout:
    return BlockLayout(torch.rand(heads, rows, columns) < 0.2, block_size)


def images(figure: Figure) -> list[AxesImage]:
    return [image for axes in figure.axes for image in axes.get_images()]


def words(figure: Figure) -> str:
    titles = [axes.get_title(loc) for axes in figure.axes for loc in ("left", "center")]
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    legends = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return "\n".join([*(text.get_text() for text in figure.texts), *titles, *texts, *legends])


def statistics(layers: int, **keywords: object) -> Figure:
    skewness = torch.rand(layers, len(STEPS)).cumsum(1).tolist()
    change = [[math.nan, math.nan, *row[2:]] for row in (100 * torch.rand(layers, len(STEPS))).tolist()]
    return plot_statistics(STEPS, skewness, change, theta=1.7, delta=1.3, **keywords)  # type: ignore[arg-type]


@pytest.mark.parametrize("layers", [1, 2, 5, 12])
def test_one_panel_a_layer_shows_its_mask_in_tokens(layers: int) -> None:
    layouts = [layout(rows=6, columns=8) for _ in range(layers)]
    drawn = images(plot_layouts(layouts))
    assert len(drawn) == layers
    for image, given in zip(drawn, layouts, strict=True):
        assert torch.equal(torch.as_tensor(image.get_array()).bool(), given.mask[0])
        assert image.get_extent() == [0, 8 * 32, 6 * 32, 0]


@pytest.mark.parametrize(("layers", "heads"), [(1, 2), (3, 16)])
def test_one_panel_a_head(layers: int, heads: int) -> None:
    layouts = [layout(heads) for _ in range(layers)]
    drawn = images(plot_layouts(layouts))
    masks = torch.cat([given.mask for given in layouts])
    assert torch.equal(torch.stack([torch.as_tensor(image.get_array()).bool() for image in drawn]), masks)


def test_layers_with_and_without_a_layout_a_head() -> None:
    figure = plot_layouts({"first": layout(4), "second": layout(1)})
    assert len(images(figure)) == 5
    assert "all heads" in words(figure)


def test_panels_say_name_density_and_captured_mass() -> None:
    dense = BlockLayout(torch.ones(8, 8, dtype=torch.bool), 32)
    half = BlockLayout(torch.arange(64).view(8, 8) % 2 == 0, 16)
    text = words(plot_layouts({"encoder.0": dense, "encoder.1": half}, captured=[1.0, 0.117], title="A run"))
    for expected in ("A run", "encoder.0 · density 1\nholds 100 %", "encoder.1 · density .500\nholds 12 %", "16 × 16"):
        assert expected in text
    assert "holds" not in words(plot_layouts([dense], captured=[math.nan]))


@pytest.mark.parametrize("layers", [1, 4, 12])
def test_statistics_draws_every_layer_and_both_thresholds(layers: int) -> None:
    figure = statistics(layers)
    upper, lower = figure.axes
    for axes in (upper, lower):
        assert sum(len(line.get_xdata()) == len(STEPS) for line in axes.get_lines()) == layers
    assert lower.get_yscale() == "log"
    assert "θ = 1.7" in words(figure)
    assert "δ = 1.3 %" in words(figure)


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ([50, 50], "all layers switch at step 50"),
        ([None, 70], "layer 0, still dense\nlayer 1, switches at 70"),
        ([None, None], "layer 0\nlayer 1"),
    ],
)
def test_the_switch_is_a_line_and_is_named(switches: list[int | None], expected: str) -> None:
    figure = statistics(2, switch_steps=switches)
    assert expected in words(figure)
    lines = [tuple(line.get_xdata()) for line in figure.axes[0].get_lines()]
    assert all((step, step) in lines for step in switches if step is not None)


def test_nothing_but_nan_and_a_single_step_can_be_drawn(tmp_path: Path) -> None:
    plot_statistics([0], [[0.5]], [[math.nan]], tmp_path / "one.png", theta=1.7, delta=1.3)
    plot_statistics([0, 1], [[math.nan] * 2], [[0.0, math.nan]], tmp_path / "none.png", theta=1.7, delta=1.3)


def test_pngs_replace_what_was_there_and_leave_nothing_else(tmp_path: Path) -> None:
    for name in ("layouts.png", "statistics.png"):
        (tmp_path / name).write_text("old")
    plot_layouts([layout()], tmp_path / "layouts.png")
    statistics(2, path=str(tmp_path / "statistics.png"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layouts.png", "statistics.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Figure, path: Path, **_: object) -> None:
        path.write_text("half")
        raise OSError("disk full")

    target = tmp_path / "layouts.png"
    target.write_text("old")
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_layouts([layout()], target)
    assert [path.name for path in tmp_path.iterdir()] == ["layouts.png"]
    assert target.read_text() == "old"


def test_pyplot_is_not_needed() -> None:
    import subprocess

    code = "import sys, sat.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_errors_are_sentences() -> None:
    with pytest.raises(ValueError, match="no layout to draw"):
        plot_layouts([])
    with pytest.raises(ValueError, match="got 1 shares for 2 layouts"):
        plot_layouts([layout(), layout()], captured=[0.5])
    with pytest.raises(ValueError, match="at least one step and one layer"):
        plot_statistics([], [[]], [[]], theta=1.7, delta=1.3)
    with pytest.raises(ValueError, match="relative_change has 1 entries, but skewness has 2"):
        plot_statistics([0], [[1.0], [1.0]], [[1.0]], theta=1.7, delta=1.3)
    with pytest.raises(ValueError, match="skewness of layer 2 has 2 values for 1 steps"):
        plot_statistics([0], [[1.0], [1.0, 2.0]], [[1.0], [1.0]], theta=1.7, delta=1.3)
    with pytest.raises(ValueError, match="switch_steps has 2 entries"):
        statistics(1, switch_steps=[1, 2])
