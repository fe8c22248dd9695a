"""Whether the kernels compute what they should: realistic sizes against float64, the tests, and a memory checker."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments.gpu_suite import layouts
from experiments.gpu_suite.case import Case, Record, Section, Setting, text_table
from experiments.gpu_suite.subprocesses import run_limited
from sat.ops import attention_statistics, block_sparse_attention

GRADIENTS = ("query", "key", "value", "bias")
SHORT = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class Check:
    """One case of attention, forward and backward."""

    length: int
    head_dim: int
    block_size: int
    dtype: torch.dtype = torch.bfloat16
    heads: int = 2
    batch: int = 2
    shared: bool = False  # one layout for all heads
    is_causal: bool = False
    padding: bool = False
    bias: bool = False
    heavy: bool = False
    empty: bool = False
    pruned: Any = "drop"
    fused: bool = True

    @property
    def name(self) -> str:
        flags = ("shared", "is_causal", "padding", "bias", "heavy", "empty")
        words = [flag.removeprefix("is_") for flag in flags if getattr(self, flag)]
        words += [] if self.pruned == "drop" else [f"pruned={self.pruned}"]
        words += [] if self.fused else ["composed"]
        place = f"L {self.length} D {self.head_dim} b {self.block_size} {SHORT[self.dtype]}"
        return " ".join([place, *words])


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """``torch.empty`` gives NaN: what a kernel forgets to write shows."""
    fill: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), fill.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        fill.fill_uninitialized_memory = before[1]


def dense(
    tensors: list[Tensor], grad: Tensor, kept: Tensor, allowed: Tensor, rows: Tensor, pruned: str, dtype: torch.dtype
) -> list[Tensor]:
    """Masked dense attention in a dtype, and its gradients; head by head, so that one score matrix is held at a time.

    Args:
        tensors: query, key, value ``[B, H, L, D]``, and perhaps a bias ``[H, L, L]`` that all samples share.
        grad: upstream gradient of the output.
        kept: bool ``[H, L, L]``, what the layout leaves.
        allowed: bool ``[B, L, L]``, what padding and causality leave.
        rows: bool ``[B, L]``, False = a padded query.
        pruned: ``"drop"`` or ``"zero"``.
        dtype: to compute in.
    """
    query, key, value, *biases = tensors
    out, *grads = (torch.zeros_like(x, dtype=dtype) for x in (query, *tensors))
    for sample in range(query.shape[0]):
        for head in range(query.shape[1]):
            index = (sample, head)
            inputs = [x[index].detach().to(dtype).requires_grad_() for x in (query, key, value)]
            inputs += [bias[head].detach().to(dtype).requires_grad_() for bias in biases]
            q, k, v, *bias_of_head = inputs
            scores = (q @ k.T) * q.shape[-1] ** -0.5
            for bias in bias_of_head:
                scores = scores + bias
            here = kept[head if len(kept) > 1 else 0] & allowed[sample]
            other = torch.where(allowed[sample], 0.0, -torch.inf) if pruned == "zero" else -torch.inf
            scores = torch.where(here, scores, torch.as_tensor(other, device=scores.device).to(dtype))
            nothing = (scores == -torch.inf).all(-1, keepdim=True)
            weights = torch.softmax(scores.masked_fill(nothing, 0), -1)
            weights = weights * (here & ~nothing & rows[sample, :, None])
            result = weights @ v
            out[index] = result.detach()
            for place, gradient in zip(grads, torch.autograd.grad(result, inputs, grad[index].to(dtype)), strict=True):
                if place.dim() == 3:
                    place[head] += gradient
                else:
                    place[index] = gradient
    return [out, *grads]


def compare(names: list[str], ours: list[Tensor], exact: list[Tensor], pytorch: list[Tensor]) -> Record:
    """Relative errors as a case's figures, "failed" where ours is more than twice PyTorch's at the same precision.

    A few units of the last place are granted where PyTorch happens to be exact.
    """
    figures: Record = {}
    wrong = []
    for name, mine, truth, theirs in zip(names, ours, exact, pytorch, strict=True):
        eps = torch.finfo(mine.dtype).eps
        difference, their_difference = mine.double() - truth, theirs.double() - truth
        norm = truth.norm().clamp_min(1e-30)
        error = difference.abs().max().item()
        granted = 2 * their_difference.abs().max().item() + 4 * eps * truth.abs().max().item()
        found = {
            "relative_error": (difference.norm() / norm).item(),
            "relative_error_pytorch": (their_difference.norm() / norm).item(),
            "largest_error": error,
            "granted": granted,
        }
        figures[name] = {kind: float(f"{value:.3g}") for kind, value in found.items()}
        if not error <= granted:  # NaN is wrong too
            wrong.append(f"{name}: error {error:.3g}, granted {granted:.3g}")
    return {"errors": figures, **({"status": "failed", "error": "; ".join(wrong)} if wrong else {})}


def run_check(check: Check, setting: Setting, seconds: float) -> Record:
    """Output and all gradients of one case against float64, and whether a second run gives the same bits."""
    device, heads, length = setting.device, check.heads, check.length
    generator = torch.Generator(device).manual_seed(1)
    shape = (check.batch, heads, length, check.head_dim)
    # Heads inside, as a projection leaves them.
    tensors = [
        torch.randn(check.batch, length, heads, check.head_dim, generator=generator, device=device)
        .to(check.dtype)
        .transpose(1, 2)
        .requires_grad_()
        for _ in range(3)
    ]
    if check.bias:
        bias = torch.randn(heads, length, length, generator=generator, device=device).to(check.dtype)
        tensors.append(bias.requires_grad_())
    grad = torch.randn(shape, generator=generator, device=device).to(check.dtype)
    layout = layouts.uneven(
        -(-length // check.block_size),
        1 if check.shared else heads,
        check.block_size,
        device,
        empty=check.empty,
        heavy=check.heavy,
    )
    # The first sample is whole, the others end in whole and partial blocks of padding.
    ends = torch.tensor([length, *([length * 5 // 8 + 3] * (check.batch - 1))], device=device)
    real = torch.arange(length, device=device) < ends[:, None] if check.padding else None

    def ours() -> list[Tensor]:
        out = block_sparse_attention(
            tensors[0],
            tensors[1],
            tensors[2],
            layout,
            key_padding_mask=real,
            query_padding_mask=real,
            attn_bias=tensors[3][None] if check.bias else None,
            is_causal=check.is_causal,
            pruned=check.pruned,
            backend=setting.backend,
            fused=check.fused,
        )
        return [out.detach(), *torch.autograd.grad(out, tensors, grad)]

    with poisoned():
        results = ours()
        again = ours()
    rows = torch.ones(check.batch, length, dtype=torch.bool, device=device) if real is None else real
    allowed = rows[:, None, :].expand(-1, length, -1)
    if check.is_causal:
        allowed = allowed.tril()
    kept = layouts.element_mask(layout, length)
    exact = dense(tensors, grad, kept, allowed, rows, check.pruned, torch.float64)
    pytorch = dense(tensors, grad, kept, allowed, rows, check.pruned, check.dtype)
    names = ["output", *GRADIENTS[: len(tensors)]]
    figures = compare(names, results, exact, pytorch)
    worst = max(errors["relative_error"] for errors in figures["errors"].values())
    same = all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
    return {**figures, "repeatable": same, "line": f"relative error {worst:.2g}, repeatable: {same}"}


def run_dropout(dtype: torch.dtype, setting: Setting, seconds: float) -> Record:
    """Dropout repeats with the seed, drops the stated share, and is the same forward and backward.

    With the identity as value, the output is the weights themselves: which of them fell is then known, and output and
    gradients with that choice can be compared with float64.
    """
    device, length, heads, size, probability = setting.device, 128, 2, 32, 0.25
    layout = layouts.uneven(length // size, heads, size, device, empty=False, heavy=True)
    generator = torch.Generator(device).manual_seed(2)
    shape = (2, heads, length, length)
    query, key, value, grad = (
        torch.randn(shape, generator=generator, device=device).mul(0.5).to(dtype) for _ in range(4)
    )
    tensors = [x.requires_grad_() for x in (query, key, value)]
    identity = torch.eye(length, device=device, dtype=dtype).expand(shape)

    def ours(values: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return block_sparse_attention(query, key, values, layout, dropout_p=probability, backend=setting.backend)

    with poisoned():
        weights = ours(identity, 3).detach()
        if not torch.equal(weights, ours(identity, 3)):
            raise AssertionError("dropout with the same seed differs between two calls")
        if torch.equal(weights, ours(identity, 4)):
            raise AssertionError("dropout does not depend on the seed")
        out = ours(value, 3)
        results = [out.detach(), *torch.autograd.grad(out, tensors, grad)]
    kept = layouts.element_mask(layout, length)[None].expand(shape)
    left = kept & (weights != 0)
    dropped = 1 - (left.sum() / kept.sum()).item()
    deviation = (probability * (1 - probability) / kept.sum().item()) ** 0.5
    if abs(dropped - probability) > 6 * deviation:
        raise AssertionError(f"dropped {dropped:.4f} of the weights instead of {probability}")

    def dense_dropout(compute: torch.dtype) -> list[Tensor]:
        q, k, v = (x.detach().to(compute).requires_grad_() for x in tensors)
        scores = (q @ k.transpose(2, 3) * length**-0.5).masked_fill(~kept, -torch.inf)
        result = (torch.softmax(scores, -1) * left / (1 - probability)) @ v
        return [result.detach(), *torch.autograd.grad(result, (q, k, v), grad.to(compute))]

    figures = compare(["output", *GRADIENTS[:3]], results, dense_dropout(torch.float64), dense_dropout(dtype))
    return {**figures, "dropped": dropped, "repeatable": True, "line": f"dropped {dropped:.3f}"}


def run_statistics(length: int, setting: Setting, seconds: float) -> Record:
    """Pooled weights, skewness and score matrix against the specification in float64."""
    query, key = (torch.randn(2, 2, length, 32, device=setting.device) for _ in range(2))
    mine = attention_statistics(query, key, 32, score_matrix=True, backend=setting.backend)
    exact = attention_statistics(query.double(), key.double(), 32, score_matrix=True, backend="reference")
    figures: Record = {}
    for name in ("pooled", "skewness", "score_matrix"):
        truth = getattr(exact, name).double()
        error = ((getattr(mine, name).double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()
        figures[name] = {"relative_error": float(f"{error:.3g}")}
    limits = {"pooled": 1e-4, "skewness": 1e-3, "score_matrix": 1e-4}  # those of tests/ops/test_statistics.py
    if not all(figures[name]["relative_error"] < limit for name, limit in limits.items()):
        raise AssertionError(f"relative errors {figures}, granted {limits}")
    worst = max(figures, key=lambda name: figures[name]["relative_error"])
    return {"errors": figures, "line": f"{worst} {figures[worst]['relative_error']:.1g}"}


def count_outcomes(output: str) -> dict[str, int]:
    """How often each outcome stands in pytest's verbose output, also of several workers."""
    # Not the summary at the end, whose lines begin with the outcome.
    words = re.findall(r"^(?:\[gw\d+\] \[ *\d+%\]|\S+::.*) (PASSED|FAILED|ERROR|SKIPPED)\b", output, re.MULTILINE)
    return {word: words.count(word) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}


def run_tests(setting: Setting, seconds: float) -> Record:
    """The tests of the operators, on this device; in several processes where pytest-xdist is there."""
    command = [sys.executable, "-m", "pytest", "-vv", "-rfE", "--tb=short", "-p", "no:cacheprovider", "tests/ops"]
    if setting.smoke:
        command[-1:] = ["tests/ops/test_statistics.py", "-k", "nan_is_not_hidden"]
    elif importlib.util.find_spec("xdist") is not None:
        command[-1:-1] = ["-p", "xdist", "-n", "8"]
    # Only the plugins named above: whichever are installed, warnings are errors in these tests.
    code, output = run_limited(command, max(1.0, seconds - 5), {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    log = setting.out / ("smoke_tests.log" if setting.smoke else "gpu_tests.log")
    log.write_text(output)
    counts = count_outcomes(output)
    line = f"{counts['PASSED']} passed, {counts['FAILED'] + counts['ERROR']} failed, {counts['SKIPPED']} skipped"
    if counts["FAILED"] or counts["ERROR"] or code not in (0, None):
        failures = [text for text in output.splitlines() if re.match(r"(FAILED|ERROR) ", text)]
        said = " | ".join(failures[:5]) or output[-250:]
        raise AssertionError(f"{line} (pytest's code {code}, {log.name}): {said}")
    if code is None:
        return {"status": "not run", "error": f"not to the end: {line} when the time was up", "counts": counts}
    return {"counts": counts, "line": line}


SANITIZED = """
import torch
from sat.layout import BlockLayout
from sat.ops import block_sparse_attention
torch.manual_seed(0)
inputs = [torch.randn(2, 2, 150, 40, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
real = torch.arange(150, device="cuda") < torch.tensor([[150], [77]], device="cuda")
layout = BlockLayout(torch.rand(2, 5, 5, device="cuda") < 0.5, 32)
for fused in (True, False):
    out = block_sparse_attention(*inputs, layout, key_padding_mask=real, query_padding_mask=real, is_causal=True,
                                 backend="triton", fused=fused)
    torch.autograd.grad(out.sum(), inputs)
torch.cuda.synchronize()
print("reached the end")
"""


def run_sanitizer(setting: Setting, seconds: float) -> Record:
    """compute-sanitizer's memcheck on a small case whose edges are partial everywhere."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or setting.smoke:
        return {"status": "not run", "error": "there is no compute-sanitizer here"}
    command = [tool, "--tool", "memcheck", "--target-processes", "application-only", "--error-exitcode", "9"]
    command += [sys.executable, "-c", SANITIZED]
    # Each tensor an allocation of its own: what lies behind one is then nobody's.
    code, output = run_limited(command, max(1.0, seconds - 5), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    summary = next((line for line in reversed(output.splitlines()) if "ERROR SUMMARY" in line), "no summary")
    if code is None:
        return {"status": "not run", "error": f"compute-sanitizer did not end within {seconds:.0f} s"}
    if "Device not supported" in output:
        return {"status": "not run", "error": "compute-sanitizer does not support this device"}
    if code or "reached the end" not in output:
        raise AssertionError(f"compute-sanitizer ended by code {code}: {summary}; {output[:300]}")
    return {"line": summary.strip("= ")}


def checks(setting: Setting) -> list[Check]:
    """In the order of importance: each dtype, block size, head dimension and option early, then all together."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    if setting.smoke:
        return [Check(100, 16, 32, fp32, bias=True, padding=True, is_causal=True), Check(64, 8, 16, bf16, empty=True)]
    found = [
        Check(1024, 32, 32, bf16, shared=True),
        Check(4096, 64, 64, bf16, is_causal=True),
        Check(1024, 64, 16, fp16, padding=True, empty=True),
        Check(2048, 128, 128, bf16, heavy=True),
        Check(1024, 32, 32, fp32, empty=True, pruned="zero"),
        Check(1000, 80, 32, bf16, bias=True, padding=True),
        Check(1024, 32, 32, bf16, padding=True, fused=False),
        Check(4096, 64, 32, bf16, heavy=True, empty=True),
        Check(2048, 64, 64, fp32, padding=True, is_causal=True),
        Check(1024, 64, 128, fp16, bias=True, is_causal=True, pruned="zero"),
    ]
    for dtype in (bf16, fp16, fp32):
        for size in (32, 64, 16, 128):
            for head_dim in (64, 32, 128, 80):
                length = 1500 if head_dim == 80 else 2048
                found.append(Check(length, head_dim, size, dtype, is_causal=True, padding=True, heavy=True, empty=True))
    for size in (16, 32, 64, 128):
        found.append(Check(1100, 64, size, bf16, bias=True, padding=True, pruned="zero", empty=True))
        found.append(Check(1100, 64, size, fp16, is_causal=True, padding=True, fused=False, empty=True))
    return list({check.name: check for check in found}.values())


def cases(setting: Setting) -> list[Case]:
    found = [Case(check.name, partial(run_check, check, setting), seconds=8) for check in checks(setting)]
    others = [
        Case("dropout bfloat16", partial(run_dropout, torch.bfloat16, setting), seconds=8),
        Case("statistics L 1024", partial(run_statistics, 128 if setting.smoke else 1024, setting), seconds=8),
        Case("compute-sanitizer", partial(run_sanitizer, setting), seconds=2 if setting.smoke else 40, longest=150),
        Case("dropout float32", partial(run_dropout, torch.float32, setting), seconds=8),
        Case("statistics L 1000", partial(run_statistics, 100 if setting.smoke else 1000, setting), seconds=8),
    ]
    # Last, because they may take all that is left.
    tests = Case("tests/ops", partial(run_tests, setting), seconds=2 if setting.smoke else 45, longest=420)
    return [*found[:8], *others, *found[8:], tests]


def table(records: list[Record]) -> str:
    rows = []
    for r in records:
        errors = {name: e["relative_error"] for name, e in r.get("errors", {}).items()}
        if "output" in errors:
            worst = max((name for name in errors if name != "output"), key=errors.__getitem__)
            cells = [f"{errors['output']:.1e}", f"{errors[worst]:.1e}", worst, r["repeatable"]]
        else:
            cells = ["", "", r["line"], ""]
        rows.append([r["case"], *cells])
    header = ["correct: relative error", "output", "worst gradient", "of", "repeatable"]
    return text_table("", header, rows).lstrip("\n")


SECTION = Section("correct", 0.3, cases, table)
