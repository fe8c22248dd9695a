"""Floor 3, data: what all data modules share: splits, loaders, arguments."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sat.data.cache import Prepared
from sat.data.hidden import Hidden, hide_tokens
from sat.data.loading import Batch, EvalBatches, TrainBatches, TrainLoader, Transform, eval_loader

HELD_OUT_FRACTION = 0.1
HELD_OUT_AT_MOST = 5000

MOST_WORKERS = 1024  # no machine has so many cores to spare for loading


class SequenceDataModule(pl.LightningDataModule):
    """Classification of token sequences.

    A batch is a dict of ``input_ids`` int64 ``[B, L]``, ``labels`` int64 ``[B]`` and, where ``has_padding``,
    ``attention_mask`` bool ``[B, L]``, True = a real token. ``vocab_size``, ``num_classes``, ``seq_len`` (``L``) and
    ``has_padding`` can be read from the start, ``class_names`` after ``setup``. Data for pretrained models has other
    keys besides or instead, see :attr:`inputs`.

    The official training and test sets stay what they are. Validation is a class-stratified tenth of the training
    set, at most 5,000 samples, unless the source has a validation set and a test set. With a validation set but no
    test set, the former is the test set; with neither, another tenth of the training set is.
    Which samples make up a split, and which of it ``train_samples`` and ``eval_samples`` choose, does not depend on
    ``seed``, so that runs of different seeds are compared on the same samples.

    Args:
        batch_size: samples in a training batch, per process. Incomplete training batches are left out.
        eval_batch_size: samples in a validation or test batch, per process; ``batch_size`` when not given.
        num_workers: processes that prepare batches; 0 is enough where a batch takes about a millisecond, as of texts.
        seed: decides the order of the training samples, together with the epoch.
        train_samples: train on so many samples only, chosen at random; all when not given.
        eval_samples: validate and test on so many samples only, chosen at random; all when not given.
        hide: hide this share of each sequence's tokens and let the model find them instead of the class, above 0 and
            below 1: what it can be pretrained with, on the same data (--init_from takes it from there). A hidden token
            has the id -1; ``labels`` are ids ``[B, L]`` then, -100 where a token is not hidden.

    Raises:
        ValueError: an argument is out of range.
    """

    vocab_size: int
    num_classes: int
    seq_len: int
    has_padding: bool
    class_names: list[str]
    dataset_name: str
    path: str | None = None  # where the samples come from, if they are files
    # What a batch holds: token ids of our own or, for pretrained models, those of a tokenizer, or pictures.
    inputs: Literal["ids", "text", "pictures"] = "ids"
    metric: Literal["acc", "f1"] = "acc"  # by which models are compared on validation data
    published: tuple[str, ...] = ("train", "test")  # splits that are missed, and said to be, where they are not there
    pixel_tokens = False  # the tokens are the pixels of square pictures, row by row
    towers = 1  # sequences in a sample; of two, ids and mask have the shape [B, 2, L]

    def __init__(
        self,
        *,
        batch_size: int,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        train_samples: int | None = None,
        eval_samples: int | None = None,
        hide: float | None = None,
    ) -> None:
        super().__init__()
        if hide is not None and (self.inputs != "ids" or self.towers != 1):
            raise ValueError(
                f"data.hide is for models of our own that read one sequence a sample, not for {self.dataset_name}; "
                f"leave it out"
            )
        if hide is not None and (isinstance(hide, bool) or not 0 < hide < 1):
            raise ValueError(f"data.hide is a share of the tokens, above 0 and below 1, got {hide!r}")
        check_at_least("batch_size", batch_size, 1)
        check_at_least("eval_batch_size", eval_batch_size, 1)
        check_at_least("num_workers", num_workers, 0)
        if num_workers > MOST_WORKERS:
            raise ValueError(
                f"num_workers={num_workers} would start as many processes; set --data.num_workers to about the number "
                f"of cores, {os.cpu_count()}"
            )
        check_at_least("seed", seed, 0)
        check_at_least("train_samples", train_samples, 1)
        check_at_least("eval_samples", eval_samples, 1)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.train_samples = train_samples
        self.eval_samples = eval_samples
        self.hide = hide
        self.class_names = []
        self.notes: list[str] = []  # what a user should know of the splits, after setup()
        self._prepared: Prepared | None = None
        self._rows: dict[str, tuple[dict[str, Tensor], Tensor]] = {}

    def load(self) -> Prepared:
        """The tokens of every split that the source has; from the cache where there is one."""
        raise NotImplementedError

    def dataset(self, tensors: dict[str, Tensor], rows: Tensor) -> Dataset[Batch]:
        """Some rows of a split, as a map from a list of positions to a batch."""
        raise NotImplementedError

    def transform(self) -> Transform | None:
        """What changes the training batches at random; None: nothing does."""
        return None if self.hide is None else partial(hide_tokens, self.hide)

    @property
    def answers(self) -> int:
        """Among how many a prediction chooses: the classes, or all tokens where some of these are hidden."""
        return self.num_classes if self.hide is None else self.vocab_size

    def size(self) -> str:
        """How large a sample is, for people."""
        return f"{self.seq_len} tokens"

    def save_processor(self, folder: Path) -> None:
        """Write what prepares the inputs of a pretrained model, a tokenizer or an image processor, beside the model."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        """Read the source and write the cache; Lightning calls this in one process only."""
        self._prepared = self.load()

    def setup(self, stage: str | None = None) -> None:
        """Decide which samples belong to which split; the same in every process and for every stage.

        Every loader can be made from then on.

        Raises:
            ValueError: a split has no samples, or there are too few to hold some out.
        """
        if self._rows:
            return
        prepared = self._prepared or self.load()
        self.class_names = prepared.class_names
        self._rows = self._split(prepared.splits)

    def train_dataloader(self) -> TrainLoader:
        """Full batches, in an order that depends on seed and epoch alone; resumes in mid-epoch.

        Raises:
            ValueError: the training set is smaller than one batch, or the trainer has ``overfit_batches``.
        """
        overfit_batches: float = getattr(self.trainer, "overfit_batches", False)
        if overfit_batches:
            # Lightning would put a sampler of single rows in place of ours.
            raise ValueError(
                f"overfit_batches={overfit_batches} does not go with these loaders; use --data.train_samples and "
                f"--data.eval_samples instead"
            )
        tensors, rows = self._rows_of("train")
        world_size, rank = self._world()
        batches = TrainBatches(
            len(rows),
            self.batch_size,
            seed=self.seed,
            world_size=world_size,
            rank=rank,
            shuffle=True,
            accumulate=getattr(self.trainer, "accumulate_grad_batches", 1),
        )
        if len(batches) == 0:
            across = f" in each of {world_size} processes" if world_size > 1 else ""
            raise ValueError(
                f"{self.dataset_name}: {len(rows)} training sample(s), fewer than one batch of {self.batch_size}"
                f"{across}; lower --data.batch_size or raise --data.train_samples"
            )
        return TrainLoader(
            self.dataset(tensors, rows),
            batches,
            completed=self._completed,
            num_workers=self.num_workers,
            transform=self.transform(),
        )

    def val_dataloader(self) -> DataLoader:
        """All validation samples, in fixed order."""
        return self._eval_loader("validation")

    def test_dataloader(self) -> DataLoader:
        """All test samples, in fixed order."""
        return self._eval_loader("test")

    def _eval_loader(self, split: str) -> DataLoader:
        tensors, rows = self._rows_of(split)
        world_size, rank = self._world()
        if len(rows) < world_size:
            raise ValueError(
                f"{self.dataset_name}: {len(rows)} {split} sample(s) for {world_size} processes; use fewer processes "
                f"or raise --data.eval_samples"
            )
        if self.eval_batch_size == 1 and len(rows) % world_size:
            raise ValueError(
                f"{self.dataset_name}: {len(rows)} {split} samples, one at a time, leave some of {world_size} "
                f"processes without one at the end; use --data.eval_batch_size 2"
            )
        batches = EvalBatches(len(rows), self.eval_batch_size, seed=0, world_size=world_size, rank=rank, shuffle=False)
        data = self.dataset(tensors, rows)
        return eval_loader(data if self.hide is None else Hidden(data, self.hide), batches, self.num_workers)

    def _rows_of(self, split: str) -> tuple[dict[str, Tensor], Tensor]:
        if not self._rows:
            raise RuntimeError(f"{self.dataset_name}: call setup() before asking for a loader")
        return self._rows[split]

    def _world(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)

    def _completed(self) -> tuple[int, int] | None:
        trainer = self.trainer
        if trainer is None or not trainer.training:
            return None
        return trainer.fit_loop.epoch_loop.batch_progress.total.completed, int(trainer.num_training_batches)

    def _split(self, splits: dict[str, dict[str, Tensor]]) -> dict[str, tuple[dict[str, Tensor], Tensor]]:
        for name, part in splits.items():
            check_rows(self.dataset_name, name, self.path or "its source", len(part["labels"]))
        train = splits["train"]
        rows = torch.arange(len(train["labels"]))
        result = {name: (part, torch.arange(len(part["labels"]))) for name, part in splits.items() if name != "train"}
        if "test" not in result and "validation" in result:
            result["test"] = result.pop("validation")
            if "test" in self.published:
                self.notes.append("no test set there: the validation set is the test set")
        for name in ("test", "validation"):
            if name not in result:
                rows, held_out = self._hold_out(train["labels"], rows)
                result[name] = (train, held_out)
                if name == "test" and len(self.published) > 1:
                    self.notes.append(f"no test set there: {len(held_out):,} training samples are held out as one")
        result["train"] = (train, rows)
        for name, (part, chosen) in result.items():
            wanted = self.train_samples if name == "train" else self.eval_samples
            if wanted is not None and wanted < len(chosen):
                order = np.random.default_rng(0).permutation(len(chosen))[:wanted]
                result[name] = (part, chosen[torch.from_numpy(order)])
        return result

    def _hold_out(self, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows without, and rows of, a class-stratified part; both ascending."""
        if len(rows) < 2:
            raise ValueError(
                f"{self.dataset_name}: {len(rows)} training sample(s) to hold one out of, at least 2 are needed; point "
                f"--data.path at a larger copy"
            )
        size = min(max(round(len(rows) * HELD_OUT_FRACTION), 1), HELD_OUT_AT_MOST)
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(rows)))
        # Sorted by class, shuffled within: every (n / size)-th sample gives each class its share, rounded up or down.
        by_class = order[torch.argsort(labels[rows][order], stable=True)]
        chosen = by_class[(torch.arange(size) * len(rows)) // size]
        keep = torch.ones(len(rows), dtype=torch.bool)
        keep[chosen] = False
        return rows[keep], rows[~keep]


def check_at_least(name: str, value: int | None, least: int) -> None:
    """Raise a ValueError unless ``value`` is None or an integer of at least ``least``."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}; correct --data.{name}")


def check_rows(dataset: str, split: str, source: str, rows: int) -> None:
    """Raise a ValueError if a split has no rows."""
    if rows == 0:
        otherwise = "" if split == "train" else ", or remove it, and other samples take its place"
        raise ValueError(f"{dataset}: the {split} split in {source} has 0 rows; replace it by a whole copy{otherwise}")
