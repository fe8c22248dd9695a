"""Floor 1: refuse bad arguments before any work, with a sentence that says what was given and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sat.layout import BlockLayout, check_is_layout

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def shape_text(x: Tensor) -> str:
    """A tensor's shape for a message, ``[2, 4, 8]``."""
    return str(list(x.shape))


def _check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")


def check_dense(**tensors: Tensor) -> None:
    """Tensors ``[B, H, length, D]`` of one floating dtype on one device, none of them empty."""
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        _check_tensor(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name} must be [batch, heads, length, head dimension], got the shape {shape_text(x)}")
        if 0 in x.shape:
            raise ValueError(f"{name} is empty: its shape is {shape_text(x)}, every dimension must be at least 1")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
        if x.dtype != first.dtype:
            raise TypeError(f"{first_name} is {first.dtype} but {name} is {x.dtype}; convert them to one dtype")
        if x.device != first.device:
            raise ValueError(f"{first_name} is on {first.device} but {name} is on {x.device}; move them to one device")


def check_no_tangents(backend: str, *tensors: Tensor | None) -> None:
    """Refuse what forward-mode derivatives would make of an operator without one: silently 0."""
    if backend == "reference" or torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "there are no forward-mode derivatives (torch.func.jvp, jacfwd, linearize) of block-sparse kernels; use "
            "reverse mode (torch.autograd.grad, backward), or backend='reference'"
        )


def no_second_derivative(ctx: object, *grads: Tensor) -> None:
    """The derivative of a backward pass: there is none.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        "there are no second derivatives (double backward, create_graph=True, torch.func.hessian) of block-sparse "
        "attention and its softmax; use backend='reference', which has them"
    )


def check_query_key(query: Tensor, key: Tensor, value: Tensor | None = None) -> None:
    """Query ``[B, H, L, D]`` and key (and value) ``[B, H, S, D]`` that go together."""
    tensors = {"query": query, "key": key} | ({} if value is None else {"value": value})
    check_dense(**tensors)
    if query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query and key must agree in batch, heads and head dimension, got {shape_text(query)} and "
            f"{shape_text(key)}"
        )
    if value is not None and value.shape != key.shape:
        raise ValueError(f"key and value must have one shape, got {shape_text(key)} and {shape_text(value)}")


def check_layout(layout: BlockLayout, x: Tensor, name: str) -> None:
    """A layout for the batch, heads and device of a tensor ``[B, H, ...]``."""
    check_is_layout("layout", layout)
    # Not "in (1, ...)": a compiler that leaves the number of heads open finds a symbol in no tuple.
    if layout.num_heads != 1 and layout.num_heads != x.shape[1]:
        raise ValueError(
            f"the layout has {layout.num_heads} heads but {name} has {x.shape[1]}; a layout is for as many heads or "
            f"for 1, which all heads share"
        )
    if layout.device != x.device:
        raise ValueError(f"the layout is on {layout.device} but {name} is on {x.device}; use layout.to({x.device})")


def check_lengths(layout: BlockLayout, query_length: int, key_length: int) -> None:
    """A layout that covers the lengths exactly."""
    layout._check_fits(query_length, key_length)


def check_padding(name: str, mask: Tensor | None, batch: int, length: int, device: torch.device) -> None:
    """A padding mask: bool ``[B, length]``, True = a real token."""
    if mask is None:
        return
    _check_tensor(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor with True for real tokens, got {mask.dtype}; use mask.bool()")
    check_padding_shape(name, mask, batch, length, device)


def check_padding_shape(name: str, mask: Tensor, batch: int, length: int, device: torch.device) -> None:
    """A mask ``[B, length]`` of any dtype, on the tensors' device."""
    if tuple(mask.shape) != (batch, length):
        raise ValueError(f"{name} must have the shape [{batch}, {length}], got {shape_text(mask)}")
    if mask.device != device:
        raise ValueError(f"{name} is on {mask.device}, the tensors are on {device}; move it there")


def check_bias(
    bias: Tensor | None, shape: tuple[int, int, int, int], device: torch.device, name: str = "attn_bias"
) -> Tensor | None:
    """A bias broadcastable to ``[B, H, L, S]``, with four dimensions as :func:`check_broadcast` returns it."""
    if bias is None:
        return None
    _check_tensor(name, bias)
    if bias.dtype not in DTYPES:
        hint = "; pass what may be attended to as key_padding_mask, is_causal or the layout" * (
            bias.dtype == torch.bool
        )
        raise TypeError(f"{name} must be a floating-point tensor that is added to the scores, got {bias.dtype}{hint}")
    return check_broadcast(name, bias, shape, device)


def check_mask_dtype(name: str, mask: Tensor, mode: str) -> None:
    """A mask whose numbers mean something in its mode (``"add"`` or ``"mul"``); bool does in either."""
    _check_tensor(name, mask)
    if mask.dtype == torch.bool or mask.dtype in DTYPES:
        return
    if mask.is_complex() or mask.is_floating_point():
        raise TypeError(f"{name} must be bool, integer, float32, bfloat16, float16 or float64, got {mask.dtype}")
    if mode == "add":
        # Token masks are integers: adding 1 to the scores of real tokens would mask nothing, and say nothing.
        raise TypeError(
            f"{name} is {mask.dtype}, but in the mode 'add' a mask is added to the scores; give a bool tensor "
            f"({name}.bool() if 0 means masked), or a floating-point one if it is to be added"
        )


def check_broadcast(name: str, x: Tensor, shape: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """A tensor broadcastable to ``[B, H, L, S]``; returned with four dimensions, expanded ones narrowed to 1.

    Not so where it requires a gradient: each position of an expanded tensor has one of its own.
    """
    if x.dim() > 4 or any(
        have != 1 and have != want for have, want in zip(reversed(x.shape), reversed(shape), strict=False)
    ):
        raise ValueError(f"{name} must be broadcastable to {list(shape)}, got {shape_text(x)}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, the tensors are on {device}; move it there")
    x = x[(None,) * (4 - x.dim())]
    differentiated = x.requires_grad and torch.is_grad_enabled()
    for dim in () if differentiated else range(4):
        if x.stride(dim) == 0 and x.shape[dim] > 1:  # from expand(): one copy is enough
            x = x.narrow(dim, 0, 1)
    return x


def check_logsumexp(logsumexp: Tensor, query: Tensor) -> None:
    """A log-sum-exp of each row: float32 ``[B, H, L]``."""
    _check_tensor("logsumexp", logsumexp)
    if logsumexp.dtype != torch.float32 or logsumexp.shape != query.shape[:3]:
        raise ValueError(
            f"logsumexp must be float32 of the shape {list(query.shape[:3])}, got {logsumexp.dtype} "
            f"{shape_text(logsumexp)}"
        )
    if logsumexp.device != query.device:
        raise ValueError(f"logsumexp is on {logsumexp.device}, the tensors are on {query.device}; move it there")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """One of a few words."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_scale(scale: float | None) -> None:
    """A number, or None."""
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        raise TypeError(
            f"scale must be a number, got {type(scale).__name__}; a factor that is learned goes into the query: "
            f"query * factor"
        )


def check_probability(name: str, value: float) -> None:
    """A number in [0, 1), also once it is rounded to float32, as kernels have it."""
    if not 0 <= value < 1 - 2**-25:
        rounded = ", which is 1 in float32" if 0 < value < 1 else ""
        raise ValueError(f"{name} must be at least 0 and below 1, got {value}{rounded}")


def check_values(name: str, values: Tensor, layout: BlockLayout, num_heads: int | None = None) -> int:
    """Block values ``[B, nnz, b, b]`` of a layout used by ``num_heads`` heads; inferred from their number if None."""
    _check_tensor(name, values)
    if num_heads is None:
        shared = layout.num_heads == 1 and layout.nnz > 0 and values.dim() == 4
        num_heads = values.shape[1] // layout.nnz if shared else layout.num_heads
    if num_heads < 1 or (layout.num_heads != 1 and layout.num_heads != num_heads):
        raise ValueError(
            f"num_heads must be at least 1, and {layout.num_heads} where the layout has as many, got {num_heads}"
        )
    if values.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {values.dtype}")
    expected = (layout.nnz * (num_heads // layout.num_heads), layout.block_size, layout.block_size)
    if values.dim() != 4 or tuple(values.shape[1:]) != expected:
        raise ValueError(
            f"{name} must hold the kept blocks of the layout, [batch, {', '.join(map(str, expected))}], got "
            f"{shape_text(values)}"
        )
    if values.shape[0] == 0:
        raise ValueError(f"{name} is empty: its shape is {shape_text(values)}, the batch must be at least 1")
    if layout.device != values.device:
        raise ValueError(
            f"the layout is on {layout.device} but {name} is on {values.device}; use layout.to({values.device})"
        )
    return num_heads
