"""The command: ``python -m experiments.gpu_suite --help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments import record
from experiments.gpu_suite.case import Setting
from experiments.gpu_suite.sections import SECTIONS
from experiments.gpu_suite.suite import Suite

ON_REQUEST = ("tune",)


def main(arguments: Sequence[str] | None = None) -> int:
    """0: done; 1: a case of ``correct`` failed; 2: there is no GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.gpu_suite",
        description="Checks and measures block-sparse attention on a CUDA GPU, without network or data, and ends by "
        "itself. What fails, or does not fit into the time, is listed. Exits with 1 if a case of 'correct' failed and "
        "with 2 if there is no GPU.",
    )
    parser.add_argument("--minutes", type=float, default=9, help="time for everything (default: %(default)s)")
    parser.add_argument(
        "--only",
        choices=list(SECTIONS),
        metavar="SECTION",
        help=f"one section, with all of the time: {', '.join(SECTIONS)}; {', '.join(ON_REQUEST)} runs only this way",
    )
    parser.add_argument("--out", type=Path, help="folder of the results (default: experiments/results)")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FOLDER",
        help="leave out the cases that are ok in the results of this folder, and take these over",
    )
    parser.add_argument("--commit", default="", help="commit to record, where the code is in no git repository")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="try the suite itself: every section at tiny sizes on the CPU, with the backend 'torch'; needs --out",
    )
    args = parser.parse_args(arguments)
    if args.smoke and args.out is None:
        parser.error("--smoke measures nothing worth keeping; name a folder for its results with --out")
    if not args.smoke and not torch.cuda.is_available():
        print("gpu_suite needs a CUDA GPU, and PyTorch finds none here (to try the suite: --smoke).", file=sys.stderr)
        return 2
    if args.resume is not None and not args.resume.is_dir():
        parser.error(f"--resume {args.resume} is no folder; give one with results of this suite")
    out = record.RESULTS if args.out is None else args.out
    out.mkdir(parents=True, exist_ok=True)
    names = [args.only] if args.only else [name for name in SECTIONS if name not in ON_REQUEST]
    given = sys.argv[1:] if arguments is None else list(arguments)
    command = " ".join(["python -m experiments.gpu_suite", *given])
    suite = Suite(
        [SECTIONS[name] for name in names], Setting(out, args.smoke), args.minutes, command, args.commit, args.resume
    )
    print(f"{record.environment()['device']}: {', '.join(names)} in {args.minutes:g} minutes", flush=True)
    suite.run()
    print(f"\nwritten to {out}\n\n{suite.closing()}", flush=True)
    return 1 if suite.failed("correct") else 0


if __name__ == "__main__":
    sys.exit(main())
