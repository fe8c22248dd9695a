"""Counting: operations, bytes, floors and the density at which sparse and dense attention take equally long."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

BACKWARD = 2.5  # operations of the backward pass over those of the forward: five products for two


def forward_operations(kept_blocks: int, block_size: int, head_dim: int, batch: int) -> int:
    """Floating-point operations of attention on the kept blocks (over all heads): two products of two each."""
    return 4 * kept_blocks * block_size**2 * head_dim * batch


def least_bytes(tokens: int, heads: int, head_dim: int, batch: int, item_bytes: int, *, backward: bool) -> int:
    """Every input read once and every output written once.

    Forward: query, key, value in, output out. Backward: these four and the output's gradient in, three gradients out.
    """
    return (8 if backward else 4) * tokens * heads * head_dim * batch * item_bytes


def floor_ms(operations: float, moved_bytes: float, tflops: float, terabytes: float) -> float:
    """No version runs faster: the larger of operations over the matrix rate and bytes over the bandwidth."""
    return 1e3 * max(operations / (tflops * 1e12), moved_bytes / (terabytes * 1e12))


def break_even(densities: Sequence[float], sparse_ms: Sequence[float], dense_ms: Sequence[float]) -> float | None:
    """The density at which sparse attention stops being faster, interpolated; None if that is in no interval.

    Args:
        densities: ascending.
        sparse_ms: times of sparse attention at these densities.
        dense_ms: times of dense attention, measured beside them.
    """
    lead = [sparse - dense for sparse, dense in zip(sparse_ms, dense_ms, strict=True)]
    points = list(zip(densities, lead, strict=True))
    for (left, behind), (right, ahead) in pairwise(points):
        if behind <= 0 < ahead:
            return left - behind * (right - left) / (ahead - behind)
    return None
