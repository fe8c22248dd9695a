"""The sparse operations beside the dense ones they replace, at the shapes of the paper's tasks."""

from __future__ import annotations

from functools import partial

from experiments.gpu_suite.case import Case, Record, Section, Setting, number, text_table
from experiments.operations import HEADER, OURS, TASKS, Task, measure, rows


def run(task: Task, setting: Setting, seconds: float) -> Record:
    found = measure(task, setting.device, setting.backend, rounds=3 if setting.smoke else 7)
    said = []
    for name, modes in found["operations"].items():
        # The last is what a user would take instead: for the whole attention, the fused dense one.
        faster = "/".join(number(list(figures["faster_than"].values())[-1]) for figures in modes.values())
        said.append(f"{name} {faster}x")
    return {**found, "line": ", ".join(said)}


def cases(setting: Setting) -> list[Case]:
    tasks = [Task("smoke", 128, 32, 0.4, 2)] if setting.smoke else TASKS
    return [Case(task.name, partial(run, task, setting), seconds=1 if setting.smoke else 15) for task in tasks]


def table(records: list[Record]) -> str:
    title = f"operations: device time, bfloat16, 2 heads of 32; {OURS} and what it replaces"
    return text_table(title, HEADER, [row for record in records for row in rows(record)])


SECTION = Section("operations", 0.07, cases, table)
