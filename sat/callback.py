"""Floor 4: AdaptiveSparsity, learned sparsity in anyone's Lightning Trainer."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from sat.attention import AdaptiveAttention
from sat.ops import AttentionStatistics
from sat.sparsity import SparsityPhases, skewness


class AdaptiveSparsity(SparsityPhases, Callback):
    """Trains densely until the attention's statistics have settled, then gives every layer its block layout.

    Works in any LightningModule whose attention is :class:`sat.attention.AdaptiveAttention`. Its state lies in
    Lightning's checkpoints; a resumed run makes the decisions of one that was never interrupted. The arguments are
    those of :class:`sat.sparsity.SparsityPhases`.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the attention modules and set up the controller."""
        if stage == "fit":
            modules = pl_module.named_modules()
            attentions = {name: module for name, module in modules if isinstance(module, AdaptiveAttention)}
            self.attach(type(pl_module).__name__, attentions)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the learning-rate factor act on every optimizer."""
        self.attach_optimizers(trainer.optimizers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse layouts that this callback knows nothing of."""
        self.check_phases()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A step that failed has not restored its learning rate."""
        self.detach_optimizers()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the optimizers as they were."""
        self.detach_optimizers()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ask the dense layers for statistics, at every ``interval``-th optimizer step."""
        self.before_batch(ends_optimizer_step(trainer, batch_idx))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hand the statistics to the controller and put its layouts in place."""
        values = self.after_batch(ends_optimizer_step(trainer, batch_idx), lambda x: _mean_over_ranks(trainer, x))
        if values is not None:
            for each in trainer.loggers:
                each.log_metrics(values, step=self.history[-1]["step"] - 1)  # as Lightning numbers this step's metrics


def ends_optimizer_step(trainer: Trainer, batch_idx: int) -> bool:
    """Whether this batch is the last of its gradient accumulation; an epoch's last batch always is."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def _mean_over_ranks(trainer: Trainer, statistics: AttentionStatistics) -> AttentionStatistics:
    """The same statistics on every rank, so that all reach the same layouts."""
    if trainer.world_size == 1:
        return statistics
    assert statistics.score_matrix is not None
    pooled, matrix = (_reduce(trainer, x) for x in (statistics.pooled, statistics.score_matrix))
    # Of the mean matrix; the mean of the ranks' skewnesses would be another number.
    sensitivity = None if (x := statistics.sensitivity) is None else _reduce(trainer, x)
    return AttentionStatistics(pooled, skewness(matrix).float(), matrix, sensitivity)


def _reduce(trainer: Trainer, x: Tensor) -> Tensor:
    reduced = trainer.strategy.reduce(x.clone(), reduce_op="mean")
    assert isinstance(reduced, torch.Tensor)
    return reduced
