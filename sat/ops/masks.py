"""Floor 1: all that a caller says about who attends to whom, as the two things that every backend knows.

These are a bool key padding mask and one bias. Shapes: B batch, H heads, L queries, S keys.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

from sat.ops import checks

MaskMode = Literal["add", "mul"]


def combine(
    x: Tensor,
    shape: tuple[int, int, int, int],
    *,
    attn_bias: Tensor | None = None,
    rpe: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask_mode: MaskMode = "add",
    attn_mask_mode: MaskMode = "add",
) -> tuple[Tensor | None, Tensor | None]:
    """Biases and masks, as :func:`sat.ops.sparse_softmax` takes them, in their two forms.

    Args:
        x: the scores or queries, for their dtype and device.
        shape: ``(B, H, L, S)``.
        attn_bias: broadcastable to ``[B, H, L, S]``.
        rpe: the same.
        key_padding_mask: ``[B, S]``.
        attn_mask: broadcastable to ``[B, H, L, S]``.
        key_padding_mask_mode: ``"add"`` or ``"mul"``.
        attn_mask_mode: ``"add"`` or ``"mul"``.

    Returns:
        The key padding mask, bool ``[B, S]``, and the bias ``[B|1, H|1, L|1, S|1]``, no larger than what was given
        needs; None where there is none. A single bias keeps its dtype, several are added in float32 or better.

    Raises:
        ValueError, TypeError: a shape, dtype, device or mode that does not fit.
    """
    checks.check_choice("key_padding_mask_mode", key_padding_mask_mode, ("add", "mul"))
    checks.check_choice("attn_mask_mode", attn_mask_mode, ("add", "mul"))
    biases = [checks.check_bias(bias, shape, x.device, name) for name, bias in (("attn_bias", attn_bias), ("rpe", rpe))]
    if key_padding_mask is not None:
        checks.check_mask_dtype("key_padding_mask", key_padding_mask, key_padding_mask_mode)
        checks.check_padding_shape("key_padding_mask", key_padding_mask, shape[0], shape[3], x.device)
    if attn_mask is not None:
        checks.check_mask_dtype("attn_mask", attn_mask, attn_mask_mode)
        attn_mask = checks.check_broadcast("attn_mask", attn_mask, shape, x.device)

    if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
        if key_padding_mask_mode == "add":
            biases.append(key_padding_mask[:, None, None])
            key_padding_mask = None
        else:
            key_padding_mask = key_padding_mask != 0
    allowed = None
    if attn_mask is not None and attn_mask.dtype != torch.bool and attn_mask_mode == "add":
        biases.append(attn_mask)
    elif attn_mask is not None:
        allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask != 0

    given = [bias for bias in biases if bias is not None]
    if len(given) > 1:
        # Beside a mask of -10000, float16 would keep no more of another bias than multiples of 8.
        compute = torch.promote_types(x.dtype, torch.float32)
        given = [bias.to(compute) for bias in given]
    total = functools.reduce(torch.add, given) if given else None
    if allowed is not None:
        total = torch.where(allowed, x.new_zeros(1, 1, 1, 1) if total is None else total, -torch.inf)
    return key_padding_mask, total
