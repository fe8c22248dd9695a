"""How right ``--estimate true`` is: each task estimated, then trained to its end, both in a process of its own.

python -m experiments.estimates --data DATA                (about 12 minutes on 2 cores; writes results/estimates.json)

DATA holds a folder cifar10, without which that task is left out; of the others nothing is read.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import record

# Cut to about 2 minutes each on two cores.
TASKS = {
    "quickstart": ["--config", "quickstart.yaml"],
    "lra_image": [
        "--config", "lra_image.yaml", "--data.batch_size", "16", "--data.eval_samples", "1000",
        "--sparsity.max_dense_steps", "100", "--trainer.max_steps", "300", "--trainer.val_check_interval", "100",
        "--optimizer.warmup_steps", "30",
    ],
    "lra_listops": [
        "--config", "lra_listops.yaml", "--data.seq_len", "512", "--data.min_length", "250", "--data.max_length", "500",
        "--data.num_samples", "20000", "--data.batch_size", "16", "--sparsity.max_dense_steps", "200",
        "--trainer.max_steps", "600", "--trainer.val_check_interval", "200", "--optimizer.warmup_steps", "60",
    ],
}  # fmt: skip
# The command, with what main() returns as the last line.
PROGRAM = "import json, sys; from sat import train; print(json.dumps(train.main(sys.argv[1:]), default=float))"


def command(arguments: list[str], folder: Path) -> dict[str, Any]:
    """What ``sat.train`` returns.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments, "--output_dir", str(folder), "--trainer.accelerator", "cpu"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"sat.train {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(estimated: dict[str, Any], trained: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What was estimated and what it was, by name, and by how much the estimate is too high.

    The training's time is compared for the number of dense steps that there were.
    """
    low, high = estimated["dense_steps"]
    switched = [t["step"] for t in trained.get("transitions", [])]
    dense = max(switched) if switched else trained["steps"]
    ends = dict(zip((low, high), estimated["training_seconds"], strict=True))
    share = 0.0 if high == low else (dense - low) / (high - low)
    figures = {
        "training, s": (ends[low] + share * (ends[high] - ends[low]), trained["training_seconds"]),
        "peak memory, MiB": (
            max(kind["peak_mib"] for kind in estimated["kinds"].values()),
            trained["peak_memory_mib"]["process"],
        ),
    }
    for phase, milliseconds in trained["median_step_ms"].items():
        if phase in estimated["kinds"]:
            figures[f"{phase} step, ms"] = estimated["kinds"][phase]["milliseconds"], milliseconds
    return {
        name: {"estimated": round(a, 2), "measured": round(b, 2), "error": round(a / b - 1, 3)}
        for name, (a, b) in figures.items()
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with cifar10/ in it, for lra_image")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS], help="which ones; all by default")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of estimates.json")
    args = parser.parse_args(argv)
    if args.data is not None and not (args.data / "cifar10").is_dir():
        parser.error(f"--data {args.data} holds no folder cifar10; give the folder that does, or leave --data out")
    console = Console()
    tasks = {}
    for name in args.tasks:
        own = [] if name != "lra_image" else None if args.data is None else ["--data.path", str(args.data / "cifar10")]
        if own is None:
            console.print(f"{name} is left out: it needs --data")
            continue
        console.print(f"{name}: estimating")
        with tempfile.TemporaryDirectory() as folder:
            estimated = command([*TASKS[name], *own, "--estimate", "true"], Path(folder))
            console.print(f"{name}: training")
            trained = command([*TASKS[name], *own], Path(folder))
        tasks[name] = {"options": " ".join(TASKS[name]), "figures": compared(estimated, trained)}
        console.print(tasks[name]["figures"])
        made_by = "python -m experiments.estimates --data DATA"
        path = record.save("estimates", made_by, {"tasks": tasks}, args.out, device="cpu")
        console.print(f"written to {path}")


if __name__ == "__main__":
    main()
