"""Floor 1: how much the loss depends on each block of the attention scores, measured in the backward pass.

Plain PyTorch on any device. Shapes: B batch, n observed samples, H heads, L queries, S keys, D head dimension, b block
size, M x N blocks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sat.ops.autocast import without_autocast

# Elements of a temporary that are computed at a time.
CHUNK_ELEMENTS = 2**22


@torch.library.custom_op("sat::block_sensitivity", mutates_args=())
@without_autocast
def block_sensitivity(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    block_size: int,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """See :func:`sat.ops.block_sensitivity`; some query rows at a time."""
    batch, heads, query_length, _ = query.shape
    key_length = key.shape[2]
    compute = torch.promote_types(query.dtype, torch.float32)
    keys, values = (x.to(compute).transpose(2, 3) for x in (key, value))
    columns = -(-key_length // block_size)
    tail = columns * block_size - key_length
    parts = []
    # Whole block rows at a time, so that each is summed at once.
    step = max(1, CHUNK_ELEMENTS // (batch * heads * key_length * block_size)) * block_size
    for start in range(0, query_length, step):
        rows = slice(start, min(start + step, query_length))
        scores = (query[:, :, rows].to(compute) * scale) @ keys
        if key_padding_mask is not None:
            scores.masked_fill_(~key_padding_mask[:, None, None, :], -math.inf)
        if is_causal:
            positions = torch.arange(rows.start, rows.stop, device=query.device)
            future = torch.arange(key_length, device=query.device) > positions[:, None]
            scores.masked_fill_(future, -math.inf)
        weights = torch.softmax(scores, 3)
        if key_padding_mask is not None:  # rows without a single key: 0, not 0 / 0
            weights.masked_fill_((scores == -math.inf).all(3, keepdim=True), 0)
        d_weights = grad[:, :, rows].to(compute) @ values
        d_weights -= (weights * d_weights).sum(3, keepdim=True)
        d_scores = weights.mul_(d_weights)
        blocks = F.pad(d_scores, (0, tail, 0, -d_scores.shape[2] % block_size))
        sums = blocks.unflatten(3, (columns, -1)).unflatten(2, (-1, block_size)).sum((3, 5))
        parts.append(sums.square().mean(0).float())
    return torch.cat(parts, 1)


@block_sensitivity.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, grad: Tensor, block_size: int, *args: object) -> Tensor:
    blocks = [(length + block_size - 1) // block_size for length in (query.shape[2], key.shape[2])]
    return query.new_empty(query.shape[1], *blocks, dtype=torch.float32)


@torch.library.custom_op("sat::watch_blocks", mutates_args=())
def watch_blocks(
    context: Tensor,
    gate: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """See :func:`sat.ops.watch_blocks`."""
    return context.clone()


@watch_blocks.register_fake
def _(context: Tensor, *args: object) -> Tensor:
    return torch.empty_like(context)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    _, gate, query, key, value, ctx.size, padding, ctx.causal, ctx.scale = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(query, key, value, padding)
    ctx.grid = gate.shape  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, padding = ctx.saved_tensors  # type: ignore[attr-defined]
    options = ctx.size, padding, ctx.causal, ctx.scale  # type: ignore[attr-defined]
    found = block_sensitivity(query, key, value, grad[: len(query)], *options)
    rows, columns = ctx.grid[1:]  # type: ignore[attr-defined]
    return grad, F.pad(found, (0, columns - found.shape[2], 0, rows - found.shape[1])), *[None] * 7


watch_blocks.register_autograd(_backward, setup_context=_setup_context)
