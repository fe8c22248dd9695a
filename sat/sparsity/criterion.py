"""Floor 2: when a layer is ready to leave the dense phase."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from sat.sparsity.statistics import LayerHistory


class Verdict(NamedTuple):
    """What the criterion says of one layer at one observation.

    Attributes:
        met: the layer is ready.
        streak: for how many observations in a row, this one included, both thresholds have been kept.
        missing: what is missing, for people; empty when the criterion is met.
    """

    met: bool
    streak: int
    missing: str


@dataclass(frozen=True)
class Criterion:
    """The paper's rule for one layer: skewed enough, and no longer changing.

    A layer is ready when ``skewness >= theta`` and the relative change of its distance is ``< delta`` percent, at
    ``patience`` observations in a row. With the defaults for smoothing and patience this is exactly the paper's rule.

    Args:
        theta: least skewness of the score matrix. The paper uses 1.7, and 1.3 for Yelp. None: any, as in SPION, the
            authors' earlier method, which waits for a delta of 15 between evaluations.
        delta: bound of the relative change, in percent, above 0. The paper uses 1.3.
        smoothing: weight of the past in the exponential means that the rule compares, 0 <= smoothing < 1; see
            :class:`LayerHistory` for what is smoothed and why.
        patience: observations in a row at which the rule must hold, at least 1.
        agreement: a rule in place of skewness and change, on what the choice is about: of the blocks that would be
            chosen now, this share would have been chosen ``agreement_lag`` observations ago, above 0 to 1; None: the
            paper's rule.
        agreement_lag: in observations, at least 1.

    Raises:
        ValueError: a value is out of range.

    Source: Yoon et al., IEEE Access 12 (2024), the transition of SAT; smoothing, patience and agreement are ours.
    """

    theta: float | None = 1.7
    delta: float = 1.3
    smoothing: float = 0.0
    patience: int = 1
    agreement: float | None = None
    agreement_lag: int = 10

    def __post_init__(self) -> None:
        if self.theta is not None and not math.isfinite(self.theta):
            raise ValueError(f"theta is a skewness and must be finite, got {self.theta}; the paper uses 1.3 to 1.7")
        if not self.delta > 0:
            raise ValueError(f"delta is in percent and must be above 0, got {self.delta}; the paper uses 1.3")
        if not 0 <= self.smoothing < 1:
            raise ValueError(
                f"smoothing must be at least 0 and below 1, got {self.smoothing}; 0 switches it off, 0.9 averages "
                f"about ten observations"
            )
        if self.agreement is not None and not 0 < self.agreement <= 1:
            raise ValueError(
                f"agreement is a share of the blocks and must be above 0 and at most 1, got {self.agreement}"
            )
        if self.agreement_lag < 1:
            raise ValueError(f"agreement_lag must be at least 1 observation, got {self.agreement_lag}")
        if self.patience < 1:
            raise ValueError(
                f"patience must be at least 1 observation, got {self.patience}; 1 lets a single observation decide"
            )

    @property
    def least_observations(self) -> int:
        """Of which the last is the first at which a layer can be ready."""
        known = self.agreement_lag + 1 if self.agreement is not None else 3  # a choice to compare with; a change
        return known + self.patience - 1

    def judge(self, history: LayerHistory, streak: int = 0, agreement: float | None = None) -> Verdict:
        """Judge a layer after its latest observation.

        Args:
            history: the layer's history.
            streak: the ``streak`` of the verdict on the observation before.
            agreement: of the blocks that would be chosen now with those chosen ``agreement_lag`` observations ago,
                0 to 1; None before there are so many.
        """
        missing = self._missing_thresholds(history) if self.agreement is None else self._missing_agreement(agreement)
        if missing:
            return Verdict(False, 0, "; ".join(missing))
        streak += 1
        if streak < self.patience:
            return Verdict(False, streak, f"thresholds kept for {streak} of {self.patience} observations in a row")
        return Verdict(True, streak, "")

    def _missing_agreement(self, agreement: float | None) -> list[str]:
        assert self.agreement is not None
        if agreement is None:
            return [f"the agreement is known once blocks have been chosen {self.agreement_lag + 1} times"]
        if agreement < self.agreement:
            return [f"agreement {_apart(agreement, self.agreement)} < {_bound(self.agreement)}"]
        return []

    def _missing_thresholds(self, history: LayerHistory) -> list[str]:
        if history.skewness is None:
            return ["no observation yet"]
        mean = "smoothed " if self.smoothing > 0 else ""
        missing = []
        if self.theta is not None and history.skewness < self.theta:
            missing.append(f"{mean}skewness {_apart(history.skewness, self.theta)} < {_bound(self.theta)}")
        if history.relative_change is None:
            missing.append(f"the change of the distance is known after 3 observations, so far {history.observations}")
        elif not history.relative_change < self.delta:
            missing.append(f"{mean}distance still changes by {history.relative_change:.2f} % >= {_bound(self.delta)} %")
        return missing


def _bound(value: float) -> str:
    """A bound as it was given, with two digits at least."""
    return f"{value:.2f}" if float(f"{value:.2f}") == value else f"{value:g}"


def _apart(value: float, bound: float) -> str:
    """``value`` with as many digits as it takes to be told from ``bound``: no "1.70 < 1.70"."""
    return next((text for digits in range(2, 10) if float(text := f"{value:.{digits}f}") < bound), str(value))
