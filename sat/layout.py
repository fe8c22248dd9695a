"""Floor 0: which blocks of an attention matrix exist.

No attention and no learning here; every other room agrees on this one value.
"""

from __future__ import annotations

import json
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sat.files import DamagedFile, read_safetensors, save_tensors, whole_number

if TYPE_CHECKING:
    import scipy.sparse
    from torch.nn.attention.flex_attention import BlockMask

FORMAT = "sat.BlockLayout"
FORMAT_VERSION = 1


class BlockLayout:
    """The kept blocks of an attention matrix, per head or shared by all heads.

    The boolean mask is the layout; the compressed indices are derived from it on first use, in the names of
    PyTorch's BSR and BSC tensors. Treat a layout as a value: do not write into its mask.

    Args:
        mask: ``[H, M, N]`` or ``[M, N]``, bool, True = the block is kept. ``H`` may be 1: shared by all heads.
        block_size: edge of a block in tokens. The last block row and column may be partial.

    Raises:
        TypeError: the mask is no bool tensor, or the block size no integer.
        ValueError: the mask has another number of dimensions or a dimension of 0, or the block size is below 1.
    """

    def __init__(self, mask: Tensor, block_size: int) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            found = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"a BlockLayout is made from a torch.bool tensor, got {found}; convert it with mask.bool()")
        if isinstance(block_size, bool) or not isinstance(block_size, int):
            raise TypeError(f"block_size must be an integer, got {block_size!r}")
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        if mask.dim() not in (2, 3) or 0 in mask.shape:
            raise ValueError(
                f"a BlockLayout mask is [heads, rows, columns] or [rows, columns] in blocks, none of them 0; "
                f"got the shape {list(mask.shape)}"
            )
        self.mask = mask.detach().reshape(-1, *mask.shape[-2:])
        self.block_size = block_size
        # What operators have derived from the mask, kept for their next call.
        self.derived: dict[object, Any] = {}
        # Counted at once where no device has to be waited for: compiled functions then find a number, not a tensor.
        at_once = type(mask) is Tensor and mask.device.type == "cpu" and not torch.compiler.is_compiling()
        self._nnz = int(mask.count_nonzero()) if at_once else None

    @property
    def num_heads(self) -> int:
        """Number of layouts: the number of heads, or 1 when all heads share one."""
        return self.mask.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """``(M, N)``: block rows and block columns."""
        return self.mask.shape[1], self.mask.shape[2]

    @property
    def device(self) -> torch.device:
        """Where the mask lies."""
        return self.mask.device

    @property
    def nnz(self) -> int:
        """Kept blocks, over all of the layout's heads.

        Known from the start for a mask on the CPU, also after :meth:`to`. A mask made on another device is counted on
        first use, which waits for that device; ask once before the layout enters ``torch.compile``.
        """
        if self._nnz is None:
            self._nnz = int(self.mask.count_nonzero())
        return self._nnz

    @property
    def density(self) -> float:
        """Kept blocks over all blocks, 0 to 1."""
        return self.nnz / self.mask.numel()

    @cached_property
    def _coordinates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Head, row and column of each kept block, int64 ``[nnz]``, in (head, row, column) order."""
        head, row, column = self.mask.nonzero(as_tuple=True)
        return head, row, column

    @cached_property
    def crow_indices(self) -> Tensor:
        """``[H, M+1]``, int32: where each block row's entries begin and end; offsets run through the heads."""
        return _offsets(self.mask.sum(2))

    @cached_property
    def col_indices(self) -> Tensor:
        """``[nnz]``, int32: the column of each kept block, in (head, row, column) order."""
        return self._coordinates[2].int()

    @cached_property
    def ccol_indices(self) -> Tensor:
        """``[H, N+1]``, int32: where each block column's entries begin and end; offsets run through the heads."""
        return _offsets(self.mask.sum(1))

    @cached_property
    def row_indices(self) -> Tensor:
        """``[nnz]``, int32: the row of each kept block, in (head, column, row) order."""
        return self.mask.transpose(1, 2).nonzero(as_tuple=True)[2].int()

    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout on another device."""
        moved = BlockLayout(self.mask.to(device), self.block_size)
        moved._nnz = self._nnz
        return moved

    def shared(self) -> BlockLayout:
        """The same layout with a single head if all of its heads are equal, which costs less to walk."""
        same = bool((self.mask == self.mask[:1]).all())
        return BlockLayout(self.mask[:1], self.block_size) if same and self.num_heads > 1 else self

    def fits(self, query_length: int, key_length: int) -> bool:
        """Whether this layout covers an attention matrix of ``query_length`` x ``key_length`` tokens exactly."""
        return self.shape == (-(-query_length // self.block_size), -(-key_length // self.block_size))

    def _check_fits(self, query_length: int, key_length: int) -> None:
        if not self.fits(query_length, key_length):
            expected = (-(-query_length // self.block_size), -(-key_length // self.block_size))
            raise ValueError(
                f"a layout of {self.shape[0]} x {self.shape[1]} blocks of {self.block_size} does not fit "
                f"{query_length} queries and {key_length} keys: these need {expected[0]} x {expected[1]} blocks"
            )

    def element_mask(self, query_length: int, key_length: int) -> Tensor:
        """The layout token by token.

        Args:
            query_length: ``L``, in tokens.
            key_length: ``S``, in tokens.

        Returns:
            bool ``[H, L, S]``, True where the token pair lies in a kept block. For tests and small cases: it takes
            ``H * L * S`` bytes.

        Raises:
            ValueError: the layout does not fit these lengths.
        """
        self._check_fits(query_length, key_length)
        rows = torch.arange(query_length, device=self.device) // self.block_size
        columns = torch.arange(key_length, device=self.device) // self.block_size
        return self.mask[:, rows[:, None], columns]

    def to_scipy(self, head: int = 0) -> scipy.sparse.bsr_array:
        """One head's layout as a SciPy block matrix of ones, ``(M * block_size, N * block_size)``.

        Raises:
            IndexError: there is no such head in the layout.
        """
        import numpy as np
        import scipy.sparse

        if not 0 <= head < self.num_heads:
            raise IndexError(f"head {head} asked for, but the layout has the heads 0 to {self.num_heads - 1}")
        mask = self.mask[head].cpu().numpy()
        indptr = np.concatenate([[0], mask.sum(1).cumsum()])
        size = self.block_size
        data = np.ones((int(indptr[-1]), size, size), dtype=bool)
        return scipy.sparse.bsr_array(
            (data, mask.nonzero()[1], indptr), shape=(mask.shape[0] * size, mask.shape[1] * size)
        )

    def to_block_mask(self, query_length: int, key_length: int) -> BlockMask:
        """The same layout for PyTorch's FlexAttention, batch 1 (it broadcasts), one entry a head.

        Args:
            query_length: ``L``, in tokens.
            key_length: ``S``, in tokens.

        Raises:
            ValueError: the layout does not fit these lengths.
        """
        from torch.nn.attention.flex_attention import BlockMask

        self._check_fits(query_length, key_length)
        counts = self.mask.sum(2, dtype=torch.int32)[None]
        # Kept columns first, in ascending order: a stable sort of "not kept".
        indices = torch.argsort((~self.mask).int(), dim=2, stable=True).int()[None]
        mask, size, shared = self.mask, self.block_size, self.num_heads == 1

        def kept(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return mask[head * 0 if shared else head, query // size, key // size]

        # All blocks are declared full: compiled, FlexAttention never evaluates the mask function, which is for its
        # uncompiled path.
        return BlockMask.from_kv_blocks(
            torch.zeros_like(counts),
            torch.zeros_like(indices),
            full_kv_num_blocks=counts,
            full_kv_indices=indices,
            BLOCK_SIZE=size,
            mask_mod=kept,
            seq_lengths=(query_length, key_length),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the layout as a safetensors file; an existing file is replaced whole or not at all."""
        metadata = {"format": FORMAT, "version": str(FORMAT_VERSION), "block_size": json.dumps(self.block_size)}
        save_tensors({"mask": self.mask.cpu().contiguous()}, path, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BlockLayout:
        """Read a layout that :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no layout, is cut short, or was written by a newer version.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no layout file at {path}")
        try:
            metadata, tensors = read_safetensors(path)
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} is a safetensors file, but not a layout written by BlockLayout.save")
            version = whole_number(metadata, "version")
            if version > FORMAT_VERSION:
                raise ValueError(
                    f"{path} has layout format {version}, this version of SAT reads up to {FORMAT_VERSION}; "
                    f"upgrade SAT to read it"
                )
            block_size, mask = whole_number(metadata, "block_size"), tensors.get("mask")
            if mask is None or mask.dtype != torch.bool or mask.dim() != 3 or 0 in mask.shape:
                raise DamagedFile("it holds no mask of bools, [heads, rows, columns]")
            return cls(mask, block_size)
        except DamagedFile as error:
            raise ValueError(
                f"{path} is not a whole layout file ({error}); write it again with BlockLayout.save"
            ) from error

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockLayout):
            return NotImplemented
        return self.block_size == other.block_size and torch.equal(self.mask.cpu(), other.mask.cpu())

    __hash__ = None  # type: ignore[assignment]  # holds a tensor: compared by content, so not hashable

    def __repr__(self) -> str:
        rows, columns = self.shape
        return (
            f"BlockLayout({self.num_heads} head{'s' if self.num_heads > 1 else ''}, {rows} x {columns} blocks of "
            f"{self.block_size}, density {self.density:.3f})"
        )


class LayoutsByLength:
    """The layouts of a structure, made where they are first asked for, and kept.

    The same object again for the same length and device: what operators have derived from a layout stays good.

    Args:
        structure: has a method ``layout(seq_len)`` that returns a :class:`BlockLayout`. If it also has ``block_size``,
            one layout serves all lengths of as many blocks.
    """

    def __init__(self, structure: Any) -> None:
        self.structure = structure
        self._kept: dict[tuple[int, int, torch.device], BlockLayout] = {}

    def get(self, length: int, num_heads: int, device: torch.device) -> BlockLayout:
        """The layout for a length in tokens; with a single head if all heads have the same.

        Raises:
            TypeError: the structure returns something else than a BlockLayout.
            ValueError: it has layouts for another number of heads.
        """
        place = -(-length // getattr(self.structure, "block_size", 1)), num_heads, device
        if place not in self._kept:
            self._kept[place] = self._make(length, num_heads, device)
        return self._kept[place]

    @torch.compiler.disable
    def _make(self, length: int, num_heads: int, device: torch.device) -> BlockLayout:
        with torch.inference_mode(False):  # a layout that evaluation made must serve training too
            layout = self.structure.layout(length)
            if not isinstance(layout, BlockLayout):
                raise TypeError(
                    f"{type(self.structure).__name__}.layout must return a BlockLayout, got {type(layout).__name__}"
                )
            if layout.num_heads not in (1, num_heads):
                raise ValueError(
                    f"the structure has layouts for {layout.num_heads} heads, but there are {num_heads}; make it for "
                    f"{num_heads} heads, or for 1 that all share"
                )
            return layout.shared().to(device)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}  # a copy makes its own


def _offsets(counts: Tensor) -> Tensor:
    """Running offsets ``[H, R+1]`` of the counts ``[H, R]``, through all heads."""
    ends = counts.flatten().cumsum(0).view_as(counts)
    return torch.cat([ends[:, :1] - counts[:, :1], ends], dim=1).int()
