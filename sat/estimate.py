"""Floor 6: what a training will cost on this machine, from a few of its own steps: ``--estimate true``.

The steps are taken by the run's own data, module, sparsity and Trainer settings, first densely, then sparsely as if
``max_dense_steps`` had come, and then a few batches are validated. Nothing of that is kept.
"""

from __future__ import annotations

import logging
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from sat.callback import AdaptiveSparsity, ends_optimizer_step
from sat.data import SequenceDataModule
from sat.module import ClassificationModule
from sat.monitor import device_name

# A phase is measured for so many seconds or steps, of each kind for so many steps in any case. Those that a kind begins
# with are not counted: they allocate, and compile.
PHASE_SECONDS, PHASE_STEPS, LEAST_STEPS, WARM_UP = 15.0, 60, 2, 2
# More often than in a training, so that a short phase has observations too.
OBSERVED_EVERY = 3
EVAL_BATCHES = 8


class DoesNotFit(Exception):
    """A phase needs more memory than there is."""


class Kind(NamedTuple):
    """Steps, or batches, of one kind."""

    milliseconds: float  # the mean of those that count
    extra_seconds: float  # what the first ones took longer
    peak_mib: float
    measured: int


class Clock:
    """Times and peak memory by kind."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}
        self.peaks: dict[str, float] = {}

    def note(self, kind: str, seconds: float, peak_mib: float) -> None:
        """One step or batch."""
        self.times.setdefault(kind, []).append(seconds)
        self.peaks[kind] = max(peak_mib, self.peaks.get(kind, 0.0))

    def counted(self, kind: str) -> list[float]:
        """Without the first ones; of validations the second half: a last batch may be smaller, and compile anew."""
        times = self.times.get(kind, [])
        return times[len(times) // 2 if kind.startswith("validation") else WARM_UP :]

    def kinds(self) -> dict[str, Kind]:
        """What was seen, in the order in which it was."""
        found = {}
        for kind, times in self.times.items():
            if not (counted := self.counted(kind)):
                continue
            first = times[: len(times) - len(counted)]
            mean = fmean(counted)
            extra = max(0.0, sum(first) - len(first) * mean)
            found[kind] = Kind(1e3 * mean, extra, self.peaks[kind], len(counted))
        return found


class Rehearsal(Callback):
    """Takes a training through its phases, with a clock, and stops it when it knows what their steps cost.

    Must stand behind ``sparsity``.

    Args:
        sparsity: of the run; None for an attention of one phase.
        attention: the name of such an attention.
        clock: gets the times.
        note: is called with the name of each phase that begins.
    """

    def __init__(
        self, sparsity: AdaptiveSparsity | None, attention: str, clock: Clock, note: Callable[[str], None]
    ) -> None:
        super().__init__()
        self.sparsity, self.attention, self.clock, self.note = sparsity, attention, clock, note
        self.phase = ""
        self.least, self.most = 0, None if sparsity is not None else 0  # dense steps, as the settings say
        self.interval = 1 if sparsity is None else sparsity.interval
        self.checkpoint_seconds = 0.0
        self._observed = False
        self._last = 0.0

    def current_phase(self) -> str:
        """The phase that the model is in."""
        if self.sparsity is None:
            return self.attention
        return "sparse" if self.sparsity.all_sparse else "dense"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the dense phase from ending by itself, and observe often."""
        if self.sparsity is not None:
            controller = self.sparsity.controller
            assert controller is not None
            if not self.sparsity.all_sparse:
                self.most = controller.max_dense_steps
                first = self.interval * controller.criterion.least_observations
                if self.most is not None:
                    first = min(first, max(self.most, self.interval))
                self.least = max(controller.min_dense_steps, first)
            else:
                self.most = 0
            controller.min_dense_steps = sys.maxsize
            self.sparsity.interval = OBSERVED_EVERY
        self._begin(pl_module.device)

    def _begin(self, device: torch.device) -> None:
        self.phase = self.current_phase()
        self.note(self.phase)
        self._last = clock(device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """See which kind of step it is."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._observed = False
            reset_peak(pl_module.device)
        if self.sparsity is not None:
            self._observed |= any(attention.observe_samples for attention in self.sparsity.attentions.values())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the clock; end the phase when it is known."""
        if not ends_optimizer_step(trainer, batch_idx):
            return
        now = clock(pl_module.device)
        if self.phase != self.current_phase():
            assert self.sparsity is not None
            self.sparsity.interval = OBSERVED_EVERY
            self._begin(pl_module.device)
            return
        kind = f"{self.phase}, observed" if self._observed else self.phase
        self.clock.note(kind, now - self._last, peak_mib(pl_module.device))
        self._last = now
        if not self._known():
            return
        if self.sparsity is not None and self.phase == "dense":
            assert self.sparsity.controller is not None
            # The next step is observed and the last dense one.
            self.sparsity.controller.min_dense_steps = self.sparsity.controller.max_dense_steps = 0
            self.sparsity.interval = 1
        else:
            trainer.should_stop = True

    def _known(self) -> bool:
        kinds = [self.phase, *([f"{self.phase}, observed"] if self._observes() else [])]
        counted = [self.clock.counted(kind) for kind in kinds]
        enough = sum(map(sum, counted)) >= PHASE_SECONDS or sum(map(len, counted)) >= PHASE_STEPS
        return enough and all(len(times) >= LEAST_STEPS for times in counted)

    def _observes(self) -> bool:
        return self.sparsity is not None and (self.phase == "dense" or revises(self.sparsity))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time a checkpoint."""
        with tempfile.TemporaryDirectory() as folder:
            start = clock(pl_module.device)
            trainer.save_checkpoint(Path(folder) / "last.ckpt")
            self.checkpoint_seconds = clock(pl_module.device) - start


class EvalClock(Callback):
    """Times validation batches."""

    def __init__(self, kind: str, clock: Clock) -> None:
        super().__init__()
        self.kind, self.clock = kind, clock
        self._last = 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        reset_peak(pl_module.device)
        self._last = clock(pl_module.device)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Read it."""
        now = clock(pl_module.device)
        self.clock.note(self.kind, now - self._last, peak_mib(pl_module.device))
        self._last = now


class Estimate(NamedTuple):
    """What was measured, and what follows from it."""

    kinds: dict[str, Kind]  # by phase; "PHASE, observed" and "validation, PHASE" too
    steps: int  # of the training
    dense_steps: tuple[int, int]  # least and most; of a training of one phase 0 and 0
    forced: bool  # whether max_dense_steps ends the dense phase
    interval: int  # steps between observations
    density: float | None  # of the layouts that were measured
    validations: int
    batches: dict[str, int]  # of a validation and of a test
    saves: int
    checkpoint_seconds: float
    setup_seconds: float

    def training_seconds(self, dense_steps: int) -> float:
        """Seconds of training, validation and checkpoints with so many dense steps, as ``summary.json`` counts them."""
        total = sum(kind.extra_seconds for kind in self.kinds.values()) + self.saves * self.checkpoint_seconds
        (last,) = [name for name in self.kinds if "," not in name and name != "dense"] or ["dense"]
        for phase, steps in (("dense", dense_steps), (last, self.steps - dense_steps)):
            if steps == 0:
                continue
            plain = self.kinds[phase]
            observed = self.kinds.get(f"{phase}, observed", plain)
            step = plain.milliseconds + (observed.milliseconds - plain.milliseconds) / self.interval
            batches = self.validations * self.batches["validation"] * steps / self.steps
            total += (steps * step + batches * self._eval_ms(phase)) / 1e3
        return total

    def _eval_ms(self, phase: str) -> float:
        kind = self.kinds.get(f"validation, {phase}")
        return 0.0 if kind is None else kind.milliseconds

    def test_seconds(self) -> tuple[float, float]:
        """Of the final and the best model, in either phase; the two may be one."""
        times = [kind.milliseconds / 1e3 for name, kind in self.kinds.items() if "validation" in name] or [0.0]
        return self.batches["test"] * min(times), 2 * self.batches["test"] * max(times)

    def total_seconds(self) -> tuple[float, float]:
        """From the command to its end, least and most."""
        least, most = sorted(map(self.training_seconds, self.dense_steps))
        tests = self.test_seconds()
        return least + tests[0] + self.setup_seconds, most + tests[1] + self.setup_seconds

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return {
            **self._asdict(),
            "kinds": {name: kind._asdict() for name, kind in self.kinds.items()},
            "training_seconds": tuple(map(self.training_seconds, self.dense_steps)),  # of the least and the most
            "test_seconds": self.test_seconds(),
            "total_seconds": self.total_seconds(),
        }


def measure(
    make_trainer: Callable[..., Trainer],
    planned: Trainer,
    module: ClassificationModule,
    data: SequenceDataModule,
    sparsity: AdaptiveSparsity | None,
    attention: str,
    *,
    saves_every: int,
    setup_seconds: float,
    note: Callable[[str], None],
) -> Estimate:
    """Train and validate a little, and extrapolate.

    Args:
        make_trainer: called with callbacks, and by name with options that prevail over the run's.
        planned: the run's own trainer, which says how long it is.
        module: what is trained; its weights and layouts are others afterwards.
        data: prepared.
        sparsity: of the run, if it learns layouts.
        attention: the model's.
        saves_every: optimizer steps between checkpoints.
        setup_seconds: that a run takes until its first step, of data that were prepared before.
        note: called with what is measured next.

    Raises:
        DoesNotFit: a phase runs out of memory.
    """
    times = Clock()
    rehearsal = Rehearsal(sparsity, attention, times, note)
    rehearsed = make_trainer(
        [*([sparsity] if sparsity else []), rehearsal],
        max_steps=max(planned.max_steps, 10_000),  # more than it takes: the cycle of the learning rate needs an end
        max_epochs=-1,
        min_steps=None,
        min_epochs=None,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    # The switch is forced here, and needs no explanation.
    said, before = logging.getLogger("sat.sparsity"), logging.getLogger("sat.sparsity").level
    said.setLevel(logging.ERROR)
    guard = sparsity.guard if sparsity else None
    if sparsity:
        sparsity.guard = None  # which wants validation; that is timed by itself, below
    try:
        with _fitting(lambda: f"{rehearsal.phase} training", data, module, rehearsed, "batch_size"):
            rehearsed.fit(module, datamodule=data)
    finally:
        said.setLevel(before)
        if sparsity:
            sparsity.guard = guard
    layouts = [] if sparsity is None else [*sparsity.layouts.values()]
    batches = {
        "validation": _limited(len(data.val_dataloader()), planned.limit_val_batches),
        "test": _limited(len(data.test_dataloader()), planned.limit_test_batches),
    }
    for phase in [kind for kind in reversed(times.times) if "," not in kind]:
        if phase == "dense" and sparsity is not None:
            for each in sparsity.attentions.values():
                each.set_layout(None)
        note(f"validation, {phase}")
        limit = min(EVAL_BATCHES, max(batches.values()))
        validating = make_trainer([EvalClock(f"validation, {phase}", times)], limit_val_batches=limit)
        with _fitting(lambda phase=phase: f"{phase} validation", data, module, rehearsed, "eval_batch_size"):  # type: ignore[misc]
            for _ in range(2 if limit else 0):
                validating.validate(module, datamodule=data, verbose=False)
    steps, validations = _lengths(planned, rehearsed)
    least, most = rehearsal.least, steps if rehearsal.most is None else rehearsal.most
    return Estimate(
        kinds=times.kinds(),
        steps=steps,
        dense_steps=(min(least, steps), min(max(least, most), steps)),
        forced=rehearsal.most is not None,
        interval=rehearsal.interval,
        density=sum(layout.density for layout in layouts) / len(layouts) if layouts else None,
        validations=validations,
        batches=batches,
        saves=steps // saves_every + validations,  # the last, and at most as many of the best
        checkpoint_seconds=rehearsal.checkpoint_seconds,
        setup_seconds=setup_seconds,
    )


def _limited(batches: int, limit: float | int | None) -> int:
    """Lightning's limits: a number of batches, or a share of them."""
    if limit is None:
        return batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def _lengths(planned: Trainer, rehearsed: Trainer) -> tuple[int, int]:
    """Optimizer steps and validations of the planned training; the other trainer has seen the data."""
    epoch = int(rehearsed.num_training_batches)
    epoch_steps = -(-epoch // planned.accumulate_grad_batches)
    bounds = [planned.max_steps] if planned.max_steps > 0 else []
    if (planned.max_epochs or -1) > 0:
        bounds.append(epoch_steps * (planned.max_epochs or 0))
    steps = min(bounds)
    interval = rehearsed.val_check_batch
    if interval is None or interval == float("inf"):  # by the clock, or never
        return steps, 0
    if planned.check_val_every_n_epoch is None:
        batches = steps // epoch_steps * epoch + steps % epoch_steps * planned.accumulate_grad_batches
        return steps, batches // int(interval)
    epochs, rest = divmod(steps, epoch_steps)
    every = planned.check_val_every_n_epoch
    begun = rest * planned.accumulate_grad_batches if (epochs + 1) % every == 0 else 0
    return steps, epochs // every * (epoch // int(interval)) + begun // int(interval)


@contextmanager
def _fitting(
    what: Callable[[], str], data: SequenceDataModule, module: ClassificationModule, trainer: Trainer, option: str
) -> Iterator[None]:
    """Say what to do where memory does not suffice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # PyTorch's own error on a GPU; on a CPU a plain one that says so.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        size = getattr(data, option)
        ways = []
        if option == "batch_size" and not getattr(module.model, "activation_checkpointing", True):
            ways.append("--model.activation_checkpointing true")
        if size > 1 and option == "batch_size":
            accumulated = 2 * trainer.accumulate_grad_batches
            ways.append(f"--data.batch_size {size // 2} with --trainer.accumulate_grad_batches {accumulated}")
        elif size > 1:
            ways.append(f"--data.eval_batch_size {size // 2}")
        device = trainer.strategy.root_device  # Lightning has moved the module to the CPU by now
        if device.type == "cuda" and trainer.precision == "32-true":
            ways.append("--trainer.precision bf16-mixed")
        help_text = f"; what needs less: {', or '.join(ways)}" if ways else "; a smaller model needs less"
        raise DoesNotFit(
            f"{what()} does not fit into the memory of {device_name(device)} with batches of {size}{help_text}"
        ) from error


def clock(device: torch.device) -> float:
    """Seconds, when all that was begun is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak(device: torch.device) -> None:
    """Measure peak memory from here on, where the system lets a process say so."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_mib(device: torch.device) -> float:
    """Of PyTorch's allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def show(console: Console, name: str, found: Estimate, data: SequenceDataModule, device: torch.device) -> None:
    """The table, and what it comes to."""
    table = Table(title=f"{name} on {device_name(device)}, batches of {data.batch_size}", title_justify="left")
    for column in ("", "time", "peak memory", "measured"):
        table.add_column(column, justify="right" if column else "left")
    for kind, cost in found.kinds.items():
        unit = "batch" if kind.startswith("validation") else "step"
        plural = "" if cost.measured == 1 else "es" if unit == "batch" else "s"
        time_text = f"{cost.milliseconds:,.1f} ms a {unit}"
        table.add_row(kind, time_text, f"{cost.peak_mib:,.0f} MiB", f"{cost.measured} {unit}{plural}")
    console.print(table)
    memory = "PyTorch holds on the GPU" if device.type == "cuda" else "the process holds"
    lines = [f"peak memory is what {memory}"]
    if any(kind.endswith("observed") for kind in found.kinds):
        lines[0] += f"; one step in {found.interval} is observed"
    if found.density is not None:
        lines.append(f"layouts kept {found.density:.3f} of the blocks in the sparse steps")
    extra = sum(kind.extra_seconds for kind in found.kinds.values())
    lines.append(
        f"once: {duration(found.setup_seconds)} to set up, {duration(extra)} more for first steps and compilation"
    )
    lines.append(
        f"{found.validations} validations of {found.batches['validation']} batches, up to 2 tests of "
        f"{found.batches['test']}; a checkpoint takes {duration(found.checkpoint_seconds)}"
    )
    least, most = found.dense_steps
    for dense in sorted({least, most}):
        phases = f", {dense:,} of them dense" if "dense" in found.kinds and "sparse" in found.kinds else ""
        lines.append(f"training of {found.steps:,} steps{phases}: {duration(found.training_seconds(dense))}")
    if not found.forced:
        lines.append("sparsity.max_dense_steps is null: the dense phase may last to the end")
    low, high = map(duration, found.total_seconds())
    lines.append(f"in all: {low}" if low == high else f"in all: {low} to {high}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """For people."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    for unit, length, most in (("min", 60, 120), ("h", 3600, 48)):
        if seconds < most * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"


def revises(sparsity: AdaptiveSparsity) -> bool:
    """Whether sparse steps are observed too."""
    return sparsity.controller is not None and sparsity.controller.revise_interval is not None
