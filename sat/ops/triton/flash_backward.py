"""Floor 1: gradients of fused block-sparse attention in Triton.

The weights are made again from their log-sum-exp. dQ walks the lists of rows, dK and dV walk the lists of columns:
every number has one program that writes it, nothing is added atomically, and results are repeatable bit for bit.
Queries without a key, and padded ones, have a largest score of +inf, which makes their weights 0.

Names and shapes are those of :mod:`sat.ops.triton.flash`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sat.ops.autocast import without_autocast
from sat.ops.checks import no_second_derivative
from sat.ops.triton.index import TileIndex
from sat.ops.triton.launch import LOG2_E, jit_kernel, launch, padded
from sat.ops.triton.masking import (
    bias_tile,
    bias_tiles,
    bias_user,
    count_users,
    dropout_keeps,
    dropout_words,
    ends,
    real_bytes,
    store_bias_gradient,
    tile_used,
)
from sat.ops.triton.parameters import Tile
from sat.ops.triton.tiles import (
    broadcast,
    dot,
    empty_partial,
    find_item,
    item_count,
    keeps,
    listed,
    load_entry,
    load_lse,
    load_part,
    load_rows,
    narrow,
    narrow_keys,
    real_tokens,
    step_along,
    store_partial,
    store_rows,
    strided,
    sum_segments,
)


@jit_kernel
def _delta_kernel(out, grad, delta, heads, query_length, D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr):
    """``rowsum(dO * O)``: what the softmax's gradient subtracts, the same for every key."""
    tiles = tl.cdiv(query_length, ROWS)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    query = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    exists = query < query_length
    b_o = load_rows(out, pair // heads, pair % heads, query, exists, D, DIM).to(tl.float32)
    b_g = load_rows(grad, pair // heads, pair % heads, query, exists, D, DIM).to(tl.float32)
    tl.store(delta + pair * query_length + query, tl.sum(b_o * b_g, 1), mask=exists)


@jit_kernel
def _query_gradient_kernel(
    q,
    k,
    v,
    grad,
    lse,
    delta,
    d_q,
    bias,
    key_mask,
    key_ends,
    words,
    lists,
    partial,
    heads,
    query_length,
    key_length,
    scale,
    scale_log2,
    dropout_p,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dQ of one tile of queries over its list of key blocks, or over a segment of it."""
    PIECES: tl.constexpr = BLOCK // ROWS if BLOCK > ROWS else 1
    alive, sample, head, pair, tile, entry_list, start, stop, slot = find_item(lists, heads, PIECES)
    if not alive:
        return
    lane = tl.arange(0, ROWS)
    query = tile * ROWS + lane
    exists = query < query_length
    pivot, log_norm = load_lse(lse, pair, query, query_length, exists)
    stop = tl.where(tl.max((pivot != float("inf")).to(tl.int32), 0) > 0, stop, start)
    last_query = (tile + 1) * ROWS - 1
    start, stop = narrow_keys(
        entry_list, start, stop, key_ends, sample, last_query, key_length, BLOCK, KEY_MASK, CAUSAL
    )
    row_delta = tl.load(delta + pair * query_length + query, mask=exists, other=0.0)
    b_q = load_rows(q, sample, head, query, exists, D, DIM)  # [ROWS, DIM]
    b_g = load_rows(grad, sample, head, query, exists, D, DIM)  # [ROWS, DIM]
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
        s = dot(b_q, tl.trans(b_k), None, PRECISION) * scale_log2  # [ROWS, COLUMNS]
        if DROPOUT:
            key_words = dropout_words(words, pair, query_length + key, inside, query_length + key_length)
        if KEY_MASK:
            inside = real_tokens(key_mask, sample, key, inside, key_length)
        if BIAS:
            s += bias_tile(bias, sample, head, query[:, None], key[None, :], exists[:, None] & inside[None, :])
        p = tl.exp2((s - pivot[:, None]) - log_norm[:, None])
        if RAGGED or KEY_MASK or CAUSAL or BLOCK < COLUMNS or BLOCK < ROWS:
            keep = tl.broadcast_to(inside[None, :], [ROWS, COLUMNS])
            if BLOCK < ROWS:
                keep = keep & keeps(bits[None, :], lane[:, None], BLOCK)
            if CAUSAL:
                keep = keep & (key[None, :] <= query[:, None])
            p = tl.where(keep, p, 0.0)
        d_p = dot(b_g, tl.trans(b_v), None, PRECISION)
        if DROPOUT:
            kept = dropout_keeps(query_words[:, None], key_words[None, :], dropout_p)
            d_p = tl.where(kept, d_p / (1 - dropout_p), 0.0)
        d_s = p * (d_p - row_delta[:, None])
        acc = dot(d_s.to(b_k.dtype), b_k, acc, PRECISION)
    acc = acc * scale
    if slot >= 0:
        store_partial(partial, slot, acc, ROWS, DIM)
    else:
        store_rows(d_q, sample, head, query, exists, acc, D, DIM)


@jit_kernel
def _key_value_gradient_kernel(
    q,
    k,
    v,
    grad,
    lse,
    delta,
    d_k,
    d_v,
    bias,
    key_mask,
    query_ends,
    words,
    lists,
    partial_k,
    partial_v,
    heads,
    query_length,
    key_length,
    scale,
    scale_log2,
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
    DROPOUT: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dK and dV of one tile of keys over its list of query blocks; scores are held transposed, ``[COLUMNS, ROWS]``."""
    PIECES: tl.constexpr = BLOCK // COLUMNS if BLOCK > COLUMNS else 1
    alive, sample, head, pair, tile, entry_list, start, stop, slot = find_item(lists, heads, PIECES)
    if not alive:
        return
    lane = tl.arange(0, COLUMNS)
    key = tile * COLUMNS + lane
    exists = key < key_length
    if KEY_MASK:
        real = real_tokens(key_mask, sample, key, exists, key_length)
        stop = tl.where(tl.max(real.to(tl.int32), 0) > 0, stop, start)
    if QUERY_MASK or CAUSAL:
        first_block, last_block = 0, tl.cdiv(query_length, BLOCK)
        if QUERY_MASK:
            first_block = tl.load(query_ends + sample * 2) // BLOCK
            last_block = tl.cdiv(tl.load(query_ends + sample * 2 + 1), BLOCK)
        if CAUSAL:
            first_block = tl.maximum(first_block, tile * COLUMNS // BLOCK)
        start, stop = narrow(entry_list, start, stop, first_block, last_block)
    b_k = load_rows(k, sample, head, key, exists, D, DIM)  # [COLUMNS, DIM]
    b_v = load_rows(v, sample, head, key, exists, D, DIM)  # [COLUMNS, DIM]
    acc_k = tl.zeros([COLUMNS, DIM], tl.float32)
    acc_v = tl.zeros([COLUMNS, DIM], tl.float32)
    if DROPOUT:
        key_words = dropout_words(words, pair, query_length + key, exists, query_length + key_length)
    entry = load_entry(entry_list, start, stop, 0, BLOCK, ROWS)
    for step in tl.range(0, tl.cdiv((stop - start) * BLOCK, ROWS), num_stages=STAGES):
        query, bits, valid = step_along(entry, start, stop, step, BLOCK, ROWS)
        entry = load_entry(entry_list, start, stop, step + 1, BLOCK, ROWS)
        inside = valid & (query < query_length) if RAGGED else valid
        b_q = load_rows(q, sample, head, query, inside, D, DIM)  # [ROWS, DIM]
        b_g = load_rows(grad, sample, head, query, inside, D, DIM)  # [ROWS, DIM]
        pivot, log_norm = load_lse(lse, pair, query, query_length, inside)
        row_delta = tl.load(delta + pair * query_length + query, mask=inside, other=0.0)
        s = dot(b_k, tl.trans(b_q), None, PRECISION) * scale_log2  # [COLUMNS, ROWS]
        if BIAS:
            s += bias_tile(bias, sample, head, query[None, :], key[:, None], exists[:, None] & inside[None, :])
        p = tl.exp2((s - pivot[None, :]) - log_norm[None, :])
        if CAUSAL or BLOCK < COLUMNS:
            keep = tl.full([COLUMNS, ROWS], 1, tl.int1)
            if BLOCK < COLUMNS:
                keep = keep & keeps(bits[None, :], lane[:, None], BLOCK)
            if CAUSAL:
                keep = keep & (key[:, None] <= query[None, :])
            p = tl.where(keep, p, 0.0)
        d_p = dot(b_v, tl.trans(b_g), None, PRECISION)
        dropped = p
        if DROPOUT:
            query_words = dropout_words(words, pair, query, inside, query_length + key_length)
            kept = dropout_keeps(query_words[None, :], key_words[:, None], dropout_p)
            dropped = tl.where(kept, p / (1 - dropout_p), 0.0)
            d_p = tl.where(kept, d_p / (1 - dropout_p), 0.0)
        acc_v = dot(dropped.to(b_g.dtype), b_g, acc_v, PRECISION)
        d_s = p * (d_p - row_delta[None, :])
        acc_k = dot(d_s.to(b_q.dtype), b_q, acc_k, PRECISION)
    acc_k = acc_k * scale
    if KEY_MASK:
        # A padded key's row is its own: what was computed for it went nowhere else. The mask is read again, because
        # registers are what this kernel is shortest of.
        real = real_tokens(key_mask, sample, key, exists, key_length)
        acc_k = tl.where(real[:, None], acc_k, 0.0)
        acc_v = tl.where(real[:, None], acc_v, 0.0)
    if slot >= 0:
        store_partial(partial_k, slot, acc_k, COLUMNS, DIM)
        store_partial(partial_v, slot, acc_v, COLUMNS, DIM)
    else:
        store_rows(d_k, sample, head, key, exists, acc_k, D, DIM)
        store_rows(d_v, sample, head, key, exists, acc_v, D, DIM)


@triton.jit
def _products(
    a,
    b,
    sample,
    head,
    row,
    column,
    exists,
    inside,
    D: tl.constexpr,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products of rows of two matrices, up to 128 features at a time, for which there are registers."""
    PART: tl.constexpr = DIM if DIM < 128 else 128
    acc = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for start in tl.range(0, D, PART):
        b_a = load_part(a, sample, head, row, exists, start, D, PART)
        b_b = load_part(b, sample, head, column, inside, start, D, PART)
        acc = dot(b_a, tl.trans(b_b), acc, PRECISION)
    return acc


@jit_kernel
def _bias_gradient_kernel(
    q,
    k,
    v,
    grad,
    lse,
    delta,
    d_bias,
    bias,
    mask,
    key_mask,
    key_ends,
    words,
    heads,
    query_length,
    key_length,
    bias_heads,
    own_tiles,
    users,
    scale_log2,
    dropout_p,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    OVER_ROWS: tl.constexpr,
    OVER_COLUMNS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of the bias gradient: dS, added in order over all that uses it, see ``bias_user``."""
    lane = tl.arange(0, TILE)
    acc = tl.zeros([TILE, TILE], tl.float32)
    for work in range(0, count_users(users)):
        sample, head, row_tile, column_tile = bias_user(work, own_tiles, bias_heads, users)
        first_query, first_key = row_tile * TILE, column_tile * TILE
        if tile_used(mask, key_ends, sample, head, first_query, first_key, BLOCK, TILE, KEY_MASK, CAUSAL):
            query, key = first_query + lane, first_key + lane
            exists, inside = query < query_length, key < key_length
            pair = sample * heads + head
            pivot, log_norm = load_lse(lse, pair, query, query_length, exists)
            row_delta = tl.load(delta + pair * query_length + query, mask=exists, other=0.0)
            if KEY_MASK:
                inside = real_tokens(key_mask, sample, key, inside, key_length)
            keep = exists[:, None] & inside[None, :]
            s = _products(q, k, sample, head, query, key, exists, inside, D, DIM, PRECISION) * scale_log2
            s += bias_tile(bias, sample, head, query[:, None], key[None, :], keep)
            if CAUSAL:
                keep = keep & (key[None, :] <= query[:, None])
            p = tl.where(keep, tl.exp2((s - pivot[:, None]) - log_norm[:, None]), 0.0)
            d_p = _products(grad, v, sample, head, query, key, exists, inside, D, DIM, PRECISION)
            if DROPOUT:
                query_words = dropout_words(words, pair, query, exists, query_length + key_length)
                key_words = dropout_words(words, pair, query_length + key, inside, query_length + key_length)
                kept = dropout_keeps(query_words[:, None], key_words[None, :], dropout_p)
                d_p = tl.where(kept, d_p / (1 - dropout_p), 0.0)
            acc += p * (d_p - row_delta[:, None])
    store_bias_gradient(d_bias, acc, own_tiles, query_length, key_length, TILE, OVER_ROWS, OVER_COLUMNS)


def _empty_gradients(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, bias_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = bias.shape if bias is not None and bias_grad else (0,)
    d_bias = query.new_empty(shape, dtype=torch.float32)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), d_bias


@torch.library.custom_op("sat::block_attention_triton_backward", mutates_args=())
@without_autocast
def block_attention_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
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
    precision: str,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to query, key, value and the bias (empty unless ``bias_grad``).

    ``tiles`` and ``index`` are those of dQ, then those of dK and dV.
    """
    batch, heads, query_length, dim = query.shape
    key_length, pairs = key.shape[2], batch * heads
    d_query, d_key, d_value, d_bias = _empty_gradients(query, key, value, attn_bias, bias_grad)
    key_mask, query_mask = real_bytes(key_padding_mask), real_bytes(query_padding_mask)
    key_ends, _ = ends(key_mask)
    rows, columns = TileIndex(*index[:4]), TileIndex(*index[4:])
    sizes = {"D": dim, "DIM": padded(dim)}
    options = {
        "BLOCK": block_size,
        "BIAS": attn_bias is not None,
        "KEY_MASK": key_mask is not None,
        "CAUSAL": is_causal,
        "DROPOUT": words is not None,
        "PRECISION": precision,
        **sizes,
    }
    delta = query.new_empty(query.shape[:3], dtype=torch.float32)
    delta_rows = max(16, 4096 // padded(dim))  # what fits into registers
    launch(
        _delta_kernel,
        pairs * -(-query_length // delta_rows),
        strided(out),
        strided(grad),
        delta,
        heads,
        query_length,
        ROWS=delta_rows,
        **sizes,
    )
    inputs = (strided(query), strided(key), strided(value), strided(grad), lse, delta)
    numbers = (heads, query_length, key_length, scale, scale * LOG2_E, dropout_p)

    shape = Tile(*tiles[:4])
    partial = empty_partial(query, rows, block_size, shape.rows, shape.rows, padded(dim))
    launch(
        _query_gradient_kernel,
        item_count(pairs, rows, block_size, shape.rows),
        *inputs,
        strided(d_query),
        broadcast(attn_bias),
        key_mask,
        key_ends,
        words,
        listed(rows),
        partial,
        *numbers,
        ROWS=shape.rows,
        COLUMNS=shape.columns,
        RAGGED=key_length % block_size != 0,
        STAGES=shape.stages,
        num_warps=shape.warps,
        **options,
    )
    sum_segments(d_query, partial, rows, block_size, shape.rows)
    del partial

    shape = Tile(*tiles[4:])
    partial_k, partial_v = (
        empty_partial(query, columns, block_size, shape.columns, shape.columns, padded(dim)) for _ in range(2)
    )
    launch(
        _key_value_gradient_kernel,
        item_count(pairs, columns, block_size, shape.columns),
        *inputs,
        strided(d_key),
        strided(d_value),
        broadcast(attn_bias),
        key_mask,
        ends(query_mask)[0],
        words,
        listed(columns),
        partial_k,
        partial_v,
        *numbers,
        ROWS=shape.rows,
        COLUMNS=shape.columns,
        QUERY_MASK=query_mask is not None,
        RAGGED=query_length % block_size != 0,
        STAGES=shape.stages,
        num_warps=shape.warps,
        **options,
    )
    sum_segments(d_key, partial_k, columns, block_size, shape.columns)
    sum_segments(d_value, partial_v, columns, block_size, shape.columns)

    if bias_grad:
        assert attn_bias is not None
        size = min(block_size, 32 if padded(dim) <= 32 and query.dtype != torch.float32 else 16)
        programs, own_tiles, users = bias_tiles(attn_bias.shape, batch, heads, (query_length, key_length), size)
        del options["BIAS"]
        launch(
            _bias_gradient_kernel,
            programs,
            *inputs,
            d_bias,
            broadcast(attn_bias),
            broadcast(mask.view(torch.uint8)),
            key_mask,
            key_ends,
            words,
            heads,
            query_length,
            key_length,
            attn_bias.shape[1],
            own_tiles,
            users,
            scale * LOG2_E,
            dropout_p,
            TILE=size,
            OVER_ROWS=attn_bias.shape[2] == 1,
            OVER_COLUMNS=attn_bias.shape[3] == 1,
            num_warps=8 if padded(dim) > 128 else 2 if padded(dim) <= 32 and query.dtype == torch.float32 else 4,
            num_stages=1,
            **options,
        )
    return d_query, d_key, d_value, d_bias


@block_attention_backward.register_fake
def _(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
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
    precision: str,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(query, key, value, attn_bias, bias_grad)


block_attention_backward.register_autograd(no_second_derivative)
