"""Floor 3: sines of positions, which learned positions may begin as."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sine_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Sines and cosines of each position, of wavelengths from 2 pi positions to twice the grid's edge times that.

    From the start nearby positions are alike, and what lies at a distance is a rotation away: of random positions all
    that has to be learned, pair by pair.

    Args:
        grid: ``(rows, columns)`` of the positions, row by row; a sequence is one row.
        width: features of a position; of pictures half tell the row, half the column.

    Returns:
        float32 ``[rows * columns, width]``, of mean square 1/2.

    Raises:
        ValueError: the width is no multiple of 2 (of pictures: 4).

    Source: Vaswani et al., "Attention Is All You Need", 2017; for pictures as in He et al., "Masked Autoencoders Are
    Scalable Vision Learners", 2022.
    """
    rows, columns = grid
    edges = [(rows, torch.arange(rows * columns) // columns)] if rows > 1 else []
    edges.append((columns, torch.arange(rows * columns) % columns))
    each, rest = divmod(width, 2 * len(edges))
    if rest or not each:
        raise ValueError(
            f"width {width} cannot hold sines and cosines of {len(edges)} coordinate{'s' * (len(edges) > 1)}; make it "
            f"a multiple of {2 * len(edges)}, or positions random"
        )
    parts = []
    for edge, place in edges:
        angles = place[:, None] * torch.exp(-torch.arange(each) / each * math.log(2 * edge))
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, 1)
