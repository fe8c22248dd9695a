"""Floor 3: the paper's Transformer encoder and its classifier (Yoon et al. 2024, section 4; ALGORITHM of this project).

Encoder-only, pre-LayerNorm, learned positions, GELU. Shapes: B batch, L tokens, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sat import ops
from sat.attention import AdaptiveAttention
from sat.baselines import LongformerAttention, LSGAttention, make_baseline
from sat.models.dropout import Dropout
from sat.models.positions import sine_positions

AttentionName = Literal["adaptive", "spion", "dense", "explicit", "structure", "flex", "longformer", "bigbird", "lsg"]
PositionsName = Literal["random", "sine"]
POSITIONS_STD = 0.02
# No Any among them: for that, jsonargparse would import whatever class_path a config names.
AttentionOptions = dict[str, bool | int | float | str | list[int] | None]


class EncoderLayer(nn.Module):
    """Attention and MLP, each behind a LayerNorm and beside a residual connection."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_dim: int,
        dropout: float,
        attention: nn.Module,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.num_heads = width, num_heads
        self.activation_checkpointing = activation_checkpointing
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention = attention
        # Longformer's global tokens have projections of their own.
        self.num_global = attention.num_global_tokens if isinstance(attention, LongformerAttention) else 0
        if self.num_global:
            self.global_query = nn.Linear(width, width)
            self.global_key_value = nn.Linear(width, 2 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_dim), nn.GELU(), Dropout(dropout), nn.Linear(mlp_dim, width))
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """``[B, L, W]`` to ``[B, L, W]``; ``padding_mask`` bool ``[B, L]``, True = a real token."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            # In here, not around the module: hooks such as FSDP's run once, before what is computed again.
            return checkpoint(self._forward, x, padding_mask, use_reentrant=False)
        return self._forward(x, padding_mask)

    def _forward(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        normed = self.attention_norm(x)
        query, key, value = self._heads(self.query_key_value(normed))
        options: dict[str, Tensor | None] = {"key_padding_mask": padding_mask, "query_padding_mask": padding_mask}
        if self.num_global:
            (options["global_query"],) = self._heads(self.global_query(normed[:, : self.num_global]))
            options["global_key"], options["global_value"] = self._heads(self.global_key_value(normed))
        context = self.attention(query, key, value, **options)
        x = x + self.dropout(self.attention_out(context.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))

    def _heads(self, x: Tensor) -> Tensor:
        """Projections ``[B, L, n * W]`` by heads: ``[n, B, H, L, D]``."""
        return x.unflatten(-1, (-1, self.num_heads, self.width // self.num_heads)).permute(2, 0, 3, 1, 4)


class Encoder(nn.Module):
    """Token and position embeddings, layers, and a last LayerNorm; padded positions come out as 0.

    A token with the id -1 is hidden: it has its position and nothing else.
    """

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
        attention: AttentionName = "adaptive",
        attention_options: Mapping[str, Any] | None = None,
        pruned: ops.Pruned = "drop",
        activation_checkpointing: bool = False,
        hides: bool = False,
        positions: PositionsName = "random",
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.hides = hides
        attentions: list[nn.Module] = []
        for layer in range(num_layers):
            if attention in ("adaptive", "spion", "dense"):
                attentions.append(AdaptiveAttention(num_heads, seq_len, block_size, pruned=pruned))
            else:
                attentions.append(
                    make_baseline(
                        attention,
                        num_heads,
                        seq_len,
                        block_size=block_size,
                        layer=layer,
                        num_layers=num_layers,
                        options=attention_options,
                    )
                )
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.empty(seq_len, width))
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=POSITIONS_STD)
        if positions == "sine":
            with torch.no_grad():
                self.positions.copy_(sine_positions(grid or (1, seq_len), width) * (POSITIONS_STD * 2**0.5))
        self.dropout = Dropout(dropout)
        # LSG's global tokens are learned and stand before the sequence.
        first = attentions[0]
        self.prepended = first.prepended_tokens if isinstance(first, LSGAttention) else 0
        if self.prepended:
            self.global_tokens = nn.Parameter(torch.empty(self.prepended, width))
            nn.init.normal_(self.global_tokens, std=0.02)
        self.layers = nn.ModuleList(
            EncoderLayer(width, num_heads, mlp_dim, dropout, each, activation_checkpointing) for each in attentions
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids ``[B, L]`` (int64) to features ``[B, L, W]``; ``attention_mask`` bool, True = a real token."""
        x = self.tokens(input_ids.clamp(min=0) if self.hides else input_ids)
        if self.hides:
            x = x * (input_ids >= 0)[..., None]
        x = x + self.positions[: input_ids.shape[1]]
        mask = attention_mask
        if self.prepended:
            x = torch.cat([self.global_tokens.expand(len(x), -1, -1), x], 1)
            if mask is not None:
                mask = torch.cat([mask.new_ones(len(mask), self.prepended), mask], 1)
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, mask)
        x = self.norm(x[:, self.prepended :])
        return x if attention_mask is None else x * attention_mask[..., None]


class SequenceClassifier(nn.Module):
    """The encoder, the mean over the full padded length, and a head of two layers; or the head at hidden tokens.

    With two towers, a sample is two sequences, which the same encoder reads; the head gets both means, their product
    and their difference, as in the Long Range Arena's matching task (Tay et al. 2021).

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
        attention: ``adaptive`` trains densely, then sparsely; ``spion`` too, by the rules of SAT's forerunner;
            ``dense`` is fused dense attention throughout and ``explicit`` the same with its scores in full;
            ``structure`` has fixed blocks, ``flex`` the same by FlexAttention; ``longformer``, ``bigbird``, ``lsg``.
        attention_options: settings of the method. longformer: window, dilation, num_global_tokens; bigbird: block_size,
            num_random_blocks, seed; lsg: block_size, sparse_block_size, sparsity_factor, selection, num_global_tokens;
            structure and flex: mode and more as in DeepSpeed's sparse_attention section, or deepspeed (a JSON file), or
            layout (a saved layout); spion: quantile, change, interval.
        block_size: edge of the layouts' blocks, in tokens.
        pruned: of ``adaptive`` and ``spion``: ``drop`` leaves scores outside of the layout out of the softmax, ``zero``
            counts each of them as a logit of 0, as the paper's kernels do.
        activation_checkpointing: keep only the input of each layer for the backward pass, which computes the rest of
            the layer once more: less memory for more time, the same results.
        positions: how learned positions begin: ``random``, or as ``sine`` waves, of rows and columns where tokens are
            pixels, see :func:`sine_positions`.
        towers: sequences in a sample, 1 or 2.
        per_token: a prediction for each hidden token, of what is hidden there, instead of one for all, see
            :class:`sat.data.SequenceDataModule`.
        grid: ``(rows, columns)`` in which the tokens of a picture lie, row by row; None: in one row.

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
        attention_options: AttentionOptions | None = None,
        block_size: int = 32,
        pruned: ops.Pruned = "drop",
        activation_checkpointing: bool = False,
        positions: PositionsName = "random",
        towers: int = 1,
        per_token: bool = False,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if towers not in (1, 2):
            raise ValueError(f"towers must be 1 or 2, got {towers}")
        if per_token and towers == 2:
            raise ValueError("per_token is for one sequence a sample, got 2 towers")
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
        if attention not in get_args(AttentionName):
            raise ValueError(f"attention must be one of {', '.join(get_args(AttentionName))}, got {attention!r}")
        if positions not in get_args(PositionsName):
            raise ValueError(f"positions must be one of {', '.join(get_args(PositionsName))}, got {positions!r}")
        if pruned not in get_args(ops.Pruned):
            raise ValueError(f"pruned must be one of {', '.join(get_args(ops.Pruned))}, got {pruned!r}")
        if attention_options and attention in ("adaptive", "dense"):
            raise ValueError(
                f"model.attention_options has {', '.join(attention_options)}, but {attention} attention has no options"
            )
        self.attention, self.attention_options, self.pruned = attention, dict(attention_options or {}), pruned
        self.num_heads = num_heads
        self.encoder = Encoder(
            vocab_size,
            seq_len,
            num_layers=num_layers,
            width=width,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            dropout=dropout,
            attention=attention,
            attention_options=attention_options,
            block_size=block_size,
            pruned=pruned,
            activation_checkpointing=activation_checkpointing,
            hides=per_token,
            positions=positions,
            grid=grid,
        )
        self.per_token = per_token
        self.towers, self.activation_checkpointing = towers, activation_checkpointing
        features = width if towers == 1 else 4 * width
        self.head = nn.Sequential(nn.Linear(features, head_dim), nn.ReLU(), nn.Linear(head_dim, num_classes))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids to logits ``[B, classes]``, or ``[T, classes]`` of the T hidden tokens (ids below 0) in order.

        ``input_ids`` and ``attention_mask`` (bool, True = a real token) have the shape ``[B, L]``, with two towers
        ``[B, 2, L]``.
        """
        if self.per_token:
            return self.head(self.encoder(input_ids, attention_mask)[input_ids < 0])
        if self.towers == 1:
            return self.head(self.encoder(input_ids, attention_mask).mean(1))
        # Pairs as a batch of twice the size: statistics and layouts are those of both towers together.
        mask = None if attention_mask is None else attention_mask.flatten(0, 1)
        first, second = self.encoder(input_ids.flatten(0, 1), mask).mean(1).unflatten(0, (-1, 2)).unbind(1)
        return self.head(torch.cat([first, second, first * second, first - second], 1))
