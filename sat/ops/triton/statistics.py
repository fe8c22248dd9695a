"""Floor 1: score statistics in Triton, from queries and keys alone: nothing of the size of all heads' scores is held.

The weights are made twice. The first pass leaves each row's log-sum-exp (or a dense forward pass has left it already);
the second walks all heads and samples for one tile of the score matrix and keeps only sums, each added in one order,
so that results are repeatable bit for bit.

Shapes: B batch, H heads, L queries, S keys, D head dimension, b block size, M x N blocks. In kernels, a tile of the
scores is ``[ROWS, COLUMNS]`` or ``[TILE, TILE]``; one matrix product takes PART features.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sat.ops.autocast import without_autocast
from sat.ops.moments import skewness_from_moments
from sat.ops.torch_operations import _block_areas
from sat.ops.triton.launch import LOG2_E, capability, jit_kernel, launch, matrix_precision, padded
from sat.ops.triton.masking import ends, real_bytes
from sat.ops.triton.tiles import dot, load_part, real_tokens, strided


@triton.jit
def _scores_by_parts(
    q,
    k,
    sample,
    head,
    query,
    key,
    real,
    inside,
    D: tl.constexpr,
    PART: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Products of queries and keys, some features at a time: exact float32 is unrolled along them, and would spill."""
    s = tl.zeros([query.shape[0], key.shape[0]], tl.float32)
    for start in tl.range(0, D, PART, num_stages=STAGES):
        b_q = load_part(q, sample, head, query, real, start, D, PART)  # [queries, PART]
        b_k = load_part(k, sample, head, key, inside, start, D, PART)  # [keys, PART]
        s = dot(b_q, tl.trans(b_k), s, PRECISION)
    return s


@jit_kernel
def _logsumexp_kernel(
    lse,
    q,
    k,
    key_mask,
    key_ends,
    query_mask,
    heads,
    query_length,
    key_length,
    scale,
    D: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    QUERY_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Log-sum-exp of one tile of rows, in base 2 like ``scale``; +inf for padded queries and rows without a key."""
    tiles = tl.cdiv(query_length, ROWS)
    pair, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    stop = key_length
    if CAUSAL:
        tile = tiles - 1 - tile  # the longest first, so that short ones fill the end
        stop = tl.minimum(stop, (tile + 1) * ROWS)
    sample, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    query = tile * ROWS + tl.arange(0, ROWS)
    exists = query < query_length
    real = exists
    if QUERY_MASK:
        real = real_tokens(query_mask, sample, query, exists, query_length)
        stop = tl.where(tl.max(real.to(tl.int32), 0) > 0, stop, 0)
    start = 0
    if KEY_MASK:  # tiles of padding at either end are not visited
        start = tl.load(key_ends + sample * 2) // COLUMNS * COLUMNS
        stop = tl.minimum(stop, tl.load(key_ends + sample * 2 + 1))
    if PART >= D:
        b_q = load_part(q, sample, head, query, exists, 0, D, PART)  # [ROWS, PART]

    m = tl.full([ROWS], -float("inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    for first in tl.range(start, stop, COLUMNS, num_stages=STAGES):
        key = first + tl.arange(0, COLUMNS)
        keep = key < key_length
        if PART >= D:
            b_k = load_part(k, sample, head, key, keep, 0, D, PART)  # [COLUMNS, PART]
            s = dot(b_q, tl.trans(b_k), tl.zeros([ROWS, COLUMNS], tl.float32), PRECISION)
        else:
            s = _scores_by_parts(q, k, sample, head, query, key, exists, keep, D, PART, PRECISION, STAGES)
        s *= scale
        if KEY_MASK:
            keep = real_tokens(key_mask, sample, key, keep, key_length)
        if RAGGED or KEY_MASK:
            s = tl.where(keep[None, :], s, -float("inf"))
        if CAUSAL:
            s = tl.where(key[None, :] <= query[:, None], s, -float("inf"))
        m_next = tl.maximum(m, tl.max(s, 1))
        # A finite pivot: rows that have seen no key yet must not give inf - inf.
        pivot = tl.where(m_next == -float("inf"), 0.0, m_next)
        norm = norm * tl.exp2(m - pivot) + tl.sum(tl.exp2(s - pivot[:, None]), 1)
        m = m_next
    dead = (norm == 0.0) | (real == 0)
    b_lse = tl.where(dead, float("inf"), m + tl.log2(tl.where(dead, 1.0, norm)))
    tl.store(lse + pair.to(tl.int64) * query_length + query, b_lse, mask=exists)


@triton.jit
def _weights(
    q,
    k,
    key_mask,
    p_lse,
    sample,
    head,
    query,
    key,
    real,
    inside,
    key_length,
    scale,
    D: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
    KEY_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Weights ``[TILE, TILE]`` of one head of one sample, 0 at padded keys."""
    if PART >= D:
        b_q = load_part(q, sample, head, query, real, 0, D, PART)  # [TILE, PART]
        b_k = load_part(k, sample, head, key, inside, 0, D, PART)
        s = dot(b_q, tl.trans(b_k), tl.zeros([TILE, TILE], tl.float32), PRECISION)
    else:
        s = _scores_by_parts(q, k, sample, head, query, key, real, inside, D, PART, PRECISION, STAGES)
    b_lse = tl.load(p_lse, mask=real, other=float("inf"))
    p = tl.exp2(s * scale - b_lse[:, None])
    if KEY_MASK:
        p = tl.where(real_tokens(key_mask, sample, key, inside, key_length)[None, :], p, 0.0)
    return p


@jit_kernel
def _statistics_kernel(
    lse,
    q,
    k,
    key_mask,
    key_ends,
    pooled,
    moments,
    matrix,
    batch,
    heads,
    query_length,
    key_length,
    scale,
    D: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
    CELL: tl.constexpr,
    KEY_MASK: tl.constexpr,
    QUERY_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    MATRIX: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of the score matrix: its cells' sums for each head, its values, and their mean and power sums."""
    CELLS: tl.constexpr = TILE // CELL
    tile = tl.program_id(0)
    row = tile // tl.cdiv(key_length, TILE)
    column = tile % tl.cdiv(key_length, TILE)
    query = row * TILE + tl.arange(0, TILE)
    key = column * TILE + tl.arange(0, TILE)
    real, inside = query < query_length, key < key_length
    valid = real[:, None] & inside[None, :]
    seen = valid
    steps = heads * batch
    if CAUSAL:
        seen = valid & (key[None, :] <= query[:, None])
        steps = tl.where(column <= row, steps, 0)

    acc = tl.zeros([TILE, TILE], tl.float32)
    total = tl.zeros([TILE, TILE], tl.float32)
    # One loop over heads and samples, so that the next head's first loads are under way during the last sample.
    for step in tl.range(0, steps, num_stages=STAGES):
        head, sample = (step // batch).to(tl.int64), (step % batch).to(tl.int64)
        p_lse = lse + (sample * heads + head) * query_length + query
        # A tile that holds nothing but this sample's padding is not computed.
        alive = True
        if QUERY_MASK:
            b_lse = tl.load(p_lse, mask=real, other=float("inf"))
            alive = tl.max((b_lse != float("inf")).to(tl.int32), 0) > 0
        if KEY_MASK:
            reached = column * TILE < tl.load(key_ends + sample * 2 + 1)
            reached = reached & ((column + 1) * TILE > tl.load(key_ends + sample * 2))
            alive = alive & reached if QUERY_MASK else reached
        if alive:
            acc += _weights(
                q,
                k,
                key_mask,
                p_lse,
                sample,
                head,
                query,
                key,
                real,
                inside,
                key_length,
                scale,
                D,
                PART,
                TILE,
                KEY_MASK,
                PRECISION,
                STAGES,
            )
        if step % batch == batch - 1:
            # What lies past the end or in the future is any number until here, where it becomes 0 once a head.
            acc = tl.where(seen, acc, 0.0)
            total += acc
            cells = tl.sum(tl.sum(tl.reshape(acc, [CELLS, CELL, CELLS, CELL]), 3), 1)
            rows, columns = tl.cdiv(query_length, CELL), tl.cdiv(key_length, CELL)
            cell_row = row * CELLS + tl.arange(0, CELLS)
            cell_column = column * CELLS + tl.arange(0, CELLS)
            exists = (cell_row < rows)[:, None] & (cell_column < columns)[None, :]
            p_cells = pooled + (head * rows + cell_row)[:, None] * columns + cell_column[None, :]
            tl.store(p_cells, cells / batch, mask=exists)
            acc = tl.zeros([TILE, TILE], tl.float32)

    x = total / (heads * batch)
    if MATRIX:
        tl.store(matrix + query.to(tl.int64)[:, None] * key_length + key[None, :], x, mask=valid)
    # Power sums about the mean of this tile: nothing cancels in float32, also where all values are nearly the same.
    height = tl.minimum(query_length - row * TILE, TILE)
    width = tl.minimum(key_length - column * TILE, TILE)
    mean = tl.sum(tl.sum(x, 1), 0) / (height * width)
    x = tl.where(valid, x - mean, 0.0)
    square = x * x
    p_moments = moments + tile.to(tl.int64) * 4
    tl.store(p_moments, mean)
    tl.store(p_moments + 1, tl.sum(tl.sum(x, 1), 0))
    tl.store(p_moments + 2, tl.sum(tl.sum(square, 1), 0))
    tl.store(p_moments + 3, tl.sum(tl.sum(square * x, 1), 0))


class Parameters(NamedTuple):
    """Launch parameters of both kernels."""

    tile: int  # edge of a tile of scores
    part: int  # features that one matrix product takes
    warps: int
    stages: int


def _parameters(head_dim: int, dtype: torch.dtype, precision: str, device: tuple[int, int], masked: bool) -> Parameters:
    """What was compiled without spills for compute capabilities 8.0, 9.0 and 10.0."""
    dim = padded(head_dim)
    if dtype == torch.float32:
        if dim <= 32:
            return Parameters(64, dim, 8, 1)
        if precision == "tf32" and dim <= 128:
            return Parameters(64, dim, 8, 2)
        if device[0] == 9:
            return Parameters(64, 32, 8, 2)
        return Parameters(32, 16, 4, 1 if masked and device[0] == 10 else 2)
    if device[0] == 10:
        return Parameters(64, dim, 8, {64: (1, 2), 128: (2, 1), 256: (1, 1)}.get(dim, (3, 3))[masked])
    if dim == 256 and device[0] != 9:
        return Parameters(64, dim, 8, 1)
    return Parameters(64, dim, 8, 3 if dim == 64 or (dim < 64 and device[0] == 9) else 2)


@torch.library.custom_op("sat::attention_statistics_triton", mutates_args=())
@without_autocast
def attention_statistics(
    query: Tensor,
    key: Tensor,
    block_size: int,
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    score_matrix: bool,
    logsumexp: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled means, skewness and (or empty) the score matrix.

    ``logsumexp`` is ``[B, H, L]`` float32, the natural logarithm of each row's sum of exponentials, as dense attention
    with the same masks and scale has left it; rows that are -inf or +inf there have no weights.
    """
    batch, heads, query_length, head_dim = query.shape
    key_length = key.shape[2]
    precision = matrix_precision(query.dtype)
    key_mask, query_mask = real_bytes(key_padding_mask), real_bytes(query_padding_mask)
    masked = key_mask is not None or query_mask is not None
    tile, part, warps, stages = _parameters(head_dim, query.dtype, precision, capability(query.device), masked)
    key_ends, _ = ends(key_mask)
    common = {
        "D": head_dim,
        "PART": part,
        "KEY_MASK": key_mask is not None,
        "QUERY_MASK": query_mask is not None,
        "CAUSAL": is_causal,
        "PRECISION": precision,
        "STAGES": stages,
        "num_warps": warps,
        "num_stages": stages,
    }
    if logsumexp is not None:
        lse = torch.where(logsumexp == -math.inf, math.inf, logsumexp.float() * LOG2_E).contiguous()
        if query_padding_mask is not None:
            lse.masked_fill_(~query_padding_mask[:, None], math.inf)
    else:
        lse = query.new_empty(batch, heads, query_length, dtype=torch.float32)
        launch(
            _logsumexp_kernel,
            batch * heads * triton.cdiv(query_length, tile),
            lse,
            strided(query),
            strided(key),
            key_mask,
            key_ends,
            query_mask,
            heads,
            query_length,
            key_length,
            scale * LOG2_E,
            ROWS=tile,
            COLUMNS=tile,
            RAGGED=key_length % tile != 0,
            **common,
        )
    cell = min(block_size, tile)
    tiles = triton.cdiv(query_length, tile) * triton.cdiv(key_length, tile)
    shape = heads, triton.cdiv(query_length, cell), triton.cdiv(key_length, cell)
    # Tiles in the causal future are not visited: their cells stay 0.
    pooled = (query.new_zeros if is_causal else query.new_empty)(shape, dtype=torch.float32)
    moments = query.new_empty(tiles, 4, dtype=torch.float32)
    matrix = query.new_empty((query_length, key_length) if score_matrix else (0,), dtype=torch.float32)
    launch(
        _statistics_kernel,
        tiles,
        lse,
        strided(query),
        strided(key),
        key_mask,
        key_ends,
        pooled,
        moments,
        matrix,
        batch,
        heads,
        query_length,
        key_length,
        scale * LOG2_E,
        TILE=tile,
        CELL=cell,
        MATRIX=score_matrix,
        **common,
    )
    if cell < block_size:
        group = block_size // cell
        pooled = F.pad(pooled, (0, -shape[2] % group, 0, -shape[1] % group))
        pooled = pooled.unflatten(2, (-1, group)).unflatten(1, (-1, group)).sum((2, 4))
    pooled = pooled / _block_areas(query_length, key_length, block_size, query.device)
    areas = _block_areas(query_length, key_length, tile, query.device).flatten()
    return pooled, _skewness(moments, areas).float(), matrix


def _skewness(moments: Tensor, counts: Tensor) -> Tensor:
    """Skewness over all tiles from ``[tiles, 4]``: each one's mean, and its power sums about that mean."""
    mean, first, second, third = moments.double().unbind(1)
    counts = counts.double()
    size = counts.sum()
    overall = (counts * mean + first).sum() / size
    shift = mean - overall
    second_all = second + shift * (2 * first + shift * counts)
    third_all = third + shift * (3 * second + shift * (3 * first + shift * counts))
    return skewness_from_moments(overall, second_all.sum() / size, third_all.sum() / size)


@attention_statistics.register_fake
def _(
    query: Tensor,
    key: Tensor,
    block_size: int,
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    score_matrix: bool,
    logsumexp: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = query.shape[2], key.shape[2]
    blocks = [(length + block_size - 1) // block_size for length in lengths]
    return (
        query.new_empty(query.shape[1], *blocks, dtype=torch.float32),
        query.new_empty((), dtype=torch.float32),
        query.new_empty(lengths if score_matrix else (0,), dtype=torch.float32),
    )
