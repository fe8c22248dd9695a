"""Floor 1: the lists that the kernels walk: which blocks each tile visits, and how long lists are cut into segments.

A tile is one block row (or, transposed, one block column) or, for small blocks, a *group* of neighbouring ones that
together have enough rows for the matrix units. A group visits the union of its rows' blocks; each entry of its list
says which rows keep that block. Everything has a fixed shape and is made on the device without waiting for it, so that
it also works inside CUDA graphs.

A list much longer than the average (a global token, a vertical line) would keep the whole device waiting for one
program. It is cut into segments that run beside each other; each leaves a partial result, and a second kernel adds
these in order, so that results stay repeatable bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from sat.layout import BlockLayout
from sat.ops.triton.launch import chunk, jit_kernel, launch

# Entries hold the block column in the low bits and above them one bit for each row of the group.
COLUMN_BITS = tl.constexpr(24)
COLUMN_MASK = tl.constexpr(2**24 - 1)

# No list of up to so many entries is cut, and the length of a segment is a multiple of it.
SHORTEST_SEGMENT = 8
# A list is cut where it is longer than so many times the average of its head.
SPREAD = 4
# Segments of all lists together, at most: each has a partial result in memory.
MOST_SEGMENTS = 4096
# With so many lists for each entry that the longest can have, there is work enough beside it, and none is cut. A GPU
# runs some 400 programs at a time: a list of all entries then takes no longer than lists of 6 do by themselves.
ENOUGH_LISTS = 64


class TileIndex(NamedTuple):
    """Lists of one direction: of rows, or (transposed) of columns. X = 1 where all heads share the layout, else H.

    Attributes:
        entries: ``[X, groups, N]`` int32, ascending block columns, see ``COLUMN_BITS``; ``counts`` of them are written.
        counts: ``[X, groups]`` int32.
        segments: ``[X, capacity, 3]`` int32: group, first and last + 1 entry of each segment of a cut list; group -1
            where there are fewer.
        slots: ``[X, groups, 2]`` int32: first segment of a group's list, and how many it has, 0 if it was not cut.
    """

    entries: Tensor
    counts: Tensor
    segments: Tensor
    slots: Tensor

    @property
    def groups(self) -> int:
        """Tiles' groups a head."""
        return self.counts.shape[1]

    @property
    def longest(self) -> int:
        """Entries that a list has room for."""
        return self.entries.shape[2]

    @property
    def capacity(self) -> int:
        """Most segments a head."""
        return self.segments.shape[1]

    @property
    def head_stride(self) -> int:
        """Step from one head's lists to the next, in heads: 0 where all share one."""
        return int(self.counts.shape[0] > 1)


@jit_kernel
def _list_kernel(
    mask,
    entries,
    counts,
    stride_head,
    stride_row,
    stride_column,
    rows,
    columns,
    groups,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One group's list: its union of block columns, in ascending order."""
    program = tl.program_id(0)
    head = (program // groups).to(tl.int64)
    group = program % groups
    p_mask = mask + head * stride_head
    p_entries = entries + program.to(tl.int64) * columns
    count = 0
    for start in range(0, columns, CHUNK):
        column = start + tl.arange(0, CHUNK)
        bits = tl.zeros([CHUNK], tl.int32)
        for i in tl.static_range(GROUP):
            row = group * GROUP + i
            inside = (column < columns) & (row < rows)
            address = p_mask + row.to(tl.int64) * stride_row + column.to(tl.int64) * stride_column
            kept = tl.load(address, mask=inside, other=0) != 0
            bits = bits | (kept.to(tl.int32) << i)
        visited = (bits != 0).to(tl.int32)
        place = count + tl.cumsum(visited, 0) - visited
        tl.store(p_entries + place, column | (bits << COLUMN_BITS), mask=visited != 0)
        count += tl.sum(visited, 0)
    tl.store(counts + program, count)


@jit_kernel
def _segment_kernel(
    counts, segments, slots, groups, capacity, SPREAD: tl.constexpr, SHORTEST: tl.constexpr, CHUNK: tl.constexpr
):
    """One head's cut lists.

    A cut list is long, so there are fewer than ``2 * groups / SPREAD`` segments. Where that is still more than there is
    room for, they are made longer.
    """
    head = tl.program_id(0).to(tl.int64)
    p_counts, p_slots = counts + head * groups, slots + head * groups * 2
    p_segments = segments + head * capacity * 3
    for start in range(0, capacity, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        tl.store(p_segments + slot * 3, tl.full([CHUNK], -1, tl.int32), mask=slot < capacity)
    tl.debug_barrier()  # the segments written below go to places that other threads have just cleared
    total = tl.zeros([], tl.int64)
    for start in range(0, groups, CHUNK):
        group = start + tl.arange(0, CHUNK)
        total += tl.sum(tl.load(p_counts + group, mask=group < groups, other=0).to(tl.int64), 0)
    # At least SPREAD times the average, in whole multiples of the shortest.
    length = tl.cdiv(tl.cdiv(total * SPREAD, groups), SHORTEST) * SHORTEST
    length = tl.maximum(length, SHORTEST).to(tl.int32)
    needed = capacity + 1
    while needed > capacity:
        needed = 0
        for start in range(0, groups, CHUNK):
            group = start + tl.arange(0, CHUNK)
            count = tl.load(p_counts + group, mask=group < groups, other=0)
            needed += tl.sum(tl.where(count > length, tl.cdiv(count, length), 0), 0)
        length = tl.where(needed > capacity, length * 2, length)
    used = 0
    for start in range(0, groups, CHUNK):
        group = start + tl.arange(0, CHUNK)
        count = tl.load(p_counts + group, mask=group < groups, other=0)
        pieces = tl.where(count > length, tl.cdiv(count, length), 0)
        first = used + tl.cumsum(pieces, 0) - pieces
        tl.store(p_slots + group * 2, first, mask=group < groups)
        tl.store(p_slots + group * 2 + 1, pieces, mask=group < groups)
        for piece in range(0, tl.max(pieces, 0)):
            exists = piece < pieces
            address = p_segments + (first + piece) * 3
            tl.store(address, group, mask=exists)
            tl.store(address + 1, piece * length, mask=exists)
            tl.store(address + 2, tl.minimum((piece + 1) * length, count), mask=exists)
        used += tl.sum(pieces, 0)


@torch.library.custom_op("sat::tile_index", mutates_args=())
def _tile_index(mask: Tensor, group: int, transposed: bool, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if transposed:
        mask = mask.transpose(1, 2)
    heads, rows, columns = mask.shape
    out = _empty_index(mask, group, capacity)
    entries, counts, segments, slots = out
    groups = counts.shape[1]
    launch(
        _list_kernel,
        heads * groups,
        mask.view(torch.uint8),
        entries,
        counts,
        *mask.stride(),
        rows,
        columns,
        groups,
        GROUP=group,
        CHUNK=chunk(columns),
    )
    if capacity == 0:
        slots.zero_()
        return out
    launch(
        _segment_kernel,
        heads,
        counts,
        segments,
        slots,
        groups,
        capacity,
        SPREAD=SPREAD,
        SHORTEST=SHORTEST_SEGMENT,
        CHUNK=chunk(groups),
    )
    return out


def _empty_index(mask: Tensor, group: int, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, rows, columns = mask.shape
    groups = (rows + group - 1) // group
    shapes = ((heads, groups, columns), (heads, groups), (heads, capacity, 3), (heads, groups, 2))
    entries, counts, segments, slots = (mask.new_empty(shape, dtype=torch.int32) for shape in shapes)
    return entries, counts, segments, slots


@_tile_index.register_fake
def _(mask: Tensor, group: int, transposed: bool, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_index(mask.transpose(1, 2) if transposed else mask, group, capacity)


def kept_with(layout: BlockLayout, key: object, make: Callable[[], Any]) -> Any:
    """What ``make`` makes of a layout's mask, on first use; from then on what is kept with the layout.

    In a compiled or captured graph it is made anew each time: the graph must see a mask that changes, and must not
    point into memory that a layout may give back. Each CUDA stream has its own: nothing else would let it wait for what
    another one has only begun to make.
    """
    if torch.compiler.is_compiling() or (layout.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return make()
    if layout.device.type == "cuda":
        key = (key, torch.cuda.current_stream(layout.device).cuda_stream)
    if key in layout.derived:
        return layout.derived[key]
    with torch.inference_mode(False):  # made in evaluation, it must do for training
        made = make()
    # Tensors of another type only stand for real ones, in tracing.
    if all(type(x) is Tensor for x in (made if isinstance(made, tuple) else (made,))):
        layout.derived[key] = made
    return made


def tile_index(layout: BlockLayout, rows_per_tile: int, pairs: int, *, transposed: bool = False) -> TileIndex:
    """Lists for tiles of so many rows (transposed: columns), made on first use and kept with the layout.

    ``pairs`` samples times heads will walk them.
    """
    group = max(1, rows_per_tile // layout.block_size)
    blocks, longest = reversed(layout.shape) if transposed else layout.shape
    groups, capacity = (blocks + group - 1) // group, 0
    if pairs * groups < ENOUGH_LISTS * longest and longest > SHORTEST_SEGMENT and groups > SPREAD:
        # Fewer than groups / SPREAD lists can be that much longer than the average. Of each batch size powers of two,
        # because each capacity has lists of its own.
        room = MOST_SEGMENTS // pairs
        capacity = min(2 * groups // SPREAD, 1 << room.bit_length() - 1 if room else 0)
    return kept_with(
        layout,
        ("tile_index", group, transposed, capacity),
        lambda: TileIndex(*_tile_index(layout.mask, group, transposed, capacity)),
    )
