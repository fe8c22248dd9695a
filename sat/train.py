"""Floor 8: ``python -m sat.train --config cifar10.yaml``."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import torch.distributed
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule

from sat import checkpoints, estimate, runs
from sat.attention import AdaptiveAttention
from sat.callback import AdaptiveSparsity
from sat.cli import check_trainer, make_data, make_model, parse
from sat.data import ListOps, TextDataModule
from sat.files import UNWRITABLE, reason, written_whole
from sat.layout import BlockLayout
from sat.models import PretrainedClassifier
from sat.module import ClassificationModule
from sat.monitor import BarProgress, LineProgress, Monitor
from sat.saving import ExactResume, RunInterrupted, SaveLast, WholeCheckpoints
from sat.scaling import scale_layout
from sat.sparsity import LayoutsDiffer

logger = logging.getLogger(__name__)

LONGEST_TIMEOUT = 10**9  # seconds; what is far longer overflows in the processes' own clocks


class Run:
    """One training, from its arguments: set up, train, test, report."""

    def __init__(self, args: Namespace, parser: ArgumentParser, console: Console) -> None:
        self.began = time.perf_counter()
        self.console = console
        self.name = args.name
        if args.estimate and args.ckpt_path is not None:
            raise ValueError(
                f"--estimate is of a whole run, not of the rest of one; leave --ckpt_path {args.ckpt_path} out"
            )
        seed_everything(args.seed, verbose=False)
        self.data = data = make_data(args)
        self.model = model = make_model(args, data)
        self.module = ClassificationModule(model, data.answers, metric=data.metric, **args.optimizer.as_dict())
        if args.compile:
            if getattr(data, "padding", "max_length") != "max_length":
                raise ValueError(
                    "a compiled model takes batches of one length; with --compile true set --data.padding max_length"
                )
            # Each combination of dense, observed and sparse layers is a graph of its own, in training and evaluation;
            # so is each batch of an accumulation, of which other samples are observed.
            layers = sum(isinstance(module, AdaptiveAttention) for module in model.modules())
            graphs = (3 + args.trainer.accumulate_grad_batches) * (layers + 2)
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, graphs)
            # What is observed in a layer whose activations are not kept is observed once.
            torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
            model.compile(fullgraph=True)
        check_trainer(args.trainer)
        self.sparsity = self._make_sparsity(args)
        if self.sparsity is not None and self.sparsity.guard is not None and args.trainer.limit_val_batches == 0:
            raise ValueError(
                f"sparsity.guard={self.sparsity.guard} goes by the loss on validation data, and with "
                f"trainer.limit_val_batches=0 there is none; validate, or set the guard to null"
            )
        checkpoint = checkpoints.find_checkpoint(args.ckpt_path, Path(args.output_dir) / args.name)
        self.folder = runs.run_folder(Path(args.output_dir), args.name, checkpoint)
        self.new = not self.folder.exists()
        self.anew = checkpoint is not None and not checkpoint.is_file()
        self.checkpoint = None if self.anew else checkpoint
        self.weights, self.new_head = None, False
        self.before: tuple[Path, bytes | None] | None = None  # the file of this run's settings, and what was in it
        self.carried: list[tuple[BlockLayout, BlockLayout]] = []  # layouts of another run, there and here
        if self.checkpoint is not None:
            checkpoints.check_checkpoint(self.checkpoint, self.module, model)
        elif args.init_from is not None:
            self.weights = checkpoints.find_weights(args.init_from)
            runs.check_drawn(self.weights, args.data.as_dict())
            learned = checkpoints.load_weights(self.weights, self.module, pictures=data.pixel_tokens)
            self.new_head = learned.new_head
            self.carried = self._carry(learned, args.init_layouts)
        elif args.init_layouts:
            raise ValueError("--init_layouts true takes layouts from another run; name it with --init_from")
        if self.sparsity is not None:
            self.sparsity.find_attention(self.module)  # which refuses now what does not fit
            if self.checkpoint is None:
                self.sparsity.check_phases()
        self.last = self.folder / "checkpoints" / "last.ckpt"
        args.ckpt_path = None  # so that the saved config starts the run anew
        self.config = parser.dump(args, skip_unset=False)
        self.monitor = Monitor(self.sparsity, console, args.model.attention)
        self.save_last = SaveLast(self.last)
        self.save_last.stale = self.checkpoint not in (None, self.last)
        if not 1 <= args.process_timeout <= LONGEST_TIMEOUT:
            raise ValueError(f"process_timeout must be 1 to {LONGEST_TIMEOUT:,} seconds, got {args.process_timeout}")
        self.best = ModelCheckpoint(
            self.folder / "checkpoints",
            filename="best",
            monitor=f"val/{self.data.metric}",
            mode="max",
            enable_version_counter=False,
            save_on_train_epoch_end=False,  # at the end of validation, whether or not an epoch ends there
        )
        self._trainer_options = args.trainer.as_dict()
        loggers = [CSVLogger(self.folder, name="csv"), TensorBoardLogger(self.folder, name="tensorboard", version="")]
        self.trainer = self._make_trainer(self._callbacks(), logger=loggers)
        if isinstance(self.trainer.strategy.launcher, _MultiProcessingLauncher):
            raise ValueError(
                f"trainer.strategy={args.trainer.strategy} forks or spawns its processes, into which a run cannot be "
                f"carried over; use ddp, which starts the command once for each"
            )
        if hasattr(self.trainer.strategy, "_timeout"):  # there is no other way to it where Lightning chooses
            self.trainer.strategy._timeout = timedelta(seconds=args.process_timeout)
        console.quiet = self.trainer.global_rank > 0
        if self.checkpoint is not None:
            checkpoints.check_processes(self.checkpoint, self.trainer, data.batch_size)

    def _make_trainer(self, callbacks: list[Callback], **options: Any) -> Trainer:
        """A trainer with the run's settings, of which options given here take precedence."""
        options = {**self._trainer_options, **options}
        if options["strategy"] == "fsdp2":
            options["strategy"] = FullySharded()
        return Trainer(
            **options,
            callbacks=callbacks,
            plugins=[WholeCheckpoints()],
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
            options |= self._spion(args.trainer, options["interval"])
            if options["max_dense_steps"] is not None:
                # It looks rarely, and compares what it has seen; a bound that is meant for SAT would come before that.
                most = min(10 * options["interval"], max(args.trainer.max_steps, 0) // 2)
                options["max_dense_steps"] = max(options["max_dense_steps"], most)
        return AdaptiveSparsity(**options, seed=args.seed)

    def _carry(self, learned: checkpoints.Learned, wanted: bool | None) -> list[tuple[BlockLayout, BlockLayout]]:
        """Begin with the layouts of another run, if that is wanted: those of each layer, there and here."""
        adaptive = self.sparsity is not None and self.model.attention == "adaptive"
        attention = next((m for m in self.module.modules() if isinstance(m, AdaptiveAttention)), None)
        if wanted is None:
            wanted = adaptive and attention is not None and 0 < learned.length < attention.seq_len
        if not wanted:
            return []
        if not adaptive:
            raise ValueError(
                f"--init_layouts true gives layouts to adaptive attention, but model.attention is "
                f"{self.model.attention}; leave it away"
            )
        if not learned.layouts:
            raise ValueError(
                f"{self.weights} has no layouts to begin with, for its training was not sparse in all layers; leave "
                f"--init_layouts away"
            )
        assert attention is not None
        assert self.sparsity is not None
        lengths, size, pictures = (learned.length, attention.seq_len), attention.block_size, self.data.pixel_tokens
        try:
            here = [scale_layout(each, *lengths, block_size=size, pictures=pictures) for each in learned.layouts]
            self.sparsity.begin_with(here, f"the layouts of {self.weights}")
        except ValueError as error:
            raise ValueError(f"the layouts of {self.weights}: {error}; or give --init_layouts false") from error
        return list(zip(learned.layouts, here, strict=True))

    def _spion(self, trainer: Namespace, interval: int) -> dict[str, Any]:
        """A published method with its own rules, which prevail over what the config says of SAT's."""
        own: dict[str, Any] = {"quantile": 0.99 if isinstance(self.data, TextDataModule) else 0.96, "change": 15.0}
        if isinstance(self.data, ListOps):
            own["quantile"] = 0.98
        # SPION looks when it evaluates. Where that is a share of an epoch, the config's interval stands.
        batches = trainer.val_check_interval
        whole = isinstance(batches, int) and not isinstance(batches, bool)
        own["interval"] = max(1, batches // trainer.accumulate_grad_batches) if whole else interval
        for name, value in self.model.attention_options.items():
            if name not in own:
                raise ValueError(f"model.attention_options: spion has no option {name!r}; it has {', '.join(own)}")
            if isinstance(value, bool) or not isinstance(value, int if name == "interval" else int | float):
                kind = "whole number" if name == "interval" else "number"
                raise ValueError(f"model.attention_options: {name} of spion must be a {kind}, got {value!r}")
        own |= self.model.attention_options
        if not 0 <= own["quantile"] < 1 or own["change"] <= 0 or own["interval"] < 1:
            raise ValueError(
                f"model.attention_options: spion needs 0 <= quantile < 1, a change above 0 (in percent) and an "
                f"interval of at least 1 step, got {own}"
            )
        criterion = {"theta": None, "delta": own["change"], "smoothing": 0.0, "patience": 1, "per_layer": False}
        criterion |= {"agreement": None, "revise_interval": None, "start": None}
        selection = {"mask": "spion", "quantile": own["quantile"], "density": None, "coverage": None}
        selection |= {"per_head": False, "share_budget": False, "by_offset": False}
        return {**criterion, **selection, "interval": own["interval"], "min_dense_steps": 0}

    def _callbacks(self) -> list[Callback]:
        """In the order in which they act at the end of a step."""
        progress = (BarProgress if self.console.is_terminal else LineProgress)(self.monitor, self.console)
        sparsity = [self.sparsity] if self.sparsity else []
        return [_OneRun(self), self.save_last, *sparsity, self.monitor, progress, ExactResume(), self.best]

    def agree(self) -> None:
        """Let all processes work in the folder, and go on from the checkpoint, that rank 0 has chosen.

        Raises:
            ValueError: this process has found another checkpoint.
        """
        checkpoint, self.folder = self.trainer.strategy.broadcast((self.checkpoint, self.folder))
        if checkpoint != self.checkpoint:
            raise ValueError(
                f"--ckpt_path found {self.checkpoint} in this process and {checkpoint} in that of rank 0; give the "
                f"path of one checkpoint, on a disk that all machines share"
            )
        self.last = self.save_last.path = self.folder / "checkpoints" / "last.ckpt"

    def prepare(self) -> None:
        """Make the run's folder and read the data; a new folder does not outlive a failure.

        In rank 0; the other processes read the data when it has been prepared.
        """
        if self.trainer.global_rank > 0:
            return
        if self.new:
            runs.claim_folder(self.folder)
        try:
            runs.make_folder(self.folder)
            first = self.anew or not (self.folder / "config.yaml").exists()
            file = self.folder / ("config.yaml" if first else "config_resumed.yaml")
            self.before = file, file.read_bytes() if file.exists() else None
            with written_whole(file) as temporary:
                temporary.write_text(self.config)
            self._read_data()
        except BaseException:
            self.discard()
            raise
        parameters = sum(p.numel() for p in self.module.parameters())
        what = f"{self.data.num_classes} classes"
        if self.data.hide is not None:
            what = f"{self.data.hide:.0%} of the tokens hidden, to be found among {self.data.vocab_size}"
        self.console.print(
            f"{self.name}: {self.data.size()}, {what}, {parameters:,} parameters; results go to {self.folder}",
            highlight=False,
            soft_wrap=True,
        )
        if self.anew:
            self.console.print("this run was stopped before its first checkpoint, and begins anew", highlight=False)
        if self.weights is not None:
            but = ", but for the head, which is new" if self.new_head else ""
            self.console.print(f"begins with the weights of {self.weights}{but}", highlight=False, soft_wrap=True)
        if self.carried:
            runs.save_carried(self.folder, self.carried)
            self.console.print(runs.carried_text(self.carried), highlight=False, soft_wrap=True)
        elif self.sparsity is not None and self.sparsity.began and self.checkpoint is None:
            self.console.print(f"begins sparsely, with the structure {self.sparsity.began}", highlight=False)
        if isinstance(self.model, PretrainedClassifier):
            self.console.print(self.model.origin(), highlight=False, soft_wrap=True)

    def discard(self) -> None:
        """Leave no folder of a run that did not begin, which ``--ckpt_path last`` would take for the newest.

        Nor, of one that did not go on, the settings that it was not to go on with.
        """
        if self.trainer.global_rank == 0 and self.before is not None and not self.new:
            file, content = self.before
            if content is None:
                file.unlink(missing_ok=True)
            else:
                with written_whole(file) as temporary:
                    temporary.write_bytes(content)
        if self.new and self.trainer.global_rank == 0 and not self.last.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # there are other runs of this name
                self.folder.parent.rmdir()

    def _read_data(self) -> None:
        self.data.prepare_data()
        self.data.setup("fit")
        # Refuses a batch that is larger than the training set, and empty splits.
        loaders = [self.data.train_dataloader(), self.data.val_dataloader(), self.data.test_dataloader()]
        for name, loader in zip(("train", "val", "test"), loaders, strict=True):
            share = self._trainer_options[f"limit_{name}_batches"]
            if isinstance(share, float) and 0 < share * len(loader) < 1:
                raise ValueError(
                    f"trainer.limit_{name}_batches={share:g} of {len(loader)} batches is less than one; give at least "
                    f"{1 / len(loader):.2g}, or a whole number of batches"
                )
        for note in self.data.notes:
            self.console.print(f"{self.data.dataset_name}: {note}", highlight=False)

    def estimate(self) -> dict[str, Any]:
        """Measure what the run will take, in place of :meth:`prepare` and all that follows; leaves no folder.

        Raises:
            estimate.DoesNotFit: a phase runs out of memory.
        """
        if self.trainer.world_size > 1:
            raise ValueError(
                f"--estimate measures one process, and this run has {self.trainer.world_size}; give --trainer.devices 1"
            )
        if self._trainer_options["max_time"] is not None:
            raise ValueError(
                f"--estimate tells how long the steps of a run take, and trainer.max_time="
                f"{self._trainer_options['max_time']} may end it before; leave max_time away"
            )
        self.console.print(f"{self.name}: reading the data, which stays prepared for the run", highlight=False)
        begun = time.perf_counter()
        self.data.prepare_data()
        preparing = time.perf_counter() - begun  # which the run, after this one, has not to do again
        self._read_data()
        found = estimate.measure(
            partial(self._make_trainer, logger=False, enable_checkpointing=False),
            self.trainer,
            self.module,
            self.data,
            self.sparsity,
            self.model.attention,
            saves_every=self.save_last.every_n_steps,
            setup_seconds=time.perf_counter() - self.began - preparing,
            note=lambda what: self.console.print(f"measuring: {what}", highlight=False),
        )
        estimate.show(self.console, self.name, found, self.data, self.trainer.strategy.root_device)
        return found.as_dict()

    def train(self) -> None:
        """To the end; leaves ``last.ckpt`` as it is then."""
        ckpt_path = None if self.checkpoint is None else str(self.checkpoint)
        self.trainer.fit(self.module, datamodule=self.data, ckpt_path=ckpt_path, weights_only=True)
        if self.monitor.trained or self.save_last.stale:  # else it was trained to the end before
            self.save_last.save(self.trainer, self.module)
        self.save_last.agree(self.trainer)
        if self.save_last.interrupted:  # during the last step, after which there was no other to stop at
            raise RunInterrupted(
                f"interrupted at step {self.trainer.global_step}, the last one", self.save_last.received
            )

    def report(self) -> dict[str, Any]:
        """Test the final and the best model, write and print the summary; all processes test, rank 0 writes."""
        self.monitor.trained = True  # what fails from here on is not a matter of settings
        summary = runs.summarize(self.name, self.trainer, self.module, self.model, self.monitor, self.sparsity)
        writes = self.trainer.global_rank == 0
        if writes:
            runs.save_layouts(self.folder, runs.layouts_of(self.module), self.sparsity)
        if isinstance(self.model, PretrainedClassifier):
            self._save_model(self.model)
        tests = {"final": self._test()}
        if self.trainer.strategy.broadcast(Path(self.best.best_model_path).is_file()):
            best = torch.load(self.best.best_model_path, map_location="cpu", weights_only=True)
            if best["global_step"] == self.trainer.global_step:  # it is the final one
                tests["best"] = tests["final"]
            else:
                if isinstance(self.model, FSDPModule):
                    self.model.reshard()  # evaluation has left it whole
                whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=self.trainer.world_size > 1)
                set_model_state_dict(self.module, best["state_dict"], options=whole)
                tests["best"] = self._test()
            summary["best_checkpoint"] = {
                "step": best["global_step"],
                "phase": runs.phase_of(self.module, self.model.attention),
            }
        scores = {
            metric: {name: round(test[f"test/{metric}"], 6) for name, test in tests.items() if f"test/{metric}" in test}
            for metric in ("acc", "f1")
        }
        summary["test_accuracy"] = scores["acc"]
        if self.data.metric == "f1":
            summary["test_f1"] = scores["f1"]
        if self.data.notes:
            summary["data_notes"] = [f"{self.data.dataset_name}: {note}" for note in self.data.notes]
        if writes:
            runs.write_summary(self.folder / "summary.json", summary)
        runs.print_summary(self.console, self.folder, summary)
        return summary

    def _save_model(self, classifier: PretrainedClassifier) -> None:
        """Write the final model as transformers does, with what prepares its data and, when it learns any, its layouts.

        All processes give their part of the weights, rank 0 writes.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(classifier.model, options=options)
        if self.trainer.global_rank == 0:
            runs.save_model(self.folder, classifier, self.data, cast(dict[str, torch.Tensor], weights))

    def _test(self) -> Mapping[str, float]:
        """The test results of the weights that the module has now."""
        if self.trainer.limit_test_batches == 0:
            return {}
        (metrics,) = self.trainer.test(self.module, datamodule=self.data, verbose=False)
        return metrics


class _OneRun(Callback):
    """One run, however many processes there are: first of all, they agree on it."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The first moment at which the processes know each other."""
        if stage == "fit" and trainer.world_size > 1:
            self.run.agree()


class FullySharded(ModelParallelStrategy):
    """FSDP2 over all processes, with checkpoints like those of one process: each goes on in any number of them."""

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """All processes share the data, none a tensor."""
        self._data_parallel_size, self._tensor_parallel_size = self.world_size, 1
        super().setup_environment()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """The command. Bad input ends it with a sentence and exit status 2, a signal with 128 and its number.

    Where nothing can be written any more, or numbers are no longer finite, the status is 1.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "SLURM_JOB_ID" not in os.environ or threading.current_thread() is not threading.main_thread():
        return _main(argv)
    # Where SaveLast listens, that does so instead. Lightning sees that somebody does, and keeps out.
    before = signal.signal(signal.SIGUSR1, _interrupted)
    try:
        return _main(argv)
    finally:
        signal.signal(signal.SIGUSR1, before)


def _main(argv: list[str]) -> dict[str, Any]:
    console = Console(markup=False)  # names and paths may have brackets
    _quiet_lightning()
    try:
        args, parser = parse(argv)
        run = Run(args, parser, console)
        if args.estimate:
            try:
                return run.estimate()
            except SystemExit:  # what Lightning makes of a signal
                raise KeyboardInterrupt from None
        run.prepare()
    except (ValueError, TypeError, OSError, ImportError, MisconfigurationException) as error:
        _fail(" ".join(str(error).split()), 2)
    except KeyboardInterrupt:
        _fail("interrupted before the first step; nothing was begun", 130)
    except RunInterrupted as stop:
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            _requeue()
        _fail("interrupted before the first step; nothing was begun", 128 + stop.received)
    except (estimate.DoesNotFit, FloatingPointError) as error:
        _fail(str(error), 1)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        _fail("the model or the data do not fit into memory; make the sequences shorter or the model smaller", 1)
    try:
        run.train()
        return run.report()
    except RunInterrupted as stop:
        # All have stopped after this step, and rank 0 says so, by its exit status too; unless no step was running.
        if run.trainer.global_rank > 0:
            raise SystemExit(0 if run.save_last.interrupted else 128 + stop.received) from stop
        _end_children(run.trainer)
        _stop(str(stop), stop.received, run)
    except BaseException as error:
        _end_children(run.trainer)
        if isinstance(error, KeyboardInterrupt | SystemExit):  # the latter is what Lightning makes of signals
            _stop("stopped at once", run.save_last.received, run)
        sentence, status = _sentence(error, run)
        if not sentence:
            raise
        logger.debug("the run ends", exc_info=True)
        if status == 2:  # settings that are only refused when training starts
            run.discard()
        _fail(sentence, status)


def _interrupted(received: int, _: Any) -> None:
    """SLURM's signal while no step is running, such as while data is read; one is enough."""
    signal.signal(received, signal.SIG_IGN)
    raise RunInterrupted("interrupted while no step was running", received)


def _stop(sentence: str, received: int, run: Run) -> NoReturn:
    """Leave with the status that shells give to this signal; SIGUSR1 is SLURM's, and has the job started again."""
    print(f"sat.train: {sentence}{_go_on(run)}", file=sys.stderr, flush=True)
    if received == signal.SIGUSR1 and run.trainer.is_global_zero:
        _requeue()
    raise SystemExit(128 + received)


def _requeue() -> None:
    """Ask SLURM to start this job again; it ends the job for that, so nothing is left to do afterwards."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{part}_ID") for part in ("JOB", "TASK"))
    job = f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        why = " ".join((getattr(error, "stderr", None) or str(error)).split())
        print(f"sat.train: the job {job} is not queued again ({why}); queue it yourself", file=sys.stderr)


def _sentence(error: BaseException, run: Run) -> tuple[str, int]:
    """What to say of an error in training, and the exit status; nothing of one that nobody expects."""
    if isinstance(error, FloatingPointError | LayoutsDiffer):
        return f"{error}{_kept(run)}", 1
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        if error.filename is not None and not Path(error.filename).is_relative_to(run.folder):
            return f"{error.filename}: {error.strerror}{_kept(run)}", 1
        why = f"nothing can be written to {run.folder} ({error.strerror})" if error.strerror else str(error)
        return f"{why}{_kept(run)}", 1
    if isinstance(error, ValueError | MisconfigurationException) and not run.monitor.trained:  # a matter of settings
        return " ".join(str(error).split()), 2
    if run.trainer.world_size > 1 and _lost_a_process(error):
        return f"{_who_died(run.trainer)}, and the run stops{_go_on(run)}", 1
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    innocent = memory or isinstance(error, torch.AcceleratorError) or "DataLoader worker" in str(error)
    if isinstance(error, Exception) and not innocent and run.checkpoint is not None and not run.monitor.trained:
        # A file of ours brings none of these about, one that somebody has changed does, wherever it is taken up.
        what = f"{type(error).__name__}: {reason(error)}"
        return f"{run.checkpoint} cannot be gone on from ({what}); give another --ckpt_path, or none to start anew", 2
    return "", 1


def _kept(run: Run) -> str:
    return f"; the last good checkpoint is {run.last}" if run.last.is_file() else ""


def _go_on(run: Run) -> str:
    return f"; go on with --ckpt_path {run.last} (or --ckpt_path last)" if run.last.is_file() else ""


def _lost_a_process(error: BaseException) -> bool:
    """Whether the processes cannot reach each other any more; gloo raises plain errors, of which most name it."""
    of_gloo = isinstance(error, RuntimeError) and any(text in str(error) for text in ("gloo", "caused pair closure"))
    return of_gloo or isinstance(error, torch.distributed.DistError)


def _who_died(trainer: Trainer) -> str:
    """Which process does not answer any more, as far as this one can know."""
    children = getattr(trainer.strategy.launcher, "procs", [])
    until = time.monotonic() + 2  # a process that has just been killed is known to be dead a moment later
    while True:
        for rank, child in enumerate(children, trainer.global_rank + 1):
            if status := child.poll():
                how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"stopped with status {status}"
                return f"the process of rank {rank} {how}"
        if not children or time.monotonic() > until:
            return "another process of this run has stopped or does not answer"
        time.sleep(0.05)


def _end_children(trainer: Trainer) -> None:
    """The processes that Lightning has started here may wait for this one without end."""
    for child in getattr(trainer.strategy.launcher, "procs", []):
        child.kill()


def _fail(sentence: str, status: int) -> NoReturn:
    rank: int = rank_zero_only.rank  # type: ignore[attr-defined]
    print(f"sat.train{f' (rank {rank})' if rank else ''}: {sentence}", file=sys.stderr)
    raise SystemExit(status)


def _quiet_lightning() -> None:
    """Leave out what Lightning says at every start; what is wrong still shows."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    # Says which process died, before it ends the others.
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    for message in ("does not have many workers", "exists and is not empty", "number of training batches", "LeafSpec"):
        warnings.filterwarnings("ignore", f".*{message}.*")


if __name__ == "__main__":
    main()
