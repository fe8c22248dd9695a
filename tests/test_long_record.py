"""The last result of the long tests is kept, and only that of all of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.long_record import LongRecord, is_whole

SOURCES = pytest.Config.ArgsSource


def report(file: str, when: str, outcome: str, duration: float) -> Any:
    return SimpleNamespace(
        nodeid=f"{file}::test", when=when, outcome=outcome, duration=duration, passed=outcome == "passed"
    )


def test_outcomes_are_counted_by_file(tmp_path: Path):
    made = LongRecord(tmp_path)
    for each in [("a.py", "setup", "passed", 1.0), ("a.py", "call", "passed", 2.0), ("a.py", "call", "failed", 1.4)]:
        made.pytest_runtest_logreport(report(*each))
    made.pytest_runtest_logreport(report("b.py", "setup", "skipped", 0.1))
    made.pytest_sessionfinish(None, pytest.ExitCode.TESTS_FAILED)
    kept = json.loads((tmp_path / "test_long.json").read_text())
    assert kept["files"] == {"a.py": {"seconds": 4, "passed": 1, "failed": 1}, "b.py": {"seconds": 0, "skipped": 1}}
    assert kept["all_passed"] is False
    assert {"command", "commit", "date", "device", "torch", "python", "versions"} <= set(kept)


def test_a_run_that_was_stopped_is_not_kept(tmp_path: Path):
    LongRecord(tmp_path).pytest_sessionfinish(None, pytest.ExitCode.INTERRUPTED)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "source", "whole"),
    [
        ({}, SOURCES.TESTPATHS, True),
        ({"markexpr": "not long"}, SOURCES.TESTPATHS, False),
        ({"keyword": "killed"}, SOURCES.TESTPATHS, False),
        ({"lf": True}, SOURCES.TESTPATHS, False),
        ({}, SOURCES.ARGS, False),
    ],
)
def test_which_runs_are_whole(changed: dict[str, Any], source: Any, whole: bool):
    option = SimpleNamespace(**{"markexpr": "long", "keyword": "", "collectonly": False, "lf": False} | changed)
    assert is_whole(SimpleNamespace(option=option, args_source=source)) is whole
