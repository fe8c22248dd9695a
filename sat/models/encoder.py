"""Floor 3: the paper's Transformer encoder and its classifier (Yoon et al. 2024, section 4; ALGORITHM of this project).

Encoder-only, pre-LayerNorm, learned positions, GELU. Shapes: B batch, L tokens, W width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from sat.attention import AdaptiveAttention
from sat.models.dropout import Dropout

AttentionName = Literal["adaptive", "dense"]


class EncoderLayer(nn.Module):
    """Attention and MLP, each behind a LayerNorm and beside a residual connection."""

    def __init__(self, width: int, num_heads: int, mlp_dim: int, dropout: float, seq_len: int, block_size: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention = AdaptiveAttention(num_heads, seq_len, block_size)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_dim), nn.GELU(), Dropout(dropout), nn.Linear(mlp_dim, width))
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """``[B, L, W]`` to ``[B, L, W]``; ``padding_mask`` bool ``[B, L]``, True = a real token."""
        heads = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.attention.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each [B, H, L, D]
        context = self.attention(query, key, value, key_padding_mask=padding_mask, query_padding_mask=padding_mask)
        x = x + self.dropout(self.attention_out(context.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Encoder(nn.Module):
    """Token and position embeddings, layers, and a last LayerNorm; padded positions come out as 0."""

    def __init__(
        self,
        vocab_size: int,
        seq_len: int,
        *,
        num_layers: int,
        width: int,
        num_heads: int,
        mlp_dim: int,
        dropout: float,
        block_size: int,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.empty(seq_len, width))
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)
        self.dropout = Dropout(dropout)
        self.layers = nn.ModuleList(
            EncoderLayer(width, num_heads, mlp_dim, dropout, seq_len, block_size) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids ``[B, L]`` (int64) to features ``[B, L, W]``; ``attention_mask`` bool, True = a real token."""
        x = self.dropout(self.tokens(input_ids) + self.positions[: input_ids.shape[1]])
        for layer in self.layers:
            x = layer(x, attention_mask)
        x = self.norm(x)
        return x if attention_mask is None else x * attention_mask[..., None]


class SequenceClassifier(nn.Module):
    """The encoder, the mean over the full padded length, and a head of two layers.

    Args:
        vocab_size: number of token ids.
        seq_len: longest sequence, in tokens.
        num_classes: classes to tell apart.
        num_layers: encoder layers.
        width: features of a token.
        num_heads: attention heads of ``width / num_heads`` features each.
        mlp_dim: hidden features of each layer's MLP.
        head_dim: hidden features of the classification head.
        dropout: probability of dropping a feature in training, on embeddings, in and after the MLP and after attention.
        attention: ``adaptive`` trains densely, then sparsely; ``dense`` is fused dense attention throughout.
        block_size: edge of the layouts' blocks, in tokens.

    Raises:
        ValueError: an argument is out of range, or ``width`` is no multiple of ``num_heads``.
    """

    def __init__(
        self,
        vocab_size: int,
        seq_len: int,
        num_classes: int,
        *,
        num_layers: int = 2,
        width: int = 64,
        num_heads: int = 2,
        mlp_dim: int = 128,
        head_dim: int = 128,
        dropout: float = 0.1,
        attention: AttentionName = "adaptive",
        block_size: int = 32,
    ) -> None:
        super().__init__()
        sizes = {
            "vocab_size": vocab_size,
            "seq_len": seq_len,
            "num_classes": num_classes,
            "num_layers": num_layers,
            "width": width,
            "num_heads": num_heads,
            "mlp_dim": mlp_dim,
            "head_dim": head_dim,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if width % num_heads:
            raise ValueError(f"width {width} cannot be split among {num_heads} heads; make it a multiple of num_heads")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        if attention not in ("adaptive", "dense"):
            raise ValueError(f"attention must be 'adaptive' or 'dense', got {attention!r}")
        self.encoder = Encoder(
            vocab_size,
            seq_len,
            num_layers=num_layers,
            width=width,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            dropout=dropout,
            block_size=block_size,
        )
        self.head = nn.Sequential(nn.Linear(width, head_dim), nn.ReLU(), nn.Linear(head_dim, num_classes))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids ``[B, L]`` to logits ``[B, classes]``; ``attention_mask`` bool ``[B, L]``, True = a real token."""
        return self.head(self.encoder(input_ids, attention_mask).mean(1))
