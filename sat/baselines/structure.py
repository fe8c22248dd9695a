"""Floor 2: a fixed structure, one of :mod:`sat.patterns` or a user's own, through our operators."""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch
from torch import Tensor, nn

from sat import ops
from sat.layout import BlockLayout, LayoutsByLength, check_structure
from sat.ops import checks
from sat.ops.autocast import as_autocast_does


class Structure(Protocol):
    """Anything that gives a layout for a sequence length. ``is_causal``, if it has it, masks inside the blocks too."""

    def layout(self, seq_len: int) -> BlockLayout:
        """The blocks that exist, one layout a head or one that all share."""
        ...


class StructureAttention(nn.Module):
    """Block-sparse attention over the blocks of a fixed structure.

    Layouts are made from the structure, one for each length that occurs, and are not part of a checkpoint.

    Args:
        num_heads: ``H``.
        seq_len: the longest sequence, in tokens.
        structure: gives the layout of each length.
        dropout: probability with which a weight is dropped in training.
        backend: see :mod:`sat.ops`.

    Raises:
        TypeError: the structure has no method ``layout``.
        ValueError: the structure was made for another number of heads.
    """

    layout_mask: Tensor

    def __init__(
        self,
        num_heads: int,
        seq_len: int,
        structure: Structure,
        *,
        dropout: float = 0.0,
        backend: ops.Backend = "auto",
    ) -> None:
        super().__init__()
        checks.check_probability("dropout", dropout)
        check_structure("structure", structure)
        self.num_heads, self.seq_len, self.structure = num_heads, seq_len, structure
        self.is_causal: bool = getattr(structure, "is_causal", False)
        self.dropout, self.backend = dropout, backend
        self._layouts = LayoutsByLength(structure)
        layout = self._layouts.get(seq_len, num_heads, torch.device("cpu"))
        self.block_size = layout.block_size
        # For compiled graphs, which cannot look for a layout; the structure makes it, so it is in no checkpoint.
        self.register_buffer("layout_mask", layout.mask, persistent=False)

    @property
    def layout(self) -> BlockLayout:
        """The layout of the longest sequence, on the CPU."""
        return BlockLayout(self.layout_mask.cpu(), self.block_size)

    def layout_for(self, length: int, device: torch.device) -> BlockLayout:
        """The layout of a length in tokens, the same object each time."""
        if torch.compiler.is_compiling() and length == self.seq_len:
            return BlockLayout(self.layout_mask, self.block_size, keep_mask=True)
        return self._layouts.get(length, self.num_heads, device)

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
        """``[B, H, L, D]`` from query, key and value of that shape; masks as in :class:`AdaptiveAttention`."""
        query, key, value = as_autocast_does(query, key, value)
        self._check(query, key, value)
        return ops.block_sparse_attention(
            query,
            key,
            value,
            self.layout_for(query.shape[2], query.device),
            key_padding_mask=key_padding_mask,
            query_padding_mask=query_padding_mask,
            attn_bias=attn_bias,
            is_causal=self.is_causal,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        checks.check_query_key(query, key, value)
        heads, length = query.shape[1:3]
        if heads != self.num_heads or key.shape[2] != length:
            raise ValueError(
                f"this attention was made for {self.num_heads} heads and as many keys as queries, got {heads} heads, "
                f"{length} queries and {key.shape[2]} keys"
            )

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        density = int(self.layout_mask.count_nonzero()) / self.layout_mask.numel()
        return f"num_heads={self.num_heads}, seq_len={self.seq_len}, {self.structure}, density={density:.3f}"


def fingerprint(model: nn.Module) -> str | None:
    """A number that tells the fixed layouts of a model from others; None if it has none.

    They are in no checkpoint, and what makes them (a file, a seed) may change until a run is resumed.
    """
    digest = hashlib.sha256()
    found = [module for module in model.modules() if isinstance(module, StructureAttention)]
    for module in found:
        digest.update(f"{module.block_size} {list(module.layout_mask.shape)} {module.is_causal}".encode())
        digest.update(module.layout_mask.cpu().numpy().tobytes())
    return digest.hexdigest() if found else None
