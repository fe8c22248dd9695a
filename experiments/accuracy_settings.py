"""What the runs of ``experiments.accuracy`` are: tasks, methods and scales, as overrides of the shipped configs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sat.baselines import LongformerAttention, StructureAttention, make_baseline
from sat.runs import read_config, shipped_configs

Settings = dict[str, Any]


class Task(NamedTuple):
    """The config of a task, its folder in --data, what makes it small, its steps at either scale, and its pretraining.

    Without ``steps``, a task has --scale small only; those of the Arena then run as their configs stand.
    """

    config: str
    folder: str | None
    small: Settings
    steps: int | None
    small_steps: int = 1000
    pretrain: Settings | None = None  # what a run is at --scale small that learns to find hidden tokens first


# Steps at --scale paper. One task, five methods and one seed are to fit into ten minutes of an H200: 110 seconds a
# run, of which 35 go into starting, compiling kernels, validation and tests. A step of 256 sequences in 2 layers is
# reckoned at 25 ms, for the slowest method, which is an estimate and no measurement: 75 s / 25 ms = 3,000 steps. Twice
# the batch or twice the layers have half of them. --minutes guards against an estimate that was too low.
TASKS = {
    "digits": Task("quickstart.yaml", None, {"data.image_size": 16}, None),
    "cifar10": Task("cifar10_paper.yaml", "cifar10", {"data.image_size": 16}, 3000),
    "inaturalist": Task("inaturalist_paper.yaml", "inaturalist", {"data.image_size": 16}, 1500),
    # Letters are learned slowly.
    "ag_news": Task("ag_news_paper.yaml", "ag_news", {"data.seq_len": 256}, 750, 2000),
    "yelp": Task("yelp_paper.yaml", "yelp_reviews", {"data.seq_len": 256}, 750),
}
DEFAULT_TASKS = {
    "small": ["digits", "cifar10", "ag_news", "yelp"],
    "paper": ["cifar10", "inaturalist", "ag_news", "yelp"],
}

# The Long Range Arena, of experiments.arena. Small: sizes at which a dense Transformer learns in minutes of one core.
# Expressions at a quarter of the learning rate: at 2e-3 dense attention ends at .326 after 2,000 steps. Reviews and
# contours are learned in two runs: first to find hidden tokens, then the task. From scratch all methods end at .58 on
# reviews, below what counts of their bytes tell (.590, experiments.byte_counts).
ARENA = {
    "listops": Task(
        "lra_listops.yaml",
        None,
        {"data.seq_len": 256, "data.min_length": 100, "data.max_length": 250, "optimizer.lr": 5e-4},
        None,
        3000,
    ),
    "text": Task(
        "lra_text.yaml",
        "imdb",
        {
            "data.seq_len": 512,
            "data.eval_samples": 5000,
            "model.positions": "sine",
            "optimizer.lr": 5e-4,
        },
        None,
        400,
        {"data.hide": 0.25, "optimizer.lr": 2e-3, "trainer.max_steps": 800},
    ),
    "retrieval": Task("lra_retrieval.yaml", "lra_retrieval", {"data.seq_len": 512}, None),
    "image": Task("lra_image.yaml", "cifar10", {"data.image_size": 16}, None),
    # From scratch nobody learns it in minutes: after 4,000 steps of 32 pictures dense attention is at chance, and so it
    # is with easier pictures, gray in few levels, or positions that begin as sines alone (a small CNN leaves chance
    # after 500 steps; the published runs take 62,400 of 256). Pretrained to find hidden pixels, with such positions,
    # it is learned.
    "pathfinder": Task(
        "lra_pathfinder.yaml",
        None,
        {
            "data.image_size": 16,
            "data.contour_length": 2,
            "data.num_samples": 80_000,
            "model.positions": "sine",
            "optimizer.lr": 1e-3,
        },
        None,
        3000,
        {"data.hide": 0.4, "trainer.max_steps": 2000},
    ),
}
# Small, image is cifar10 of experiments.accuracy once more.
ARENA_TASKS = {"small": ["listops", "text", "pathfinder"], "paper": [*ARENA]}
EVERY_TASK = TASKS | ARENA

SMALL: Settings = {
    "data.batch_size": 32,
    "data.eval_batch_size": 100,
    "model.num_layers": 2,
    "model.width": 64,
    "model.num_heads": 2,
    "model.mlp_dim": 128,
    "model.block_size": 8,
    "model.dropout": 0.0,  # the runs are too short to overfit
    "optimizer.lr": 2e-3,
    "optimizer.warmup_steps": 100,
    "sparsity.density": 0.1,
    "sparsity.theta": 1e9,  # after a tenth of the steps, if the method does not say otherwise
    "sparsity.agreement": None,
    "sparsity.min_dense_steps": 0,
    "sparsity.lr_factor": 1.0,  # the cycle of the learning rate is short enough
    "trainer.limit_val_batches": 0,  # the final model is compared: no best one has to be found, and tested too
    "trainer.precision": "32-true",
    "trainer.accelerator": "cpu",
}

# SAT as we recommend it. The one place to change when that changes.
SAT: Settings = {
    "model.attention": "adaptive",
    "model.pruned": "drop",
    "sparsity.mask": "fisher",
    "sparsity.per_head": True,
    "sparsity.by_offset": True,
    # When the choice has settled, which by offset is soon. Each dense step is one that the sparse model does not get.
    "sparsity.agreement": 0.9,
    "sparsity.agreement_lag": 3,
    "sparsity.lr_factor": 1.0,
    "sparsity.keep_diagonal": True,
    "sparsity.min_blocks_per_row": 1,
    "sparsity.interval": 5,
    "sparsity.samples": 32,
}
# As published: what configs/*_paper.yaml say, said again because the digits have no such config.
SAT_PAPER: Settings = {
    "model.attention": "adaptive",
    "model.pruned": "zero",
    "sparsity.mask": "gram",
    "sparsity.per_head": False,
    "sparsity.share_budget": False,
    "sparsity.by_offset": False,
    "sparsity.keep_diagonal": False,
    "sparsity.min_blocks_per_row": 0,
    "sparsity.interval": 1,
    "sparsity.revise_interval": None,
    "sparsity.guard": None,
}


def attention_options(attention: str, /, **options: Any) -> Settings:
    return {"model.attention": attention, **{f"model.attention_options.{name}": v for name, v in options.items()}}


# What the paper compared with, by scale. paper: its settings, whatever their density. small: as near to a tenth of the
# 256 x 256 scores as each method comes, which tests/experiments/test_accuracy.py measures:
# - a window of 24 (25 keys, fewer at the ends, and a global row and column) is .103, one of 22 .095;
# - BigBird, its ends and its window alone, takes a fifth of 32 x 32 blocks. In blocks of 4, with a window of 3 and one
#   global block, there is room for 2 random blocks a row: .106. One would be .091;
# - LSG: blocks of 4 (12 keys beside each other) and 6 sparse tokens on either side are .098.
BASELINES: dict[str, dict[str, Settings]] = {
    "small": {
        "longformer": attention_options("longformer", window=24),
        "bigbird": attention_options(
            "structure", mode="bigbird", block=4, num_sliding_window_blocks=3, num_random_blocks=2
        ),
        "lsg": attention_options("lsg", block_size=4, sparse_block_size=6, sparsity_factor=2, selection="norm"),
    },
    "paper": {
        "longformer": attention_options("longformer", window=64),
        "bigbird": attention_options("bigbird", block_size=32, num_random_blocks=3),
        "lsg": attention_options("lsg", block_size=32, sparse_block_size=32, sparsity_factor=2, selection="norm"),
    },
}
# In tables and figures in this order.
METHODS = ["dense", "sat", "sat-paper", "longformer", "bigbird", "lsg", "window", "explicit"]
DEFAULT_METHODS = [name for name in METHODS if name != "explicit"]  # dense, with its scores in full


def window_blocks(blocks: int, density: float) -> int:
    """The odd window, in blocks, that holds next to ``density`` of ``blocks x blocks``."""

    def kept(window: int) -> int:
        side = window // 2
        return blocks * window - side * (side + 1)  # the corners are outside

    return min(range(1, blocks, 2), key=lambda window: abs(kept(window) - density * blocks**2))


def overrides(scale: str, task: str, method: str, steps: int | None, structures: dict[str, Settings]) -> Settings:
    """What a run has otherwise than its config, which stands as it is but for the method if no steps are given."""
    published = flat(read_config(shipped_configs() / EVERY_TASK[task].config))
    common: Settings = {}
    if steps is not None:
        common |= {"trainer.max_steps": steps, "trainer.val_check_interval": math.ceil(steps / 4)}
        # The paper waits for its rule without end, which a run of fewer steps cannot.
        common["sparsity.max_dense_steps"] = max(1, steps // 10)
        if scale == "small":
            common |= {**SMALL, **EVERY_TASK[task].small, "sparsity.samples": SMALL["data.batch_size"]}
        # Shorter runs warm up for a tenth at most: the cycle must have time to come down.
        warmup = (published | common)["optimizer.warmup_steps"]
        common["optimizer.warmup_steps"] = min(warmup, max(1, steps // 10))
    if method in structures:
        return {**common, **structures[method]}
    if method in ("dense", "explicit"):
        return {**common, "model.attention": method}
    if method in ("sat", "sat-paper"):
        return {**common, **(SAT if method == "sat" else SAT_PAPER)}
    if method == "window":
        options = published | common
        # In the paper's configs 32 x 32 blocks are too coarse: a window of 1 is .03, of 3 already .09.
        block = 16 if scale == "paper" and task in TASKS else options["model.block_size"]
        length = options.get("data.seq_len") or options.get("data.image_size", 32) ** 2
        width = window_blocks(-(-length // block), options["sparsity.density"])
        band = {"block": block, "num_sliding_window_blocks": width, "attention": "bidirectional"}
        return {**common, **attention_options("structure", mode="local", **band)}
    return {**common, **BASELINES[scale][method]}


def pretraining(scale: str, task: str, own: Settings) -> Settings | None:
    """What the run before has otherwise than its config, if a run begins with a pretrained model."""
    change = EVERY_TASK[task].pretrain
    if change is None or scale != "small":
        return None
    # As long as the run itself, by the same measure.
    steps = change["trainer.max_steps"] * own["trainer.max_steps"] // EVERY_TASK[task].small_steps
    tenth = max(1, steps // 10)
    length = {"trainer.max_steps": steps, "trainer.val_check_interval": steps, "sparsity.max_dense_steps": tenth}
    return {**own, **change, **length, "optimizer.warmup_steps": min(own["optimizer.warmup_steps"], tenth)}


def settings(task: str, own: Settings, samples: dict[str, int], before: Settings | None = None) -> Settings:
    """All that decides a run but its seed: the config with its overrides, and which data there are.

    Not where these lie: the place of the data may change between two runs. Nor what only methods with learned layouts
    read, where the method is none. Of a pretraining, ``before``, what is otherwise there.
    """
    changed = {f"pretraining.{name}": x for name, x in (before or {}).items() if own.get(name) != x}
    found = {**flat(read_config(shipped_configs() / EVERY_TASK[task].config)), **own, **changed, "samples": samples}
    if found["model.attention"] == "adaptive":
        return found
    of_layouts = ("sparsity.", "pretraining.sparsity.")
    unread = [name for name in found if name.startswith(of_layouts) and name != "sparsity.density"]
    return {name: value for name, value in found.items() if name not in [*unread, "model.pruned"]}


def flat(config: Settings) -> Settings:
    return {
        name if key is None else f"{name}.{key}": value
        for name, section in config.items()
        for key, value in (section.items() if isinstance(section, dict) else [(None, section)])
    }


def read_structures(files: list[Path]) -> dict[str, Settings]:
    """Fixed structures from DeepSpeed's files, as methods by the names of the files.

    Raises:
        ValueError: a file cannot be read or has no section, or its name is that of a method.
    """
    found: dict[str, Settings] = {}
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"--structure {file} is no JSON file that can be read ({error})") from error
        section = content.get("sparse_attention", content) if isinstance(content, dict) else None
        if not isinstance(section, dict) or "mode" not in section:
            raise ValueError(f"--structure {file} says no mode; write it like DeepSpeed's section sparse_attention")
        if file.stem in METHODS or file.stem in found:
            raise ValueError(f"--structure {file} has the name of another method, {file.stem}; rename the file")
        # As in DeepSpeed, a file that names no block means 16. Written out, so that the results hold all of it.
        found[file.stem] = attention_options("structure", **{"block": 16, **section})
    return found


def density(options: Settings, seq_len: int) -> float | None:
    """Share of the attention matrix that a method without learned layouts computes; None where they are learned.

    Raises:
        ValueError: an option of the method is not what it should be.
    """
    name, heads = options["model.attention"], options["model.num_heads"]
    if name == "adaptive":
        return None
    if name in ("dense", "explicit"):
        return 1.0
    own = {key.removeprefix("model.attention_options."): v for key, v in options.items() if "attention_options." in key}
    attention = make_baseline(name, heads, seq_len, block_size=options["model.block_size"], options=own)
    if isinstance(attention, StructureAttention):
        return round(attention.layout.density, 4)
    # By its weights: queries of 0 give all keys that are seen the same, and with the identity as values they come out.
    length = seq_len + int(getattr(attention, "prepended_tokens", 0))
    query, key = torch.zeros(1, heads, length, length), torch.randn(1, heads, length, length)
    value = torch.eye(length).expand_as(key).contiguous()
    is_global = isinstance(attention, LongformerAttention) and attention.num_global_tokens > 0
    extra = {"global_query": query, "global_key": key, "global_value": value} if is_global else {}
    with torch.no_grad():
        return round(float((attention.eval()(query, key, value, **extra) > 0).float().mean()), 4)
