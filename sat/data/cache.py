"""Floor 3, data: prepared tokens on disk, so that decoding happens once. Tensors and strings only, never code."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sat.files import save_tensors

FORMAT = "sat.data"
FORMAT_VERSION = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A data set as tokens.

    Args:
        splits: "train" and, where the source has them, "validation" and "test"; each a dict of tensors, among them
            ``labels`` int64 ``[n]``.
        class_names: one name a class, or nothing when the source has no names.
    """

    splits: dict[str, dict[str, Tensor]]
    class_names: list[str]


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/sat``, or ``~/.cache/sat``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sat"


def cached(cache_dir: Path, name: str, identity: object, prepare: Callable[[], Prepared]) -> Prepared:
    """What ``prepare`` returns, from disk when it was written there before for the same ``identity``.

    A file that is cut short or damaged is written anew, with a sentence in the log.

    Raises:
        PermissionError: nothing can be written to the cache folder.
        OSError: its disk is full.
    """
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, name, identity]).encode()).hexdigest()[:20]
    file = cache_dir / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{digest}.safetensors"
    if file.is_file():
        try:
            return _read(file)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            logger.warning("%s is damaged (%s); %s is prepared anew", file, error, name)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        probe = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        probe.touch()  # before the work, not after it
        probe.unlink()
    except OSError as error:
        raise PermissionError(
            f"the prepared copy of {name} cannot be written to {cache_dir} ({error.strerror}); pass a writable folder "
            f"as --data.cache_dir"
        ) from error
    prepared = prepare()
    _write(file, prepared)
    logger.info("prepared %s, kept in %s", name, file)
    return prepared


def _write(file: Path, prepared: Prepared) -> None:
    tensors = {f"{split}.{key}": value for split, part in prepared.splits.items() for key, value in part.items()}
    metadata = {
        "format": FORMAT,
        "class_names": json.dumps(prepared.class_names),
        "checksums": json.dumps({key: _checksum(value) for key, value in tensors.items()}),
    }
    save_tensors(tensors, file, metadata)


def _read(file: Path) -> Prepared:
    splits: dict[str, dict[str, Tensor]] = {}
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
        for name, checksum in json.loads(metadata["checksums"]).items():
            split, _, key = name.partition(".")
            tensor = opened.get_tensor(name)
            if _checksum(tensor) != checksum:
                raise ValueError(f"wrong checksum of {name}")
            splits.setdefault(split, {})[key] = tensor
    return Prepared(splits, json.loads(metadata["class_names"]))


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data)
