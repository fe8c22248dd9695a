"""Below all floors: files that are written whole or not at all, and read with a sentence for whatever they hold."""

from __future__ import annotations

import errno
import os
import re
import secrets
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unicodedata import category

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# What the system says when a file can no longer be written, whoever writes it.
UNWRITABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOENT,
    errno.ESTALE,
}

# Tensors of a saved state together, in its file's size: some share their memory (tied weights).
LARGEST_CONTENT = 4
DEEPEST_CONTENT = 40  # ours have 7 levels


_umask = os.umask(0o077)  # can only be asked for by setting it
os.umask(_umask)
NEW_FILE = 0o666 & ~_umask  # the permissions of a new file; safetensors gives its files to nobody but their owner


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside ``path`` to write to; moved over it at the end, so that a crash never leaves half a file.

    It is on the disk before it is moved: a machine that loses its power keeps the old file or the new one. If the
    block raises, an existing file stays as it was.

    Raises:
        OSError: the file cannot be written; a sentence that names it, with the system's ``errno``.
    """
    path = Path(path)
    # Others may be writing the same file: threads, or a process of the same number on another machine.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
        with suppress(OSError):  # not every file system can
            temporary.chmod(NEW_FILE)
        _put_on_disk(temporary)
        temporary.replace(path)
        with suppress(OSError):  # not every file system can
            _put_on_disk(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        failure = type(error)(
            f"{path} cannot be written ({reason}); make room there, or have it written to another folder"
        )
        failure.errno = error.errno
        raise failure from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _put_on_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn what safetensors raises when a disk is full or read-only into the OSError that it is."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def save_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        OSError: as :func:`written_whole`.
    """
    with written_whole(path) as temporary, disk_errors():
        save_file(dict(tensors), temporary, metadata=dict(metadata))


def save_state(state: Any, path: str | os.PathLike[str]) -> None:
    """Write what ``torch.load`` reads, whole or not at all.

    Raises:
        OSError: as :func:`written_whole`; PyTorch makes a RuntimeError of it, which says nothing of disks.
    """
    with written_whole(path) as temporary:
        try:
            with temporary.open("wb") as file:
                torch.save(state, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise OSError(*error.__context__.args) from error
            raise


class DamagedFile(ValueError):
    """What is wrong with a file, for a sentence of whoever reads it, who knows what it should be and how to mend it."""


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file, which are mapped from it.

    Raises:
        DamagedFile: it is none, is cut short or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # whatever a broken or hostile file makes the reader raise
        raise DamagedFile(reason(error)) from error
    if damaged := [name for name, tensor in tensors.items() if not holds_bools(tensor)]:
        raise DamagedFile(f"{shortened(damaged[0])} holds other bytes than 0 and 1")
    return metadata, tensors


def read_state(path: str | os.PathLike[str]) -> Any:
    """Tensors, numbers and strings that ``torch.save`` wrote; nothing in it is run, and it takes no more than its file.

    Raises:
        DamagedFile: it is cut short, damaged or something else.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
            # As PyTorch writes it: what is compressed could be a thousand times as large.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("it is compressed")
            if sum(entry.file_size for entry in entries) > size:
                raise ValueError("it says that it is longer than it is")
            if (damaged := file.testzip()) is not None:
                raise ValueError(f"wrong checksum of {damaged}")
            described = sum(entry.file_size for entry in entries if entry.filename.endswith("data.pkl"))
        # Mapped, so that a large one costs no memory.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        _check_contents(content, size, described)
    except Exception as error:  # whatever a broken or hostile file makes the readers raise
        # PyTorch's own words for this say how to run what the file holds.
        code = type(error).__name__ == "UnpicklingError"
        why = "it holds more than tensors, numbers and strings, or is damaged" if code else reason(error)
        raise DamagedFile(why) from error
    return content


def _check_contents(content: Any, size: int, described: int) -> None:
    """Refuse what stands for more than a file of ``size`` bytes holds, or what PyTorch counts wrongly with.

    Args:
        content: what was read.
        size: of the file, in bytes.
        described: bytes of the part that says what there is; everything but the tensors' content.
    """
    total = count = 0
    left: list[tuple[Any, int]] = [(content, 0)]
    while left:
        value, depth = left.pop()
        count += 1
        # A container that holds itself, or one that is there many times: each time takes at least a byte to say.
        if depth > DEEPEST_CONTENT or count > described:
            raise ValueError("it is nested without end")
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise ValueError(f"it holds a tensor of the layout {value.layout} on {value.device}")
            total += value.numel() * value.element_size()
            if total > LARGEST_CONTENT * size:  # tensors may share their memory, and stay so only until they are copied
                raise ValueError("its tensors are larger than the file")
            if not holds_bools(value):
                raise ValueError("a tensor of bools holds other bytes than 0 and 1")
        elif isinstance(value, dict | list | tuple | set):
            left += [(item, depth + 1) for item in value]
            left += [(item, depth + 1) for item in value.values()] if isinstance(value, dict) else []


def holds_bools(tensor: Tensor) -> bool:
    """Whether a tensor, if it is one of bools, holds nothing else: other bytes count differently in each operation."""
    return tensor.dtype != torch.bool or bool((tensor.contiguous().view(-1).view(torch.uint8) <= 1).all())


def whole_number(metadata: Mapping[str, str], name: str) -> int:
    """A number of a file's metadata, 1 to 999,999,999.

    Raises:
        DamagedFile: there is none of this name.
    """
    text = metadata.get(name, "nothing")
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text)):
        raise DamagedFile(f"its {name} is {shortened(text)}, expected a whole number of at least 1")
    return int(text)


def reason(error: BaseException) -> str:
    """What an error of a library says, in one line for a sentence of ours."""
    return shortened(" ".join(str(error).split()) or type(error).__name__)


def shortened(text: str, length: int = 300) -> str:
    """The beginning of a text that a file may have made as long as it likes."""
    return text if len(text) <= length else f"{text[:length]}..."


def readable(text: str) -> str:
    """A text without what would steer a terminal, hide or turn round other letters, or cannot be written."""
    return "".join("\ufffd" if category(c)[0] == "C" and c != "\n" else c for c in text)
