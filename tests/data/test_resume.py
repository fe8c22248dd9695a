"""Under a Lightning trainer, a resumed run sees the batches that the uninterrupted one saw, wherever it was cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import Dataset

from sat.data import SequenceDataModule
from sat.data.cache import Prepared
from sat.saving import SaveLast

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # a batch of these takes microseconds
    pytest.mark.filterwarnings("ignore:`weights_only` was not set"),  # of Trainer.save_checkpoint, by Lightning itself
    # Python 3.12 and later warn of any fork in a process that has threads; PyTorch forks its workers by default.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`"),  # runs without validation are meant so
]


class Numbers(SequenceDataModule):
    """22 training samples, whose only content is their number."""

    dataset_name, vocab_size, num_classes, seq_len, has_padding = "numbers", 1, 1, 1, False

    def load(self) -> Prepared:
        splits = {"train": 22, "validation": 6, "test": 6}
        return Prepared({name: {"labels": torch.arange(size)} for name, size in splits.items()}, [])

    def dataset(self, tensors: dict[str, torch.Tensor], rows: torch.Tensor) -> Dataset:
        class Rows(Dataset):
            def __getitem__(self, positions: list[int]) -> dict[str, torch.Tensor]:
                return {"labels": tensors["labels"][rows[positions]]}

        return Rows()


class Recorder(pl.LightningModule):
    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[int, list[int]] = {}
        self.fail_at = fail_at

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        if self.global_step == self.fail_at:
            raise RuntimeError("the power went out")
        self.seen[self.trainer.fit_loop.total_batch_idx] = batch["labels"].tolist()
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class ValidatedRecorder(Recorder):
    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        pass


class Save(pl.Callback):
    """Writes a checkpoint in one hook, each time."""

    def __init__(self, folder: Path, hook: str) -> None:
        self.files: list[Path] = []
        self.done: list[int] = []  # batches that had been trained by then
        setattr(self, hook, lambda trainer, *_: self.save(trainer, folder))

    def save(self, trainer: pl.Trainer, folder: Path) -> None:
        self.files.append(folder / f"{len(self.files)}.ckpt")
        self.done.append(trainer.fit_loop.epoch_loop.batch_progress.total.processed)
        trainer.save_checkpoint(self.files[-1])


def fit(model: Recorder, folder: Path, resume: Path | None = None, workers: int = 0, **arguments: Any) -> Recorder:
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **arguments,
    )
    data = Numbers(batch_size=4, seed=3, num_workers=workers)
    trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True)
    return model


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end", "on_validation_end"])
@pytest.mark.parametrize("model", [Recorder, ValidatedRecorder])
@pytest.mark.parametrize(
    "arguments",
    [
        {"max_steps": 13},
        {"max_epochs": 3},
        {"max_steps": 13, "val_check_interval": 3, "check_val_every_n_epoch": None},
        {"max_epochs": 2, "val_check_interval": 2},
        {"max_steps": 8, "limit_train_batches": 3},
        {"max_epochs": 3, "limit_train_batches": 3},
        {"max_steps": 5, "accumulate_grad_batches": 2},
    ],
)
def test_every_checkpoint_resumes_with_the_next_batch(
    tmp_path: Path, arguments: dict[str, Any], model: type[Recorder], hook: str
):
    save = Save(tmp_path, hook)
    straight = fit(model(), tmp_path, callbacks=[save], **arguments).seen
    assert list(straight) == list(range(len(straight)))
    assert bool(save.files) == (model is ValidatedRecorder or hook != "on_validation_end")
    for file, done in zip(save.files, save.done, strict=True):
        resumed = fit(model(), tmp_path, resume=file, **arguments).seen
        expected = {index: batch for index, batch in straight.items() if index >= done}
        if "accumulate_grad_batches" in arguments:
            # Resumed from the end of an epoch, Lightning 2.6 may cut a group of accumulated batches short and so take
            # fewer or more batches for its steps; which batches these are is all that a loader can decide.
            common = min(len(resumed), len(expected))
            assert list(resumed.items())[:common] == list(expected.items())[:common]
        else:
            assert resumed == expected


class SaveEach(SaveLast):
    """Writes ``last.ckpt`` before each step, and keeps all of them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "last.ckpt", every_n_steps=1)
        self.files: list[Path] = []
        self.done: list[int] = []

    def save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.path = self.path.with_name(f"{len(self.files)}.ckpt")
        self.files.append(self.path)
        self.done.append(trainer.fit_loop.epoch_loop.batch_progress.total.processed)
        super().save(trainer, pl_module)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "arguments",
    [
        {"max_steps": 8},
        {"max_epochs": 3},
        {"max_epochs": 3, "val_check_interval": 2},
        {"max_steps": 8, "val_check_interval": 2, "check_val_every_n_epoch": None},
    ],
)
def test_what_is_saved_between_steps_resumes_with_the_next_batch(
    tmp_path: Path, arguments: dict[str, Any], accumulate: int
):
    """Before the last batch of an epoch, too, and just after a validation."""
    arguments = {**arguments, "accumulate_grad_batches": accumulate}
    save = SaveEach(tmp_path)
    straight = fit(ValidatedRecorder(), tmp_path, callbacks=[save], **arguments).seen
    assert len(save.files) >= 5
    for file, done in zip(save.files, save.done, strict=True):
        resumed = fit(ValidatedRecorder(), tmp_path, resume=file, **arguments).seen
        assert resumed == {index: batch for index, batch in straight.items() if index >= done}, done


def test_a_batch_whose_step_failed_is_trained_again(tmp_path: Path):
    straight = fit(Recorder(), tmp_path, max_steps=13).seen
    save = Save(tmp_path, "on_exception")
    with pytest.raises(RuntimeError, match="power"):
        fit(Recorder(fail_at=7), tmp_path, callbacks=[save], max_steps=13)
    resumed = fit(Recorder(), tmp_path, resume=save.files[0], max_steps=13).seen
    assert list(resumed.values()) == list(straight.values())[7:]


def test_workers_that_fetch_ahead_change_nothing(tmp_path: Path):
    straight = fit(Recorder(), tmp_path, max_steps=8).seen
    save = Save(tmp_path, "on_train_batch_end")
    assert fit(Recorder(), tmp_path, workers=1, max_steps=8, callbacks=[save]).seen == straight
    resumed = fit(Recorder(), tmp_path, resume=save.files[2], workers=1, max_steps=8).seen
    assert resumed == {step: batch for step, batch in straight.items() if step >= 3}


def test_overfit_batches_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="train_samples"):
        fit(Recorder(), tmp_path, max_steps=2, overfit_batches=1)
