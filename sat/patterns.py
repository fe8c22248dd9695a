"""Floor 1: fixed structures. A length in tokens goes in, a BlockLayout comes out.

The structures are those of DeepSpeed Sparse Attention, with its parameters, its defaults and its blocks. They differ
where it let tokens see their future: what is unidirectional here never has a block above the diagonal. A structure of
your own needs no base class, only a method ``layout(seq_len)``.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sat.layout import BlockLayout, check_int

__all__ = ["BigBird", "Dense", "Fixed", "Longformer", "SlidingWindow", "Structure", "Variable", "from_deepspeed"]

Attention = Literal["bidirectional", "unidirectional"]


def _accepts_block(init: Callable[..., None]) -> Callable[..., None]:
    """Let a constructor take ``block=``, as DeepSpeed spells ``block_size``."""

    @functools.wraps(init)
    def renamed(self: Any, *args: Any, block: int | None = None, **keywords: Any) -> None:
        if block is not None:
            block_size = args[1] if len(args) > 1 else keywords.get("block_size", block)
            if block_size != block:
                raise ValueError(
                    f"block is DeepSpeed's name of block_size, but block_size={block_size!r} and block={block!r} were "
                    f"given; give one of them"
                )
            if len(args) < 2:
                keywords["block_size"] = block
        init(self, *args, **keywords)

    return renamed


class _Structure:
    """What all structures share: their checks, and the way from a mask to a layout."""

    def __init__(self, num_heads: int, block_size: int, different_layout_per_head: bool, attention: Attention) -> None:
        check_int("num_heads", num_heads, minimum=1)
        check_int("block_size", block_size, minimum=1)
        _check_bool("different_layout_per_head", different_layout_per_head)
        if attention not in ("bidirectional", "unidirectional"):
            raise ValueError(f"attention must be 'bidirectional' or 'unidirectional', got {attention!r}")
        self.num_heads, self.block_size = num_heads, block_size
        self.different_layout_per_head, self.attention = different_layout_per_head, attention

    @property
    def is_causal(self) -> bool:
        """Whether ``attention`` is unidirectional; what ``block_sparse_attention`` is to get as ``is_causal``."""
        return self.attention == "unidirectional"

    def layout(self, seq_len: int) -> BlockLayout:
        """The blocks of an attention matrix of ``seq_len`` x ``seq_len`` tokens.

        Args:
            seq_len: tokens, any number from 1 on. The last block may be partial.

        Returns:
            A layout on the CPU with the mask ``[num_heads, M, M]``, ``M = ceil(seq_len / block_size)``; the same one on
            every call. Where attention is unidirectional, no block lies above the diagonal; inside the blocks on the
            diagonal it is ``is_causal`` of ``block_sparse_attention`` that hides the future.

        Raises:
            TypeError, ValueError: ``seq_len`` is no integer or below 1, or a row has fewer blocks than are to be drawn.
        """
        check_int("seq_len", seq_len, minimum=1)
        with torch.device("cpu"):
            mask = self._mask(-(-seq_len // self.block_size))
            if self.is_causal:
                mask = mask.tril_()
            return BlockLayout(mask.expand(self.num_heads, -1, -1), self.block_size)

    def _mask(self, blocks: int) -> Tensor:
        """The mask ``[1, M, M]`` if all heads share it, else ``[num_heads, M, M]``."""
        raise NotImplementedError

    def _random(self, blocks: int, count: int, seed: int) -> Tensor:
        """``count`` distinct random columns a row; in causal rows with fewer, all up to the diagonal."""
        if count > blocks:
            raise ValueError(
                f"num_random_blocks is {count}, but a row has only {blocks} block{'s' * (blocks > 1)} of "
                f"{self.block_size} tokens here; use longer sequences, smaller blocks or fewer random ones"
            )
        heads = self.num_heads if self.different_layout_per_head else 1
        mask = torch.zeros(heads, blocks, blocks, dtype=torch.bool)
        candidates = torch.arange(1, blocks + 1) if self.is_causal else torch.full((blocks,), blocks)
        generator = torch.Generator().manual_seed(seed)
        # Head after head, so that head 0 has the layout that all heads share where they have none of their own. Floyd's
        # sampling, all rows at once: draw among the first n - count + 1 columns, then among one more each time; who
        # draws what the row already has takes the newest column instead.
        for own in mask:
            for step in range(count):
                newest = ((candidates - count).clamp(min=0) + step).minimum(candidates - 1)[:, None]
                drawn = torch.randint(2**62, (blocks, 1), generator=generator) % (newest + 1)
                own.scatter_(1, torch.where(own.gather(1, drawn), newest, drawn), True)
        return mask

    def __repr__(self) -> str:
        names = inspect.signature(type(self)).parameters
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


class Dense(_Structure):
    """Every block.

    Source: ``DenseSparsityConfig`` of DeepSpeed.

    Args:
        num_heads: ``H``.
        block_size: edge of a block in tokens; ``block=`` by keyword means the same.
        different_layout_per_head: has no effect here.

    Raises:
        TypeError, ValueError: an argument is of another type or out of range.
    """

    @_accepts_block
    def __init__(self, num_heads: int, block_size: int = 16, different_layout_per_head: bool = False) -> None:
        super().__init__(num_heads, block_size, different_layout_per_head, "bidirectional")

    def _mask(self, blocks: int) -> Tensor:
        return torch.ones(1, blocks, blocks, dtype=torch.bool)


class Fixed(_Structure):
    """Windows of blocks that see each other; the last blocks of each window are seen by all.

    Source: ``FixedSparsityConfig`` of DeepSpeed, after Child et al., "Generating Long Sequences with Sparse
    Transformers", 2019.

    Args:
        num_heads: ``H``.
        block_size: edge of a block in tokens; ``block=`` by keyword means the same.
        different_layout_per_head: False gives all heads the layout of head 0.
        num_local_blocks: blocks of a window. The last window may be shorter.
        num_global_blocks: consecutive blocks of each window that all rows see; divides ``num_local_blocks``.
        attention: ``"bidirectional"``, or ``"unidirectional"`` for the lower triangle.
        horizontal_global_attention: these blocks also see all others; only if bidirectional.
        num_different_global_patterns: head ``h`` takes the global blocks ``h % num_different_global_patterns`` places
            before the last; more than 1 only with different layouts per head.

    Raises:
        TypeError, ValueError: an argument is of another type or out of range, or they do not go together.
    """

    @_accepts_block
    def __init__(
        self,
        num_heads: int,
        block_size: int = 16,
        different_layout_per_head: bool = False,
        num_local_blocks: int = 4,
        num_global_blocks: int = 1,
        attention: Attention = "bidirectional",
        horizontal_global_attention: bool = False,
        num_different_global_patterns: int = 1,
    ) -> None:
        super().__init__(num_heads, block_size, different_layout_per_head, attention)
        check_int("num_local_blocks", num_local_blocks, minimum=1)
        check_int("num_global_blocks", num_global_blocks, minimum=1)
        check_int("num_different_global_patterns", num_different_global_patterns, minimum=1)
        if num_local_blocks % num_global_blocks:
            raise ValueError(
                f"num_local_blocks must be a multiple of num_global_blocks, got {num_local_blocks} and "
                f"{num_global_blocks}"
            )
        _check_horizontal(horizontal_global_attention, attention)
        if num_different_global_patterns > 1 and not different_layout_per_head:
            raise ValueError(
                f"num_different_global_patterns={num_different_global_patterns} needs a layout for each head; set "
                f"different_layout_per_head=True"
            )
        places = num_local_blocks // num_global_blocks
        if num_different_global_patterns > places:
            raise ValueError(
                f"num_different_global_patterns must be at most num_local_blocks / num_global_blocks = {places}, the "
                f"places in a window, got {num_different_global_patterns}"
            )
        self.num_local_blocks, self.num_global_blocks = num_local_blocks, num_global_blocks
        self.horizontal_global_attention = horizontal_global_attention
        self.num_different_global_patterns = num_different_global_patterns

    def _mask(self, blocks: int) -> Tensor:
        index, patterns = torch.arange(blocks), torch.arange(self.num_different_global_patterns)
        first = self.num_local_blocks - (1 + patterns[:, None]) * self.num_global_blocks
        place, whole = index % self.num_local_blocks, blocks - blocks % self.num_local_blocks
        is_global = (place >= first) & (place < first + self.num_global_blocks)
        if whole < blocks:
            # In a last window that is too short for its global blocks, these move back, even out of it.
            start = (whole + first).clamp(max=blocks - self.num_global_blocks)
            is_global |= (index >= start) & (index < start + self.num_global_blocks)
        window = index // self.num_local_blocks
        mask = _with_globals(window[:, None] == window, is_global, rows=self.horizontal_global_attention)
        return mask if len(patterns) == 1 else mask[torch.arange(self.num_heads) % len(patterns)]


class Variable(_Structure):
    """Windows of several sizes, chosen global blocks, and random blocks.

    Source: ``VariableSparsityConfig`` of DeepSpeed. Unlike there, unidirectional rows draw their random blocks up to
    the diagonal.

    Args:
        num_heads: ``H``.
        block_size: edge of a block in tokens; ``block=`` by keyword means the same.
        different_layout_per_head: False gives all heads the layout of head 0; True draws random blocks for each head.
        num_random_blocks: distinct random blocks a row; they may fall on blocks that are kept anyway.
        local_window_blocks: sizes of the first windows, in blocks; the last size repeats to the end.
        global_block_indices: blocks that all rows see; those behind the end of a sequence are left out.
        global_block_end_indices: makes each of them a range, from its index to this end (exclusive).
        attention: ``"bidirectional"``, or ``"unidirectional"`` for the lower triangle.
        horizontal_global_attention: global blocks also see all others; only if bidirectional.
        seed: of the random blocks. One seed gives one layout a length; PyTorch's own random state is left alone.

    Raises:
        TypeError, ValueError: an argument is of another type or out of range, or they do not go together.
    """

    @_accepts_block
    def __init__(
        self,
        num_heads: int,
        block_size: int = 16,
        different_layout_per_head: bool = False,
        num_random_blocks: int = 0,
        local_window_blocks: Sequence[int] = (4,),
        global_block_indices: Sequence[int] = (0,),
        global_block_end_indices: Sequence[int] | None = None,
        attention: Attention = "bidirectional",
        horizontal_global_attention: bool = False,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(num_heads, block_size, different_layout_per_head, attention)
        check_int("num_random_blocks", num_random_blocks, minimum=0)
        self.num_random_blocks = num_random_blocks
        self.local_window_blocks = _checked_ints("local_window_blocks", local_window_blocks, minimum=1)
        if not self.local_window_blocks:
            raise ValueError("local_window_blocks is empty; name the size of one window at least, such as [4]")
        self.global_block_indices, self.global_block_end_indices = _checked_ranges(
            global_block_indices, global_block_end_indices
        )
        _check_horizontal(horizontal_global_attention, attention)
        self.horizontal_global_attention = horizontal_global_attention
        check_int("seed", seed, minimum=0)
        self.seed = seed

    def _mask(self, blocks: int) -> Tensor:
        index = torch.arange(blocks)
        ends = torch.tensor(self.local_window_blocks).cumsum(0)
        repeated = (index - ends[-1]).div(self.local_window_blocks[-1], rounding_mode="floor").clamp(min=0)
        window = torch.searchsorted(ends, index, right=True) + repeated
        is_global = _in_ranges(index, self.global_block_indices, self.global_block_end_indices)
        mask = _with_globals(window[:, None] == window, is_global, rows=self.horizontal_global_attention)
        return (
            self._random(blocks, self.num_random_blocks, self.seed).logical_or_(mask)
            if self.num_random_blocks
            else mask
        )


class BigBird(_Structure):
    """A sliding window, global blocks at the start, and random blocks.

    Source: ``BigBirdSparsityConfig`` of DeepSpeed, after Zaheer et al., "Big Bird: Transformers for Longer Sequences",
    2020.

    Args:
        num_heads: ``H``.
        block_size: edge of a block in tokens; ``block=`` by keyword means the same.
        different_layout_per_head: False gives all heads the layout of head 0; True draws random blocks for each head.
        num_random_blocks: distinct random blocks a row; they may fall on blocks that are kept anyway. Unidirectional
            rows draw them up to the diagonal, so there it is 1 at most: the first row has no more.
        num_sliding_window_blocks: ``w``; a row sees the ``w // 2`` blocks on either side and its own.
        num_global_blocks: the first blocks, which see all others and are seen by all.
        attention: ``"bidirectional"``, or ``"unidirectional"`` for the lower triangle.
        seed: of the random blocks. One seed gives one layout a length; PyTorch's own random state is left alone.

    Raises:
        TypeError, ValueError: an argument is of another type or out of range.
    """

    @_accepts_block
    def __init__(
        self,
        num_heads: int,
        block_size: int = 16,
        different_layout_per_head: bool = False,
        num_random_blocks: int = 1,
        num_sliding_window_blocks: int = 3,
        num_global_blocks: int = 1,
        attention: Attention = "bidirectional",
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(num_heads, block_size, different_layout_per_head, attention)
        check_int("num_random_blocks", num_random_blocks, minimum=0)
        if attention == "unidirectional" and num_random_blocks > 1:
            raise ValueError(
                f"num_random_blocks is {num_random_blocks}, but a unidirectional row draws from the blocks up to its "
                f"own, and the first row has only that one; give 0 or 1 (in Variable such rows take what there is)"
            )
        check_int("num_sliding_window_blocks", num_sliding_window_blocks, minimum=1)
        check_int("num_global_blocks", num_global_blocks, minimum=0)
        check_int("seed", seed, minimum=0)
        self.num_random_blocks, self.num_sliding_window_blocks = num_random_blocks, num_sliding_window_blocks
        self.num_global_blocks, self.seed = num_global_blocks, seed

    def _mask(self, blocks: int) -> Tensor:
        is_global = torch.arange(blocks) < self.num_global_blocks
        mask = _with_globals(_window(blocks, self.num_sliding_window_blocks), is_global, rows=True)
        return (
            self._random(blocks, self.num_random_blocks, self.seed).logical_or_(mask)
            if self.num_random_blocks
            else mask
        )


class Longformer(_Structure):
    """A sliding window, and global blocks that see all others and are seen by all.

    Source: ``BSLongformerSparsityConfig`` of DeepSpeed, after Beltagy et al., "Longformer: The Long-Document
    Transformer", 2020, in whole blocks.

    Args:
        num_heads: ``H``.
        block_size: edge of a block in tokens; ``block=`` by keyword means the same.
        different_layout_per_head: has no effect here: all heads have one layout.
        num_sliding_window_blocks: ``w``; a row sees the ``w // 2`` blocks on either side and its own.
        global_block_indices: the global blocks; those behind the end of a sequence are left out.
        global_block_end_indices: makes each of them a range, from its index to this end (exclusive).
        attention: ``"bidirectional"``, or ``"unidirectional"`` for the lower triangle.

    Raises:
        TypeError, ValueError: an argument is of another type or out of range, or they do not go together.
    """

    @_accepts_block
    def __init__(
        self,
        num_heads: int,
        block_size: int = 16,
        different_layout_per_head: bool = False,
        num_sliding_window_blocks: int = 3,
        global_block_indices: Sequence[int] = (0,),
        global_block_end_indices: Sequence[int] | None = None,
        attention: Attention = "bidirectional",
    ) -> None:
        super().__init__(num_heads, block_size, different_layout_per_head, attention)
        check_int("num_sliding_window_blocks", num_sliding_window_blocks, minimum=1)
        self.num_sliding_window_blocks = num_sliding_window_blocks
        self.global_block_indices, self.global_block_end_indices = _checked_ranges(
            global_block_indices, global_block_end_indices
        )

    def _mask(self, blocks: int) -> Tensor:
        is_global = _in_ranges(torch.arange(blocks), self.global_block_indices, self.global_block_end_indices)
        return _with_globals(_window(blocks, self.num_sliding_window_blocks), is_global, rows=True)


class SlidingWindow(_Structure):
    """A sliding window and nothing else; unidirectional unless told otherwise.

    Source: ``LocalSlidingWindowSparsityConfig`` of DeepSpeed.

    Args:
        num_heads: ``H``. All heads have one layout.
        block_size: edge of a block in tokens; ``block=`` by keyword means the same.
        num_sliding_window_blocks: ``w``; a row sees its own block and ``w // 2`` before it, bidirectionally also
            ``w // 2`` behind it.
        attention: ``"unidirectional"`` or ``"bidirectional"``.

    Raises:
        TypeError, ValueError: an argument is of another type or out of range.
    """

    @_accepts_block
    def __init__(
        self,
        num_heads: int,
        block_size: int = 16,
        num_sliding_window_blocks: int = 3,
        attention: Attention = "unidirectional",
    ) -> None:
        super().__init__(num_heads, block_size, False, attention)
        check_int("num_sliding_window_blocks", num_sliding_window_blocks, minimum=1)
        self.num_sliding_window_blocks = num_sliding_window_blocks

    def _mask(self, blocks: int) -> Tensor:
        return _window(blocks, self.num_sliding_window_blocks)[None]


Structure = Dense | Fixed | Variable | BigBird | Longformer | SlidingWindow

_MODES: dict[str, type[Structure]] = {
    "dense": Dense,
    "fixed": Fixed,
    "variable": Variable,
    "bigbird": BigBird,
    "bslongformer": Longformer,
    "local_sliding_window": SlidingWindow,
    "local": SlidingWindow,
}


def from_deepspeed(config: Mapping[str, Any], num_heads: int, *, seed: int = 0) -> Structure:
    """The structure that a DeepSpeed configuration asks for.

    What the section leaves out takes the default of DeepSpeed's configuration files: for ``bigbird`` these have no
    random blocks, where ``BigBird`` has one a row. ``attention`` counts in every mode that has it; DeepSpeed read over
    it for ``bigbird`` and ``bslongformer``. A layout is causal by whole blocks: where ``is_causal`` of the structure is
    True, give ``is_causal=True`` to ``block_sparse_attention``, which then is exact inside the blocks on the diagonal.

    Args:
        config: the section ``sparse_attention`` of a DeepSpeed JSON file as it is, or the whole file's dictionary.
            ``mode`` is ``"fixed"`` unless it says otherwise.
        num_heads: ``H``.
        seed: of random blocks, for which DeepSpeed's files have no key.

    Raises:
        TypeError: the configuration or its section is no mapping, or a value is of another type.
        ValueError: the mode or a key is unknown, or a value is out of range.

    Warns:
        UserWarning: a key that DeepSpeed knows has no effect in this mode.
    """
    section = config.get("sparse_attention", config) if isinstance(config, Mapping) else config
    if not isinstance(section, Mapping):
        raise TypeError(
            f"the section sparse_attention of a DeepSpeed configuration must be a mapping of names to values, got "
            f"{type(section).__name__}; read a file with json.load"
        )
    mode = section.get("mode", "fixed")
    if not isinstance(mode, str) or mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, _MODES))}, got {mode!r}{_closest(mode, [*_MODES])}")
    keys = {name: _deepspeed_keys(structure) for name, structure in _MODES.items()}
    known = [*dict.fromkeys(["mode", *(key for own in keys.values() for key in own)])]
    for key in section:
        if key not in known:
            raise ValueError(
                f"sparse_attention has no key {key!r}{_closest(key, known)}; its keys are {', '.join(known)}"
            )
    arguments: dict[str, Any] = {"num_random_blocks": 0} if mode == "bigbird" else {}
    for key, value in section.items():
        if key in keys[mode]:
            arguments["block_size" if key == "block" else key] = value
        elif key != "mode":
            readers = ", ".join(repr(name) for name, own in keys.items() if key in own)
            hint = "; for causal attention give is_causal=True to it" * (value == "unidirectional")
            warnings.warn(
                f"{key}={value!r} in sparse_attention has no effect here: the mode is {mode!r}, and {key} is for "
                f"{readers} only{hint}",
                stacklevel=2,
            )
    if "seed" in inspect.signature(_MODES[mode]).parameters:
        arguments["seed"] = seed
    return _MODES[mode](num_heads, **arguments)


def _deepspeed_keys(structure: type) -> list[str]:
    """Names by which DeepSpeed's files set the parameters of a structure."""
    names = [*inspect.signature(structure).parameters]
    return ["block" if name == "block_size" else name for name in names if name not in ("num_heads", "seed")]


def _closest(name: object, names: list[str]) -> str:
    """A suggestion for a misspelt name, if one is near."""
    found = difflib.get_close_matches(str(name), names, n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def _window(blocks: int, size: int) -> Tensor:
    """``[M, M]``: ``size // 2`` blocks on either side of the diagonal, and the diagonal."""
    return torch.ones(blocks, blocks, dtype=torch.bool).tril(size // 2).triu(-(size // 2))


def _in_ranges(index: Tensor, starts: Sequence[int], ends: Sequence[int] | None) -> Tensor:
    """``[M]``: which blocks lie in one of the ranges; a range without an end is a single block."""
    first = torch.tensor(starts, dtype=torch.int64)[:, None]
    end = first + 1 if ends is None else torch.tensor(ends, dtype=torch.int64)[:, None]
    return ((index >= first) & (index < end)).any(0)


def _with_globals(local: Tensor, is_global: Tensor, *, rows: bool) -> Tensor:
    """``[P, M, M]``: local blocks ``[M, M]`` and global columns, ``[M]`` or ``[P, M]``; also as rows, if asked for."""
    is_global = is_global.reshape(-1, 1, len(local))
    mask = local | is_global
    return mask.logical_or_(is_global.mT) if rows else mask


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _checked_ints(name: str, values: object, minimum: int) -> tuple[int, ...]:
    """A tuple of integers from a list or tuple of them."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} must be a list of integers such as [4], got {values!r}")
    for place, value in enumerate(values):
        check_int(f"{name}[{place}]", value, minimum)
    return tuple(values)


def _checked_ranges(starts: object, ends: object) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Global block indices and, if there are any, their ends."""
    first = _checked_ints("global_block_indices", starts, minimum=0)
    if ends is None:
        return first, None
    last = _checked_ints("global_block_end_indices", ends, minimum=0)
    if len(first) != len(last):
        raise ValueError(
            f"global_block_end_indices must have an end for each of the {len(first)} global_block_indices, got "
            f"{len(last)}"
        )
    for start, end in zip(first, last, strict=True):
        if start >= end:
            raise ValueError(
                f"each of global_block_end_indices must be above its start in global_block_indices, got the start "
                f"{start} and the end {end}"
            )
    return first, last


def _check_horizontal(horizontal: object, attention: str) -> None:
    _check_bool("horizontal_global_attention", horizontal)
    if horizontal and attention == "unidirectional":
        raise ValueError(
            "horizontal_global_attention=True needs attention='bidirectional': rows that see everything see the future"
        )
