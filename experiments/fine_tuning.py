"""Dense against SAT: fine-tunes a pretrained model by a config, both ways, with the same steps and seeds.

    python -m experiments.fine_tuning --config vit_cifar10.yaml -- --model.pretrained MODEL --data.path DATA

What stands after ``--`` goes to ``python -m sat.train``, for both, but for ``--sparsity``, which dense training has
not. Each run is kept in the results as it ends; the command given again goes on with those that are missing. Writes
fine_tuning_CONFIG.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments import record
from experiments.accuracy import finished

METHODS = ("dense", "adaptive")


Wanted = tuple[str, int, tuple[str, ...]]  # method, seed, and options of sat.train


def train(config: str, run: Wanted) -> dict[str, Any]:
    """The summary of one run, in a process of its own: memory is then its own, too.

    Raises:
        RuntimeError: it failed.
        KeyboardInterrupt: it was interrupted.
    """
    method, seed, options = run
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sat.train", "--config", config, "--output_dir", folder]
        command += ["--model.attention", method, "--seed", str(seed), *options]
        status = subprocess.run(command, check=False).returncode
        if status in (130, 143, -2, -15):  # by Ctrl-C or SIGTERM
            raise KeyboardInterrupt
        if status:
            raise RuntimeError(f"{method}, seed {seed} failed with status {status}; its last lines say why")
        (summary,) = Path(folder).glob("*/*/summary.json")
        return json.loads(summary.read_text())


def of_method(method: str, options: Sequence[str]) -> tuple[str, ...]:
    """The options, each followed by its value, that mean something to a method."""
    pairs = zip(options[::2], options[1::2], strict=True)
    return tuple(x for pair in pairs if method == "adaptive" or not pair[0].startswith("--sparsity.") for x in pair)


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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a config of a pretrained model, in configs/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs beside each other; times of steps are then no good")
    parser.add_argument("--name", help="in the file's name, instead of the config's")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the results")
    parser.add_argument("options", nargs="*", help="options of sat.train, after --")
    args = parser.parse_args(argv)
    if len(args.options) % 2:
        parser.error("the options of sat.train come in pairs here: --name value")
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}, expected at least 1")
    try:
        failures = measure(args)
    except KeyboardInterrupt:
        raise SystemExit("experiments.fine_tuning: interrupted; the same command goes on from here") from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"experiments.fine_tuning: {' '.join(str(error).split())}") from error
    if failures:
        raise SystemExit("\n".join([*failures, "experiments.fine_tuning: the same command tries these again"]))


def measure(args: argparse.Namespace) -> list[str]:
    """Train what is missing; each run is saved with the others as it ends. Gives a sentence for each that failed."""
    name = f"fine_tuning_{args.name or Path(args.config).stem}"
    shown = ["--config", args.config, *(["--name", args.name] if args.name else [])]
    shown += ["--jobs", str(args.jobs)] if args.jobs > 1 else []
    command = f"python -m experiments.fine_tuning {' '.join([*shown, '--', *args.options])}"
    wanted = [(method, seed, of_method(method, args.options)) for seed in args.seeds for method in METHODS]
    failures = []
    out = args.out / f"{name}.json"
    with record.alone(out):
        runs = record.read_runs(out, {"method", "seed", "options", "summary"})
        done = [(run["method"], run["seed"], of_method(run["method"], run["options"])) for run in runs]
        missing = [each for each in dict.fromkeys(wanted) if each not in done]
        work = partial(train, args.config)
        for (method, seed, options), summary, seconds in finished(missing, work, args.jobs, lambda _: True):
            if isinstance(summary, RuntimeError):
                failures.append(str(summary))
                continue
            result = {"method": method, "seed": seed, "options": [*options], "jobs": args.jobs}
            runs.append({**result, "commit": record.environment()["commit"], "summary": summary})
            record.save(name, command, {"runs": runs}, args.out)
            print(f"{method}, seed {seed}: {seconds:.0f} s")
    print(table(runs))
    print(f"written to {out}")
    return failures


if __name__ == "__main__":
    main()
