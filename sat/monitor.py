"""Floor 5: what a person sees of a run, and what makes it resumable: progress, step times, the table at the switch."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor import DTensor

from sat.callback import AdaptiveSparsity, ends_optimizer_step
from sat.files import save_state
from sat.plots import attention_pixels, layout_pixels

# Step times that are kept of each phase; a median needs no more.
KEPT_STEP_TIMES = 2000

# Seconds within which a second signal counts as the first once more: schedulers and launchers both send theirs.
SAME_SIGNAL = 1.0


class Monitor(Callback):
    """Times the steps of each phase, measures accuracy around the switch, and prints the switch as a table.

    Args:
        sparsity: the callback whose phases are watched; None for a run that learns no layouts.
        console: where to print.
        attention: the only phase of such a run, the name of its attention.
        switch_batches: validation batches on which accuracy is measured right before and right after the switch.
    """

    def __init__(
        self,
        sparsity: AdaptiveSparsity | None,
        console: Console,
        attention: str = "dense",
        switch_batches: int = 20,
    ) -> None:
        super().__init__()
        self.sparsity, self.console, self.switch_batches = sparsity, console, switch_batches
        self.attention = attention
        self.step_times: dict[str, list[float]] = {}
        self.validation_accuracy: dict[str, float] = {}
        self.validated_at = 0
        self.peak_memory: dict[str, float] = {}
        self.trained = False  # whether a step has been done in this process
        self._last: float | None = None
        self._seen = 0

    @property
    def phase(self) -> str:
        """``dense``, ``sparse``, or how many layers are sparse; the attention's name where no layouts are learned."""
        if self.sparsity is None:
            return self.attention
        if self.sparsity.controller is None or len(self.sparsity.transitions) == 0:
            return "dense"
        if self.sparsity.all_sparse:
            return "sparse"
        return f"{len(self.sparsity.transitions)} of {len(self.sparsity.attentions)} layers sparse"

    def median_step_ms(self, phase: str) -> float | None:
        """Median time of an optimizer step in a phase, in milliseconds."""
        times = self.step_times.get(phase)
        return 1e3 * median(times) if times else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._last = None
        self._seen = len(self.sparsity.transitions) if self.sparsity else 0
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is not part of a step."""
        self._last = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the latest accuracy: a resumed run may end without another validation."""
        if "val/acc" in trainer.callback_metrics and not trainer.sanity_checking:
            self.validation_accuracy["latest"] = float(trainer.callback_metrics["val/acc"])
            self.validated_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the clock; at a switch, measure and print. Runs after :class:`AdaptiveSparsity`."""
        if not ends_optimizer_step(trainer, batch_idx):
            return
        self.trained = True
        new = self.sparsity.transitions[self._seen :] if self.sparsity else []
        now = time.perf_counter()
        if self._last is not None and not new:
            times = self.step_times.setdefault(self.phase, [])
            times.append(now - self._last)
            del times[:-KEPT_STEP_TIMES]
            pl_module.log("train/step_ms", 1e3 * median(times[-20:]))
        self._last = now
        if new:
            self._seen += len(new)
            self.note_peak_memory("dense", pl_module)
            self._keep_attention(trainer)
            self._measure_switch(trainer, pl_module, [t.layer for t in new])
            self.console.print(transition_table(new))
            before, after = self.validation_accuracy["before"], self.validation_accuracy["after"]
            self.console.print(f"accuracy on validation data: {before:.3f} before the switch, {after:.3f} right after")
            self._last = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the memory of the last phase."""
        self.note_peak_memory(self.phase, pl_module)

    def note_peak_memory(self, phase: str, pl_module: LightningModule) -> None:
        """Peak memory in MiB: on a GPU of this phase alone, on a CPU of the whole process so far."""
        if pl_module.device.type == "cuda":
            self.peak_memory[phase] = torch.cuda.max_memory_allocated() / 2**20
            torch.cuda.reset_peak_memory_stats()
        else:
            # Linux counts in KiB, macOS in bytes.
            self.peak_memory["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
                2**20 if sys.platform == "darwin" else 2**10
            )

    def _keep_attention(self, trainer: Trainer) -> None:
        """What the layers attended to when they switched: files for sat.report, images beside them in TensorBoard."""
        assert self.sparsity is not None
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir) / "attention"
        folder.mkdir(parents=True, exist_ok=True)
        boards = [each.experiment for each in trainer.loggers if isinstance(each, TensorBoardLogger)]
        layouts = {t.layer: t.layout for t in self.sparsity.transitions}
        for layer, attention in self.sparsity.pooled.items():
            attention.save(folder / f"layer{layer}.safetensors")
            for board in boards:
                over_uniform = attention.over_uniform()
                images = {"layouts": layout_pixels(layouts[layer].mask), "attention": attention_pixels(over_uniform)}
                for name, pixels in images.items():
                    board.add_image(f"{name}/layer{layer}", pixels, attention.step, dataformats="HWC")

    def _measure_switch(self, trainer: Trainer, pl_module: LightningModule, layers: list[int]) -> None:
        assert self.sparsity is not None
        switched = [list(self.sparsity.attentions.values())[layer] for layer in layers]
        layouts = [attention.layout for attention in switched]
        if "before" not in self.validation_accuracy:  # with layers switching one by one: before the first
            for attention in switched:
                attention.set_layout(None)
            self.validation_accuracy["before"] = self._accuracy(trainer, pl_module)
            for attention, layout in zip(switched, layouts, strict=True):
                attention.set_layout(layout)
        self.validation_accuracy["after"] = self._accuracy(trainer, pl_module)

    @torch.no_grad()
    def _accuracy(self, trainer: Trainer, pl_module: LightningModule) -> float:
        """Share of right answers on the first validation batches of all processes; draws no random numbers."""
        right = total = 0
        pl_module.eval()
        for index, batch in enumerate(trainer.datamodule.val_dataloader()):  # type: ignore[attr-defined]
            if index == self.switch_batches:
                break
            batch = trainer.strategy.batch_to_device(batch)
            logits: Tensor = pl_module(batch)
            right += int((logits.argmax(1) == batch["labels"]).sum())
            total += len(logits)
        pl_module.train()
        counts = torch.tensor([right, total], device=pl_module.device)
        right, total = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        return right / max(total, 1)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {
            "step_times": self.step_times,
            "validation_accuracy": self.validation_accuracy,
            "validated_at": self.validated_at,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.step_times = {phase: list(times) for phase, times in state_dict["step_times"].items()}
        self.validation_accuracy = dict(state_dict["validation_accuracy"])
        self.validated_at = state_dict["validated_at"]


def transition_table(transitions: list[Any]) -> Table:
    """One row a layer: what it keeps, and how much of its attention that holds."""
    first = transitions[0]
    how = "forced by max_dense_steps" if any(t.forced for t in transitions) else "by its criterion"
    table = Table(title=f"Switch to sparse attention at step {first.step}, {how}", title_justify="left")
    for column in ("layer", "density", "attention held", "most possible", "empty rows", "skewness", "change"):
        table.add_column(column, justify="right")
    for t in transitions:
        table.add_row(
            str(t.layer),
            f"{t.density:.3f}",
            f"{t.captured_mass:.1%}",
            f"{t.best_mass:.1%}",
            str(t.empty_rows),
            f"{t.skewness:.2f}",
            f"{t.relative_change:.2f} %",
        )
    if any(t.forced for t in transitions):
        lacking = "; ".join(f"layer {t.layer}: {t.missing}" for t in transitions if t.missing)
        table.caption = f"missing: {lacking}"
    return table


class ExactResume(Callback):
    """Keeps PyTorch's random state in checkpoints, so that a resumed run draws what the whole run would have drawn.

    Of all processes, which draw different numbers. A run that goes on in more of them than before seeds those that are
    new by its seed, the step and their rank.
    """

    def __init__(self) -> None:
        super().__init__()
        self._states: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """The generators' states, as byte tensors; with several processes by rank. Called in all of them."""
        state: dict[str, Any] = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return state
        states: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(states, state)
        return {"ranks": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training starts."""
        self._states = state_dict.get("ranks", [state_dict])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing draws between here and the first step."""
        rank = trainer.global_rank
        if rank < len(self._states):
            state = self._states[rank]
            torch.set_rng_state(state["cpu"].cpu())
            if "cuda" in state and torch.cuda.is_available():
                torch.cuda.set_rng_state(state["cuda"].cpu())
        elif rank > 0:  # all have started from one seed, and would drop the same features
            words = np.random.SeedSequence([torch.initial_seed(), trainer.global_step, rank]).generate_state(2)
            torch.manual_seed(int(words[0]) << 31 ^ int(words[1]))
        self._states = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep how a step's samples are divided, which the position in the data is counted by."""
        checkpoint["processes"] = {
            "count": trainer.world_size,
            "batch_size": trainer.datamodule.batch_size,  # type: ignore[attr-defined]
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
        }


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints beside their place and moves them there, so that none is ever half written.

    Lightning's own way leads through the system's folder for temporary files. Where that lies on another disk, the
    file is copied from there: whoever kills the process then, or a full disk, leaves half a checkpoint where the last
    good one was.
    """

    def save_checkpoint(self, checkpoint: Mapping[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: it cannot be written; the one that was there stays.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_state(checkpoint, path)


class RunInterrupted(Exception):
    """A signal asked the run to stop; what was trained has been saved, at the end of a step.

    Args:
        sentence: what happened.
        received: the signal.
    """

    def __init__(self, sentence: str, received: int) -> None:
        super().__init__(sentence)
        self.received = received


class SaveLast(Callback):
    """Keeps ``last.ckpt`` up to date, and makes signals finish the step, save and stop; a second one stops at once.

    The signals are SIGINT (Ctrl-C), SIGTERM and, in a job of SLURM, SIGUSR1. Of several processes it is enough that one
    gets the signal. While testing there is nothing to finish or to save: a signal stops at once.

    It saves between steps, after any validation: then a resumed run neither repeats nor misses one, which Lightning's
    own checkpoints at the end of a batch do (it takes their validation for done).

    Args:
        path: the checkpoint to write.
        every_n_steps: optimizer steps between saves.
    """

    def __init__(self, path: Path, every_n_steps: int = 100) -> None:
        super().__init__()
        self.path, self.every_n_steps = path, every_n_steps
        self.stale = False  # whether the run goes on from another checkpoint than the one at the path
        self.interrupted = False
        self.received = signal.SIGINT  # or the signal that it was
        self._noted_at = 0.0
        self._saved_at = 0
        self._testing = False

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen."""
        self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen, in place of Lightning; it puts everybody's handlers back at the end."""
        self._saved_at = -self.every_n_steps if self.stale else trainer.global_step
        self._listen()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen again."""
        self._testing = True
        self._listen()

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():  # no other may
            slurm = [signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else []
            for each in [signal.SIGINT, signal.SIGTERM, *slurm]:
                signal.signal(each, self._note)

    def _note(self, received: int, _: Any) -> None:
        if self._testing:
            raise RunInterrupted("interrupted while testing", received)
        now = time.monotonic()
        if not self.interrupted:
            self.interrupted, self.received, self._noted_at = True, signal.Signals(received), now
        elif now - self._noted_at > SAME_SIGNAL:
            raise KeyboardInterrupt

    def agree(self, trainer: Trainer) -> None:
        """Let all processes stop at the same step, whichever of them was asked to."""
        if trainer.world_size > 1:
            mine = torch.tensor(self.received if self.interrupted else 0, device=trainer.strategy.root_device)
            if (received := int(trainer.strategy.reduce(mine, reduce_op="max"))) and not self.interrupted:
                self.interrupted, self.received = True, signal.Signals(received)

    def save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint.

        Raises:
            FloatingPointError: a weight is NaN or infinite; the last good checkpoint stays.
        """
        weights = pl_module.named_parameters()
        bad = next((name for name, weight in weights if not _local(weight).isfinite().all()), None)
        if not trainer.strategy.reduce_boolean_decision(bad is None):
            raise FloatingPointError(
                f"{bad or 'a weight of another process'} has become NaN or infinite by step {trainer.global_step}, "
                f"though the loss was finite; the run stops. A smaller optimizer.lr or trainer.precision=32-true may "
                f"help"
            )
        trainer.save_checkpoint(self.path)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save, if it is time or a signal came. Must be the first callback: nothing of this step has happened."""
        step = trainer.global_step
        between_steps = batch_idx % trainer.accumulate_grad_batches == 0
        if between_steps:
            self.agree(trainer)
        due = step >= self._saved_at + self.every_n_steps or (self.interrupted and step > self._saved_at)
        if due and between_steps:
            # This batch has been counted as fetched already, but a resumed run has yet to fetch it.
            progress = trainer.fit_loop.epoch_loop.batch_progress
            progress.total.ready -= 1
            progress.current.ready -= 1
            self.save(trainer, pl_module)
            progress.total.ready += 1
            progress.current.ready += 1
            self._saved_at = step
        if self.interrupted and between_steps:
            raise RunInterrupted(f"interrupted at step {step}", self.received)


def _local(weight: Tensor) -> Tensor:
    """The part of a weight that this process has: under FSDP2 not all of it."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def status(trainer: Trainer, monitor: Monitor) -> str:
    """Loss, accuracy and step time, as a line."""
    metrics = trainer.callback_metrics
    names = {"train/loss": "loss", "train/acc": "acc", "val/acc": "val acc"}
    parts = [f"{short} {metrics[name]:.3f}" for name, short in names.items() if name in metrics]
    times = monitor.step_times.get(monitor.phase)
    if times:
        parts.append(f"{1e3 * median(times[-20:]):.0f} ms")
    return " · ".join(parts)


class BarProgress(Callback):
    """A bar over all steps of the training, with the phase and the :func:`status`; then one over the test.

    Lightning's own bar runs over one epoch, but these runs are measured in steps.

    Args:
        monitor: knows the phase and the step times.
        console: a terminal.
    """

    def __init__(self, monitor: Monitor, console: Console) -> None:
        super().__init__()
        self.monitor, self.console = monitor, console
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def _start(self, what: str, total: float, completed: int = 0) -> None:
        self._stop()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(compact=True),
        )
        self._bar = Progress(*columns, console=self.console)
        self._task = self._bar.add_task(what, total=total, completed=completed, status="")
        self._bar.start()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar."""
        self._start(self.monitor.phase, trainer.estimated_stepping_batches, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One step further."""
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=trainer.global_step,
                description=self.monitor.phase,
                status=status(trainer, self.monitor),
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say why the bar stands still."""
        if self._bar is not None:
            self._bar.update(self._task, description="validating")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the bar as it is."""
        self._stop()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show a bar over the test."""
        self._start("testing", sum(trainer.num_test_batches))

    def on_test_batch_end(self, *_: Any) -> None:
        """One batch further."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the terminal back, however the run ended."""
        self._stop()


class LineProgress(Callback):
    """A line every few seconds, where no terminal redraws a bar.

    Args:
        monitor: knows the phase and the step times.
        console: where to print.
        seconds: time between lines.
    """

    def __init__(self, monitor: Monitor, console: Console, seconds: float = 10.0) -> None:
        super().__init__()
        self.monitor, self.console, self.seconds = monitor, console, seconds
        self._next = 0.0

    def _is_time(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self.seconds
        return True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print a line if it is time."""
        if ends_optimizer_step(trainer, batch_idx) and self._is_time():
            step = f"step {trainer.global_step}/{int(trainer.estimated_stepping_batches)}"
            line = f"{step} · {self.monitor.phase} · {status(trainer, self.monitor)}"
            self.console.print(line, highlight=False, soft_wrap=True)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Print a line if it is time."""
        if self._is_time():
            self.console.print(f"testing, batch {batch_idx + 1}/{sum(trainer.num_test_batches)}", highlight=False)
