"""Floor 1: how far information travels through layers of block-sparse attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from sat.layout import BlockLayout, check_is_layout


class Reach(NamedTuple):
    """Which blocks of positions know of which, after each layer.

    Attributes:
        maps: after each layer bool ``[M, M]``: True where every token of the column's block has had a way to every
            token of the row's.
        shares: after each layer, the share of the pairs of blocks that are reached, 0 to 1; of causal layouts, of the
            pairs in which the key does not come after the query.
        complete: how many layers it takes until any token has reached any other; None if all of them do not suffice.
        causal: whether the layouts keep blocks below the diagonal and none above it, so that nothing can travel there.
            Dense layers between them are then taken for causal, too.
    """

    maps: list[Tensor]
    shares: list[float]
    complete: int | None
    causal: bool


def reach(layouts: Sequence[BlockLayout | None]) -> Reach:
    """Follow the ways that information can take from layer to layer.

    In a layer, a token knows afterwards what it knew (the residual connection) and what the tokens of its row's kept
    blocks knew, in any of the heads. A block that is only ever passed on by the residual connection does not count as
    reached by itself: each of its tokens knows itself, but not the others.

    Args:
        layouts: one a layer, from the input to the output, all of the same square shape; None: a dense layer.

    Raises:
        TypeError: one of them is no layout.
        ValueError: there is no layout, or they are not square, or of different shapes or block sizes.
    """
    if isinstance(layouts, BlockLayout):
        raise TypeError("layouts must be a list with a layout for each layer, got a single BlockLayout")
    for place, layout in enumerate(layouts):
        if layout is not None:
            check_is_layout(f"layouts[{place}]", layout)
    sizes = {layout.block_size for layout in layouts if layout is not None}
    if len(sizes) > 1:
        given = " and ".join(map(str, sorted(sizes)))
        raise ValueError(f"connectivity follows blocks of one size from layer to layer, got blocks of {given} tokens")
    shapes = {layout.shape for layout in layouts if layout is not None}
    if len(shapes) != 1:
        given = "none" if not shapes else " and ".join(f"{rows} x {columns}" for rows, columns in sorted(shapes))
        raise ValueError(f"connectivity follows layouts of one shape from layer to layer, got {given}")
    ((rows, columns),) = shapes
    if rows != columns:
        raise ValueError(
            f"connectivity needs queries and keys to be the same tokens, but the layouts have {rows} x {columns} blocks"
        )
    unions = [None if layout is None else layout.mask.any(0).cpu().numpy() for layout in layouts]
    sparse = [union for union in unions if union is not None]
    causal = not any(np.triu(union, 1).any() for union in sparse) and any(np.tril(union, -1).any() for union in sparse)
    pairs = rows * (rows + 1) // 2 if causal else rows * rows
    known = np.zeros((rows, rows), dtype=bool)
    maps, shares = [], []
    for union in unions:
        if union is None:
            known = np.tri(rows, dtype=bool) if causal else np.ones_like(known)
        elif known.sum() < pairs:
            # Sparse times dense: what is known fills up within a few layers, what one layer adds is always sparse.
            step = scipy.sparse.csr_array(union.astype(np.float32)) @ known.astype(np.float32)
            known = known | union | (step > 0)
        maps.append(torch.from_numpy(known))
        shares.append(int(known.sum()) / pairs)
    complete = next((count for count, share in enumerate(shares, 1) if share == 1), None)
    return Reach(maps, shares, complete, causal)
