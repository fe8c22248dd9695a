"""Floor 1: the values that the operators return beside plain tensors."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AttentionStatistics(NamedTuple):
    """What the dense phase learns from one layer's queries and keys, see :func:`sat.ops.attention_statistics`.

    Attributes:
        pooled: ``[H, M, N]`` float32, mean attention weight of each block (over its elements and over the batch).
        skewness: ``[]`` float32, population skewness of all ``L * S`` entries of the score matrix.
        score_matrix: ``[L, S]`` float32, mean attention weight over batch and heads; None unless it was asked for.
        sensitivity: ``[H, M, N]`` float32, see :func:`sat.ops.block_sensitivity`; None unless a backward pass was
            watched, which the operator alone cannot do.
    """

    pooled: Tensor
    skewness: Tensor
    score_matrix: Tensor | None = None
    sensitivity: Tensor | None = None
