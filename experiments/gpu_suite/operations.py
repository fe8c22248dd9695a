"""The three sparse operations beside the dense ones they replace, at the shapes of the paper's tasks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.gpu_suite import clock, layouts
from experiments.gpu_suite.case import Case, Record, Section, Setting, number, text_table
from sat.ops import sddmm, sparse_softmax, spmm

LARGEST_SCORES = 3 * 2**30  # bytes of the dense scores; larger batches are reduced
HEADS, HEAD_DIM = 2, 32


class Task(NamedTuple):
    """A row of the paper's table (Yoon et al. 2024, section 4)."""

    name: str
    length: int
    block_size: int
    density: float
    batch: int


TASKS = (
    Task("CIFAR-10", 1024, 32, 0.05, 256),
    Task("AG News", 1024, 32, 0.08, 512),
    Task("ListOps", 2048, 64, 0.04, 128),
    Task("Retrieval", 4096, 64, 0.021, 32),
)


def run(task: Task, setting: Setting, seconds: float) -> Record:
    device, dtype = setting.device, torch.bfloat16
    fitting = LARGEST_SCORES // (HEADS * task.length**2 * dtype.itemsize)
    batch = min(task.batch, fitting)
    # One layout for all heads, as in the paper.
    layout = layouts.learned_like(task.length // task.block_size, task.density, 1, task.block_size, device)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    query, key, value = (random(batch, HEADS, task.length, HEAD_DIM).requires_grad_() for _ in range(3))
    scores = random(batch, HEADS * layout.nnz, task.block_size, task.block_size).requires_grad_()
    full_scores = random(batch, HEADS, task.length, task.length).requires_grad_()
    context = random(batch, HEADS, task.length, HEAD_DIM)
    backend, scale = setting.backend, HEAD_DIM**-0.5
    with torch.no_grad():
        weights = sparse_softmax(scores, layout, scale=scale, num_heads=HEADS, backend=backend)
        full_weights = torch.softmax(full_scores * scale, -1)
    for x in (weights, full_weights):
        x.requires_grad_()
    # Sparse function, dense function, their inputs and upstream gradients.
    operations: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor], list[Tensor], Any, Any]] = {
        "sddmm": (
            lambda q, k: sddmm(q, k, layout, backend=backend),
            lambda q, k: q @ k.transpose(2, 3),
            [query, key],
            [query, key],
            scores.detach(),
            full_scores.detach(),
        ),
        "softmax": (
            lambda x: sparse_softmax(x, layout, scale=scale, num_heads=HEADS, backend=backend),
            lambda x: torch.softmax(x * scale, -1),
            [scores],
            [full_scores],
            scores.detach(),
            full_scores.detach(),
        ),
        "spmm": (
            lambda w, v: spmm(w, v, layout, backend=backend),
            lambda w, v: w @ v,
            [weights, value],
            [full_weights, value],
            context,
            context,
        ),
    }
    record: Record = {**task._asdict(), "batch": batch, "batch_of_the_task": task.batch, "density": layout.density}
    lines = []
    for name, (sparse, full, sparse_inputs, full_inputs, sparse_grad, full_grad) in operations.items():
        record[name] = {}
        for mode in ("forward", "forward+backward"):
            backward = mode != "forward"

            def call(f: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor, backward: bool = backward) -> Any:
                out = f(*tensors)
                return torch.autograd.grad(out, tensors, grad) if backward else out

            found, times = clock.figures(
                {
                    "sparse": partial(call, sparse, sparse_inputs, sparse_grad),
                    "dense": partial(call, full, full_inputs, full_grad),
                },
                device,
                rounds=3 if setting.smoke else 7,
            )
            if "error" in found["sparse"]:
                raise RuntimeError(f"{name}, {mode}: {found['sparse']['error']}")
            faster = clock.faster(times, "dense", "sparse")
            record[name][mode] = {"times": found, "faster_than_dense": faster}
            lines.append(f"{name} {number(faster)}x")
    return {**record, "line": ", ".join(lines)}


def cases(setting: Setting) -> list[Case]:
    tasks = [Task("smoke", 128, 32, 0.4, 2)] if setting.smoke else TASKS
    return [Case(task.name, partial(run, task, setting), seconds=1 if setting.smoke else 10) for task in tasks]


def table(records: list[Record]) -> str:
    rows = []
    for r in records:
        for name in ("sddmm", "softmax", "spmm"):
            row = [r["case"], r["batch"], number(r["density"], 2), name]
            for mode in ("forward", "forward+backward"):
                times = r[name][mode]["times"]
                row += [
                    number(times[way]["ms"]["median"]) if "ms" in times[way] else "-" for way in ("sparse", "dense")
                ]
                row.append(number(r[name][mode]["faster_than_dense"]))
            rows.append(row)
    header = ["task", "batch", "density", "operation", "f ms", "dense", "faster", "f+b ms", "dense", "faster"]
    return text_table("operations: device time, bfloat16, 2 heads of 32", header, rows)


SECTION = Section("operations", 0.07, cases, table)
