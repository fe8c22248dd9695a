from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from sat.layout import BlockLayout
from tests.interruption import processes

# Texts and not digits, because these are prepared and kept. The criterion is met as soon as it is defined: at the
# third observation, step 9. Epochs have 8 steps, validation comes every 7, a checkpoint every 3.
CONFIG = """
name: tiny
data: {name: ag_news, path: texts, cache_dir: cache, seq_len: 48, batch_size: 8, eval_samples: 20}
model: {num_layers: 2, width: 16, num_heads: 2, mlp_dim: 16, head_dim: 16, dropout: 0.1, block_size: 8}
optimizer: {lr: 3.0e-3, warmup_steps: 3}
sparsity: {density: 0.3, theta: -100.0, delta: 1000000.0, interval: 3, samples: 4}
trainer: {max_steps: 20, accelerator: cpu, val_check_interval: 7, check_val_every_n_epoch: null, log_every_n_steps: 5}
"""
COMMAND = ["--config", "tiny.yaml"]
RESUME = [*COMMAND, "--ckpt_path", "last"]


def write_inputs(folder: Path) -> None:
    (folder / "texts").mkdir(parents=True)
    (folder / "tiny.yaml").write_text(CONFIG)
    words = ["match", "stock", "planet", "treaty"]
    for split, size in (("train", 72), ("test", 20)):
        labels = [i % 4 for i in range(size)]
        texts = [" ".join([words[i % 4]] * (1 + i % 7)) for i in range(size)]
        pq.write_table(pa.table({"text": texts, "label": labels}), folder / "texts" / f"{split}.parquet")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a config, texts, and nothing else."""
    write_inputs(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    write_inputs(folder)
    status, output = processes.run(folder, COMMAND, ("count_events", "events"))
    assert status == 0, output
    return folder


def run_folder(folder: Path) -> Path:
    (found,) = (folder / "runs" / "tiny").iterdir()
    return found


def assert_nothing_is_half_written(folder: Path) -> None:
    """Every file under its own name can be read to its end; logs, which grow by lines, are not meant."""
    for path in folder.rglob("*"):
        if path.name.startswith(".") or not path.is_file() or {"csv", "tensorboard"} & set(path.parts):
            continue
        if path.suffix == ".ckpt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  no dict
                    file.get_tensor(name)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".yaml":
            assert path.read_text().endswith("\n")


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Equal to the last bit."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    else:
        assert one == other or (one != one and other != other), where  # nan is itself here


def assert_same_run(one: Path, other: Path) -> None:
    """Two folders hold the same weights, optimizer, layouts, random state and results."""
    folders = run_folder(one), run_folder(other)
    for name in ("last.ckpt", "best.ckpt"):
        states = [torch.load(folder / "checkpoints" / name, weights_only=True) for folder in folders]
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
            assert_same(states[0][key], states[1][key], f"{name}.{key}")
        for callback in ("AdaptiveSparsity", "ExactResume"):
            assert_same(states[0]["callbacks"][callback], states[1]["callbacks"][callback], f"{name}.{callback}")
    # Not the bytes: safetensors writes metadata in an order of its own.
    layouts = [{p.name: BlockLayout.load(p) for p in (folder / "layouts").iterdir()} for folder in folders]
    assert layouts[0] == layouts[1]
    assert len(layouts[0]) == 2
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    for key in ("steps", "transitions", "test_accuracy", "validation_accuracy", "validated_at", "best_checkpoint"):
        assert_same(summaries[0][key], summaries[1][key], key)
