"""Floor 2: the methods that users compare with: queries, keys and values in, context out.

Each is chosen by its name in ``model.attention`` of a config, and its own settings by ``model.attention_options``.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sat.baselines.bigbird import BigBirdAttention
from sat.baselines.explicit import ExplicitAttention
from sat.baselines.flex import FlexAttention
from sat.baselines.longformer import LongformerAttention
from sat.baselines.lsg import LSGAttention
from sat.baselines.structure import Structure, StructureAttention, fingerprint
from sat.layout import BlockLayout
from sat.patterns import from_deepspeed

__all__ = [
    "METHODS",
    "BigBirdAttention",
    "ExplicitAttention",
    "FlexAttention",
    "LSGAttention",
    "LongformerAttention",
    "StructureAttention",
    "fingerprint",
    "make_baseline",
]

_OF_A_STRUCTURE: dict[str, type[StructureAttention]] = {"structure": StructureAttention, "flex": FlexAttention}
METHODS: dict[str, type[nn.Module]] = {
    "explicit": ExplicitAttention,
    "longformer": LongformerAttention,
    "bigbird": BigBirdAttention,
    "lsg": LSGAttention,
    **_OF_A_STRUCTURE,
}
# Keyword arguments that are no settings of the method.
_NOT_SETTINGS = {"dropout", "backend"}


def make_baseline(
    name: str,
    num_heads: int,
    seq_len: int,
    *,
    block_size: int,
    layer: int = 0,
    num_layers: int = 1,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """One layer's attention, by the method's name.

    Args:
        name: one of ``METHODS``.
        num_heads: ``H``.
        seq_len: the longest sequence, in tokens.
        block_size: edge of the blocks of a structure whose options name none.
        layer: the layer's number; what a method draws at random differs between layers.
        num_layers: how many there are.
        options: the method's keyword arguments; ``window`` of longformer may be a list, one for each layer. For
            ``structure`` and ``flex``: the keys of a ``sparse_attention`` section of DeepSpeed (``mode``, ``block``,
            ...) or ``deepspeed``, the path of a DeepSpeed JSON file, and a ``seed``; or ``layout``, the path of a saved
            :class:`BlockLayout`, and ``attention``, ``bidirectional`` or ``unidirectional``, which the file does not
            say.

    Raises:
        ValueError: no such method or option, or a value that does not do.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
    options = dict(options or {})
    if name == "longformer" and isinstance(options.get("window"), list):
        windows = options["window"]
        if len(windows) != num_layers:
            raise ValueError(
                f"model.attention_options: window of longformer is a list of {len(windows)}, but there are "
                f"{num_layers} layers; give one number, or one for each layer"
            )
        options["window"] = windows[layer]
    if name in _OF_A_STRUCTURE:
        structure = _structure(name, num_heads, block_size, layer, options)
        if name == "flex" and not torch.cuda.is_available():
            raise ValueError(
                "FlexAttention has no backward pass on a CPU, so model.attention=flex trains on a GPU only; "
                "model.attention=structure computes the same function here"
            )
        return _OF_A_STRUCTURE[name](num_heads, seq_len, structure)
    return METHODS[name](num_heads, seq_len, **_checked_options(name, options, layer))


def _checked_options(name: str, options: dict[str, Any], layer: int) -> dict[str, Any]:
    """Options that the method has, of the kind that it expects."""
    known = {
        key: parameter.default
        for key, parameter in inspect.signature(METHODS[name]).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and key not in _NOT_SETTINGS
    }
    for key, value in options.items():
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"model.attention_options: {name} has no option {key!r}; {has}")
        expected = type(known[key])
        if type(value) is not expected and not (key == "dilation" and isinstance(value, list)):  # one for each head
            raise ValueError(
                f"model.attention_options: {key} of {name} must be {'a number' if expected is int else 'a word'} like "
                f"{known[key]!r}, got {value!r}"
            )
    if "seed" in known:
        options["seed"] = options.get("seed", known["seed"]) + layer
    return options


class _SavedLayout:
    """A layout from a file, for sequences of its own length."""

    def __init__(self, path: str, attention: str | None) -> None:
        self.path = path
        self.saved = BlockLayout.load(path)
        if attention not in (None, "bidirectional", "unidirectional"):
            raise ValueError(
                f"model.attention_options: attention must be bidirectional or unidirectional, got {attention!r}"
            )
        mask = self.saved.mask
        if attention is None and mask.tril(-1).any() and not mask.triu(1).any():
            raise ValueError(
                f"the layout in {path} has no block above the diagonal, and the file does not say whether attention "
                f"inside the blocks on it may look ahead; set model.attention_options.attention to unidirectional (no "
                f"token sees a later one) or bidirectional"
            )
        self.is_causal = attention == "unidirectional"

    def layout(self, seq_len: int) -> BlockLayout:
        if not self.saved.fits(seq_len, seq_len):
            rows, columns = self.saved.shape
            raise ValueError(
                f"the layout in {self.path} has {rows} x {columns} blocks of {self.saved.block_size}, which do not fit "
                f"{seq_len} tokens; give one that was made for this length"
            )
        return self.saved

    def __repr__(self) -> str:
        return f"layout={self.path}"


def _structure(name: str, num_heads: int, block_size: int, layer: int, options: dict[str, Any]) -> Structure:
    files = [key for key in ("deepspeed", "layout") if key in options]
    for key in files:
        if not isinstance(options[key], str):
            raise ValueError(f"model.attention_options: {key} of {name} is the path of a file, got {options[key]!r}")
        beside = {"deepspeed": "seed", "layout": "attention"}[key]
        others = [other for other in options if other not in (key, beside)]
        if others:
            raise ValueError(
                f"model.attention_options: {key} names a file that says it all; leave out {', '.join(others)}"
            )
    if "layout" in options:
        return _SavedLayout(options["layout"], options.get("attention"))
    seed = options.pop("seed", 0)
    if type(seed) is not int or seed < 0:
        raise ValueError(f"model.attention_options: seed of {name} must be a whole number of at least 0, got {seed!r}")
    section = {"block": block_size, **options} if "deepspeed" not in options else _read_deepspeed(options["deepspeed"])
    return from_deepspeed(section, num_heads, seed=seed + layer)


def _read_deepspeed(file: str) -> dict[str, Any]:
    """The section of a DeepSpeed file; a file that is nothing but the section will do."""
    path = Path(file)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the DeepSpeed configuration {path} ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file ({error})") from error
    if not isinstance(content, dict) or not {"sparse_attention", "mode"} & set(content):
        raise ValueError(
            f"{path} has no section sparse_attention (and is no such section itself: there is no mode in it); add one, "
            f"or choose a structure by model.attention_options.mode"
        )
    return content.get("sparse_attention", content)
