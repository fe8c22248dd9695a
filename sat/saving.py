"""Floor 5: what makes a run resumable: checkpoints between steps, signals, the random state."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from sat.files import save_state

# Seconds within which a second signal counts as the first once more: schedulers and launchers both send theirs.
SAME_SIGNAL = 1.0


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
        """Write a checkpoint; to another file system than this machine's (``s3://``) as Lightning does.

        Raises:
            OSError: it cannot be written; the one that was there stays.
        """
        if not isinstance(url_to_fs(str(path))[0], LocalFileSystem):
            super().save_checkpoint(dict(checkpoint), path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_state(checkpoint, path)


class RunInterrupted(BaseException):
    """A signal asked the run to stop; what was trained has been saved, at the end of a step.

    Like KeyboardInterrupt no ``Exception``: what takes those for a damaged file, or a hub that cannot be reached, is
    not to take this for one.

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
            # This batch has been counted as fetched already, and as the last of the epoch if it is that, but a resumed
            # run has yet to fetch it: it would take the epoch for finished.
            progress = trainer.fit_loop.epoch_loop.batch_progress
            is_last, progress.is_last_batch = progress.is_last_batch, False
            progress.total.ready -= 1
            progress.current.ready -= 1
            self.save(trainer, pl_module)
            progress.total.ready += 1
            progress.current.ready += 1
            progress.is_last_batch = is_last
            self._saved_at = step
        if self.interrupted and between_steps:
            raise RunInterrupted(f"interrupted at step {step}", self.received)


def _local(weight: Tensor) -> Tensor:
    """The part of a weight that this process has: under FSDP2 not all of it."""
    return weight.to_local() if isinstance(weight, DTensor) else weight
