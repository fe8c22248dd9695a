"""Floor 3, data: prepared tokens on disk, so that decoding happens once. Tensors and strings only, never code."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sat.files import DamagedFile, read_safetensors, reason, save_tensors, shortened

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


def cached(
    cache_dir: Path,
    name: str,
    identity: object,
    prepare: Callable[[], Prepared],
    check: Callable[[Prepared], None] = lambda _: None,
) -> Prepared:
    """What ``prepare`` returns, from disk when it was written there before for the same ``identity``.

    A file that is cut short or damaged, or whose content ``check`` refuses with a ValueError, is written anew, with a
    sentence in the log.

    Raises:
        PermissionError: nothing can be written to the cache folder.
        OSError: its disk is full.
    """
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, name, identity]).encode()).hexdigest()[:20]
    file = cache_dir / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{digest}.safetensors"
    if file.is_file():
        try:
            prepared = _read(file)
            check(prepared)
            return prepared
        except ValueError as error:
            logger.warning("%s is damaged (%s); %s is prepared anew", file, error, name)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        probe = file.with_name(f".{file.name}.{secrets.token_hex(6)}.tmp")
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
    """What :func:`_write` wrote.

    Raises:
        ValueError: it is cut short, damaged or something else; the reason alone.
    """
    metadata, tensors = read_safetensors(file)
    try:
        checksums, class_names = (json.loads(metadata.get(name, "null")) for name in ("checksums", "class_names"))
    except RecursionError as error:
        raise DamagedFile(reason(error)) from error
    if not isinstance(checksums, dict) or checksums.keys() != tensors.keys():
        raise DamagedFile("it has checksums of other tensors than it holds")
    if not isinstance(class_names, list) or not all(isinstance(each, str) for each in class_names):
        raise DamagedFile("its names of classes are no list of names")
    splits: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if _checksum(tensor) != checksums[name]:
            raise DamagedFile(f"wrong checksum of {shortened(name)}")
        split, _, key = name.partition(".")
        splits.setdefault(split, {})[key] = tensor
    return Prepared(splits, class_names)


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
