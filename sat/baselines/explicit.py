"""Floor 2: dense attention with its scores in full, as in the paper's original Transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.layout import check_int
from sat.ops import checks


class ExplicitAttention(nn.Module):
    """``softmax(query key^T / sqrt(D)) value`` with all scores in memory: what fused attention is measured against.

    Args:
        num_heads: ``H``.
        seq_len: the longest sequence, in tokens; no limit here, it stands for what all methods have.
        dropout: probability with which a weight is dropped in training.

    Source: Vaswani et al., "Attention Is All You Need" (2017), equation 1.
    """

    def __init__(self, num_heads: int, seq_len: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        check_int("num_heads", num_heads, 1)
        checks.check_probability("dropout", dropout)
        self.num_heads, self.dropout = num_heads, dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        query_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """``[B, H, L, D]`` from query ``[B, H, L, D]``, key and value ``[B, H, S, D]``.

        Masks are bool ``[B, S]`` and ``[B, L]``, True = a real token. A query that is padded or has no key gives 0.

        Raises:
            TypeError: a tensor of another kind.
            ValueError: tensors that do not go together, or another number of heads.
        """
        checks.check_query_key(query, key, value)
        if query.shape[1] != self.num_heads:
            raise ValueError(f"this attention was made for {self.num_heads} heads, got {query.shape[1]}")
        for name, mask, x in (("key", key_padding_mask, key), ("query", query_padding_mask, query)):
            checks.check_padding(f"{name}_padding_mask", mask, x.shape[0], x.shape[2], x.device)
        # Scaled first: the products of half precisions may be too large for them.
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        if key_padding_mask is not None:
            scores = scores.masked_fill(~key_padding_mask[:, None, None], torch.finfo(scores.dtype).min)
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        context = weights.to(value.dtype) @ value
        if key_padding_mask is not None:
            context = context.masked_fill(~key_padding_mask.any(-1)[:, None, None, None], 0)
        return context if query_padding_mask is None else context.masked_fill(~query_padding_mask[:, None, :, None], 0)
