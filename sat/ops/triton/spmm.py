"""Floor 1: block-sparse times dense in Triton: ``weights @ value`` and ``weights^T @ value``.

The transposed product walks the lists of columns and reads the same values with their strides exchanged: nothing is
transposed in memory, and no sum is made atomically. Names and shapes are those of :mod:`sat.ops.triton.sddmm`; a tile
of weights is ``[ROWS, COLUMNS]``, rows of the output by tokens that are summed over.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from sat.layout import BlockLayout
from sat.ops.autocast import without_autocast
from sat.ops.triton.index import TileIndex
from sat.ops.triton.launch import jit_kernel, launch, matrix_precision, padded
from sat.ops.triton.parameters import tile
from sat.ops.triton.sddmm import (
    block_number,
    block_sddmm,
    numbered,
    value_addresses,
    value_index,
    values_along,
)
from sat.ops.triton.tiles import (
    dot,
    empty_partial,
    find_item,
    item_count,
    listed,
    load_entry,
    load_rows,
    step_along,
    store_partial,
    store_rows,
    strided,
    sum_segments,
)


@jit_kernel
def _spmm_kernel(
    weights,
    v,
    out,
    numbers,
    lists,
    partial,
    heads,
    out_length,
    length,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of the output from its list of blocks, or a segment of it. Under TRANSPOSED, lists are of columns."""
    PIECES: tl.constexpr = BLOCK // ROWS
    alive, sample, head, pair, tile, entry_list, start, stop, slot = find_item(lists, heads, PIECES)
    if not alive:
        return
    row = tile * ROWS + tl.arange(0, ROWS)
    first = pair * 0
    if not TRANSPOSED:
        first = block_number(numbers, head, tile // PIECES, 0)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    entry = load_entry(entry_list, start, stop, 0, BLOCK, COLUMNS)
    for step in tl.range(0, tl.cdiv((stop - start) * BLOCK, COLUMNS), num_stages=STAGES):
        token, _bits, valid = step_along(entry, start, stop, step, BLOCK, COLUMNS)
        entry = load_entry(entry_list, start, stop, step + 1, BLOCK, COLUMNS)
        number, column = values_along(first, start, step, BLOCK, COLUMNS)
        if TRANSPOSED:
            number = block_number(numbers, head, token // BLOCK, tile // PIECES)
        address = value_addresses(weights, sample, number, row % BLOCK, column)
        inside = valid
        b_w = tl.load(address, mask=valid[None, :], other=0.0)  # [ROWS, COLUMNS]
        if RAGGED:
            # Past the end the weights may hold anything, and 0 * inf is NaN. Not a mask of the load, which would then
            # read number by number.
            inside = valid & (token < length)
            b_w = tl.where(inside[None, :], b_w, 0.0)
        b_v = load_rows(v, sample, head, token, inside, D, DIM)  # [COLUMNS, DIM]
        acc = dot(b_w, b_v, acc, PRECISION)
    if slot >= 0:
        store_partial(partial, slot, acc, ROWS, DIM)
    else:
        store_rows(out, sample, head, row, row < out_length, acc, D, DIM)


def _empty_output(value: Tensor, output_length: int) -> Tensor:
    return value.new_empty(value.shape[0], value.shape[1], output_length, value.shape[3])


@torch.library.custom_op("sat::spmm_triton", mutates_args=())
@without_autocast
def block_spmm(
    weights: Tensor, value: Tensor, index: list[Tensor], transpose: bool, output_length: int, precision: str
) -> Tensor:
    """``[B, H, output_length, D]``. ``index`` is that of ``value_index``, with columns if ``transpose``."""
    batch, heads, length, dim = value.shape
    nnz, block_size = weights.shape[1:3]
    out = _empty_output(value, output_length)
    lists = TileIndex(*(index[5:9] if transpose else index[1:5]))
    shape = tile("spmm", block_size, dim, value.dtype, value.device)
    tile_rows = min(shape.rows, block_size)
    partial = empty_partial(value, lists, block_size, tile_rows, tile_rows, padded(dim))
    launch(
        _spmm_kernel,
        item_count(batch * heads, lists, block_size, tile_rows),
        strided(weights.transpose(2, 3) if transpose else weights),
        strided(value),
        strided(out),
        numbered(index[0], heads, nnz),
        listed(lists),
        partial,
        heads,
        output_length,
        length,
        BLOCK=block_size,
        D=dim,
        DIM=padded(dim),
        ROWS=tile_rows,
        COLUMNS=shape.columns,
        TRANSPOSED=transpose,
        RAGGED=length % block_size != 0,
        PRECISION=precision,
        STAGES=shape.stages,
        num_warps=shape.warps,
    )
    sum_segments(out, partial, lists, block_size, tile_rows)
    return out


@block_spmm.register_fake
def _(
    weights: Tensor, value: Tensor, index: list[Tensor], transpose: bool, output_length: int, precision: str
) -> Tensor:
    return _empty_output(value, output_length)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    weights, value, index, transpose, _, precision = inputs
    ctx.save_for_backward(weights, value, *index)
    ctx.transpose, ctx.precision = transpose, precision  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
    weights, value, *index = ctx.saved_tensors  # type: ignore[attr-defined]
    transpose, precision = ctx.transpose, ctx.precision  # type: ignore[attr-defined]
    need_weights, need_value, *_ = ctx.needs_input_grad  # type: ignore[attr-defined]
    d_weights = d_value = None
    if need_weights:
        rows, columns = (value, grad) if transpose else (grad, value)
        d_weights = block_sddmm(rows, columns, index, weights.shape[1], weights.shape[2], 0.0, precision)
    if need_value:
        d_value = block_spmm(weights, grad, index, not transpose, value.shape[2], precision)
    return d_weights, d_value, [None] * len(index), None, None, None


block_spmm.register_autograd(_backward, setup_context=_setup_context)


def spmm(weights: Tensor, value: Tensor, layout: BlockLayout, transpose: bool, output_length: int) -> Tensor:
    """Block-sparse times dense, ``[B, H, output_length, D]``, see :func:`sat.ops.spmm`."""
    pairs = value.shape[0] * value.shape[1]
    gradients = torch.is_grad_enabled() and (weights.requires_grad or value.requires_grad)
    index = value_index(layout, pairs, columns=transpose or gradients)
    return block_spmm(weights, value, index, transpose, output_length, matrix_precision(value.dtype))
