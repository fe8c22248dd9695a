"""Attention, forward and forward + backward, beside its competitors: time, memory, share of the floor.

The forward pass is that of training: it keeps what the backward pass needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from experiments.gpu_suite import arithmetic, clock, competitors, layouts
from experiments.gpu_suite.case import Case, Record, Section, Setting, number, text_table
from sat.layout import BlockLayout
from sat.ops import block_sparse_attention

MODES = ("forward", "forward+backward")
DENSE = ("flash", "cudnn", "explicit")
LARGEST_SCORES = 10 * 2**30  # bytes of dense scores that explicit attention is still asked for
FLEX_SECONDS = 25  # what compiling FlexAttention may take for one shape
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """What FlexAttention is compiled for anew."""

    length: int
    head_dim: int
    block_size: int
    dtype: torch.dtype = torch.bfloat16
    heads: int = 16
    tokens: int = 2**14  # of the whole batch, at least

    @property
    def batch(self) -> int:
        return max(1, self.tokens // self.length)

    def name(self, density: float) -> str:
        return f"L {self.length} D {self.head_dim} b {self.block_size} {SHORT[self.dtype]} density {density:g}"


# FlexAttention as compiled in this process: for which shape, and which variants failed, to be asked no more.
_compiled_for: Shape | None = None
_refused: dict[str, str] = {}


def inputs(shape: Shape, device: str) -> tuple[list[Tensor], Tensor]:
    """Query, key and value with the heads inside, as projections leave them, and an upstream gradient."""
    generator = torch.Generator(device).manual_seed(0)
    size = (shape.batch, shape.length, shape.heads, shape.head_dim)
    *tensors, grad = (
        torch.randn(size, generator=generator, device=device, dtype=shape.dtype).transpose(1, 2) for _ in range(4)
    )
    return [x.requires_grad_() for x in tensors], grad


def attenders(shape: Shape, layout: BlockLayout, setting: Setting, *, flex: bool) -> dict[str, Attend]:
    """Every way to attend, by name."""

    def ours(fused: bool) -> Attend:
        return lambda q, k, v: block_sparse_attention(q, k, v, layout, backend=setting.backend, fused=fused)

    found: dict[str, Attend] = {"fused": ours(True), "composed": ours(False)}
    if flex:
        found |= competitors.variants(layout, shape.length, setting.device)
    if not setting.smoke:
        # Flash attention knows half precisions only; the next best stands in for it.
        half = shape.dtype != torch.float32
        found["flash"] = competitors.fused_dense(SDPBackend.FLASH_ATTENTION if half else SDPBackend.EFFICIENT_ATTENTION)
        if half:
            found["cudnn"] = competitors.fused_dense(SDPBackend.CUDNN_ATTENTION)
    if shape.batch * shape.heads * shape.length**2 * shape.dtype.itemsize <= LARGEST_SCORES:
        found["explicit"] = competitors.explicit
    return found


def differences(
    functions: dict[str, Attend], tensors: list[Tensor], grad: Tensor, device: str
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """How far each other way to compute the same function lies from ours, relative, in output and gradients.

    And the error of each that fails.
    """

    def results(attend: Attend) -> list[Tensor]:
        out = attend(*tensors)
        return [out.detach(), *(torch.autograd.grad(out, tensors, grad) if out.requires_grad else ())]

    same = {name: attend for name, attend in functions.items() if name == "composed" or name.startswith("flex")}
    ours = results(functions["fused"])
    running, refused = clock.works({name: partial(results, attend) for name, attend in same.items()}, device)
    found = {}
    for name, function in running.items():
        errors = [
            ((theirs.float() - mine.float()).norm() / mine.float().norm()).item()
            for mine, theirs in zip(ours, function(), strict=False)  # FlexAttention has no gradients on a CPU
        ]
        found[name] = [float(f"{error:.3g}") for error in errors]
    return found, refused


def run(shape: Shape, density: float, setting: Setting, seconds: float) -> Record:
    global _compiled_for, _refused
    device = setting.device
    until = time.monotonic() + seconds
    ceilings = clock.ceilings(device, shape.dtype)
    layout = layouts.learned_like(shape.length // shape.block_size, density, shape.heads, shape.block_size, device)
    tensors, grad = inputs(shape, device)
    flex = shape == _compiled_for or until - time.monotonic() > FLEX_SECONDS or setting.smoke
    if flex and shape != _compiled_for:
        competitors.reset()
        _compiled_for, _refused = shape, {}
    functions = attenders(shape, layout, setting, flex=flex)
    functions = {name: attend for name, attend in functions.items() if name not in _refused}
    difference, errors = differences(functions, tensors, grad, device)
    _refused |= {name: error for name, error in errors.items() if name.startswith("flex")}
    functions = {name: attend for name, attend in functions.items() if name not in errors}
    record: Record = {
        "length": shape.length,
        "head_dim": shape.head_dim,
        "block_size": shape.block_size,
        "dtype": SHORT[shape.dtype],
        "batch": shape.batch,
        "heads": shape.heads,
        "density": round(layout.density, 4),
        "kept_blocks": layout.nnz,
        "inputs_mib": round(4 * tensors[0].numel() * shape.dtype.itemsize / 2**20, 1),
        "ceilings": ceilings,
        "difference": difference,
        "refused": {**(_refused if flex else {}), **errors},
    }
    if shape.dtype == torch.float32:
        record["flash"] = "efficient attention, because flash attention does not know float32"
    if not flex:
        record["flex_skipped"] = "no time left to compile FlexAttention for another shape"

    def call(attend: Attend, mode: str) -> Callable[[], Any]:
        if mode == "forward":
            return lambda: attend(*tensors)
        return lambda: torch.autograd.grad(attend(*tensors), tensors, grad)

    operations = arithmetic.forward_operations(layout.nnz, shape.block_size, shape.head_dim, shape.batch)
    size = (shape.length, shape.heads, shape.head_dim, shape.batch, shape.dtype.itemsize)
    rates = ceilings["matmul_tflops"], ceilings["copy_tb_s"]
    floor = arithmetic.floor_ms(operations, arithmetic.least_bytes(*size, backward=False), *rates)
    backward_bytes = arithmetic.least_bytes(*size, backward=True)
    floors = {
        "forward": floor,
        "forward+backward": floor + arithmetic.floor_ms(arithmetic.BACKWARD * operations, backward_bytes, *rates),
    }
    lines = []
    for mode in MODES:
        calls = {name: call(attend, mode) for name, attend in functions.items()}
        if setting.smoke and mode != "forward":
            calls.pop("flex", None)  # FlexAttention has no backward pass on a CPU
        found, times = clock.figures(calls, device, rounds=3 if setting.smoke else 7)
        if "error" in found["fused"]:
            raise RuntimeError(f"{mode}: {found['fused']['error']}")
        work = operations * (1 if mode == "forward" else 1 + arithmetic.BACKWARD)
        for figures in found.values():
            if "ms" in figures:
                median = figures["ms"]["median"]
                figures["kept_tflops"] = round(work / median / 1e9, 2)
                figures["of_floor"] = round(floors[mode] / median, 4)
        others = {name: clock.faster(times, name, "fused") for name in found if name != "fused"}
        record[mode] = {"floor_ms": float(f"{floors[mode]:.4g}"), "times": found, "faster_than": others}
        fused = found["fused"]
        lines.append(f"{number(fused['ms']['median'])} ms {number(fused['kept_tflops'])} TFLOP/s")
    wrong = {name: found for name, found in difference.items() if not max(found) < 0.05}
    if wrong:  # far above what rounding does, in any precision
        record |= {"status": "failed", "error": f"differ from ours, relative, in output and gradients: {wrong}"}
    return {**record, "line": ", ".join(lines)}


def plan(setting: Setting) -> list[tuple[Shape, tuple[float, ...]]]:
    """Shapes in the order of their importance, each with the densities to take in turn."""
    if setting.smoke:
        return [
            (Shape(64, 8, 16, torch.float32, 2, 128), (0.3, 0.6)),
            (Shape(128, 8, 32, torch.float32, 2, 128), (0.5,)),
        ]
    usual, sweep, fp16, fp32 = (0.1, 0.05, 0.25), (0.02, 0.5, 0.8, 1.0), torch.float16, torch.float32
    core = [(8192, 128), (1024, 32), (8192, 32), (16384, 64), (1024, 64), (16384, 128), (8192, 64), (1024, 128)]
    core += [(16384, 32), (8192, 16), (1024, 16), (16384, 16)]
    found: list[tuple[Shape, tuple[float, ...]]] = []
    for index, (length, size) in enumerate(core):
        swept = (length, size) in ((8192, 128), (8192, 32))
        found.append((Shape(length, 64, size), (*usual, *sweep) if swept else usual))
        if index == 2:
            found.append((Shape(1024, 32, 32, heads=2, tokens=2**18), (0.05, 0.1, 0.25)))  # the paper's CIFAR-10
    few = (0.1, 0.25)
    found += [(Shape(8192, 128, 128), usual), (Shape(8192, 32, 32), few), (Shape(32768, 64, 64), few)]
    found += [(Shape(65536, 64, 128), (0.05, 0.02)), (Shape(4096, 64, 32), few), (Shape(2048, 64, 32), few)]
    found += [(Shape(8192, 128, 64), few), (Shape(8192, 128, 32), few), (Shape(8192, 64, 64, fp16), few)]
    found += [(Shape(2048, 64, 128), usual), (Shape(4096, 64, 64), usual), (Shape(8192, 32, 128), few)]
    found += [(Shape(8192, 64, 64, fp32), (0.1,)), (Shape(1024, 64, 32, fp32), (0.1,)), (Shape(32768, 128, 128), few)]
    found += [(Shape(8192, 128, 16), few), (Shape(8192, 32, 16), few), (Shape(65536, 64, 64), (0.02,))]
    return found


def cases(setting: Setting) -> list[Case]:
    found = []
    for shape, densities in plan(setting):
        for index, density in enumerate(densities):
            seconds = 1.0 if setting.smoke else 15.0 if index == 0 else 5.0
            case = Case(shape.name(density), partial(run, shape, density, setting), seconds, longest=180)
            found.append(case)
    return found


def even_densities(records: list[Record]) -> list[str]:
    """Where dense attention catches up, for each shape that was measured at several densities."""
    shapes: dict[tuple[Any, ...], list[Record]] = {}
    for r in records:
        key = tuple(r[name] for name in ("length", "head_dim", "block_size", "dtype", "heads"))
        shapes.setdefault(key, []).append(r)
    lines = []
    for (length, head_dim, size, dtype, _), group in shapes.items():
        if len(group) < 3 or max(r["density"] for r in group) < 0.5:
            continue
        said = []
        for mode in MODES:
            for name in DENSE:
                found = [(r["density"], r[mode]["times"]) for r in group if "ms" in r[mode]["times"].get(name, {})]
                found.sort(key=lambda pair: pair[0])
                if len(found) < 3:
                    continue
                densities = [density for density, _ in found]
                ours = [times["fused"]["ms"]["median"] for _, times in found]
                theirs = [times[name]["ms"]["median"] for _, times in found]
                even = arithmetic.break_even(densities, ours, theirs)
                ahead = "ahead" if ours[-1] <= theirs[-1] else "behind"
                value = f"{ahead} throughout" if even is None else f"{even:.2f}"
                said.append(f"{name} {'f' if mode == 'forward' else 'f+b'} {value}")
        if said:
            covered = f"{min(r['density'] for r in group):g} to {max(r['density'] for r in group):g}"
            lines.append(f"L {length} D {head_dim} b {size} {dtype}, densities {covered}: {', '.join(said)}")
    return lines


def table(records: list[Record]) -> str:
    names = ("composed", "flex", "flex 128", *DENSE)
    header = ["L", "D", "b", "dtype", "dens"]
    for short in ("f", "f+b"):
        header += [f"{short} ms", "TF/s", "floor", "xcomp", "xflex", "xf128", "xflash", "xcudnn", "xexpl"]
    rows = []
    for r in records:
        row = [r["length"], r["head_dim"], r["block_size"], r["dtype"], number(r["density"], 2)]
        for mode in MODES:
            fused = r[mode]["times"]["fused"]
            row += [number(fused["ms"]["median"]), number(fused["kept_tflops"]), f"{fused['of_floor']:.0%}"]
            row += [number(r[mode]["faster_than"].get(name), 2) for name in names]
        rows.append(row)
    title = "attention: device time, TFLOP/s on kept blocks, share of the floor, times faster than"
    even = even_densities(records)
    lines = ["even with dense attention at density:", *even] if even else []
    return "\n".join([*lines, text_table(title, header, rows)])


SECTION = Section("attention", 0.35, cases, table)
