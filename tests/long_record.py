# What make test-long came to, kept in experiments/results/test_long.json; tests/conftest.py makes pytest use it.
from __future__ import annotations

import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from experiments import record


class LongRecord:
    """Counts outcomes and seconds by file, and writes them down at the end of a whole run of the long tests."""

    def __init__(self, folder: Path = record.RESULTS) -> None:
        self.folder = folder
        self.files: dict[str, dict[str, Any]] = {}
        self.begin = time.time()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        counts = self.files.setdefault(report.nodeid.partition("::")[0], {"seconds": 0.0})
        counts["seconds"] += report.duration
        if report.when == "call" or not report.passed:  # a test may also fail, or be skipped, in its set-up
            counts[report.outcome] = counts.get(report.outcome, 0) + 1

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            return  # stopped, and so not the whole
        figures = {
            "date": time.strftime("%Y-%m-%d", time.gmtime(self.begin)),
            "versions": {name: metadata.version(name) for name in ("lightning", "transformers", "pytest")},
            "seconds": round(time.time() - self.begin),
            "all_passed": exitstatus == pytest.ExitCode.OK,
            "files": {name: counts | {"seconds": round(counts["seconds"])} for name, counts in self.files.items()},
        }
        record.save("test_long", "make test-long", figures, self.folder)


def is_whole(config: pytest.Config) -> bool:
    """Whether these are all long tests and nothing else: no file, no name, no rerun of failures was asked for."""
    narrowed = config.option.keyword or config.option.collectonly or getattr(config.option, "lf", False)
    chosen = config.args_source is not pytest.Config.ArgsSource.TESTPATHS
    return config.option.markexpr == "long" and not narrowed and not chosen and not hasattr(config, "workerinput")
