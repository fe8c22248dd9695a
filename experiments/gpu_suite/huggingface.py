"""Hugging Face's BigBird and Longformer attention in the place of ours, in the same encoder layer.

Their self-attention modules bring their own projections of queries, keys and values, as the encoder's layer does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sat.models.encoder import EncoderLayer


class BigBird(nn.Module):
    """Blocks of 32, 3 random ones a row: the paper's baseline.

    The masks are set up once, as in their model. Their module draws the random blocks anew in each call and, from
    transformers 5 on, also fills the whole matrix of weights in each; both are left as they are.
    """

    def __init__(self, width: int, num_heads: int, seq_len: int, block_size: int = 32, random_blocks: int = 3) -> None:
        from transformers import BigBirdConfig
        from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

        super().__init__()
        config = BigBirdConfig(
            hidden_size=width,
            num_attention_heads=num_heads,
            block_size=block_size,
            num_random_blocks=random_blocks,
            max_position_embeddings=seq_len,
        )
        self.attention = BigBirdBlockSparseAttention(config, seed=0)
        self._masks = BigBirdModel.create_masks_for_block_sparse_attn
        self._block_size = block_size
        self._of: tuple[Tensor | None, int, Any] = (None, -1, None)

    def forward(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        if self._of[0] is not padding_mask or self._of[1] != len(x):
            real = torch.ones(x.shape[:2], device=x.device) if padding_mask is None else padding_mask.float()
            # Their module wants masks in the dtype of its softmax, which under autocast depends on the device.
            real = real.to(torch.softmax(self.attention.query(x[:1, :1]), -1).dtype)
            self._of = padding_mask, len(x), self._masks(real, self._block_size)
        blocked, band, rows, columns = self._of[2]
        context, _ = self.attention(
            x,
            band_mask=band,
            from_mask=rows,
            to_mask=columns,
            from_blocked_mask=blocked,
            to_blocked_mask=blocked,
        )
        return context


class Longformer(nn.Module):
    """A window of 64: the paper's baseline. No global tokens."""

    def __init__(self, width: int, num_heads: int, window: int = 64) -> None:
        from transformers import LongformerConfig
        from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

        super().__init__()
        config = LongformerConfig(
            hidden_size=width,
            num_attention_heads=num_heads,
            attention_window=[window],
            attention_probs_dropout_prob=0.0,
        )
        self.attention = LongformerSelfAttention(config, layer_id=0)

    def forward(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        masked = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device) if padding_mask is None else ~padding_mask
        (context,) = self.attention(
            x,
            attention_mask=masked * -10000.0,
            is_index_masked=masked,
            is_index_global_attn=torch.zeros_like(masked),
            is_global_attn=False,
        )
        return context


class LayerWith(nn.Module):
    """An encoder layer whose attention, projections included, is another module's."""

    def __init__(self, layer: EncoderLayer, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.attention_norm, self.attention_out = layer.attention_norm, layer.attention_out
        self.mlp_norm, self.mlp, self.dropout = layer.mlp_norm, layer.mlp, layer.dropout

    def forward(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        x = x + self.dropout(self.attention_out(self.attention(self.attention_norm(x), padding_mask)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))
