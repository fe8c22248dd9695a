from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from sat.layout import BlockLayout
from sat.plots import (
    DPI,
    KEPT,
    PRUNED,
    attention_pixels,
    layout_pixels,
    plot_carried,
    plot_layer,
    plot_layouts,
    plot_reach,
    plot_statistics,
    plot_training,
)

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


def rendered(figure: Figure) -> torch.Tensor:
    """What is seen, ``[height, width, 3]``."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba()).copy())[..., :3]


def test_a_lone_block_of_millions_can_be_seen() -> None:
    mask = torch.zeros(1, 2048, 2048, dtype=torch.bool)
    empty = plot_layouts([BlockLayout(mask, 32)])
    mask[0, 1333, 517] = True
    figure = plot_layouts([BlockLayout(mask, 32)])
    assert "several blocks of 32 × 32 tokens" in words(figure)
    (image,) = images(figure)
    assert max(image.get_array().shape) <= figure.dpi * 3.6 * 2  # fewer cells than pixels in print
    seen = []
    for each in (figure, empty):
        each.dpi = DPI
        picture, box = rendered(each), each.axes[0].get_position()
        height, width = picture.shape[:2]
        rows, columns = (
            [round(edge * size) + border for edge, border in zip(edges, (5, -5), strict=True)]  # without the frame
            for size, edges in ((height, (1 - box.y1, 1 - box.y0)), (width, (box.x0, box.x1)))
        )
        seen.append(picture[slice(*rows), slice(*columns)].amax(2))
    assert (seen[1] > 230).all()
    dark = seen[0] < 200
    assert dark.any()
    row, column = (dark.nonzero().float().mean(0) / torch.tensor(dark.shape)).tolist()
    assert (row, column) == pytest.approx((1333 / 2048, 517 / 2048), abs=0.01)


def test_groups_of_blocks_are_as_dark_as_they_are_full() -> None:
    mask = torch.zeros(1, 1024, 1000, dtype=torch.bool)
    mask[:, :512] = True
    (image,) = images(plot_layouts([BlockLayout(mask, 8)]))
    cells = torch.as_tensor(image.get_array())
    assert set(cells.unique().tolist()) == {0, 1}
    assert image.axes.get_xlim() == (0, 8000)


def test_a_layer_shows_each_head_with_its_blocks_below() -> None:
    kept, attention = layout(3), torch.rand(3, 8, 8)
    figure = plot_layer(kept, attention, block_size=32, held=[(0.2, 0.31)] * 3, title="Layer 4")
    drawn = [torch.as_tensor(image.get_array()) for image in images(figure)][:6]  # the last is the colour bar
    assert torch.equal(torch.stack(drawn[:3]), attention)
    assert torch.equal(torch.stack(drawn[3:]).bool(), kept.mask)
    for expected in ("Layer 4", "head 2", "holds 20 % of 31 %", "1 × is what it would be if spread evenly"):
        assert expected in words(figure)


def test_a_layout_for_all_heads_stands_beside_their_mean_and_each() -> None:
    kept, attention = layout(1), torch.rand(8, 8, 8)
    drawn = [torch.as_tensor(image.get_array()) for image in images(plot_layer(kept, attention, block_size=32))]
    assert torch.equal(drawn[0].bool(), kept.mask[0])
    assert torch.allclose(drawn[1], attention.mean(0))
    assert torch.equal(torch.stack(drawn[2:10]), attention)


def test_a_layer_without_attention_or_without_a_layout() -> None:
    assert len(images(plot_layer(layout(9), block_size=32))) == 9
    assert "dark = kept" not in words(plot_layer(None, torch.rand(2, 8, 8), block_size=32))
    with pytest.raises(ValueError, match="got neither"):
        plot_layer(None, block_size=32)
    with pytest.raises(ValueError, match="8 x 8 blocks, the attention 4 x 4"):
        plot_layer(layout(2), torch.rand(2, 4, 4), block_size=32)


def test_training_draws_what_there_is(tmp_path: Path) -> None:
    curves = {"train/loss": ([1, 5, 9], [2.0, 1.0, 0.5]), "val/acc": ([5], [0.4]), "lr": ([1], [0.1])}
    figure = plot_training(curves, tmp_path / "training.png", switch_steps=[5, 5])
    assert len(figure.axes) == 2
    assert "the switch to sparse attention at step 5" in words(figure)
    assert (tmp_path / "training.png").stat().st_size > 0
    assert "layers switch at step 5" in words(plot_training(curves, switch_steps=[5, 7]))
    assert "right of it sparse" in words(figure)
    for some in ({"switch_steps": [5, None]}, {"switch_steps": [5, 5], "gave_up": 9}):
        assert "right of it sparse" not in words(plot_training(curves, **some))
    assert "dense attention again from step 9 on" in words(plot_training(curves, switch_steps=[5, 5], gave_up=9))
    with pytest.raises(ValueError, match="got lr"):
        plot_training({"lr": ([1], [0.1])})


def test_reach_draws_a_panel_a_layer() -> None:
    maps = {"after layer 0": torch.eye(8) > 0, "after layer 1": torch.ones(8, 8) > 0}
    figure = plot_reach(maps, block_size=16, shares=[0.125, 1.0])
    assert [torch.as_tensor(image.get_array()).bool().sum().item() for image in images(figure)] == [8, 64]
    assert "after layer 0 · 12 %" in words(figure)


def test_a_single_number_among_undefined_ones_is_a_dot() -> None:
    figure = plot_statistics(
        [0, 1], [[1.0, 1.0]], [[math.nan] * 2], theta=None, delta=None, agreement=[[math.nan, 0.9]]
    )  # fmt: skip
    assert figure.axes[1].get_lines()[0].get_marker() == "o"


def test_layouts_of_different_lengths_have_numbers_each() -> None:
    layouts = {f"layer {n}": BlockLayout(torch.eye(n, dtype=torch.bool), 16) for n in (2, 3, 4)}
    assert all(axes.yaxis.get_tick_params()["labelleft"] for axes in plot_layouts(layouts).axes)
    alike = {f"layer {n}": layouts["layer 2"] for n in range(3)}
    assert [axes.yaxis.get_tick_params()["labelleft"] for axes in plot_layouts(alike).axes] == [True, False, False]


def test_thresholds_that_are_not_known_are_not_drawn() -> None:
    figure = plot_statistics([0, 1], [[0.5, 1.0]], [[1.0, 2.0]], theta=None, delta=None)
    assert "thresholds are not known" in words(figure)
    assert all(len(axes.get_lines()) == 1 for axes in figure.axes)


def test_pixels_are_the_same_colours_as_in_pictures() -> None:
    mask = torch.tensor([[[True, False], [False, False]]] * 3)
    pixels = layout_pixels(mask)
    assert pixels.shape == (160, 3 * 160 + 2 * 4, 3)
    kept, pruned = ([int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in (KEPT, PRUNED))
    assert pixels[0, 0].tolist() == kept
    assert pixels[0, 159].tolist() == pruned
    attention = attention_pixels(torch.tensor([[[5.0, 0.1]]]))
    assert attention[0, 0].sum() < attention[0, 159].sum()  # dark = much
    assert max(layout_pixels(torch.ones(1, 3000, 3000) > 0).shape) <= 256


def test_a_figure_shows_itself_in_a_notebook() -> None:
    for figure in (plot_layouts([layout()]), statistics(1), plot_training({"train/loss": ([1, 2], [2.0, 1.0])})):
        assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]


def test_what_was_not_measured_because_the_agreement_decides_has_no_panel() -> None:
    undefined = [[math.nan, math.nan]]
    options = {"theta": None, "delta": None, "agreement": [[0.5, 0.9]], "least_agreement": 0.8}
    panels = plot_statistics([0, 1], [[0.5, 1.0]], undefined, **options).axes  # type: ignore[arg-type]
    assert [axes.get_ylabel().split()[0] for axes in panels] == ["skewness", "agreement"]
    panels = plot_statistics([0, 1], [[0.5, 1.0]], [[1.0, 2.0]], **options).axes  # type: ignore[arg-type]
    assert [axes.get_ylabel().split()[0] for axes in panels] == ["skewness", "relative", "agreement"]


def test_carried_layouts_stand_below_what_they_were(tmp_path: Path) -> None:
    before = [layout(2, block_size=8), layout(1, block_size=8), layout(2, block_size=8)]
    after = [layout(2, 32, 32), layout(1, 32, 32), layout(1, 32, 32)]
    figure = plot_carried(before, after, tmp_path / "carried.png")
    assert (tmp_path / "carried.png").is_file()
    # Five columns, of which four stand beside each other.
    expected = [before[0].mask[0], before[0].mask[1], before[1].mask[0], before[2].mask[0]]
    expected += [after[0].mask[0], after[0].mask[1], after[1].mask[0], after[2].mask[0]]
    expected += [before[2].mask[1], after[2].mask[0]]
    drawn = images(figure)
    assert len(drawn) == len(expected)
    for image, mask in zip(drawn, expected, strict=True):
        assert torch.equal(torch.as_tensor(image.get_array()).bool(), mask)
    assert "layer 2 · head 1 · " in words(figure)
    assert "of 32 x 32 blocks" in words(figure)
    with pytest.raises(ValueError, match="a layout after for each before, got 3 and 2"):
        plot_carried(before, after[:2])
