"""Floor 3: what users of DeepSpeed's Sparse Attention know by name.

The patterns are in :mod:`sat.patterns`, MatMul and Softmax are :func:`sat.ops.matmul` and
:func:`sat.ops.sparse_softmax`; ``docs/deepspeed.md`` leads from DeepSpeed's lines to these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat import ops
from sat.layout import BlockLayout, LayoutsByLength, check_int, check_structure
from sat.ops import checks, masks
from sat.ops.autocast import as_autocast_does


class Pattern(Protocol):
    """What tells which blocks exist: the classes of :mod:`sat.patterns`, or one of your own.

    It may also have ``block_size``, the edge of its blocks, which spares making one layout for each length within a
    block, and ``is_causal``, True if no query may see a later key.
    """

    def layout(self, seq_len: int) -> BlockLayout:
        """The layout ``[H, M, M]`` for this many tokens; H may be 1."""
        ...


class _Corner:
    """The first rows and columns of one layout, for all lengths."""

    def __init__(self, pattern: Pattern, max_seq_length: int) -> None:
        self.pattern, self.max_seq_length = pattern, max_seq_length

    def layout(self, seq_len: int) -> BlockLayout:
        whole = self.pattern.layout(self.max_seq_length)
        blocks = -(-seq_len // whole.block_size)
        return BlockLayout(whole.mask[:, :blocks, :blocks], whole.block_size)


class _Loaded:
    """The layout of a checkpoint."""

    def __init__(self, mask: Tensor, block_size: int) -> None:
        self.mask, self.block_size = mask, block_size

    def layout(self, seq_len: int) -> BlockLayout:
        return BlockLayout(self.mask != 0, self.block_size)


class SparseSelfAttention(nn.Module):
    """Self-attention over the blocks of a pattern, as DeepSpeed's module of this name; for any length.

    Where the pattern is causal, query i sees keys 0 to i only, exact to the token. The masks' modes are those of
    :func:`sat.ops.sparse_softmax`; a bool mask means True = a real token, or may attend, in either mode.

    It is a pattern's, and of a checkpoint nothing but ``master_layout`` if there is one, as in all of DeepSpeed's: then
    that layout counts in place of the pattern's, for up to as many tokens as it was made for.

    Args:
        sparsity_config: a pattern: anything with ``layout(seq_len)``.
        key_padding_mask_mode: ``"add"`` or ``"mul"``.
        attn_mask_mode: ``"add"`` or ``"mul"``.
        max_seq_length: use the first rows and columns of the layout for this many tokens, as DeepSpeed did with a
            default of 2048. By default each length has a layout of its own.
        backend: see :mod:`sat.ops`.

    Raises:
        TypeError: the pattern has no method ``layout``, or ``max_seq_length`` is no integer.
        ValueError: an argument is out of range.
    """

    master_layout: Tensor | None

    def __init__(
        self,
        sparsity_config: Pattern,
        key_padding_mask_mode: ops.MaskMode = "add",
        attn_mask_mode: ops.MaskMode = "mul",
        max_seq_length: int | None = None,
        *,
        backend: ops.Backend = "auto",
    ) -> None:
        super().__init__()
        check_structure("sparsity_config", sparsity_config)
        checks.check_choice("key_padding_mask_mode", key_padding_mask_mode, ("add", "mul"))
        checks.check_choice("attn_mask_mode", attn_mask_mode, ("add", "mul"))
        if max_seq_length is not None:
            check_int("max_seq_length", max_seq_length, 1)
        self.sparsity_config = sparsity_config
        self.key_padding_mask_mode, self.attn_mask_mode = key_padding_mask_mode, attn_mask_mode
        self.max_seq_length, self.backend = max_seq_length, backend
        structure = sparsity_config if max_seq_length is None else _Corner(sparsity_config, max_seq_length)
        self._layouts = LayoutsByLength(structure)
        self.register_buffer("master_layout", None)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        """Take over the layout that DeepSpeed saved, ``[H, M, M]``, 0 = the block is not kept."""
        saved, size = state_dict.get(f"{prefix}master_layout"), getattr(self.sparsity_config, "block_size", None)
        if isinstance(saved, Tensor):
            if saved.dim() != 3 or saved.shape[1] != saved.shape[2] or 0 in saved.shape or not isinstance(size, int):
                lists[-1].append(
                    f"{prefix}master_layout of the shape {checks.shape_text(saved)} is no layout of this pattern: it "
                    f"takes [heads, blocks, blocks], and a pattern with a block_size"
                )
                return
            self.master_layout = saved.detach().clone()
            self.max_seq_length = saved.shape[1] * size
            self._layouts = LayoutsByLength(_Corner(_Loaded(self.master_layout, size), self.max_seq_length))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)

    @property
    def is_causal(self) -> bool:
        """Whether no query may see a later key."""
        return bool(getattr(self.sparsity_config, "is_causal", False))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rpe: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend, with scores scaled by ``D ** -0.5``.

        Args:
            query: ``[B, H, L, D]``.
            key: ``[B, H, L, D]``.
            value: ``[B, H, L, D]``. Under autocast all three are cast to its dtype.
            rpe: relative position embedding, broadcastable to ``[B, H, L, L]``; added to the scaled scores.
            key_padding_mask: ``[B, L]``, or ``[B, 1, 1, L]`` as Hugging Face's BERT makes it.
            attn_mask: broadcastable to ``[B, H, L, L]``.

        Returns:
            ``[B, H, L, D]`` in the dtype of ``query``. A query without a single kept key gives 0.

        Raises:
            ValueError, TypeError: shapes, dtypes or devices that do not go together, or more tokens than
                ``max_seq_length``.
        """
        query, key, value = as_autocast_does(query, key, value)
        checks.check_query_key(query, key, value)
        if query.shape != key.shape:
            raise ValueError(
                f"SparseSelfAttention is for queries and keys of one length, got {query.shape[2]} queries and "
                f"{key.shape[2]} keys; sat.ops.block_sparse_attention takes any"
            )
        batch, heads, length, _ = query.shape
        layout = self._layout_for(length, heads, query.device)
        checks.check_layout(layout, query, "query")
        checks.check_lengths(layout, length, length)
        if isinstance(key_padding_mask, Tensor) and key_padding_mask.shape[1:-1] == (1, 1):
            key_padding_mask = key_padding_mask[:, 0, 0]
        key_padding_mask, attn_bias = masks.combine(
            query,
            (batch, heads, length, length),
            rpe=rpe,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            key_padding_mask_mode=self.key_padding_mask_mode,
            attn_mask_mode=self.attn_mask_mode,
        )
        return ops.block_sparse_attention(
            query,
            key,
            value,
            layout,
            key_padding_mask=key_padding_mask,
            attn_bias=attn_bias,
            is_causal=self.is_causal,
            backend=self.backend,
        )

    def _layout_for(self, seq_len: int, num_heads: int, device: torch.device) -> BlockLayout:
        if self.max_seq_length is not None and seq_len > self.max_seq_length:
            raise ValueError(
                f"this attention was made for up to {self.max_seq_length} tokens, got {seq_len}; raise max_seq_length"
            )
        return self._layouts.get(seq_len, num_heads, device)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return (
            f"{self.sparsity_config}, key_padding_mask_mode={self.key_padding_mask_mode!r}, "
            f"attn_mask_mode={self.attn_mask_mode!r}"
        )


Padded = tuple[int, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def pad_to_block_size(
    block_size: int,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    pad_token_id: int = 0,
    model_embeddings: Callable[[Tensor], Tensor] | None = None,
) -> Padded:
    """Pad a model's inputs to whole blocks, as DeepSpeed's ``SparseAttentionUtils`` did; SAT itself needs no padding.

    Args:
        block_size: the length becomes a multiple of it, in tokens.
        input_ids: ``[B, L]``, padded with ``pad_token_id``.
        attention_mask: ``[B, L]``, not 0 = a real token; padded with 0. Where padding is added and no mask was given,
            one is made (int64), because the padding must not be attended to.
        token_type_ids: ``[B, L]`` or ``[1, L]``, padded with 0.
        position_ids: the same.
        inputs_embeds: ``[B, L, W]``, padded with ``model_embeddings`` of ``pad_token_id``, or 0 without these;
            differentiable.
        pad_token_id: the padding's token.
        model_embeddings: ids ``[B, P]`` to ``[B, P, W]``.

    Returns:
        How many tokens were added (give it to :func:`unpad_sequence_output`), then ``input_ids``, ``attention_mask``,
        ``token_type_ids``, ``position_ids`` and ``inputs_embeds``; None where None was given, but for the mask.

    Raises:
        TypeError: an input is no tensor.
        ValueError: neither ids nor embeddings were given, shapes that do not go together, or a block size below 1.
    """
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size must be a whole number of at least 1, got {block_size!r}")
    tokens = input_ids if input_ids is not None else inputs_embeds
    if tokens is None:
        raise ValueError("nothing to pad: give input_ids or inputs_embeds")
    expected = {"input_ids": 2, "attention_mask": 2, "token_type_ids": 2, "position_ids": 2, "inputs_embeds": 3}
    given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
    for name, x in zip(expected, given, strict=True):
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    batch, length = (*tokens.shape, 0, 0)[:2]
    for (name, dims), x in zip(expected.items(), given, strict=True):
        batches = (1, batch) if name in ("token_type_ids", "position_ids") else (batch,)
        if x is not None and (x.dim() != dims or x.shape[1] != length or x.shape[0] not in batches):
            wanted = ", ".join([str(batch), str(length), "width"][:dims])
            raise ValueError(f"{name} must have the shape [{wanted}], got {checks.shape_text(x)}")
    pad_len = -length % block_size
    if pad_len == 0:
        return 0, *given

    def padded(x: Tensor | None, value: int) -> Tensor | None:
        return None if x is None else F.pad(x, (0, pad_len), value=value)

    if inputs_embeds is not None:
        if model_embeddings is None:
            padding = inputs_embeds.new_zeros(batch, pad_len, inputs_embeds.shape[2])
        else:
            ids = torch.full((batch, pad_len), pad_token_id, device=inputs_embeds.device)
            padding = model_embeddings(ids).to(inputs_embeds.dtype)
        inputs_embeds = torch.cat([inputs_embeds, padding], dim=1)
    if attention_mask is None:
        attention_mask = torch.ones(batch, length, dtype=torch.int64, device=tokens.device)
    return (
        pad_len,
        padded(input_ids, pad_token_id),
        padded(attention_mask, 0),
        padded(token_type_ids, 0),
        # Position 0 exists in every model; there may be fewer positions than the number of the padding's token.
        padded(position_ids, 0),
        inputs_embeds,
    )


def unpad_sequence_output(pad_len: int, sequence_output: Tensor) -> Tensor:
    """Cut off what :func:`pad_to_block_size` added.

    Args:
        pad_len: how many tokens it added.
        sequence_output: ``[B, L, ...]``.

    Returns:
        ``[B, L - pad_len, ...]``, a view.

    Raises:
        ValueError: there are not so many tokens.
    """
    length = sequence_output.shape[1]
    if not 0 <= pad_len < length:
        raise ValueError(f"pad_len must be at least 0 and below the sequence's {length} tokens, got {pad_len}")
    return sequence_output[:, : length - pad_len]
