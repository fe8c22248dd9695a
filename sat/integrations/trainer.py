"""Floor 3: learned sparsity in Hugging Face's Trainer.

callback = SparsityCallback(seq_len=256, density=0.5, keep_first_tokens=1)  # of sequences of up to 256 tokens
trainer = Trainer(model, args, train_dataset=..., callbacks=[callback])
"""

from __future__ import annotations

import functools
import logging
import random
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sat import ops
from sat.attention import AdaptiveAttention
from sat.files import DamagedFile, read_state, reason, save_state
from sat.integrations.transformers import AFTER_SAVING, LAYOUTS_FILE, prepare, save_layouts, save_with_layouts
from sat.sparsity import SparsityPhases

logger = logging.getLogger(__name__)

# Beside the weights in each of the Trainer's checkpoints.
STATE_FILE = "sat_phases.pt"
RUN = "sparsity_run"  # a number that tells trainings apart, in a line of state.log_history


class SparsityCallback(SparsityPhases, TrainerCallback):
    """Trains densely until the attention's statistics have settled, then gives every layer its block layout.

    The counterpart of :class:`sat.callback.AdaptiveSparsity` for Hugging Face's ``Trainer``. The model may be any that
    :func:`sat.integrations.transformers.prepare` takes; one that is not prepared yet is prepared at the start. Values
    that the criterion compares stand in ``state.log_history``, and the number of sparse layers in what is printed.
    Checkpoints of the Trainer hold the state; ``resume_from_checkpoint`` goes on with it, and
    ``load_best_model_at_end`` brings the layouts of the best model back, or its dense phase. A second ``train()`` of
    the same model goes on in the phase that the first one ended in. A wrapper around a prepared model, such as PEFT's,
    can be trained too; its checkpoints hold the layouts as well.

    Args:
        seq_len: the longest sequence in tokens, on which layouts are learned; by default what the model can take. Where
            all are shorter, name their length: blocks that no token reaches count towards the density. A model that
            is prepared already keeps its own seq_len, block_size and backend.
        block_size: edge of a block, in tokens.
        backend: of the sparse phase, see :mod:`sat.ops`.
        settings: those of :class:`sat.sparsity.SparsityPhases`; by_offset is False unless given.
    """

    def __init__(
        self, seq_len: int | None = None, block_size: int = 16, backend: ops.Backend = "auto", **settings: Any
    ) -> None:
        # These models are pretrained: their single blocks differ.
        super().__init__(**{"by_offset": False, **settings})
        self.seq_len, self.block_size, self.backend = seq_len, block_size, backend
        self._training = False
        self._run: float | None = None  # which training this is: in the Trainer's history and in the state
        self._kept: Path | None = None  # the checkpoint whose saving has written the state already

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prepare the model, find its attention modules, and go on where a checkpoint was.

        Raises:
            ValueError: the model or the checkpoint does not fit, or the Trainer would wrap it in ``nn.DataParallel``.
        """
        if self.guard is not None and args.eval_strategy == "no":  # though other callbacks may ask for evaluations
            logger.warning("guard=%g goes by the loss on evaluation data; without an eval_strategy it does nothing "
                           "unless somebody evaluates", self.guard)  # fmt: skip
        if args.n_gpu > 1:
            raise ValueError(
                f"{type(self).__name__} cannot watch attention in nn.DataParallel, which the Trainer takes for "
                f"{args.n_gpu} GPUs in one process; start it with torchrun --nproc_per_node {args.n_gpu}, or show it "
                f"one GPU with CUDA_VISIBLE_DEVICES=0"
            )
        model = kwargs["model"]
        attentions = _attentions(model)
        if not attentions:
            prepare(model, self.seq_len, self.block_size, backend=self.backend)
            attentions = _attentions(model)
        save_with_layouts(model)  # where a part of it was prepared
        self.attach(type(model).__name__, attentions, rank=args.process_index, world_size=args.world_size)
        if state.global_step > 0:
            saved = self._resume(_checkpoint(args, state))
            self._run = next((line[RUN] for line in state.log_history if RUN in line), None)
            if self._run != saved.get("run"):
                raise ValueError(
                    f"the checkpoint that is resumed and the {STATE_FILE} of step {state.global_step} in output_dir "
                    f"belong to different runs; set output_dir to the folder that the checkpoint lies in"
                )
        else:
            self._run = random.SystemRandom().getrandbits(48)
            state.log_history.append({RUN: self._run, "step": 0})
        self.check_phases()
        self._training = True
        if isinstance(model, PreTrainedModel):
            AFTER_SAVING[model] = functools.partial(self._saved, args, state)
        optimizer = kwargs["optimizer"]
        self.attach_optimizers([getattr(optimizer, "optimizer", optimizer)])  # accelerate's wrapper calls the inner one

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask the layers for what is to be observed, at every ``interval``-th step."""
        self.before_batch(args.train_batch_size)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Between two batches of a gradient accumulation."""
        self.after_batch(ends_step=False)
        self.before_batch(args.train_batch_size, begins_step=False)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Hand the statistics to the controller and put its layouts in place."""
        before = len(self.transitions)
        values = self.after_batch(ends_step=True)
        if values is not None:
            state.log_history.append({**values, "step": state.global_step})
        for transition in self.transitions[before:]:
            control.should_log = True
            logger.info(
                "layer %d is sparse from step %d on: density %.3f, attention held %.1f %% of at most %.1f %%",
                transition.layer,
                transition.step,
                transition.density,
                100 * transition.captured_mass,
                100 * transition.best_mass,
            )

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Say how many layers are sparse, in each line that is logged."""
        if self.controller is not None and (logs := kwargs.get("logs")) is not None:
            # The Trainer has made its line of the history by now.
            logs["sparse_layers"] = state.log_history[-1]["sparse_layers"] = len(self.layouts)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Guard the sparse phase by the loss on evaluation data; other evaluations than the training's do not count."""
        metrics = kwargs.get("metrics") or {}
        if not self._training or (metrics and not any(name.startswith("eval_") for name in metrics)):
            return
        if "eval_loss" in metrics:
            self.after_validation(float(metrics["eval_loss"]))
        elif self.guard is not None:
            raise ValueError(
                f"guard={self.guard} needs eval_loss, but the evaluation gives {', '.join(metrics) or 'nothing'}; use "
                f"one eval_dataset, with labels"
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the state in the Trainer's checkpoint, where the model was saved without its ``save_pretrained``."""
        if not args.should_save:
            return
        folder = _checkpoint(args, state)
        if not folder.is_dir():
            logger.warning("there is no %s, so that the state of sparsity at this step is not saved", folder)
        elif folder.resolve() != self._kept:
            self._keep(kwargs["model"], folder)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The layouts go to the hub with the weights, of which the Trainer copies those files that it knows."""
        layouts = _checkpoint(args, state) / LAYOUTS_FILE
        if self._training and layouts.is_file():
            shutil.copy(layouts, Path(args.output_dir or ".") / LAYOUTS_FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the optimizer as it was; the best model, if it is loaded now, has its own layouts."""
        self._training = False
        self.detach_optimizers()
        AFTER_SAVING.pop(kwargs["model"], None)
        self._kept = None
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._resume(Path(state.best_model_checkpoint))

    def _saved(self, args: TrainingArguments, state: TrainerState, model: nn.Module, folder: Path) -> None:
        """Write the state while the model is written to a checkpoint.

        ``on_save`` comes after the checkpoint has been pushed to the hub, and of a checkpoint that is made because the
        process is about to be ended it does not come at all.
        """
        if args.should_save and folder.name == f"checkpoint-{state.global_step}":
            self._keep(model, folder)

    def _keep(self, model: nn.Module, folder: Path) -> None:
        """Write the state, and the layouts where the model has not done so, to a checkpoint."""
        if not isinstance(model, PreTrainedModel):
            save_layouts(model, folder)
        save_state({**self.state_dict(), "run": self._run}, folder / STATE_FILE)
        self._kept = folder.resolve()

    def _resume(self, folder: Path) -> dict[str, Any]:
        """Take the state and the layouts from a checkpoint."""
        path = folder / STATE_FILE
        if not path.is_file():
            raise ValueError(
                f"{folder} has no {STATE_FILE}; resume from a checkpoint in output_dir that was trained with "
                f"SparsityCallback, or start anew from its weights with from_pretrained"
            )
        try:
            saved = read_state(path)
            self.load_state_dict(saved)
        except (DamagedFile, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not whole ({reason(error)}); resume from another checkpoint") from error
        assert self.controller is not None
        for attention, layout in zip(self.attentions.values(), self.controller.layouts, strict=True):
            attention.set_layout(layout)
        return saved


def _attentions(model: nn.Module) -> dict[str, AdaptiveAttention]:
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptiveAttention)}


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the checkpoint of this step; in a search for hyperparameters each trial has one of its own."""
    folder, name = Path(args.output_dir or "."), f"checkpoint-{state.global_step}"
    trials = list(folder.glob(f"*/{name}")) if state.is_hyper_param_search else []
    return max(trials, key=lambda trial: trial.stat().st_mtime) if trials else folder / name
