"""Floor 1: from short sequences to long ones: layouts and learned positions, stretched."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sat.layout import BlockLayout, check_int, check_is_layout

Grid = tuple[int, int]


def position_grids(length: int, new_length: int, *, pictures: bool) -> tuple[Grid, Grid]:
    """How the positions of a short and of a long sequence lie, in rows and columns.

    Args:
        length: of the short sequence, in tokens.
        new_length: of the long one; where they are equal, nothing is stretched.
        pictures: the tokens are the pixels of square pictures, row by row; otherwise a sequence is one row.

    Returns:
        ``(rows, columns)`` of the short one and of the long one, which has a whole multiple of both.

    Raises:
        ValueError: the long one is no such multiple, or a picture is not square.
    """
    for each in (length, new_length):
        if each < 1:
            raise ValueError(f"sequences have at least 1 token, got {each}")
    if not pictures:
        if new_length % length:
            raise ValueError(
                f"{new_length} tokens are no whole multiple of {length}, so the positions of the shorter sequence "
                f"cannot be stretched to them; take a multiple, such as {-(-new_length // length) * length}"
            )
        return (1, length), (1, new_length)
    edge, new_edge = math.isqrt(length), math.isqrt(new_length)
    if edge**2 != length or new_edge**2 != new_length:
        odd = length if edge**2 != length else new_length
        raise ValueError(f"{odd} tokens are not the pixels of a square picture; give such a number, such as {32**2}")
    if new_edge % edge:
        raise ValueError(
            f"pictures of {new_edge} x {new_edge} pixels are no whole multiple of {edge} x {edge}, so the positions of "
            f"the smaller ones cannot be stretched to them; take a multiple, such as {-(-new_edge // edge) * edge}"
        )
    return (edge, edge), (new_edge, new_edge)


def scale_layout(
    layout: BlockLayout, length: int, new_length: int, *, block_size: int | None = None, pictures: bool = False
) -> BlockLayout:
    """Carry a layout to longer sequences: each new token looks where the token that it was stretched from looked.

    Token ``t`` of the long sequence comes from token ``t // r`` of the short one, ``r`` times as short; the pixel
    ``(y, x)`` of a picture from ``(y // r, x // r)``. Through this map the short layout says of every pair of new
    tokens whether it is kept, and a new block has a share of kept pairs. Where blocks map onto single blocks, this
    share is 0 or 1 and is the new layout. Otherwise each row of blocks keeps as many as its shares add up to, rounded
    to the nearest number (halves up) but at least 1 if there is a share at all: those of the largest share, of equal
    ones the lower column. So the density stays about the same, and no row loses its last block.

    Args:
        layout: of ``length`` queries and keys, of any number of heads.
        length: in tokens.
        new_length: in tokens; a whole multiple, of pictures in both directions. The same length serves to change the
            block size.
        block_size: of the new layout, in tokens; that of ``layout`` when not given.
        pictures: the tokens are the pixels of square pictures, row by row.

    Returns:
        On the layout's device. A causal layout gets blocks above the diagonal where a block becomes several; what is
        future in them is hidden by ``is_causal``, as within any block.

    Raises:
        TypeError: it is no layout, or the block size no integer.
        ValueError: the layout is not of that length, or it cannot be stretched to the new one.
    """
    check_is_layout("layout", layout)
    size = layout.block_size if block_size is None else block_size
    check_int("block_size", size, 1)
    if not layout.fits(length, length):
        rows, columns = layout.shape
        raise ValueError(
            f"a layout of {rows} x {columns} blocks of {layout.block_size} is not one of {length} queries and keys; "
            f"give the length that it was learned at"
        )
    (_, columns), (new_rows, new_columns) = position_grids(length, new_length, pictures=pictures)
    ratio = new_columns // columns
    new = torch.arange(new_length, device=layout.device)
    row, column = new // new_columns, new % new_columns
    old = (row // ratio if new_rows > 1 else row) * columns + column // ratio

    # Tokens of each new block that come from each old one, [M', M]; whole numbers, so that equal shares are equal.
    blocks, new_blocks = layout.shape[0], -(-new_length // size)
    pairs = (new // size) * blocks + old // layout.block_size
    come_from = torch.bincount(pairs, minlength=new_blocks * blocks).view(new_blocks, blocks).double()
    tokens = come_from.sum(1)
    shares = come_from @ layout.mask.double() @ come_from.mT / (tokens[:, None] * tokens)

    # Rounding of the sum must not turn a half into less.
    budget = (shares.sum(2) + 0.5 + 1e-9).floor().clamp(min=1).minimum((shares > 0).sum(2))
    order = shares.argsort(dim=2, descending=True, stable=True)
    chosen = torch.arange(new_blocks, device=layout.device) < budget[..., None]
    return BlockLayout(torch.zeros_like(chosen).scatter_(2, order, chosen), size)


def interpolate_positions(table: Tensor, grid: Grid, new_grid: Grid, mode: str = "bilinear") -> Tensor:
    """Learned positions for a finer grid; of a single row, bilinear is linear.

    Args:
        table: ``[rows * columns, D]``, row by row.
        grid: ``(rows, columns)`` of the table.
        new_grid: those of the result.
        mode: of :func:`torch.nn.functional.interpolate`, ``bilinear`` or ``bicubic``.

    Returns:
        ``[new rows * new columns, D]``, in the table's dtype; half precisions are interpolated in float32.
    """
    picture = table.to(torch.promote_types(table.dtype, torch.float32)).unflatten(0, grid).permute(2, 0, 1)[None]
    finer = F.interpolate(picture, size=new_grid, mode=mode, align_corners=False)
    return finer[0].flatten(1).mT.to(table.dtype)
