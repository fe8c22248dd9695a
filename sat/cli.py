"""Floor 7: the command line of ``python -m sat.train``: its options, and the data and the model that they name."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace
from lightning.pytorch import Trainer

from sat import runs
from sat.callback import AdaptiveSparsity
from sat.data import DATASETS, ColorImageDataModule, SequenceDataModule
from sat.data.tokens import TokenizedTextDataModule
from sat.models import PretrainedClassifier, SequenceClassifier
from sat.module import ClassificationModule

DESCRIPTION = """Train a Transformer densely until its attention has settled, then sparsely.

A model of our own, from scratch: --model.num_layers, --model.width, --model.attention ... say what it is.
  python -m sat.train --config cifar10.yaml --sparsity.density 0.1 --data.path DIR --trainer.max_steps 500
A pretrained model of Hugging Face transformers: --model.pretrained says which, a name on the hub or a folder.
  python -m sat.train --config bert_mrpc.yaml --model.pretrained NAME_OR_FOLDER --data.path DIR

The options under --data are those of the data set that --config or --data.name chooses, those under --model belong to
one of these two ways: what follows is {way}; for {other}, see
  python -m sat.train --config {example} --help
"""
WAYS = {
    False: {"way": "for a model of our own", "other": "a pretrained one", "example": "bert_mrpc.yaml"},
    True: {"way": "for a pretrained model", "other": "one of our own", "example": "cifar10.yaml"},
}
# Options of Lightning's Trainer that are ours to set, or that would name classes and so load code.
TRAINER_SKIP = {
    "accelerator",
    "strategy",
    "logger",
    "callbacks",
    "plugins",
    "profiler",
    "model_registry",
    "default_root_dir",
    "enable_checkpointing",
    "enable_model_summary",
    "enable_progress_bar",
    "use_distributed_sampler",
    "barebones",
    "fast_dev_run",
    "overfit_batches",
}


# Arguments of models that follow from the data.
OF_THE_DATA = {"vocab_size", "seq_len", "num_classes", "inputs", "towers", "per_token", "grid"}


class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the description as it is."""


def build_parser(data_name: str, pretrained: bool = False) -> ArgumentParser:
    """The command line for one data set and one kind of model; its sections are those of a config file."""
    parser = ArgumentParser(
        prog="python -m sat.train",
        description=DESCRIPTION.format(**WAYS[pretrained]),
        formatter_class=HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file, or the name of one in configs/")
    parser.add_argument("--name", type=str, default="run", help="the run's name, by default that of its config")
    parser.add_argument("--output_dir", type=str, default="runs", help="folder that gets a folder for each run")
    parser.add_argument("--ckpt_path", type=str | None, help="checkpoint to go on from; 'last': of the newest run")
    parser.add_argument(
        "--init_from",
        type=str | None,
        help="checkpoint, or folder of a run, whose weights a new run begins with; of shorter sequences, too",
    )
    parser.add_argument(
        "--init_layouts",
        type=bool | None,
        help="begin sparsely with the layouts of --init_from, stretched; null: if they are of shorter sequences",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, dropout and data order")
    parser.add_argument("--compile", type=bool, default=False, help="compile the model with torch.compile")
    parser.add_argument(
        "--process_timeout", type=int, default=600, help="seconds that processes wait for one another before they stop"
    )
    parser.add_argument(
        "--estimate", type=bool, default=False, help="say what time and memory the run will take here, and do not train"
    )
    parser.add_argument("--data.name", type=str, required=True, help=f"data set: {', '.join(DATASETS)}")
    parser.add_class_arguments(DATASETS[data_name], "data", skip={"seed"})
    model = PretrainedClassifier if pretrained else SequenceClassifier
    parser.add_class_arguments(model, "model", skip=OF_THE_DATA)
    parser.add_class_arguments(ClassificationModule, "optimizer", skip={"model", "num_classes", "metric"})
    parser.add_class_arguments(AdaptiveSparsity, "sparsity", skip={"seed"})
    parser.add_class_arguments(Trainer, "trainer", skip=TRAINER_SKIP)
    parser.add_argument("--trainer.accelerator", type=str, default="auto", help="auto, cpu, gpu or mps")
    parser.add_argument(
        "--trainer.strategy",
        type=str,
        default="auto",
        help="auto, ddp, fsdp2, or another of Lightning's names that neither forks nor spawns processes",
    )
    return parser


def parse(argv: list[str]) -> tuple[Namespace, ArgumentParser]:
    """Arguments and config files, checked.

    Raises:
        ValueError: an unknown config, data set, key, or a value of the wrong type.
    """
    argv = runs.resolve_config_arguments(argv)
    data_name, pretrained = _choices(argv)
    if data_name is None:
        if {"-h", "--help"} & set(argv) or not argv:
            data_name = "mrpc" if pretrained else "cifar10"  # any: they share most options
        else:
            raise ValueError(f"no data set chosen; give --config or --data.name, one of {', '.join(DATASETS)}")
    if not isinstance(data_name, str) or data_name not in DATASETS:
        raise ValueError(f"unknown data set {data_name!r} in data.name; there are {', '.join(DATASETS)}")
    parser = build_parser(data_name, pretrained)
    try:
        args = parser.parse_args(argv or ["--help"])
    except (argparse.ArgumentError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    if not args.name or Path(args.name).is_absolute() or ".." in Path(args.name).parts:
        raise ValueError(f"name must be that of a folder inside of output_dir, got {args.name!r}; give another --name")
    return args, parser


def _choices(argv: list[str]) -> tuple[str | None, bool]:
    """What decides which options there are, before the rest is read.

    Returns:
        ``data.name``, which decides what the ``data`` section may hold, and whether there is a ``model.pretrained``,
        be it null, which decides the same of the ``model`` section.
    """
    name, pretrained = None, False
    for option, value in runs.option_values(argv, ("--config", "--data.name", "--model.pretrained")):
        if option == "--data.name":
            name = value
            continue
        if option == "--model.pretrained":
            pretrained = True
            continue
        content = runs.read_config(value)
        name = content.get("data", {}).get("name", name)
        pretrained |= "pretrained" in content.get("model", {})
    return name, pretrained


def make_data(args: Namespace) -> SequenceDataModule:
    """The data set, which prepares texts and pictures as the pretrained model wants them unless told otherwise."""
    options = args.data.as_dict()
    name = options.pop("name")
    pretrained = "pretrained" in args.model
    if pretrained == (DATASETS[name].inputs == "ids"):
        kind = "token ids of its own" if pretrained else "inputs for pretrained models only"
        fitting = ", ".join(other for other, data in DATASETS.items() if pretrained == (data.inputs != "ids"))
        way = "leave model.pretrained out" if pretrained else "set model.pretrained to a hub name or a folder"
        raise ValueError(f"the data set {name} gives {kind}; {way}, or choose one of {fitting} as data.name")
    for option in ("tokenizer", "processor"):
        if option in options and options[option] is None:
            options[option] = args.model.pretrained
    return DATASETS[name](**options, seed=args.seed)


def make_model(args: Namespace, data: SequenceDataModule) -> SequenceClassifier | PretrainedClassifier:
    """The model, which takes what the data gives."""
    if data.inputs == "ids":
        return SequenceClassifier(
            data.vocab_size,
            data.seq_len,
            data.answers,
            towers=data.towers,
            per_token=data.hide is not None,
            grid=(math.isqrt(data.seq_len), math.isqrt(data.seq_len)) if data.pixel_tokens else None,
            **args.model.as_dict(),
        )
    model = PretrainedClassifier(data.num_classes, data.inputs, **args.model.as_dict())
    from sat.integrations.transformers import extend_position_embeddings, prepare  # transformers is an extra

    if isinstance(data, ColorImageDataModule):
        length, option, seq_len = max(data.picture_size), "image_size", None
        if min(data.picture_size) != length:
            raise ValueError(
                f"the image processor of {model.pretrained} makes pictures of {data.picture_size[0]} x "
                f"{data.picture_size[1]} pixels, but only square ones are supported here; set --data.image_size"
            )
        if (channels := getattr(model.model.config, "num_channels", 3)) != 3:
            raise ValueError(
                f"{model.pretrained} takes pictures of {channels} channel{'s' * (channels != 1)}, the data has 3; "
                f"choose a model for colour pictures"
            )
        if model.max_length is not None and length < model.max_length:
            raise ValueError(
                f"{model.pretrained} takes pictures of {model.max_length} pixels, the data gives {length}; set "
                f"--data.image_size {model.max_length}"
            )
    else:
        length, option, seq_len = data.seq_len, "seq_len", data.seq_len
        known = model.model.get_input_embeddings().num_embeddings
        if data.vocab_size > known:
            raise ValueError(
                f"the tokenizer has {data.vocab_size} tokens, of which {model.pretrained} knows {known}; give the "
                f"model's own as --data.tokenizer"
            )
        if isinstance(data, TokenizedTextDataModule):
            model.pad_with(data.tokenizer.pad_token_id)
    if model.max_length is not None and length > model.max_length:
        if not model.extend_positions:
            extensible = not any(hasattr(module, "wpe") for module in model.model.modules())  # not those of GPT-2
            raise ValueError(
                f"data.{option} is {length}, but {model.pretrained} has positions for {model.max_length}; set "
                f"--data.{option} {model.max_length}{', or --model.extend_positions true' * extensible}"
            )
        extend_position_embeddings(model.model, None, length)
    if model.attention == "adaptive":
        prepare(model.model, seq_len, model.block_size)
    return model


def check_trainer(options: Namespace) -> None:
    """What Lightning would stumble over in the middle of a run."""
    if options.max_steps == 0 or options.max_steps < -1:
        raise ValueError(f"trainer.max_steps must be at least 1 (or -1: as max_epochs says), got {options.max_steps}")
    if options.max_steps == -1 and options.max_epochs in (None, -1, 0):
        raise ValueError("the learning rate's cycle needs the number of steps; set trainer.max_steps or max_epochs")
    if options.max_epochs == 0:
        raise ValueError("trainer.max_epochs is 0, which trains nothing; raise it, or leave it out")
    if options.limit_train_batches == 0:
        raise ValueError("trainer.limit_train_batches is 0, which trains nothing; raise it, or leave it out")
    if options.accumulate_grad_batches < 1:
        raise ValueError(f"trainer.accumulate_grad_batches must be at least 1, got {options.accumulate_grad_batches}")
    interval = options.val_check_interval
    if isinstance(interval, int | float) and interval <= 0:
        raise ValueError(f"trainer.val_check_interval must be above 0, got {interval}")
    epochs = options.check_val_every_n_epoch
    if epochs is not None and epochs < 1:
        raise ValueError(
            f"trainer.check_val_every_n_epoch must be at least 1 (or null: by steps alone), got {epochs}; to leave "
            f"validation out, set trainer.limit_val_batches to 0"
        )
