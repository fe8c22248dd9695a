"""Floor 5: what a person sees of a run: progress, step times, the table at the switch."""

from __future__ import annotations

import platform
import resource
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from sat.callback import AdaptiveSparsity, ends_optimizer_step
from sat.plots import attention_pixels, layout_pixels
from sat.sparsity import Revision

# Step times that are kept of each phase; a median needs no more.
KEPT_STEP_TIMES = 2000


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
        self.switch_samples = 0  # on how many accuracy was measured around the switch; 0: on all, or none was
        self.validated_at = 0
        self.peak_memory: dict[str, float] = {}
        self.trained = False  # whether a step has been done in this process
        self._trained_before = 0.0  # seconds, in processes that this one goes on from, or before it ended
        self._began: float | None = None
        self._last: float | None = None
        self._seen = 0

    @property
    def phase(self) -> str:
        """``dense``, ``sparse``, or how many layers are sparse; the attention's name where no layouts are learned."""
        if self.sparsity is None:
            return self.attention
        if self.sparsity.controller is None:
            return "dense"
        count, dense = len(self.sparsity.attentions), len(self.sparsity.controller.dense_layers)
        if dense == count:
            return "dense"
        return "sparse" if dense == 0 else f"{count - dense} of {count} layers sparse"

    def median_step_ms(self, phase: str) -> float | None:
        """Median time of an optimizer step in a phase, in milliseconds."""
        times = self.step_times.get(phase)
        return 1e3 * median(times) if times else None

    @property
    def training_seconds(self) -> float:
        """Wall time of the training so far: steps, validation and saving, over all interruptions.

        Without the test, and without what is measured at the switch, which other methods have not.
        """
        return self._trained_before + (0.0 if self._began is None else time.perf_counter() - self._began)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks."""
        self._began, self._last = time.perf_counter(), None
        self._seen = len(self.sparsity.transitions) if self.sparsity else 0
        self._revised = len(self.sparsity.revisions) if self.sparsity else 0
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
            if pl_module.device.type == "cuda":  # of what the sparse phase takes, its measurement is no part
                torch.cuda.reset_peak_memory_stats()
            if self._began is not None:
                self._began += time.perf_counter() - now
            self.console.print(transition_table(new))
            before, after = self.validation_accuracy["before"], self.validation_accuracy["after"]
            self.console.print(f"accuracy on validation data: {before:.3f} before the switch, {after:.3f} right after")
            self._last = None
        revisions = self.sparsity.revisions[self._revised :] if self.sparsity else []
        if revisions:
            self._revised += len(revisions)
            self._show_revisions(trainer, revisions)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the memory of the last phase, and stop the clock."""
        self.note_peak_memory(self.phase, pl_module)
        self._trained_before, self._began = self.training_seconds, None

    def note_peak_memory(self, phase: str, pl_module: LightningModule) -> None:
        """Peak memory in MiB: on a GPU of this phase alone, on a CPU of the whole process so far."""
        if pl_module.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**20
            torch.cuda.reset_peak_memory_stats()
        else:
            # Linux counts in KiB, macOS in bytes.
            unit = 2**20 if sys.platform == "darwin" else 2**10
            phase, peak = "process", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        self.peak_memory[phase] = max(peak, self.peak_memory.get(phase, 0.0))  # also that of a run it goes on from

    def _keep_attention(self, trainer: Trainer) -> None:
        """What the layers attended to when they switched: files for sat.report, images beside them in TensorBoard."""
        assert self.sparsity is not None
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir) / "attention"
        folder.mkdir(parents=True, exist_ok=True)
        layouts = {t.layer: t.layout for t in self.sparsity.transitions}
        for layer, attention in self.sparsity.pooled.items():
            attention.save(folder / f"layer{layer}.safetensors")
            pixels = attention_pixels(attention.over_uniform())
            self._add_images(
                trainer, layer, attention.step, layouts=layout_pixels(layouts[layer].mask), attention=pixels
            )

    def _show_revisions(self, trainer: Trainer, revisions: list[Revision]) -> None:
        """A line in the terminal, images of the new layouts in TensorBoard."""
        for step in sorted({r.step for r in revisions}):
            shares = ", ".join(f"{r.new_blocks:.1%} of layer {r.layer}" for r in revisions if r.step == step)
            self.console.print(f"layouts changed at step {step}: new are {shares}")
        assert self.sparsity is not None
        if trainer.is_global_zero:
            attentions = list(self.sparsity.attentions.values())
            for r in revisions:
                self._add_images(trainer, r.layer, r.step, layouts=layout_pixels(attentions[r.layer].layout_mask.cpu()))

    def _add_images(self, trainer: Trainer, layer: int, step: int, **images: Any) -> None:
        for each in trainer.loggers:
            if isinstance(each, TensorBoardLogger):
                for name, pixels in images.items():
                    each.experiment.add_image(f"{name}/layer{layer}", pixels, step, dataformats="HWC")

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
    def _accuracy(self, trainer: Trainer, pl_module: Any) -> float:
        """Share of right answers on the first validation batches of all processes; draws no random numbers."""
        right = asked = samples = cut = 0
        pl_module.eval()
        for index, batch in enumerate(trainer.datamodule.val_dataloader()):  # type: ignore[attr-defined]
            if index == self.switch_batches:
                cut = 1
                break
            batch = trainer.precision_plugin.convert_input(trainer.strategy.batch_to_device(batch))
            with trainer.precision_plugin.val_step_context():  # as validation computes, autocast included
                logits, targets = pl_module(batch), pl_module.targets(batch)
            right += int((logits.argmax(1) == targets).sum())
            asked += len(targets)
            samples += len(batch["labels"])
        pl_module.train()
        counts = torch.tensor([right, asked, samples, cut], device=pl_module.device)
        right, asked, samples, cut = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        self.switch_samples = samples if cut else 0
        return right / max(asked, 1)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {
            "step_times": self.step_times,
            "validation_accuracy": self.validation_accuracy,
            "switch_samples": self.switch_samples,
            "validated_at": self.validated_at,
            "training_seconds": self.training_seconds,
            "peak_memory": dict(self.peak_memory),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.step_times = {phase: list(times) for phase, times in state_dict["step_times"].items()}
        self.validation_accuracy = dict(state_dict["validation_accuracy"])
        self.validated_at = state_dict["validated_at"]
        self.switch_samples = state_dict.get("switch_samples", 0)
        self._trained_before = state_dict.get("training_seconds", 0.0)  # the first files do not say
        self.peak_memory = dict(state_dict.get("peak_memory", {}))


def device_name(device: torch.device) -> str:
    """The GPU, or the processor and how many threads PyTorch has there."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads != 1 else ''}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor() or platform.machine()


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
            f"{t.relative_change:.2f} %" if t.relative_change == t.relative_change else "",  # NaN: not measured
        )
    if any(t.forced for t in transitions):
        lacking = "; ".join(f"layer {t.layer}: {t.missing}" for t in transitions if t.missing)
        table.caption = f"missing: {lacking}"
    return table


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
