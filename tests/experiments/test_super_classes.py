"""Tiny ImageNet in groups, for a task with super-classes."""

from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from experiments.super_classes import GROUPS, convert


def write(path: Path, names: list[str]) -> Path:
    features = Features({"img": Value("string"), "label": ClassLabel(names=names)})
    Dataset.from_dict({"img": ["a", "b", "c"], "label": [2, 0, 1]}, features=features).to_parquet(path)
    return path


def test_all_200_classes_are_in_one_of_14_groups() -> None:
    members = [name for group in GROUPS.values() for name in group.split("; ")]
    assert len(members) == len(set(members)) == 200
    assert len(GROUPS) == 14


def test_labels_become_those_of_the_groups(tmp_path: Path) -> None:
    source = write(tmp_path / "fine.parquet", ["n01443537 goldfish", "n12267677 acorn", "n01855672 goose"])
    convert(source, tmp_path / "groups.parquet")
    rows = Dataset.from_parquet(str(tmp_path / "groups.parquet"), cache_dir=str(tmp_path / "cache"))
    assert rows["img"][:] == ["a", "b", "c"]
    named = [rows.features["label"].names[label] for label in rows["label"]]
    assert named == ["birds", "amphibians, fish and reptiles", "food and plants"]


def test_other_classes_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "other.parquet", ["goldfish", "n1 acorn", "n2 goose"])
    with pytest.raises(ValueError, match="'goldfish' is no class of Tiny ImageNet that stands in a group"):
        convert(source, tmp_path / "groups.parquet")
