"""Floor 1: skewness, in float64, with one rule for what counts as constant."""

from __future__ import annotations

import torch
from torch import Tensor


def in_float64(x: Tensor) -> Tensor:
    """The same in float64: on the CPU where its own device has none (Apple's)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def skewness(matrix: Tensor) -> Tensor:
    """Population skewness over all entries, float64 ``[]``; see :func:`skewness_from_moments`."""
    values = in_float64(matrix.detach())
    mean = values.mean()
    centred = values - mean
    return skewness_from_moments(mean, centred.square().mean(), centred.pow(3).mean())


def skewness_from_moments(mean: Tensor, variance: Tensor, third: Tensor) -> Tensor:
    """``third / variance ** 1.5`` of central moments in float64; 0 for entries that are constant, NaN for NaN.

    Constant means: the standard deviation is within the float32 rounding of the mean. Attention weights are computed
    in float32, and what is left of a uniform matrix is rounding, whose skewness would be any number, however large.
    """
    constant = variance <= (torch.finfo(torch.float32).eps * mean).square()
    return torch.where(constant, 0.0, third / torch.where(constant, 1.0, variance).pow(1.5))
