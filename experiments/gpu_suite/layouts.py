"""Layouts to measure with: what learned ones look like, and what makes kernels stumble. The same seed, the same layout
(on one kind of device)."""

from __future__ import annotations

import torch
from torch import Tensor

from sat.layout import BlockLayout


def learned_like(
    blocks: int, density: float, heads: int, size: int, device: str, seed: int = 0, per_row: int | None = None
) -> BlockLayout:
    """The diagonal, a few verticals, and scattered blocks, each head its own.

    Args:
        blocks: block rows, and columns.
        density: share of the blocks to keep; the diagonal is kept in any case.
        heads: number of heads.
        size: edge of a block, in tokens.
        device: where the layout is made.
        seed: of the generator.
        per_row: keep as many blocks as so many a row would be, instead of ``density``.
    """
    generator = torch.Generator(device).manual_seed(seed)
    count = blocks * per_row if per_row else round(blocks * blocks * density)
    count = min(max(count, blocks), blocks * blocks)
    in_verticals = int(0.4 * (count - blocks))
    verticals = min(4, blocks, 1 + in_verticals // blocks)
    mask = torch.zeros(heads, blocks, blocks, dtype=torch.bool, device=device)
    for head in range(heads):
        scores = torch.rand(blocks, blocks, generator=generator, device=device)
        columns = torch.randperm(blocks, generator=generator, device=device)[:verticals]
        candidates = torch.zeros_like(scores)
        candidates[:, columns] = scores[:, columns]
        chosen = candidates.view(-1).topk(min(in_verticals, verticals * blocks)).indices
        scores.view(-1)[chosen] += 1
        scores.fill_diagonal_(3)
        mask[head].view(-1)[scores.view(-1).topk(count).indices] = True
    return BlockLayout(mask, size)


def uneven(blocks: int, heads: int, size: int, device: str, *, empty: bool, heavy: bool, seed: int = 0) -> BlockLayout:
    """A learned-like layout with a full row and a full column, or with rows and columns without any block."""
    mask = learned_like(blocks, 0.15, heads, size, device, seed).mask.clone()
    if heavy:
        mask[:, 0] = True
        mask[:, :, blocks // 2] = True
    if empty:
        mask[:, 1::4] = False
        mask[:, :, blocks - 1] = False
    return BlockLayout(mask, size)


def element_mask(layout: BlockLayout, length: int) -> Tensor:
    """Token by token, bool ``[H, L, L]``; written apart from SAT's own, to check it against."""
    mask = layout.mask.repeat_interleave(layout.block_size, 1).repeat_interleave(layout.block_size, 2)
    return mask[:, :length, :length]
