"""Bytes that somebody else could hand us: valid files with something changed, by accident or on purpose."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

import torch
import yaml

# What a metadata entry, a YAML scalar or a pickled number is replaced by.
NASTY = [
    "",
    " ",
    "0",
    "1",
    "2",
    "-1",
    "4",
    "16",
    "32",
    "64",
    "999999999",
    "4294967297",
    "9" * 30,
    "9" * 5000,
    "1e400",
    "-inf",
    "nan",
    "0x10",
    "1.5",
    "true",
    "null",
    "[]",
    "{}",
    "[1]",
    '"4"',
    '"',
    "[" * 3000,
    '{"a":' * 3000,
    "é",
    "\u0663",
    "\u0000",
    "\ud7ff",
    "drop",
    "zero",
    "../../etc/passwd",
    "/dev/zero",
    "%s%n",
    "train.labels",
    "sat.BlockLayout",
    "sat.transformers",
    "sat.data",
    "bert",
    "x" * 100_000,
]
SIZES = [0, 1, -1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1]
NUMBERS = [*SIZES, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")]
DTYPES = ["BOOL", "U8", "I8", "I16", "I32", "I64", "U64", "F16", "BF16", "F32", "F64", "F8_E4M3", "F4", "C64", 3, None]
COMMAND = "touch canary"  # what must never run; in the folder of the input, which is the working directory


class Code:
    """Pickles as a command."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (COMMAND,)


def pickles() -> list[bytes]:
    """Pickles that run a command when they are loaded, in the forms in which files come."""
    bare = [pickle.dumps(Code(), protocol) for protocol in range(6)]
    forms = []
    for new in (True, False):
        buffer = io.BytesIO()
        torch.save({"state_dict": {}, "loops": {}, "callbacks": Code()}, buffer, _use_new_zipfile_serialization=new)
        forms.append(buffer.getvalue())
    return [*bare, *forms, b"cos\nsystem\n(S'" + COMMAND.encode() + b"'\ntR."]


def of_any_file(data: bytes, rng: Random, strangers: list[bytes]) -> bytes:
    """Damage that needs no knowledge of the format."""
    what = rng.randrange(9)
    changed = bytearray(data)
    place = rng.randrange(len(data)) if data else 0
    if what == 0:
        for _ in range(rng.choice([1, 1, 2, 8, 64])):
            place = rng.randrange(len(data))
            changed[place] ^= 1 << rng.randrange(8)
    elif what == 1:
        return data[:place]
    elif what == 2:
        return data + rng.randbytes(rng.choice([1, 8, 1000]))
    elif what == 3:
        changed[place : place + rng.choice([1, 8, 200])] = bytes(rng.choice([1, 8, 200]))
    elif what == 4:
        piece = data[place : place + rng.randrange(1, 300)]
        changed[rng.randrange(len(data)) : 0] = piece
    elif what == 5:
        del changed[place : place + rng.choice([1, 2, 16, 300])]
    elif what == 6:
        changed[place : place + 4] = rng.choice([b"\xff" * 4, bytes(4), b"\x00\x00\x00\x80", rng.randbytes(4)])
    elif what == 7:
        return rng.choice(strangers)
    else:
        return rng.choice(
            [b"", rng.randbytes(rng.randrange(1, 3000)), bytes(5000), b"\xff" * 64, rng.choice(strangers)]
        )
    return bytes(changed)


def safetensors(data: bytes, rng: Random, fix: Callable[[dict[str, Any], bytes], None] | None = None) -> bytes:
    """A safetensors file with another header, which may say whatever JSON can.

    Args:
        fix: makes checksums right again, so that what else is wrong is looked at.
    """
    (length,) = struct.unpack("<Q", data[:8])
    header, content = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    names = [name for name in header if name != "__metadata__"]
    claimed = None
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        what, name, other = rng.randrange(14), rng.choice(names), rng.choice(names)
        entry, metadata = header.get(name, {}), header.setdefault("__metadata__", {})
        key = rng.choice([*metadata, "format", "version"])
        if what == 0:
            entry["shape"] = [rng.choice(SIZES) for _ in range(rng.randrange(5))]
        elif what == 1:
            entry["data_offsets"] = [rng.choice([*SIZES, len(content)]) for _ in range(rng.choice([2, 2, 2, 1, 3]))]
        elif what == 2:
            entry["dtype"] = rng.choice(DTYPES)
        elif what == 3:
            metadata[key] = rng.choice([*NASTY, 3, None, []])
        elif what == 4:
            metadata.pop(key, None)
        elif what == 5:
            metadata[key], metadata[rng.choice([*metadata])] = metadata.get(rng.choice([*metadata])), metadata.get(key)
        elif what == 6:
            header[name] = header.get(other, {})
        elif what == 7:
            header.pop(name, None)
        elif what == 8:
            header[rng.choice(NASTY)] = {
                "dtype": "U8",
                "shape": rng.choice([[0], [0, 2**40], [2**60, 0]]),
                "data_offsets": [0, 0],
            }
        elif what == 9:
            claimed = rng.choice([0, 1, 7, length - 1, length + 1, 100_000_000, 2**40, 2**63, 2**64 - 1])
        elif what == 10:
            for place in range(rng.choice([1, 20, len(content)])):
                content[rng.randrange(len(content)) if place else 0] = rng.choice([0, 1, 2, 128, 255])
        elif what == 11 and entry.get("shape"):  # another shape of the same size, and another type of the same bytes
            entry["shape"] = rng.choice([entry["shape"][::-1], [1, *entry["shape"]], [*entry["shape"], 1], [-1]])
        elif what == 12:
            entry["dtype"] = rng.choice(
                [d for d in DTYPES if isinstance(d, str) and d[-1:] == str(entry.get("dtype"))[-1:]] or ["U8"]
            )
        elif what == 13:
            for number in range(rng.choice([10, 2000])):
                header[f"{name}{number}"] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    if fix is not None and rng.random() < 0.7:
        fix(header, bytes(content))
    text = json.dumps(header, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.03:
        text = rng.choice(
            [b"[" * 3000, b'{"a":' * 3000, text + b" " * rng.choice([1, 100_000]), b"{" + text[1:-1] + b"," + text[1:]]
        )
    return struct.pack("<Q", claimed if claimed is not None else len(text)) + text + bytes(content)


def _nodes(content: Any) -> list[tuple[Any, Any]]:
    """Every place in nested containers, as (container, key)."""
    found, seen, left = [], set(), [content]
    while left:
        at = left.pop()
        if isinstance(at, dict | list) and id(at) not in seen:
            seen.add(id(at))  # a ring is walked once
            found += [(at, key) for key in (at if isinstance(at, dict) else range(len(at)))]
            left += at.values() if isinstance(at, dict) else at
    return found


def objects(content: Any, rng: Random) -> Any:
    """Nested containers of tensors, numbers and strings, with some of them exchanged."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        nodes = _nodes(content)
        place, key = rng.choice(nodes)
        value = place[key]
        what = rng.randrange(7)
        if what == 0:
            del place[key]
            if not nodes[1:]:
                break
        elif what == 1:
            place[key] = rng.choice(NUMBERS)
        elif what == 2:
            place[key] = rng.choice(NASTY)
        elif what == 3:
            place[key] = rng.choice([None, [], {}, (), True, b"", [[]] * 3, {1: 2}, {"a": {}}, content])  # also a ring
        elif what == 4:
            other, name = rng.choice(nodes)
            if isinstance(other, dict) and name in other:
                place[key] = other[name]
        elif isinstance(value, torch.Tensor):
            place[key] = tensor(value, rng)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            place[key] = rng.choice([value + 1, value - 1, -value, value * 1000, *NUMBERS])
        if not _nodes(content):
            break
    return content


def tensor(value: torch.Tensor, rng: Random) -> torch.Tensor:
    """A tensor of another shape, type, layout or content."""
    what = rng.randrange(8)
    if what == 0:
        return torch.zeros(1, dtype=value.dtype).expand(rng.choice([2**20, 2**31, 2**40]))
    if what == 1:
        return value.flatten()[: rng.randrange(3)].clone()
    if what == 2:
        return value.to(rng.choice([torch.int8, torch.bool, torch.float64, torch.complex64, torch.float16]))
    if what == 3:
        return value.double().to_sparse() if value.dim() else value
    if what == 4:
        return torch.empty(value.shape, device="meta")
    if what == 5:
        raw = value.clone().contiguous().view(-1).view(torch.uint8) if value.numel() else value
        if raw.numel():
            raw.copy_(
                torch.randint(
                    0, 256, raw.shape, generator=torch.Generator().manual_seed(rng.randrange(9)), dtype=torch.uint8
                )
            )
        return raw.view(value.dtype).view(value.shape)
    if what == 6:
        return value[None]
    return torch.full_like(value, rng.choice([0, 1, 100])) if value.dtype != torch.bool else ~value


def checkpoint(data: bytes, rng: Random) -> bytes:
    """A checkpoint with other content, or in another archive."""
    what = rng.randrange(8)
    if what < 4:
        content = objects(torch.load(io.BytesIO(data), weights_only=True), rng)
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()
    return archive(data, rng)


def archive(data: bytes, rng: Random) -> bytes:
    """A zip file with entries that are missing, twice there, renamed, compressed or of other bytes; checksums fit."""
    source = zipfile.ZipFile(io.BytesIO(data))
    buffer = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if rng.random() < 0.15 else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", kind) as target:
        chosen = rng.choice(source.namelist())
        for name in source.namelist():
            content = source.read(name)
            if name == chosen or (name.endswith("data.pkl") and rng.random() < 0.5):
                what = rng.randrange(7)
                if what == 0:
                    continue
                if what == 1:
                    name = rng.choice(
                        [f"../{name}", f"/{name}", name.replace("/", "\\"), "x", name + "\u0000", "é" * 100]
                    )
                elif what == 2:
                    content = of_any_file(content, rng, [b""]) if content else content
                elif what == 3 and name.endswith("data.pkl"):
                    content = rng.choice(pickles()[:6])
                elif what == 4 and kind == zipfile.ZIP_DEFLATED:
                    content += bytes(2**26)
                elif what == 5:
                    content = content[: len(content) // 2]
                else:
                    content = of_any_file(content, rng, [b""]) if content else b"x"
            target.writestr(name, content)
    return buffer.getvalue()


BOMB = (
    "{a: &a [x,x,x,x,x,x,x,x,x], "
    + ", ".join(f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True))
    + "}"
)
TAGS = [
    f"!!python/object/apply:os.system ['{COMMAND}']",
    "!!python/name:os.system ''",
    "!!python/module:canary ''",
    "!!python/object/new:canary.C {}",
    "!!int x",
    "!!float x",
    "!!bool x",
    "!!timestamp x",
    "!!binary x",
    "!!set {a}",
    "!!omap [a: 1]",
    "!x y",
    "2001-99-99",
    "1_000",
    "0o17",
    "1:30:00",
    "{class_path: canary.C}",
    "{class_path: os.system, init_args: {command: touch canary}}",
    "{x: {class_path: subprocess.Popen, init_args: {args: touch canary}}}",
    "'{x: {class_path: canary.C}}'",
    BOMB,
    f"'{BOMB}'",
    "&a [*a]",
    "&a {b: *a}",
    "[" * 500,
    "'" + "[" * 500 + "'",
    "{? [a] : b}",
    "|\n  a",
    "<<: 3",
    "*b",
    "&b",
    "%TAG",
    "---",
]
KEYS = [
    *[
        "class_path",
        "init_args",
        "config",
        "x.class_path",
        "callbacks",
        "plugins",
        "name",
        "print_config",
        "pretrained",
        "attention_options",
    ],
    "",
    3,
]
CLASS = {"class_path": "canary.C", "init_args": {}}
VALUES = ["canary.C", "os.system", CLASS, {"x": CLASS}, 3, None, "../../x", [1]]


def config(data: bytes, rng: Random) -> bytes:
    """A config that asks for more than options."""
    if rng.random() < 0.5:
        content = objects(yaml.safe_load(data), rng)
        place, _ = rng.choice(_nodes(content) or [({}, "x")])
        if isinstance(place, dict) and rng.random() < 0.3:
            place[rng.choice(KEYS)] = rng.choice(VALUES)
        try:
            return yaml.safe_dump(content, allow_unicode=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        except (yaml.YAMLError, RecursionError):
            return data
    lines = data.decode().splitlines()
    for _ in range(rng.choice([1, 1, 2])):
        number = rng.randrange(len(lines))
        name, colon, _ = lines[number].partition(":")
        lines[number] = f"{name}{colon} {rng.choice([*TAGS, *NASTY])}"
    text = "\n".join(lines)
    return text.encode(rng.choice(["utf-8", "utf-8", "utf-8", "utf-16", "latin-1", "utf-8-sig"]), "replace")
