"""Texts as characters, from hand-made files."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sat.data import AGNews, IMDBBytes, YelpPolarity

PAIRS = [("Hi!", 0), ("caf\xe9 \u4f60", 1), ("", 0), ("abcdefghij", 1)]


def expected(text: str, length: int) -> tuple[list[int], list[bool]]:
    codes = [ord(c) + 1 if ord(c) < 256 else ord("?") + 1 for c in text[:length]] or [ord(" ") + 1]
    padding = length - len(codes)
    return codes + [0] * padding, [True] * len(codes) + [False] * padding


def test_characters_are_latin_1_codes_plus_one_cut_and_padded(text_folder: Callable[..., Path]):
    folder = text_folder(train=PAIRS * 5, validation=PAIRS, test=PAIRS)
    data = YelpPolarity(path=str(folder), cache_dir=str(folder / "cache"), seq_len=8, batch_size=4, eval_batch_size=3)
    assert (data.vocab_size, data.num_classes, data.seq_len, data.has_padding) == (257, 2, 8, True)
    data.prepare_data()
    data.setup()
    batches = list(data.test_dataloader())
    assert [len(batch["labels"]) for batch in batches] == [3, 1]
    got = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    ids, mask = zip(*(expected(text, 8) for text, _ in PAIRS), strict=True)
    assert got["input_ids"].tolist() == list(ids)
    assert got["attention_mask"].tolist() == list(mask)
    assert got["labels"].tolist() == [label for _, label in PAIRS]
    assert [got[key].dtype for key in ("input_ids", "attention_mask", "labels")] == [
        torch.int64,
        torch.bool,
        torch.int64,
    ]


def test_imdb_by_bytes(text_folder: Callable[..., Path]):
    folder = text_folder(train=PAIRS * 5, validation=PAIRS, test=PAIRS)
    options = {"path": str(folder), "cache_dir": str(folder / "cache"), "batch_size": 4}
    assert (IMDBBytes(**options).seq_len, IMDBBytes(**options).vocab_size) == (4000, 257)
    data = IMDBBytes(**options, seq_len=6)
    data.setup()
    (batch,) = data.test_dataloader()
    assert [row[mask].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)] == [
        [byte + 1 for byte in text] for text in (b"Hi!", b"caf\xc3\xa9 ", b" ", b"abcdef")
    ]
    characters = YelpPolarity(**options, seq_len=6)
    characters.setup()
    (other,) = characters.test_dataloader()
    assert not other["input_ids"].equal(batch["input_ids"])


def test_the_official_splits_are_used_when_there_are_all(text_folder: Callable[..., Path]):
    folder = text_folder(train=[("a", 0)] * 20, validation=[("b", 0)] * 3, test=[("c", 1)] * 2)
    data = YelpPolarity(path=str(folder), cache_dir=str(folder / "cache"), seq_len=1, batch_size=20)
    data.setup()
    (train,), (validation,), (test,) = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    assert [sorted(set((batch["input_ids"] - 1).flatten().tolist())) for batch in (train, validation, test)] == [
        [ord("a")],
        [ord("b")],
        [ord("c")],
    ]


def test_without_a_test_set_the_validation_set_is_the_test_set(text_folder: Callable[..., Path]):
    folder = text_folder(train=[("a", 0)] * 20, validation=[("b", 0)] * 3)
    data = YelpPolarity(path=str(folder), cache_dir=str(folder / "cache"), seq_len=1, batch_size=18)
    data.setup()
    (train,), (validation,), (test,) = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    assert [len(batch["labels"]) for batch in (train, validation, test)] == [18, 2, 3]
    assert (test["input_ids"] == ord("b") + 1).all()


def test_files_as_the_hub_names_them_are_found(text_folder: Callable[..., Path]):
    folder = text_folder(train=PAIRS * 5, test=PAIRS)
    (folder / "data").mkdir()
    (folder / "train.parquet").rename(folder / "data" / "train-00000-of-00001.parquet")
    (folder / "test").mkdir()
    (folder / "test.parquet").rename(folder / "test" / "0000.parquet")
    data = YelpPolarity(path=str(folder), cache_dir=str(folder / "cache"), seq_len=8, batch_size=2)
    data.setup()
    assert {name: len(rows) for name, (_, rows) in data._rows.items()} == {"train": 18, "validation": 2, "test": 4}


def test_linked_folders_are_folders(text_folder: Callable[..., Path], tmp_path: Path):
    text_folder(train=PAIRS * 5, test=PAIRS)
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for place, name in ((folder / "train", "train"), (elsewhere, "test")):
        place.mkdir(parents=True)
        (tmp_path / f"{name}.parquet").rename(place / "0000.parquet")
    (folder / "test").symlink_to(elsewhere)
    (elsewhere / "again").symlink_to(folder)  # without end, for who follows it
    data = YelpPolarity(path=str(folder), cache_dir=str(tmp_path / "cache"), seq_len=8, batch_size=2)
    data.setup()
    assert {name: len(rows) for name, (_, rows) in data._rows.items()} == {"train": 18, "validation": 2, "test": 4}


def test_a_single_parquet_file_is_split(text_folder: Callable[..., Path]):
    file = text_folder(train=PAIRS * 5) / "train.parquet"
    data = YelpPolarity(path=str(file), cache_dir=str(file.parent / "cache"), seq_len=8, batch_size=2)
    data.setup()
    assert {name: len(rows) for name, (_, rows) in data._rows.items()} == {"train": 16, "validation": 2, "test": 2}


@pytest.mark.parametrize(("cls", "folder"), [(AGNews, "ag_news"), (YelpPolarity, "yelp_reviews")])
def test_real_texts(shared: Callable[[str], str], tmp_path: Path, cls: type[AGNews], folder: str):
    import pyarrow.parquet as pq

    path = shared(folder)
    data = cls(path=path, cache_dir=str(tmp_path), batch_size=64, eval_batch_size=50, train_samples=640)
    data.prepare_data()
    data.setup()
    assert len(data.class_names) == data.num_classes
    batch = next(iter(data.test_dataloader()))
    rows = pq.read_table(Path(path) / "test.parquet").slice(0, 50).to_pydict()
    ids, mask = zip(*(expected(text, 1024) for text in rows["text"]), strict=True)
    assert batch["input_ids"].tolist() == list(ids)
    assert batch["attention_mask"].tolist() == list(mask)
    assert batch["labels"].tolist() == rows["label"]
    loader = iter(data.train_dataloader())
    next(loader)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        next(loader)
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-3
