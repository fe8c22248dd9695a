"""ListOps: drawn expressions against an evaluator of its own, and files in the released form."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sat import train
from sat.data import Digits, ListOps, SequenceDataModule, YelpPolarity
from sat.data import listops as module

# Said a second time, from the ids that a model sees.
WORDS = dict(enumerate(["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "MIN", "MAX", "MED", "SM", "END"], 1))


MEANING: dict[str, Callable[[list[int]], int]] = {
    "MIN": min,
    "MAX": max,
    "MED": lambda values: int(statistics.median(values)),
    "SM": lambda values: sum(values) % 10,
}


def evaluate(words: list[str]) -> tuple[int, int, int]:
    """Value, depth of the operations and most arguments of an expression, read from left to right."""
    stack: list[list[Any]] = [[""]]
    depth = most = 0
    for word in words:
        if word.isdigit():
            stack[-1].append(int(word))
        elif word != "END":
            stack.append([word])
            depth = max(depth, len(stack) - 1)
        else:
            name, *values = stack.pop()
            most = max(most, len(values))
            assert len(values) >= 2
            stack[-1].append(MEANING[name](values))
    ((_, value),) = stack
    return value, depth, most


def rows(data: ListOps, split: str) -> tuple[list[list[str]], list[int]]:
    """The words of each expression of a split, as its batches give them, and the labels."""
    tensors, chosen = data._rows_of(split)
    batch = data.dataset(tensors, chosen)[list(range(len(chosen)))]
    assert batch["input_ids"].shape[1] == data.seq_len
    ids = [row[mask] for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert not batch["input_ids"][~batch["attention_mask"]].any()
    return [[WORDS[i] for i in row.tolist()] for row in ids], batch["labels"].tolist()


def make(folder: Path, **arguments: Any) -> ListOps:
    options = {"cache_dir": str(folder / "cache"), "batch_size": 4, "num_samples": 500, **arguments}
    data = ListOps(**options)
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize("lengths", [(500, 2000), (100, 250), (3, 12)])
def test_drawn_expressions_have_their_values_and_keep_to_the_rules(tmp_path: Path, lengths: tuple[int, int]):
    data = make(tmp_path, min_length=lengths[0], max_length=lengths[1])
    everything: list[tuple[str, ...]] = []
    depths, most = set(), set()
    labels: list[int] = []
    for split, size in (("train", 480), ("validation", 10), ("test", 10)):
        expressions, values = rows(data, split)
        assert len(expressions) == size
        for words, value in zip(expressions, values, strict=True):
            assert lengths[0] < len(words) < lengths[1]
            expected, depth, arguments = evaluate(words)
            assert value == expected
            depths.add(depth)
            most.add(arguments)
            everything.append(tuple(words))
        labels += values
    assert len(set(everything)) == 500
    assert max(depths) <= 9
    assert max(most) <= 10
    if lengths[0] == 500:
        assert max(depths) == 9
        assert max(most) == 10
    assert set(labels) == set(range(10))


def test_digits_operators_and_arguments_come_as_often_as_the_reference_has_them():
    tokens, _ = module.draw_some(np.random.default_rng(0), 4000, 3, 10**9)
    words = [[WORDS[i + 1] for i in row] for row in tokens]
    flat = [word for row in words for word in row]
    operators = [flat.count(name) for name in ("MIN", "MAX", "MED", "SM")]
    assert max(operators) < 1.05 * min(operators)
    digits = [flat.count(str(digit)) for digit in range(10)]
    assert max(digits) < 1.05 * min(digits)
    # Of the first operation: 2 to 10 arguments alike, a quarter of them operations.
    counts: list[int] = []
    nested = 0
    for row in words:
        depth, count = 0, 0
        for word in row:
            if depth == 1 and word != "END":
                count += 1
                nested += not word.isdigit()
            depth += (word in ("MIN", "MAX", "MED", "SM")) - (word == "END")
        counts.append(count)
    shares = np.bincount(counts, minlength=11)[2:] / 4000
    assert abs(shares - 1 / 9).max() < 0.02
    assert abs(nested / sum(counts) - 0.25) < 0.01


def test_the_seed_decides_and_the_order_of_training_does_not(tmp_path: Path):
    small = {"min_length": 10, "max_length": 40, "num_samples": 100}
    first, again = (rows(make(tmp_path / name, seed=i, **small), "train") for i, name in enumerate("ab"))
    assert first == again
    other = rows(make(tmp_path / "a", draw_seed=1, **small), "train")
    assert other != first
    assert len(list((tmp_path / "a" / "cache").iterdir())) == 2


def test_the_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = {"min_length": 10, "max_length": 40, "num_samples": 100}
    first = rows(make(tmp_path, **small), "test")
    monkeypatch.setattr(module, "draw", None)  # would fail
    assert rows(make(tmp_path, **small), "test") == first
    longer = rows(make(tmp_path, seq_len=50, **small), "test")  # padding is not stored
    assert longer == first


def test_tokens_of_a_cache_that_do_not_exist_are_refused(tmp_path: Path):
    data = make(tmp_path, min_length=10, max_length=40)
    prepared = data.load()
    prepared.splits["test"]["bytes"][0] = 15
    with pytest.raises(ValueError, match="it has tokens that are none of ListOps' 15"):
        data.check_prepared(prepared)


LINES = {"train": ["( ( [MAX 2 ) 9 ) ]\t9", "( ( ( [SM 2 ) 9 ) ( ( [MED 4 ) 7 ) ] ) ]\t6"] * 10, "val": ["5\t5"] * 3}
LINES["test"] = ["[MIN 4 3 ]\t3"] * 2


def write(folder: Path, **changed: list[str]) -> Path:
    for split, lines in {**LINES, **changed}.items():
        (folder / f"basic_{split}.tsv").write_text("\n".join(["Source\tTarget", *lines, ""]))
    return folder


def test_released_files(tmp_path: Path):
    data = make(tmp_path, path=str(write(tmp_path)), seq_len=12)
    first, second = ["MAX", "2", "9", "END"], ["SM", "2", "9", "MED", "4", "7", "END", "END"]
    assert rows(data, "train") == ([first, second] * 10, [9, 6] * 10)
    assert rows(data, "validation") == ([["5"]] * 3, [5] * 3)
    assert rows(data, "test") == ([["MIN", "4", "3", "END"]] * 2, [3] * 2)
    (batch, *_) = data.train_dataloader()
    assert batch["input_ids"].dtype == torch.int64


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["( ( [MAX 2 ) 9 ) ]\t9", "( ( [MAX 2 ) 9"],
            "line 3 of .*basic_val.tsv is not .*, as in a file that is cut short",
        ),
        (["[MAX 2 9 ]\t"], "line 2 .* is not a whole expression, a tab and its value"),
        (["[MAX 2 9 ]\t12"], "line 2 .* is not a whole expression"),
        (["[MAX 2 9 ] 3\t9"], "line 2 .* is not a whole expression"),
        (["[MAX 2 9 ] ]\t9"], "line 2 .* is not a whole expression"),
        (["\t9"], "line 2 .* is not a whole expression"),
        (["[AVG 2 9 ]\t9"], r"line 2 of .* has '\[AVG', which is no token of ListOps"),
        (["[MAX" + " 2" * 11 + " ]\t2"], "line 2 .* is an expression of 13 tokens, but --data.seq_len is 12; raise it"),
        ([], "the basic_val split in .* has 0 rows"),
    ],
)
def test_released_files_that_are_not_whole(tmp_path: Path, lines: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, path=str(write(tmp_path, val=lines)), seq_len=12)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_last_line_without_an_end(tmp_path: Path):
    file = write(tmp_path) / "basic_test.tsv"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"line 3 of .*basic_test.tsv is not a whole expression"):
        make(tmp_path, path=str(tmp_path))


def test_files_that_are_missing_or_of_another_kind(tmp_path: Path):
    (write(tmp_path) / "basic_val.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no basic_val.tsv; point --data.path at a folder with all of"):
        make(tmp_path, path=str(tmp_path))
    (tmp_path / "basic_val.tsv").write_bytes(b"\x1f\x8b\xff\n" * 3)
    with pytest.raises(ValueError, match="does not begin with the line Source, tab, Target; replace it"):
        make(tmp_path, path=str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_length": 2}, "min_length must be an integer of at least 3, got 2; correct --data.min_length"),
        ({"min_length": 9, "max_length": 10}, "max_length must be an integer of at least 11, got 10"),
        ({"num_samples": 49}, "num_samples must be an integer of at least 50"),
        ({"draw_seed": -1}, "draw_seed must be an integer of at least 0"),
        ({"seq_len": 1998}, r"of up to 1999 tokens do not fit a seq_len of 1998; raise --data.seq_len to 1999, or"),
        ({"min_length": 3, "max_length": 6}, "5000 different expressions of fewer than 6 tokens .*num_samples to 1000"),
    ],
)
def test_impossible_arguments(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ListOps(**{"num_samples": 5000, **arguments})


def test_lengths_that_are_hardly_ever_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "DRAWN_AT_ONCE", 100)
    with pytest.raises(ValueError, match=r"of 1,600 expressions drawn .*, 0 have more than 9000 .*lower --data"):
        make(tmp_path, min_length=9000, max_length=9100, seq_len=9100)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(("data", "quantile"), [(ListOps(), 0.98), (YelpPolarity(), 0.99), (Digits(), 0.96)])
def test_spion_keeps_what_its_authors_keep(data: SequenceDataModule, quantile: float):
    run = SimpleNamespace(data=data, model=SimpleNamespace(attention_options={}))
    trainer = SimpleNamespace(val_check_interval=0.5, accumulate_grad_batches=1)
    assert train.Run._spion(run, trainer, 10)["quantile"] == quantile  # type: ignore[arg-type]


def test_real_files(shared: Callable[[str], str], tmp_path: Path):
    data = make(tmp_path, path=shared("listops"))
    expressions, values = rows(data, "test")
    assert [evaluate(words)[0] for words in expressions] == values
