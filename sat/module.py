"""Floor 4: the LightningModule: a classifier with the paper's optimizer and schedule."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy

from sat.baselines import fingerprint

Batch = dict[str, Tensor]

logger = logging.getLogger(__name__)

# Of the checkpoints, which say it as "sat_version". Those without are older than the first release, and alike.
CHECKPOINT_VERSION = 1


class ClassificationModule(LightningModule):
    """Trains a model that maps what a batch holds besides ``labels`` to logits.

    AdamW and one cycle of the learning rate with linear annealing, as in Yoon et al. 2024: up to ``lr`` within
    ``warmup_steps``, then down to 0 at the last step.

    Args:
        model: called with the batch's entries but ``labels`` by name, gives logits ``[B, classes]``; if it is
            ``per_token``, ``[T, classes]`` of the tokens whose ``input_ids`` are below 0, with ``labels`` ``[B, L]``.
        num_classes: number of classes.
        metric: ``f1`` measures, besides the accuracy, the F1 score of class 1 of two.
        lr: largest learning rate.
        warmup_steps: optimizer steps until it is reached.
        weight_decay: AdamW's decoupled weight decay.
        betas: AdamW's two averaging factors.
        eps: AdamW's epsilon.
        layer_decay: factor of the learning rate from each layer to the one below it, above 0 and at most 1, as in
            Clark et al. 2020 (ELECTRA): pretrained layers change the less the nearer they are to the input.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        *,
        metric: Literal["acc", "f1"] = "acc",
        lr: float = 1e-3,
        warmup_steps: int = 100,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        layer_decay: float = 1.0,
    ) -> None:
        super().__init__()
        if lr <= 0:
            raise ValueError(f"lr must be above 0, got {lr}")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}")
        if weight_decay < 0 or eps < 0:
            raise ValueError(f"weight_decay and eps must be at least 0, got {weight_decay} and {eps}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {list(betas)}")
        if not 0 < layer_decay <= 1:
            raise ValueError(f"layer_decay must be above 0 and at most 1, got {layer_decay}")
        if metric == "f1" and num_classes != 2:
            raise ValueError(f"the metric f1 is that of class 1 of two, but there are {num_classes} classes")
        self.model = model
        self.layer_decay = layer_decay
        self.lr, self.warmup_steps = lr, warmup_steps
        self.weight_decay, self.betas, self.eps = weight_decay, (betas[0], betas[1]), eps
        splits = ("fit", "val", "test")
        self.accuracies = nn.ModuleDict(
            # Micro average: the share of right answers. Not "train": nn.ModuleDict has a method of that name.
            {name: MulticlassAccuracy(num_classes, average="micro") for name in splits}
        )
        self.f1_scores = nn.ModuleDict({name: BinaryF1Score() for name in ("val", "test")} if metric == "f1" else {})
        self._warned_at: int | None = None
        self.validation_f1: float | None = None  # the latest; a resumed run may end without another validation

    def forward(self, batch: Batch) -> Tensor:
        """Logits ``[B, classes]`` of a batch, or of its hidden tokens where these are to be found."""
        return self.model(**{name: value for name, value in batch.items() if name != "labels"})

    def targets(self, batch: Batch) -> Tensor:
        """The class of each row of logits."""
        labels = batch["labels"]
        return labels[batch["input_ids"] < 0] if getattr(self.model, "per_token", False) else labels

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The cross entropy of a batch, in nats.

        Raises:
            FloatingPointError: it is NaN or infinite. The weights are still those of the step before.
        """
        logits, targets = self(batch), self.targets(batch)
        loss = F.cross_entropy(logits, targets)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the training loss is {loss.item()} at step {self.global_step}{self._origin(batch)}; the run stops "
                f"before this step changes the weights. A smaller optimizer.lr, a longer warm-up or "
                f"trainer.precision=32-true may help"
            )
        self._log_accuracy("fit", logits, targets)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse gradients that would spoil the weights, where no loss scaler does (it leaves out such steps).

        Raises:
            FloatingPointError: one is NaN or infinite. The weights are still those of the step before.
        """
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return
        gradients = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        total: Any = torch.nn.utils.get_total_norm(gradients.values())  # a single number to wait for
        if bool(getattr(total, "full_tensor", lambda: total)().isfinite()):  # over all shards, where there are such
            return
        spoilt = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
        if spoilt:  # or else the norm alone was too large to be counted
            more = f" and of {len(spoilt) - 1} more" if len(spoilt) > 1 else ""
            raise FloatingPointError(
                f"the gradient of {spoilt[-1]}{more} is NaN or infinite at step {self.global_step}, though the loss "
                f"was finite; the run stops before this step changes the weights. A smaller optimizer.lr or "
                f"trainer.precision=32-true may help"
            )

    @torch.no_grad()
    def _origin(self, batch: Batch) -> str:
        """Where NaN or infinite values come from: the batch, a weight, or the first part of the model to give them.

        Of weights that are spread over processes only this one's part, and no part of the model: to gather them all
        processes would have to ask, and this one may be alone.
        """
        sharded = isinstance(self.model, FSDPModule)
        for name, value in batch.items():
            if not value.isfinite().all():
                return f", because {name} of its batch contains NaN or infinite values"
        for name, parameter in self.model.named_parameters():
            own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if not own.isfinite().all():
                return f", because the weight {name} is NaN or infinite"
        if sharded:
            return ""
        found: list[str] = []

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: object, output: object) -> None:
                if isinstance(output, Tensor) and not found and not output.isfinite().all():
                    found.append(name)

            return hook

        handles = [part.register_forward_hook(note(name)) for name, part in self.model.named_modules() if name]
        try:
            with torch.compiler.set_stance("force_eager"):
                self(batch)
        finally:
            for handle in handles:
                handle.remove()
        return f", first in the output of {found[0]}" if found else ""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Accuracy, loss and perhaps F1 on validation data."""
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Accuracy, loss and perhaps F1 on test data."""
        self._evaluate("test", batch)

    def _evaluate(self, split: str, batch: Batch) -> None:
        logits, targets = self(batch), self.targets(batch)
        size = len(targets)
        loss = F.cross_entropy(logits, targets)
        if not torch.isfinite(loss) and self._warned_at != self.global_step:
            self._warned_at = self.global_step
            logger.warning("the %s loss is %s at step %d%s", split, loss.item(), self.global_step, self._origin(batch))
        self.log(f"{split}/loss", loss, on_epoch=True, batch_size=size, sync_dist=True)
        self._log_accuracy(split, logits, targets)
        if split in self.f1_scores:
            f1: Any = self.f1_scores[split]
            f1(logits.argmax(1), targets)
            self.log(f"{split}/f1", f1, on_epoch=True, prog_bar=True, batch_size=size)

    def on_validation_epoch_end(self) -> None:
        """Remember the F1 score."""
        if "val" in self.f1_scores and not self.trainer.sanity_checking:
            f1: Any = self.f1_scores["val"]
            self.validation_f1 = float(f1.compute())

    def _log_accuracy(self, split: str, logits: Tensor, targets: Tensor) -> None:
        metric: Any = self.accuracies[split]
        metric(logits, targets)
        training = split == "fit"
        name = "train/acc" if training else f"{split}/acc"
        self.log(name, metric, on_step=training, on_epoch=not training, prog_bar=True, batch_size=len(targets))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep which attention the model has: the weights of many methods are alike, what they compute is not."""
        checkpoint["sat_version"] = CHECKPOINT_VERSION
        if self.validation_f1 is not None:
            checkpoint["validation_f1"] = self.validation_f1
        if (name := getattr(self.model, "attention", None)) is not None:
            checkpoint["attention"] = {
                "name": name,
                "options": self.model.attention_options,
                "fixed_layouts": fingerprint(self.model),
                "pruned": getattr(self.model, "pruned", "drop"),
                "num_heads": getattr(self.model, "num_heads", None),
                "per_token": getattr(self.model, "per_token", False),
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose optimizer, or cycle of the learning rate, is another: what it holds would prevail.

        Raises:
            ValueError: one is.
        """
        self.validation_f1 = checkpoint.get("validation_f1")
        total = int(self.trainer.estimated_stepping_batches)
        for scheduler in checkpoint.get("lr_schedulers", []):
            saved = scheduler.get("total_steps", total + 1) - 1
            if saved != total:
                raise ValueError(
                    f"the checkpoint's learning-rate cycle has {saved} steps, this run {total}; go on with the "
                    f"trainer.max_steps (or max_epochs) that it was started with"
                )
            rise = (scheduler.get("_schedule_phases") or [{}])[0].get("end_step")
            if rise is not None and not math.isclose(rise, self._warmup(total) * (total + 1) - 1, abs_tol=1e-3):
                raise _another("warmup_steps", round((rise + 1) * total / (total + 1)), self.warmup_steps)
        groups = parameter_groups(self.model, self.lr, self.layer_decay)
        for optimizer in checkpoint.get("optimizer_states", []):
            theirs = optimizer.get("param_groups", [])
            rates = [[group.get("max_lr") for group in theirs], [group["lr"] for group in groups]]
            if rates[0] != rates[1]:
                raise _another("lr (times layer_decay)", *(", ".join(map(str, each)) for each in rates))
            for name in ("weight_decay", "betas", "eps"):
                saved, own = theirs[0].get(name), getattr(self, name)
                if (tuple(saved) if isinstance(saved, list) else saved) != own:
                    raise _another(name, saved, own)

    def _warmup(self, total: float) -> float:
        """The share of the steps at which the learning rate rises."""
        return min(1.0, self.warmup_steps / total)

    def configure_model(self) -> None:
        """Under ``ModelParallelStrategy``: divide the parameters, layer by layer, among the processes (FSDP2)."""
        if self.device_mesh is None or isinstance(self.model, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        if (layers := _layers(self.model)) is not None:
            for layer in layers[1]:
                fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW and OneCycle over the whole training, linear both ways."""
        groups = parameter_groups(self.model, self.lr, self.layer_decay)
        optimizer = torch.optim.AdamW(
            groups, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )
        total = self.trainer.estimated_stepping_batches
        if total == float("inf") or total < 1:
            raise ValueError(
                f"the learning rate's cycle needs the number of steps in advance, which is {total} here; set "
                f"trainer.max_steps or trainer.max_epochs"
            )
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in groups],
            total_steps=int(total) + 1,  # Lightning asks for one value more than there are steps
            pct_start=self._warmup(total),
            anneal_strategy="linear",
            cycle_momentum=False,  # the betas stay what they were set to
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _another(name: str, saved: object, here: object) -> ValueError:
    return ValueError(
        f"the checkpoint was trained with an optimizer.{name} of {saved}, which would prevail over this run's {here}; "
        f"go on with what it was started with, or begin anew from its weights with --init_from"
    )


def parameter_groups(model: nn.Module, lr: float, layer_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters by depth, each depth with its learning rate; one group where there is no decay.

    The layers are the ``nn.ModuleList`` with the most parameters; what a model registers before it counts as one layer
    below (embeddings), what comes after it as one above (norms, pooler, head).

    Raises:
        ValueError: nothing is trainable, or a decay is asked for and there is no list of layers.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError(f"no parameter of {type(model).__name__} is trainable; leave some of them unfrozen")
    if layer_decay == 1:
        return [{"params": list(trainable.values()), "lr": lr}]
    found = _layers(model)
    if found is None:
        raise ValueError(
            f"layer_decay={layer_decay} needs layers, but {type(model).__name__} has no torch.nn.ModuleList; set "
            f"layer_decay to 1"
        )
    prefix, layers = found
    top = len(layers) + 1
    groups: dict[int, list[nn.Parameter]] = {}
    depth = 0
    for name, parameter in model.named_parameters():
        if name.startswith(f"{prefix}."):
            depth = int(name.removeprefix(f"{prefix}.").split(".")[0]) + 1
        elif depth:
            depth = top
        if parameter.requires_grad:
            groups.setdefault(depth, []).append(parameter)
    return [
        {"params": parameters, "lr": lr * layer_decay ** (top - depth)} for depth, parameters in sorted(groups.items())
    ]


def _layers(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Name and value of the ``nn.ModuleList`` with the most parameters, if there is any."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda found: sum(p.numel() for p in found[1].parameters()), default=None)
