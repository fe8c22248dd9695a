"""Does it reach the accuracy: methods and rules for the blocks to keep, over tasks and seeds, all else equal.

    python -m experiments.accuracy --data FOLDER             # with cifar10/, ag_news/ and yelp_reviews/ in it
    python -m experiments.accuracy --tasks digits            # embedded in scikit-learn, nothing to download
    python -m experiments.accuracy --table                   # what has been measured so far

Small models on sequences of 256 tokens, on one CPU thread: 1,000 steps of 32, dense for the first 100, then a tenth of
the blocks (of 8 tokens, 32 x 32 of them). Each run is kept in the results as it ends; the command given again goes on
with those that are missing. Writes experiments/results/accuracy_small.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments import record

STEPS, SWITCH, DENSITY = 1000, 100, 0.1
NAME = "accuracy_small"

# Task: the config, the folder in --data, and what makes it small.
TASKS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "digits": ("quickstart.yaml", None, {"data.image_size": 16}),
    "cifar10": ("cifar10.yaml", "cifar10", {"data.image_size": 16}),
    "ag_news": ("ag_news.yaml", "ag_news", {"data.seq_len": 256}),
    "yelp": ("yelp.yaml", "yelp_reviews", {"data.seq_len": 256}),
}
COMMON = {
    "data.batch_size": 32,
    "data.eval_batch_size": 100,
    "model.num_layers": 2,
    "model.width": 64,
    "model.num_heads": 2,
    "model.mlp_dim": 128,
    "model.block_size": 8,
    "model.dropout": 0.0,
    "optimizer.lr": 2e-3,
    "optimizer.warmup_steps": 100,
    "sparsity.density": DENSITY,
    "sparsity.interval": 5,
    "sparsity.samples": 32,
    "sparsity.theta": 1e9,  # the switch is at the same step for every rule
    "sparsity.min_dense_steps": 0,
    "sparsity.max_dense_steps": SWITCH,
    "sparsity.lr_factor": 1.0,
    "trainer.max_steps": STEPS,
    "trainer.val_check_interval": STEPS,
    "trainer.limit_val_batches": 10,
}
SPARSE = {"model.attention": "adaptive", "sparsity.keep_diagonal": True, "sparsity.min_blocks_per_row": 1}
# An odd window of 3 blocks is 94 of the 1,024 blocks; BigBird has a window of 1, one random block and one global.
METHODS: dict[str, dict[str, Any]] = {
    "dense": {"model.attention": "dense"},
    "window": {
        "model.attention": "structure",
        "model.attention_options.mode": "local",
        "model.attention_options.num_sliding_window_blocks": 3,
        "model.attention_options.attention": "bidirectional",
    },
    "bigbird": {
        "model.attention": "structure",
        "model.attention_options.mode": "bigbird",
        "model.attention_options.num_sliding_window_blocks": 1,
        "model.attention_options.num_random_blocks": 1,
    },
    "gram (paper)": {
        "model.attention": "adaptive",
        "sparsity.mask": "gram",
        "sparsity.per_head": False,
        "sparsity.keep_diagonal": False,
        "sparsity.min_blocks_per_row": 0,
    },
    "mass": {**SPARSE, "sparsity.mask": "direct", "sparsity.per_head": False},
    "mass, per head": {**SPARSE, "sparsity.mask": "direct", "sparsity.per_head": True},
    "fisher": {**SPARSE, "sparsity.mask": "fisher", "sparsity.per_head": False},
    "fisher, per head": {**SPARSE, "sparsity.mask": "fisher", "sparsity.per_head": True},
    "fisher, shared budget": {
        **SPARSE, "sparsity.mask": "fisher", "sparsity.per_head": True, "sparsity.share_budget": True,
    },
}  # fmt: skip


def train(task: str, method: str, seed: int, data: Path | None) -> dict[str, Any]:
    """The summary of one run, in a process of its own."""
    config, folder, small = TASKS[task]
    options = {**COMMON, **small, **METHODS[method]}
    if folder is not None and data is not None:
        options["data.path"] = data / folder
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "sat.train", "--config", config, "--output_dir", out, "--seed", str(seed)]
        command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        (summary,) = Path(out).glob("*/*/summary.json")
        return json.loads(summary.read_text())


def show(runs: list[dict[str, Any]]) -> None:
    """Test accuracy of the final model: mean over the seeds, and how many there are."""
    tasks = [task for task in TASKS if any(run["task"] == task for run in runs)]
    table = Table(title=f"test accuracy after {STEPS} steps, the last {STEPS - SWITCH} at density {DENSITY}")
    table.add_column("method")
    for task in tasks:
        table.add_column(task, justify="right")
    for method in METHODS:
        cells = []
        for task in tasks:
            own = [r["summary"]["test_accuracy"]["final"] for r in runs if (r["task"], r["method"]) == (task, method)]
            cells.append(f"{statistics.mean(own):.3f} ({len(own)})" if own else "")
        if any(cells):
            table.add_row(method, *cells)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the data sets; from the hub when not given")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="only show what has been measured")
    args = parser.parse_args()
    out = record.RESULTS / f"{NAME}.json"
    runs: list[dict[str, Any]] = json.loads(out.read_text())["runs"] if out.is_file() else []
    console = Console()
    wanted = [(seed, task, method) for seed in args.seeds for task in args.tasks for method in args.methods]
    missing = [key for key in wanted if not any((r["seed"], r["task"], r["method"]) == key for r in runs)]
    for index, (seed, task, method) in enumerate([] if args.table else missing):
        console.print(f"{index + 1}/{len(missing)}: {task}, {method}, seed {seed}", highlight=False)
        summary = train(task, method, seed, args.data)
        runs.append({"task": task, "method": method, "seed": seed, "summary": summary})
        record.save(NAME, "python -m experiments.accuracy --data FOLDER", {"options": COMMON, "runs": runs})
    if not runs:
        raise SystemExit(f"nothing has been measured yet; run python -m experiments.accuracy without --table ({out})")
    show(runs)


if __name__ == "__main__":
    main()
