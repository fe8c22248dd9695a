"""Attention by its operations: SDDMM, sparse softmax, SpMM, and the whole of it, each beside the dense one.

    python -m experiments.operations                    (about 1 minute on 2 cores)
    python -m experiments.operations --device cuda

At the shapes and densities of the paper's tasks; the batch is as large as the task's, or as the dense scores allow. The
whole is SAT's fused attention beside its three operations in turn, beside explicit dense attention (product, softmax,
product) and beside PyTorch's fused attention. Forward is that of training, which keeps what backward needs; backward is
timed apart. Float32 on a CPU, bfloat16 on a GPU. Writes experiments/results/operations_DEVICE.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments import record
from experiments.gpu_suite import clock, competitors, layouts
from experiments.gpu_suite.case import number, text_table
from sat.layout import BlockLayout
from sat.ops import Backend, block_sparse_attention, sddmm, sparse_softmax, spmm

SEED = 0
LARGEST_SCORES = {"cpu": 64 * 2**20, "cuda": 3 * 2**30}  # bytes of the dense scores; larger batches are reduced
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
HEADS, HEAD_DIM = 2, 32
MODES = ("forward", "backward")
# In each operation, ours by this name; the others are what it is compared with.
OURS = "sat"
PARTS = "three operations"  # ours too, beside the fused one


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


class Way(NamedTuple):
    """One way to compute an operation."""

    function: Callable[..., Tensor]
    inputs: list[Tensor]
    grad: Tensor  # upstream

    def call(self, mode: str) -> Callable[[], Any]:
        """What is timed. Backward runs through a graph that its first call makes, and that is kept."""
        if mode == "forward":
            return lambda: self.function(*self.inputs)
        graph: list[Tensor] = []

        def backward() -> tuple[Tensor, ...]:
            if not graph:
                graph.append(self.function(*self.inputs))
            return torch.autograd.grad(graph[0], self.inputs, self.grad, retain_graph=True)

        return backward


def ways(layout: BlockLayout, length: int, batch: int, device: str, backend: Backend) -> dict[str, dict[str, Way]]:
    """Every operation, and every way to compute it."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=DTYPE[device])

    size, scale = layout.block_size, HEAD_DIM**-0.5
    query, key, value = (random(batch, HEADS, length, HEAD_DIM).requires_grad_() for _ in range(3))
    context = random(batch, HEADS, length, HEAD_DIM)
    scores = random(batch, HEADS * layout.nnz, size, size).requires_grad_()
    full_scores = random(batch, HEADS, length, length).requires_grad_()
    with torch.no_grad():
        weights = sparse_softmax(scores, layout, scale=scale, num_heads=HEADS, backend=backend)
        full_weights = torch.softmax(full_scores * scale, -1)
    for x in (weights, full_weights):
        x.requires_grad_()

    def softmax(x: Tensor) -> Tensor:
        return sparse_softmax(x, layout, scale=scale, num_heads=HEADS, backend=backend)

    def attend(fused: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda q, k, v: block_sparse_attention(q, k, v, layout, backend=backend, fused=fused)

    both, three = [query, key], [query, key, value]
    return {
        "SDDMM": {
            OURS: Way(lambda q, k: sddmm(q, k, layout, backend=backend), both, scores.detach()),
            "dense": Way(lambda q, k: q @ k.transpose(2, 3), both, full_scores.detach()),
        },
        "softmax": {
            OURS: Way(softmax, [scores], scores.detach()),
            "dense": Way(lambda x: torch.softmax(x * scale, -1), [full_scores], full_scores.detach()),
        },
        "SpMM": {
            OURS: Way(lambda w, v: spmm(w, v, layout, backend=backend), [weights, value], context),
            "dense": Way(lambda w, v: w @ v, [full_weights, value], context),
        },
        "attention": {
            OURS: Way(attend(fused=True), three, context),
            PARTS: Way(attend(fused=False), three, context),
            "explicit dense": Way(competitors.explicit, three, context),
            "fused dense": Way(F.scaled_dot_product_attention, three, context),
        },
    }


def measure(task: Task, device: str, backend: Backend = "auto", rounds: int = 15) -> dict[str, Any]:
    """Times of all operations of a task, those of an operation in turn, and how many times faster ours are.

    Raises:
        RuntimeError: one of ours failed; that of the others is kept as their error.
    """
    fitting = LARGEST_SCORES[device] // (HEADS * task.length**2 * DTYPE[device].itemsize)
    batch = max(1, min(task.batch, fitting))
    # One layout for all heads, as in the paper.
    layout = layouts.learned_like(task.length // task.block_size, task.density, 1, task.block_size, device, SEED)
    found: dict[str, Any] = {**task._asdict(), "batch": batch, "batch_of_the_task": task.batch}
    found |= {"density": round(layout.density, 4), "operations": {}}
    for name, computed in ways(layout, task.length, batch, device, backend).items():
        found["operations"][name] = {}
        for mode in MODES:
            calls = {way: computed[way].call(mode) for way in computed}
            figures, times = clock.figures(calls, device, rounds)
            if "error" in figures[OURS]:
                raise RuntimeError(f"{name}, {mode}: {figures[OURS]['error']}")
            others = {way: clock.faster(times, way, OURS) for way in computed if way != OURS}
            found["operations"][name][mode] = {"times": figures, "faster_than": others}
    return found


HEADER = ["task", "batch", "density", "operation", "against", "forward ms", "theirs", "faster"]
HEADER += ["backward ms", "theirs", "faster"]


def rows(task: dict[str, Any]) -> list[list[str]]:
    """A task's figures under :data:`HEADER`: a row for each operation and what it is compared with."""
    found = []
    for name, modes in task["operations"].items():
        for other in modes["forward"]["faster_than"]:
            row = [task["name"], str(task["batch"]), number(task["density"], 2), name, other]
            for mode in MODES:
                times = modes[mode]["times"]
                row += [number(times[way].get("ms", {}).get("median")) for way in (OURS, other)]
                row.append(number(modes[mode]["faster_than"][other]))
            found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    names = [task.name for task in TASKS]
    parser.add_argument("--tasks", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=15, help="calls of each function (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder (default: experiments/results)")
    args = parser.parse_args()
    record.check_device(parser, args.device)
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}, expected at least 1")
    name = f"operations_{record.device_slug(args.device)}"
    path = args.out / f"{name}.json"
    try:
        record.lose_nothing(path, lambda content: [task["name"] for task in content["tasks"]], args.tasks)
        with record.alone(path):
            save(args, name)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def save(args: argparse.Namespace, name: str) -> None:
    """Measure, print and write the tasks."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    chosen = [task for task in TASKS if task.name in args.tasks]
    measured = []
    for index, task in enumerate(chosen, 1):
        print(f"{index}/{len(chosen)}: {task.name}, {task.length} tokens", flush=True)
        measured.append(measure(task, args.device, rounds=args.rounds))
    title = f"\noperations on {record.environment(args.device)['device']}, {HEADS} heads of {HEAD_DIM}"
    print(text_table(title, HEADER, [row for task_found in measured for row in rows(task_found)]))
    shape = {"heads": HEADS, "head_dim": HEAD_DIM, "dtype": str(DTYPE[args.device]).removeprefix("torch.")}
    figures = {"shape": shape, "rounds": args.rounds, "seed": SEED, "tasks": measured}
    command = " ".join(["python -m experiments.operations", *sys.argv[1:]])
    path = record.save(name, command, figures, args.out, device=args.device)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
