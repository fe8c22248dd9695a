"""Floor 3: pretrained classifiers of Hugging Face transformers, as a model of ours: inputs in, logits out."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

PretrainedAttention = Literal["adaptive", "dense"]
Inputs = Literal["text", "pictures"]


class PretrainedClassifier(nn.Module):
    """A pretrained model of Hugging Face transformers with a head for so many classes.

    Weights that the files lack, such as those of a new head, are drawn at random; their names are in ``new_weights``.
    The attention is PyTorch's fused one until ``sat.integrations.transformers.prepare(classifier.model, ...)``, which
    ``adaptive`` stands for: whoever makes the model calls it. Weights are trained in float32, whatever they were
    saved in.

    Args:
        num_classes: classes to tell apart.
        inputs: ``text`` for a model that takes ``input_ids``, ``pictures`` for one that takes ``pixel_values``.
        pretrained: name on the Hugging Face hub, or a local folder, of the model to start from.
        attention: ``adaptive`` trains densely, then sparsely; ``dense`` is fused dense attention throughout.
        block_size: edge of the layouts' blocks, in tokens.
        dropout: probability of dropping features and attention weights in training, in place of all that the model's
            config says; as it says when not given.
        freeze_backbone: train only the head and what else the files lack.
        extend_positions: where sequences (or pictures) are longer than the model was trained for, extend its learned
            positions; without it, such data is refused.
        activation_checkpointing: keep only the input of each layer for the backward pass, which computes the rest of
            the layer once more: less memory for more time, the same results.

    Raises:
        ValueError: no ``pretrained`` is given, an argument is out of range, the folder holds no model for this task, or
            the model knows no activation checkpointing.
        ConnectionError: there is no such folder, and the hub does not give the model.
        ImportError: transformers is missing.
    """

    def __init__(
        self,
        num_classes: int,
        inputs: Inputs,
        *,
        pretrained: str | None = None,
        attention: PretrainedAttention = "adaptive",
        block_size: int = 16,
        dropout: float | None = None,
        freeze_backbone: bool = False,
        extend_positions: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not pretrained:
            raise ValueError(
                "no pretrained model is chosen; set model.pretrained to a name on the Hugging Face hub or to a folder "
                "that save_pretrained has written"
            )
        if attention not in get_args(PretrainedAttention):
            raise ValueError(
                f"attention of a pretrained model must be one of {', '.join(get_args(PretrainedAttention))}, got "
                f"{attention!r}"
            )
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        if dropout is not None and not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        self.pretrained, self.attention, self.block_size = pretrained, attention, block_size
        self.extend_positions, self.activation_checkpointing = extend_positions, activation_checkpointing
        self.attention_options: dict[str, Any] = {}
        self.model, self.new_weights = _load(pretrained, num_classes, inputs, dropout)
        self.model.train()  # transformers hands models over in evaluation mode, and Lightning leaves modes alone
        if activation_checkpointing:
            if not self.model.supports_gradient_checkpointing:
                raise ValueError(
                    f"{type(self.model).__name__} of transformers knows no activation checkpointing; leave "
                    f"model.activation_checkpointing out"
                )
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if freeze_backbone:
            for name, parameter in self.model.named_parameters():
                # Of what the backbone lacks, such as a pooler, random values would be frozen.
                is_backbone = name.startswith(f"{self.model.base_model_prefix}.")
                parameter.requires_grad_(not is_backbone or name in self.new_weights)
        self._accepted = set(inspect.signature(self.model.forward).parameters)
        if getattr(self.model.config, "type_vocab_size", 2) < 2:
            self._accepted.discard("token_type_ids")  # of a tokenizer that is another model's

    @property
    def max_length(self) -> int | None:
        """The longest sequence in tokens, or edge of a picture in pixels; None where no table bounds it."""
        image_size = getattr(self.model.config, "image_size", None)
        if image_size is not None:
            return max(image_size) if isinstance(image_size, list | tuple) else image_size
        for module in self.model.modules():
            tables = [getattr(module, name, None) for name in ("position_embeddings", "wpe")]  # the latter in GPT-2
            table = next((each for each in tables if isinstance(each, nn.Embedding)), None)
            if table is not None:
                # RoBERTa and its kin number positions from behind the padding's on.
                padding = getattr(module, "padding_idx", None)
                return table.num_embeddings - (0 if padding is None else padding + 1)
        return None

    def pad_with(self, token: int) -> None:
        """Tell the model the token of padding: decoders read their answer at the last token that is another.

        Raises:
            ValueError: its positions are numbered by another one.
        """
        for module in self.model.modules():
            own = getattr(module, "padding_idx", None)
            if isinstance(getattr(module, "position_embeddings", None), nn.Embedding) and own not in (None, token):
                raise ValueError(
                    f"{self.pretrained} numbers positions from behind its padding, token {own}, and the tokenizer pads "
                    f"with {token}; give the model's own as --data.tokenizer"
                )
        for config in (self.model.config, self.model.config.get_text_config()):
            config.pad_token_id = token

    def origin(self) -> str:
        """Where the weights come from and which of them are trained, for people."""
        trained = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        new = f"; new and random at first: {', '.join(sorted(self.new_weights))}" if self.new_weights else ""
        return f"pretrained: {self.pretrained}, {trained:,} parameters are trained{new}"

    def save(self, folder: Path, weights: Mapping[str, Tensor], class_names: Sequence[str]) -> None:
        """Write what ``save_pretrained`` writes; of a prepared model, the layouts too.

        Args:
            folder: made if it is not there.
            weights: of ``model``, whole, wherever its own lie.
            class_names: for the config; one for each class, or none.
        """
        if class_names:
            self.model.config.id2label = dict(enumerate(class_names))
            self.model.config.label2id = {name: index for index, name in enumerate(class_names)}
        with _quiet():
            self.model.save_pretrained(folder, state_dict=dict(weights))

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits ``[B, classes]``; of the inputs, those that the model knows are passed on."""
        return self.model(**{name: value for name, value in inputs.items() if name in self._accepted}).logits


def _load(name: str, num_classes: int, inputs: Inputs, dropout: float | None) -> tuple[Any, set[str]]:
    """The model, and the names of the weights that its files lack."""
    try:
        import transformers  # here, since it takes seconds and is an extra
    except ImportError as error:
        raise ImportError(
            "pretrained models need transformers, which is not installed; install it with "
            "pip install 'transformers>=5.10'"
        ) from error
    task = "SequenceClassification" if inputs == "text" else "ImageClassification"
    local = Path(name).is_dir()
    refusal: Exception | None = None
    if not local:
        from huggingface_hub import HfApi

        try:
            # One request without retries: the loader alone would try for half a minute.
            HfApi().model_info(name, timeout=10)
        except Exception as error:  # the kind depends on the version of the library and on its HTTP client
            refusal = error
    only_local = local or refusal is not None  # what was downloaded before is still there
    try:
        config = transformers.AutoConfig.from_pretrained(
            name, num_labels=num_classes, local_files_only=only_local, trust_remote_code=False
        )
    except Exception as error:
        raise _unreadable(name, local, refusal or error) from error
    mapping = getattr(transformers, f"MODEL_FOR_{'SEQUENCE' if inputs == 'text' else 'IMAGE'}_CLASSIFICATION_MAPPING")
    if type(config) not in mapping:
        raise ValueError(
            f"{name} is a {config.model_type}, which transformers has no {task} model for; choose a model.pretrained "
            f"for {inputs}"
        )
    if dropout is not None:
        _set_dropout(name, config, dropout)
    auto: Any = getattr(transformers, f"AutoModelFor{task}")
    try:
        with _quiet():
            model, info = auto.from_pretrained(
                name,
                config=config,
                attn_implementation="sdpa",
                ignore_mismatched_sizes=True,  # a head for other classes
                dtype=torch.float32,
                local_files_only=only_local,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # a damaged file raises whatever its reader raises
        raise _unreadable(name, local, refusal or error) from error
    # Of mismatched weights: the name and both shapes.
    new = {*info["missing_keys"], *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])}
    backbone = {key for key, _ in model.base_model.named_parameters(prefix=model.base_model_prefix)}
    if 2 * len(backbone & new) > len(backbone):  # some files lack a pooler; these are of something else
        raise ValueError(
            f"{name} has {len(backbone - new)} of the {len(backbone)} weights of the backbone of "
            f"{type(model).__name__}, and the others would be random; give another model.pretrained, or correct "
            f"model_type in its config.json"
        )
    return model, new


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bar and its table of weights that are missing, which we report ourselves."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _set_dropout(name: str, config: Any, dropout: float) -> None:
    """Let every probability of the config whose name says dropout be this one."""
    names = [
        key
        for key, value in config.to_dict().items()
        if "dropout" in key and isinstance(value, int | float) and not isinstance(value, bool)
    ]
    if not names:
        raise ValueError(f"the config of {name} names no dropout that model.dropout={dropout} could set; leave it out")
    for key in names:
        setattr(config, key, dropout)


def _unreadable(name: str, local: bool, error: Exception) -> Exception:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    if local:
        return ValueError(
            f"the folder {name} holds no pretrained model that can be read ({reason}); give model.pretrained a folder "
            f"that save_pretrained has written"
        )
    return ConnectionError(
        f"{name!r} is no folder, and the hub gives no model of that name ({reason}); correct model.pretrained, or "
        f"connect to the internet"
    )
