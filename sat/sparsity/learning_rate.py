"""Floor 2: a factor of the learning rate that leaves optimizers and schedulers as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer


class LearningRateFactor:
    """Acts on optimizers for the duration of a step only, so that they and their schedulers live on unchanged.

    Args:
        factor: of the learning rate.
        applies: asked at each step, whether it is to act.
    """

    def __init__(self, factor: float, applies: Callable[[], bool]) -> None:
        self.factor, self.applies = factor, applies
        self._rates: dict[Optimizer, tuple[list[Any], list[Any]]] = {}  # of a step at work: before it, and in it
        self._hooks: list[Any] = []

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Act on these optimizers, and on no others any more."""
        self.detach()  # of a training that was broken off
        for optimizer in optimizers:
            self._hooks.append(optimizer.register_step_pre_hook(self._scale))
            self._hooks.append(optimizer.register_step_post_hook(self._restore))

    def detach(self) -> None:
        """Take the hooks off the optimizers; a step that failed has not restored its learning rate."""
        for optimizer in list(self._rates):
            self._restore(optimizer)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _scale(self, optimizer: Optimizer, *_: Any) -> None:
        if not self.applies():
            return
        rates = [group["lr"] for group in optimizer.param_groups]
        # Once: an optimizer whose step calls its parent's may run its hooks for both, and what a step that failed left
        # is not to be scaled again, unless a scheduler has set it since.
        if optimizer in self._rates and rates == self._rates[optimizer][1]:
            return
        scaled = [rate * self.factor for rate in rates]
        self._rates[optimizer] = rates, scaled
        self._set(optimizer, scaled)

    def _restore(self, optimizer: Optimizer, *_: Any) -> None:
        if optimizer in self._rates:
            self._set(optimizer, self._rates.pop(optimizer)[0])

    @staticmethod
    def _set(optimizer: Optimizer, rates: Iterable[Any]) -> None:
        for group, rate in zip(optimizer.param_groups, rates, strict=False):
            group["lr"] = rate
