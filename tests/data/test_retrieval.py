"""Retrieval: pairs from files in the released form, and the two towers that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sat import train
from sat.data import Retrieval
from sat.models import SequenceClassifier

ROWS = [
    (b"1.0", b"good paper", b"cited"),
    (b"0", b"caf\xc3\xa9 au lait", b""),
    (b"1", b"x", b"y" * 20),
    (b"0.0", b"a", b"b"),
]


def write(folder: Path, **changed: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for split, times in (("train", 10), ("eval", 1), ("test", 2)):
        lines = b"".join(b"%b\tP01-1\tP02-2\t%b\t%b\n" % row for row in ROWS * times)
        (folder / f"new_aan_pairs.{split}.tsv").write_bytes(changed.get(split, lines))
    return folder


def make(folder: Path, **arguments: Any) -> Retrieval:
    data = Retrieval(path=str(folder), cache_dir=str(folder / "cache"), **{"seq_len": 8, "batch_size": 4, **arguments})
    data.prepare_data()
    data.setup()
    return data


def test_pairs_are_bytes_plus_one_cut_and_padded(tmp_path: Path):
    data = make(write(tmp_path))
    assert (data.vocab_size, data.num_classes, data.towers) == (257, 2, 2)
    assert data.size() == "2 x 8 tokens"
    assert {name: len(rows) for name, (_, rows) in data._rows.items()} == {"train": 40, "validation": 4, "test": 8}
    (batch,) = data.val_dataloader()
    assert batch["labels"].tolist() == [1, 0, 1, 0]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 2, 8)
    for row, (_, *texts) in enumerate(ROWS):
        for side, text in enumerate(texts):
            mask = batch["attention_mask"][row, side]
            assert batch["input_ids"][row, side][mask].tolist() == [byte + 1 for byte in (text or b" ")[:8]]
            assert not batch["input_ids"][row, side][~mask].any()


def test_the_cache_is_read_and_what_it_cannot_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = make(write(tmp_path))
    monkeypatch.setattr("sat.data.retrieval.read_pairs", None)  # would fail
    assert len(make(tmp_path)._rows["train"][1]) == 40
    prepared = data.load()
    data.check_prepared(prepared)
    del prepared.splits["test"]["bytes2"]
    with pytest.raises(ValueError, match="it has no buffer of tokens"):
        data.check_prepared(prepared)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1\ta\tb\tone\ttwo\n1\ta\tb\ton", r"line 2 of .*new_aan_pairs.eval.tsv \(b'1.*cut short; download it again"),
        (b"1\ta\tb\tone\ttwo", "line 1 of .* as in a file that is cut short"),
        (b"2\ta\tb\tone\ttwo\n", "line 1 of .* is not a label 0 or 1, two names and two texts"),
        (b"1\ta\tb\tone\n", "line 1 of .* is not a label"),
        (b"", "the new_aan_pairs.eval split in .* has 0 rows"),
    ],
)
def test_files_that_are_not_whole(tmp_path: Path, content: bytes, message: str):
    with pytest.raises(ValueError, match=message):
        make(write(tmp_path, eval=content))
    assert list((tmp_path / "cache").iterdir()) == []


def test_files_that_are_missing(tmp_path: Path):
    (write(tmp_path) / "new_aan_pairs.test.tsv").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"has no new_aan_pairs.test.tsv; point --data.path at a folder with all"
    ):
        make(tmp_path)
    with pytest.raises(ValueError, match=r"download lra_release.gz .* as --data.path"):
        Retrieval()


def test_two_towers_share_the_encoder_and_the_head_sees_both_means():
    model = SequenceClassifier(10, 6, 3, width=8, mlp_dim=8, head_dim=5, block_size=2, towers=2).eval()
    ids, mask = torch.randint(1, 10, (4, 2, 6)), torch.rand(4, 2, 6) < 0.7
    mask[..., 0] = True
    means = [model.encoder(ids[:, side], mask[:, side]).mean(1) for side in (0, 1)]
    a, b = means
    expected = model.head(torch.cat([a, b, a * b, a - b], 1))
    assert torch.allclose(model(ids, mask), expected, atol=1e-6)
    assert not torch.allclose(model(ids.flip(1), mask.flip(1)), expected)
    one = SequenceClassifier(10, 6, 3, width=8, mlp_dim=8, head_dim=5, block_size=2)
    assert one.encoder.state_dict().keys() == model.encoder.state_dict().keys()
    with pytest.raises(ValueError, match="towers must be 1 or 2, got 3"):
        SequenceClassifier(10, 6, 3, towers=3)


def test_a_run_on_pairs_becomes_sparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data")
    small = ["num_layers 1", "width 16", "mlp_dim 16", "block_size 4"]
    options = [f"--model.{name}" for name in small] + ["--data.seq_len 16", "--data.batch_size 8", "--data.path data"]
    options += ["--data.cache_dir cache", "--trainer.max_steps 8", "--trainer.val_check_interval 4"]
    options += ["--trainer.accelerator cpu", "--optimizer.warmup_steps 2", "--sparsity.interval 2"]
    options += ["--sparsity.max_dense_steps 4", "--sparsity.density 0.4"]
    summary = train.main(["--config", "lra_retrieval", *" ".join(options).split()])
    assert [transition["step"] for transition in summary["transitions"]] == [4]
    assert set(summary["median_step_ms"]) == {"dense", "sparse"}
    assert set(summary["test_accuracy"]) == {"final", "best"}
