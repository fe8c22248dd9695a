"""Floor 7: ``python -m sat.train --config cifar10.yaml``."""

from __future__ import annotations

import argparse
import contextlib
import logging
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

from sat import runs
from sat.callback import AdaptiveSparsity
from sat.data import DATASETS, SequenceDataModule, TextDataModule
from sat.files import written_whole
from sat.models import SequenceClassifier
from sat.module import ClassificationModule
from sat.monitor import BarProgress, ExactResume, LineProgress, Monitor, RunInterrupted, SaveLast

logger = logging.getLogger(__name__)

DESCRIPTION = """Train a Transformer densely until its attention has settled, then sparsely.

The options under --data are those of the data set that --config or --data.name chooses.
Example: python -m sat.train --config cifar10.yaml --sparsity.density 0.1 --data.path DIR --trainer.max_steps 500
"""
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


class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the description as it is."""


def build_parser(data_name: str) -> ArgumentParser:
    """The command line for one data set; its sections are those of a config file."""
    parser = ArgumentParser(
        prog="python -m sat.train",
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file, or the name of one in configs/")
    parser.add_argument("--name", type=str, default="run", help="the run's name, by default that of its config")
    parser.add_argument("--output_dir", type=str, default="runs", help="folder that gets a folder for each run")
    parser.add_argument("--ckpt_path", type=str | None, help="checkpoint to go on from; 'last': of the newest run")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, dropout and data order")
    parser.add_argument("--compile", type=bool, default=False, help="compile the model with torch.compile")
    parser.add_argument("--data.name", type=str, required=True, help=f"data set: {', '.join(DATASETS)}")
    parser.add_class_arguments(DATASETS[data_name], "data", skip={"seed"})
    parser.add_class_arguments(SequenceClassifier, "model", skip={"vocab_size", "seq_len", "num_classes"})
    parser.add_class_arguments(ClassificationModule, "optimizer", skip={"model", "num_classes"})
    parser.add_class_arguments(AdaptiveSparsity, "sparsity", skip={"seed"})
    parser.add_class_arguments(Trainer, "trainer", skip=TRAINER_SKIP)
    parser.add_argument("--trainer.accelerator", type=str, default="auto", help="auto, cpu, gpu or mps")
    parser.add_argument("--trainer.strategy", type=str, default="auto", help="Lightning's name of a strategy")
    return parser


def parse(argv: list[str]) -> tuple[Namespace, ArgumentParser]:
    """Arguments and config files, checked.

    Raises:
        ValueError: an unknown config, data set, key, or a value of the wrong type.
    """
    argv = runs.resolve_config_arguments(argv)
    data_name = _data_name(argv)
    if data_name is None:
        if {"-h", "--help"} & set(argv) or not argv:
            data_name = "cifar10"  # any: they share most options
        else:
            raise ValueError(f"no data set chosen; give --config or --data.name, one of {', '.join(DATASETS)}")
    if data_name not in DATASETS:
        raise ValueError(f"unknown data set {data_name!r} in data.name; there are {', '.join(DATASETS)}")
    parser = build_parser(data_name)
    try:
        return parser.parse_args(argv or ["--help"]), parser
    except argparse.ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _data_name(argv: list[str]) -> str | None:
    """``data.name``, which decides what the ``data`` section may hold, before the rest is read."""
    name = None
    for option, value in runs.option_values(argv, ("--config", "--data.name")):
        if option == "--data.name":
            name = value
            continue
        try:
            content = yaml.safe_load(Path(value).read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{value} is not a YAML file: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict) or not isinstance(content.get("data", {}), dict):
            raise ValueError(f"{value} is not a config: it must map sections such as data and model to options")
        name = content.get("data", {}).get("name", name)
    return name


class Run:
    """One training, from its arguments: set up, train, test, report."""

    def __init__(self, args: Namespace, parser: ArgumentParser, console: Console) -> None:
        self.console = console
        self.name = args.name
        seed_everything(args.seed, verbose=False)
        data_options = args.data.as_dict()
        self.data: SequenceDataModule = DATASETS[data_options.pop("name")](**data_options, seed=args.seed)
        self.model = model = SequenceClassifier(
            self.data.vocab_size, self.data.seq_len, self.data.num_classes, **args.model.as_dict()
        )
        self.module = ClassificationModule(model, self.data.num_classes, **args.optimizer.as_dict())
        if args.compile:
            # Each combination of dense, observed and sparse layers is a graph of its own, in training and evaluation.
            graphs = 4 * (args.model.num_layers + 2)
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, graphs)
            model.compile(fullgraph=True)
        self.sparsity = self._make_sparsity(args)
        checkpoint = runs.find_checkpoint(args.ckpt_path, Path(args.output_dir) / args.name)
        if checkpoint is not None:
            runs.check_checkpoint(checkpoint, self.module, model)
        self.checkpoint = checkpoint
        self.folder = runs.run_folder(Path(args.output_dir), args.name, checkpoint)
        self.last = self.folder / "checkpoints" / "last.ckpt"
        args.ckpt_path = None  # so that the saved config starts the run anew
        self.config = parser.dump(args, skip_unset=False)
        self.monitor = Monitor(self.sparsity, console, args.model.attention)
        self.save_last = SaveLast(self.last)
        _check_trainer_options(args.trainer)
        self.best = ModelCheckpoint(
            self.folder / "checkpoints",
            filename="best",
            monitor="val/acc",
            mode="max",
            enable_version_counter=False,
            save_on_train_epoch_end=False,  # at the end of validation, whether or not an epoch ends there
        )
        self.trainer = Trainer(
            **args.trainer.as_dict(),
            logger=[
                CSVLogger(self.folder, name="csv"),
                TensorBoardLogger(self.folder, name="tensorboard", version=""),
            ],
            callbacks=self._callbacks(),
            use_distributed_sampler=False,  # our loaders know their rank
            enable_model_summary=False,
            enable_progress_bar=False,  # ours counts steps
            default_root_dir=self.folder,
        )

    def _make_sparsity(self, args: Namespace) -> AdaptiveSparsity | None:
        """What switches the model to sparse attention, if it learns layouts at all."""
        if args.model.attention not in ("adaptive", "spion"):
            return None
        options = args.sparsity.as_dict()
        if args.model.attention == "spion":
            # A published method with its own rules: what the section says of the criterion and the masks is SAT's.
            own = {"quantile": 0.99 if isinstance(self.data, TextDataModule) else 0.96, "change": 15.0}
            interval = args.trainer.val_check_interval  # SPION looks when it evaluates
            own["interval"] = interval if isinstance(interval, int) else options["interval"]
            unknown = sorted(set(self.model.attention_options) - set(own))
            if unknown:
                raise ValueError(
                    f"model.attention_options: spion has no option {unknown[0]!r}; it has {', '.join(own)}"
                )
            own |= self.model.attention_options
            for name, value in own.items():
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise ValueError(f"model.attention_options: {name} of spion must be a number, got {value!r}")
            options |= {"mask": "spion", "quantile": own["quantile"], "density": None, "coverage": None}
            options |= {"per_head": False, "theta": None, "delta": own["change"], "interval": own["interval"]}
        return AdaptiveSparsity(**options, seed=args.seed)

    def _callbacks(self) -> list[Callback]:
        """In the order in which they act at the end of a step."""
        progress = (BarProgress if self.console.is_terminal else LineProgress)(self.monitor, self.console)
        sparsity = [self.sparsity] if self.sparsity else []
        return [self.save_last, *sparsity, self.monitor, progress, ExactResume(), self.best]

    def prepare(self) -> None:
        """Make the run's folder and read the data; a new folder does not outlive a failure."""
        new = not self.folder.exists()
        try:
            runs.make_folder(self.folder)
            with written_whole(self.folder / ("config.yaml" if new else "config_resumed.yaml")) as temporary:
                temporary.write_text(self.config)
            self.data.prepare_data()
            self.data.setup("fit")
            # Refuses a batch that is larger than the training set, and empty splits.
            for loader in (self.data.train_dataloader, self.data.val_dataloader, self.data.test_dataloader):
                loader()
        except BaseException:
            if new:
                shutil.rmtree(self.folder, ignore_errors=True)
                with contextlib.suppress(OSError):  # there are other runs of this name
                    self.folder.parent.rmdir()
            raise
        parameters = sum(p.numel() for p in self.module.parameters())
        self.console.print(
            f"{self.name}: {self.data.seq_len} tokens, {self.data.num_classes} classes, {parameters:,} parameters; "
            f"results go to {self.folder}",
            highlight=False,
            soft_wrap=True,
        )

    def train(self) -> None:
        """To the end; leaves ``last.ckpt`` as it is then."""
        ckpt_path = None if self.checkpoint is None else str(self.checkpoint)
        self.trainer.fit(self.module, datamodule=self.data, ckpt_path=ckpt_path, weights_only=True)
        self.save_last.save(self.trainer, self.module)
        if self.save_last.interrupted:  # during the last step, after which there was no other to stop at
            raise RunInterrupted(f"interrupted at step {self.trainer.global_step}, the last one")

    def report(self) -> dict[str, Any]:
        """Test the final and the best model, write and print the summary."""
        summary = runs.summarize(self.name, self.trainer, self.module, self.model, self.monitor, self.sparsity)
        runs.save_layouts(self.folder, runs.layouts_of(self.module), self.sparsity)
        summary["test_accuracy"] = self._test("final")
        if Path(self.best.best_model_path).is_file():
            best = torch.load(self.best.best_model_path, map_location="cpu", weights_only=True)
            self.module.load_state_dict(best["state_dict"])
            summary["test_accuracy"] |= self._test("best")
            summary["best_checkpoint"] = {
                "step": best["global_step"],
                "phase": runs.phase_of(self.module, self.model.attention),
            }
        runs.write_summary(self.folder / "summary.json", summary)
        runs.print_summary(self.console, self.folder, summary)
        return summary

    def _test(self, name: str) -> dict[str, float]:
        if self.trainer.limit_test_batches == 0:
            return {}
        (metrics,) = self.trainer.test(self.module, datamodule=self.data, verbose=False)
        return {name: round(metrics["test/acc"], 4)}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """The command. Bad input ends it with a sentence and exit status 2, Ctrl-C with 130."""
    argv = sys.argv[1:] if argv is None else argv
    console = Console()
    _quiet_lightning()
    try:
        run = Run(*parse(argv), console)
        run.prepare()
    except (ValueError, TypeError, OSError, ImportError, MisconfigurationException) as error:
        _fail(" ".join(str(error).split()), 2)
    except KeyboardInterrupt:
        _fail("interrupted before the first step; nothing was begun", 130)
    try:
        run.train()
    except RunInterrupted as stop:
        where = f"; go on with --ckpt_path {run.last} (or --ckpt_path last)" if run.last.is_file() else ""
        _fail(f"{stop}{where}", 130)
    except FloatingPointError as error:
        kept = f"; the last good checkpoint is {run.last}" if run.last.is_file() else ""
        _fail(f"{error}{kept}", 1)
    except (ValueError, MisconfigurationException) as error:
        if run.monitor.trained:  # not a matter of settings, then
            raise
        logger.debug("refused before the first step", exc_info=True)
        _fail(" ".join(str(error).split()), 2)
    try:
        return run.report()
    except (KeyboardInterrupt, SystemExit):  # the latter is what Lightning makes of the former
        _fail(f"interrupted while testing; the trained model is {run.last}", 130)


def _check_trainer_options(options: Namespace) -> None:
    """What Lightning would stumble over in the middle of a run."""
    if options.max_steps == 0 or options.max_steps < -1:
        raise ValueError(f"trainer.max_steps must be at least 1 (or -1: as max_epochs says), got {options.max_steps}")
    if options.max_steps == -1 and options.max_epochs in (None, -1, 0):
        raise ValueError("the learning rate's cycle needs the number of steps; set trainer.max_steps or max_epochs")
    if options.accumulate_grad_batches < 1:
        raise ValueError(f"trainer.accumulate_grad_batches must be at least 1, got {options.accumulate_grad_batches}")
    interval = options.val_check_interval
    if isinstance(interval, int | float) and interval <= 0:
        raise ValueError(f"trainer.val_check_interval must be above 0, got {interval}")


def _fail(sentence: str, status: int) -> NoReturn:
    print(f"sat.train: {sentence}", file=sys.stderr)
    raise SystemExit(status)


def _quiet_lightning() -> None:
    """Leave out what Lightning says at every start; what is wrong still shows."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in ("does not have many workers", "exists and is not empty", "number of training batches", "LeafSpec"):
        warnings.filterwarnings("ignore", f".*{message}.*")


if __name__ == "__main__":
    main()
