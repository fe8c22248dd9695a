"""Dense against SAT: fine-tunes a pretrained model by a config, both ways, with the same steps and seeds.

    python -m experiments.fine_tuning --config vit_cifar10.yaml -- --model.pretrained MODEL --data.path DATA

What stands after ``--`` goes to ``python -m sat.train``, for both. Each run is kept in the results as it ends; the
command given again goes on with those that are missing. Writes experiments/results/fine_tuning_CONFIG.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments import record

METHODS = ("dense", "adaptive")


def train(config: str, method: str, seed: int, options: list[str]) -> dict[str, Any]:
    """The summary of one run, in a process of its own: memory is then its own, too."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sat.train", "--config", config, "--output_dir", folder]
        command += ["--model.attention", method, "--seed", str(seed), *options]
        subprocess.run(command, check=True)
        (summary,) = Path(folder).glob("*/*/summary.json")
        return json.loads(summary.read_text())


def table(runs: list[dict[str, Any]]) -> str:
    """Test metrics by method, mean over seeds and each of them, and the times of a step."""
    lines = []
    metrics = sorted({name for run in runs for name in run["summary"] if name.startswith("test_")})
    for name in metrics:
        for method in METHODS:
            own = [run["summary"][name]["final"] for run in runs if run["method"] == method]
            if own:
                each = ", ".join(f"{value:.4f}" for value in own)
                lines.append(f"{name:<16}{method:<10}{statistics.mean(own):.4f}   ({each})")
    for method in METHODS:
        for phase in ("dense", "sparse"):
            times = [
                run["summary"]["median_step_ms"][phase]
                for run in runs
                if run["method"] == method and phase in run["summary"]["median_step_ms"]
            ]
            if times:
                lines.append(f"step, {phase:<10}{method:<10}{statistics.median(times):.1f} ms")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a config of a pretrained model, in configs/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--name", help="in the file's name, instead of the config's")
    parser.add_argument("options", nargs="*", help="options of sat.train, after --")
    args = parser.parse_args()
    shown = " ".join(["--config", args.config, "--", *args.options])
    command = f"python -m experiments.fine_tuning {shown}"
    name = f"fine_tuning_{args.name or Path(args.config).stem}"
    out = record.RESULTS / f"{name}.json"
    runs: list[dict[str, Any]] = json.loads(out.read_text())["runs"] if out.is_file() else []
    for seed in args.seeds:
        for method in METHODS:
            if any((run["method"], run["seed"], run["options"]) == (method, seed, args.options) for run in runs):
                continue
            summary = train(args.config, method, seed, args.options)
            runs.append({"method": method, "seed": seed, "options": args.options, "summary": summary})
            record.save(name, command, {"runs": runs})
    print(table(runs))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
