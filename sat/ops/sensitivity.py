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
# Of a missing key's weight, which then outweighs the kept ones by far, but not what float32 can hold.
LARGEST_EXPONENT = 80.0


@torch.library.custom_op("sat::block_sensitivity", mutates_args=())
@without_autocast
def block_sensitivity(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    block_size: int,
    layout_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """See :func:`sat.ops.block_sensitivity`; some query rows at a time. The mask is ``[H, M, N]``."""
    batch, heads, query_length, _ = query.shape
    key_length = key.shape[2]
    compute = torch.promote_types(query.dtype, torch.float32)
    keys, values = (x.to(compute).transpose(2, 3) for x in (key, value))
    columns = -(-key_length // block_size)
    tail = columns * block_size - key_length
    parts = []

    def by_blocks(x: Tensor) -> Tensor:
        """``[..., S]`` to sums ``[..., N]``."""
        return F.pad(x, (0, tail)).unflatten(-1, (columns, -1)).sum(-1)

    # Whole block rows at a time, so that each is summed at once; some samples at a time where a row of all is too much.
    samples = max(1, min(batch, CHUNK_ELEMENTS // (heads * key_length * block_size)))
    step = max(1, CHUNK_ELEMENTS // (samples * heads * key_length * block_size)) * block_size
    for start in range(0, query_length, step):
        rows = slice(start, min(start + step, query_length))
        future = None
        if is_causal:
            positions = torch.arange(rows.start, rows.stop, device=query.device)
            future = torch.arange(key_length, device=query.device) > positions[:, None]
        kept = None
        if layout_mask is not None:
            kept = layout_mask[:, start // block_size : -(-rows.stop // block_size)]
            kept = kept.repeat_interleave(block_size, 1)[:, : rows.stop - rows.start]
        total: Tensor | None = None
        for begin in range(0, batch, samples):
            group = slice(begin, begin + samples)
            scores = (query[group, :, rows].to(compute) * scale) @ keys[group]
            if key_padding_mask is not None:
                scores.masked_fill_(~key_padding_mask[group, None, None, :], -math.inf)
            if future is not None:
                scores.masked_fill_(future, -math.inf)
            weights, base = _weights(scores, kept, block_size)
            del scores  # the weights are in its place
            gains = by_blocks((grad[group, :, rows].to(compute) @ values[group]).mul_(weights))
            shares = by_blocks(weights)
            del weights
            kept_gains, kept_shares = (gains, shares) if kept is None else (gains * kept, shares * kept)
            # The gradient times the attention's output, and what it would be without each kept block: the mean over
            # the others, from their own sums, since a difference of nearly equal numbers would be rounding.
            output = kept_gains.sum(3, keepdim=True)
            effects = output - _divided(_others(kept_gains), _others(kept_shares))
            if kept is not None:
                effects = torch.where(kept, effects, _divided(gains - shares * output, base + shares))
            effects.masked_fill_(shares == 0, 0)  # padding, the future: no rounding in the place of nothing
            effects = F.pad(effects, (0, 0, 0, -effects.shape[2] % block_size))
            squares = effects.unflatten(2, (-1, block_size)).sum(3).square().sum(0)
            total = squares if total is None else total.add_(squares)
        assert total is not None
        parts.append((total / batch).float())
    return torch.cat(parts, 1)


def _weights(scores: Tensor, kept: Tensor | None, block_size: int) -> tuple[Tensor, Tensor]:
    """``exp(scores)`` over its sum over the kept keys, and what that sum has become: 1, or 0 where no key is kept.

    The weights of missing keys may exceed 1. Where none is kept they are over the sum of all; without any key, 0.
    """
    norm = scores.logsumexp(3, keepdim=True)
    base = torch.ones_like(norm)
    if kept is not None:
        keys = kept.repeat_interleave(block_size, 2)[..., : scores.shape[3]]
        of_kept = scores.masked_fill(~keys, -math.inf).logsumexp(3, keepdim=True)
        base.masked_fill_(of_kept == -math.inf, 0)
        norm = torch.where(of_kept == -math.inf, norm, of_kept)
    nothing = norm == -math.inf
    weights = scores.sub_(norm.masked_fill(nothing, 0)).clamp_(max=LARGEST_EXPONENT).exp_()
    return weights.masked_fill_(nothing, 0), base


def _others(x: Tensor) -> Tensor:
    """The sum of all others along the last dimension: of those before and of those behind."""
    before = F.pad(x, (1, -1)).cumsum(-1)
    return before + F.pad(x.flip(-1), (1, -1)).cumsum(-1).flip(-1)


def _divided(x: Tensor, by: Tensor) -> Tensor:
    """``x / by``, and 0 where ``by`` is 0."""
    return torch.where(by > 0, x / by.masked_fill(by == 0, 1), 0)


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
    layout_mask: Tensor | None,
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
    _, gate, query, key, value, ctx.size, layout, padding, ctx.causal, ctx.scale = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(query, key, value, layout, padding)
    ctx.grid = gate.shape  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, layout, padding = ctx.saved_tensors  # type: ignore[attr-defined]
    options = ctx.size, layout, padding, ctx.causal, ctx.scale  # type: ignore[attr-defined]
    found = block_sensitivity(query, key, value, grad[: len(query)], *options)
    rows, columns = ctx.grid[1:]  # type: ignore[attr-defined]
    return grad, F.pad(found, (0, columns - found.shape[2], 0, rows - found.shape[1])), *[None] * 8


watch_blocks.register_autograd(_backward, setup_context=_setup_context)
