"""The floor for models on texts: counts that NumPy counts, too, and classes that follow from them."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from experiments import byte_counts
from experiments.accuracy_settings import EVERY_TASK


def test_shares_are_the_counts_of_real_tokens():
    ids = torch.randint(0, 7, (5, 11))
    real = torch.arange(11) < torch.tensor([[11], [0], [3], [7], [1]])
    batch = {"input_ids": ids, "attention_mask": real, "labels": torch.arange(5)}
    found, labels = byte_counts.shares([batch, batch], 7)
    expected = [np.bincount(row[kept], minlength=7) / 11 for row, kept in zip(ids.numpy(), real.numpy(), strict=True)]
    assert np.allclose(found.numpy(), expected * 2)
    assert labels.tolist() == [0, 1, 2, 3, 4] * 2


def test_what_bytes_tell_is_found_and_their_order_is_not(tmp_path, monkeypatch, capsys):
    """AG News: the class is a letter. Yelp: it is the order of two letters. Reviews: nothing tells it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    texts = {
        "ag_news": lambda label: "xyzw"[label] * 20 + "".join(rng.choice(list("abc"), 20)),
        "yelp": lambda label: ("ab" if label else "ba") * 20,
        "text": lambda label: "".join(rng.choice(list("abcdef"), 40)),
    }
    for task, text in texts.items():
        folder = tmp_path / str(EVERY_TASK[task].folder)
        folder.mkdir()
        for split, count in (("train", 480), ("test", 400)):
            labels = np.arange(count) % (4 if task == "ag_news" else 2)
            table = {"text": [f"{text(label)}{' ' * (i % 7)}" for i, label in enumerate(labels)], "label": labels}
            pq.write_table(pa.table(table), folder / f"{split}.parquet")
    byte_counts.main(["--data", str(tmp_path), "--out", str(tmp_path)])
    found = {each["task"]: each for each in json.loads((tmp_path / "byte_counts.json").read_text())["tasks"]}
    assert found["ag_news"]["test_accuracy"] == 1
    assert found["yelp"]["test_accuracy"] <= 0.6
    assert found["text"]["test_accuracy"] <= 0.6
    assert [found[task]["bytes"] for task in texts] == [256, 256, 512]
    assert "ag_news: 1.000 on 400 test texts" in capsys.readouterr().out


def test_folders_that_are_not_there_are_named(tmp_path, capsys):
    (tmp_path / "imdb").mkdir()
    with pytest.raises(SystemExit):
        byte_counts.main(["--data", str(tmp_path)])
    assert "has no folder ag_news, yelp_reviews; docs/paper.md says" in capsys.readouterr().err
