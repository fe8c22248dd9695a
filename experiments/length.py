"""What longer sequences cost: attention with as many kept blocks a row at every length, layouts, and training.

    python -m experiments.length
    python -m experiments.length --lengths 1024 2048 4096 --parts attention

attention: forward and backward of one sequence, 1,024 to 32,768 tokens, SAT with 8 blocks of 64 in a row beside
PyTorch's fused dense attention; time and the most memory beyond the inputs, each in a process of its own; and the
exponents with which both grow, fitted to all lengths and to those from 4,096 tokens on, where what every call costs no
longer hides the growth. layouts: what a layout of 65,536 and 262,144 tokens takes to be built and to have all its
indices, and how many bytes it holds. training: some steps of python -m sat.train on Path-X, 16,384 tokens.

Each figure is kept as it is measured; a run that was cut off goes on with those that are missing, if device, versions,
commit and settings are the same. Writes experiments/results/length_cpu.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments import memory, record
from experiments.accuracy import execute
from experiments.gpu_suite import layouts as made_up
from experiments.gpu_suite.attention import Shape, inputs
from experiments.gpu_suite.case import number, text_table
from sat import patterns
from sat.ops import block_sparse_attention

# The parts, and by what their figures are known.
KNOWN_BY = {
    "attention": ("length",),
    "layouts": ("structure", "length", "block_size", "heads"),
    "training": ("name",),
}
PARTS = tuple(KNOWN_BY)
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
FROM = 4096  # where the second fit begins
LINEAR = 1.1  # the largest exponent that still passes for linear growth
OURS, DENSE = "sat", "fused dense"
PER_ROW = 8
SHAPE = Shape(0, head_dim=32, block_size=64, dtype=torch.float32, heads=2, tokens=1)
SECONDS = 10  # of calls, after which no more are made for a median

LAYOUT_LENGTHS = (65_536, 262_144)
LAYOUT_BLOCKS = (64, 128)
LAYOUT_HEADS = (1, 8)
STRUCTURES: dict[str, Callable[[int, int], patterns.Structure]] = {
    "window": lambda heads, size: patterns.SlidingWindow(heads, size, 7, attention="bidirectional"),
    "BigBird": lambda heads, size: patterns.BigBird(heads, size, True, num_random_blocks=3),
    "Longformer": lambda heads, size: patterns.Longformer(heads, size, num_sliding_window_blocks=7),
    "Fixed": lambda heads, size: patterns.Fixed(heads, size, num_local_blocks=32),
    "Variable": lambda heads, size: patterns.Variable(heads, size, True, num_random_blocks=3, local_window_blocks=[8]),
}

STEPS = 6
TRAINING = {
    "dense, then SAT": "--sparsity.interval 1 --sparsity.samples 1 --sparsity.min_dense_steps 0 "
    "--sparsity.max_dense_steps 2",
    "SAT from the first step": "--sparsity.start window --sparsity.mask fisher --sparsity.revise_interval 500 "
    "--sparsity.interval 50 --sparsity.samples 2",
}


def call(way: str, length: int) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward of one sequence."""
    shape = Shape(length, SHAPE.head_dim, SHAPE.block_size, SHAPE.dtype, SHAPE.heads, SHAPE.tokens)
    tensors, grad = inputs(shape, "cpu")
    query, key, value = tensors
    if way == DENSE:
        return lambda: torch.autograd.grad(F.scaled_dot_product_attention(query, key, value), tensors, grad)
    blocks = length // shape.block_size
    layout = made_up.learned_like(blocks, 0, shape.heads, shape.block_size, "cpu", per_row=min(PER_ROW, blocks))
    return lambda: torch.autograd.grad(
        block_sparse_attention(query, key, value, layout, backend="torch"), tensors, grad
    )


def with_a_small_one(way: str, length: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """What ``memory.peak_mib`` asks for."""
    return call(way, length), call(way, 2 * SHAPE.block_size)


def times(way: str, length: int, rounds: int, threads: int) -> list[float]:
    """Milliseconds of each call after one that is not counted; fewer than ``rounds`` where they take long."""
    torch.set_num_threads(threads)
    function = call(way, length)
    function()
    found: list[float] = []
    while len(found) < rounds and (len(found) < 2 or sum(found) < 1e3 * SECONDS):
        start = time.perf_counter()
        function()
        found.append(1e3 * (time.perf_counter() - start))
    return found


def attention(length: int, rounds: int, threads: int) -> dict[str, Any]:
    """Time and memory of both ways at a length."""
    case: dict[str, Any] = {"length": length}
    for way in (OURS, DENSE):
        taken = memory.alone(times, way, length, rounds, threads)
        case[way] = {
            **({"ms": round(statistics.median(taken), 2), "calls": len(taken)} if taken else {}),
            "peak_mib": memory.peak_mib(with_a_small_one, way, length, threads=threads),
        }
    return case


def exponent(cases: Sequence[Mapping[str, Any]], way: str, name: str, least: int = 0) -> float | None:
    """The exponent of the length with which a figure grows, by least squares of logarithms; None of fewer than 2."""
    pairs = [(case["length"], case[way].get(name)) for case in cases if case["length"] >= least]
    known = [(length, value) for length, value in pairs if value]
    if len(known) < 2:
        return None
    lengths, values = np.log(np.array(known, dtype=float)).T
    return round(float(np.polyfit(lengths, values, 1)[0]), 2)


def layout(name: str, length: int, size: int, heads: int) -> dict[str, Any]:
    """What a structure's layout takes: seconds of the processor, to be built and for all indices, and bytes held."""
    structure = STRUCTURES[name](heads, size)
    start = time.process_time()
    made = structure.layout(length)
    built = time.process_time()
    indices = (made.crow_indices, made.col_indices, made.ccol_indices, made.row_indices)
    end = time.process_time()
    return {
        "structure": name,
        "length": length,
        "block_size": size,
        "heads": heads,
        "kept_blocks": made.nnz,
        "build_s": round(built - start, 3),
        "index_s": round(end - built, 3),
        "mib": round(sum(x.numel() * x.element_size() for x in indices) / 2**20, 2),
        "mask_mib": round(heads * (length // size) ** 2 / 2**20, 2),
    }


def training(name: str, threads: int) -> dict[str, Any]:
    """Some steps of the training command on Path-X, a sequence a step.

    Raises:
        RuntimeError: the training failed, with its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sat.train", "--config", "pathx.yaml", "--output_dir", folder, "--name", "run"]
        command += ["--data.num_samples", "20", "--data.batch_size", "1", "--trainer.max_steps", str(STEPS)]
        command += ["--trainer.limit_val_batches", "0", "--trainer.limit_test_batches", "1", "--seed", "0"]
        command += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--optimizer.warmup_steps", "1"]
        log = Path(folder) / "log.txt"
        status = execute([*command, *TRAINING[name].split()], log, {"OMP_NUM_THREADS": str(threads)})
        if status:
            last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
            raise RuntimeError(f"the training {name!r} on Path-X ended with status {status}: {last}")
        summary = json.loads(next(Path(folder).glob("run/*/summary.json")).read_text())
    kept = ("density", "steps", "median_step_ms", "peak_memory_mib", "training_seconds")
    return {"name": name, **{key: summary[key] for key in kept}}


def earlier(path: Path, head: dict[str, Any], parts: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """What an earlier run under the same circumstances has measured; of ``parts`` only if one of them was cut off."""
    nothing: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    try:
        content = json.loads(path.read_text())
        found = {part: list(content[part]) for part in PARTS}
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or nothing to go on with
        return nothing
    same = all(content.get(name) == value for name, value in head.items() if name != "date")
    if not same:
        return nothing
    anew = set(parts) <= set(content.get("complete") or [])
    return {part: [] if anew and part in parts else rows for part, rows in found.items()}


def exponents(cases: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """By way and figure: over all lengths, and over the longer ones."""
    return {
        way: {
            name: {"all": exponent(cases, way, name), f"from {FROM}": exponent(cases, way, name, FROM)}
            for name in ("ms", "peak_mib")
        }
        for way in (OURS, DENSE)
    }


HEADER = ["length", "sat ms", "sat MiB", "dense ms", "dense MiB"]


def rows(cases: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The figures of attention under :data:`HEADER`."""
    figures = [[case[way].get(name) for way in (OURS, DENSE) for name in ("ms", "peak_mib")] for case in cases]
    return [[str(case["length"]), *map(number, own)] for case, own in zip(cases, figures, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="of attention, in whole blocks")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="calls at most, for a median (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder (default: experiments/results)")
    args = parser.parse_args()
    if uneven := [length for length in args.lengths if length < 1 or length % SHAPE.block_size]:
        parser.error(f"--lengths has {uneven[0]}, expected multiples of {SHAPE.block_size}, the edge of a block")
    if args.rounds < 2 or args.threads < 1:
        parser.error(
            f"--rounds and --threads are {args.rounds} and {args.threads}, expected at least 2 rounds and 1 thread"
        )
    path = args.out / "length_cpu.json"
    try:
        with record.alone(path):
            save(args, path)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def save(args: argparse.Namespace, path: Path) -> None:
    """Measure and print what is asked for; each figure is written with the others when it is measured.

    Raises:
        ValueError: the file holds more, under other circumstances; a sentence.
    """
    torch.set_num_threads(args.threads)
    shown = {"heads": SHAPE.heads, "head_dim": SHAPE.head_dim, "block_size": SHAPE.block_size, "dtype": "float32"}
    settings = {"shape": shown, "per_row": PER_ROW, "rounds": args.rounds}
    environment = record.environment("cpu")
    found = earlier(path, {**environment, **settings}, args.parts)
    work: list[tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]] = []
    for length in dict.fromkeys(args.lengths):
        work.append(("attention", {"length": length}, partial(attention, length, args.rounds, args.threads)))
    for each in itertools.product(STRUCTURES, LAYOUT_LENGTHS, LAYOUT_BLOCKS, LAYOUT_HEADS):
        known = dict(zip(KNOWN_BY["layouts"], each, strict=True))
        work.append(("layouts", known, partial(layout, *each)))
    for name in TRAINING:
        work.append(("training", {"name": name}, partial(training, name, args.threads)))
    everything = [(part, known) for part, known, _ in work]
    work = [each for each in work if each[0] in args.parts]
    asked = [(part, *known.values()) for part, known, _ in work]

    def there(content: dict[str, Any]) -> list[tuple[Any, ...]]:
        return [(part, *(row[x] for x in KNOWN_BY[part])) for part in PARTS for row in content[part]]

    record.lose_nothing(path, there, [*asked, *there(found)])
    command = " ".join(["python -m experiments.length", *sys.argv[1:]])
    for index, (part, known, measure) in enumerate(work, 1):
        name = f"{index}/{len(work)}: {part}, {', '.join(f'{what} {value}' for what, value in known.items())}"
        if any(known.items() <= row.items() for row in found[part]):
            print(f"{name}: was measured before", flush=True)
            continue
        print(name, flush=True)
        found[part].append(measure())
        cut_off = {part for part, known in everything if not any(known.items() <= row.items() for row in found[part])}
        complete = [part for part in PARTS if part not in cut_off]
        figures = {**settings, **found, "exponents": exponents(found["attention"]), "complete": complete}
        record.save("length_cpu", command, figures, args.out, device="cpu")
    print(text_table("\nforward + backward of one sequence", HEADER, rows(found["attention"])))
    for way, figures in exponents(found["attention"]).items():
        print(f"{way} grows with the length to the power of {figures}")
    for row in found["training"]:
        print(f"training on 16,384 tokens, {row['name']}: {row['median_step_ms']} ms, {row['peak_memory_mib']} MiB")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
