"""Floor 0: which blocks of an attention matrix exist.

No attention and no learning here; every other room agrees on this one value.
"""

from __future__ import annotations

import json
import math
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sat.files import DamagedFile, read_safetensors, save_tensors, whole_number

if TYPE_CHECKING:
    import scipy.sparse
    from torch.nn.attention.flex_attention import BlockMask

FORMAT = "sat.BlockLayout"
FORMAT_VERSION = 2
# Blocks of a head, kept or not, that a file may say there are: three million tokens in blocks of 64.
LARGEST = 2**31
MOST_KEPT = 2**31 - 1
# Blocks of a mask whose kept ones are looked for at a time.
CHUNK = 2**20


class BlockLayout:
    """The kept blocks of an attention matrix, per head or shared by all heads.

    On the CPU a layout holds the compressed indices of its kept blocks, in the names of PyTorch's BSR and BSC tensors,
    and makes the boolean mask anew whenever it is asked for: it takes memory by the blocks that it keeps. On another
    device, inside ``torch.compile`` and with ``keep_mask`` it holds the mask, and the indices are derived on first use.
    Treat a layout as a value: do not write into its mask.

    Args:
        mask: ``[H, M, N]`` or ``[M, N]``, bool, True = the block is kept. ``H`` may be 1: shared by all heads. One that
            was expanded to its heads is read once.
        block_size: edge of a block in tokens. The last block row and column may be partial.
        keep_mask: hold on to this very mask, a module's buffer that is there in any case.

    Raises:
        TypeError: the mask is no bool tensor, or the block size no integer.
        ValueError: the mask has another number of dimensions or a dimension of 0, or the block size is below 1.
    """

    def __init__(self, mask: Tensor, block_size: int, *, keep_mask: bool = False) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            found = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"a BlockLayout is made from a torch.bool tensor, got {found}; convert it with mask.bool()")
        check_int("block_size", block_size, 1)
        if mask.dim() not in (2, 3) or 0 in mask.shape:
            raise ValueError(
                f"a BlockLayout mask is [heads, rows, columns] or [rows, columns] in blocks, none of them 0; "
                f"got the shape {list(mask.shape)}"
            )
        mask = mask.detach() if mask.dim() == 3 else mask.detach()[None]
        heads, rows, columns = mask.shape
        self._sizes = (heads, rows, columns)
        self.block_size = block_size
        # What operators have derived from the mask, kept for their next call.
        self.derived: dict[object, Any] = {}
        self._mask: Tensor | None = mask
        self._compressed: tuple[Tensor, Tensor] | None = None  # crow_indices and col_indices
        # Counted at once where no device has to be waited for: compiled functions then find a number, not a tensor.
        at_once = type(mask) is Tensor and mask.device.type == "cpu" and not torch.compiler.is_compiling()
        self._nnz = int(mask.count_nonzero()) if at_once and keep_mask else None
        if at_once and not keep_mask:
            alike = heads if mask.stride(0) == 0 else 1
            crow, col = _repeated(*_compress(mask[: heads // alike]), alike)
            self._mask, self._compressed, self._nnz = None, (crow, col), len(col)

    @classmethod
    def _of_indices(cls, crow: Tensor, col: Tensor, columns: int, block_size: int) -> BlockLayout:
        """A layout on the CPU from its ``crow_indices``, its ``col_indices`` and its number of block columns."""
        made = cls.__new__(cls)
        made._sizes, made.block_size = (crow.shape[0], crow.shape[1] - 1, columns), block_size
        made._mask, made._compressed, made._nnz, made.derived = None, (crow, col), len(col), {}
        return made

    @property
    def mask(self) -> Tensor:
        """``[H, M, N]``, bool, True = the block is kept; on the CPU a new tensor each time, see the class."""
        if self._mask is not None:
            return self._mask
        mask = torch.zeros(math.prod(self._sizes), dtype=torch.bool, device="cpu")
        return mask.index_fill_(0, self._rows * self.shape[1] + self.col_indices, True).view(self._sizes)

    @property
    def num_heads(self) -> int:
        """Number of layouts: the number of heads, or 1 when all heads share one."""
        return self._sizes[0]

    @property
    def shape(self) -> tuple[int, int]:
        """``(M, N)``: block rows and block columns."""
        return self._sizes[1:]

    @property
    def device(self) -> torch.device:
        """Where the layout lies."""
        return torch.device("cpu") if self._mask is None else self._mask.device

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
        return self.nnz / math.prod(self._sizes)

    @property
    def crow_indices(self) -> Tensor:
        """``[H, M+1]``, int32: where each block row's entries begin and end; offsets run through the heads."""
        return self._indices()[0]

    @property
    def col_indices(self) -> Tensor:
        """``[nnz]``, int32: the column of each kept block, in (head, row, column) order."""
        return self._indices()[1]

    def _indices(self) -> tuple[Tensor, Tensor]:
        if self._compressed is None:
            self._compressed = _compress(self.mask)
        return self._compressed

    @property
    def _rows(self) -> Tensor:
        """The row of each kept block, counted through the heads: int64 ``[nnz]``."""
        rows = torch.arange(self.num_heads * self.shape[0], device=self.device)
        return rows.repeat_interleave(self.crow_indices.diff(dim=1).flatten(), output_size=self.nnz)

    @cached_property
    def _transposed(self) -> tuple[Tensor, Tensor]:
        """Offsets and rows of the kept blocks in (head, column, row) order."""
        heads, rows, columns = self._sizes
        if (one := self.shared()) is not self:
            return _repeated(*one._transposed, heads)
        row = self._rows.int()
        order = (row // rows * columns + self.col_indices).sort(stable=True)
        return _offsets(order.values, heads, columns), (row % rows)[order.indices]

    @property
    def ccol_indices(self) -> Tensor:
        """``[H, N+1]``, int32: where each block column's entries begin and end; offsets run through the heads."""
        return self._transposed[0]

    @property
    def row_indices(self) -> Tensor:
        """``[nnz]``, int32: the row of each kept block, in (head, column, row) order."""
        return self._transposed[1]

    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout on another device."""
        if self._mask is None and torch.device(device).type == "cpu":
            return self
        moved = BlockLayout(self.mask.to(device), self.block_size)
        moved._nnz = self._nnz
        return moved

    def shared(self) -> BlockLayout:
        """The same layout with a single head if all of its heads are equal, which costs less to walk."""
        if self.num_heads == 1:
            return self
        counts = self.crow_indices.diff(dim=1)
        if not bool((counts == counts[:1]).all()):
            return self
        columns = self.col_indices.view(self.num_heads, -1)
        if not bool((columns == columns[:1]).all()):
            return self
        if self._mask is not None:
            return BlockLayout(self._mask[:1], self.block_size)
        return BlockLayout._of_indices(self.crow_indices[:1], columns[0].clone(), self.shape[1], self.block_size)

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
        import scipy.sparse

        if not 0 <= head < self.num_heads:
            raise IndexError(f"head {head} asked for, but the layout has the heads 0 to {self.num_heads - 1}")
        offsets = self.crow_indices[head].cpu().numpy()
        columns = self.col_indices[offsets[0] : offsets[-1]].cpu().numpy()
        data = np.ones((len(columns), self.block_size, self.block_size), dtype=bool)
        shape = (self.shape[0] * self.block_size, self.shape[1] * self.block_size)
        return scipy.sparse.bsr_array((data, columns, offsets - offsets[0]), shape=shape)

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
        rows, columns = self.shape
        counts, indices = _listed(self.crow_indices, self.col_indices, columns)
        q_counts, q_indices = _listed(self.ccol_indices, self.row_indices, rows)
        mask, size, shared = self.mask, self.block_size, self.num_heads == 1

        def kept(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return mask[head * 0 if shared else head, query // size, key // size]

        # All blocks are declared full: compiled, FlexAttention never evaluates the mask function, which is for its
        # uncompiled path.
        return BlockMask(
            seq_lengths=(query_length, key_length),
            kv_num_blocks=torch.zeros_like(counts),
            kv_indices=indices,
            full_kv_num_blocks=counts,
            full_kv_indices=indices,
            q_num_blocks=torch.zeros_like(q_counts),
            q_indices=q_indices,
            full_q_num_blocks=q_counts,
            full_q_indices=q_indices,
            BLOCK_SIZE=(size, size),
            mask_mod=kept,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the layout as a safetensors file of its indices; an existing file is replaced whole or not at all.

        Raises:
            ValueError: it has more blocks than :meth:`load` would believe.
        """
        if math.prod(self.shape) > LARGEST:
            rows, columns = self.shape
            raise ValueError(
                f"layout files are for up to {LARGEST} blocks a head, this one has {rows} x {columns}; use larger "
                f"blocks"
            )
        metadata = {
            "format": FORMAT,
            "version": str(FORMAT_VERSION),
            "block_size": json.dumps(self.block_size),
            "columns": json.dumps(self.shape[1]),
        }
        indices = {"crow_indices": self.crow_indices.cpu(), "col_indices": self.col_indices.cpu()}
        save_tensors(indices, path, metadata)

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
            if version > 1:
                columns = whole_number(metadata, "columns")
                crow, col = _check_indices(tensors.get("crow_indices"), tensors.get("col_indices"), columns)
                # Copies: the file may change while the layout is in use, and a mapped one would change with it.
                return cls._of_indices(crow.clone(), col.clone(), columns, block_size)
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
        if (self.block_size, self._sizes) != (other.block_size, other._sizes):
            return False
        return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(self._indices(), other._indices(), strict=True))

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
            if layout.num_heads != 1 and layout.num_heads != num_heads:
                raise ValueError(
                    f"the structure has layouts for {layout.num_heads} heads, but there are {num_heads}; make it for "
                    f"{num_heads} heads, or for 1 that all share"
                )
            return layout.shared().to(device)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}  # a copy makes its own


def check_int(name: str, value: object, minimum: int) -> None:
    """Refuse what is no integer of at least so much."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_is_layout(name: str, layout: object) -> None:
    """Refuse what is no layout, and say what makes one."""
    if isinstance(layout, BlockLayout):
        return
    hint = ""
    if isinstance(layout, Tensor):
        hint = "; make one by BlockLayout(mask, block_size)"
    elif callable(getattr(layout, "layout", None)):
        hint = "; make one for a length by its method layout(seq_len)"
    raise TypeError(f"{name} must be a BlockLayout, got {type(layout).__name__}{hint}")


def check_structure(name: str, structure: object) -> None:
    """Refuse what gives no layouts by length."""
    if not isinstance(structure, type) and callable(getattr(structure, "layout", None)):
        return
    got = structure.__name__ + " itself; make one of it" if isinstance(structure, type) else type(structure).__name__
    if isinstance(structure, BlockLayout):
        got += ", which is for one length; sat.ops.block_sparse_attention and AdaptiveAttention.set_layout take it"
    raise TypeError(
        f"{name} must be an object with a method layout(seq_len) that returns a BlockLayout, as those of sat.patterns, "
        f"got {got}"
    )


def _compress(mask: Tensor) -> tuple[Tensor, Tensor]:
    """``crow_indices`` and ``col_indices`` of a mask ``[H, M, N]``."""
    heads, rows, columns = mask.shape
    if type(mask) is not Tensor or mask.device.type != "cpu" or torch.compiler.is_compiling():
        kept = mask.flatten().nonzero()[:, 0]
        return _offsets(kept // columns, heads, rows), (kept % columns).int()
    # NumPy finds bools four times as fast; some rows at a time, since places take eight bytes each.
    found, ends = [], [np.zeros(1, np.int64)]
    every = mask.reshape(-1, columns).numpy()
    step = max(1, CHUNK // columns)
    for start in range(0, len(every), step):
        part = every[start : start + step]
        places = np.flatnonzero(part)
        found.append((places % columns).astype(np.int32))
        ends.append(ends[-1][-1] + np.searchsorted(places, np.arange(1, len(part) + 1) * columns))
    _check_count(int(ends[-1][-1]))
    offsets = torch.from_numpy(np.concatenate(ends)).int().unfold(0, rows + 1, rows).contiguous()
    return offsets, torch.from_numpy(np.concatenate(found))


def _repeated(offsets: Tensor, entries: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Offsets ``[1, R+1]`` and entries of one head for so many heads; those of more, for 1, as they are."""
    _check_count(heads * len(entries))
    before = torch.arange(heads, dtype=torch.int32, device=offsets.device)[:, None] * len(entries)
    return offsets + before, entries.repeat(heads)


def _check_count(blocks: int) -> None:
    """Refuse more kept blocks than offsets of 32 bits can count."""
    if blocks > MOST_KEPT:
        raise ValueError(
            f"the layout keeps {blocks:,} blocks, and at most {MOST_KEPT:,} can be counted; use larger blocks, a lower "
            f"density, or one layout for all heads"
        )


def _offsets(entries: Tensor, heads: int, rows: int) -> Tensor:
    """Where the rows ``[nnz]``, ascending and counted through the heads, begin and end: int32 ``[H, M+1]``."""
    every = torch.arange(heads * rows + 1, dtype=entries.dtype, device=entries.device)
    return torch.searchsorted(entries, every, out_int32=True).unfold(0, rows + 1, rows).contiguous()


def _listed(offsets: Tensor, entries: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """FlexAttention's form: how many entries each row has ``[1, H, R]``, and these, ``[1, H, R, width]``, then 0."""
    counts = offsets.diff(dim=1)
    lists = torch.zeros(*counts.shape, width, dtype=torch.int32, device=entries.device)
    lists[torch.arange(width, device=entries.device) < counts[..., None]] = entries
    return counts[None], lists[None]


def _check_indices(crow: Tensor | None, col: Tensor | None, columns: int) -> tuple[Tensor, Tensor]:
    """The indices of a file, which anyone may have written.

    Raises:
        DamagedFile: they are not those of a mask.
    """
    if crow is None or col is None or {crow.dtype, col.dtype} != {torch.int32} or (crow.dim(), col.dim()) != (2, 1):
        raise DamagedFile("it holds no indices of blocks, crow_indices [heads, rows + 1] and col_indices, of 32 bits")
    heads, rows = crow.shape[0], crow.shape[1] - 1
    if heads < 1 or not 1 <= rows * columns <= LARGEST:
        raise DamagedFile(f"it says that it has {heads} x {rows} x {columns} blocks, expected 1 to {LARGEST} a head")
    whole = crow[0, 0] == 0 and crow[-1, -1] == len(col) and (crow[1:, 0] == crow[:-1, -1]).all()
    if not whole or not (crow[:, 1:] >= crow[:, :-1]).all():
        raise DamagedFile("its crow_indices do not rise from 0 to the number of its blocks")
    rises = col[1:] > col[:-1]
    begins = crow[:, :-1].flatten()
    rises[begins[(begins > 0) & (begins < len(col))].long() - 1] = True  # from one row to the next it may fall
    if not rises.all() or not ((col >= 0) & (col < columns)).all():
        raise DamagedFile(f"its col_indices do not rise from 0 to {columns - 1} at most in each row")
    return crow, col
