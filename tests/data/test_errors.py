"""What is wrong is said in a sentence, before any work."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jsonargparse import ArgumentParser
from PIL import Image

from sat.data import CIFAR10, DATASETS, AGNews, Digits, INaturalist, SequenceDataModule, YelpPolarity
from sat.data.sources import find_parquet, from_folder_or_hub

PAIRS = [("good", 1), ("bad", 0)] * 10
GRAY = np.zeros((4, 4), np.uint8)


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (Digits, {"batch_size": 0}),
        (Digits, {"batch_size": 2.0}),
        (Digits, {"eval_batch_size": 0}),
        (Digits, {"num_workers": -1}),
        (Digits, {"seed": -1}),
        (Digits, {"train_samples": -5}),
        (Digits, {"eval_samples": 0}),
        (Digits, {"image_size": 0}),
        (CIFAR10, {"image_size": 0}),
        (AGNews, {"seq_len": 0}),
        (INaturalist, {"path": "x", "num_classes": 1}),
    ],
)
def test_arguments_out_of_range(cls: type[SequenceDataModule], arguments: dict[str, Any]):
    name, value = list(arguments.items())[-1]
    with pytest.raises(
        ValueError, match=f"{name} must be an integer of at least ., got {value}; correct --data.{name}"
    ):
        cls(**arguments)


def test_inaturalist_needs_a_source():
    with pytest.raises(ValueError, match=r"--data\.path"):
        INaturalist()


def test_a_path_that_does_not_exist(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere to read AG News from; correct --data\.path"):
        AGNews(path=str(tmp_path / "nowhere"), cache_dir=str(tmp_path)).prepare_data()


def test_a_part_of_a_split_that_is_missing(tmp_path: Path, text_folder: Callable[..., Path]):
    root = text_folder(train=PAIRS, test=PAIRS)
    for number in (0, 2):
        (root / f"train-{number:05}-of-00003.parquet").write_bytes((root / "train.parquet").read_bytes())
    (root / "train.parquet").unlink()
    message = r"has 2 of the 3 files of the train split, train-00001-of-00003\.parquet is missing; download it again"
    with pytest.raises(FileNotFoundError, match=message):
        find_parquet(root)
    (root / "train-00001-of-00003.parquet").write_bytes((root / "test.parquet").read_bytes())
    assert len(find_parquet(root)["train"]) == 3


@pytest.mark.parametrize("files", [("train", "test"), ("train-00000-of-00002", "train-00001-of-00002")])
def test_files_that_name_the_classes_differently(tmp_path: Path, files: tuple[str, str]):
    for name, classes in zip(files, (["neg", "pos"], ["pos", "neg"]), strict=True):
        kind = {"label": {"names": classes, "_type": "ClassLabel"}, "text": {"dtype": "string", "_type": "Value"}}
        table = pa.table({"text": ["good"] * 20, "label": [0, 1] * 10})
        info = json.dumps({"info": {"features": kind}})
        pq.write_table(table.replace_schema_metadata({"huggingface": info}), tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"name the classes of label differently, .*take files of one release"):
        YelpPolarity(path=str(tmp_path), seq_len=8, cache_dir=str(tmp_path / "cache")).prepare_data()


def test_what_takes_the_place_of_a_test_set_is_said(tmp_path: Path, text_folder: Callable[..., Path]):
    for splits, note in (
        ({"train": PAIRS}, "no test set there: 2 training samples are held out as one"),
        ({"train": PAIRS, "validation": PAIRS}, "no test set there: the validation set is the test set"),
        ({"train": PAIRS, "test": PAIRS}, None),
    ):
        folder = tmp_path / str(len(splits)) / str(note is None)
        folder.mkdir(parents=True)
        for name, rows in splits.items():
            (text_folder(**{name: rows}) / f"{name}.parquet").rename(folder / f"{name}.parquet")
        data = YelpPolarity(path=str(folder), seq_len=8, cache_dir=str(tmp_path / "cache"))
        data.setup()
        assert data.notes == ([] if note is None else [note])


def test_a_folder_without_training_data(tmp_path: Path, text_folder: Callable[..., Path]):
    def prepare(cls: type[SequenceDataModule]) -> None:
        cls(path=str(tmp_path), cache_dir=str(tmp_path / "cache")).prepare_data()

    with pytest.raises(FileNotFoundError, match=r"train\*\.parquet .* no parquet file at all"):
        prepare(AGNews)
    with pytest.raises(FileNotFoundError, match=r"no training picture|<class>/\*\.jpg"):
        prepare(INaturalist)
    text_folder(test=PAIRS)
    with pytest.raises(FileNotFoundError, match=r"found test\.parquet"):
        prepare(AGNews)


def test_wrong_columns(tmp_path: Path):
    pq.write_table(pa.table({"review": ["a"], "stars": [1]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="has the columns review, stars, expected one named text"):
        YelpPolarity(path=str(tmp_path), cache_dir=str(tmp_path / "cache")).prepare_data()
    with pytest.raises(ValueError, match="expected one named img or image"):
        CIFAR10(path=str(tmp_path), cache_dir=str(tmp_path / "cache")).prepare_data()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("a", 2), "has the label 2, expected integers from 0 to 1"),
        (("a", -1), "has the label -1"),
        (("a", None), "a row without a label"),
        (("a", 0.5), "of the type double"),
        (("a", "positive"), "of the type string"),
        ((None, 0), "row 0 of .* has no text"),
    ],
)
def test_wrong_rows(text_folder: Callable[..., Path], row: tuple[Any, Any], message: str):
    rows = [row, ("b", type(row[1])(0))] if row[1] is not None else [row, ("b", 0)]
    folder = text_folder(train=rows)
    with pytest.raises(ValueError, match=message):
        YelpPolarity(path=str(folder), cache_dir=str(folder / "cache")).prepare_data()


def test_contents_of_the_wrong_type(tmp_path: Path):
    table = pa.table({"text": [1, 2], "img": [3, 4], "label": [0, 1]})
    pq.write_table(table, tmp_path / "train.parquet")
    for cls, message in ((YelpPolarity, "write them as strings"), (CIFAR10, "Image feature")):
        with pytest.raises(ValueError, match=message):
            cls(path=str(tmp_path), cache_dir=str(tmp_path / "cache")).prepare_data()


def test_a_file_that_is_cut_short(text_folder: Callable[..., Path]):
    folder = text_folder(train=PAIRS)
    (folder / "train.parquet").write_bytes((folder / "train.parquet").read_bytes()[:-30])
    with pytest.raises(ValueError, match="not a whole parquet file"):
        YelpPolarity(path=str(folder), cache_dir=str(folder / "cache")).prepare_data()


@pytest.mark.parametrize(
    ("broken", "message"), [(b"no picture", "row 1 of .* cannot be decoded"), (None, "row 1 of .* has no bytes")]
)
def test_a_picture_that_cannot_be_decoded(picture_folder: Callable[..., Path], broken: bytes | None, message: str):
    folder = picture_folder(train=[(GRAY, 0), (broken, 1)])
    with pytest.raises(ValueError, match=message):
        CIFAR10(path=str(folder), cache_dir=str(folder / "cache")).prepare_data()


def test_a_picture_of_16_bits_is_not_cut_off(picture_folder: Callable[..., Path]):
    file = io.BytesIO()
    Image.fromarray(np.full((32, 32), 30_000, np.uint16)).save(file, "PNG")
    folder = picture_folder(train=[(GRAY, 0), (file.getvalue(), 1)])
    with pytest.raises(ValueError, match=r"row 1 of .* cannot be decoded \(its mode I;16 has more than 8 bits"):
        CIFAR10(path=str(folder), cache_dir=str(folder / "cache")).prepare_data()


def test_a_cache_folder_that_cannot_be_written(text_folder: Callable[..., Path]):
    folder = text_folder(train=PAIRS)
    (folder / "file").write_text("in the way")
    with pytest.raises(PermissionError, match=r"pass a writable folder as --data\.cache_dir"):
        YelpPolarity(path=str(folder), cache_dir=str(folder / "file" / "cache")).prepare_data()


def test_the_hub_is_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(ConnectionError, match=r"fancyzhx/ag_news .*no route to host.* --data\.path"):
        AGNews(cache_dir=str(tmp_path)).prepare_data()


def test_the_hub_is_asked_once_and_what_it_gave_before_is_still_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    asked: list[str] = []

    def load(name: str) -> bool:
        return from_folder_or_hub(name, lambda only_local: only_local, "tokenizer", "--data.tokenizer")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, **_: asked.append(name))
    assert load("some/model") is False
    assert load(str(tmp_path)) is True
    assert asked == ["some/model"]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", None)
    assert load("some/model") is True


def test_rows_from_the_hub_are_those_of_the_same_files(
    text_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    import datasets
    import huggingface_hub

    folder = text_folder(train=PAIRS, test=PAIRS)
    splits = datasets.DatasetDict(
        {name: datasets.Dataset(pq.read_table(folder / f"{name}.parquet")) for name in ("train", "test")}
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: splits)
    hub = YelpPolarity(cache_dir=str(folder / "cache"), batch_size=4, seq_len=8)
    local = YelpPolarity(path=str(folder), cache_dir=str(folder / "cache"), batch_size=4, seq_len=8)
    for data in (hub, local):
        data.setup()
    pairs = zip(hub.train_dataloader(), local.train_dataloader(), strict=True)
    assert all(a[key].equal(b[key]) for a, b in pairs for key in a)


def test_of_several_splits_on_the_hub_the_one_of_the_name_is_taken(
    text_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    import datasets
    import huggingface_hub

    folder = text_folder(train=PAIRS * 2, test=PAIRS)
    rows = {name: datasets.Dataset(pq.read_table(folder / f"{name}.parquet")) for name in ("train", "test")}
    small = rows["train"].select(range(2))
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    splits = {"train_small": small, "train": rows["train"], "test": rows["test"], "test_adversarial": small}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(splits))
    data = YelpPolarity(cache_dir=str(folder / "cache"), batch_size=4, seq_len=8)
    data.setup()
    assert {name: len(rows) for name, (_, rows) in data._rows.items()} == {"train": 36, "validation": 4, "test": 20}
    del splits["train"]
    splits["train_large"] = rows["train"]
    with pytest.raises(ValueError, match=r"'train_small' and 'train_large', which both may be its train split"):
        YelpPolarity(cache_dir=str(folder / "other"), batch_size=4, seq_len=8).setup()


def test_one_at_a_time_needs_as_many_samples_for_each_process(text_folder: Callable[..., Path]):
    folder = text_folder(train=PAIRS * 5, validation=PAIRS, test=PAIRS)
    data = YelpPolarity(path=str(folder), cache_dir=str(folder / "cache"), seq_len=8, batch_size=1)
    data.setup()
    data.trainer = SimpleNamespace(world_size=3, global_rank=1)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"20 test samples, one at a time, leave some of 3 processes without one"):
        data.test_dataloader()
    data.trainer = SimpleNamespace(world_size=2, global_rank=1)  # type: ignore[assignment]
    assert [len(batch["labels"]) for batch in data.test_dataloader()] == [1] * 10


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_split_without_rows(text_folder: Callable[..., Path], split: str):
    folder = text_folder(train=PAIRS, validation=PAIRS, test=PAIRS)
    file = folder / f"{split}.parquet"
    pq.write_table(pq.read_table(file).slice(0, 0), file)
    data = YelpPolarity(path=str(folder), cache_dir=str(folder / "cache"))
    message = rf"^Yelp polarity: the {split} split in {re.escape(str(file))} has 0 rows; replace it by a whole copy"
    for step in (data.prepare_data, data.setup):
        with pytest.raises(ValueError, match=message) as caught:
            step()
        assert ("or remove it" in str(caught.value)) == (split != "train")
    assert list((folder / "cache").iterdir()) == []
    file.unlink()
    if split != "train":
        YelpPolarity(path=str(folder), cache_dir=str(folder / "cache")).setup()


def test_a_split_without_rows_in_the_cache(text_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    """Caches of earlier versions may hold one, and so may what a subclass loads."""
    folder = text_folder(train=PAIRS, test=PAIRS)
    data = YelpPolarity(path=str(folder), cache_dir=str(folder / "cache"))
    prepared = data.load()
    prepared.splits["test"] = {name: tensor[:0] for name, tensor in prepared.splits["test"].items()}
    monkeypatch.setattr(data, "load", lambda: prepared)
    with pytest.raises(ValueError, match=f"the test split in {re.escape(str(folder))} has 0 rows; .*or remove it"):
        data.setup()


def test_every_loader_can_be_made_right_after_setup(text_folder: Callable[..., Path]):
    folder = text_folder(train=PAIRS)
    data = YelpPolarity(path=str(folder), cache_dir=str(folder / "cache"), batch_size=4)
    data.prepare_data()
    data.setup("fit")
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    assert [sum(len(batch["labels"]) for batch in loader) for loader in loaders] == [16, 2, 2]


def test_a_training_set_smaller_than_a_batch():
    digits = Digits(batch_size=64, train_samples=63)
    digits.setup()
    message = r"^Digits: 63 training sample\(s\), fewer than one batch of 64; lower --data\.batch_size"
    with pytest.raises(ValueError, match=message):
        digits.train_dataloader()


def test_a_training_set_too_small_to_hold_samples_out(text_folder: Callable[..., Path]):
    folder = text_folder(train=PAIRS[:1], test=PAIRS)
    message = r"^Yelp polarity: 1 training sample\(s\) to hold one out of, at least 2 are needed"
    with pytest.raises(ValueError, match=message):
        YelpPolarity(path=str(folder), cache_dir=str(folder / "cache")).setup()


def test_fewer_samples_than_processes():
    digits = Digits(eval_samples=1)
    digits.setup()
    digits.trainer = SimpleNamespace(world_size=2, global_rank=0)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"^Digits: 1 validation sample\(s\) for 2 processes; use fewer processes"):
        digits.val_dataloader()


def test_a_loader_before_setup():
    with pytest.raises(RuntimeError, match=r"^Digits: call setup\(\)"):
        Digits().train_dataloader()


SEQUENCES = ("ag_news", "yelp", "listops", "imdb_bytes", "retrieval", "mrpc", "imdb")


@pytest.mark.parametrize("name", DATASETS)
def test_every_argument_is_explained_on_the_command_line(name: str):
    parser = ArgumentParser()
    parser.add_class_arguments(DATASETS[name], "data")
    text = re.sub(r"\s+", " ", parser.format_help())
    options = set(re.findall(r"--data\.(\w+)", text))
    common = {"batch_size", "eval_batch_size", "num_workers", "seed", "train_samples", "eval_samples"}
    assert common <= options
    assert ({"path", "cache_dir"} <= options) == (name != "digits")
    assert ({"seq_len"} <= options) == (name in SEQUENCES)
    assert ({"image_size"} <= options) == ("seq_len" not in options)
    assert ({"tokenizer"} <= options) == (name in ("mrpc", "imdb"))
    assert ({"processor", "augment"} <= options) == (name == "cifar10_rgb")
    assert ("must be given when there are not 14" in text) == (name == "inaturalist")
    for option in options:
        value = {"augment": "{true,false}", "padding": "{max_length,longest}"}.get(option, option.upper())
        assert re.search(rf"--data\.{option} {value} \w", text), f"{option} has no explanation"
