"""Floor 4: AdaptiveSparsity, between the controller (floor 2) and anyone's Lightning Trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from sat.attention import AdaptiveAttention
from sat.layout import BlockLayout
from sat.ops import AttentionStatistics
from sat.sparsity import MaskName, SparsityController, Transition, skewness

logger = logging.getLogger(__name__)


class AdaptiveSparsity(Callback):
    """Trains densely until the attention's statistics have settled, then gives every layer its block layout.

    Works in any LightningModule whose attention is :class:`sat.attention.AdaptiveAttention`. Its state lies in
    Lightning's checkpoints; a resumed run makes the decisions of one that was never interrupted.

    Args:
        density: share of the blocks to keep, 0 to 1. Exactly one of ``density`` and ``coverage`` is given.
        coverage: keep the fewest blocks that hold this share of the attention mass, 0 to 1.
        min_density: least share of blocks under ``coverage``.
        max_density: largest share of blocks under ``coverage``.
        mask: how block scores are learned: ``direct`` (one logit a block), ``bilinear``, or ``gram`` (the paper's); or
            ``spion``: not at all, patterns are traced in the scores themselves (SAT's forerunner).
        mask_rank: inner dimension of ``bilinear`` and ``gram``.
        quantile: of ``spion``, in place of a density: share of the blocks below the threshold, 0 to 1.
        per_head: one layout a head instead of one a layer.
        keep_diagonal: always keep the blocks on the diagonal.
        min_blocks_per_row: always keep so many blocks of each row.
        theta: leave the dense phase at this skewness of the scores or above (with the next); null: at any.
        delta: ... and when the distance between successive score matrices changes by less, in percent.
        smoothing: weight of the past in an exponential mean of both, 0 (the paper's rule) to below 1.
        patience: successive observations at which the rule must hold.
        per_layer: every layer leaves on its own; otherwise all together.
        min_dense_steps: no transition before this step.
        max_dense_steps: transition at this step even if the rule does not hold; null waits without end.
        interval: optimizer steps between observations.
        samples: sequences of the batch that an observation looks at.
        lr_factor: factor of the learning rate once every layer is sparse (the paper halves it).
        seed: of the masks' initial values.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        density: float | None = None,
        coverage: float | None = None,
        min_density: float = 0.0,
        max_density: float = 1.0,
        mask: MaskName | Literal["spion"] = "direct",
        mask_rank: int = 32,
        quantile: float | None = None,
        per_head: bool = False,
        keep_diagonal: bool = True,
        min_blocks_per_row: int = 1,
        theta: float | None = 1.7,
        delta: float = 1.3,
        smoothing: float = 0.0,
        patience: int = 1,
        per_layer: bool = False,
        min_dense_steps: int = 0,
        max_dense_steps: int | None = None,
        interval: int = 10,
        samples: int = 8,
        lr_factor: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if interval < 1:
            raise ValueError(f"interval must be at least 1 step, got {interval}")
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        if not 0 < lr_factor <= 1:
            raise ValueError(f"lr_factor must be above 0 and at most 1, got {lr_factor}")
        self.interval, self.samples, self.lr_factor = interval, samples, lr_factor
        self.theta, self.delta = theta, delta
        self._make_controller: Callable[..., SparsityController] = partial(
            SparsityController,
            theta=theta,
            delta=delta,
            smoothing=smoothing,
            patience=patience,
            per_layer=per_layer,
            min_dense_steps=min_dense_steps,
            max_dense_steps=max_dense_steps,
            mask=mask,
            mask_rank=mask_rank,
            quantile=quantile,
            mask_steps=interval,  # as many fits as the paper, which fits at each step
            density=density,
            coverage=coverage,
            min_density=min_density,
            max_density=max_density,
            per_head=per_head,
            keep_diagonal=keep_diagonal,
            min_blocks_per_row=min_blocks_per_row,
            seed=seed,
        )
        # Refuses bad values now, not in the middle of a set-up. The grid is as small as the settings allow.
        side = max(1, min_blocks_per_row)
        self._make_controller(1, 1, (side, side), 1, (side, side))
        self.controller: SparsityController | None = None
        self.attentions: dict[str, AdaptiveAttention] = {}
        self.transitions: list[Transition] = []
        self.history: list[dict[str, Any]] = []
        self._steps = 0  # optimizer steps; trainer.global_step counts those of every optimizer
        self._unscaled: dict[Optimizer, list[Any]] = {}
        self._hooks: list[Any] = []

    @property
    def layouts(self) -> dict[str, BlockLayout]:
        """The layouts in use, by the name of the attention module."""
        return {name: layout for name, attention in self.attentions.items() if (layout := attention.layout) is not None}

    @property
    def all_sparse(self) -> bool:
        """Whether every layer has left the dense phase."""
        return self.controller is not None and self.controller.all_sparse

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the attention modules and set up the controller."""
        if stage != "fit":
            return
        found = {name: module for name, module in pl_module.named_modules() if isinstance(module, AdaptiveAttention)}
        if self.controller is not None and [*map(id, found.values())] == [*map(id, self.attentions.values())]:
            return  # another fit of the same model goes on
        self.attentions, self.transitions, self.history, self._steps = found, [], [], 0
        if not self.attentions:
            raise ValueError(
                f"AdaptiveSparsity found no sat.attention.AdaptiveAttention in {type(pl_module).__name__}; build the "
                f"model with it, or leave the callback out"
            )
        grids: dict[tuple[int, int, int, bool], str] = {}
        for name, a in self.attentions.items():
            grids.setdefault((a.num_heads, a.seq_len, a.block_size, a.is_causal), name)
        if len(grids) > 1:
            raise ValueError(
                f"AdaptiveSparsity needs attention modules of one kind, but heads, seq_len, block_size or is_causal "
                f"differ between {' and '.join(list(grids.values())[:2])}"
            )
        (heads, length, block_size, causal), *_ = grids
        blocks = -(-length // block_size)
        self.controller = self._make_controller(
            len(self.attentions), heads, (blocks, blocks), block_size, (length, length), causal=causal
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the learning-rate factor act on every optimizer.

        It acts for the duration of a step only, so that the optimizer and its scheduler live on unchanged, whatever
        scheduler it is.
        """
        for optimizer in trainer.optimizers:
            self._hooks.append(optimizer.register_step_pre_hook(self._scale_lr))
            self._hooks.append(optimizer.register_step_post_hook(self._restore_lr))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse layouts that this callback knows nothing of, such as weights loaded without the callback's state."""
        assert self.controller is not None
        for index, (name, attention) in enumerate(self.attentions.items()):
            if attention.is_sparse != (self.controller.phase(index) == "sparse"):
                state = "sparse" if attention.is_sparse else "dense"
                raise ValueError(
                    f"{name} is {state}, but the state of AdaptiveSparsity says otherwise; resume from a checkpoint "
                    f"that was trained with this callback, or start densely with set_layout(None)"
                )

    def _scale_lr(self, optimizer: Optimizer, *_: Any) -> None:
        if self.all_sparse:
            self._unscaled[optimizer] = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * self.lr_factor

    def _restore_lr(self, optimizer: Optimizer, *_: Any) -> None:
        for group, lr in zip(optimizer.param_groups, self._unscaled.pop(optimizer, []), strict=False):
            group["lr"] = lr

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A step that failed has not restored its learning rate."""
        for optimizer in list(self._unscaled):
            self._restore_lr(optimizer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the hooks off the optimizers."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ask the dense layers for statistics, at every ``interval``-th optimizer step."""
        assert self.controller is not None
        observes = ends_optimizer_step(trainer, batch_idx) and (self._steps + 1) % self.interval == 0
        for index, attention in enumerate(self.attentions.values()):
            attention.observe_samples = self.samples if observes and self.controller.phase(index) == "dense" else 0
            attention.statistics = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hand the statistics to the controller and put its layouts in place."""
        assert self.controller is not None
        self._steps += ends_optimizer_step(trainer, batch_idx)
        statistics = {}
        attentions = list(self.attentions.values())
        for index, attention in enumerate(attentions):
            attention.observe_samples = 0
            if attention.statistics is not None:
                statistics[index] = _mean_over_ranks(trainer, attention.statistics)
                attention.statistics = None
        if not statistics:
            return
        step = self._steps
        absent = sorted(set(self.controller.dense_layers) - set(statistics))
        if absent:  # layers that are skipped at random, say
            logger.info("no observation at step %d: the layers %s took no part in this batch", step, absent)
            return
        transitions = self.controller.observe(step, statistics)
        self._log_statistics(trainer, step)
        for transition in transitions:
            attentions[transition.layer].set_layout(transition.layout.to(attentions[transition.layer].sparse.device))
            if transition.forced:
                reason = transition.missing or "this layer was ready, but others were not"
                logger.warning("layer %d was made sparse at step %d by max_dense_steps; missing: %s",
                               transition.layer, step, reason)  # fmt: skip
        self.transitions += transitions

    def _log_statistics(self, trainer: Trainer, step: int) -> None:
        assert self.controller is not None
        record: dict[str, Any] = {"step": step, "layers": [dict(layer) for layer in self.controller.latest]}
        self.history.append(record)
        values = {
            f"layer{index}/{name}": value
            for index, layer in enumerate(record["layers"])
            for name, value in layer.items()
            if value == value  # nan: not defined yet
        }
        for each in trainer.loggers:
            each.log_metrics(values, step=step - 1)  # as Lightning numbers the metrics of this step

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the controller, the transitions and the statistics so far."""
        if self.controller is None:
            return {}
        return {
            "controller": self.controller.state_dict(),
            "transitions": [{**t._asdict(), "layout": t.layout.mask} for t in self.transitions],
            "history": self.history,
            "steps": self._steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        if self.controller is None or not state_dict:
            return
        self.controller.load_state_dict(state_dict["controller"])
        size = self.controller.block_size
        self.transitions = [
            Transition(**{**saved, "layout": BlockLayout(saved["layout"].cpu(), size)})
            for saved in state_dict["transitions"]
        ]
        self.history = list(state_dict["history"])
        self._steps = state_dict["steps"]


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
    return AttentionStatistics(pooled, skewness(matrix).float(), matrix)


def _reduce(trainer: Trainer, x: Tensor) -> Tensor:
    reduced = trainer.strategy.reduce(x.clone(), reduce_op="mean")
    assert isinstance(reduced, torch.Tensor)
    return reduced
