"""Floor 3: SAT as an attention implementation of Hugging Face transformers; importing this module registers it.

model = AutoModel.from_pretrained(name, attn_implementation="sat") computes what "sdpa" computes, until an
AdaptiveAttention that prepare() gave to its attention modules has a layout.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat import ops
from sat.attention import AdaptiveAttention
from sat.files import DamagedFile, read_safetensors, reason, save_tensors, shortened, whole_number
from sat.layout import BlockLayout
from sat.ops import checks
from sat.ops.autocast import as_autocast_does

try:
    import transformers
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    transformers = None  # type: ignore[assignment]
if transformers is None or tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 10):
    found = "it is not installed" if transformers is None else f"{transformers.__version__} is installed"
    raise ImportError(
        f"sat.integrations.transformers needs the package transformers, 5.10 or newer, and {found}; get it with "
        f"pip install 'transformers>=5.10'"
    )

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import AttentionInterface

from sat.integrations.positions import extend_position_embeddings

__all__ = ["extend_position_embeddings", "load_layouts", "prepare", "register", "save_layouts"]

# Beside the weights in a saved model's folder.
LAYOUTS_FILE = "sat_layouts.safetensors"
FORMAT = "sat.transformers"
FORMAT_VERSION = 1

# Numbers at or below this in a floating-point mask mean "masked": models write -10000 or their dtype's smallest number.
# Only -inf keeps a query from attending to them where its layout leaves it nothing else.
MASKED = -1e4

# What else belongs beside a model's weights, while it is trained. Copies of the model are not in here.
AFTER_SAVING: WeakKeyDictionary[nn.Module, Callable[[nn.Module, Path], None]] = WeakKeyDictionary()

# Layouts for longer sequences than this must be asked for: they take memory by the square of the length.
LONGEST_DEFAULT = 16_384


def register() -> None:
    """Make ``"sat"`` known to transformers, as an attention function and as a mask function; again does no harm."""
    AttentionInterface.register("sat", _attention)
    AttentionMaskInterface.register("sat", _mask)


def prepare(
    model: PreTrainedModel,
    seq_len: int | None = None,
    block_size: int = 16,
    *,
    backend: ops.Backend = "auto",
    pruned: ops.Pruned = "drop",
) -> dict[str, AdaptiveAttention]:
    """Give every self-attention module of a model its own state, a submodule named ``sat``, and use ``"sat"``.

    Until a state is given a layout, its module computes what it computed with ``"sdpa"``. Cross-attention, and layers
    with a sliding window, which are sparse by a rule of their own, stay as they are. The state is in
    ``model.state_dict()``, but not in the weights that ``model.save_pretrained`` writes: these stay loadable by plain
    transformers. Layouts and phase are written beside them, for :func:`load_layouts`. Prepare the model that you
    train and save, not one inside of it.

    In the sparse phase padded queries give 0, as with transformers' flash attention. ``set_layout``, dropout and
    observing work as described in :class:`sat.attention.AdaptiveAttention`.

    Args:
        model: any model whose attention goes through transformers' ``AttentionInterface``, with one length of
            sequence: BERT, RoBERTa, DistilBERT, ModernBERT, ViT, DeiT, Llama and many more.
        seq_len: the longest sequence in tokens, special tokens included; by default what the model has positions for.
        block_size: edge of a block, in tokens.
        backend: backend of the sparse phase, see :mod:`sat.ops`.
        pruned: ``"drop"`` or ``"zero"``, see :func:`sat.ops.block_sparse_attention`.

    Returns:
        The states by the names of their attention modules, in the model's order. A model that was prepared with the
        same arguments keeps its states.

    Raises:
        TypeError: ``model`` is no model of transformers.
        ValueError: the model's attention does not go through the interface, it is made of several models, it was
            prepared with other arguments, or an argument is out of range.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"prepare needs a model of Hugging Face transformers, got {type(model).__name__}; if that is a wrapper, "
            f"prepare the model first and wrap it then"
        )
    checks.check_choice("pruned", pruned, ("drop", "zero"))
    checks.check_choice("backend", backend, ("auto", "reference", "torch", "triton"))
    modules = _self_attentions(model)
    states = {name: state for name, module in modules.items() if (state := _state(module)) is not None}
    if states:
        before = next(iter(states.values()))
        wanted = before.seq_len if seq_len is None else seq_len, block_size, backend, pruned
        given = before.seq_len, before.block_size, before.backend, before.pruned
        if len(states) < len(modules) or wanted != given:
            raise ValueError(
                f"this {type(model).__name__} is prepared already, {_described(*given)}, and cannot be prepared again, "
                f"{_described(*wanted)}; load it anew"
            )
    else:
        if seq_len is None:
            seq_len = _positions(model)
        for name, module in modules.items():
            states[name] = AdaptiveAttention(
                _num_heads(name, module, model),
                seq_len,
                block_size,
                is_causal=_is_causal(module, model),
                pruned=pruned,
                backend=backend,
            )
    _use_sat(model, modules)
    for name, module in modules.items():
        device = next((parameter.device for parameter in module.parameters()), model.device)
        module.sat = states[name].to(device).train(module.training)
    save_with_layouts(model)
    return states


def save_with_layouts(model: nn.Module) -> None:
    """Let ``save_pretrained`` of a model with prepared parts write plain weights, and the layouts beside them."""
    for part in model.modules():
        if not isinstance(part, PreTrainedModel) or not (names := _states(part)) or "save_pretrained" in vars(part):
            continue
        ignored = {f"{name}.sat.{buffer}" for name, state in names.items() for buffer in state.state_dict()}
        part._keys_to_ignore_on_save = {*(part._keys_to_ignore_on_save or ()), *ignored}
        # A partial of a function by name, and no method: copies and pickles of the model then hold their own.
        part.save_pretrained = functools.partial(_save_pretrained, part)  # type: ignore[method-assign]
        part.register_forward_pre_hook(_refuse_weights, with_kwargs=True)


def save_layouts(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write layouts, phase and sizes of a prepared model to ``sat_layouts.safetensors`` in a folder.

    ``model.save_pretrained`` does it too. An existing file is replaced whole or not at all.

    Args:
        model: the model, or a wrapper around it: compiled, parallel, or one of PEFT's.
        folder: made if it is missing.

    Raises:
        TypeError: ``model`` is and holds no model of transformers.
        ValueError: the model is not prepared.
    """
    model = _inside(model)
    states = _states(model)
    if not states:
        raise ValueError(
            f"this {type(model).__name__} has no layouts to save; prepare it first, with prepare of "
            f"sat.integrations.transformers"
        )
    first = next(iter(states.values()))
    metadata = {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "model_type": model.config.model_type,
        "seq_len": str(first.seq_len),
        "block_size": str(first.block_size),
        "pruned": first.pruned,
        "sparse": json.dumps([_base_name(model, name) for name, state in states.items() if state.is_sparse]),
    }
    masks = {_base_name(model, name): state.layout_mask.cpu().contiguous() for name, state in states.items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_tensors(masks, Path(folder) / LAYOUTS_FILE, metadata)


def load_layouts(model: nn.Module, name_or_path: str | os.PathLike[str]) -> dict[str, AdaptiveAttention]:
    """Bring back what :func:`save_layouts` or ``model.save_pretrained`` wrote: layouts, phase and sizes.

    Args:
        model: the model whose layouts these are, or the same with another head, or a wrapper around it; prepared here
            if it is not.
        name_or_path: the folder, or the model's name on the Hugging Face hub.

    Returns:
        The states, as :func:`prepare` does. Where an error is raised, the model stays as it was.

    Raises:
        FileNotFoundError: there is no such folder and no such model that can be reached, or no layouts in it.
        ValueError: the file is cut short, of a newer version or of another model; or the model was prepared with
            other sizes.
    """
    model = _inside(model)
    path = _layouts_file(name_or_path)
    try:
        metadata, masks = read_safetensors(path)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is a safetensors file, but none that save_layouts wrote")
        if (version := whole_number(metadata, "version")) > FORMAT_VERSION:
            raise ValueError(
                f"{path} has format {version} of layouts, this version of SAT reads up to {FORMAT_VERSION}; upgrade "
                f"SAT to read it"
            )
        seq_len, block_size = (whole_number(metadata, name) for name in ("seq_len", "block_size"))
        model_type, pruned = metadata.get("model_type", ""), cast(ops.Pruned, metadata.get("pruned"))
        sparse = _sparse_modules(metadata.get("sparse", ""), masks)
        if pruned not in get_args(ops.Pruned):
            raise DamagedFile(f"its pruned is {shortened(str(pruned))}")
    except DamagedFile as error:
        raise ValueError(f"{path} is not a whole file of layouts ({error}); save the model again") from error
    if model_type != model.config.model_type:
        raise ValueError(
            f"{path} has the layouts of a model of type {shortened(model_type)}, not {model.config.model_type}"
        )
    modules = _self_attentions(model)
    names = {_base_name(model, name): name for name in modules}
    if names.keys() != masks.keys():
        strange = sorted(names.keys() ^ masks.keys())
        raise ValueError(
            f"{path} has the layouts of another model: {len(masks)} attention modules, where this "
            f"{type(model).__name__} has {len(modules)}; {shortened(strange[0])} is in only one of them"
        )
    blocks = -(-seq_len // block_size)
    for name, mask in masks.items():
        heads = _num_heads(names[name], modules[names[name]], model)
        if mask.dtype != torch.bool or mask.shape != (heads, blocks, blocks):
            raise ValueError(
                f"{path} has the layouts of another model: that of {name} is {list(mask.shape)}, where this model's "
                f"{heads} heads and the file's {seq_len} tokens in blocks of {block_size} make "
                f"{[heads, blocks, blocks]}"
            )
    backend: Any = next((state.backend for module in modules.values() if (state := _state(module)) is not None), "auto")
    states = prepare(model, seq_len, block_size, backend=backend, pruned=pruned)
    for name, mask in masks.items():
        states[names[name]].set_layout(BlockLayout(mask, block_size) if name in sparse else None)
    return states


def _sparse_modules(text: str, masks: dict[str, Tensor]) -> list[str]:
    """The names of the modules that have a layout, a JSON list of some of the masks' names."""
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"its list of sparse modules is no JSON: {reason(error)}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) and name in masks for name in names):
        raise DamagedFile("its list of sparse modules names others than those of its layouts")
    return names


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query ``[B, H, L, D]``, key and value with H or fewer heads, ``[B, L, H, D]``.

    A mask has one of these shapes; only the first two are small, and only these come from :func:`_mask` for plain
    padding: None; bool ``[B, S]``, causal with padding; ``[B, 1, 1, S]``, padding; all that broadcasts to
    ``[B, H, L, S]``, bool or added to the scores, which is used as it is. Where there is a mask, ``is_causal`` counts
    for nothing, as in transformers.
    """
    _refuse_weights(module, (), kwargs)
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:  # transformers' sdpa has not refused it in all versions
            raise ValueError(
                f'{type(module).__name__} passes {name}, which attn_implementation="sat" cannot honour; leave this '
                f'model dense, with attn_implementation="eager"'
            )
    if attention_mask is not None and attention_mask.dim() == 2 and attention_mask.dtype != torch.bool:
        raise ValueError(
            f"{type(module).__name__} passes a mask of shape {list(attention_mask.shape)} and {attention_mask.dtype}, "
            f'which attn_implementation="sat" cannot tell from one of queries by keys; use attn_implementation="sdpa"'
        )
    state = _state(module)
    if state is not None and (state.is_sparse or state.observing or module.training):
        # The model's call decides, not what the module was made with; in training always, so that processes which do
        # not observe this step know it as well.
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        causal = bool(causal) if attention_mask is None else attention_mask.dim() == 2
        if state.is_causal != causal:
            state.is_causal = causal
    if state is not None and (state.is_sparse or state.observing):
        padding, bias = _read_mask(attention_mask, query)
        _check(state, module, query, key, kwargs)
        if state.is_sparse:
            return _sparse_attention(state, query, key, value, padding, bias, dropout, scaling, kwargs), None
        padding = _observe(state, query, key, padding, bias, scaling, kwargs)
    else:
        state = None
    if attention_mask is not None and attention_mask.dim() == 2:
        ahead = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        attention_mask = attention_mask[:, None, None, :] & ahead.tril()
    context, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    if state is not None and state.block_gate is not None:
        query, key, value = as_autocast_does(*(x[: state.observe_samples] for x in (query, key, value)))
        key, value = _repeated(key, query), _repeated(value, query)
        width, scaling = value.shape[-1], query.shape[-1] ** -0.5 if scaling is None else scaling
        (context,) = _of_one_width(context.transpose(1, 2), width=max(width, query.shape[-1]))
        query, key, value = _of_one_width(query, key, value)
        context = state.watch(context, query, key, value, padding, scaling)
        context = context[..., :width].transpose(1, 2)
    return context, None


def _refuse_weights(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Say that there are no attention weights; also a hook, because some models do not tell their attention."""
    config = getattr(module, "config", None)
    asked = kwargs.get("output_attentions")
    asked = getattr(config, "output_attentions", False) if asked is None else asked
    if asked and getattr(config, "_attn_implementation", "sat") == "sat":
        raise ValueError(
            'attn_implementation="sat" never forms attention weights, so output_attentions=True cannot be served; '
            'use model.set_attn_implementation("eager") to look at them'
        )


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask function: what ``"sdpa"`` gets, in ``[B, S]`` or ``[B, 1, 1, S]`` for plain padding.

    Without padding None. Sliding windows, packed sequences and functions of the user become the mask that ``"sdpa"``
    gets, ``[B, 1, L, S]``.
    """
    function = kwargs.get("mask_function")
    bidirectional = function is bidirectional_mask_function and kwargs.get("allow_is_bidirectional_skip", False)
    # As many keys as queries, from the first key on: no cache, and the query's position is its row.
    causal = (
        function is causal_mask_function
        and kwargs.get("allow_is_causal_skip", True)
        and kwargs.get("kv_offset", 0) == 0
        and kwargs.get("kv_length") == kwargs.get("q_length")
    )
    if args or not (bidirectional or causal):
        return sdpa_mask(*args, **kwargs)
    if kwargs.get("attention_mask") is None:
        return None
    # Padding is the same for every query, so that the mask of a single one says it all.
    one: dict[str, Any] = {"q_length": 1, "q_offset": 0, "mask_function": bidirectional_mask_function}
    one |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}
    padding = sdpa_mask(**kwargs | one)
    return padding[:, 0, 0] if causal and padding is not None else padding


def _read_mask(mask: Tensor | None, query: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The keys' padding mask ``[B, S]``, and what is added to the scores."""
    if mask is None or mask.dim() == 2:
        return mask, None
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.dtype != torch.bool:
        return None, mask.masked_fill(mask <= MASKED, -torch.inf)
    if mask.shape[1] == mask.shape[2] == 1:
        return mask[:, 0, 0].expand(query.shape[0], -1), None
    return None, torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, -torch.inf)


def _check(state: AdaptiveAttention, module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> None:
    """Refuse what neither a layout nor statistics can do."""
    length, keys = query.shape[2], key.shape[2]
    doing = "the sparse phase" if state.is_sparse else "observing attention"
    if length != keys:
        raise ValueError(
            f"{doing} needs as many keys as queries, got {length} queries and {keys} keys, as from a key/value cache; "
            f"generate with use_cache=False, or densely after set_layout(None) on each attention"
        )
    if length > state.seq_len:
        raise ValueError(
            f"this attention was prepared for up to {state.seq_len} tokens, got {length}; shorten the sequence, or "
            f"load the model anew and prepare it with seq_len={length}"
        )
    if kwargs.get("cache") is not None:
        raise ValueError(
            f"{type(module).__name__} passes a paged key/value cache, which {doing} cannot use; generate without "
            f"continuous batching, or densely after set_layout(None) on each attention"
        )


def _sparse_attention(
    state: AdaptiveAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    bias: Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """Attention over the kept blocks, ``[B, L, H, D]``."""
    if bias is not None and state.pruned == "zero":
        raise ValueError(
            'with pruned="zero" a mask may only tell padding, as bool [B, S]: pruned entries that another mask forbids '
            'would count all the same; prepare the model with pruned="drop"'
        )
    if (position_bias := kwargs.get("position_bias")) is not None:
        bias = position_bias if bias is None else position_bias + bias
    width, scaling = value.shape[-1], query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = _of_one_width(query, key, value)
    queries = padding
    if position_bias is None and state.block_gate is not None:  # which knows of padding, but of no bias
        padding, bias = _as_padding(padding, bias, query)
    context = state(
        query,
        _repeated(key, query),
        _repeated(value, query),
        key_padding_mask=padding,
        query_padding_mask=queries,
        attn_bias=bias,
        scale=scaling,
        dropout_p=dropout,
    )
    return context[..., :width].transpose(1, 2).contiguous()


def _observe(
    state: AdaptiveAttention,
    query: Tensor,
    key: Tensor,
    padding: Tensor | None,
    bias: Tensor | None,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """Leave statistics in the state; gives the padding mask that they were made with."""
    padding, bias = _as_padding(padding, bias, query)
    if bias is not None or kwargs.get("position_bias") is not None:
        what = "a position bias" if bias is None else "a mask of queries by keys, or one that weighs keys"
        raise ValueError(
            f"attention cannot be observed under {what}: its statistics would not know of it; give the model a padding "
            f"mask [batch, tokens] and unpacked sequences, or set layouts by hand with set_layout"
        )
    first = slice(state.observe_samples)
    query, key = as_autocast_does(query[first], key[first])
    observed = None if padding is None else padding[first]
    state.observe(query, _repeated(key, query), observed, observed, scaling)
    return padding


def _as_padding(padding: Tensor | None, bias: Tensor | None, query: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Padding that the model itself has extended, 0 for tokens and the smallest number elsewhere, as a padding mask.

    Other numbers are a bias of the scores, and stay one.
    """
    if bias is None or bias.shape[1] > 1 or bias.shape[2] > 1:
        return padding, bias
    # A compiled graph cannot branch on numbers: there, such a mask is taken for padding.
    if not torch.compiler.is_compiling() and ((bias != 0) & (bias > -torch.inf)).any():
        return padding, bias
    return (bias[:, 0, 0] > -torch.inf).expand(query.shape[0], -1), None


def _of_one_width(*tensors: Tensor, width: int = 0) -> list[Tensor]:
    """Zeros beside what is narrower; they change no product.

    Values of multi-head latent attention are narrower than its keys.
    """
    width = max(width, *(x.shape[-1] for x in tensors))
    return [x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in tensors]


def _repeated(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values with a head for each of the query's, in the order of grouped attention."""
    return x if x.shape[1] == query.shape[1] else x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)


def _state(module: nn.Module) -> AdaptiveAttention | None:
    state = getattr(module, "sat", None)
    return state if isinstance(state, AdaptiveAttention) else None


def _states(model: nn.Module) -> dict[str, AdaptiveAttention]:
    """The states of a prepared model by the names of their attention modules."""
    return {name: state for name, module in model.named_modules() if (state := _state(module)) is not None}


def _described(seq_len: int, block_size: int, backend: str, pruned: str) -> str:
    return f"with seq_len={seq_len}, block_size={block_size}, backend={backend!r} and pruned={pruned!r}"


def _uses_interface(cls: type) -> bool:
    """Whether a method of the class looks its attention function up in transformers' interface."""
    methods = (inspect.unwrap(x) for base in cls.__mro__ for x in vars(base).values() if inspect.isfunction(x))
    return any("ALL_ATTENTION_FUNCTIONS" in method.__code__.co_names for method in methods)


def _self_attentions(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules that get a state, by name.

    Raises:
        ValueError: there is none, or they belong to several models.
    """
    name = type(model).__name__
    everything = {
        path: module
        for path, module in model.named_modules()
        if _uses_interface(type(module)) and not isinstance(module, PreTrainedModel)
    }
    if not everything:
        raise ValueError(
            f"the attention of {name} does not go through transformers' AttentionInterface, so that it cannot be "
            f"replaced; use a model that does, such as BERT, RoBERTa, ModernBERT, ViT or Llama, or put "
            f"sat.attention.AdaptiveAttention between the projections of your own"
        )
    configs = {id(config) for module in everything.values() if (config := getattr(module, "config", None)) is not None}
    if len(configs) > 1 or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is made of several models with lengths of their own; load the one that is to be sparse as a model "
            f"of its own, such as CLIPVisionModel of a CLIPModel, and prepare that"
        )
    found = {
        path: module
        for path, module in everything.items()
        if not _is_cross_attention(path, module) and not _has_window(module, model)
    }
    if not found:
        raise ValueError(
            f"{name} has no layer of full self-attention: all have a sliding window or attend to another model, and "
            f"stay as they are; train it without SAT"
        )
    return found


def _is_cross_attention(path: str, module: nn.Module) -> bool:
    names = f"{path.rsplit('.', 1)[-1]} {type(module).__name__}".lower()
    return getattr(module, "is_cross_attention", False) or re.search("cross|encoder_attn|encdec", names) is not None


def _has_window(module: nn.Module, model: PreTrainedModel) -> bool:
    """Whether a layer is sparse by a rule of its own."""
    config = getattr(module, "config", model.config)
    kinds, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds is not None and layer is not None and layer < len(kinds):
        return kinds[layer] in ("sliding_attention", "chunked_attention")
    return getattr(module, "sliding_window", getattr(config, "sliding_window", None)) is not None


def _num_heads(path: str, module: nn.Module, model: PreTrainedModel) -> int:
    """Heads of the queries."""
    config = getattr(module, "config", model.config)
    for place, attribute in (
        (module, "num_attention_heads"),
        (module, "num_heads"),
        (module, "n_heads"),
        (config, "num_attention_heads"),
    ):
        if isinstance(heads := getattr(place, attribute, None), int):
            return heads
    raise ValueError(f"{path} ({type(module).__name__}) does not tell how many heads it has; SAT cannot prepare it")


def _is_causal(module: nn.Module, model: PreTrainedModel) -> bool:
    """What the attention is likely to be; the model's calls decide."""
    if getattr(model.config, "is_causal", True) is False:  # a decoder that is used in both directions
        return False
    return bool(getattr(module, "is_causal", True))  # the default of transformers' sdpa


def _positions(model: PreTrainedModel) -> int:
    """How many tokens the model has positions for.

    Raises:
        ValueError: it does not tell, or they are too many to be meant.
    """
    tables = (getattr(module, "position_embeddings", None) for module in model.modules())
    table = next((x for x in tables if isinstance(x, nn.Embedding | nn.Parameter)), None)
    length = getattr(model.config, "max_position_embeddings", None)
    if isinstance(table, nn.Embedding):
        # Those with a padding index number their positions from the next one on.
        length = table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    elif table is not None and table.dim() == 3:
        length = table.shape[1] + getattr(model.config, "num_register_tokens", 0)  # patches and special tokens
    if not isinstance(length, int) or not 1 <= length <= LONGEST_DEFAULT:
        what = "does not tell how many tokens it takes" if length is None else f"takes up to {length} tokens"
        raise ValueError(f"{type(model).__name__} {what}; pass seq_len, the longest sequence of yours in tokens")
    return length


def _use_sat(model: PreTrainedModel, modules: dict[str, nn.Module]) -> None:
    """Switch the model to ``"sat"``.

    Raises:
        ValueError: transformers would not.
    """
    configs = [getattr(module, "config", model.config) for module in modules.values()]
    if any(config._attn_implementation != "sat" for config in configs):
        model.set_attn_implementation("sat")
    if any(config._attn_implementation != "sat" for config in configs):
        raise ValueError(
            f"transformers cannot switch the attention of {type(model).__name__}; load it with "
            f'attn_implementation="sat"'
        )


def _inside(model: nn.Module) -> PreTrainedModel:
    """The model of transformers itself, without what is wrapped around it.

    Raises:
        TypeError: there is none.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    for module in modules:  # from the outside in
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(
        f"layouts belong to a model of Hugging Face transformers, got {type(model).__name__}; pass the model that "
        f"prepare was given, or a wrapper around it"
    )


def _base_name(model: PreTrainedModel, name: str) -> str:
    """The same name with and without a head around the base model."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def _save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    *args: Any,
    **kwargs: Any,
) -> None:
    """``save_pretrained`` of a prepared model: plain weights, and the layouts beside them."""
    names = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr", "tags")
    upload = {name: kwargs.pop(name) for name in names if push_to_hub and name in kwargs}
    # transformers would push what it wrote itself; pushed afterwards, the layouts are among it.
    type(model).save_pretrained(model, save_directory, is_main_process, state_dict, False, *args, **kwargs)
    if not is_main_process or not Path(save_directory).is_dir():
        return
    save_layouts(model, save_directory)
    if (after := AFTER_SAVING.get(model)) is not None:
        after(model, Path(save_directory))
    if push_to_hub:
        repo_id = upload.pop("repo_id", Path(save_directory).name)
        sizes = {name: kwargs[name] for name in ("token", "max_shard_size") if name in kwargs}
        model.push_to_hub(repo_id, **upload, **sizes)


def _layouts_file(name_or_path: str | os.PathLike[str]) -> Path:
    """The file of layouts in a folder, or downloaded from the hub."""
    folder = Path(name_or_path)
    missing = (
        f"{name_or_path} has no {LAYOUTS_FILE}; only a model that sat.integrations.transformers prepared saves one"
    )
    if folder.is_dir():
        if not (folder / LAYOUTS_FILE).is_file():
            raise FileNotFoundError(missing)
        return folder / LAYOUTS_FILE
    try:
        return Path(hf_hub_download(str(name_or_path), LAYOUTS_FILE))
    except (EntryNotFoundError, OSError, ValueError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise FileNotFoundError(missing) from error
        raise FileNotFoundError(
            f"{name_or_path} is no folder here, and no model that can be reached on the Hugging Face hub "
            f"({type(error).__name__}); give the folder that save_pretrained wrote, or go online"
        ) from error


register()
