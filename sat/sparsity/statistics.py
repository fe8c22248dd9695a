"""Floor 2: what is measured of a layer's attention, and how the measurements change over time.

Reductions here run in float64: the rule that ends the dense phase compares changes of about one percent.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sat.ops import moments


def skewness(matrix: Tensor) -> Tensor:
    """Population skewness over all entries of a matrix: ``mean(((x - mean) / std) ** 3)``.

    The same number as ``scipy.stats.skew(matrix, axis=None)``, except for a matrix that is constant up to float32
    rounding: SciPy gives nan or whatever the rounding happens to be, this function gives 0. Uniform attention has no
    tail on either side, and 0 keeps its layer dense, whereas a nan would have to be treated apart by everything that
    compares, averages or logs it.

    Args:
        matrix: any shape, for instance the score matrix ``[L, S]``.

    Returns:
        float64 ``[]``, on the device of the matrix.

    Source: Yoon et al., IEEE Access 12 (2024), the dense phase of SAT.
    """
    return moments.skewness(matrix)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Frobenius norm of ``a - b``, float64 ``[]``; both have the same shape.

    Source: Yoon et al., IEEE Access 12 (2024): the distance between a layer's successive score matrices.

    Raises:
        ValueError: the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"the distance is between matrices of one shape, got {list(a.shape)} and {list(b.shape)}")
    return torch.linalg.vector_norm(a.detach() - b.detach(), dtype=torch.float64)


def block_mass(pooled: Tensor, block_size: int, query_length: int, key_length: int) -> Tensor:
    """Share of a head's attention that lies in each block.

    A block's mean is weighed by the number of elements it really has: the last row and column may be partial.

    Args:
        pooled: ``[H, M, N]``, mean attention weight of each block.
        block_size: edge of a block in tokens.
        query_length: ``L``, in tokens.
        key_length: ``S``, in tokens.

    Returns:
        float64 ``[H, M, N]``; each head sums to 1 (to 0 where a head has no attention at all).

    Raises:
        ValueError: the number of blocks does not fit the lengths.
    """
    expected = (-(-query_length // block_size), -(-key_length // block_size))
    if pooled.dim() != 3 or tuple(pooled.shape[1:]) != expected:
        raise ValueError(
            f"{query_length} queries and {key_length} keys in blocks of {block_size} need pooled attention of "
            f"[heads, {expected[0]}, {expected[1]}], got {list(pooled.shape)}"
        )
    rows, columns = (_edges(length, block_size, pooled.device) for length in (query_length, key_length))
    mass = pooled.detach().double() * rows[:, None] * columns
    total = mass.sum((1, 2), keepdim=True)
    return mass / torch.where(total > 0, total, 1.0)


def captured_mass(pooled: Tensor, mask: Tensor, block_size: int, query_length: int, key_length: int) -> float:
    """Share of the attention mass that the kept blocks hold, mean over the heads.

    Args:
        pooled: ``[H, M, N]``, mean attention weight of each block.
        mask: bool ``[H, M, N]``, or ``[1, M, N]`` for a layout that all heads share.
        block_size: edge of a block in tokens.
        query_length: ``L``, in tokens.
        key_length: ``S``, in tokens.

    Returns:
        0 to 1.

    Raises:
        ValueError: the shapes do not fit each other or the lengths.
    """
    mass = _mass_per_layout(pooled, mask, block_size, query_length, key_length)
    return (mass * mask).sum().item() / mass.shape[0]


def best_mass(pooled: Tensor, mask: Tensor, block_size: int, query_length: int, key_length: int) -> float:
    """The largest share that as many blocks as the mask keeps could hold, mean over the heads.

    Each head may choose as many blocks as it has in the mask; for a shared mask one choice is made for all heads, on
    their mean. No constraint on the choice (diagonal, rows) is applied: this is what a constraint costs, too.
    Arguments, result and errors as for :func:`captured_mass`, which it bounds from above.
    """
    mass = _mass_per_layout(pooled, mask, block_size, query_length, key_length).flatten(1)
    ranked = mass.sort(dim=1, descending=True).values
    kept = torch.arange(mass.shape[1], device=mass.device) < mask.flatten(1).sum(1, keepdim=True)
    return (ranked * kept).sum().item() / mass.shape[0]


def _mass_per_layout(pooled: Tensor, mask: Tensor, block_size: int, query_length: int, key_length: int) -> Tensor:
    """Mass ``[G, M, N]``, averaged over the heads where they share one layout (then the mean over heads is G = 1)."""
    mass = block_mass(pooled, block_size, query_length, key_length)
    if mask.dtype != torch.bool or mask.shape[1:] != mass.shape[1:] or mask.shape[0] not in (1, mass.shape[0]):
        raise ValueError(
            f"the mask must be torch.bool, {list(mass.shape)} or {[1, *mass.shape[1:]]} like the pooled attention; "
            f"got {mask.dtype}, {list(mask.shape)}"
        )
    return mass.mean(0, keepdim=True) if mask.shape[0] == 1 else mass


def _edges(length: int, block_size: int, device: torch.device) -> Tensor:
    """Length of each block along one side, float64: ``block_size``, and what remains for the last one."""
    starts = torch.arange(0, length, block_size, device=device)
    return (length - starts).clamp(max=block_size).double()


_STATE = ("observations", "skewness", "distance", "relative_change", "score_matrix")


class LayerHistory:
    """Skewness and distance of one layer over its observations.

    ``skewness``, ``distance`` and ``relative_change`` hold what the criterion compares, thus after smoothing; with
    ``smoothing=0`` they are the last observation's own values, as in the paper.

    Smoothing is an exponential mean whose weights are normalised from the first observation on (as Adam's bias
    correction does). It acts on the *distances*, and the relative change is formed from the smoothed ones. Smoothing
    the relative change itself would not help: it is an absolute value, so noise does not cancel in it but adds up to a
    floor that never falls below the threshold. Noise does cancel in the distances, while a trend survives: distances
    that really shrink by 5 % a step shrink by 5 % a step after smoothing too, once the start has faded.

    Args:
        smoothing: weight of the past, 0 <= smoothing < 1; 0 is the paper's rule.

    Attributes:
        observations: number of observations so far.
        skewness: None before the first observation.
        distance: Frobenius norm between the last two score matrices; None before the second observation.
        relative_change: ``|d_t - d_(t-1)| / d_(t-1) * 100``, in percent; None before the third observation. Where
            ``d_(t-1)`` is 0: 0 if ``d_t`` is 0 as well (attention stands still), infinite otherwise.

    Source: Yoon et al., IEEE Access 12 (2024), the dense phase of SAT; smoothing is ours.
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        self.smoothing = smoothing
        self.observations = 0
        self.skewness: float | None = None
        self.distance: float | None = None
        self.relative_change: float | None = None
        self.score_matrix: Tensor | None = None

    def update(self, score_matrix: Tensor | None, skewness: float) -> None:
        """Take in one observation.

        The matrix is kept, on its device, until the next one; it must not be written to afterwards.

        Args:
            score_matrix: ``[L, S]``, mean attention weight over batch and heads; None where nothing depends on the
                distance, which then stays undefined.
            skewness: its population skewness.

        Raises:
            ValueError: the matrix has another shape than the one before.
        """
        current = None if score_matrix is None else score_matrix.detach()
        previous = self.score_matrix
        if previous is not None and current is not None:
            # After a restart the previous matrix may still lie where the checkpoint was loaded.
            new_distance = distance(current, previous.to(current.device)).item()
            smoothed = self._mix(self.distance, new_distance, self.observations - 1)
            if self.distance is not None:
                self.relative_change = _percent_change(self.distance, smoothed)
            self.distance = smoothed
        self.skewness = self._mix(self.skewness, float(skewness), self.observations)
        self.score_matrix = current
        self.observations += 1

    def _mix(self, mean: float | None, value: float, count: int) -> float:
        """The exponential mean of ``count`` earlier values, with one more."""
        if mean is None or self.smoothing == 0:
            return value
        # Normalised weights: s^i / sum(s^0 ... s^count), so the newest has (1 - s) / (1 - s^(count + 1)).
        weight = (1 - self.smoothing) / (1 - self.smoothing ** (count + 1))
        return mean + weight * (value - mean)

    def drop_matrix(self) -> None:
        """Forget the score matrix: after the transition nothing compares with it. The numbers stay."""
        self.score_matrix = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers; what is not defined yet is left out."""
        return {name: getattr(self, name) for name in _STATE if getattr(self, name) is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; ``smoothing`` stays as it was set here."""
        for name in _STATE:
            setattr(self, name, state.get(name))


def _percent_change(before: float, after: float) -> float:
    if before == 0:
        return 0.0 if after == 0 else math.inf
    return abs(after - before) / before * 100
