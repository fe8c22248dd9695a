"""Texts as the tokens of a pretrained model, from hand-made files."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sat.data import IMDB, MRPC, TokenizedTextDataModule
from sat.data.tokens import load_tokenizer

from .models import WORDS, write_bert, write_pairs, write_tokenizer

transformers = pytest.importorskip("transformers")

REVIEWS = [("The cat runs", 1), ("", 0), ("dogs " * 40, 1), ("Moon, sun!", 0)]


def make(cls: type[TokenizedTextDataModule], folder: Path, tokenizer: Path, **options: Any) -> TokenizedTextDataModule:
    cache = folder / "cache"
    return cls(path=str(folder), cache_dir=str(cache), tokenizer=str(tokenizer), **{"batch_size": 4, **options})


def test_pairs_are_tokenized_as_transformers_does_cut_and_padded(tmp_path: Path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    data = make(MRPC, write_pairs(tmp_path / "data"), tokenizer, seq_len=14, eval_batch_size=16)
    assert (data.vocab_size, data.num_classes, data.seq_len, data.metric) == (14, 2, 14, "f1")
    data.prepare_data()
    data.setup()
    batches = list(data.test_dataloader())
    assert [len(batch["labels"]) for batch in batches] == [16, 16, 8]
    rows = pq.read_table(tmp_path / "data" / "test.parquet").to_pydict()
    expected = transformers.AutoTokenizer.from_pretrained(tokenizer)(
        rows["sentence1"], rows["sentence2"], truncation=True, max_length=14, padding="max_length", return_tensors="pt"
    )
    got = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    assert set(got) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    for key in ("input_ids", "token_type_ids"):
        assert got[key].dtype == torch.int64
        assert got[key].equal(expected[key])
    assert got["attention_mask"].equal(expected["attention_mask"].bool())
    assert got["labels"].tolist() == rows["label"]
    assert {14, 5} <= set(got["attention_mask"].sum(1).tolist())  # some were cut, some padded


def test_single_texts_without_types(tmp_path: Path, text_folder: Callable[..., Path]):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", model_input_names=["input_ids", "attention_mask"])
    data = make(IMDB, text_folder(train=REVIEWS * 5, test=REVIEWS), tokenizer, seq_len=8)
    assert data.metric == "acc"
    data.setup()
    (batch,) = data.test_dataloader()
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    cls, sep, cat, dog, runs, s, the = 2, 3, 5, 6, 11, 13, 1
    assert batch["input_ids"].tolist() == [
        [cls, the, cat, runs, sep, 0, 0, 0],
        [cls, sep, 0, 0, 0, 0, 0, 0],
        [cls, dog, s, dog, s, dog, s, sep],
        [cls, 8, 1, 7, 1, sep, 0, 0],
    ]
    assert batch["attention_mask"].equal(batch["input_ids"] != 0)


def test_a_text_of_no_tokens_has_one_to_attend_to(tmp_path: Path, text_folder: Callable[..., Path], monkeypatch: Any):
    data = make(IMDB, text_folder(train=REVIEWS * 5, test=REVIEWS), write_tokenizer(tmp_path / "tokenizer"), seq_len=8)
    plain = data.tokenizer
    monkeypatch.setattr(
        type(plain), "__call__", lambda self, texts, **_: {"input_ids": [[5] * bool(text) for text in texts]}
    )
    data.setup()
    (batch,) = data.test_dataloader()
    assert batch["input_ids"][:, 0].tolist() == [5, 0, 5, 5]
    assert batch["attention_mask"].sum(1).tolist() == [1, 1, 1, 1]


def test_the_cache_depends_on_what_is_in_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, tokenizer = write_pairs(tmp_path / "data"), write_tokenizer(tmp_path / "tokenizer")

    def prepare(tokenizer: Path, **options: int) -> list[torch.Tensor]:
        data = make(MRPC, folder, tokenizer, **{"seq_len": 16, **options})
        data.setup()
        return [value for batch in data.test_dataloader() for value in batch.values()]

    def files() -> int:
        return len(list((folder / "cache").iterdir()))

    first = prepare(tokenizer)
    other = prepare(write_tokenizer(tmp_path / "other", WORDS[::-1]))
    assert files() == 2
    assert not all(a.equal(b) for a, b in zip(first, other, strict=True))
    prepare(write_tokenizer(tmp_path / "cased", do_lower_case=False))
    assert files() == 3
    prepare(tokenizer, seq_len=12)
    assert files() == 4
    copy = shutil.copytree(tokenizer, tmp_path / "copy")
    data = make(MRPC, folder, tokenizer, seq_len=16)
    before = data.encoding()
    data.tokenizer("moon", truncation=True, max_length=3)  # which it remembers
    assert data.encoding() == before
    monkeypatch.setattr(MRPC, "encode", None)  # would fail
    assert all(a.equal(b) for a, b in zip(first, prepare(copy), strict=True))
    # The same folder with another content
    write_tokenizer(tokenizer, [*WORDS, "new"])
    with pytest.raises(TypeError):
        prepare(tokenizer)


def test_mrpc_is_one_of_the_data_sets_of_glue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets
    import huggingface_hub

    folder = write_pairs(tmp_path / "data")
    splits = datasets.DatasetDict(
        {name: datasets.Dataset(pq.read_table(folder / f"{name}.parquet")) for name in ("train", "validation", "test")}
    )
    asked: list[Any] = []
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **__: asked.append(names) or splits)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    options: dict[str, Any] = {"cache_dir": str(tmp_path / "cache"), "tokenizer": str(tokenizer), "seq_len": 16}
    hub, local = MRPC(**options, batch_size=4), MRPC(path=str(folder), **options, batch_size=4)
    for data in (hub, local):
        data.setup()
    assert asked == [("nyu-mll/glue", "mrpc")]
    pairs = zip(hub.val_dataloader(), local.val_dataloader(), strict=True)
    assert all(a[key].equal(b[key]) for a, b in pairs for key in a)


class TestErrors:
    def test_no_tokenizer(self):
        with pytest.raises(ValueError, match=r"MRPC needs the tokenizer of a model; set model\.pretrained or"):
            MRPC()

    def test_a_folder_without_one(self, tmp_path: Path):
        message = (
            rf"^the folder {re.escape(str(tmp_path))} holds no tokenizer that can be read \(.*; correct --data\.tok"
        )
        with pytest.raises(ValueError, match=message):
            MRPC(tokenizer=str(tmp_path))

    def test_a_model_without_its_tokenizer(self, tmp_path: Path):
        (write_bert(tmp_path) / "vocab.txt").unlink()
        (tmp_path / "tokenizer_config.json").unlink()
        with pytest.raises(ValueError, match=r"holds no vocabulary, .* save the tokenizer there too"):
            load_tokenizer(str(tmp_path))

    def test_code_of_a_folder_is_never_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
        config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": config["auto_map"]}))
        monkeypatch.setattr("builtins.input", lambda *_: "y")
        with pytest.raises(ValueError, match="holds no tokenizer that can be read"):
            load_tokenizer(str(tmp_path))
        assert not (tmp_path / "ran").exists()

    def test_a_damaged_one(self, tmp_path: Path):
        write_tokenizer(tmp_path)
        transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
        whole = (tmp_path / "tokenizer.json").read_text()
        (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="holds no tokenizer that can be read"):
            MRPC(tokenizer=str(tmp_path))

    @pytest.mark.parametrize("name", ["nowhere/none", "./nowhere", "/nowhere/none", "no name!"])
    def test_a_name_that_is_nothing(self, name: str):
        message = rf"^'{name}' is no folder, and the hub gives no tokenizer of that name \(.*or connect to the internet"
        with pytest.raises(ConnectionError, match=message) as caught:
            MRPC(tokenizer=name)
        assert "\n" not in str(caught.value)

    def test_no_room_for_a_token_of_each_text(self, tmp_path: Path):
        tokenizer = str(write_tokenizer(tmp_path))
        with pytest.raises(ValueError, match="seq_len must be an integer of at least 5, got 4"):
            MRPC(tokenizer=tokenizer, seq_len=4)
        with pytest.raises(ValueError, match="seq_len must be an integer of at least 3, got 2"):
            IMDB(tokenizer=tokenizer, seq_len=2)

    def test_no_token_for_padding(self, tmp_path: Path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(write_tokenizer(tmp_path))
        tokenizer.pad_token = None
        tokenizer.save_pretrained(tmp_path / "no_pad")
        with pytest.raises(ValueError, match="has no token for padding; set its pad_token"):
            MRPC(tokenizer=str(tmp_path / "no_pad"))

    def test_without_transformers(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ImportError, match=r"pip install 'transformers>=5\.10'"):
            MRPC(tokenizer="any")

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"text": ["a", "b"]}, "has the columns text, label, expected one named sentence1"),
            ({"sentence1": ["a", "b"]}, "expected one named sentence2"),
            ({"sentence1": ["a", "b"], "sentence2": ["a", None]}, "row 1 of .* has no sentence2; leave such rows out"),
            ({"sentence1": [1, 2], "sentence2": ["a", "b"]}, "column sentence1 of .* is of the type int64"),
        ],
    )
    def test_wrong_rows(self, tmp_path: Path, columns: dict[str, list[Any]], message: str):
        pq.write_table(pa.table({**columns, "label": [0, 1]}), tmp_path / "train.parquet")
        with pytest.raises(ValueError, match=message):
            make(MRPC, tmp_path, write_tokenizer(tmp_path / "tokenizer")).prepare_data()


@pytest.mark.parametrize(("cls", "name", "length"), [(MRPC, "mrpc", 128), (IMDB, "imdb", 512)])
def test_real_texts(
    shared: Callable[[str], str], tmp_path: Path, cls: type[TokenizedTextDataModule], name: str, length: int
):
    path = Path(shared(name))
    tokenizer = path.parents[1] / "models" / "bert-base-uncased-tokenizer"
    if not tokenizer.is_dir():
        pytest.skip("no copy of bert-base-uncased's tokenizer at hand")
    for split in ("train", "test"):
        pq.write_table(pq.read_table(path / f"{split}.parquet").slice(0, 200), tmp_path / f"{split}.parquet")
    data = make(cls, tmp_path, tokenizer, seq_len=length, eval_batch_size=200)
    data.setup()
    assert len(data.class_names) == 2
    (batch,) = data.test_dataloader()
    rows = pq.read_table(tmp_path / "test.parquet").to_pydict()
    expected = transformers.BertTokenizerFast.from_pretrained(tokenizer)(
        *(rows[column] for column in cls.text_columns),
        truncation=True,
        max_length=length,
        padding="max_length",
        return_tensors="pt",
    )
    assert batch["input_ids"].equal(expected["input_ids"])
    assert batch["token_type_ids"].equal(expected["token_type_ids"])
