"""What the compiler makes of the kernels, without a GPU: registers, spills, shared memory and matrix instructions.

    python -m experiments.kernel_report --arch 90

It calls the operators on small tensors of the CPU, takes down every kernel launch that they would make on a GPU of this
architecture, and compiles it ahead of time with the launch parameters of the table. A row says what one kernel takes in
one case. A case that breaks a rule (spills, more shared memory than the chip has, a tile of 64 rows or more without
Hopper's own matrix instructions) is marked, and makes the command fail. Writes experiments/results/kernels_smXX.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from experiments import record
from sat import ops
from sat.files import written_whole
from sat.layout import BlockLayout
from sat.ops.triton.launch import observed

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes of shared memory that one program may take, by compute capability.
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
LENGTH = 1001  # no multiple of a block, so that the kernels have all their masks

BLOCKS = (16, 32, 64, 128)
HEAD_DIMS = (32, 64, 80, 128, 256)
PRECISIONS = ("bfloat16", "float32", "tf32")
OPTIONS = ("plain", "masked", "all")


class Case(NamedTuple):
    """One call of the operators."""

    block_size: int
    head_dim: int
    precision: str  # bfloat16 (float16 compiles alike), float32 or tf32
    options: str  # plain; masked: both paddings and causal; all: with bias, dropout and pruned logits of 0 too


class _NoDevice:
    """Stands in for Triton's driver: it names the GPU to compile for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def every_case() -> list[Case]:
    """The whole table. float32's tiles have 32 rows at most: blocks of 32 and 128 compile as those of 64 do."""
    half = itertools.product(BLOCKS, HEAD_DIMS, ["bfloat16"], OPTIONS)
    single = itertools.product((16, 64), HEAD_DIMS, ["float32"], ["plain", "all"])
    tf32 = itertools.product((16, 64), HEAD_DIMS, ["tf32"], ["plain"])
    return [Case(*values) for values in itertools.chain(half, single, tf32)]


def compiled(arch: int, case: Case) -> Iterator[dict[str, Any]]:
    """What every kernel of a case takes on an architecture."""
    driver.set_active(_NoDevice(arch))
    torch.set_float32_matmul_precision("high" if case.precision == "tf32" else "highest")
    found: dict[tuple, dict[str, Any]] = {}

    def take_down(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
        binary = kernel.warmup(*args, grid=(1,), **options)
        found[kernel.fn.__name__, *sorted(options.items())] = {
            "kernel": kernel.fn.__name__.strip("_").removesuffix("_kernel"),
            **case._asdict(),
            "tile": [options.get("ROWS", 0), options.get("COLUMNS", 0)],
            "warps": options.get("num_warps", 4),
            "stages": options.get("STAGES", options.get("num_stages", 0)),
            **_resources(binary),
        }

    with observed(take_down, divmod(arch, 10)):
        _call(case)
    for row in found.values():
        yield row | {"broken": broken_rules(arch, row)}


def _call(case: Case) -> None:
    """The operators and their gradients, on tensors nobody reads."""
    size, dim = case.block_size, case.head_dim
    dtype = torch.bfloat16 if case.precision == "bfloat16" else torch.float32
    query, key, value = (torch.empty(2, 2, LENGTH, dim, dtype=dtype).requires_grad_() for _ in range(3))
    blocks = -(-LENGTH // size)
    layout = BlockLayout(torch.ones(2, blocks, blocks, dtype=torch.bool), size)
    keep = torch.ones(2, LENGTH, dtype=torch.bool)
    masks: dict[str, Any] = {}
    if case.options != "plain":
        masks = {"key_padding_mask": keep, "is_causal": True}
    queries: dict[str, Any] = {} if case.options == "plain" else {"query_padding_mask": keep}
    attention = masks | queries
    if case.options == "all":
        bias = torch.zeros(1, 2, LENGTH, LENGTH, requires_grad=True)
        attention |= {"attn_bias": bias, "dropout_p": 0.1, "pruned": "zero"}
    _backward(ops.block_sparse_attention(query, key, value, layout, backend="triton", **attention))
    ops.attention_statistics(query, key, size, score_matrix=True, backend="triton", **masks, **queries)
    if case.options != "plain":
        masks["pruned"] = "zero"
    scores = ops.sddmm(query, key, layout, backend="triton")
    weights = ops.sparse_softmax(scores, layout, num_heads=2, query_length=LENGTH, backend="triton", **masks)
    _backward(ops.spmm(weights, value, layout, backend="triton"))


def _backward(out: torch.Tensor) -> None:
    """From a gradient in memory, as in training; that of a sum has strides of 0, and kernels of its own."""
    out.backward(torch.empty_like(out))


def _resources(binary: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assembly = binary.asm["ptx"]
    instructions = {name: assembly.count(name) for name in ("wgmma.mma_async", "tcgen05.mma", "mma.sync")}
    return {
        "registers": numbers["REG"],
        "spilled_bytes": numbers["STACK"] + numbers["LOCAL"],
        "shared_bytes": binary.metadata.shared,
        "matrix": {name.split(".")[0]: count for name, count in instructions.items() if count},
    }


# Which side of a tile is the rows of its matrix products; with 64 of them or more, Hopper has wgmma.
TILE_SIDE = {"forward": 0, "query_gradient": 0, "key_value_gradient": 1, "sddmm": 0, "spmm": 0}


def broken_rules(arch: int, row: dict[str, Any]) -> list[str]:
    """What must not be, and is."""
    broken = []
    if row["spilled_bytes"]:
        broken.append(f"spills {row['spilled_bytes']} bytes")
    if row["shared_bytes"] > SHARED_MEMORY[arch]:
        broken.append(f"wants {row['shared_bytes']} bytes of shared memory")
    side = TILE_SIDE.get(row["kernel"])
    exact = row["precision"] == "float32"  # Hopper's matrix units do not multiply float32 exactly
    if arch == 90 and side is not None and row["tile"][side] >= 64 and not exact and "wgmma" not in row["matrix"]:
        broken.append("no wgmma")
    return broken


def _rows(arch: int, case: Case) -> list[dict[str, Any]]:
    return list(compiled(arch, case))


def report(arch: int, cases: list[Case]) -> list[dict[str, Any]]:
    """The rows of all cases, compiled on all processors; progress goes to stderr."""
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        waiting = {pool.submit(_rows, arch, case): case for case in cases}
        for done, future in enumerate(as_completed(waiting), 1):
            rows += future.result()
            bad = sum(bool(row["broken"]) for row in rows)
            print(f"\rsm_{arch}: {done}/{len(cases)} cases, {bad} kernels break a rule ", end="", file=sys.stderr)
    print(file=sys.stderr)
    return sorted(rows, key=lambda row: [row[name] for name in ("kernel", *Case._fields)])


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each kernel and precision: its range over all cases; and each case that breaks a rule."""
    lines = [
        f"{'kernel':<22}{'precision':<10}{'cases':>6}{'registers':>12}{'shared KiB':>12}{'spills':>8}  matrix units"
    ]
    for (kernel, precision), group in itertools.groupby(
        sorted(rows, key=lambda row: (row["kernel"], row["precision"])), lambda row: (row["kernel"], row["precision"])
    ):
        own = list(group)
        registers = [row["registers"] for row in own]
        shared = [row["shared_bytes"] / 1024 for row in own]
        units = sorted({name for row in own for name in row["matrix"]})
        lines.append(
            f"{kernel:<22}{precision:<10}{len(own):>6}{f'{min(registers)}-{max(registers)}':>12}"
            f"{f'{min(shared):.0f}-{max(shared):.0f}':>12}{sum(row['spilled_bytes'] > 0 for row in own):>8}  "
            f"{', '.join(units)}"
        )
    for row in rows:
        if row["broken"]:
            case = ", ".join(str(row[name]) for name in ("kernel", *Case._fields, "tile", "warps", "stages"))
            lines.append(f"BROKEN {case}: {'; '.join(row['broken'])}")
    return "\n".join(lines)


def save(arch: int, rows: list[dict[str, Any]]) -> Path:
    """Write the table as ``experiments/results/kernels_smXX.json``, one row a line."""
    head = record.environment() | {"triton": triton.__version__, "arch": arch, "columns": list(rows[0])}
    head = {"format": record.FORMAT, "command": f"python -m experiments.kernel_report --arch {arch}"} | head
    lines = ",\n".join("  " + json.dumps(list(row.values())) for row in rows)
    path = record.RESULTS / f"kernels_sm{arch}.json"
    head = record.note_of(path) | head
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(head, indent=1).removesuffix("\n}") + f',\n "rows": [\n{lines}\n ]\n}}\n')
    return path


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[90], choices=sorted(SHARED_MEMORY), help="90 = Hopper")
    parser.add_argument("--block_size", type=int, nargs="+", choices=BLOCKS, help="only these")
    parser.add_argument("--head_dim", type=int, nargs="+", choices=HEAD_DIMS, help="only these")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, help="only these")
    parser.add_argument("--options", nargs="+", choices=OPTIONS, help="only these")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: interpreted kernels are not compiled; unset it")
    chosen = [getattr(arguments, name) for name in Case._fields]
    cases = [
        case
        for case in every_case()
        if all(only is None or value in only for value, only in zip(case, chosen, strict=True))
    ]
    if not cases:
        parser.error("no case of the table is of all these kinds")
    failed = False
    for arch in arguments.arch:
        rows = report(arch, cases)
        print(table(rows))
        failed |= any(row["broken"] for row in rows)
        if len(cases) == len(every_case()):
            print(f"written to {save(arch, rows)}")
        else:
            print("not written: only the whole table is")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
