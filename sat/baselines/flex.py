"""Floor 2: a fixed structure through PyTorch's FlexAttention."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sat.baselines.structure import StructureAttention
from sat.layout import BlockLayout
from sat.ops import checks
from sat.ops.autocast import as_autocast_does

# Edge of FlexAttention's blocks: what its kernels are made for, forward and backward, on every GPU.
FLEX_BLOCK = 128


class FlexAttention(StructureAttention):
    """The same function as :class:`StructureAttention`, computed by compiled FlexAttention; it trains on GPUs only.

    Its kernels visit blocks of 128: those that hold a kept block of the structure, which a mask function tells from
    the others inside. Arguments as there, without dropout and backend.
    """

    def __init__(self, num_heads: int, seq_len: int, structure: Any) -> None:
        super().__init__(num_heads, seq_len, structure)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        query_padding_mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
    ) -> Tensor:
        """``[B, H, L, D]`` from query, key and value of that shape; bool masks ``[B, L]``, True = a real token.

        Raises:
            TypeError: a tensor of another kind.
            ValueError: a bias, which this method does not take; tensors that do not go together.
        """
        if attn_bias is not None:
            raise ValueError("FlexAttention is measured without a bias; use StructureAttention, which takes attn_bias")
        query, key, value = as_autocast_does(query, key, value)
        self._check(query, key, value)
        batch, length, device = query.shape[0], query.shape[2], query.device
        checks.check_padding("key_padding_mask", key_padding_mask, batch, length, device)
        checks.check_padding("query_padding_mask", query_padding_mask, batch, length, device)
        layout = self.layout_for(length, device)
        mask = self._block_mask(layout, length, key_padding_mask)
        attend = flex_attention if device.type == "cpu" else _compiled()
        context = attend(query, key, value, block_mask=mask)
        return context if query_padding_mask is None else context.masked_fill(~query_padding_mask[:, None, :, None], 0)

    def _block_mask(self, layout: BlockLayout, length: int, keep: Tensor | None) -> BlockMask:
        mask, size, shared, causal = layout.mask, layout.block_size, layout.num_heads == 1, self.is_causal

        def kept(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = mask[head * 0 if shared else head, query // size, key // size]
            if causal:
                seen = seen & (key <= query)
            return seen if keep is None else seen & keep[batch, key]

        name = f"flex {length}"
        if name not in layout.derived:
            layout.derived[name] = visited_blocks(layout, length)
        counts, columns = layout.derived[name]
        return BlockMask.from_kv_blocks(
            counts, columns, BLOCK_SIZE=FLEX_BLOCK, mask_mod=kept, seq_lengths=(length, length)
        )


def visited_blocks(layout: BlockLayout, length: int) -> tuple[Tensor, Tensor]:
    """Numbers ``[1, H, R]`` and ascending columns ``[1, H, R, R]`` of the blocks of 128 that hold a kept block."""
    blocks, size = -(-length // FLEX_BLOCK), layout.block_size
    head, row, column = layout.mask.nonzero(as_tuple=True)
    visited = torch.zeros(layout.num_heads, blocks, blocks, dtype=torch.bool, device=layout.device)
    # A block larger than 128, or one that does not divide it, reaches into several.
    reach = torch.arange(0, size + FLEX_BLOCK - 1, FLEX_BLOCK, device=layout.device)
    for down in reach:
        for right in reach:
            rows = ((row * size + down.clamp(max=size - 1)) // FLEX_BLOCK).clamp(max=blocks - 1)
            columns = ((column * size + right.clamp(max=size - 1)) // FLEX_BLOCK).clamp(max=blocks - 1)
            visited[head, rows, columns] = True
    counts = visited.sum(2, dtype=torch.int32)[None]
    return counts, torch.argsort((~visited).int(), dim=2, stable=True).int()[None].contiguous()


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)
