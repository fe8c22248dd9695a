"""Floor 4: AdaptiveSparsity, learned sparsity in anyone's Lightning Trainer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.data import extract_batch_size

from sat.attention import AdaptiveAttention
from sat.sparsity import SparsityPhases

# What the loss on validation data is called, by us and by many.
VALIDATION_LOSS = ("val/loss", "val_loss")


class AdaptiveSparsity(SparsityPhases, Callback):
    """Trains densely until the attention's statistics have settled, then gives every layer its block layout.

    Works in any LightningModule whose attention is :class:`sat.attention.AdaptiveAttention`. Its state lies in
    Lightning's checkpoints; a resumed run makes the decisions of one that was never interrupted. With several processes
    (``ddp``, or FSDP2 by ``ModelParallelStrategy``) all decide alike, as one process with the whole batch would. The
    arguments are those of :class:`sat.sparsity.SparsityPhases`.
    """

    _steps_before: int | None = None  # the trainer's count when the batch at work began; None between two batches

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the attention modules and set up the controller, if the model is made by now.

        Raises:
            ValueError: another callback, or the strategy, does not go together with learned layouts.
        """
        if stage != "fit":
            return
        _refuse_tensor_parallelism(pl_module)
        _refuse_averaged_layouts(trainer)
        if any(isinstance(module, AdaptiveAttention) for module in pl_module.modules()):
            self._find(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Find the attention of a model that was made in ``LightningModule.setup`` or ``configure_model``."""
        if trainer.state.fn == "fit":
            self._find(trainer, pl_module)

    def _find(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.find_attention(pl_module, rank=trainer.global_rank, world_size=trainer.world_size)

    def find_attention(self, module: LightningModule, *, rank: int = 0, world_size: int = 1) -> None:
        """Take charge of a module's attention, in advance of a training or at its start; see :meth:`attach`."""
        modules = module.named_modules()
        attentions = {name: each for name, each in modules if isinstance(each, AdaptiveAttention)}
        self.attach(type(module).__name__, attentions, rank=rank, world_size=world_size)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; outside of a training there is nothing that needs it."""
        if self.controller is not None:
            super().load_state_dict(state_dict)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the learning-rate factor act on every optimizer."""
        self._find(trainer, pl_module)
        self.attach_optimizers(trainer.optimizers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse layouts that this callback knows nothing of, and a guard that has nothing to go by."""
        self.check_phases()
        if self.guard is not None and not trainer.enable_validation:
            raise ValueError(
                f"guard={self.guard} goes by the loss on validation data, and this training has none "
                f"(limit_val_batches={trainer.limit_val_batches}); validate, or set guard to None"
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A step that failed has not restored its learning rate, and its layers still watch."""
        self._steps_before = None
        self.detach_optimizers()
        self.stop_observing()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the optimizers as they were."""
        self.detach_optimizers()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ask the layers for what is to be observed, at every ``interval``-th optimizer step."""
        self._steps_before = trainer.global_step
        accumulated = trainer.accumulate_grad_batches
        alone = trainer.world_size * accumulated == 1  # then nobody asks how many sequences a batch of any kind has
        # A sample of a classifier with two towers is two sequences.
        towers = getattr(getattr(pl_module, "model", None), "towers", 1)
        self.before_batch(1 if alone else towers * extract_batch_size(batch), batch_idx % accumulated == 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hand the statistics to the controller and put its layouts in place."""
        values = self.after_batch(ends_optimizer_step(trainer, batch_idx))
        if values is not None:
            for each in trainer.loggers:
                each.log_metrics(values, step=self._steps - 1)  # as Lightning numbers this step's metrics
        self._steps_before = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to be saved between an optimizer step and what this callback makes of it.

        Raises:
            ValueError: another callback saves there.
        """
        if self._steps_before is not None and trainer.global_step != self._steps_before:
            raise ValueError(
                "a callback saves a checkpoint at the end of a batch before AdaptiveSparsity has seen it, so that a "
                "resumed run would observe and switch a step later; put AdaptiveSparsity before it in callbacks"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Guard the sparse phase by the loss on validation data.

        Raises:
            ValueError: there is a ``guard``, but no such loss was logged.
        """
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        names = [name for name in VALIDATION_LOSS if name in trainer.callback_metrics]
        if not names and self.guard is None:
            return
        if not names:
            raise ValueError(
                f"guard={self.guard} needs the validation loss, logged as {' or '.join(VALIDATION_LOSS)}; "
                f"{type(pl_module).__name__} logs {', '.join(trainer.callback_metrics) or 'nothing'}"
            )
        loss = float(trainer.callback_metrics[names[0]])
        self.after_validation(trainer.strategy.broadcast(loss))  # not everybody's is reduced over the processes


def ends_optimizer_step(trainer: Trainer, batch_idx: int) -> bool:
    """Whether this batch is the last of its gradient accumulation; an epoch's last batch always is."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def _refuse_averaged_layouts(trainer: Trainer) -> None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and getattr(callback, "_use_buffers", True):
            raise ValueError(
                f"{type(callback).__name__} averages buffers too, and of layouts there is no average; give it "
                f"use_buffers=False, and the averaged model has the latest layouts"
            )


def _refuse_tensor_parallelism(module: LightningModule) -> None:
    mesh = module.device_mesh
    names = () if mesh is None else mesh.mesh_dim_names or ()
    if mesh is not None and "tensor_parallel" in names and mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            f"AdaptiveSparsity takes the samples of all ranks for different ones, but tensor_parallel_size="
            f"{mesh['tensor_parallel'].size()} gives several ranks the same; use "
            f"ModelParallelStrategy(data_parallel_size={mesh.size()}, tensor_parallel_size=1)"
        )
