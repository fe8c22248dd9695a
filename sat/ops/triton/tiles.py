"""Floor 1: what several kernels do the same way: find their work, follow a list, load and store the rows of a matrix.

In kernels, a matrix ``[B, H, length, D]`` is a tuple: its pointer and four strides (:func:`strided`). Lists are a tuple
too (:func:`listed`). ``DIM`` is D padded to a power of two; BLOCK is the layout's block size and WIDTH the tokens of a
tile, which holds several blocks (a group), or is a PIECE of one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sat.ops.triton.index import COLUMN_BITS, COLUMN_MASK, TileIndex
from sat.ops.triton.launch import ALIKE, INTERPRETED, LOG2_E, jit_kernel, launch, padded

LOG2_E_KERNEL = tl.constexpr(LOG2_E)
_INTERPRETED = tl.constexpr(INTERPRETED)


def strided(x: Tensor) -> tuple[object, ...]:
    """A tensor for a kernel: its pointer and its strides."""
    return (x, *x.stride())


def broadcast(x: Tensor | None) -> tuple[object, ...] | None:
    """As :func:`strided`, with strides of 0 along dimensions of length 1."""
    if x is None:
        return None
    return (x, *(stride if length > 1 else 0 for stride, length in zip(x.stride(), x.shape, strict=True)))


def listed(index: TileIndex) -> tuple[object, ...]:
    """Lists for a kernel, in the order of :func:`list_sizes`."""
    sizes = (size * ALIKE.value for size in (index.groups, index.longest, index.capacity))
    return (*index, *sizes, index.head_stride)


def pieces(block_size: int, width: int) -> int:
    """Tiles that one block row (or column) is cut into."""
    return max(1, block_size // width)


def item_count(pairs: int, index: TileIndex, block_size: int, width: int, *, only_segments: bool = False) -> int:
    """Programs that :func:`find_item` expects, for ``pairs`` samples times heads."""
    places = index.capacity if only_segments else index.groups + index.capacity
    return pairs * places * pieces(block_size, width)


@triton.jit
def list_sizes(lists):
    """Groups of tiles, entries that a list has room for, most segments, and the step between heads' lists."""
    _, _, _, _, groups, longest, capacity, head_stride = lists
    return groups // ALIKE, longest // ALIKE, capacity // ALIKE, head_stride


@triton.jit
def find_item(lists, heads, PIECES: tl.constexpr, ONLY_SEGMENTS: tl.constexpr = False):
    """What this program computes: its sample and head, its tile, and the part of a list that it walks.

    The programs of one head stand together, so that they find its keys in the cache; segments of cut lists come first,
    because they are the longest. ``slot`` is the place of a partial result, -1 for a whole list. ``ONLY_SEGMENTS``
    leaves whole lists out.
    """
    entries, counts, segments, slots, _, _, _, _ = lists
    groups, longest, capacity, head_stride = list_sizes(lists)
    program = tl.program_id(0)
    items = capacity * PIECES if ONLY_SEGMENTS else (capacity + groups) * PIECES
    pair = program // items
    item = program % items
    sample, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    pair = pair.to(tl.int64)
    piece = item % PIECES
    place = item // PIECES
    list_head = head * head_stride
    if place < capacity:
        segment = segments + (list_head * capacity + place) * 3
        group = tl.load(segment)
        alive = group >= 0
        group = tl.maximum(group, 0)
        start = tl.load(segment + 1, mask=alive, other=0)
        stop = tl.load(segment + 2, mask=alive, other=0)
        slot = (pair * capacity + place) * PIECES + piece
    else:
        group = place - capacity
        alive = tl.load(slots + (list_head * groups + group) * 2 + 1) == 0
        start = 0
        stop = tl.load(counts + list_head * groups + group)
        slot = pair * 0 - 1
    entry_list = entries + (list_head * groups + group) * longest
    return alive, sample, head, pair, group * PIECES + piece, entry_list, start, stop, slot


@triton.jit
def narrow(entry_list, start, stop, first_block, last_block):
    """The part of a list from one block to before another; lists ascend."""
    before, within = 0, 0
    for place in range(start, stop, 256):
        lane = place + tl.arange(0, 256)
        block = tl.load(entry_list + lane, mask=lane < stop, other=0) & COLUMN_MASK
        before += tl.sum(((lane < stop) & (block < first_block)).to(tl.int32), 0)
        within += tl.sum(((lane < stop) & (block < last_block)).to(tl.int32), 0)
    return start + before, start + within


@triton.jit
def narrow_keys(
    entry_list,
    start,
    stop,
    key_ends,
    sample,
    last_query,
    key_length,
    BLOCK: tl.constexpr,
    KEY_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """The part of a row's list that holds keys which are real in this sample and not past ``last_query``."""
    if KEY_MASK or CAUSAL:
        first_block, last_block = 0, tl.cdiv(key_length, BLOCK)
        if KEY_MASK:
            first_block = tl.load(key_ends + sample * 2) // BLOCK
            last_block = tl.cdiv(tl.load(key_ends + sample * 2 + 1), BLOCK)
        if CAUSAL:
            last_block = tl.minimum(last_block, last_query // BLOCK + 1)
        start, stop = narrow(entry_list, start, stop, first_block, last_block)
    return start, stop


@triton.jit
def load_entry(entry_list, start, stop, step, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """What one step along a list reads of it; 0 past its end.

    Loops load it a step ahead, and carry it. Where an address comes from a load of the same step, the compiler spends
    its stages on that one, and no other load is under way while the matrix units work.
    """
    if BLOCK >= WIDTH:
        PARTS: tl.constexpr = BLOCK // WIDTH
        place = start + step // PARTS
    else:
        place = start + step * (WIDTH // BLOCK) + tl.arange(0, WIDTH) // BLOCK
    return tl.load(entry_list + place, mask=place < stop, other=0)


@triton.jit
def step_along(entry, start, stop, step, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Tokens ``[WIDTH]`` of one step along a list, which blocks of the group keep them, and whether they exist."""
    lane = tl.arange(0, WIDTH)
    if BLOCK >= WIDTH:
        PARTS: tl.constexpr = BLOCK // WIDTH
        token = (entry & COLUMN_MASK) * BLOCK + (step % PARTS) * WIDTH + lane
        bits = tl.full([WIDTH], 0, tl.int32) + (entry >> COLUMN_BITS)
        valid = tl.full([WIDTH], 1, tl.int1)
    else:
        place = start + step * (WIDTH // BLOCK) + lane // BLOCK
        valid = place < stop
        token = (entry & COLUMN_MASK) * BLOCK + lane % BLOCK
        bits = entry >> COLUMN_BITS
    return token, bits, valid


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b``, in float32."""
    if _INTERPRETED:  # the interpreter would multiply the bit patterns of bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load_lse(lse, pair, query, length, exists):
    """The two parts of each row's log-sum-exp, see ``_finish`` of the forward pass; +inf where there is no row."""
    place = lse + (pair * length + query) * 2
    return tl.load(place, mask=exists, other=float("inf")), tl.load(place + 1, mask=exists, other=0.0)


@triton.jit
def keeps(bits, lane, BLOCK: tl.constexpr):
    """Whether the block of a group that a lane stands in keeps an entry."""
    return ((bits >> (lane // BLOCK)) & 1) != 0


@triton.jit
def load_rows(x, sample, head, token, exists, D: tl.constexpr, DIM: tl.constexpr):
    """Rows ``[len(token), DIM]`` of a matrix; 0 where they do not exist and past D."""
    dim = tl.arange(0, DIM)
    row = x[0] + sample * x[1] + head * x[2] + token.to(tl.int64) * x[3]
    address = row[:, None] + dim.to(tl.int64)[None, :] * x[4]
    mask = exists[:, None] & (dim < D)[None, :] if D < DIM else exists[:, None]
    return tl.load(address, mask=mask, other=0.0)


@triton.jit
def load_part(x, sample, head, token, exists, start, D: tl.constexpr, PART: tl.constexpr):
    """Features ``[len(token), PART]`` of a matrix from ``start`` on; 0 where they do not exist."""
    dim = start + tl.arange(0, PART)
    row = x[0] + sample * x[1] + head * x[2] + token.to(tl.int64) * x[3]
    mask = exists[:, None] & (dim < D)[None, :] if D % PART != 0 else exists[:, None]
    return tl.load(row[:, None] + dim.to(tl.int64)[None, :] * x[4], mask=mask, other=0.0)


@triton.jit
def store_rows(x, sample, head, token, exists, values, D: tl.constexpr, DIM: tl.constexpr):
    """Write rows ``[len(token), DIM]`` of a matrix where they exist."""
    dim = tl.arange(0, DIM)
    row = x[0] + sample * x[1] + head * x[2] + token.to(tl.int64) * x[3]
    address = row[:, None] + dim.to(tl.int64)[None, :] * x[4]
    mask = exists[:, None] & (dim < D)[None, :] if D < DIM else exists[:, None]
    tl.store(address, values.to(x[0].dtype.element_ty), mask=mask)


@triton.jit
def real_tokens(mask, sample, token, exists, length):
    """Whether tokens exist and a padding mask (contiguous bytes) calls them real."""
    return tl.load(mask + sample * length + token, mask=exists, other=0) != 0


@triton.jit
def store_partial(partial, slot, values, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Write a segment's tile ``[WIDTH, DIM]``."""
    lane, dim = tl.arange(0, WIDTH), tl.arange(0, DIM)
    tl.store(partial + slot * WIDTH * DIM + lane[:, None] * DIM + dim[None, :], values)


@triton.jit
def load_partial(partial, slot, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Read a segment's tile ``[WIDTH, DIM]``."""
    lane, dim = tl.arange(0, WIDTH), tl.arange(0, DIM)
    return tl.load(partial + slot * WIDTH * DIM + lane[:, None] * DIM + dim[None, :])


@triton.jit
def segments_of(lists, head, pair, tile, PIECES: tl.constexpr):
    """First slot of a tile's segments, and how many there are: 0 where its list was not cut.

    Segment i lies ``i * PIECES`` after the first slot.
    """
    slots = lists[3]
    groups, _, capacity, head_stride = list_sizes(lists)
    place = slots + (head * head_stride * groups + tile // PIECES) * 2
    first = (pair * capacity + tl.load(place)) * PIECES + tile % PIECES
    return first, tl.load(place + 1)


@triton.jit
def find_segments(lists, heads, PIECES: tl.constexpr):
    """For a program that joins one tile's segments: its sample, head and tile, and :func:`segments_of` them."""
    groups, _, _, _ = list_sizes(lists)
    program = tl.program_id(0)
    pair = (program // (groups * PIECES)).to(tl.int64)
    tile = program % (groups * PIECES)
    sample, head = pair // heads, pair % heads
    first, parts = segments_of(lists, head, pair, tile, PIECES)
    return sample, head, pair, tile, first, parts


@jit_kernel
def _sum_segments_kernel(
    out,
    partial,
    lists,
    heads,
    length,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
):
    PIECES: tl.constexpr = BLOCK // WIDTH if BLOCK > WIDTH else 1
    sample, head, _, tile, first, parts = find_segments(lists, heads, PIECES)
    if parts == 0:
        return
    token = tile * WIDTH + tl.arange(0, WIDTH)
    acc = tl.zeros([WIDTH, DIM], tl.float32)
    for part in range(0, parts):
        acc += load_partial(partial, first + part * PIECES, WIDTH, DIM)
    store_rows(out, sample, head, token, token < length, acc, D, DIM)


def sum_segments(out: Tensor, partial: Tensor, index: TileIndex, block_size: int, width: int) -> None:
    """Write the tiles of ``out`` ``[B, H, length, D]`` whose lists were cut: their segments' partial results, added
    in order."""
    if index.capacity == 0:
        return
    batch, heads, length, dim = out.shape
    launch(
        _sum_segments_kernel,
        batch * heads * index.groups * pieces(block_size, width),
        strided(out),
        partial,
        listed(index),
        heads,
        length,
        BLOCK=block_size,
        WIDTH=width,
        D=dim,
        DIM=padded(dim),
    )


def empty_partial(like: Tensor, index: TileIndex, block_size: int, width: int, *shape: int) -> Tensor:
    """Room for the partial results of all segments, one ``shape`` each."""
    batch, heads = like.shape[:2]
    slots = batch * heads * index.capacity * pieces(block_size, width)
    return like.new_empty(slots, *shape, dtype=torch.float32)
