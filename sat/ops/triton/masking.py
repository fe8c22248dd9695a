"""Floor 1: padding, bias and dropout in the fused kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sat.ops.triton.launch import launch
from sat.ops.triton.tiles import LOG2_E_KERNEL

# Philox4x32 with 7 rounds passes all statistical tests (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
# 2011, table 2); Triton's default is 10.
PHILOX_ROUNDS = tl.constexpr(7)


@triton.jit
def bias_tile(bias, sample, head, query, key, exists):
    """Bias of queries and keys that broadcast to a tile, in base 2."""
    address = bias[0] + sample * bias[1] + head * bias[2] + query.to(tl.int64) * bias[3] + key.to(tl.int64) * bias[4]
    return tl.load(address, mask=exists, other=0.0).to(tl.float32) * LOG2_E_KERNEL


@triton.jit
def dropout_keeps(seed, pair, query, key, p):
    """True where dropout keeps a weight: a function of its position, so the same in every kernel that asks."""
    zero = query * 0 + key * 0
    random, _, _, _ = tl.philox(tl.load(seed), zero + key, zero + query, zero + pair.to(tl.int32), zero, PHILOX_ROUNDS)
    return tl.uint_to_uniform_float(random) >= p


@triton.jit
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
    chunk = min(1024, max(16, triton.next_power_of_2(length)))
    launch(_ends_kernel, batch, mask, found, seen, length, CHUNK=chunk, COUNT=count)
    return found, seen
