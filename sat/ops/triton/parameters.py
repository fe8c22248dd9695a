"""Floor 1: launch parameters of the kernels, by kernel, block size, head dimension, dtype and architecture.

The tables hold what compiles with no or few spills on the architectures named there
(``python -m experiments.kernel_report``).
What ``python -m sat.ops.triton.tune`` has measured on this kind of GPU takes their place. Nothing is tuned unasked: the
first step of a training never waits for it.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from sat.files import written_whole
from sat.ops.triton.launch import BLOCK_SIZES, capability, matrix_precision, padded


class Tile(NamedTuple):
    """Launch parameters of one kernel."""

    rows: int  # queries of a tile
    columns: int  # keys of a tile
    warps: int
    stages: int  # steps of the loop whose loads are under way at a time


def _same(*tiles: Tile) -> dict[int, tuple[Tile, Tile]]:
    """Tiles by head dimension for a kernel that has no options."""
    return {width: (tile, tile) for width, tile in zip((64, 128, 256), tiles, strict=False)}


# By the padded head dimension (up to 64, 128, 256): a tile, and one for kernels with bias, dropout or pruned logits of
# 0, which need registers of their own. "wide" is for blocks of 128, "grouped" for those of 16 and 32. First Hopper in
# half precisions, then what differs elsewhere.
_HALF: dict[str, dict[int, tuple[Tile, Tile]]] = {
    "attention": {
        64: (Tile(64, 64, 4, 3), Tile(64, 32, 4, 3)),
        128: (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
        256: (Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)),
    },
    "attention grouped": {128: (Tile(64, 64, 4, 2), Tile(64, 16, 4, 2))},
    "attention wide": {
        64: (Tile(128, 128, 8, 3), Tile(64, 32, 4, 3)),
        128: (Tile(128, 64, 8, 3), Tile(64, 32, 4, 2)),
    },
    "query_gradient": {
        64: (Tile(64, 64, 4, 3), Tile(64, 32, 4, 3)),
        128: (Tile(64, 64, 4, 2), Tile(64, 16, 4, 3)),
        256: (Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
    },
    "query_gradient wide": {
        64: (Tile(128, 64, 8, 3), Tile(64, 32, 4, 2)),
        128: (Tile(64, 32, 4, 3), Tile(64, 16, 4, 3)),
    },
    "key_value_gradient": {
        64: (Tile(32, 64, 4, 3), Tile(32, 64, 8, 3)),
        128: (Tile(16, 64, 4, 3), Tile(32, 32, 8, 2)),
        256: (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    },
    "key_value_gradient grouped": {256: (Tile(16, 32, 8, 1), Tile(32, 32, 8, 2))},
    "sddmm": _same(Tile(64, 128, 4, 3), Tile(64, 128, 4, 2), Tile(64, 64, 8, 2)),
    "sddmm wide": _same(Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(64, 64, 8, 2)),
    "spmm": _same(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 32, 8, 2)),
    "spmm wide": _same(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
    "softmax": _same(Tile(16, 64, 4, 1), Tile(16, 64, 4, 1)),
}
_HALF_OLDER: dict[str, dict[int, tuple[Tile, Tile]]] = {
    "attention": {64: (Tile(64, 64, 4, 2), Tile(64, 32, 4, 3))},
    "attention wide": {128: (Tile(128, 32, 8, 3), Tile(64, 32, 4, 2))},
    "query_gradient": {
        64: (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
        128: (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
        256: (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    },
    "key_value_gradient": {64: (Tile(32, 64, 4, 2), Tile(32, 32, 4, 2))},
}
_HALF_BLACKWELL: dict[str, dict[int, tuple[Tile, Tile]]] = {
    "attention": {
        64: (Tile(64, 64, 4, 3), Tile(64, 32, 4, 2)),
        128: (Tile(64, 64, 4, 3), Tile(64, 32, 4, 2)),
    },
    "query_gradient": {256: (Tile(64, 32, 8, 1), Tile(32, 32, 8, 2))},
    "query_gradient wide": {64: (Tile(128, 64, 8, 2), Tile(64, 32, 4, 2))},
    "key_value_gradient": {128: (Tile(16, 64, 8, 2), Tile(32, 32, 8, 2))},
    "sddmm": {256: (Tile(64, 64, 8, 1), Tile(64, 64, 8, 1))},
    "sddmm wide": {256: (Tile(64, 64, 8, 1), Tile(64, 64, 8, 1))},
}
# float32, whose exact products are made without matrix units.
_SINGLE: dict[str, dict[int, tuple[Tile, Tile]]] = {
    "attention": {
        64: (Tile(32, 32, 4, 2), Tile(16, 16, 4, 2)),
        128: (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
        256: (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
    },
    "query_gradient": {
        64: (Tile(32, 32, 8, 2), Tile(32, 16, 4, 2)),
        128: (Tile(32, 16, 4, 3), Tile(16, 16, 4, 2)),
        256: (Tile(16, 16, 4, 1), Tile(16, 16, 4, 2)),
    },
    "key_value_gradient": {
        64: (Tile(16, 32, 4, 2), Tile(16, 16, 4, 3)),
        128: (Tile(16, 32, 4, 2), Tile(16, 32, 4, 2)),
        256: (Tile(16, 16, 4, 2), Tile(16, 16, 4, 2)),
    },
    "sddmm": _same(Tile(32, 64, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 8, 2)),
    "spmm": _same(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 8, 2)),
    "softmax": _same(Tile(16, 64, 4, 1), Tile(16, 64, 4, 1)),
}

_SINGLE_OLDER: dict[str, dict[int, tuple[Tile, Tile]]] = {
    "query_gradient": {64: (Tile(32, 16, 4, 2), Tile(16, 16, 4, 2))},
}


def _default(kernel: str, block_size: int, dim: int, half: bool, major: int, heavy: bool) -> Tile:
    width = max(64, padded(dim))
    # Blackwell's consumer cards are 12.x, and have the matrix units and the shared memory of older ones.
    differing = {9: {}, 10: _HALF_BLACKWELL}.get(major, _HALF_OLDER)
    tables = [differing, _HALF] if half else [{} if major in (9, 10) else _SINGLE_OLDER, _SINGLE]
    special = "wide" if block_size == 128 else "grouped" if block_size < 64 else ""
    for name in (f"{kernel} {special}", kernel):
        for table in tables:
            if width in table.get(name, {}):
                return table[name][width][heavy]
    raise KeyError(kernel)


def tuned_file() -> Path:
    """Where measured launch parameters are kept: ``$SAT_TUNING``, or a file in the user's cache folder."""
    if "SAT_TUNING" in os.environ:
        return Path(os.environ["SAT_TUNING"])
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111  a user may have no home
    return Path(cache) / "sat" / "launch_parameters.json"


def case_name(kernel: str, block_size: int, dim: int, dtype: torch.dtype, heavy: bool) -> str:
    """The name of a case in the tuned file."""
    numbers = "half" if dtype.itemsize == 2 else {"ieee": "float32"}.get(matrix_precision(dtype), "tf32")
    return f"{kernel}, blocks of {block_size}, head dimension {padded(dim)}, {numbers}{', heavy' if heavy else ''}"


def load_tuned() -> dict[str, dict[str, Tile]]:
    """Measured launch parameters by GPU name and case; none where nothing was tuned.

    Raises:
        ValueError: the file is not what the tuner writes.
    """
    path = tuned_file()
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = {name: {case: Tile(*map(int, tile)) for case, tile in cases.items()} for name, cases in content.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} does not hold launch parameters ({error}); delete it, or write it anew with "
            f"python -m sat.ops.triton.tune"
        ) from error
    for case, tile in [item for cases in found.values() for item in cases.items()]:
        possible = {tile.rows, tile.columns} <= {16, 32, 64, 128} and tile.warps in (1, 2, 4, 8, 16)
        if not possible or tile.stages not in range(1, 9):
            raise ValueError(f"{path}: {case!r} has impossible launch parameters {list(tile)}; delete that line")
    return found


def save_tuned(device_name: str, cases: dict[str, Tile]) -> Path:
    """Keep measured launch parameters beside those of other cases and GPUs."""
    path = tuned_file()
    content = _load_or_warn()
    content.setdefault(device_name, {}).update(cases)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        Path(temporary).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _TUNED.clear()
    _TUNED.update(content)
    return path


def _load_or_warn() -> dict[str, dict[str, Tile]]:
    """What was measured; where its file cannot be read, the table does, and a warning says so."""
    try:
        return load_tuned()
    except (OSError, ValueError) as error:
        warnings.warn(f"measured launch parameters are not used: {error}", stacklevel=2)
        return {}


# Read once, so that compiled functions find a value and not a file.
_TUNED = _load_or_warn()


def tile(kernel: str, block_size: int, dim: int, dtype: torch.dtype, device: torch.device, heavy: bool = False) -> Tile:
    """Launch parameters for a case; ``heavy`` are kernels with bias, dropout or pruned logits of 0."""
    if _TUNED and device.type == "cuda":
        case = case_name(kernel, block_size, dim, dtype, heavy)
        found = _TUNED.get(torch.cuda.get_device_name(device), {}).get(case)
        if found is not None:
            return found
    return _default(kernel, block_size, dim, dtype.itemsize == 2, capability(device)[0], heavy)


# The kernels of fused attention, in the order of their tiles in ``attention_tiles``.
ATTENTION_KERNELS = ("attention", "query_gradient", "key_value_gradient")


@torch.compiler.assume_constant_result
def _attention_tiles(block_size: int, dim: int, dtype: torch.dtype, device: torch.device, heavy: bool) -> list[int]:
    return [number for name in ATTENTION_KERNELS for number in tile(name, block_size, dim, dtype, device, heavy)]


def attention_tiles(block_size: int, dim: int, dtype: torch.dtype, device: torch.device, heavy: bool) -> list[int]:
    """The tiles of the three kernels of fused attention, one after the other."""
    # Compared with numbers, sizes that a compiler keeps open become numbers.
    size = next(size for size in BLOCK_SIZES if size == block_size)
    width = next(width for width in (16, 32, 64, 128, 256) if dim <= width)
    return _attention_tiles(size, width, dtype, device, heavy)
