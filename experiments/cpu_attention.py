"""Block-sparse attention on a CPU against fused and explicit dense attention, and how it grows.

python -m experiments.cpu_attention              (about 1 minute on 2 cores; writes results/cpu_attention.json)
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from experiments import record
from sat.layout import BlockLayout
from sat.ops import block_sparse_attention

SHAPE = (8, 2, 1024, 32)


def learned_like(blocks: int, density: float, heads: int, size: int) -> BlockLayout:
    """The diagonal, a vertical, and scattered blocks: what learned layouts look like."""
    mask = torch.zeros(heads, blocks, blocks, dtype=torch.bool)
    count = max(blocks, int(blocks * blocks * density))
    for head in range(heads):
        scores = torch.rand(blocks, blocks)
        scores[:, torch.randint(blocks, ())] += 0.3
        scores.fill_diagonal_(2)
        mask[head].view(-1)[scores.view(-1).topk(count).indices] = True
    return BlockLayout(mask, size)


def inputs(shape: tuple[int, int, int, int]) -> tuple[list[Tensor], Tensor]:
    """Query, key and value as a projection leaves them (heads inside), and an upstream gradient."""
    batch, heads, length, dim = shape
    qkv = torch.randn(batch, length, 3, heads, dim).permute(2, 0, 3, 1, 4).unbind(0)
    return [x.detach().requires_grad_() for x in qkv], torch.randn(shape)


def explicit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Dense attention with the scores in full."""
    return torch.softmax(query @ key.transpose(2, 3) / math.sqrt(query.shape[3]), -1) @ value


def compare(density: float, rounds: int) -> dict[str, Any]:
    """Forward and backward at the paper's CIFAR-10 shape."""
    (query, key, value), grad = inputs(SHAPE)
    layout = learned_like(32, density, 2, 32)

    def step(attend: Any) -> None:
        torch.autograd.grad(attend(query, key, value), (query, key, value), grad)

    times = record.interleaved(
        {
            "sat": lambda: step(lambda q, k, v: block_sparse_attention(q, k, v, layout)),
            "fused dense": lambda: step(F.scaled_dot_product_attention),
            "explicit dense": lambda: step(explicit),
        },
        rounds,
    )
    return {
        "density": round(layout.density, 4),
        **{name: record.summary(values) for name, values in times.items()},
        "faster than fused dense": record.ratio(times, "fused dense", "sat"),
        "faster than explicit dense": record.ratio(times, "explicit dense", "sat"),
    }


def peak_memory_mib() -> float:
    """Most memory that this process has held so far. (getrusage would include its parent's, from before the exec.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


def grow(length: int, density: float, rounds: int) -> dict[str, Any]:
    """Time and memory of one case, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_grow, (length, density, rounds))


def _grow(length: int, density: float, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(2)
    shape = (2, 2, length, 32)
    (query, key, value), grad = inputs(shape)
    layout = learned_like(length // 32, density, 2, 32)
    small_layout = learned_like(2, 1.0, 2, 32)
    small, small_grad = inputs((1, 2, 64, 32))
    # Libraries allocate at their first call: not counted.
    torch.autograd.grad(block_sparse_attention(small[0], small[1], small[2], small_layout), small, small_grad)
    before = peak_memory_mib()

    def step() -> None:
        torch.autograd.grad(block_sparse_attention(query, key, value, layout), (query, key, value), grad)

    step()
    memory = peak_memory_mib() - before
    times = record.interleaved({"sat": step}, rounds)["sat"]
    return {
        "length": length,
        "density": round(layout.density, 4),
        "kept_blocks": layout.nnz,
        **record.summary(times),
        "extra_memory_mib": round(memory, 1),
        "scores_in_full_mib": round(2 * 2 * length * length * 4 / 2**20, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25, help="calls of each function")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    console = Console()
    compared = [compare(density, args.rounds) for density in (0.03, 0.06, 0.11, 0.25, 0.5)]
    table: Table = Table(title=f"forward + backward, {list(SHAPE)}, blocks of 32, float32")
    for column in ("density", "sat ms", "fused dense ms", "explicit dense ms", "x fused", "x explicit"):
        table.add_column(column, justify="right")
    for row in compared:
        medians = [f"{row[name]['median_ms']:.1f}" for name in ("sat", "fused dense", "explicit dense")]
        ratios = [f"{row[f'faster than {name}']:.2f}" for name in ("fused dense", "explicit dense")]
        table.add_row(f"{row['density']:.3f}", *medians, *ratios)
    console.print(table)
    cases = [(1024, d) for d in (0.03, 0.06, 0.12, 0.25, 0.5)] + [(length, 0.06) for length in (2048, 4096, 8192)]
    # As many blocks a row at every length: what grows then is the length alone.
    cases += [(length, 0.12 * 1024 / length) for length in (2048, 4096, 8192)]
    grown = [grow(length, density, max(5, args.rounds // 3)) for length, density in cases]
    table = Table(title="growth, [2, 2, length, 32], blocks of 32")
    for column in ("length", "density", "kept blocks", "ms", "ms a 1000 blocks", "extra MiB", "scores in full, MiB"):
        table.add_column(column, justify="right")
    for row in grown:
        each = 1e3 * row["median_ms"] / row["kept_blocks"]
        cells = (row["length"], row["density"], row["kept_blocks"], row["median_ms"], f"{each:.1f}")
        table.add_row(*map(str, cells), str(row["extra_memory_mib"]), str(row["scores_in_full_mib"]))
    console.print(table)
    path = record.save("cpu_attention", "python -m experiments.cpu_attention", {"compare": compared, "growth": grown})
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
