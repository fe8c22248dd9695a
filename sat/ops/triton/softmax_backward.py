"""Floor 1: the gradient of the softmax over the kept blocks of each row in Triton, on block values.

Of a row it takes ``sum_j p_j dp_j``, which a long row's segments have summed up before, as the softmax does. Names and
shapes are those of :mod:`sat.ops.triton.softmax`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sat.ops.autocast import without_autocast
from sat.ops.checks import no_second_derivative
from sat.ops.triton.index import TileIndex
from sat.ops.triton.launch import jit_kernel, launch
from sat.ops.triton.masking import bias_tiles, bias_user, count_users, ends, real_bytes, store_bias_gradient, tile_used
from sat.ops.triton.parameters import tile
from sat.ops.triton.sddmm import block_number, numbered, value_addresses, values_along, write_zeros
from sat.ops.triton.tiles import broadcast, find_item, item_count, listed, narrow_keys, segments_of, strided

# Edge of a tile of the bias gradient.
BIAS_TILE = 32


@triton.jit
def _row_delta(
    weights,
    grad,
    sample,
    query,
    first,
    start,
    stop,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``sum_j p_j dp_j`` ``[ROWS]`` over a part of a list."""
    delta = tl.zeros([ROWS], tl.float32)
    for step in tl.range(0, tl.cdiv((stop - start) * BLOCK, COLUMNS), num_stages=STAGES):
        number, column = values_along(first, start, step, BLOCK, COLUMNS)
        valid = (number < first + stop)[None, :]
        p = tl.load(value_addresses(weights, sample, number, query % BLOCK, column), mask=valid, other=0.0)
        dp = tl.load(value_addresses(grad, sample, number, query % BLOCK, column), mask=valid, other=0.0)
        delta += tl.sum(p.to(tl.float32) * dp.to(tl.float32), 1)
    return delta


@jit_kernel
def _segment_delta_kernel(
    weights,
    grad,
    partial,
    key_ends,
    numbers,
    lists,
    heads,
    key_length,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``sum_j p_j dp_j`` over one segment of a cut list, for some rows."""
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
    delta = _row_delta(weights, grad, sample, query, first, start, stop, BLOCK, ROWS, COLUMNS, STAGES)
    tl.store(partial + slot * ROWS + lane, delta)


@jit_kernel
def _softmax_gradient_kernel(
    weights,
    grad,
    d_scores,
    partial,
    delta,
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
    KEY_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``scale * p * (dp - delta)`` of some rows, with ``delta = sum_j p_j dp_j`` of each; parts as in the softmax."""
    PIECES: tl.constexpr = BLOCK // ROWS
    alive, sample, head, pair, tile, entry_list, begin, end, slot = find_item(lists, heads, PIECES)
    if not alive:
        return
    lane = tl.arange(0, ROWS)
    query = tile * ROWS + lane
    first = block_number(numbers, head, tile // PIECES, 0)
    last_query = (tile + 1) * ROWS - 1
    start, stop = narrow_keys(entry_list, begin, end, key_ends, sample, last_query, key_length, BLOCK, KEY_MASK, CAUSAL)
    own_stop = tl.where(slot < 0, stop, start)
    row_delta = _row_delta(weights, grad, sample, query, first, start, own_stop, BLOCK, ROWS, COLUMNS, STAGES)
    first_slot, parts = segments_of(lists, head, pair, tile, PIECES)
    for part in range(0, parts):
        row_delta += tl.load(partial + (first_slot + part * PIECES) * ROWS + lane)
    # All segments of a list write the same.
    tl.store(delta + pair * query_length + query, row_delta, mask=query < query_length)
    for step in tl.range(0, tl.cdiv((stop - start) * BLOCK, COLUMNS), num_stages=STAGES):
        number, column = values_along(first, start, step, BLOCK, COLUMNS)
        valid = (number < first + stop)[None, :]
        p = tl.load(value_addresses(weights, sample, number, query % BLOCK, column), mask=valid, other=0.0)
        dp = tl.load(value_addresses(grad, sample, number, query % BLOCK, column), mask=valid, other=0.0)
        ds = p.to(tl.float32) * (dp.to(tl.float32) - row_delta[:, None]) * scale
        address = value_addresses(d_scores, sample, number, query % BLOCK, column)
        tl.store(address, ds.to(d_scores[0].dtype.element_ty), mask=valid)
    if KEY_MASK or CAUSAL:
        write_zeros(d_scores, sample, query, first, begin, start, BLOCK, ROWS, COLUMNS)
        write_zeros(d_scores, sample, query, first, tl.maximum(start, stop), end, BLOCK, ROWS, COLUMNS)


@jit_kernel
def _bias_gradient_kernel(
    weights,
    grad,
    delta,
    d_bias,
    numbers,
    mask,
    key_ends,
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
    KEY_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One tile of the bias gradient: ``p * (dp - delta)``, added in order over all that uses it, see ``bias_user``."""
    lane = tl.arange(0, TILE)
    acc = tl.zeros([TILE, TILE], tl.float32)
    for work in range(0, count_users(users)):
        sample, head, row_tile, column_tile = bias_user(work, own_tiles, bias_heads, users)
        first_query, first_key = row_tile * TILE, column_tile * TILE
        if tile_used(mask, key_ends, sample, head, first_query, first_key, BLOCK, TILE, KEY_MASK, CAUSAL):
            query, key = first_query + lane, first_key + lane
            number = block_number(numbers, head, first_query // BLOCK, first_key // BLOCK) + tl.zeros([TILE], tl.int64)
            exists = query < query_length
            keep = exists[:, None] & (key < key_length)[None, :]
            p = tl.load(value_addresses(weights, sample, number, query % BLOCK, key % BLOCK)).to(tl.float32)
            dp = tl.load(value_addresses(grad, sample, number, query % BLOCK, key % BLOCK)).to(tl.float32)
            place = delta + (sample * heads + head) * query_length + query
            acc += tl.where(keep, p * (dp - tl.load(place, mask=exists, other=0.0)[:, None]), 0.0)
    store_bias_gradient(d_bias, acc, own_tiles, query_length, key_length, TILE, OVER_ROWS, OVER_COLUMNS)


def empty_row_partial(
    like: Tensor, rows: TileIndex, pairs: int, block_size: int, tile_rows: int, numbers: int
) -> Tensor:
    """Room for so many numbers of each row of all segments."""
    slots = item_count(pairs, rows, block_size, tile_rows, only_segments=True)
    return like.new_empty(slots, numbers, tile_rows, dtype=torch.float32)


def _empty_gradients(grad: Tensor, bias_shape: list[int] | None) -> tuple[Tensor, Tensor]:
    d_scores = torch.empty_like(grad, memory_format=torch.contiguous_format)
    return d_scores, grad.new_empty([0] if bias_shape is None else bias_shape, dtype=torch.float32)


@torch.library.custom_op("sat::sparse_softmax_triton_backward", mutates_args=())
@without_autocast
def block_softmax_backward(
    grad: Tensor,
    weights: Tensor,
    key_padding_mask: Tensor | None,
    mask: Tensor,
    index: list[Tensor],
    num_heads: int,
    query_length: int,
    key_length: int,
    scale: float,
    is_causal: bool,
    bias_shape: list[int] | None,
) -> tuple[Tensor, Tensor]:
    """Gradients to the scores and, in float32, to a bias of this shape (empty without one)."""
    batch, nnz, block_size, _ = grad.shape
    d_scores, d_bias = _empty_gradients(grad, bias_shape)
    delta = grad.new_empty(batch, num_heads, query_length, dtype=torch.float32)
    rows, numbers = TileIndex(*index[1:5]), numbered(index[0], num_heads, nnz)
    shape = tile("softmax", block_size, block_size, grad.dtype, grad.device)
    tile_rows = min(shape.rows, block_size)
    key_ends, _ = ends(real_bytes(key_padding_mask))
    pairs = batch * num_heads
    partial = empty_row_partial(grad, rows, pairs, block_size, tile_rows, 1)
    options = {
        "BLOCK": block_size,
        "ROWS": tile_rows,
        "COLUMNS": shape.columns,
        "KEY_MASK": key_ends is not None,
        "CAUSAL": is_causal,
        "STAGES": shape.stages,
        "num_warps": shape.warps,
    }
    if rows.capacity:
        launch(
            _segment_delta_kernel,
            item_count(pairs, rows, block_size, tile_rows, only_segments=True),
            strided(weights),
            strided(grad),
            partial,
            key_ends,
            numbers,
            listed(rows),
            num_heads,
            key_length,
            **options,
        )
    launch(
        _softmax_gradient_kernel,
        item_count(pairs, rows, block_size, tile_rows),
        strided(weights),
        strided(grad),
        strided(d_scores),
        partial,
        delta,
        key_ends,
        numbers,
        listed(rows),
        num_heads,
        query_length,
        key_length,
        scale,
        **options,
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
        key_ends,
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
        KEY_MASK=key_ends is not None,
        CAUSAL=is_causal,
    )
    return d_scores, d_bias


@block_softmax_backward.register_fake
def _(
    grad: Tensor,
    weights: Tensor,
    key_padding_mask: Tensor | None,
    mask: Tensor,
    index: list[Tensor],
    num_heads: int,
    query_length: int,
    key_length: int,
    scale: float,
    is_causal: bool,
    bias_shape: list[int] | None,
) -> tuple[Tensor, Tensor]:
    return _empty_gradients(grad, bias_shape)


block_softmax_backward.register_autograd(no_second_derivative)
