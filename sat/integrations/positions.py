"""Floor 3: pretrained models of Hugging Face transformers take longer sequences than they were trained on.

What DeepSpeed called extend_position_embedding and update_tokenizer_model_max_length, without a row left unwritten.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from sat.attention import AdaptiveAttention
from sat.scaling import interpolate_positions


def extend_position_embeddings(model: nn.Module, tokenizer: Any, max_length: int | tuple[int, int]) -> None:
    """Let a pretrained model take sequences of ``max_length`` tokens, or a ViT pictures of that size; in place.

    - Models with a table of learned positions, such as BERT, ALBERT, DistilBERT and ELECTRA: the trained rows are
      repeated until the table is full, the last repetition cut where ``max_length`` is no multiple. What the model
      gave at the lengths it knew stays the same, bit for bit.
    - Those that number their positions from ``padding_idx + 1`` on, such as RoBERTa, XLM-RoBERTa and CamemBERT: the
      same, but the rows before stay alone, and ``config.max_position_embeddings`` counts them on top of
      ``max_length``.
    - ViT and DeiT: the rows of the patches are interpolated on their grid, bicubic, as transformers does it in each
      call with ``interpolate_pos_encoding=True``; the rows of CLS and of the distillation token stay. After a size
      that is not square that option cannot be used, because it takes every table for a square one.

    The table becomes a new parameter of the same dtype, device and ``requires_grad``: call this before the optimizer
    is made, and before ``sat.integrations.transformers.prepare``. The buffers of position and token type ids, the
    config and the tokenizer follow, so that ``save_pretrained`` and ``from_pretrained`` of plain transformers bring
    all of it back. Where an error is raised nothing was changed. A model of that length already keeps its table.

    Args:
        model: a model of transformers, with or without a head.
        tokenizer: its tokenizer, whose ``model_max_length`` becomes ``max_length``; for a ViT its image processor,
            which is made to give pictures of the new size (a centre crop keeps the same share of them); or None.
        max_length: longest sequence in tokens, special tokens included; for a ViT the size of the pictures in pixels,
            an int or (height, width), multiples of the patch size.

    Raises:
        TypeError: ``model`` is none of transformers, ``tokenizer`` is of the wrong kind, or ``max_length`` is no
            length.
        ValueError: fewer positions than now; positions that are rotary, relative, ALiBi or sinusoidal, or are kept in
            a way that is not known here; a model on "meta" or one that was already prepared.

    Source: Beltagy, Peters and Cohan, "Longformer: The Long-Document Transformer" (2020), section 5, for the
    repetition; Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), section 3.2, for the interpolation.
    """
    config: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "model_type"):
        raise TypeError(
            f"extend_position_embeddings needs a model of Hugging Face transformers, which has a config; got "
            f"{type(model).__name__}; pass the model that lies inside of it"
        )
    if any(isinstance(module, AdaptiveAttention) for module in model.modules()):
        raise ValueError(
            f"this {type(model).__name__} is prepared for SAT already, and its attention is made for one length; load "
            f"it anew, extend its positions first and prepare it then"
        )
    embeddings, table = _position_table(model, config)
    if table.is_meta:
        raise ValueError(
            f'the positions of this {type(model).__name__} lie on the device "meta", where there are no trained rows; '
            f"load its weights first"
        )
    if isinstance(embeddings.position_embeddings, nn.Embedding):
        _extend_tokens(model, config, embeddings, tokenizer, max_length)
    else:
        _extend_patches(model, config, embeddings, tokenizer, max_length)


def _position_table(model: nn.Module, config: Any) -> tuple[Any, Tensor]:
    """The module that holds the learned positions, and their table; or a sentence saying why there is none."""
    name = type(model).__name__
    found = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "position_embeddings", None), nn.Embedding | nn.Parameter)
    ]
    is_relative = bool(
        getattr(config, "relative_attention", False)  # DeBERTa
        or (getattr(config, "relative_attention_num_buckets", 0) and not found)  # T5; MPNet has a table besides
        or config.model_type == "xlnet"
    )
    kind = None
    if is_relative:
        kind = "relative"
    elif any("Rotary" in type(module).__name__ or "Rope" in type(module).__name__ for module in model.modules()):
        kind = "rotary"
    elif getattr(config, "alibi", False) or config.model_type == "bloom":
        kind = "ALiBi"
    if kind and found:
        raise ValueError(
            f"{name} has {kind} positions beside learned ones, and extending one of the two would not do; give it "
            f"sequences of the length that it was made for"
        )
    if kind:
        raise ValueError(
            f"{name} has {kind} positions and needs no extension: no table bounds its length; give it the longer "
            f"sequences, and set its tokenizer's model_max_length if that is smaller"
        )
    for option in ("sinusoidal_pos_embds", "sinusoidal_embeddings"):  # DistilBERT; XLM and FlauBERT
        if getattr(config, option, False):
            raise ValueError(
                f"{name} has sinusoidal positions, which are computed and not learned, so that repeated rows would be "
                f"wrong; load it with from_pretrained(..., max_position_embeddings=N, ignore_mismatched_sizes=True), "
                f"which computes them for N"
            )
    if config.model_type == "vit_mae":
        raise ValueError(
            f"{name} has sinusoidal positions, which are computed for its image size and not learned; fine-tune it as "
            f"ViTForImageClassification, whose positions can be extended"
        )
    if len(found) != 1:
        raise ValueError(
            f"{name} has {len(found)} tables named position_embeddings, and exactly one is expected, as in BERT, "
            f"RoBERTa or ViT; "
            + ("extend its encoders one by one" if found else "extend its positions by hand, if it has any")
        )
    (embeddings,) = found
    table: Any = embeddings.position_embeddings
    return embeddings, table.weight if isinstance(table, nn.Embedding) else table


def _extend_tokens(model: nn.Module, config: Any, embeddings: Any, tokenizer: Any, max_length: Any) -> None:
    """Repeat the rows of a table that is looked up by position."""
    if not _is_length(max_length):
        raise TypeError(
            f"max_length must be an int of at least 1, the tokens of the longest sequence; got {max_length!r}"
        )
    if tokenizer is not None and not hasattr(tokenizer, "model_max_length"):
        raise TypeError(
            f"the tokenizer of a {type(model).__name__} has a model_max_length, which {type(tokenizer).__name__} has "
            f"not; pass its tokenizer or None"
        )
    table = embeddings.position_embeddings
    weight = table.weight
    rows = len(weight)
    others = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and module is not table
        and "position" in path.rsplit(".", 1)[-1]
        and module.num_embeddings == rows
    ]
    if others:
        raise ValueError(
            f"{type(model).__name__} has another table of positions, {others[0]}, of as many rows, and extending one "
            f"of the two would not do; give it sequences of the length that it was made for"
        )
    # The embeddings of RoBERTa and its kin know the padding token, to number the positions of the others from there on.
    offset = 0 if getattr(embeddings, "padding_idx", None) is None else embeddings.padding_idx + 1
    buffers = {
        name: buffer
        for name, buffer in embeddings.named_buffers(recurse=False)
        if name in ("position_ids", "token_type_ids")
    }
    ids = buffers.get("position_ids")
    if rows != getattr(config, "max_position_embeddings", None) or (
        ids is not None and not ids.equal(torch.arange(rows, dtype=ids.dtype, device=ids.device)[None])
    ):
        raise ValueError(
            f"the {rows} positions of {type(model).__name__} are not numbered as in BERT or RoBERTa, from 0 to "
            f"config.max_position_embeddings ({getattr(config, 'max_position_embeddings', None)}) - 1; extend them "
            f"by hand"
        )
    if max_length < rows - offset:
        raise ValueError(
            f"{type(model).__name__} takes {rows - offset} tokens, and positions can be extended but not shortened to "
            f"{max_length}; cut the sequences in the tokenizer, with max_length={max_length} and truncation=True"
        )
    if max_length > rows - offset:
        new_rows = max_length + offset
        trained = torch.arange(max_length, device=weight.device) % (rows - offset) + offset
        with torch.no_grad():
            longer = torch.cat([weight[:offset], weight[trained]])
        table.weight = nn.Parameter(longer, requires_grad=weight.requires_grad)
        table.num_embeddings = new_rows
        for name, buffer in buffers.items():
            longer = torch.arange(new_rows)[None] if name == "position_ids" else torch.zeros(1, new_rows)
            # Assigned to the name of a buffer, so it stays one, in or out of the state dict as before.
            setattr(embeddings, name, longer.to(buffer))
        config.max_position_embeddings = new_rows
    if tokenizer is not None:
        tokenizer.model_max_length = max_length


def _extend_patches(model: nn.Module, config: Any, embeddings: Any, processor: Any, max_length: Any) -> None:
    """Interpolate a table whose rows are added to the patches of a picture."""
    name = type(model).__name__
    patches: Any = getattr(embeddings, "patch_embeddings", None)
    weight = embeddings.position_embeddings
    tokens = [getattr(embeddings, token, None) for token in ("cls_token", "distillation_token")]
    special = sum(token is not None for token in tokens)
    old, patch = (_pair(getattr(patches, size, None)) for size in ("image_size", "patch_size"))
    if (
        # Without this option a model interpolates in every call, from the size of config.image_size.
        "interpolate_pos_encoding" not in inspect.signature(embeddings.forward).parameters
        or old is None
        or patch is None
        or _pair(getattr(config, "image_size", None)) != old
        or weight.ndim != 3
        or weight.shape[:2] != (1, special + (old[0] // patch[0]) * (old[1] // patch[1]))
    ):
        raise ValueError(
            f"the positions of {name} are not those of ViT or DeiT, a row for each patch of a picture of "
            f"config.image_size after the rows of CLS and distillation; give it the larger pictures as it is, since "
            f"some such models interpolate by themselves, or extend them by hand"
        )
    new = _pair(max_length)
    if new is None:
        raise TypeError(
            f"the max_length of a {name} is the size of its pictures in pixels, an int of at least 1 or (height, "
            f"width); got {max_length!r}"
        )
    if new[0] % patch[0] or new[1] % patch[1]:
        height, width = (-(-side // edge) * edge for side, edge in zip(new, patch, strict=True))
        raise ValueError(
            f"pictures of {new[0]} x {new[1]} pixels cannot be cut into patches of {patch[0]} x {patch[1]}; take "
            f"multiples of the patch size, such as {height} x {width}"
        )
    if new[0] < old[0] or new[1] < old[1]:
        raise ValueError(
            f"{name} takes pictures of {old[0]} x {old[1]} pixels, and positions can be extended but not shortened, to "
            f"{new[0]} x {new[1]}; resize the pictures instead"
        )
    sizes = {} if processor is None else _processor_sizes(name, processor, new)
    if new != old:
        grid, new_grid = ((size[0] // patch[0], size[1] // patch[1]) for size in (old, new))
        with torch.no_grad():
            finer = interpolate_positions(weight[0, special:], grid, new_grid, mode="bicubic")
            longer = torch.cat([weight[:, :special], finer[None]], 1)
        embeddings.position_embeddings = nn.Parameter(longer, requires_grad=weight.requires_grad)
        patches.num_patches = new_grid[0] * new_grid[1]
        for module in (patches, embeddings):
            if hasattr(module, "image_size"):
                module.image_size = new
        config.image_size = new[0] if new[0] == new[1] else list(new)
    for attribute, size in sizes.items():
        setattr(processor, attribute, size)


def _processor_sizes(name: str, processor: Any, new: tuple[int, int]) -> dict[str, Any]:
    """The sizes that make an image processor give pictures of ``new`` pixels, by attribute."""
    size, crop = getattr(processor, "size", None), getattr(processor, "crop_size", None)
    if not getattr(processor, "do_center_crop", False):
        crop = None
    if any(each is not None and set(dict(each)) != {"height", "width"} for each in (size, crop)) or size is None:
        raise TypeError(
            f"the image processor of a {name} has a size of height and width, got {type(processor).__name__} with "
            f"size {size} and crop_size {crop}; pass None and resize the pictures to {new[0]} x {new[1]} pixels"
        )
    height, width = new
    kind = type(size)  # a dict, or transformers' own class of them
    if crop is None:
        return {"size": kind(height=height, width=width)}
    larger = kind(
        height=round(height * size["height"] / crop["height"]), width=round(width * size["width"] / crop["width"])
    )
    return {"size": larger, "crop_size": type(crop)(height=height, width=width)}


def _is_length(length: Any) -> bool:
    return isinstance(length, int) and not isinstance(length, bool) and length >= 1


def _pair(size: Any) -> tuple[int, int] | None:
    """(height, width) of a size that may be one int for both; None if it is neither."""
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    return (sides[0], sides[1]) if len(sides) == 2 and all(map(_is_length, sides)) else None
