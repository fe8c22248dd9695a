"""Floor 2: BigBird's attention (Zaheer et al. 2020, "ITC"): ends, a window of three blocks, and random blocks.

A layout like any other, drawn once from a seed and computed by our block-sparse operator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sat import ops
from sat.baselines.structure import StructureAttention
from sat.layout import BlockLayout, check_int


def bigbird_layout(random_blocks: Tensor, block_size: int) -> BlockLayout:
    """The layout of BigBird with these random blocks.

    The first and the last block row and column are kept, the blocks beside the diagonal, and the random blocks.

    Args:
        random_blocks: int64 ``[H, nb - 2, r]``, the columns that the block rows 1 to nb - 2 see besides. What a row
            sees already it does not see twice. Hugging Face's ``BigBirdBlockSparseAttention`` does, where it draws
            such a block: at lengths of 1024, 3072 and 4096 tokens, and in evaluation, where it draws block 0 only.
        block_size: edge of a block, in tokens.

    Raises:
        TypeError: the random blocks are no int64 tensor.
        ValueError: they have another number of dimensions, or name a block that does not exist.
    """
    if not isinstance(random_blocks, Tensor) or random_blocks.dtype != torch.int64:
        found = random_blocks.dtype if isinstance(random_blocks, Tensor) else type(random_blocks).__name__
        raise TypeError(f"random_blocks must be a tensor of torch.int64, got {found}")
    if random_blocks.dim() != 3:
        raise ValueError(
            f"random_blocks must be [heads, block rows - 2, random blocks], got the shape {list(random_blocks.shape)}"
        )
    heads, inner, _ = random_blocks.shape
    if ((random_blocks < 0) | (random_blocks >= inner + 2)).any():
        raise ValueError(
            f"random_blocks for {inner + 2} block rows must lie between 0 and {inner + 1}, got values from "
            f"{random_blocks.min()} to {random_blocks.max()}"
        )
    mask = _fixed_blocks(inner + 2, random_blocks.device).repeat(heads, 1, 1)
    mask[:, 1:-1].scatter_(2, random_blocks, True)
    return BlockLayout(mask, block_size)


def _fixed_blocks(blocks: int, device: torch.device) -> Tensor:
    """Bool ``[nb, nb]``: the blocks that all heads keep."""
    index = torch.arange(blocks, device=device)
    is_end = (index == 0) | (index == blocks - 1)
    return is_end | is_end[:, None] | ((index - index[:, None]).abs() <= 1)


class _RandomBlocks:
    """BigBird's blocks for any length: always the same for the same numbers."""

    def __init__(self, num_heads: int, block_size: int, num_random_blocks: int, seed: int) -> None:
        self.num_heads, self.block_size = num_heads, block_size
        self.num_random_blocks, self.seed = num_random_blocks, seed

    def layout(self, seq_len: int) -> BlockLayout:
        blocks = -(-seq_len // self.block_size)
        # As in Hugging Face's: so short a sequence is attended to in full.
        if blocks <= 5 + 2 * self.num_random_blocks:
            return BlockLayout(torch.ones(1, blocks, blocks, dtype=torch.bool), self.block_size)
        generator = torch.Generator().manual_seed(self.seed)
        never = _fixed_blocks(blocks, torch.device("cpu"))[1:-1]  # drawn: enough others remain
        drawn = []
        for _ in range(self.num_heads):  # one at a time: each takes four bytes for every block
            order = torch.rand(blocks - 2, blocks, generator=generator).masked_fill_(never, -1)
            drawn.append(order.topk(self.num_random_blocks).indices)
        return bigbird_layout(torch.stack(drawn), self.block_size)

    def __repr__(self) -> str:
        return f"block_size={self.block_size}, num_random_blocks={self.num_random_blocks}, seed={self.seed}"


class BigBirdAttention(StructureAttention):
    """Queries, keys and values in, context out, without projections and without parameters.

    The first and the last block row attend to everything. Row i of the others sees the first and the last block, the
    blocks i - 1, i and i + 1, and random blocks, different ones in each head and never one of those. Sequences of up to
    ``(5 + 2 num_random_blocks) block_size`` tokens are attended to in full.

    Source: Hugging Face's ``BigBirdModel``. Theirs draws the random blocks in each forward pass, and none of them in
    evaluation; here a length has one layout, which the seed makes, in training and in evaluation.

    Args:
        num_heads: ``H``.
        seq_len: the longest sequence, in tokens.
        block_size: edge of a block, in tokens.
        num_random_blocks: random blocks in each block row.
        seed: of the random blocks; the global random state is neither read nor changed.
        dropout: probability with which an attention weight is dropped in training.
        backend: see :mod:`sat.ops`.

    Raises:
        TypeError: a size is no integer.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        num_heads: int,
        seq_len: int,
        *,
        block_size: int = 32,
        num_random_blocks: int = 3,
        seed: int = 0,
        dropout: float = 0.0,
        backend: ops.Backend = "auto",
    ) -> None:
        for name, value in (("num_heads", num_heads), ("seq_len", seq_len), ("block_size", block_size)):
            check_int(name, value, 1)
        check_int("num_random_blocks", num_random_blocks, 0)
        check_int("seed", seed, 0)
        structure = _RandomBlocks(num_heads, block_size, num_random_blocks, seed)
        super().__init__(num_heads, seq_len, structure, dropout=dropout, backend=backend)
