"""Floor 2: whether the sparse phase keeps up with the dense one, by the loss on validation data."""

from __future__ import annotations

import logging
import math
from typing import Any

logger = logging.getLogger(__name__)


class Guard:
    """Compares the validation losses of the sparse phase with the best of the dense phase.

    Args:
        margin: by which the loss may be worse; None: it is never too bad.
        patience: validations in a row at which it is worse.
    """

    def __init__(self, margin: float | None, patience: int) -> None:
        self.margin, self.patience = margin, patience
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.best_dense_loss, self.latest_loss, self.worse = math.inf, math.nan, 0
        self._has_said = False

    @property
    def alarmed(self) -> bool:
        """Whether the loss has been worse for too long."""
        return self.margin is not None and self.worse >= self.patience

    def in_dense_phase(self, loss: float) -> None:
        """Take in a loss while all layers are dense."""
        if loss < self.best_dense_loss:
            self.best_dense_loss = loss

    def in_sparse_phase(self, loss: float, says: bool) -> None:
        """Take in a loss once all layers are sparse.

        Args:
            loss: of the validation data.
            says: whether this process is the one that warns.
        """
        if self.margin is None:
            return
        if self.best_dense_loss == math.inf:
            if says and not self._has_said:
                self._has_said = True
                logger.warning(
                    "guard=%g does nothing: there was no validation in the dense phase to compare with; validate more "
                    "often, or raise min_dense_steps", self.margin,
                )  # fmt: skip
            return
        # A loss of NaN is not within the margin either.
        self.worse = 0 if loss <= self.best_dense_loss + self.margin else self.worse + 1
        self.latest_loss = loss

    def state_dict(self) -> dict[str, Any]:
        """Numbers."""
        return {"best_dense_loss": self.best_dense_loss, "worse": self.worse, "latest_loss": self.latest_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, or nothing."""
        self.best_dense_loss, self.worse = state.get("best_dense_loss", math.inf), state.get("worse", 0)
        self.latest_loss = state.get("latest_loss", math.nan)
