"""Floor 1: the kept blocks of ``query @ key^T`` in Triton, and where the values of a block lie.

Block values are ``[B, nnz, b, b]`` in (head, row, column) order: those of a block row lie one after another in the
order of its list, those of a block column are found through a table of numbers. In kernels, a tile of them is
``[ROWS, COLUMNS]``: rows of one block row, or of a PIECE of it, by the columns of several blocks or of part of one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sat.layout import BlockLayout
from sat.ops.autocast import without_autocast
from sat.ops.triton.index import TileIndex, kept_with, tile_index
from sat.ops.triton.launch import ALIKE, jit_kernel, launch, matrix_precision, padded
from sat.ops.triton.parameters import tile
from sat.ops.triton.tiles import dot, find_item, item_count, listed, load_entry, load_rows, step_along, strided


@triton.jit
def block_number(numbers, head, row, column):
    """Which of all values the block of a (block) row and column is; for column 0, where the row's values begin."""
    table, stride_head, stride_row, shared = numbers
    place = table + head * (stride_head // ALIKE) + row.to(tl.int64) * (stride_row // ALIKE) + column
    return head * (shared // ALIKE) + tl.load(place).to(tl.int64)


@triton.jit
def values_along(first, start, step, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Block numbers ``[WIDTH]`` and columns inside of the block, of one step along a row's list.

    ``first`` is the number of the list's first block. The steps are those of ``step_along``.
    """
    lane = tl.arange(0, WIDTH)
    if BLOCK >= WIDTH:
        PARTS: tl.constexpr = BLOCK // WIDTH
        number = tl.full([WIDTH], 0, tl.int64) + (first + start + step // PARTS)
        column = (step % PARTS) * WIDTH + lane
    else:
        number = first + (start + step * (WIDTH // BLOCK) + lane // BLOCK)
        column = lane % BLOCK
    return number, column


@triton.jit
def value_addresses(values, sample, number, row, column):
    """Addresses ``[len(row), len(column)]`` of values; each column has the number of its block."""
    columns = number * values[2] + column.to(tl.int64) * values[4]
    return values[0] + sample * values[1] + row.to(tl.int64)[:, None] * values[3] + columns[None, :]


@triton.jit
def write_zeros(out, sample, query, first, start, stop, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros for some rows of the blocks of a part of a list."""
    zeros = tl.zeros([ROWS, COLUMNS], out[0].dtype.element_ty)
    for step in range(0, tl.cdiv((stop - start) * BLOCK, COLUMNS)):
        number, column = values_along(first, start, step, BLOCK, COLUMNS)
        address = value_addresses(out, sample, number, query % BLOCK, column)
        tl.store(address, zeros, mask=(number < first + stop)[None, :])


@jit_kernel
def _sddmm_kernel(
    q,
    k,
    out,
    numbers,
    lists,
    heads,
    query_length,
    key_length,
    fill,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Blocks of one tile of queries and its list of key blocks, or a segment of it."""
    PIECES: tl.constexpr = BLOCK // ROWS
    alive, sample, head, _pair, tile, entry_list, start, stop, _slot = find_item(lists, heads, PIECES)
    if not alive:
        return
    query = tile * ROWS + tl.arange(0, ROWS)
    exists = query < query_length
    first = block_number(numbers, head, tile // PIECES, 0)
    b_q = load_rows(q, sample, head, query, exists, D, DIM)  # [ROWS, DIM]
    entry = load_entry(entry_list, start, stop, 0, BLOCK, COLUMNS)
    for step in tl.range(0, tl.cdiv((stop - start) * BLOCK, COLUMNS), num_stages=STAGES):
        key, _bits, valid = step_along(entry, start, stop, step, BLOCK, COLUMNS)
        entry = load_entry(entry_list, start, stop, step + 1, BLOCK, COLUMNS)
        inside = valid & (key < key_length)
        b_k = load_rows(k, sample, head, key, inside, D, DIM)  # [COLUMNS, DIM]
        s = dot(b_q, tl.trans(b_k), None, PRECISION)  # [ROWS, COLUMNS]
        s = tl.where(exists[:, None] & inside[None, :], s, fill)
        number, column = values_along(first, start, step, BLOCK, COLUMNS)
        address = value_addresses(out, sample, number, query % BLOCK, column)
        tl.store(address, s.to(out[0].dtype.element_ty), mask=valid[None, :])


def numbered(numbers: Tensor, heads: int, nnz: int) -> tuple[object, ...]:
    """The table of :func:`block_numbers` for a kernel: heads that share a layout come one after another."""
    layouts, rows, columns = numbers.shape
    per_head = layouts > 1
    steps = rows * columns if per_head else 0, columns, 0 if per_head else nnz // heads
    return numbers, *(step * ALIKE.value for step in steps)


@torch.library.custom_op("sat::sddmm_triton", mutates_args=())
@without_autocast
def block_sddmm(
    query: Tensor, key: Tensor, index: list[Tensor], nnz: int, block_size: int, fill: float, precision: str
) -> Tensor:
    """``[B, nnz, b, b]``, with nnz counted over all heads. ``index`` is that of :func:`value_index`."""
    batch, heads, query_length, dim = query.shape
    out = query.new_empty(batch, nnz, block_size, block_size)
    rows = TileIndex(*index[1:5])
    shape = tile("sddmm", block_size, dim, query.dtype, query.device)
    tile_rows = min(shape.rows, block_size)
    launch(
        _sddmm_kernel,
        item_count(batch * heads, rows, block_size, tile_rows),
        strided(query),
        strided(key),
        strided(out),
        numbered(index[0], heads, nnz),
        listed(rows),
        heads,
        query_length,
        key.shape[2],
        fill,
        BLOCK=block_size,
        D=dim,
        DIM=padded(dim),
        ROWS=tile_rows,
        COLUMNS=shape.columns,
        PRECISION=precision,
        STAGES=shape.stages,
        num_warps=shape.warps,
    )
    return out


@block_sddmm.register_fake
def _(
    query: Tensor, key: Tensor, index: list[Tensor], nnz: int, block_size: int, fill: float, precision: str
) -> Tensor:
    return query.new_empty(query.shape[0], nnz, block_size, block_size)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    query, key, index, _, _, _, precision = inputs
    ctx.save_for_backward(query, key, *index)
    ctx.precision = precision  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
    from sat.ops.triton.spmm import block_spmm  # here, because each of the two is the gradient of the other

    query, key, *index = ctx.saved_tensors  # type: ignore[attr-defined]
    need_query, need_key, *_ = ctx.needs_input_grad  # type: ignore[attr-defined]
    precision = ctx.precision  # type: ignore[attr-defined]
    d_query = block_spmm(grad, key, index, False, query.shape[2], precision) if need_query else None
    d_key = block_spmm(grad, query, index, True, key.shape[2], precision) if need_key else None
    return d_query, d_key, [None] * len(index), None, None, None, None


block_sddmm.register_autograd(_backward, setup_context=_setup_context)


def block_numbers(layout: BlockLayout) -> Tensor:
    """How many blocks lie before each, ``[X, M, N]`` int32: the number of a kept block among the values."""

    def count() -> Tensor:
        kept = layout.mask.to(torch.int32, memory_format=torch.contiguous_format)
        return kept.flatten().cumsum(0, dtype=torch.int32).view(kept.shape) - kept

    return kept_with(layout, "block_numbers", count)


def value_index(layout: BlockLayout, pairs: int, columns: bool) -> list[Tensor]:
    """What the kernels need to find block values: the table of numbers, the lists of rows and, by choice, of columns.

    ``pairs`` samples times heads will walk the lists.
    """
    index = [block_numbers(layout), *tile_index(layout, layout.block_size, pairs)]
    return [*index, *tile_index(layout, layout.block_size, pairs, transposed=True)] if columns else index


def sddmm(query: Tensor, key: Tensor, layout: BlockLayout, fill: float) -> Tensor:
    """Kept blocks of ``query @ key^T``, see :func:`sat.ops.sddmm`; positions past the end hold ``fill``."""
    batch, heads = query.shape[:2]
    gradients = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    index = value_index(layout, batch * heads, columns=gradients)
    nnz = layout.nnz * (heads // layout.num_heads)
    return block_sddmm(query, key, index, nnz, layout.block_size, fill, matrix_precision(query.dtype))
