"""Floor 1: softmax over the kept blocks of each row in Triton, on block values.

One program has some rows of one block row. It passes over their blocks twice: for the largest score and the sum, and
to write. Padding, causality and bias are read where they are needed, never spread out over the blocks. Names and shapes
are those of :mod:`sat.ops.triton.sddmm`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sat.layout import BlockLayout
from sat.ops.autocast import without_autocast
from sat.ops.triton.index import TileIndex
from sat.ops.triton.launch import launch
from sat.ops.triton.masking import bias_tiles, bias_user, count_users, ends, real_bytes, store_bias_gradient
from sat.ops.triton.parameters import tile
from sat.ops.triton.sddmm import block_number, numbered, value_addresses, value_index, values_along
from sat.ops.triton.tiles import broadcast, listed, real_tokens, step_along, strided

# Edge of a tile of the bias gradient.
BIAS_TILE = 32


@triton.jit
def _find_row(lists, numbers, heads, PIECES: tl.constexpr):
    """What this program computes: its sample, head and tile of rows, and the list of its block row."""
    entries, counts, _, _, groups, longest, _, head_stride = lists
    program = tl.program_id(0)
    pair = (program // (groups * PIECES)).to(tl.int64)
    tile = program % (groups * PIECES)
    sample, head = pair // heads, pair % heads
    row = head * head_stride * groups + tile // PIECES
    first = block_number(numbers, head, tile // PIECES, 0)
    return sample, head, pair, tile, entries + row * longest, tl.load(counts + row), first


@triton.jit
def _load_bias(bias, sample, head, query, key, exists):
    """Bias ``[len(query), len(key)]``, 0 where it does not exist."""
    rows = query.to(tl.int64)[:, None] * bias[3]
    address = bias[0] + sample * bias[1] + head * bias[2] + rows + key.to(tl.int64)[None, :] * bias[4]
    return tl.load(address, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _step_logits(
    scores,
    bias,
    key_mask,
    sample,
    head,
    query,
    exists,
    entry_list,
    count,
    first,
    step,
    key_length,
    scale,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Logits ``[ROWS, COLUMNS]`` of one step, -inf where not permitted, and where they are permitted."""
    key, _bits, valid = step_along(entry_list, 0, count, step, BLOCK, COLUMNS)
    number, column = values_along(first, 0, step, BLOCK, COLUMNS)
    address = value_addresses(scores, sample, number, query % BLOCK, column)
    # Masked by what exists only: with a mask of single keys it would be read number by number.
    s = tl.load(address, mask=valid[None, :], other=0.0).to(tl.float32) * scale
    inside = valid & (key < key_length)
    if KEY_MASK:
        inside = real_tokens(key_mask, sample, key, inside, key_length)
    keep = exists[:, None] & inside[None, :]
    if BIAS:
        s += _load_bias(bias, sample, head, query, key, keep)
    if CAUSAL:
        keep = keep & (key[None, :] <= query[:, None])
    return tl.where(keep, s, -float("inf")), keep


@triton.jit
def _softmax_kernel(
    scores,
    out,
    bias,
    key_mask,
    seen,
    numbers,
    lists,
    heads,
    query_length,
    key_length,
    scale,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    COUNT_PRUNED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Weights of one tile of rows."""
    sample, head, _pair, tile, entry_list, count, first = _find_row(lists, numbers, heads, BLOCK // ROWS)
    query = tile * ROWS + tl.arange(0, ROWS)
    exists = query < query_length
    pivot = tl.full([ROWS], -float("inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    kept = tl.zeros([ROWS], tl.int32)
    steps = tl.cdiv(count * BLOCK, COLUMNS)
    for step in tl.range(0, steps, num_stages=STAGES):
        s, keep = _step_logits(
            scores,
            bias,
            key_mask,
            sample,
            head,
            query,
            exists,
            entry_list,
            count,
            first,
            step,
            key_length,
            scale,
            BLOCK,
            COLUMNS,
            BIAS,
            KEY_MASK,
            CAUSAL,
        )
        if COUNT_PRUNED:
            kept += tl.sum(keep.to(tl.int32), 1)
        highest = tl.maximum(pivot, tl.max(s, 1))
        # Rows that have not met a key yet need a finite pivot: inf - inf is NaN.
        finite = tl.where(highest == -float("inf"), 0.0, highest)
        norm = norm * tl.exp(pivot - finite) + tl.sum(tl.exp(s - finite[:, None]), 1)
        pivot = highest

    dead = norm == 0.0
    if COUNT_PRUNED:
        # Each permitted key outside the layout is one more logit of 0.
        last = tl.minimum(query, key_length - 1) if CAUSAL else query * 0 + (key_length - 1)
        permitted = tl.load(seen + sample * key_length + last) if KEY_MASK else last + 1
        pruned = (permitted - kept).to(tl.float32)
        highest = tl.where(pruned > 0, tl.maximum(pivot, 0.0), pivot)
        highest = tl.where(dead, 0.0, highest)
        norm = norm * tl.exp(pivot - highest) + pruned * tl.exp(-tl.maximum(highest, 0.0))
        pivot = highest
    pivot = tl.where(dead, 0.0, pivot)
    norm = tl.where(dead, 1.0, norm)

    for step in tl.range(0, steps, num_stages=STAGES):
        s, keep = _step_logits(
            scores,
            bias,
            key_mask,
            sample,
            head,
            query,
            exists,
            entry_list,
            count,
            first,
            step,
            key_length,
            scale,
            BLOCK,
            COLUMNS,
            BIAS,
            KEY_MASK,
            CAUSAL,
        )
        p = tl.where(keep, tl.exp(s - pivot[:, None]) / norm[:, None], 0.0)
        number, column = values_along(first, 0, step, BLOCK, COLUMNS)
        address = value_addresses(out, sample, number, query % BLOCK, column)
        tl.store(address, p.to(out[0].dtype.element_ty), mask=(number < first + count)[None, :])


@triton.jit
def _softmax_gradient_kernel(
    weights,
    grad,
    d_scores,
    delta,
    numbers,
    lists,
    heads,
    query_length,
    scale,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``scale * p * (dp - delta)`` of one tile of rows, with ``delta = sum_j p_j dp_j`` of each row."""
    sample, _head, pair, tile, _entry_list, count, first = _find_row(lists, numbers, heads, BLOCK // ROWS)
    query = tile * ROWS + tl.arange(0, ROWS)
    row_delta = tl.zeros([ROWS], tl.float32)
    steps = tl.cdiv(count * BLOCK, COLUMNS)
    for step in tl.range(0, steps, num_stages=STAGES):
        number, column = values_along(first, 0, step, BLOCK, COLUMNS)
        valid = (number < first + count)[None, :]
        p = tl.load(value_addresses(weights, sample, number, query % BLOCK, column), mask=valid, other=0.0)
        dp = tl.load(value_addresses(grad, sample, number, query % BLOCK, column), mask=valid, other=0.0)
        row_delta += tl.sum(p.to(tl.float32) * dp.to(tl.float32), 1)
    tl.store(delta + pair * query_length + query, row_delta, mask=query < query_length)
    for step in tl.range(0, steps, num_stages=STAGES):
        number, column = values_along(first, 0, step, BLOCK, COLUMNS)
        valid = (number < first + count)[None, :]
        p = tl.load(value_addresses(weights, sample, number, query % BLOCK, column), mask=valid, other=0.0)
        dp = tl.load(value_addresses(grad, sample, number, query % BLOCK, column), mask=valid, other=0.0)
        ds = p.to(tl.float32) * (dp.to(tl.float32) - row_delta[:, None]) * scale
        address = value_addresses(d_scores, sample, number, query % BLOCK, column)
        tl.store(address, ds.to(d_scores[0].dtype.element_ty), mask=valid)


@triton.jit
def _bias_gradient_kernel(
    weights,
    grad,
    delta,
    d_bias,
    numbers,
    mask,
    heads,
    query_length,
    key_length,
    bias_heads,
    own_tiles,
    users,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    OVER_ROWS: tl.constexpr,
    OVER_COLUMNS: tl.constexpr,
):
    """One tile of the bias gradient: ``p * (dp - delta)``, added in order over all that uses it, see ``bias_user``."""
    lane = tl.arange(0, TILE)
    acc = tl.zeros([TILE, TILE], tl.float32)
    for work in range(0, count_users(users)):
        sample, head, row_tile, column_tile = bias_user(work, own_tiles, bias_heads, users)
        query, key = row_tile * TILE + lane, column_tile * TILE + lane
        row, column = row_tile * TILE // BLOCK, column_tile * TILE // BLOCK
        if tl.load(mask[0] + head * mask[1] + row.to(tl.int64) * mask[2] + column.to(tl.int64) * mask[3]) != 0:
            number = block_number(numbers, head, row, column) + tl.zeros([TILE], tl.int64)
            exists = query < query_length
            keep = exists[:, None] & (key < key_length)[None, :]
            p = tl.load(value_addresses(weights, sample, number, query % BLOCK, key % BLOCK)).to(tl.float32)
            dp = tl.load(value_addresses(grad, sample, number, query % BLOCK, key % BLOCK)).to(tl.float32)
            place = delta + (sample * heads + head) * query_length + query
            acc += tl.where(keep, p * (dp - tl.load(place, mask=exists, other=0.0)[:, None]), 0.0)
    store_bias_gradient(d_bias, acc, own_tiles, query_length, key_length, TILE, OVER_ROWS, OVER_COLUMNS)


@torch.library.custom_op("sat::sparse_softmax_triton", mutates_args=())
@without_autocast
def block_softmax(
    scores: Tensor,
    attn_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    mask: Tensor,
    index: list[Tensor],
    num_heads: int,
    query_length: int,
    key_length: int,
    scale: float,
    is_causal: bool,
    count_pruned: bool,
) -> Tensor:
    """Weights ``[B, nnz, b, b]``. ``mask`` is ``[H|1, M, N]`` and ``index`` that of ``value_index``.

    ``attn_bias`` is ``[B|1, H|1, L|1, S|1]``. ``count_pruned`` lets each permitted key outside the layout count as a
    logit of 0.
    """
    batch, nnz, block_size, _ = scores.shape
    out = torch.empty_like(scores, memory_format=torch.contiguous_format)
    rows = TileIndex(*index[1:5])
    shape = tile("softmax", block_size, block_size, scores.dtype, scores.device)
    tile_rows = min(shape.rows, block_size)
    key_mask = real_bytes(key_padding_mask)
    _, seen = ends(key_mask, count_pruned)
    launch(
        _softmax_kernel,
        batch * num_heads * rows.groups * (block_size // tile_rows),
        strided(scores),
        strided(out),
        broadcast(attn_bias),
        key_mask,
        seen,
        numbered(index[0], num_heads, nnz),
        listed(rows),
        num_heads,
        query_length,
        key_length,
        scale,
        BLOCK=block_size,
        ROWS=tile_rows,
        COLUMNS=shape.columns,
        BIAS=attn_bias is not None,
        KEY_MASK=key_mask is not None,
        CAUSAL=is_causal,
        COUNT_PRUNED=count_pruned,
        STAGES=shape.stages,
        num_warps=shape.warps,
    )
    return out


@block_softmax.register_fake
def _(scores: Tensor, *args: object) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


def _empty_gradients(grad: Tensor, bias_shape: list[int] | None) -> tuple[Tensor, Tensor]:
    d_scores = torch.empty_like(grad, memory_format=torch.contiguous_format)
    return d_scores, grad.new_empty([0] if bias_shape is None else bias_shape, dtype=torch.float32)


@torch.library.custom_op("sat::sparse_softmax_triton_backward", mutates_args=())
@without_autocast
def block_softmax_backward(
    grad: Tensor,
    weights: Tensor,
    mask: Tensor,
    index: list[Tensor],
    num_heads: int,
    query_length: int,
    key_length: int,
    scale: float,
    bias_shape: list[int] | None,
) -> tuple[Tensor, Tensor]:
    """Gradients to the scores and, in float32, to a bias of this shape (empty without one)."""
    batch, nnz, block_size, _ = grad.shape
    d_scores, d_bias = _empty_gradients(grad, bias_shape)
    delta = grad.new_empty(batch, num_heads, query_length, dtype=torch.float32)
    rows, numbers = TileIndex(*index[1:5]), numbered(index[0], num_heads, nnz)
    shape = tile("softmax", block_size, block_size, grad.dtype, grad.device)
    tile_rows = min(shape.rows, block_size)
    launch(
        _softmax_gradient_kernel,
        batch * num_heads * rows.groups * (block_size // tile_rows),
        strided(weights),
        strided(grad),
        strided(d_scores),
        delta,
        numbers,
        listed(rows),
        num_heads,
        query_length,
        scale,
        BLOCK=block_size,
        ROWS=tile_rows,
        COLUMNS=shape.columns,
        STAGES=shape.stages,
        num_warps=shape.warps,
    )
    if bias_shape is None:
        return d_scores, d_bias
    size = min(block_size, BIAS_TILE)
    lengths = (query_length, key_length)
    programs, own_tiles, users = bias_tiles(bias_shape, batch, num_heads, lengths, size)
    launch(
        _bias_gradient_kernel,
        programs,
        strided(weights),
        strided(grad),
        delta,
        d_bias,
        numbers,
        broadcast(mask.view(torch.uint8)),
        num_heads,
        query_length,
        key_length,
        bias_shape[1],
        own_tiles,
        users,
        BLOCK=block_size,
        TILE=size,
        OVER_ROWS=bias_shape[2] == 1,
        OVER_COLUMNS=bias_shape[3] == 1,
    )
    return d_scores, d_bias


@block_softmax_backward.register_fake
def _(
    grad: Tensor,
    weights: Tensor,
    mask: Tensor,
    index: list[Tensor],
    num_heads: int,
    query_length: int,
    key_length: int,
    scale: float,
    bias_shape: list[int] | None,
) -> tuple[Tensor, Tensor]:
    return _empty_gradients(grad, bias_shape)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    _, bias, _, mask, index, num_heads, query_length, key_length, scale, _, _ = inputs
    ctx.save_for_backward(output, mask, *index)
    ctx.numbers = (num_heads, query_length, key_length, scale)  # type: ignore[attr-defined]
    ctx.bias = None if bias is None else (list(bias.shape), bias.dtype)  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
    weights, mask, *index = ctx.saved_tensors  # type: ignore[attr-defined]
    bias_shape, bias_dtype = ctx.bias if ctx.needs_input_grad[1] else (None, None)  # type: ignore[attr-defined]
    numbers = ctx.numbers  # type: ignore[attr-defined]
    d_scores, d_bias = block_softmax_backward(grad, weights, mask, index, *numbers, bias_shape)
    d_bias = None if bias_shape is None else d_bias.to(bias_dtype)
    return d_scores, d_bias, None, None, [None] * len(index), *[None] * 6


block_softmax.register_autograd(_backward, setup_context=_setup_context)


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
    return block_softmax(
        scores,
        attn_bias,
        key_padding_mask,
        layout.mask,
        value_index(layout, scores.shape[0] * num_heads, columns=False),
        num_heads,
        query_length,
        key_length,
        scale,
        is_causal,
        pruned == "zero",
    )
