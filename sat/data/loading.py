"""Floor 3, data: in which order samples come, on which rank, and where training goes on after a resume."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

Batch = dict[str, Tensor]
Transform = Callable[[Batch, np.random.Generator], Batch]


class _Batches(DistributedSampler):
    """Yields the row numbers of a whole batch at a time, for one rank.

    A ``DistributedSampler`` only because Lightning replaces every other kind of sampler by one of its own as soon
    as there are several processes.
    """

    def __init__(self, size: int, batch_size: int, *, seed: int, world_size: int, rank: int, shuffle: bool) -> None:
        super().__init__(range(size), num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.size, self.batch_size = size, batch_size


class TrainBatches(_Batches):
    """Full batches in an order that depends on ``(seed, epoch)`` alone.

    Global batch ``i`` of ``k`` ranks is the batch ``i`` that one process with ``k`` times the batch size would see;
    each rank takes its consecutive part of it.

    Args:
        accumulate: batches a step. What is left of an epoch beyond whole steps is left out, as it would be with batches
            of that size: Lightning would take a step on it, of a gradient that is too small. An epoch of less than a
            step stays as it is.
    """

    start = 0  # the first batch of the coming pass that has not been handed out yet

    def __init__(
        self, size: int, batch_size: int, *, seed: int, world_size: int, rank: int, shuffle: bool, accumulate: int = 1
    ) -> None:
        super().__init__(size, batch_size, seed=seed, world_size=world_size, rank=rank, shuffle=shuffle)
        self.accumulate = accumulate

    def __len__(self) -> int:
        batches = self.size // (self.batch_size * self.num_replicas)
        return batches - batches % self.accumulate if batches > self.accumulate else batches

    def set_epoch(self, epoch: int) -> None:
        """Let the coming pass be this epoch; it begins at its first batch unless it was the coming one already."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __iter__(self) -> Iterator[list[int]]:
        # No generator: epoch and start must be those of now, not those of the first `next`.
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        order = order[: len(self) * self.batch_size * self.num_replicas]
        mine = order.reshape(len(self), self.num_replicas, self.batch_size)[self.start :, self.rank]
        return iter(mine.tolist())


class EvalBatches(_Batches):
    """Every sample once, in the order of the data; rank ``r`` of ``k`` takes the samples ``r, r + k, r + 2k, ...``.

    All ranks have the same number of batches, since a strategy that synchronizes in ``forward`` would hang otherwise.
    """

    def __len__(self) -> int:
        return -(-self.size // (self.batch_size * self.num_replicas))

    def __iter__(self) -> Iterator[list[int]]:
        mine = list(range(self.rank, self.size, self.num_replicas))
        ends = [min(i * self.batch_size, len(mine)) for i in range(1, len(self) + 1)]
        if len(ends) > 1 and ends[-1] == ends[-2]:  # this rank has one sample less, and its last batch would be empty
            ends[-2] -= 1
        return iter([mine[begin:end] for begin, end in zip([0, *ends], ends, strict=False)])


class _Loader(DataLoader):
    """Its workers leave SIGTERM to the run: a scheduler's reaches them too, and without them no step could be ended."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # They begin with what is blocked here, so that none can be met before it is ready; the run's own comes later.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class TrainLoader(_Loader):
    """Training batches that go on exactly where a checkpoint left off, in mid-epoch too.

    ``len`` is always that of a full epoch. A pass that follows :meth:`load_state_dict` yields what is left of the
    interrupted epoch; the next passes are full and count the epochs up. The global random state is not touched.

    Under a Lightning ``Trainer`` the position is taken from the trainer's own count of completed training batches,
    asked at the first ``next`` of a pass. Lightning's hand-over of loader states alone does not suffice (2.6):

    - with ``max_epochs`` it drops the loader's state when the checkpoint was written at the end of an epoch, makes
      the iterator before it calls ``set_epoch``, and does not make another: the resumed epoch would repeat epoch 0;
    - a batch whose step failed is trained again, but has been handed out and counted in the loader's state;
    - ``limit_train_batches`` ends epochs that the loader believes unfinished.

    Args:
        dataset: maps a list of row numbers to a batch.
        batches: the order.
        completed: returns ``(training batches completed so far, batches an epoch)`` of the trainer at work, or None.
        num_workers: processes that prepare batches; 0 prepares them in the training process.
        transform: changes a batch at random. The generator that it is given depends on seed, epoch, number of the
            batch and rank alone, so that a resumed run draws what the whole run would have drawn.
    """

    def __init__(
        self,
        dataset: Dataset[Batch],
        batches: TrainBatches,
        *,
        completed: Callable[[], tuple[int, int] | None] = lambda: None,
        num_workers: int = 0,
        transform: Transform | None = None,
    ) -> None:
        super().__init__(dataset, sampler=batches, **_options(num_workers))
        self.batches = batches
        self.transform = transform
        self.completed = completed
        self.epoch = 0
        self.handed_out = 0  # batches of this epoch that the training loop has received; prefetched ones do not count

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator: nothing is settled before the first `next`, see the class.
        stop = len(self)
        if (progress := self.completed()) is not None:
            done, stop = progress
            self.batches.epoch, self.batches.start = divmod(done, stop)
        self.epoch, self.handed_out = self.batches.epoch, self.batches.start
        iterator = super().__iter__()
        self.batches.epoch, self.batches.start = self.epoch + 1, 0
        # Resumed from the end of an epoch under `max_steps` and without validation, Lightning takes one batch, calls
        # that an epoch and asks for another pass: the pass that ends early here brings both back into step.
        for batch in islice(iterator, stop - self.handed_out):
            self.handed_out += 1
            if self.transform is not None:
                seed = (self.batches.seed, self.epoch, self.handed_out, self.batches.rank)
                batch = self.transform(batch, np.random.default_rng(seed))
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, batches handed out in it, and what these numbers are relative to."""
        return {
            "epoch": self.epoch,
            "batches": self.handed_out,
            "seed": self.batches.seed,
            "batches_per_epoch": len(self),
            "samples": self.batches.size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next pass begin after the batches that had been handed out.

        Warns when the data, the global batch size or the seed changed, since the order is another one then.
        """
        now = self.state_dict()
        changed = [name for name in ("samples", "batches_per_epoch", "seed") if state[name] != now[name]]
        if changed:
            rank_zero_warn(
                "the checkpoint was written with "
                + ", ".join(f"{name}={state[name]} (now {now[name]})" for name in changed)
                + ": within the current epoch some samples may come twice or not at all"
            )
        self.epoch, self.handed_out = state["epoch"], state["batches"]
        finished = self.handed_out >= len(self)
        self.batches.epoch, self.batches.start = self.epoch + finished, 0 if finished else self.handed_out


def eval_loader(dataset: Dataset[Batch], batches: EvalBatches, num_workers: int) -> DataLoader:
    """A loader of every sample, in fixed order."""
    return _Loader(dataset, sampler=batches, **_options(num_workers))


def _options(num_workers: int) -> dict[str, Any]:
    return {
        "batch_size": None,  # a row of the sampler is a batch already
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
        # Of its own, or else each pass would draw a number from the global generator and shift dropout's.
        "generator": torch.Generator().manual_seed(0),
    }
