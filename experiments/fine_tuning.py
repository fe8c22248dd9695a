"""Dense against SAT: fine-tunes a pretrained model by a config, both ways, with the same steps and seeds.

    python -m experiments.fine_tuning --config vit_cifar10.yaml -- --model.pretrained MODEL --data.path DATA

What stands after ``--`` goes to ``python -m sat.train``, for both, but for ``--sparsity``, which dense training has
not. Each run is kept in the results as it ends; the command given again goes on with those that are missing. Writes
experiments/results/fine_tuning_CONFIG.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
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


def of_method(method: str, options: list[str]) -> list[str]:
    """The options, each followed by its value, that mean something to a method."""
    pairs = zip(options[::2], options[1::2], strict=True)
    return [x for pair in pairs if method == "adaptive" or not pair[0].startswith("--sparsity.") for x in pair]


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
    parser.add_argument("--jobs", type=int, default=1, help="runs beside each other; times of steps are then no good")
    parser.add_argument("--name", help="in the file's name, instead of the config's")
    parser.add_argument("options", nargs="*", help="options of sat.train, after --")
    args = parser.parse_args()
    if len(args.options) % 2:
        parser.error("the options of sat.train come in pairs here: --name value")
    shown = " ".join(["--config", args.config, "--", *args.options])
    command = f"python -m experiments.fine_tuning {shown}"
    name = f"fine_tuning_{args.name or Path(args.config).stem}"
    out = record.RESULTS / f"{name}.json"
    runs: list[dict[str, Any]] = json.loads(out.read_text())["runs"] if out.is_file() else []
    wanted = [(method, seed, of_method(method, args.options)) for seed in args.seeds for method in METHODS]
    done = [(run["method"], run["seed"], of_method(run["method"], run["options"])) for run in runs]
    with ThreadPoolExecutor(args.jobs) as pool:
        begun = {pool.submit(train, args.config, *each): each for each in wanted if each not in done}
        for future in as_completed(begun):
            method, seed, options = begun[future]
            result = {"method": method, "seed": seed, "options": options, "jobs": args.jobs}
            runs.append({**result, "summary": future.result()})
            record.save(name, command, {"runs": runs})
    print(table(runs))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
