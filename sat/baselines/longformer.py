"""Floor 2: Longformer's attention: a sliding window, dilated by choice, and global tokens (Beltagy et al. 2020).

Queries are computed in chunks, all at once: a chunk's queries against the keys of its window, with the band cut out by
a mask, in PyTorch's fused attention. Time and memory grow with ``L * window``.

Shapes: B batch, H heads, L tokens, D head dimension, G global tokens; n chunks of c queries, each with K keys of its
window; P = H where heads differ in dilation, otherwise 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.layout import check_int
from sat.ops import checks
from sat.ops.autocast import as_autocast_does

# Shorter chunks spend more time on copying windows than on attending to them.
SMALLEST_CHUNK = 32


class LongformerAttention(nn.Module):
    """Queries, keys and values in, context out; exact to the token, without projections and without parameters.

    Query i sees the keys ``i + dilation * t`` for ``|t| <= window / 2``, and the global tokens, each once. The first
    ``num_global_tokens`` tokens are global; their own rows see everything, through projections of their own.

    Source: the window is counted as in Hugging Face's ``LongformerSelfAttention`` (both sides together), the dilation
    is that of Allen AI's original.

    Args:
        num_heads: ``H``.
        seq_len: the longest sequence, in tokens.
        window: tokens that a query sees on both sides together, besides itself; even.
        dilation: step between the keys of a window, in tokens; one for all heads or one for each.
        num_global_tokens: ``G``, may be 0.
        dropout: probability with which an attention weight is dropped in training.

    Raises:
        TypeError: a size is no integer.
        ValueError: an argument is out of range.
    """

    dilations: Tensor

    def __init__(
        self,
        num_heads: int,
        seq_len: int,
        *,
        window: int = 64,
        dilation: int | Sequence[int] = 1,
        num_global_tokens: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value, least in (("num_heads", num_heads, 1), ("seq_len", seq_len, 1), ("window", window, 2)):
            check_int(name, value, least)
        if window % 2:
            raise ValueError(f"window must be even, half of it on each side, got {window}")
        dilations = list(dilation) if isinstance(dilation, Sequence) else [dilation] * num_heads
        if len(dilations) != num_heads or any(not isinstance(step, int) or step < 1 for step in dilations):
            raise ValueError(
                f"dilation must be a whole number of at least 1, or {num_heads} of them, one for each head; "
                f"got {dilation}"
            )
        check_int("num_global_tokens", num_global_tokens, 0)
        checks.check_probability("dropout", dropout)
        self.num_heads, self.seq_len, self.window, self.dilation = num_heads, seq_len, window, dilation
        self.num_global_tokens, self.dropout = num_global_tokens, dropout
        # Heads that agree share their masks.
        dilations = dilations[:1] if len(set(dilations)) == 1 else dilations
        self._is_dilated = max(dilations) > 1
        self.register_buffer("dilations", torch.tensor(dilations), persistent=False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        global_query: Tensor | None = None,
        global_key: Tensor | None = None,
        global_value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        query_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: ``[B, H, L, D]``.
            key: ``[B, H, L, D]``.
            value: ``[B, H, L, D]``. Under autocast these and the global ones are cast to its dtype.
            global_query: ``[B, H, at least G, D]``, of which the first G rows are read; ``min(G, L)`` rows are enough.
            global_key: ``[B, H, L, D]``, what the global tokens' rows see.
            global_value: ``[B, H, L, D]``.
            key_padding_mask: bool ``[B, L]``, True = a real token. Padded keys are never seen, global ones included.
            query_padding_mask: bool ``[B, L]``, True = a real token; padded queries give 0.

        Returns:
            ``[B, H, L, D]``. A query without a single key gives 0, and gradients 0.

        Raises:
            ValueError, TypeError: shapes, dtypes or devices that do not go together, more heads or tokens than this
                module was made for, or global tokens without the three global tensors.
        """
        query, key, value = as_autocast_does(query, key, value)
        checks.check_query_key(query, key, value)
        batch, heads, length, _ = query.shape
        if key.shape != query.shape or heads != self.num_heads or length > self.seq_len:
            raise ValueError(
                f"this attention was made for {self.num_heads} heads and up to {self.seq_len} tokens, as many keys as "
                f"queries; got {heads} heads, {length} queries and {key.shape[2]} keys"
            )
        checks.check_padding("key_padding_mask", key_padding_mask, batch, length, query.device)
        checks.check_padding("query_padding_mask", query_padding_mask, batch, length, query.device)
        count = min(self.num_global_tokens, length)
        if self.num_global_tokens == 0:
            if any(x is not None for x in (global_query, global_key, global_value)):
                raise ValueError("this attention has num_global_tokens=0; it takes no global query, key or value")
        elif global_query is None or global_key is None or global_value is None:
            raise ValueError(
                f"this attention has {self.num_global_tokens} global tokens; pass global_query, global_key and "
                f"global_value, made by projections of their own"
            )
        else:
            global_query, global_key, global_value = as_autocast_does(global_query, global_key, global_value)
            checks.check_query_key(global_query, global_key, global_value)
            if global_query.shape[2] < count or global_key.shape != key.shape:
                raise ValueError(
                    f"global_query must have at least {count} rows and global_key the shape {list(key.shape)}, got "
                    f"{list(global_query.shape)} and {list(global_key.shape)}"
                )
        context = self._local(query, key, value, count, key_padding_mask)
        if global_query is not None and global_key is not None and global_value is not None:
            rows = self._global(global_query[:, :, :count], global_key, global_value, key_padding_mask)
            # Tokens before heads in memory: then the output projection needs no copy.
            context = torch.cat([rows.transpose(1, 2), context[:, count:]], 1)
        context = context.transpose(1, 2)
        return context if query_padding_mask is None else context.masked_fill(~query_padding_mask[:, None, :, None], 0)

    def _global(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """The global tokens' own rows, ``[B, H, G, D]``: dense attention to all real tokens."""
        dropout = self.dropout if self.training else 0.0
        if key_padding_mask is None:
            return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        is_empty = ~key_padding_mask.any(1)[:, None, None, None]
        mask = key_padding_mask[:, None, None, :] | is_empty
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return context.masked_fill(is_empty, 0)

    def _local(self, query: Tensor, key: Tensor, value: Tensor, count: int, key_padding_mask: Tensor | None) -> Tensor:
        """All rows over their window and the ``count`` global keys, ``[B, L, H, D]``."""
        batch, _, length, _ = query.shape
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        global_keys, global_values = (x[:, None, :count] for x in (key, value))  # [B, 1, G, H, D]
        order = self._order(length, query.device) if self._is_dilated else None
        if order is not None:
            query, key, value = (_permuted(x, order) for x in (query, key, value))
        chunk = max(self.window, SMALLEST_CHUNK)
        # Up to two chunks, windows would be no narrower than the sequence: one chunk of it all.
        one_sided, chunk = (0, length) if length <= 2 * chunk else (self.window // 2, chunk)
        chunks = -(-length // chunk)
        mask = self._mask(query, chunk, one_sided, count, key_padding_mask, order)
        is_empty = ~mask.any(-1, keepdim=True)  # [B|1, n, P, c, 1]
        # PyTorch's kernels disagree on rows without a key (0, NaN or the mean of all values): such rows see everything
        # here, and what they see is not used.
        mask = (mask | is_empty).expand(batch, -1, -1, -1, -1).flatten(0, 1)
        q = F.pad(query, (0, 0, 0, 0, 0, chunks * chunk - length)).unflatten(1, (chunks, chunk))
        k, v = (
            torch.cat([same.expand(-1, chunks, -1, -1, -1), _windows(x, chunk, one_sided)], 2)
            for same, x in ((global_keys, key), (global_values, value))
        )
        # [B * n, H, c | G + K, D]
        q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        context = context.unflatten(0, (batch, chunks))
        if key_padding_mask is not None:
            context = context.masked_fill(is_empty, 0)
        context = context.transpose(2, 3).flatten(1, 2)[:, :length]
        return context if order is None else _permuted(context, order.argsort(0))

    def _order(self, length: int, device: torch.device) -> Tensor:
        """``[L, P]``: positions sorted by residue class, so that a dilated window is a run of neighbours."""
        positions = torch.arange(length, device=device)[:, None]
        return (positions % self.dilations.to(device) * length + positions).argsort(0)

    def _mask(
        self,
        query: Tensor,
        chunk: int,
        one_sided: int,
        count: int,
        key_padding_mask: Tensor | None,
        order: Tensor | None,
    ) -> Tensor:
        """Bool ``[B|1, n, P, c, G + K]``: what each query sees of the global keys and of its chunk's window."""
        device = query.device
        positions = torch.arange(query.shape[1], device=device)
        real = (positions >= 0)[None] if key_padding_mask is None else key_padding_mask
        # Global tokens are no part of a window: they are seen already.
        local = (real & (positions >= count))[..., None, None]  # [B|1, L, 1, 1]
        if order is not None:
            local = _permuted(local.expand(-1, -1, order.shape[1], -1), order)
        seen = _windows(local, chunk, one_sided)[..., 0].transpose(2, 3)[:, :, :, None]  # [B|1, n, P, 1, K]
        width = seen.shape[-1]
        offset = torch.arange(width, device=device) - one_sided - torch.arange(chunk, device=device)[:, None]
        seen = seen & (offset.abs() <= self.window // 2)
        if order is not None:
            residues = (order % self.dilations.to(device))[None, ..., None]  # [1, L, P, 1]
            queries = F.pad(residues, (0, 0, 0, 0, 0, -query.shape[1] % chunk)).unflatten(1, (-1, chunk))[..., 0]
            keys = _windows(residues, chunk, one_sided)[..., 0]
            seen = seen & (queries.transpose(2, 3)[..., None] == keys.transpose(2, 3)[..., None, :])
        same = real[:, None, None, None, :count].expand(-1, *seen.shape[1:4], -1)
        return torch.cat([same, seen], -1)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return (
            f"num_heads={self.num_heads}, seq_len={self.seq_len}, window={self.window}, dilation={self.dilation}, "
            f"num_global_tokens={self.num_global_tokens}"
        )


def _permuted(x: Tensor, order: Tensor) -> Tensor:
    """``[B, L, H, D]`` with the tokens of each head in the order ``[L, P]``."""
    return x.gather(1, order[None, :, :, None].expand_as(x))


def _windows(x: Tensor, chunk: int, one_sided: int) -> Tensor:
    """``[B, L, H, D]`` to the windows of all chunks, ``[B, n, K, H, D]``; 0 past both ends.

    A window begins ``one_sided`` tokens before its chunk and ends as many after it, together at most a chunk. One
    chunk's window is the sequence.
    """
    length = x.shape[1]
    if length <= chunk:
        return x[:, None]
    chunks = -(-length // chunk)
    padded = F.pad(x, (0, 0, 0, 0, one_sided, (chunks + 1) * chunk - length - one_sided)).unflatten(1, (-1, chunk))
    return torch.cat([padded[:, :-1], padded[:, 1:, : 2 * one_sided]], 2)
