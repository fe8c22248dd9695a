"""Layouts and positions for longer sequences, against their definitions token by token."""

from __future__ import annotations

from fractions import Fraction
from math import floor, isqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sat.layout import BlockLayout
from sat.patterns import SlidingWindow
from sat.scaling import interpolate_positions, position_grids, scale_layout


def random_layout(heads: int, length: int, size: int, density: float, seed: int = 0) -> BlockLayout:
    side = -(-length // size)
    generator = torch.Generator().manual_seed(seed)
    return BlockLayout(torch.rand(heads, side, side, generator=generator) < density, size)


def comes_from(token: int, length: int, new_length: int, pictures: bool) -> int:
    if not pictures:
        return token // (new_length // length)
    edge, new_edge = isqrt(length), isqrt(new_length)
    y, x = divmod(token, new_edge)
    return y // (new_edge // edge) * edge + x // (new_edge // edge)


def definition(layout: BlockLayout, length: int, new_length: int, size: int, pictures: bool) -> torch.Tensor:
    """Pair by pair of tokens, in fractions."""
    old = layout.element_mask(length, length)
    source = [comes_from(token, length, new_length, pictures) for token in range(new_length)]
    pairs = old[:, source][:, :, source]
    side = -(-new_length // size)
    result = torch.zeros(layout.num_heads, side, side, dtype=torch.bool)
    for head in range(layout.num_heads):
        for row in range(side):
            shares = []
            for column in range(side):
                block = pairs[head, row * size : (row + 1) * size, column * size : (column + 1) * size]
                shares.append(Fraction(int(block.sum()), block.numel()))
            count = max(floor(sum(shares) + Fraction(1, 2)), int(any(shares)))
            for column in sorted(range(side), key=lambda c: (-shares[c], c))[:count]:
                result[head, row, column] = True
    return result


@given(
    st.integers(1, 12), st.integers(1, 3), st.integers(1, 5), st.integers(1, 7), st.integers(1, 2), st.integers(0, 99)
)
def test_texts_are_stretched_token_by_token(length, ratio, size, new_size, heads, seed):
    layout = random_layout(heads, length, size, 0.4, seed)
    scaled = scale_layout(layout, length, ratio * length, block_size=new_size)
    assert scaled.block_size == new_size
    assert torch.equal(scaled.mask, definition(layout, length, ratio * length, new_size, False))


@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 7), st.integers(1, 2), st.integers(0, 99)
)
def test_pictures_are_stretched_pixel_by_pixel(edge, ratio, size, new_size, heads, seed):
    layout = random_layout(heads, edge**2, size, 0.4, seed)
    new_length = (ratio * edge) ** 2
    scaled = scale_layout(layout, edge**2, new_length, block_size=new_size, pictures=True)
    assert torch.equal(scaled.mask, definition(layout, edge**2, new_length, new_size, True))


@pytest.mark.parametrize(("edge", "size", "new_edge", "new_size"), [(16, 16, 32, 32), (32, 32, 128, 64), (8, 8, 16, 8)])
def test_where_blocks_map_onto_blocks_the_density_stays(edge, size, new_edge, new_size):
    """Rows or halves of rows of a picture, as in the configs."""
    layout = random_layout(2, edge**2, size, 0.1)
    scaled = scale_layout(layout, edge**2, new_edge**2, block_size=new_size, pictures=True)
    assert scaled.density == layout.density
    ratio, a_row = new_edge // edge, new_edge // new_size
    source = torch.arange(new_edge**2 // new_size) // a_row // ratio  # its row of pixels
    assert torch.equal(scaled.mask, layout.mask[:, source][:, :, source])


def test_larger_blocks_keep_about_the_density_and_no_row_is_lost():
    layout = random_layout(1, 4096, 16, 0.2)
    scaled = scale_layout(layout, 4096, 8192, block_size=96)
    assert scaled.density == pytest.approx(layout.density, rel=0.05)
    lonely = BlockLayout(torch.eye(64, dtype=torch.bool), 1)
    assert scale_layout(lonely, 64, 64, block_size=16).mask.sum(2).tolist() == [[1] * 4]
    half = lonely.mask
    half[0, :32] = False
    assert scale_layout(BlockLayout(half, 1), 64, 64, block_size=16).mask.sum(2).tolist() == [[0, 0, 1, 1]]


def test_the_same_length_and_block_size_change_nothing():
    layout = random_layout(3, 100, 8, 0.3)
    assert scale_layout(layout, 100, 100) == layout
    assert scale_layout(layout, 100, 100, pictures=True) == layout


def test_a_window_stays_a_window():
    window = SlidingWindow(1, 16, num_sliding_window_blocks=3, attention="bidirectional")
    far = scale_layout(window.layout(256), 256, 1024).mask[0].nonzero().diff(dim=1).abs().max()
    assert far == 7  # of 16 to 7 blocks: from the first block of one group of four to the last of the next


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ((64, 96), {}, "96 tokens are no whole multiple of 64, .* such as 128"),
        ((64, 32), {}, "32 tokens are no whole multiple of 64, .* such as 64"),
        ((64, 144), {"pictures": True}, "pictures of 12 x 12 pixels are no whole multiple of 8 x 8, .* such as 16"),
        ((64, 128), {"pictures": True}, "128 tokens are not the pixels of a square picture"),
        ((60, 240), {"pictures": True}, "60 tokens are not the pixels of a square picture"),
        ((80, 160), {}, "a layout of 8 x 8 blocks of 8 is not one of 80 queries and keys; give the length"),
        ((64, 128), {"block_size": 0}, "block_size must be at least 1, got 0"),
        ((64, 0), {}, "sequences have at least 1 token, got 0"),
    ],
)
def test_what_cannot_be_stretched_is_refused(lengths, options, message):
    with pytest.raises(ValueError, match=message):
        scale_layout(random_layout(1, 64, 8, 0.5), *lengths, **options)


def test_what_is_no_layout_and_no_integer_is_refused():
    with pytest.raises(TypeError, match="layout must be a BlockLayout, got SlidingWindow; make one for a length"):
        scale_layout(SlidingWindow(1, 16), 64, 128)
    with pytest.raises(TypeError, match=r"block_size must be an integer, got 8\.0"):
        scale_layout(random_layout(1, 64, 8, 0.5), 64, 128, block_size=8.0)


def test_positions_between_known_ones_lie_between():
    """Centres of new pixels lie a quarter and three quarters between old ones; beyond the outer ones all is alike."""
    table = torch.tensor([0.0, 4.0, 8.0])[:, None]
    grids = position_grids(3, 6, pictures=False)
    assert interpolate_positions(table, *grids)[:, 0].tolist() == [0, 1, 3, 5, 7, 8]
    rows, columns = torch.arange(4.0)[:, None].expand(4, 4), torch.arange(4.0).expand(4, 4)
    pixels = torch.stack([rows.flatten(), 10 * columns.flatten()], 1)
    finer = interpolate_positions(pixels, *position_grids(16, 64, pictures=True)).unflatten(0, (8, 8))
    known = [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    assert finer[:, 5, 0].tolist() == known
    assert finer[5, :, 1].tolist() == [10 * x for x in known]


def test_positions_keep_their_dtype_and_their_values_where_nothing_is_stretched():
    table = torch.randn(12, 3)
    assert torch.equal(interpolate_positions(table, (1, 12), (1, 12)), table)
    assert interpolate_positions(table.bfloat16(), (3, 4), (6, 8)).dtype == torch.bfloat16
