"""Launch parameters for this device, by ``sat.ops.triton.tune``, which prints and stores what it finds."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from experiments.gpu_suite.case import Case, Record, Section, Setting
from experiments.gpu_suite.subprocesses import run_limited

MODULE = "sat.ops.triton.tune"
OUT_OF_TIME = 3  # its exit status when the time was up before the end
MARGIN = 40.0  # seconds that it may take beyond its time, to start and to end what it has begun


def tune(seconds: float) -> Record:
    """What it finds by then, in a file of its own, of which the record has all; it ends by itself a little before."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "launch_parameters.json"
        command = [sys.executable, "-m", MODULE, "--minutes", f"{max(0.0, seconds - MARGIN) / 60:.2f}"]
        code, output = run_limited(command, seconds, {"SAT_TUNING": str(file)})
        kept = json.loads(file.read_text()) if file.is_file() else {}
    if code not in (0, OUT_OF_TIME, None) or not kept:
        raise RuntimeError(f"{MODULE} ended by code {code} with {len(kept)} GPUs tuned: {output[-300:]}")
    return {"output": output, "kept": kept, "line": "done" if code == 0 else "as far as the time went"}


def cases(setting: Setting) -> list[Case]:
    return [Case("tune", tune, seconds=60, longest=3600)]


SECTION = Section("tune", 1, cases, lambda records: "\n".join(r["output"][-6000:] for r in records))
