"""What attention should be, from PyTorch's own operators in float64, sharing no code with SAT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sat.layout import BlockLayout


def element_mask(layout: BlockLayout, query_length: int, key_length: int) -> Tensor:
    size = layout.block_size
    mask = layout.mask.repeat_interleave(size, 1).repeat_interleave(size, 2)
    return mask[:, :query_length, :key_length]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    pruned: str = "drop",
) -> Tensor:
    """Block-sparse attention in the dtype of the inputs: logits of 0 stand in the places that ``"zero"`` counts."""
    length, keys = query.shape[2], key.shape[2]
    allowed = torch.ones(query.shape[0], 1, length, keys, dtype=torch.bool)
    if is_causal:
        allowed = allowed & torch.ones(length, keys, dtype=torch.bool).tril()
    if key_padding_mask is not None:
        allowed = allowed & key_padding_mask[:, None, None]
    kept = allowed & element_mask(layout, length, keys)
    scores = torch.einsum("bhld,bhsd->bhls", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_bias is not None:
        scores = scores + attn_bias
    elsewhere = torch.where(allowed, 0.0, -torch.inf) if pruned == "zero" else torch.tensor(-torch.inf)
    scores = torch.where(kept, scores, elsewhere.to(scores.dtype))
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    weights = F.softmax(scores.masked_fill(empty, 0), -1) * (kept & ~empty)
    if query_padding_mask is not None:
        weights = weights * query_padding_mask[:, None, :, None]
    return weights.to(value.dtype) @ value


def random_layout(
    heads: int, rows: int, columns: int, size: int, density: float = 0.3, empty_row: bool = True
) -> BlockLayout:
    """Random blocks, one heavy row, and (by choice) one empty row."""
    mask = torch.rand(heads, rows, columns) < density
    mask[:, 0] = True
    if empty_row and rows > 1:
        mask[:, rows - 1] = False
    return BlockLayout(mask, size)


def assert_as_exact_as_pytorch(ours: Tensor, exact: Tensor, pytorch: Tensor, what: str) -> None:
    """Our error is at most twice PyTorch's at the same precision, both against float64.

    A few units of the last place are granted where PyTorch happens to be exact.
    """
    assert not ours.isnan().any(), f"{what} has NaN"
    error = (ours.double() - exact).abs().max()
    granted = 2 * (pytorch.double() - exact).abs().max() + 4 * torch.finfo(ours.dtype).eps * exact.abs().max()
    assert error <= granted, f"{what}: error {error:.3g}, granted {granted:.3g}"
