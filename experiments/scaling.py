"""Time and memory of attention over sequence length and density, and the density at which dense attention catches up.

    python -m experiments.scaling                       (about 4 minutes on 2 cores)
    python -m experiments.scaling --device cuda

Forward and backward of SAT at several densities, one of them the same number of kept blocks a row at every length,
beside PyTorch's fused attention and explicit dense attention (product, softmax, product; left out where its scores are
too large). All lengths have as many tokens in all: what is longer has a smaller batch. Float32 on a CPU, bfloat16 on a
GPU; FlexAttention stands in experiments.gpu_suite.

Memory is the most that a call held beyond its inputs: on a GPU as PyTorch counts it, on a CPU in a process of its own.
Each length is kept as it ends; a run that was cut off goes on with those that are missing, if device, versions, commit
and settings are the same. Writes experiments/results/scaling_DEVICE.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments import memory, record
from experiments.gpu_suite import arithmetic, clock, competitors, layouts
from experiments.gpu_suite.attention import Attend, Shape, inputs
from experiments.gpu_suite.case import number, text_table
from sat.ops import block_sparse_attention

SEED = 0
DENSITIES = (0.03, 0.06, 0.12, 0.25, 0.5, 0.75, 1.0)
PER_ROW = 4  # kept blocks a row, at every length
OURS, FUSED, EXPLICIT = "sat", "fused dense", "explicit dense"
LENGTHS = {"cpu": (512, 1024, 2048, 4096, 8192), "cuda": (1024, 2048, 4096, 8192, 16384, 32768)}
SHAPES = {
    "cpu": Shape(0, head_dim=32, block_size=32, dtype=torch.float32, heads=2, tokens=8192),
    "cuda": Shape(0, head_dim=64, block_size=64, dtype=torch.bfloat16, heads=8, tokens=32768),
}
LARGEST_SCORES = {"cpu": 2**29, "cuda": 10 * 2**30}  # bytes of dense scores that explicit attention is still asked for


class Way(NamedTuple):
    """One way to attend."""

    name: str
    density: float | None = None  # of ours

    def attend(self, shape: Shape, device: str) -> tuple[Attend, dict[str, Any]]:
        """The function, and of ours what it keeps."""
        if self.density is None:
            return (F.scaled_dot_product_attention if self.name == FUSED else competitors.explicit), {}
        blocks = shape.length // shape.block_size
        layout = layouts.learned_like(blocks, self.density, shape.heads, shape.block_size, device, SEED)
        kept = {"density": round(layout.density, 4), "kept_blocks_a_row": round(layout.nnz / shape.heads / blocks, 2)}
        return (lambda q, k, v: block_sparse_attention(q, k, v, layout)), kept


def step(attend: Attend, shape: Shape, device: str) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward."""
    tensors, grad = inputs(shape, device)
    return lambda: torch.autograd.grad(attend(*tensors), tensors, grad)


def with_a_small_one(way: Way, shape: Shape) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """What ``memory.peak_mib`` asks for."""
    small = dataclasses.replace(shape, length=2 * shape.block_size, tokens=1)
    call, first = (step(way.attend(s, "cpu")[0], s, "cpu") for s in (shape, small))
    return call, first


def measure(length: int, densities: Sequence[float], device: str, rounds: int) -> dict[str, Any]:
    """Times and memory of every way at a length, all in turn, and where dense attention catches up.

    Raises:
        RuntimeError: SAT's attention failed; that of the others is kept as their error.
    """
    shape = dataclasses.replace(SHAPES[device], length=length)
    references = [Way(FUSED)]
    if shape.batch * shape.heads * length**2 * shape.dtype.itemsize <= LARGEST_SCORES[device]:
        references.append(Way(EXPLICIT))
    same_a_row = min(1.0, PER_ROW * shape.block_size / length)
    rows: dict[Way, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for way in [*references, *(Way(OURS, density) for density in sorted({*densities, same_a_row}))]:
        attend, kept = way.attend(shape, device)
        if kept and any(kept["density"] == row.get("density") for row in rows.values()):
            continue  # the diagonal, which is kept in any case, is more than what was asked for
        rows[way] = {"way": way.name, **({"asked": way.density} if kept else {}), **kept}
        calls[str(way)] = step(attend, shape, device)
    figures, times = clock.figures(calls, device, rounds)
    del calls
    for way, row in rows.items():
        row |= figures[str(way)]
        if way.name == OURS:
            if "error" in row:
                raise RuntimeError(f"length {length}, density {row['density']}: {row['error']}")
            row["faster_than"] = {other.name: clock.faster(times, str(other), str(way)) for other in references}
        if device == "cpu" and "error" not in row:
            row["peak_mib"] = memory.peak_mib(with_a_small_one, way, shape, threads=torch.get_num_threads())
    found = list(rows.values())
    even = {other.name: break_even(found, other.name) for other in references}
    return {"length": length, "batch": shape.batch, "rows": found, "break_even": even}


def break_even(rows: Sequence[dict[str, Any]], reference: str) -> float | None:
    """The density at which SAT and a reference take equally long, interpolated; None where neither catches up."""
    swept = sorted((row["density"], row["faster_than"][reference]) for row in rows if row["way"] == OURS)
    if any(faster is None for _, faster in swept):
        return None
    even = arithmetic.break_even([d for d, _ in swept], [1 / faster for _, faster in swept], [1.0] * len(swept))
    return None if even is None else round(even, 3)


HEADER = ["length", "batch", "way", "density", "blocks a row", "ms", "MiB", "x fused", "x explicit"]


def cells(case: dict[str, Any]) -> list[list[str]]:
    """A length's figures under :data:`HEADER`."""
    found = []
    for row in case["rows"]:
        kept = [number(row.get("density"), 3), number(row.get("kept_blocks_a_row"), 3)]
        measured = [number(row.get("ms", {}).get("median")), number(row.get("peak_mib"))]
        faster = [number(row.get("faster_than", {}).get(other)) for other in (FUSED, EXPLICIT)]
        found.append([str(case["length"]), str(case["batch"]), row["way"], *kept, *measured, *faster])
    return found


def even_text(case: dict[str, Any], reference: str) -> str:
    """Where SAT and a reference take equally long, in words or as a number."""
    if (even := case["break_even"].get(reference)) is not None:
        return f"{even:.2f}"
    swept = [row["faster_than"].get(reference) for row in case["rows"] if row["way"] == OURS]
    if not swept or None in swept:
        return "not measured"
    return "faster throughout" if swept[-1] >= 1 else "slower throughout"


def unfinished(path: Path, head: dict[str, Any], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """The lengths that an earlier run under the same circumstances has measured, if others were left."""
    try:
        earlier = json.loads(path.read_text())
        cases = [case for case in earlier["cases"] if case["length"] in lengths]
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or nothing to go on with
        return []
    same = all(earlier.get(name) == value for name, value in head.items() if name != "date")
    return cases if same and len(cases) < len(lengths) else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens, whole blocks (default: by device)")
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES), help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="calls of each function (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder (default: experiments/results)")
    args = parser.parse_args()
    record.check_device(parser, args.device)
    lengths, shape = list(dict.fromkeys(args.lengths or LENGTHS[args.device])), SHAPES[args.device]
    if uneven := [length for length in lengths if length < 1 or length % shape.block_size]:
        parser.error(f"--lengths has {uneven[0]}, expected multiples of {shape.block_size}, the edge of a block")
    if wrong := [density for density in args.densities if not 0 < density <= 1]:
        parser.error(f"--densities has {wrong[0]}, expected shares of the blocks: above 0, at most 1")
    if args.rounds < 1 or args.threads < 1:
        parser.error(f"--rounds and --threads are {args.rounds} and {args.threads}, expected at least 1")
    name = f"scaling_{record.device_slug(args.device)}"
    path = args.out / f"{name}.json"
    try:
        record.lose_nothing(path, lambda content: [case["length"] for case in content["cases"]], lengths)
        with record.alone(path):
            save(args, name, lengths)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def save(args: argparse.Namespace, name: str, lengths: Sequence[int]) -> None:
    """Measure and print the lengths; each is written with the others when it is measured."""
    torch.set_num_threads(args.threads)
    shape = SHAPES[args.device]
    shown = {**dataclasses.asdict(shape), "dtype": str(shape.dtype).removeprefix("torch.")}
    del shown["length"]
    settings = {"shape": shown, "densities": args.densities, "rounds": args.rounds, "seed": SEED}
    environment = record.environment(args.device)
    path = args.out / f"{name}.json"
    cases = unfinished(path, {**environment, **settings}, lengths)
    command = " ".join(["python -m experiments.scaling", *sys.argv[1:]])
    for index, length in enumerate(lengths, 1):
        if any(case["length"] == length for case in cases):
            print(f"{index}/{len(lengths)}: length {length} was measured before", flush=True)
            continue
        print(f"{index}/{len(lengths)}: length {length}", flush=True)
        cases.append(measure(length, args.densities, args.device, args.rounds))
        record.save(name, command, {**settings, "cases": cases}, args.out, device=args.device)
    print(text_table(f"\nforward + backward on {environment['device']}", HEADER, [r for c in cases for r in cells(c)]))
    print("\nas fast as dense attention at a density of")
    for case in cases:
        print(f"{case['length']:>7} {', '.join(f'{x}: {even_text(case, x)}' for x in case['break_even'])}")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
