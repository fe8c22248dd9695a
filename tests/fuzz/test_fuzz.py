"""Two hundred of the fuzzer's inputs; the long test, or ``python -m tests.fuzz --count 100000``, has the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.fuzz.__main__ import ENVIRONMENT, ROOT, SHARES, run


def checked(result: dict[str, Any], inputs: int) -> None:
    assert result["failures"] == [], json.dumps(result["failures"], indent=1)
    assert result["inputs"] >= inputs
    for kind, found in result["kinds"].items():
        assert found["read"] + found["refused"] == found["inputs"]
        # Neither does everything pass nor is everything refused; a cache is never refused, but made anew.
        assert kind == "resume" or found["read"] > 0, kind
        assert kind in ("cache", "resume") or found["refused"] > 0, kind


def test_files_of_strangers_are_read_or_refused_with_a_sentence() -> None:
    """In a process of its own: it watches what it opens and starts, and bounds its memory."""
    command = [sys.executable, "-m", "tests.fuzz", "--here", "--count", "200", "--seed", "1"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False
    )
    assert done.stdout, done.stderr
    checked(json.loads(done.stdout), 199)


@pytest.mark.long
def test_a_hundred_thousand_of_them() -> None:
    checked(run(100_000, 0, list(SHARES), jobs=2), 99_990)
