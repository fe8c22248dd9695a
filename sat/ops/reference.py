"""Floor 1: the specification. Dense, masked, a few lines each; the oracle of every test, on any device.

Everything here holds ``[B, H, L, S]`` in memory. Shapes: B batch, H heads, L queries, S keys, D head dimension,
b block size, M x N blocks, nnz kept blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sat.layout import BlockLayout
from sat.ops import moments
from sat.ops.autocast import without_autocast
from sat.ops.types import AttentionStatistics


def allowed_mask(
    batch: int,
    query_length: int,
    key_length: int,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    device: torch.device,
) -> Tensor:
    """Bool ``[B, 1, L, S]``: what padding and causality permit, whatever the layout says."""
    allowed = torch.ones(batch, 1, query_length, key_length, dtype=torch.bool, device=device)
    if is_causal:
        allowed = allowed.tril()
    if key_padding_mask is not None:
        allowed = allowed & key_padding_mask[:, None, None, :]
    return allowed


def masked_softmax(scores: Tensor, kept: Tensor, pruned_count: Tensor | None) -> Tensor:
    """Softmax over the kept entries; rows without any are 0.

    ``pruned_count`` ``[..., L, 1]`` adds so many logits of 0 to each row's denominator (the paper's softmax).
    """
    scores = scores.masked_fill(~kept, -torch.inf)
    pivot = scores.detach().amax(-1, keepdim=True)
    if pruned_count is not None:
        pivot = torch.where(pruned_count > 0, pivot.clamp(min=0), pivot)
    pivot = pivot.masked_fill(pivot == -torch.inf, 0)
    weights = torch.exp(scores - pivot)
    total = weights.sum(-1, keepdim=True)
    if pruned_count is not None:
        total = total + pruned_count * torch.exp(-pivot.clamp(min=0))
    return weights / total.masked_fill(total == 0, 1)


def attention_weights(
    query: Tensor,
    key: Tensor,
    layout: BlockLayout | None,
    *,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float,
    pruned: str = "drop",
) -> Tensor:
    """Attention weights ``[B, H, L, S]`` in at least float32; ``layout=None`` is dense attention."""
    compute = torch.promote_types(query.dtype, torch.float32)
    batch, _, query_length, _ = query.shape
    key_length = key.shape[2]
    scores = (query.to(compute) @ key.to(compute).transpose(2, 3)) * scale
    if attn_bias is not None:
        scores = scores + attn_bias.to(compute)
    allowed = allowed_mask(batch, query_length, key_length, key_padding_mask, is_causal, query.device)
    kept = allowed if layout is None else allowed & layout.element_mask(query_length, key_length)
    pruned_count = None
    if pruned == "zero":
        pruned_count = (allowed & ~kept).sum(-1, keepdim=True)
    weights = masked_softmax(scores, kept, pruned_count)
    if query_padding_mask is not None:
        weights = weights * query_padding_mask[:, None, :, None]
    return weights


@without_autocast
def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, *, dropout_p: float = 0.0, **options: object
) -> Tensor:
    """Block-sparse attention by dense masking, see :func:`sat.ops.block_sparse_attention`."""
    weights = F.dropout(attention_weights(query, key, layout, **options), dropout_p)  # type: ignore[arg-type]
    return (weights @ value.to(weights.dtype)).to(value.dtype)


def to_blocks(dense: Tensor, layout: BlockLayout, fill: float = 0.0) -> Tensor:
    """Kept blocks ``[B, nnz, b, b]`` of ``[B, H, L, S]``; positions past the end hold ``fill``."""
    (rows, columns), size = layout.shape, layout.block_size
    padded = F.pad(dense, (0, columns * size - dense.shape[3], 0, rows * size - dense.shape[2]), value=fill)
    blocks = padded.unflatten(3, (columns, size)).unflatten(2, (rows, size)).transpose(3, 4)
    return blocks[:, layout.mask.expand(dense.shape[1], -1, -1)]


def from_blocks(values: Tensor, layout: BlockLayout, num_heads: int, query_length: int, key_length: int) -> Tensor:
    """The dense ``[B, H, L, S]`` of kept blocks ``[B, nnz, b, b]``, 0 elsewhere."""
    (rows, columns), size = layout.shape, layout.block_size
    blocks = values.new_zeros(values.shape[0], num_heads, rows, columns, size, size)
    blocks[:, layout.mask.expand(num_heads, -1, -1)] = values
    return blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, :query_length, :key_length]


@without_autocast
def sddmm(query: Tensor, key: Tensor, layout: BlockLayout, fill: float) -> Tensor:
    """Kept blocks of ``query @ key^T``, see :func:`sat.ops.sddmm`."""
    return to_blocks(query @ key.transpose(2, 3), layout, fill=fill)


@without_autocast
def spmm(weights: Tensor, value: Tensor, layout: BlockLayout, *, transpose: bool, output_length: int) -> Tensor:
    """Block-sparse times dense, see :func:`sat.ops.spmm`."""
    heads, length = value.shape[1], value.shape[2]
    if transpose:
        return from_blocks(weights, layout, heads, length, output_length).transpose(2, 3) @ value
    return from_blocks(weights, layout, heads, output_length, length) @ value


@without_autocast
def sparse_softmax(
    scores: Tensor,
    layout: BlockLayout,
    *,
    num_heads: int,
    query_length: int,
    key_length: int,
    scale: float,
    attn_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    pruned: str,
) -> Tensor:
    """Softmax over the kept blocks of each row, see :func:`sat.ops.sparse_softmax`."""
    compute = torch.promote_types(scores.dtype, torch.float32)
    dense = from_blocks(scores.to(compute), layout, num_heads, query_length, key_length) * scale
    if attn_bias is not None:
        dense = dense + attn_bias.to(compute)
    allowed = allowed_mask(scores.shape[0], query_length, key_length, key_padding_mask, is_causal, scores.device)
    kept = allowed & layout.element_mask(query_length, key_length)
    pruned_count = (allowed & ~kept).sum(-1, keepdim=True) if pruned == "zero" else None
    return to_blocks(masked_softmax(dense, kept, pruned_count), layout).to(scores.dtype)


@without_autocast
def attention_statistics(
    query: Tensor,
    key: Tensor,
    block_size: int,
    *,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float,
    score_matrix: bool = False,
) -> AttentionStatistics:
    """Statistics from the explicit weights, see :func:`sat.ops.attention_statistics`."""
    weights = attention_weights(
        query,
        key,
        None,
        key_padding_mask=key_padding_mask,
        query_padding_mask=query_padding_mask,
        is_causal=is_causal,
        scale=scale,
    )
    per_head = weights.mean(0)
    matrix = per_head.mean(0)
    query_length, key_length = matrix.shape
    rows, columns = -(-query_length // block_size), -(-key_length // block_size)
    padding = (0, columns * block_size - key_length, 0, rows * block_size - query_length)

    def block_sums(x: Tensor) -> Tensor:
        return F.pad(x, padding).unflatten(-1, (columns, -1)).unflatten(-3, (rows, -1)).sum((-3, -1))

    pooled = block_sums(per_head) / block_sums(torch.ones_like(matrix))
    return AttentionStatistics(
        pooled.float(), moments.skewness(matrix).float(), matrix.float() if score_matrix else None
    )


@without_autocast
def block_sensitivity(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    block_size: int,
    *,
    layout: BlockLayout | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float,
) -> Tensor:
    """One block after the other is left out or taken in, see :func:`sat.ops.block_sensitivity`."""
    heads, length = query.shape[1:3]
    rows, columns = -(-length // block_size), -(-key.shape[2] // block_size)
    if layout is None:
        layout = BlockLayout(torch.ones(heads, rows, columns, dtype=torch.bool, device=query.device), block_size)
    mask = layout.mask.expand(heads, -1, -1)
    options: dict[str, Any] = {"key_padding_mask": key_padding_mask, "is_causal": is_causal, "scale": scale}

    def loss(kept: Tensor, row: slice) -> Tensor:
        """To first order in the output, ``[B, H]``: the output's part of a block row by its gradient."""
        weights = attention_weights(query, key, BlockLayout(kept, block_size), **options)[:, :, row]
        return ((weights @ value.to(weights.dtype)) * grad[:, :, row].to(weights.dtype)).sum((2, 3))

    found = torch.zeros(heads, rows, columns, dtype=torch.promote_types(query.dtype, torch.float32))
    for i in range(rows):
        row = slice(i * block_size, min((i + 1) * block_size, length))
        before = loss(mask, row)
        for j in range(columns):
            other = mask.clone()
            other[:, i, j] = ~other[:, i, j]
            found[:, i, j] = (loss(other, row) - before).square().mean(0)
    return found
