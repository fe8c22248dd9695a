"""Prepared once, kept whole, made anew when damaged."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sat.data import YelpPolarity

PAIRS = [("good", 1), ("bad", 0)] * 10


def prepare(folder: Path, **arguments: int) -> YelpPolarity:
    data = YelpPolarity(path=str(folder), cache_dir=str(folder / "cache"), batch_size=2, **{"seq_len": 8, **arguments})
    data.prepare_data()
    data.setup()
    return data


def everything(data: YelpPolarity) -> list[torch.Tensor]:
    return [value for batch in data.test_dataloader() for value in batch.values()]


def test_a_second_module_reads_what_the_first_wrote(text_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    folder = text_folder(train=PAIRS, test=PAIRS)
    first = everything(prepare(folder))
    (file,) = (folder / "cache").iterdir()
    assert file.name.startswith("yelp-polarity-")
    monkeypatch.setattr(YelpPolarity, "encode", None)  # would fail
    second = everything(prepare(folder))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_other_contents_or_lengths_are_prepared_apart(text_folder: Callable[..., Path]):
    folder = text_folder(train=PAIRS, test=PAIRS)
    prepare(folder)
    prepare(folder, seq_len=3)
    assert len(list((folder / "cache").iterdir())) == 2
    text_folder(test=[("changed", 1)])
    assert len(everything(prepare(folder))) == 3
    assert len(list((folder / "cache").iterdir())) == 3


@pytest.mark.parametrize("damage", ["cut", "emptied", "other", "flipped"])
def test_a_damaged_file_is_made_anew_with_a_sentence(
    text_folder: Callable[..., Path], caplog: pytest.LogCaptureFixture, damage: str
):
    folder = text_folder(train=PAIRS, test=PAIRS)
    expected = everything(prepare(folder))
    (file,) = (folder / "cache").iterdir()
    whole = file.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    file.write_bytes({"cut": whole[:-40], "emptied": b"", "other": b"not a cache" * 9, "flipped": flipped}[damage])
    with caplog.at_level(logging.WARNING, logger="sat.data"):
        got = everything(prepare(folder))
    assert "is damaged" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert list((folder / "cache").iterdir()) == [file]
    caplog.clear()
    assert everything(prepare(folder))
    assert caplog.text == ""


def test_a_failed_preparation_leaves_nothing_behind(text_folder: Callable[..., Path]):
    folder = text_folder(train=[("a", 7)], test=PAIRS)
    with pytest.raises(ValueError, match="label 7"):
        prepare(folder)
    assert list((folder / "cache").iterdir()) == []


def test_the_cache_lies_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert YelpPolarity().cache_dir == tmp_path / "sat"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert YelpPolarity().cache_dir == tmp_path / ".cache" / "sat"
