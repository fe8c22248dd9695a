"""Floor 1: what all Triton kernels share: where they can run, at which precision, and the one door to a launch."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Read once, when the kernels are decorated: with TRITON_INTERPRET=1 they run on the CPU, slowly, in NumPy.
INTERPRETED = bool(triton.knobs.runtime.interpret)

BLOCK_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (8, 256)  # smallest and largest
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_CAPABILITY = (8, 0)

LOG2_E = 1.4426950408889634

# A kernel that is launched. Triton compiles one for numbers of 1, one for multiples of 16 and one for the rest, of each
# argument: batches of varying length would wait for a compiler again and again. Not for these; strides stay as they
# are, because wide loads depend on them (those of a bias go with the length).
jit_kernel = triton.jit(
    do_not_specialize=(
        "batch",
        "length",
        "out_length",
        "query_length",
        "key_length",
        "rows",
        "columns",
        "groups",
        "capacity",
        "stride_head",
    ),
    do_not_specialize_on_alignment=("stride_row", "stride_column"),
)


# Of numbers in tuples it would compile as many in any case. These go there times ALIKE, and kernels divide them.
ALIKE = tl.constexpr(16)

_observer: Callable[..., None] | None = None
_assumed_capability = (9, 0)


# What the interpreter was seen to compute in a second, and when it is worth a word.
_INTERPRETED_SCORES_PER_SECOND = 300_000
_PATIENCE_SECONDS = 30


@torch.compiler.assume_constant_result
def _cannot_run(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on a device, or in a precision."""
    if device.type == "cpu" and not INTERPRETED and _observer is None:
        return "its kernels need a GPU, but the tensors are on cpu (to try them there, slowly, set TRITON_INTERPRET=1)"
    if device.type not in ("cuda", "cpu"):
        return f"its kernels run on CUDA devices, but the tensors are on {device}"
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "its kernels have been made and checked for NVIDIA GPUs only"
        found = torch.cuda.get_device_capability(device)
        if found < OLDEST_CAPABILITY:
            name = torch.cuda.get_device_name(device)
            return f"its kernels need compute capability 8.0 or newer, and {name} has {found[0]}.{found[1]}"
    if dtype not in DTYPES:
        return f"its kernels compute in float32, bfloat16 and float16, got {dtype}"
    return None


def unsupported(device: torch.device, dtype: torch.dtype, block_size: int, head_dim: int | None = None) -> str | None:
    """Why the kernels cannot take this case, as half a sentence; None where they can."""
    reason = _cannot_run(device, dtype)
    if reason is not None:
        return reason
    if block_size not in BLOCK_SIZES:
        return f"its kernels take blocks of 16, 32, 64 and 128, got {block_size}"
    if head_dim is not None and not HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[1]:
        return f"its kernels take head dimensions from 8 to 256, got {head_dim}"
    return None


def warn_if_slow(scores: int) -> None:
    """Say how long the interpreter will take for so many scores, if it runs and that is long."""
    seconds = scores / _INTERPRETED_SCORES_PER_SECOND
    if INTERPRETED and seconds > _PATIENCE_SECONDS:
        warnings.warn(
            f"Triton's interpreter (TRITON_INTERPRET=1) computes {scores:,} scores one tile at a time: about "
            f"{seconds / 60:.0f} minutes for this call, several times that for its gradients; use a smaller case, or "
            f"backend='torch'",
            stacklevel=3,
        )


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability that kernels on this device are made for."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else _assumed_capability


def chunk(length: int) -> int:
    """How many of so many numbers a program takes at a time: few or many, for which a kernel each is compiled."""
    return 64 if length <= 64 else 1024


def padded(head_dim: int) -> int:
    """The power of two that a tile of this many features takes; matrix units want at least 16."""
    return max(16, triton.next_power_of_2(head_dim))


@torch.compiler.assume_constant_result
def matrix_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of a kernel's ``tl.dot``.

    PyTorch's own switch decides, as for its matrix products: float32 is exact unless
    ``torch.set_float32_matmul_precision`` chose "high" or "medium", or ``fp32_precision`` "tf32".
    """
    if dtype != torch.float32:
        return "ieee"
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was chosen by PyTorch's newer switch, beside which the older one does not answer
        chosen = torch.backends.cuda.matmul.fp32_precision
        exact = (getattr(torch.backends, "fp32_precision", "none") if chosen == "none" else chosen) != "tf32"
    return "ieee" if exact else "tf32"


def launch(kernel: Any, programs: int, *args: object, **options: object) -> None:
    """Run ``programs`` programs of a kernel on the device of its first tensor (or first tuple's)."""
    if _observer is not None:
        _observer(kernel, programs, *args, **options)
        return
    if programs >= 2**31:
        raise ValueError(
            f"this case needs {programs:,} programs of one kernel, a GPU starts at most {2**31 - 1:,}; use a smaller "
            f"batch, or larger blocks"
        )
    first = args[0][0] if isinstance(args[0], tuple) else args[0]
    assert isinstance(first, Tensor)
    with torch.cuda.device_of(first) if first.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](*args, **options)


@contextlib.contextmanager
def observed(observer: Callable[..., None], capability: tuple[int, int]) -> Iterator[None]:
    """Let the observer take each launch instead of a device; results are then never written.

    For compiling ahead of time, on tensors of the CPU, what would be launched on a GPU of this capability.
    """
    global _observer, _assumed_capability
    before = _observer, _assumed_capability
    _observer, _assumed_capability = observer, capability
    try:
        yield
    finally:
        _observer, _assumed_capability = before
