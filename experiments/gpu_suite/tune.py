"""Launch parameters for this device, by ``sat.ops.triton.tune``, which prints and stores what it finds."""

from __future__ import annotations

import importlib.util
import sys

from experiments.gpu_suite.case import Case, Record, Section, Setting
from experiments.gpu_suite.subprocesses import run_limited

MODULE = "sat.ops.triton.tune"


def tune(seconds: float) -> Record:
    if importlib.util.find_spec(MODULE) is None:
        raise RuntimeError(f"this version has no {MODULE}")
    code, output = run_limited([sys.executable, "-m", MODULE], seconds)
    if code is None:
        raise RuntimeError(f"{MODULE} did not end within {seconds:.0f} s: {output[-300:]}")
    if code:
        raise RuntimeError(f"{MODULE} ended by code {code}: {output[-300:]}")
    return {"output": output, "line": "done"}


def cases(setting: Setting) -> list[Case]:
    return [Case("tune", tune, seconds=60, longest=3600)]


SECTION = Section("tune", 1, cases, lambda records: "\n".join(r["output"][-6000:] for r in records))
