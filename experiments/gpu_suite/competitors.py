"""What block-sparse attention is compared with: FlexAttention on the same blocks, and dense attention.

FlexAttention's kernels were made for blocks of 128. On smaller ones the forward tile can be set by options. The
backward tile cannot (its configuration is refused before options are read), so a class of ``torch._inductor`` that is
there to be replaced chooses it. Beside that, the layout can be coarsened to blocks of 128 with a mask inside them,
which computes the same function with PyTorch's own tiles. Either may win, so both are measured.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sat.layout import BlockLayout

OWN_TILES = 128  # edge of the blocks that PyTorch's tiles need


def coarse_block_mask(layout: BlockLayout, length: int, size: int = OWN_TILES) -> BlockMask:
    """The layout in larger blocks: full ones, and partial ones with the mask inside; for whole larger blocks only."""
    ratio = size // layout.block_size
    heads, rows, columns = layout.mask.shape
    counts = layout.mask.view(heads, rows // ratio, ratio, columns // ratio, ratio).sum((2, 4))
    full = counts == ratio * ratio
    partial = (counts > 0) & ~full
    mask, small, shared = layout.mask, layout.block_size, layout.num_heads == 1

    def kept(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask[head * 0 if shared else head, query // small, key // small]

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        return (
            blocks.sum(2, dtype=torch.int32)[None],
            torch.argsort((~blocks).int(), dim=2, stable=True).int()[None].contiguous(),
        )

    return BlockMask.from_kv_blocks(
        *listed(partial), *listed(full), BLOCK_SIZE=size, mask_mod=kept, seq_lengths=(length, length)
    )


def reset() -> None:
    """Forget what has been compiled: before another shape, so that no limit of recompilations is reached."""
    import torch._dynamo.config

    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 64
    try:
        from experiments.gpu_suite import flex_tiles

        flex_tiles.install()
    except (ImportError, AttributeError):  # then FlexAttention refuses its backward pass on small blocks, and says so
        return


@functools.cache
def _compiled() -> Any:
    """One for all shapes, each of which it compiles by itself."""
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def variants(layout: BlockLayout, length: int, device: str) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Attention functions by name: in the layout's own blocks and, where these are smaller than 128, in such."""
    if device == "cpu":  # uncompiled: to try the suite
        mask = layout.to_block_mask(length, length)
        return {"flex": lambda *tensors: flex_attention(*(x.detach() for x in tensors), block_mask=mask)}  # type: ignore
    size = layout.block_size

    def with_mask(mask: BlockMask, tile: int | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        options = None if tile is None else {"fwd_BLOCK_M": tile, "fwd_BLOCK_N": tile, "fwd_num_warps": 4}

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if "experiments.gpu_suite.flex_tiles" in sys.modules:
                sys.modules["experiments.gpu_suite.flex_tiles"].tile = tile  # type: ignore[attr-defined]
            return _compiled()(query, key, value, block_mask=mask, kernel_options=options)

        return attend

    found = {"flex": with_mask(layout.to_block_mask(length, length), size if size < OWN_TILES else None)}
    if size < OWN_TILES and length % OWN_TILES == 0:
        found["flex 128"] = with_mask(coarse_block_mask(layout, length), None)
    return found


def explicit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Dense attention with the scores in full."""
    return torch.softmax(query * query.shape[3] ** -0.5 @ key.transpose(2, 3), -1) @ value


def fused_dense(backend: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """``scaled_dot_product_attention`` by one of ``torch.nn.attention.SDPBackend`` and no other."""
    from torch.nn.attention import sdpa_kernel

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value)

    return attend
