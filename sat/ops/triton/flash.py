"""Floor 1: fused block-sparse attention in Triton, forward pass, in memory that grows with the length only.

An online softmax over the kept blocks of each row (Dao, "FlashAttention-2", 2023), in base 2. See
:mod:`sat.ops.triton.flash_backward` for the gradients and :mod:`sat.ops.triton.index` for lists and segments.

Shapes: B batch, H heads, L queries, S keys, D head dimension, b block size, M x N blocks. In kernels, a tile of the
scores is ``[ROWS, COLUMNS]``, and ``DIM`` is D padded to a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sat.layout import BlockLayout
from sat.ops.autocast import without_autocast
from sat.ops.triton.flash_backward import block_attention_backward
from sat.ops.triton.index import TileIndex, tile_index
from sat.ops.triton.launch import LOG2_E, jit_kernel, launch, matrix_precision, padded
from sat.ops.triton.masking import bias_tile, dropout_keeps, dropout_words, ends, real_bytes
from sat.ops.triton.parameters import Tile, attention_tiles
from sat.ops.triton.tiles import (
    broadcast,
    dot,
    empty_partial,
    find_item,
    find_segments,
    item_count,
    keeps,
    listed,
    load_entry,
    load_partial,
    load_rows,
    narrow_keys,
    pieces,
    real_tokens,
    step_along,
    store_partial,
    store_rows,
    strided,
)


@triton.jit
def _permitted(seen, sample, query, key_length, KEY_MASK: tl.constexpr, CAUSAL: tl.constexpr):
    """How many keys padding and causality permit each query."""
    last = tl.minimum(query, key_length - 1) if CAUSAL else query * 0 + (key_length - 1)
    return tl.load(seen + sample * key_length + last) if KEY_MASK else last + 1


@triton.jit
def _finish(acc, pivot, norm, kept, permitted, COUNT_PRUNED: tl.constexpr):
    """Context of rows from the sums over their keys, and their log-sum-exp in two parts, both in base 2.

    These are the largest score and the logarithm of the sum of exponentials relative to it: added up, a large score (a
    bias of -1e9 that masks a whole row) would swallow the second. Rows without a key give 0, +inf and 0.
    """
    dead = norm == 0.0
    if COUNT_PRUNED:
        # Each permitted key outside the layout is one more logit of 0.
        pruned = permitted.to(tl.float32) - kept
        highest = tl.where(pruned > 0, tl.maximum(pivot, 0.0), pivot)
        highest = tl.where(dead, 0.0, highest)
        factor = tl.exp2(pivot - highest)
        acc = acc * factor[:, None]
        norm = norm * factor + pruned * tl.exp2(-tl.maximum(highest, 0.0))
        pivot = highest
    norm = tl.where(dead, 1.0, norm)
    return acc / norm[:, None], tl.where(dead, float("inf"), pivot), tl.log2(norm)


@triton.jit
def _store_context(
    out,
    lse,
    query_mask,
    acc,
    pivot,
    norm,
    kept,
    seen,
    sample,
    head,
    pair,
    query,
    query_length,
    key_length,
    D: tl.constexpr,
    DIM: tl.constexpr,
    KEY_MASK: tl.constexpr,
    QUERY_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    COUNT_PRUNED: tl.constexpr,
):
    exists = query < query_length
    permitted = kept
    if COUNT_PRUNED:
        permitted = _permitted(seen, sample, query, key_length, KEY_MASK, CAUSAL)
    context, pivot, log_norm = _finish(acc, pivot, norm, kept, permitted, COUNT_PRUNED)
    if QUERY_MASK:
        real = real_tokens(query_mask, sample, query, exists, query_length)
        context = tl.where(real[:, None], context, 0.0)
        pivot = tl.where(real, pivot, float("inf"))
    store_rows(out, sample, head, query, exists, context, D, DIM)
    place = lse + (pair * query_length + query) * 2
    tl.store(place, pivot, mask=exists)
    tl.store(place + 1, log_norm, mask=exists)


@jit_kernel
def _forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    bias,
    key_mask,
    query_mask,
    key_ends,
    seen,
    words,
    lists,
    partial_context,
    partial_sums,
    heads,
    query_length,
    key_length,
    scale,
    dropout_p,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    QUERY_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    COUNT_PRUNED: tl.constexpr,
    DROPOUT: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Context of one tile of queries over its list of key blocks, or over a segment of it. ``scale`` is in base 2."""
    PIECES: tl.constexpr = BLOCK // ROWS if BLOCK > ROWS else 1
    alive, sample, head, pair, tile, entry_list, start, stop, slot = find_item(lists, heads, PIECES)
    if not alive:
        return
    lane = tl.arange(0, ROWS)
    query = tile * ROWS + lane
    exists = query < query_length
    if QUERY_MASK:
        real = real_tokens(query_mask, sample, query, exists, query_length)
        stop = tl.where(tl.max(real.to(tl.int32), 0) > 0, stop, start)
    last_query = (tile + 1) * ROWS - 1
    start, stop = narrow_keys(
        entry_list, start, stop, key_ends, sample, last_query, key_length, BLOCK, KEY_MASK, CAUSAL
    )
    b_q = load_rows(q, sample, head, query, exists, D, DIM)  # [ROWS, DIM]
    pivot = tl.full([ROWS], -float("inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    kept = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    if DROPOUT:
        query_words = dropout_words(words, pair, query, exists, query_length + key_length)
    entry = load_entry(entry_list, start, stop, 0, BLOCK, COLUMNS)
    for step in tl.range(0, tl.cdiv((stop - start) * BLOCK, COLUMNS), num_stages=STAGES):
        key, bits, valid = step_along(entry, start, stop, step, BLOCK, COLUMNS)
        entry = load_entry(entry_list, start, stop, step + 1, BLOCK, COLUMNS)
        inside = valid & (key < key_length) if RAGGED else valid
        b_k = load_rows(k, sample, head, key, inside, D, DIM)  # [COLUMNS, DIM]
        b_v = load_rows(v, sample, head, key, inside, D, DIM)  # [COLUMNS, DIM]
        s = dot(b_q, tl.trans(b_k), None, PRECISION) * scale  # [ROWS, COLUMNS]
        if DROPOUT:
            key_words = dropout_words(words, pair, query_length + key, inside, query_length + key_length)
        if KEY_MASK:
            inside = real_tokens(key_mask, sample, key, inside, key_length)
        if BIAS:
            s += bias_tile(bias, sample, head, query[:, None], key[None, :], exists[:, None] & inside[None, :])
        MASKED: tl.constexpr = RAGGED or KEY_MASK or CAUSAL or COUNT_PRUNED or BLOCK < COLUMNS or BLOCK < ROWS
        if MASKED:
            keep = tl.broadcast_to(inside[None, :], [ROWS, COLUMNS])
            if BLOCK < ROWS:
                keep = keep & keeps(bits[None, :], lane[:, None], BLOCK)
            if CAUSAL:
                keep = keep & (key[None, :] <= query[:, None])
            s = tl.where(keep, s, -float("inf"))
            if COUNT_PRUNED:
                kept += tl.sum(keep.to(tl.float32), 1)
        highest = tl.maximum(pivot, tl.max(s, 1))
        # Rows that have not met a key yet need a finite pivot: inf - inf is NaN.
        finite = tl.where(highest == -float("inf"), 0.0, highest) if MASKED or BIAS else highest
        p = tl.exp2(s - finite[:, None])
        alpha = tl.exp2(pivot - finite)
        norm = norm * alpha + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(dropout_keeps(query_words[:, None], key_words[None, :], dropout_p), p, 0.0)
        acc = dot(p.to(b_v.dtype), b_v, acc * alpha[:, None], PRECISION)
        pivot = highest

    if DROPOUT:
        acc = acc / (1 - dropout_p)
    if slot >= 0:
        store_partial(partial_context, slot, acc, ROWS, DIM)
        sums = partial_sums + slot * 3 * ROWS + lane
        tl.store(sums, pivot)
        tl.store(sums + ROWS, norm)
        tl.store(sums + 2 * ROWS, kept)
    else:
        _store_context(
            out,
            lse,
            query_mask,
            acc,
            pivot,
            norm,
            kept,
            seen,
            sample,
            head,
            pair,
            query,
            query_length,
            key_length,
            D,
            DIM,
            KEY_MASK,
            QUERY_MASK,
            CAUSAL,
            COUNT_PRUNED,
        )


@jit_kernel
def _join_kernel(
    out,
    lse,
    query_mask,
    seen,
    lists,
    partial_context,
    partial_sums,
    heads,
    query_length,
    key_length,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    QUERY_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    COUNT_PRUNED: tl.constexpr,
):
    """Context of one tile whose list was cut, from its segments' sums, in order."""
    PIECES: tl.constexpr = BLOCK // ROWS if BLOCK > ROWS else 1
    sample, head, pair, tile, first, parts = find_segments(lists, heads, PIECES)
    if parts == 0:
        return
    lane = tl.arange(0, ROWS)
    pivot = tl.full([ROWS], -float("inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    kept = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    for part in range(0, parts):
        slot = first + part * PIECES
        sums = partial_sums + slot * 3 * ROWS + lane
        part_pivot = tl.load(sums)
        highest = tl.maximum(pivot, part_pivot)
        finite = tl.where(highest == -float("inf"), 0.0, highest)
        alpha, beta = tl.exp2(pivot - finite), tl.exp2(part_pivot - finite)
        norm = norm * alpha + tl.load(sums + ROWS) * beta
        kept += tl.load(sums + 2 * ROWS)
        acc = acc * alpha[:, None] + load_partial(partial_context, slot, ROWS, DIM) * beta[:, None]
        pivot = highest
    _store_context(
        out,
        lse,
        query_mask,
        acc,
        pivot,
        norm,
        kept,
        seen,
        sample,
        head,
        pair,
        tile * ROWS + lane,
        query_length,
        key_length,
        D,
        DIM,
        KEY_MASK,
        QUERY_MASK,
        CAUSAL,
        COUNT_PRUNED,
    )


def _empty_context(query: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(*query.shape[:3], 2, dtype=torch.float32)


@torch.library.custom_op("sat::block_attention_triton", mutates_args=())
@without_autocast
def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    block_size: int,
    tiles: list[int],
    index: list[Tensor],
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | None,
    attn_bias: Tensor | None,
    words: Tensor | None,
    dropout_p: float,
    scale: float,
    is_causal: bool,
    count_pruned: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Forward pass: the context ``[B, H, L, D]`` and each row's log-sum-exp ``[B, H, L, 2]``, see ``_finish``.

    ``mask`` is ``[H|1, M, N]``; ``tiles`` and ``index`` are those of forward pass, dQ, dK and dV, one after the other.
    ``words`` ``[B, H, L + S]`` int32 are random, of the queries and of the keys, and there if there is dropout.
    The arguments have been checked by :mod:`sat.ops`.
    """
    batch, heads, query_length, dim = query.shape
    pairs = batch * heads
    out, lse = _empty_context(query)
    rows = TileIndex(*index[:4])
    shape = Tile(*tiles[:4])
    key_mask, query_mask = real_bytes(key_padding_mask), real_bytes(query_padding_mask)
    key_ends, seen = ends(key_mask, count_pruned)
    context = empty_partial(query, rows, block_size, shape.rows, shape.rows, padded(dim))
    sums = empty_partial(query, rows, block_size, shape.rows, 3, shape.rows)
    options = {
        "BLOCK": block_size,
        "D": dim,
        "DIM": padded(dim),
        "ROWS": shape.rows,
        "KEY_MASK": key_mask is not None,
        "QUERY_MASK": query_mask is not None,
        "CAUSAL": is_causal,
        "COUNT_PRUNED": count_pruned,
    }
    launch(
        _forward_kernel,
        item_count(pairs, rows, block_size, shape.rows),
        strided(query),
        strided(key),
        strided(value),
        strided(out),
        lse,
        broadcast(attn_bias),
        key_mask,
        query_mask,
        key_ends,
        seen,
        words,
        listed(rows),
        context,
        sums,
        heads,
        query_length,
        key.shape[2],
        scale * LOG2_E,
        dropout_p,
        COLUMNS=shape.columns,
        BIAS=attn_bias is not None,
        DROPOUT=words is not None,
        RAGGED=key.shape[2] % block_size != 0,
        PRECISION=precision,
        STAGES=shape.stages,
        num_warps=shape.warps,
        **options,
    )
    if rows.capacity:
        launch(
            _join_kernel,
            pairs * rows.groups * pieces(block_size, shape.rows),
            strided(out),
            lse,
            query_mask,
            seen,
            listed(rows),
            context,
            sums,
            heads,
            query_length,
            key.shape[2],
            **options,
        )
    return out, lse


@block_attention.register_fake
def _(query: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return _empty_context(query)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, block_size, tiles, index, key_mask, query_mask, bias, words, *rest = inputs
    dropout_p, scale, is_causal, _, precision = rest
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, mask, key_mask, query_mask, bias, words, *output, *index)
    ctx.block_size, ctx.tiles = block_size, tiles[4:]  # type: ignore[attr-defined]
    ctx.options = dropout_p, scale, is_causal, precision  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor) -> tuple:
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    query, key, value, mask, key_mask, query_mask, bias, words, out, lse, *index = saved
    bias_grad = bias is not None and bias.requires_grad
    d_query, d_key, d_value, d_bias = block_attention_backward(
        grad,
        out,
        lse,
        query,
        key,
        value,
        mask,
        ctx.block_size,  # type: ignore[attr-defined]
        ctx.tiles,  # type: ignore[attr-defined]
        index[4:],
        key_mask,
        query_mask,
        bias,
        words,
        *ctx.options,  # type: ignore[attr-defined]
        bias_grad,
    )
    d_bias = d_bias.to(bias.dtype) if bias_grad else None
    return d_query, d_key, d_value, None, None, None, [None] * len(index), None, None, d_bias, *[None] * 6


block_attention.register_autograd(_backward, setup_context=_setup_context)


def lists(layout: BlockLayout, pairs: int, tiles: list[int], gradients: bool) -> list[Tensor]:
    """The lists that the kernels walk: of the forward pass, and (``gradients``) of dQ and of dK and dV."""
    forward, query_gradient, key_value_gradient = (Tile(*tiles[i : i + 4]) for i in (0, 4, 8))
    found = [*tile_index(layout, forward.rows, pairs)]
    if gradients:
        columns = tile_index(layout, key_value_gradient.columns, pairs, transposed=True)
        found = [*found, *tile_index(layout, query_gradient.rows, pairs), *columns]
    return found


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | None,
    attn_bias: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: float,
    pruned: str,
    tiles: list[int] | None = None,
) -> Tensor:
    """Fused block-sparse attention, see :func:`sat.ops.block_sparse_attention`; ``tiles`` is for the tuner."""
    batch, heads, _, dim = query.shape
    inputs = (query, key, value) if attn_bias is None else (query, key, value, attn_bias)
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    words = None
    if dropout_p > 0:
        # Drawn on the device: a seed that is read on the host would make a captured graph repeat one mask for ever.
        length = query.shape[2] + key.shape[2]
        words = torch.randint(-(2**31), 2**31, (batch, heads, length), device=query.device, dtype=torch.int32)
    if tiles is None:
        heavy = attn_bias is not None or dropout_p > 0 or pruned == "zero"
        tiles = attention_tiles(layout.block_size, dim, query.dtype, query.device, heavy)
    out, _ = block_attention(
        query,
        key,
        value,
        layout.mask,
        layout.block_size,
        tiles,
        lists(layout, batch * heads, tiles, gradients),
        key_padding_mask,
        query_padding_mask,
        attn_bias,
        words,
        dropout_p,
        scale,
        is_causal,
        pruned == "zero",
        matrix_precision(query.dtype),
    )
    return out
