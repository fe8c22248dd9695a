"""Floor 5: what a person sees of a run, and what makes it resumable: progress, step times, the table at the switch."""

from __future__ import annotations

import resource
import signal
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sat.callback import AdaptiveSparsity, ends_optimizer_step

# Step times that are kept of each phase; a median needs no more.
KEPT_STEP_TIMES = 2000


def phase_name(sparsity: AdaptiveSparsity | None) -> str:
    """``dense``, ``sparse``, or how many layers are sparse already."""
    if sparsity is None or sparsity.controller is None or len(sparsity.transitions) == 0:
        return "dense"
    if sparsity.all_sparse:
        return "sparse"
    return f"{len(sparsity.transitions)} of {len(sparsity.attentions)} layers sparse"


class Monitor(Callback):
    """Times the steps of each phase, measures accuracy around the switch, and prints the switch as a table.

    Args:
        sparsity: the callback whose phases are watched; None for a run that stays dense.
        console: where to print.
        switch_batches: validation batches on which accuracy is measured right before and right after the switch.
    """

    def __init__(self, sparsity: AdaptiveSparsity | None, console: Console, switch_batches: int = 20) -> None:
        super().__init__()
        self.sparsity, self.console, self.switch_batches = sparsity, console, switch_batches
        self.step_times: dict[str, list[float]] = {}
        self.accuracy_at_switch: dict[str, float] = {}
        self.peak_memory: dict[str, float] = {}
        self._last: float | None = None
        self._seen = 0

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

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the clock; at a switch, measure and print. Runs after :class:`AdaptiveSparsity`."""
        if not ends_optimizer_step(trainer, batch_idx):
            return
        new = self.sparsity.transitions[self._seen :] if self.sparsity else []
        now = time.perf_counter()
        if self._last is not None and not new:
            times = self.step_times.setdefault(phase_name(self.sparsity), [])
            times.append(now - self._last)
            del times[:-KEPT_STEP_TIMES]
        self._last = now
        if new:
            self._seen += len(new)
            self.note_peak_memory("dense", pl_module)
            self._measure_switch(trainer, pl_module, [t.layer for t in new])
            self.console.print(transition_table(new))
            before, after = self.accuracy_at_switch["before"], self.accuracy_at_switch["after"]
            self.console.print(f"accuracy on validation data: {before:.3f} before the switch, {after:.3f} right after")
            self._last = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the memory of the last phase."""
        self.note_peak_memory(phase_name(self.sparsity), pl_module)

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

    def _measure_switch(self, trainer: Trainer, pl_module: LightningModule, layers: list[int]) -> None:
        assert self.sparsity is not None
        switched = [list(self.sparsity.attentions.values())[layer] for layer in layers]
        layouts = [attention.layout for attention in switched]
        if "before" not in self.accuracy_at_switch:  # with layers switching one by one: before the first
            for attention in switched:
                attention.set_layout(None)
            self.accuracy_at_switch["before"] = self._accuracy(trainer, pl_module)
            for attention, layout in zip(switched, layouts, strict=True):
                attention.set_layout(layout)
        self.accuracy_at_switch["after"] = self._accuracy(trainer, pl_module)

    @torch.no_grad()
    def _accuracy(self, trainer: Trainer, pl_module: LightningModule) -> float:
        """Share of right answers on the first validation batches; draws no random numbers."""
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
        return right / max(total, 1)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {"step_times": self.step_times, "accuracy_at_switch": self.accuracy_at_switch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.step_times = {phase: list(times) for phase, times in state_dict["step_times"].items()}
        self.accuracy_at_switch = dict(state_dict["accuracy_at_switch"])


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
    """Keeps PyTorch's random state in checkpoints, so that a resumed run draws what the whole run would have drawn."""

    def __init__(self) -> None:
        super().__init__()
        self._state: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The generators' states, as byte tensors."""
        state: dict[str, Any] = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training starts."""
        self._state = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing draws between here and the first step."""
        if self._state is None:
            return
        torch.set_rng_state(self._state["cpu"].cpu())
        if "cuda" in self._state and torch.cuda.is_available():
            torch.cuda.set_rng_state(self._state["cuda"].cpu())
        self._state = None


class RunInterrupted(Exception):
    """Ctrl-C was pressed; the run has been saved at the end of its step."""


class SaveOnInterrupt(Callback):
    """Ctrl-C: finish the step, save, stop. A second Ctrl-C stops at once.

    Args:
        path: the checkpoint to write.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.pressed = False
        self._previous: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen."""
        self._previous = signal.signal(signal.SIGINT, self._note)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _note(self, *_: Any) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and leave, if asked to. Must be the last callback but the checkpoints."""
        if self.pressed:
            trainer.save_checkpoint(self.path)
            raise RunInterrupted(f"interrupted at step {trainer.global_step}")


class RichProgress(RichProgressBar):
    """Lightning's progress bar with the phase and the step time."""

    def __init__(self, monitor: Monitor) -> None:
        super().__init__()
        self.monitor = monitor

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Phase and step time first."""
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        phase = phase_name(self.monitor.sparsity)
        times = self.monitor.step_times.get(phase)
        step = {"ms/step": f"{1e3 * median(times[-20:]):.0f}"} if times else {}
        return {"phase": phase, **step, **metrics}


class PlainProgress(Callback):
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

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print a line if it is time."""
        now = time.monotonic()
        if now < self._next or not ends_optimizer_step(trainer, batch_idx):
            return
        self._next = now + self.seconds
        phase = phase_name(self.monitor.sparsity)
        parts = [f"step {trainer.global_step}/{int(trainer.estimated_stepping_batches)}", phase]
        metrics = trainer.callback_metrics
        parts += [f"{name} {metrics[name]:.3f}" for name in ("train/loss", "train/acc", "val/acc") if name in metrics]
        times = self.monitor.step_times.get(phase)
        if times:
            parts.append(f"{1e3 * median(times[-20:]):.0f} ms/step")
        self.console.print(" · ".join(parts), highlight=False, soft_wrap=True)
