"""Which case is run when, and what is kept of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments import record
from experiments.gpu_suite.case import Case, Record, Section, Setting
from experiments.gpu_suite.worker import Worker

GRACE = 20.0  # seconds after the end for a case that has been begun
CLOCK = time.monotonic
LONGEST_OUTPUT = 11_500  # characters of the closing tables


class Budget:
    """Seconds, divided over sections by weight. What one leaves over, the next ones share."""

    def __init__(self, seconds: float, weights: Mapping[str, float], clock: Callable[[], float] = CLOCK) -> None:
        self._clock, self._to_come = clock, dict(weights)
        self._start = clock()
        self._end = self._section_end = self._start + seconds

    def enter(self, section: str) -> None:
        """From now on :meth:`left` speaks of this section's share."""
        share = self._to_come[section] / sum(self._to_come.values())
        del self._to_come[section]
        now = self._clock()
        self._section_end = now + share * max(0.0, self._end - now)

    def enter_rest(self) -> None:
        """From now on :meth:`left` speaks of all that is left."""
        self._section_end = self._end

    def left(self) -> float:
        """Seconds until the section's share is used up."""
        return self._section_end - self._clock()

    def allows(self, case: Case) -> bool:
        """Whether there is time for what the case usually needs."""
        return self.left() >= case.seconds

    def limit(self, case: Case) -> float:
        """Seconds after which the case is ended by force: well above its usual need, but hardly past the end."""
        return max(1.0, min(max(case.longest, 3 * case.seconds), self._end + GRACE - self._clock()))

    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start


def versions() -> dict[str, str]:
    """Of what decides about speed beside PyTorch, which ``record.environment`` names."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"cuda": str(torch.version.cuda)}
    for package in ("triton", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def shortened(table: str, length: int) -> str:
    """As many whole lines as fit, and how many more there are."""
    if len(table) <= length:
        return table
    cut = table[: length - 40].rsplit("\n", 1)[0]
    return f"{cut}\n... {table.count(chr(10)) - cut.count(chr(10))} more rows, in the results"


class Suite:
    """Runs sections and keeps their records, on disk after each case."""

    def __init__(
        self,
        sections: Sequence[Section],
        setting: Setting,
        minutes: float,
        command: str,
        commit: str,
        resume: Path | None = None,
    ) -> None:
        self.sections, self.setting = sections, setting
        self.minutes, self.command, self.commit = minutes, command, commit
        self.records: dict[str, list[Record]] = {}
        self._cases = {section.name: section.cases(setting) for section in sections}
        for section in sections:
            known = {} if resume is None else self._known(resume / f"{self._name(section.name)}.json")
            self.records[section.name] = [
                known.get(case.name, {"case": case.name, "status": "not run", "error": "no time left"})
                for case in self._cases[section.name]
            ]

    def _name(self, section: str) -> str:
        """Of a section's file."""
        slug = "smoke" if self.setting.smoke else record.device_slug("cuda")
        return f"gpu_{slug}_{section}"

    def _known(self, file: Path) -> dict[str, Record]:
        """What an earlier command measured on this device, with the commit that it was measured at."""
        if not file.is_file():
            return {}
        try:
            content = json.loads(file.read_text())
            ok = [each for each in content["cases"] if each["status"] == "ok"]
            return {each["case"]: {"commit": content.get("commit"), **each} for each in ok}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} holds no results of this suite ({error}); give another --resume") from error

    def run(self) -> None:
        """Each section within its share; then, while there is time, what did not fit."""
        budget = Budget(60 * self.minutes, {section.name: section.weight for section in self.sections})
        worker = Worker(self.setting)
        try:
            for section in self.sections:
                budget.enter(section.name)
                self._pass(section, budget, worker)
            budget.enter_rest()
            for section in self.sections:
                self._pass(section, budget, worker)
        finally:
            worker.stop(kill=False)

    def _pass(self, section: Section, budget: Budget, worker: Worker) -> None:
        cases = self._cases[section.name]
        for index, case in enumerate(cases):
            if self.records[section.name][index]["status"] != "not run" or not budget.allows(case):
                continue
            before = budget.elapsed()
            limit = budget.limit(case)
            reply = worker.run(section.name, case.name, min(budget.left(), limit - 5), limit)
            took = budget.elapsed() - before
            # A case may find that it has no time: it says so as any other does, and is listed with them.
            self.records[section.name][index] = {"case": case.name, "seconds": round(took, 1), **reply}
            said = reply.get("line", "") if reply["status"] == "ok" else f"{reply['status']}: {reply.get('error', '')}"
            place = f"{section.name} {index + 1}/{len(cases)}"
            print(f"[{budget.elapsed():5.0f} s] {place} {case.name}: {said} ({took:.1f} s)", flush=True)
            self.save(section.name)
        self.save(section.name)

    def save(self, section: str) -> None:
        """Write a section's records."""
        figures: dict[str, Any] = {**versions(), "minutes": self.minutes, "smoke": self.setting.smoke}
        if self.commit:
            figures["commit"] = self.commit
        records = self.records[section]
        counts = {status: sum(r["status"] == status for r in records) for status in ("ok", "failed", "not run")}
        figures |= {"section": section, "counts": counts, "cases": records}
        record.save(self._name(section), self.command, figures, self.setting.out)

    def closing(self) -> str:
        """The tables, then what failed and what was not run, no longer than the end of a log that is kept."""
        tables = []
        for section in self.sections:
            ok = [r for r in self.records[section.name] if r["status"] == "ok"]
            if ok:
                tables.append(section.table(ok))
        last = []
        for section in self.sections:
            records = self.records[section.name]
            failed = [r for r in records if r["status"] == "failed"]
            waiting = [r["case"] for r in records if r["status"] == "not run"]
            last.append(
                f"{section.name}: {len(records) - len(failed) - len(waiting)} ok, {len(failed)} failed, "
                f"{len(waiting)} not run"
            )
            last += [f"  FAILED {r['case']}: {r['error']}"[:200] for r in failed[:8]]
            last += [f"  ... and {len(failed) - 8} more, in the results"] if len(failed) > 8 else []
            last += [("  not run: " + "; ".join(waiting))[:400]] if waiting else []
        ending = "\n".join(last)
        room = LONGEST_OUTPUT - len(ending)
        # The short tables whole, the long ones share what is left. Their rows stand in the order of importance.
        order = sorted(range(len(tables)), key=lambda at: len(tables[at]))
        for done, at in enumerate(order):
            tables[at] = shortened(tables[at], max(300, room // (len(order) - done)))
            room -= len(tables[at]) + 2
        return "\n\n".join([*tables, ending])

    def failed(self, section: str) -> bool:
        """Whether a case of this section failed."""
        return any(r["status"] == "failed" for r in self.records.get(section, []))
