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
        self._unscaled: dict[Optimizer, list[Any]] = {}
        self._hooks: list[Any] = []

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Act on these optimizers, and on no others any more."""
        self.detach()  # of a training that was broken off
        for optimizer in optimizers:
            self._hooks.append(optimizer.register_step_pre_hook(self._scale))
            self._hooks.append(optimizer.register_step_post_hook(self._restore))

    def detach(self) -> None:
        """Take the hooks off the optimizers; a step that failed has not restored its learning rate."""
        for optimizer in list(self._unscaled):
            self._restore(optimizer)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _scale(self, optimizer: Optimizer, *_: Any) -> None:
        # Once: an optimizer whose step calls its parent's may run its hooks for both, and what a step that failed left
        # is not to be scaled again.
        if self.applies() and optimizer not in self._unscaled:
            self._unscaled[optimizer] = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * self.factor

    def _restore(self, optimizer: Optimizer, *_: Any) -> None:
        for group, lr in zip(optimizer.param_groups, self._unscaled.pop(optimizer, []), strict=False):
            group["lr"] = lr
