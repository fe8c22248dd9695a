"""Floor 1: softmax over the kept blocks of each row in Triton, on block values.

One program has some rows of one block row. It passes over their blocks twice: for the largest score and the sum, and
to write. Of a long row it has a segment, whose sums another kernel has left beside those of the row's other segments.
Blocks that hold nothing but padding or the future are not read, only written. Padding, causality and bias are read
where they are needed, never spread out over the blocks. Names and shapes are those of :mod:`sat.ops.triton.sddmm`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sat.layout import BlockLayout
from sat.ops.autocast import without_autocast
from sat.ops.triton.index import TileIndex
from sat.ops.triton.launch import jit_kernel, launch
from sat.ops.triton.masking import ends, real_bytes
from sat.ops.triton.parameters import tile
from sat.ops.triton.sddmm import block_number, numbered, value_addresses, value_index, values_along, write_zeros
from sat.ops.triton.softmax_backward import block_softmax_backward, empty_row_partial
from sat.ops.triton.tiles import (
    broadcast,
    find_item,
    item_count,
    listed,
    load_entry,
    narrow_keys,
    real_tokens,
    segments_of,
    step_along,
    strided,
)


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
    first,
    start,
    stop,
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
    entry = load_entry(entry_list, start, stop, step, BLOCK, COLUMNS)
    key, _bits, valid = step_along(entry, start, stop, step, BLOCK, COLUMNS)
    number, column = values_along(first, start, step, BLOCK, COLUMNS)
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
def _row_sums(
    scores,
    bias,
    key_mask,
    sample,
    head,
    query,
    exists,
    entry_list,
    first,
    start,
    stop,
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
    """Of each row ``[ROWS]`` over a part of its list: largest logit, sum of exponentials below it, permitted keys."""
    pivot = tl.full([ROWS], -float("inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    kept = tl.zeros([ROWS], tl.int32)
    for step in tl.range(0, tl.cdiv((stop - start) * BLOCK, COLUMNS), num_stages=STAGES):
        s, keep = _step_logits(
            scores,
            bias,
            key_mask,
            sample,
            head,
            query,
            exists,
            entry_list,
            first,
            start,
            stop,
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
    return pivot, norm, kept


@jit_kernel
def _segment_sums_kernel(
    scores,
    partial,
    bias,
    key_mask,
    key_ends,
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
    """Sums of one segment of a cut list, for some rows."""
    PIECES: tl.constexpr = BLOCK // ROWS
    alive, sample, head, _pair, tile, entry_list, start, stop, slot = find_item(lists, heads, PIECES, True)
    if not alive:
        return
    lane = tl.arange(0, ROWS)
    query = tile * ROWS + lane
    first = block_number(numbers, head, tile // PIECES, 0)
    last_query = (tile + 1) * ROWS - 1
    start, stop = narrow_keys(
        entry_list, start, stop, key_ends, sample, last_query, key_length, BLOCK, KEY_MASK, CAUSAL
    )
    pivot, norm, kept = _row_sums(
        scores,
        bias,
        key_mask,
        sample,
        head,
        query,
        query < query_length,
        entry_list,
        first,
        start,
        stop,
        key_length,
        scale,
        BLOCK,
        ROWS,
        COLUMNS,
        BIAS,
        KEY_MASK,
        CAUSAL,
        COUNT_PRUNED,
        STAGES,
    )
    place = partial + slot * 3 * ROWS + lane
    tl.store(place, pivot)
    tl.store(place + ROWS, norm)
    tl.store(place + 2 * ROWS, kept.to(tl.float32))


@jit_kernel
def _softmax_kernel(
    scores,
    out,
    partial,
    bias,
    key_mask,
    key_ends,
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
    """Weights of some rows: over their list, or over a segment of it whose list's sums are in ``partial``."""
    PIECES: tl.constexpr = BLOCK // ROWS
    alive, sample, head, pair, tile, entry_list, begin, end, slot = find_item(lists, heads, PIECES)
    if not alive:
        return
    lane = tl.arange(0, ROWS)
    query = tile * ROWS + lane
    exists = query < query_length
    first = block_number(numbers, head, tile // PIECES, 0)
    last_query = (tile + 1) * ROWS - 1
    start, stop = narrow_keys(entry_list, begin, end, key_ends, sample, last_query, key_length, BLOCK, KEY_MASK, CAUSAL)
    pivot, norm, kept = _row_sums(
        scores,
        bias,
        key_mask,
        sample,
        head,
        query,
        exists,
        entry_list,
        first,
        start,
        tl.where(slot < 0, stop, start),
        key_length,
        scale,
        BLOCK,
        ROWS,
        COLUMNS,
        BIAS,
        KEY_MASK,
        CAUSAL,
        COUNT_PRUNED,
        STAGES,
    )
    first_slot, parts = segments_of(lists, head, pair, tile, PIECES)
    for part in range(0, parts):
        place = partial + (first_slot + part * PIECES) * 3 * ROWS + lane
        other = tl.load(place)
        highest = tl.maximum(pivot, other)
        finite = tl.where(highest == -float("inf"), 0.0, highest)
        norm = norm * tl.exp(pivot - finite) + tl.load(place + ROWS) * tl.exp(other - finite)
        kept += tl.load(place + 2 * ROWS).to(tl.int32)
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

    for step in tl.range(0, tl.cdiv((stop - start) * BLOCK, COLUMNS), num_stages=STAGES):
        s, keep = _step_logits(
            scores,
            bias,
            key_mask,
            sample,
            head,
            query,
            exists,
            entry_list,
            first,
            start,
            stop,
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
        number, column = values_along(first, start, step, BLOCK, COLUMNS)
        address = value_addresses(out, sample, number, query % BLOCK, column)
        tl.store(address, p.to(out[0].dtype.element_ty), mask=(number < first + stop)[None, :])
    if KEY_MASK or CAUSAL:
        write_zeros(out, sample, query, first, begin, start, BLOCK, ROWS, COLUMNS)
        write_zeros(out, sample, query, first, tl.maximum(start, stop), end, BLOCK, ROWS, COLUMNS)


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
    key_ends, seen = ends(key_mask, count_pruned)
    pairs = batch * num_heads
    partial = empty_row_partial(scores, rows, pairs, block_size, tile_rows, 3)
    numbers, lists, bias = numbered(index[0], num_heads, nnz), listed(rows), broadcast(attn_bias)
    sizes = (num_heads, query_length, key_length, scale)
    options = {
        "BLOCK": block_size,
        "ROWS": tile_rows,
        "COLUMNS": shape.columns,
        "BIAS": attn_bias is not None,
        "KEY_MASK": key_mask is not None,
        "CAUSAL": is_causal,
        "COUNT_PRUNED": count_pruned,
        "STAGES": shape.stages,
        "num_warps": shape.warps,
    }
    if rows.capacity:
        launch(
            _segment_sums_kernel,
            item_count(pairs, rows, block_size, tile_rows, only_segments=True),
            strided(scores),
            partial,
            bias,
            key_mask,
            key_ends,
            numbers,
            lists,
            *sizes,
            **options,
        )
    launch(
        _softmax_kernel,
        item_count(pairs, rows, block_size, tile_rows),
        strided(scores),
        strided(out),
        partial,
        bias,
        key_mask,
        key_ends,
        seen,
        numbers,
        lists,
        *sizes,
        **options,
    )
    return out


@block_softmax.register_fake
def _(scores: Tensor, *args: object) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    _, bias, key_padding_mask, mask, index, num_heads, query_length, key_length, scale, is_causal, _ = inputs
    ctx.save_for_backward(output, key_padding_mask, mask, *index)
    ctx.numbers = (num_heads, query_length, key_length, scale, is_causal)  # type: ignore[attr-defined]
    ctx.bias = None if bias is None else (list(bias.shape), bias.dtype)  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
    weights, key_padding_mask, mask, *index = ctx.saved_tensors  # type: ignore[attr-defined]
    bias_shape, bias_dtype = ctx.bias if ctx.needs_input_grad[1] else (None, None)  # type: ignore[attr-defined]
    numbers = ctx.numbers  # type: ignore[attr-defined]
    d_scores, d_bias = block_softmax_backward(grad, weights, key_padding_mask, mask, index, *numbers, bias_shape)
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
