"""Floor 1: padding, bias and dropout in the fused kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sat.ops.triton.launch import ALIKE, chunk, jit_kernel, launch
from sat.ops.triton.tiles import LOG2_E_KERNEL


@triton.jit
def bias_tile(bias, sample, head, query, key, exists):
    """Bias of queries and keys that broadcast to a tile, in base 2."""
    address = bias[0] + sample * bias[1] + head * bias[2] + query.to(tl.int64) * bias[3] + key.to(tl.int64) * bias[4]
    x = tl.load(address, mask=exists, other=0.0).to(tl.float32)
    # The lowest float32, a usual mask, must not become -inf by the change of base: a row of it is a row with keys.
    return tl.where(x > -float("inf"), tl.maximum(x * LOG2_E_KERNEL, -3.4028234e38), x)


@triton.jit
def count_users(users):
    """How often a value of the bias is used; in 64 bits, because one that all scores share is used as often as that."""
    one = tl.full([], 1, tl.int64)
    return one * (users[0] // ALIKE) * (users[1] // ALIKE) * (users[2] // ALIKE) * (users[3] // ALIKE)


@triton.jit
def bias_user(work, own_tiles, bias_heads, users):
    """For a program that has one tile of a bias gradient: sample, head and tiles of its ``work``-th user.

    ``own_tiles`` are the bias's own tiles of rows and of columns; ``users`` says how many samples, heads, row tiles and
    column tiles use each of its values.
    """
    heads_each, rows_each, columns_each = users[1] // ALIKE, users[2] // ALIKE, users[3] // ALIKE
    own_rows, own_columns = own_tiles[0] // ALIKE, own_tiles[1] // ALIKE
    program = tl.program_id(0)
    own = program // (own_columns * own_rows)
    one = tl.full([], 1, tl.int64)  # as many as count_users tells
    sample = own // bias_heads + work // (one * heads_each * rows_each * columns_each)
    head = own % bias_heads + work // (one * rows_each * columns_each) % heads_each
    row_tile = program // own_columns % own_rows + work // columns_each % rows_each
    column_tile = program % own_columns + work % columns_each
    return sample.to(tl.int64), head.to(tl.int64), row_tile.to(tl.int32), column_tile.to(tl.int32)


@triton.jit
def tile_used(
    mask,
    key_ends,
    sample,
    head,
    first_query,
    first_key,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    KEY_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Whether a tile of scores lies in a kept block, and not in this sample's padding or in the future altogether."""
    row, column = (first_query // BLOCK).to(tl.int64), (first_key // BLOCK).to(tl.int64)
    used = tl.load(mask[0] + head * mask[1] + row * mask[2] + column * mask[3]) != 0
    if KEY_MASK:
        used = used & (first_key + TILE > tl.load(key_ends + sample * 2))
        used = used & (first_key < tl.load(key_ends + sample * 2 + 1))
    if CAUSAL:
        used = used & (first_key < first_query + TILE)
    return used


@triton.jit
def store_bias_gradient(
    d_bias,
    acc,
    own_tiles,
    query_length,
    key_length,
    TILE: tl.constexpr,
    OVER_ROWS: tl.constexpr,
    OVER_COLUMNS: tl.constexpr,
):
    """Write a program's tile of the (contiguous) bias gradient, added up over what it broadcasts to."""
    program = tl.program_id(0)
    lane = tl.arange(0, TILE)
    own_rows, own_columns = own_tiles[0] // ALIKE, own_tiles[1] // ALIKE
    row = program // own_columns % own_rows * TILE + lane
    column = program % own_columns * TILE + lane
    rows, columns = query_length, key_length
    if OVER_ROWS:
        acc = tl.broadcast_to(tl.sum(acc, 0)[None, :], [TILE, TILE])
        rows = 1
    if OVER_COLUMNS:
        acc = tl.broadcast_to(tl.sum(acc, 1)[:, None], [TILE, TILE])
        columns = 1
    own = (program // (own_columns * own_rows)).to(tl.int64)
    address = d_bias + (own * rows + row[:, None]) * columns + column[None, :]
    tl.store(address, acc, mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def dropout_words(words, pair, place, exists, length):
    """Random words of queries, or of keys (whose places begin behind them), of one head of one sample."""
    found = tl.load(words + pair * length + place, mask=exists, other=0)
    return found.to(tl.uint32, bitcast=True)


@triton.jit
def dropout_keeps(query_words, key_words, p):
    """True where dropout keeps a weight: a function of its position, so the same in every kernel that asks.

    Along a row and along a column the sums modulo 2 are as random as the words are; the hash makes those of one row
    independent of those of another ("lowbias32" of Wellons, "Prospecting for hash functions", 2018). Random words for
    each weight, by Philox, would be most of what a kernel computes.
    """
    x = query_words ^ key_words
    x = tl.mul(x ^ (x >> 16), 0x7FEB352D, sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 15), 0x846CA68B, sanitize_overflow=False)
    x = x ^ (x >> 16)
    return x >= (tl.zeros([], tl.float32) + p * 4294967296.0).to(tl.uint32)


@jit_kernel
def _ends_kernel(mask, ends, seen, length, CHUNK: tl.constexpr, COUNT: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    first, last, count = length, 0, 0
    for start in range(0, length, CHUNK):
        token = start + tl.arange(0, CHUNK)
        real = tl.load(mask + sample * length + token, mask=token < length, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(real, token, length), 0))
        last = tl.maximum(last, tl.max(tl.where(real, token + 1, 0), 0))
        if COUNT:
            tl.store(seen + sample * length + token, count + tl.cumsum(real.to(tl.int32), 0), mask=token < length)
            count += tl.sum(real.to(tl.int32), 0)
    tl.store(ends + sample * 2, first)
    tl.store(ends + sample * 2 + 1, last)


def bias_tiles(
    bias_shape: Sequence[int], batch: int, heads: int, lengths: tuple[int, int], size: int
) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Programs, own tiles and users (see :func:`bias_user`) of the gradient of a bias ``[B|1, H|1, L|1, S|1]``."""
    tiles = [-(-length // size) for length in lengths]
    own = [count if length > 1 else 1 for count, length in zip(tiles, bias_shape[2:], strict=True)]
    users = (batch // bias_shape[0], heads // bias_shape[1], tiles[0] // own[0], tiles[1] // own[1])
    programs = bias_shape[0] * bias_shape[1] * own[0] * own[1]
    return programs, tuple(count * ALIKE.value for count in own), tuple(count * ALIKE.value for count in users)


def real_bytes(mask: Tensor | None) -> Tensor | None:
    """A padding mask as contiguous bytes."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def ends(mask: Tensor | None, count: bool = False) -> tuple[Tensor | None, Tensor | None]:
    """First real token of each sample and last + 1, ``[B, 2]`` int32; with ``count``, how many are real up to each.

    ``mask`` is contiguous bytes ``[B, length]``; the counts are ``[B, length]`` int32.
    """
    if mask is None:
        return None, None
    batch, length = mask.shape
    found = mask.new_empty(batch, 2, dtype=torch.int32)
    seen = mask.new_empty(batch, length, dtype=torch.int32) if count else None
    launch(_ends_kernel, batch, mask, found, seen, length, CHUNK=chunk(length), COUNT=count)
    return found, seen
