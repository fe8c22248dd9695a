"""Floor 6: a run's files: configs, folders, checkpoints, layouts, the summary."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import reprlib
import time
import zipfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sat.attention import AdaptiveAttention
from sat.baselines import StructureAttention, fingerprint
from sat.callback import AdaptiveSparsity
from sat.files import holds_bools, reason, shortened, written_whole
from sat.layout import BlockLayout
from sat.models import PretrainedClassifier, SequenceClassifier
from sat.module import CHECKPOINT_VERSION, ClassificationModule
from sat.monitor import Monitor
from sat.plots import plot_layouts, plot_statistics

CONFIG_FOLDER = "configs"
SECTIONS = ("data", "model", "optimizer", "sparsity", "trainer")
# Those that are shipped have less than 2,000 bytes and 3 levels.
LONGEST_CONFIG, DEEPEST_CONFIG = 2**16, 10
# Tensors of a checkpoint together, in its own size: some share their memory (tied weights).
LARGEST_CONTENT = 4
DEEPEST_CONTENT = 40  # ours have 7 levels
# What the callbacks keep in checkpoints and read long after they are loaded; see _fits.
STATES: dict[str, Any] = {
    "AdaptiveSparsity": {
        "steps": int,
        "history": [{"step": int, "layers": [{str: float}]}],
        "controller": {
            "layers": [
                {
                    "history": dict.fromkeys(("skewness", "distance", "relative_change"), float)
                    | {"observations": int, "score_matrix": torch.Tensor},
                    "verdict": {"met": bool, "streak": int, "missing": str},
                    "layout": torch.Tensor,
                }
            ]
        },
        "transitions": [
            {"layout": torch.Tensor, "layer": int, "step": int, "empty_rows": int, "forced": bool, "missing": str}
            | dict.fromkeys(("density", "captured_mass", "best_mass", "skewness", "relative_change"), float)
        ],
    },
    "Monitor": {"step_times": {str: [float]}, "validation_accuracy": {str: float}, "validated_at": int},
}


# Command line


def shipped_configs() -> Path:
    """The folder of the shipped configs: beside ``sat/`` in a checkout, ``sat/configs`` in an installed wheel."""
    package = Path(__file__).parent
    installed = package / CONFIG_FOLDER
    return installed if installed.is_dir() else package.parent / CONFIG_FOLDER


def option_values(argv: list[str], options: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """The values given to some options, ``--option value`` or ``--option=value``, in order."""
    for index, argument in enumerate(argv):
        option, equals, value = argument.partition("=")
        if option in options:
            if not equals:
                value = argv[index + 1] if index + 1 < len(argv) else "--"
                if value.startswith("--"):
                    raise ValueError(f"{option} needs a value after it")
            yield option, value


def resolve_config_arguments(argv: list[str]) -> list[str]:
    """Bare config names become paths into the shipped configs; the first one names the run.

    Raises:
        ValueError: there is no such config; names those that there are.
    """
    resolved: list[str] = []
    stem = None
    for index, argument in enumerate(argv):
        option, equals, value = argument.partition("=")
        after_option = index > 0 and argv[index - 1] == "--config"
        if after_option or (option == "--config" and equals):
            path = _find_config(argument if after_option else value)
            argument = str(path) if after_option else f"--config={path}"
            stem = stem or path.stem
        resolved.append(argument)
    # First, so that a name in the config or on the command line prevails.
    return resolved if stem is None else ["--name", stem, *resolved]


def _find_config(value: str) -> Path:
    here, shipped = Path(value), shipped_configs()
    candidates = [here, shipped / value, shipped / f"{value}.yaml"] if here.name == value else [here]
    for path in candidates:
        if path.is_file():
            return path
    names = ", ".join(sorted(p.name for p in shipped.glob("*.yaml")))
    raise ValueError(f"no config {value!r}; give the path of a YAML file, or one of {names}")


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A config as a mapping of sections and options, read without running or importing anything that it names.

    Raises:
        ValueError: it is no YAML file, is longer or deeper than a config can be, or asks for more than options.
    """
    path = Path(path)
    try:
        if (size := path.stat().st_size) > LONGEST_CONFIG:
            raise ValueError(f"it has {size:,} bytes, a config at most {LONGEST_CONFIG:,}")
        text = path.read_text(encoding="utf-8")
        _check_yaml(text)
        content = yaml.safe_load(text)
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.ScalarEvent):  # a text may be YAML again where options are mappings
                with contextlib.suppress(yaml.YAMLError):
                    _check_yaml(event.value)
    except Exception as error:  # whatever a broken or hostile file makes the reader raise
        raise ValueError(f"{path} is not a config that can be read: {reason(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(name, {}), dict) for name in SECTIONS):
        raise ValueError(f"{path} is not a config: it must map sections such as data and model to options")
    for key in _keys(content):
        if not isinstance(key, str) or not all(key.split(".")):
            raise ValueError(f"{path} has the key {key!r}; the keys of a config are names of options")
        if "class_path" in key.split("."):
            raise ValueError(f"{path} has a class_path; configs choose by name, and no code but ours is run for them")
    if "config" in content:
        raise ValueError(f"{path} names another config; give both on the command line, --config A --config B")
    return content


def _check_yaml(text: str) -> None:
    """Refuse YAML of which a few lines stand for gigabytes, or that is deeper than a config can be."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"it has the alias *{event.anchor}; write out what that stands for")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST_CONFIG:
            raise ValueError(f"it is nested more than {DEEPEST_CONFIG} levels deep")


def _keys(content: Any) -> Iterator[Any]:
    """The keys of all mappings."""
    for key, value in content.items() if isinstance(content, dict) else ():
        yield key
        yield from _keys(value)
    for value in content if isinstance(content, list) else ():
        yield from _keys(value)


# Folders and checkpoints


def run_folder(output_dir: Path, name: str, checkpoint: Path | None) -> Path:
    """A path that is free, ``output_dir/name/time``; the checkpoint's own run folder when a run goes on."""
    if checkpoint is not None and checkpoint.parent.name == "checkpoints":
        return checkpoint.parent.parent
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    folder, attempt = output_dir / name / stamp, 1
    while folder.exists():
        attempt += 1
        folder = output_dir / name / f"{stamp}_{attempt}"
    return folder


def make_folder(folder: Path) -> None:
    """Make a run's folder, and be sure that it can be written; what a killed process left half written goes.

    Raises:
        OSError: it cannot.
    """
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        for leftover in [probe, *folder.rglob(".*.tmp")]:
            leftover.unlink()
    except OSError as error:
        raise OSError(
            f"cannot write to the run folder {folder} ({error.strerror}); choose another --output_dir"
        ) from error


def find_checkpoint(ckpt_path: str | None, runs_of_this_name: Path) -> Path | None:
    """The checkpoint to go on from; ``last`` is that of the newest run of this name.

    Where that run was stopped before its first checkpoint, the file does not exist: the run begins anew in its folder.

    Raises:
        FileNotFoundError: there is none.
    """
    if ckpt_path is None:
        return None
    if ckpt_path != "last":
        path = Path(ckpt_path)
        if not path.is_file():
            raise FileNotFoundError(f"no checkpoint at {path}")
        return path
    last = [folder / "last.ckpt" for folder in runs_of_this_name.glob("*/checkpoints")]
    if not last:
        raise FileNotFoundError(
            f"--ckpt_path last: no run in {runs_of_this_name} has a checkpoint yet; start one without --ckpt_path"
        )
    return max(last, key=lambda path: (path if path.is_file() else path.parent).stat().st_mtime_ns)


def _read_checkpoint(path: Path, option: str) -> dict[str, Any]:
    """Tensors, numbers and strings of a checkpoint; nothing in it is run, and it takes no more memory than its file.

    Raises:
        ValueError: it is cut short, damaged or something else.
    """
    version = None
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
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        _check_contents(checkpoint, size, described)
        sections = ("state_dict", "loops", "callbacks")
        if isinstance(checkpoint, dict) and all(isinstance(checkpoint.get(name), dict) for name in sections):
            version = checkpoint.get("sat_version", CHECKPOINT_VERSION)
            if not isinstance(version, int):
                raise ValueError(f"its version is {reprlib.repr(version)}")
            if version <= CHECKPOINT_VERSION:
                _check_state(checkpoint)
                return checkpoint
    except Exception as error:  # whatever a broken or hostile file makes the readers raise
        # PyTorch's own words for this say how to run what the file holds.
        code = type(error).__name__ == "UnpicklingError"
        why = "it holds more than tensors, numbers and strings, or is damaged" if code else reason(error)
        raise ValueError(f"{path} is not a whole checkpoint ({why}); give another {option}") from error
    if version is not None:
        raise ValueError(
            f"{path} is a checkpoint of version {version}, this version of SAT reads up to {CHECKPOINT_VERSION}; "
            f"upgrade SAT to read it"
        )
    raise ValueError(f"{path} holds no training checkpoint; give one that sat.train wrote")


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


def _check_state(checkpoint: dict[str, Any]) -> None:
    """Refuse counts and records that would be stumbled over in the middle of a run, or at its end."""
    progress = [checkpoint["loops"]]
    while progress:
        for name, part in progress.pop().items():
            if name in ("current", "total") and not _fits(part, {str: int}):
                raise ValueError(f"its count of batches or epochs is {reprlib.repr(part)}")
            progress += [part] if isinstance(part, dict) else []
    step = checkpoint["global_step"]
    loop = checkpoint["loops"]["fit_loop"]
    steps = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    batches = loop["epoch_loop.state_dict"].get("_batches_that_stepped", 0)
    learning_rates = [scheduler["last_epoch"] for scheduler in checkpoint["lr_schedulers"]]
    if not all(_fits(each, int) for each in (step, batches)) or any(each != step for each in (steps, *learning_rates)):
        raise ValueError(f"it has done {reprlib.repr(step)} steps, or {reprlib.repr([steps, batches, learning_rates])}")
    for name, pattern in STATES.items():
        for key, state in checkpoint["callbacks"].items():
            if str(key).startswith(name) and not _fits(state, pattern):
                raise ValueError(f"the state of {name} in it is none")


def _fits(value: Any, pattern: Any) -> bool:
    """Whether a value is of a pattern: a type, a list of one, or a dict of some by their names, or of one by any."""
    if isinstance(pattern, list):
        return isinstance(value, list) and all(_fits(item, pattern[0]) for item in value)
    if isinstance(pattern, dict):
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            return False
        return all(_fits(item, pattern.get(key, pattern.get(str, object))) for key, item in value.items())
    if pattern is int:  # of something that was counted
        return isinstance(value, int) and 0 <= value < 2**62
    return isinstance(value, int | float) if pattern is float else isinstance(value, pattern)


def _kind(tensor: torch.Tensor) -> torch.dtype | str:
    """The type of a tensor's entries; all precisions are one, because a model is made in float32."""
    return "float" if tensor.is_floating_point() else tensor.dtype


def check_checkpoint(path: Path, module: LightningModule, model: SequenceClassifier | PretrainedClassifier) -> None:
    """That a file is a checkpoint of this very model and way of training; reads tensors, numbers and strings only.

    Raises:
        ValueError: it is not, with the reason.
    """
    checkpoint = _read_checkpoint(path, "--ckpt_path")
    was = checkpoint.get("attention")
    if was is None:  # written before there was a choice
        was = {"name": "adaptive" if checkpoint["callbacks"].get(AdaptiveSparsity.__qualname__) else "dense"}
    now = {"name": model.attention, "options": model.attention_options}
    if not isinstance(was, dict) or not isinstance(was.get("name"), str):
        raise ValueError(f"{path} does not say with which attention it was trained; give one that sat.train wrote")
    if was["name"] != now["name"]:
        raise ValueError(
            f"{path} was trained with model.attention={shortened(was['name'])}, this run has {now['name']}; go on with "
            f"--model.attention {shortened(was['name'])}"
        )
    if was.get("options", {}) != now["options"]:
        raise ValueError(
            f"{path} was trained with model.attention_options={reprlib.repr(was.get('options', {}))}, this run has "
            f"{now['options']}; go on with the options that it was started with"
        )
    if was.get("fixed_layouts") != fingerprint(model):
        raise ValueError(
            f"{path} was trained with other fixed blocks than this run has; go on with the model.block_size, the files "
            f"and the seed that it was started with"
        )
    _check_weights(path, module.state_dict(), checkpoint["state_dict"])


def find_weights(init_from: str) -> Path:
    """The checkpoint to take weights from: a file, or the last one of a run's folder.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(init_from)
    if path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise FileNotFoundError(
            f"--init_from {init_from}: there is no checkpoint at {path}; give a checkpoint, or the folder of a run "
            f"that has one"
        )
    return path


def load_weights(path: Path, module: LightningModule) -> None:
    """Take over the weights of a checkpoint, whatever its phase; the layouts stay as they are here.

    Raises:
        ValueError: it is not a checkpoint, or one of another model.
    """
    ours, theirs = (
        {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] not in ("layout_mask", "sparse")}
        for state in (module.state_dict(), _read_checkpoint(path, "--init_from")["state_dict"])
    )
    _check_weights(path, ours, theirs)
    module.load_state_dict({**module.state_dict(), **theirs})


def _check_weights(path: Path, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    odd = sorted(set(ours) ^ set(theirs), key=str)
    if odd:
        where = "this model" if odd[0] in ours else "the checkpoint"
        raise ValueError(
            f"{path} is a checkpoint of another model: {shortened(str(odd[0]))} is in {where} only; start it with the "
            f"config that the checkpoint was made with"
        )
    for name, tensor in ours.items():
        if not isinstance(theirs[name], torch.Tensor) or _kind(tensor) != _kind(theirs[name]):
            raise ValueError(f"{path} is not a whole checkpoint ({name} is of another kind); give another --ckpt_path")
        if tensor.shape != theirs[name].shape:
            raise ValueError(
                f"{path} is a checkpoint of another model: {name} has the shape {list(theirs[name].shape)} there and "
                f"{list(tensor.shape)} here; start it with the config that the checkpoint was made with"
            )


def check_processes(path: Path, trainer: Trainer, batch_size: int) -> None:
    """That a run that goes on in another number of processes goes on with the same samples at each step.

    Args:
        path: its checkpoint, which :func:`check_checkpoint` has found good.
        trainer: that of the run that goes on.
        batch_size: samples a batch, per process, in that run.

    Raises:
        ValueError: it does not, with the settings that would.
    """
    was = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("processes")
    if was is None or was["count"] == trainer.world_size:
        return
    if was["accumulate_grad_batches"] != trainer.accumulate_grad_batches:
        raise ValueError(
            f"{path} was trained with trainer.accumulate_grad_batches={was['accumulate_grad_batches']}, this run has "
            f"{trainer.accumulate_grad_batches}; in another number of processes a run goes on with the same"
        )
    together = was["count"] * was["batch_size"]
    if together != trainer.world_size * batch_size:
        fitting, rest = divmod(together, trainer.world_size)
        advice = f"a number of processes that divides {together}" if rest else f"--data.batch_size {fitting}"
        raise ValueError(
            f"{path} was trained on {together} samples at a time, {was['batch_size']} in each of {was['count']} "
            f"process{'es' * (was['count'] > 1)}, this run has {batch_size} in each of {trainer.world_size}; go on "
            f"with {advice}"
        )


# Results


def phase_of(module: LightningModule, attention: str) -> str:
    """``dense``, ``sparse``, or how many of the model's attention layers are sparse; else the attention's name."""
    sparse = [m.is_sparse for m in module.modules() if isinstance(m, AdaptiveAttention)]
    if not sparse:
        return attention
    return "sparse" if all(sparse) else f"{sum(sparse)} of {len(sparse)} layers sparse" if any(sparse) else "dense"


def layouts_of(module: torch.nn.Module) -> dict[int, BlockLayout]:
    """The layouts in use by the number of the attention layer, learned or fixed; one head where all are equal."""
    kinds = (AdaptiveAttention, StructureAttention)
    found = {index: m.layout for index, m in enumerate(m for m in module.modules() if isinstance(m, kinds))}
    return {index: layout.shared() for index, layout in found.items() if layout is not None}


def save_layouts(folder: Path, layouts: Mapping[int, BlockLayout], sparsity: AdaptiveSparsity | None) -> None:
    """Layouts as safetensors and as a picture, statistics as a picture."""
    if layouts:
        (folder / "layouts").mkdir(exist_ok=True)
        for index, layout in layouts.items():
            layout.save(folder / "layouts" / f"layer{index}.safetensors")
        held = {t.layer: t.captured_mass for t in sparsity.transitions} if sparsity else {}
        plot_layouts(
            {f"layer {index}": layout for index, layout in layouts.items()},
            folder / "layouts.png",
            captured=[held.get(index, math.nan) for index in layouts],
        )
    if sparsity is None:
        return
    if sparsity.history and sparsity.controller is not None:
        layers = range(len(sparsity.attentions))
        steps = sparsity.controller.transition_steps
        plot_statistics(
            [record["step"] for record in sparsity.history],
            [[record["layers"][layer]["skewness"] for record in sparsity.history] for layer in layers],
            [[record["layers"][layer]["relative_change"] for record in sparsity.history] for layer in layers],
            theta=sparsity.theta,
            delta=sparsity.delta,
            switch_steps=steps,
            names=[f"layer {layer}" for layer in layers],
            path=folder / "statistics.png",
        )


def summarize(
    name: str,
    trainer: Trainer,
    module: ClassificationModule,
    model: SequenceClassifier | PretrainedClassifier,
    monitor: Monitor,
    sparsity: AdaptiveSparsity | None,
) -> dict[str, Any]:
    """What a run came to, as plain numbers and strings."""
    phases = ("dense", "sparse") if sparsity else (monitor.phase,)
    times = {phase: time for phase in phases if (time := monitor.median_step_ms(phase))}
    layouts = layouts_of(module).values()
    device = module.device
    packages = ("torch", "lightning", *(["transformers"] if isinstance(model, PretrainedClassifier) else []))
    summary: dict[str, Any] = {
        "name": name,
        "attention": model.attention,
        "attention_options": model.attention_options,
        "density": round(sum(layout.density for layout in layouts) / len(layouts), 4) if layouts else None,
        "steps": trainer.global_step,
        "processes": trainer.world_size,
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{_processor()}, {torch.get_num_threads()} threads",
        "versions": {package: metadata.version(package) for package in packages}
        | {"python": platform.python_version()},
        "validation_accuracy": {key: round(value, 4) for key, value in monitor.validation_accuracy.items()},
        "validated_at": monitor.validated_at,
        "median_step_ms": {phase: round(time, 2) for phase, time in times.items()},
        "peak_memory_mib": {key: round(value) for key, value in monitor.peak_memory.items()},
    }
    if isinstance(model, PretrainedClassifier):
        summary["pretrained"] = model.pretrained
    if module.validation_f1 is not None:
        summary["validation_f1"] = round(module.validation_f1, 4)
    if len(times) == 2:
        summary["sparse_step_speedup"] = round(times["dense"] / times["sparse"], 2)
    if sparsity is not None and sparsity.controller is not None:
        summary["transitions"] = [
            {key: value for key, value in t._asdict().items() if key != "layout"} for t in sparsity.transitions
        ]
        if not sparsity.all_sparse:
            summary["not_switched"] = {
                str(layer): sparsity.controller.missing[layer] for layer in sparsity.controller.dense_layers
            }
    return summary


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor() or platform.machine()


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """The summary as JSON; what is not defined yet is null."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(_json_safe(summary), indent=2) + "\n")


def _json_safe(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_summary(console: Console, folder: Path, summary: Mapping[str, Any]) -> None:
    """What a person wants to know at the end, and where the rest lies."""
    table = Table(title=f"{summary['name']}: {summary['steps']} steps", title_justify="left", show_header=False)
    validation, test, f1 = summary["validation_accuracy"], summary["test_accuracy"], summary.get("test_f1", {})
    attention, options = summary["attention"], summary["attention_options"]
    if attention != "adaptive":
        settings = ", ".join(f"{key} {value}" for key, value in options.items())
        table.add_row("attention", f"{attention} ({settings})" if settings else attention)
    if summary["density"] is not None:
        table.add_row("share of the blocks kept", f"{summary['density']:.3f}")
    times, memory = summary["median_step_ms"], summary["peak_memory_mib"]
    if "before" in validation:
        table.add_row("validation accuracy before the switch", f"{validation['before']:.3f}")
        table.add_row("validation accuracy right after it", f"{validation['after']:.3f}")
    if "latest" in validation:
        table.add_row(f"validation accuracy at step {summary['validated_at']}", f"{validation['latest']:.3f}")
    if "validation_f1" in summary:
        table.add_row(f"validation F1 at step {summary['validated_at']}", f"{summary['validation_f1']:.3f}")
    if "final" in test:
        table.add_row("test accuracy, final model", f"{test['final']:.3f}")
    if "final" in f1:
        table.add_row("test F1, final model", f"{f1['final']:.3f}")
    if "best" in test:
        best = summary["best_checkpoint"]
        table.add_row(f"test accuracy, best model (step {best['step']}, {best['phase']})", f"{test['best']:.3f}")
    if "best" in f1:
        table.add_row("test F1, best model", f"{f1['best']:.3f}")
    for phase, milliseconds in times.items():
        table.add_row(f"median step, {phase}", f"{milliseconds:.0f} ms")
    if "sparse_step_speedup" in summary:
        table.add_row("a sparse step is faster by", f"{summary['sparse_step_speedup']:.2f} x")
    for phase, mebibytes in memory.items():
        table.add_row(f"peak memory, {phase}", f"{mebibytes:,} MiB")
    console.print(table)
    for layer, missing in summary.get("not_switched", {}).items():
        console.print(f"layer {layer} stayed dense: {missing}", soft_wrap=True)
    shown = [
        p
        for p in ("summary.json", "layouts.png", "layouts", "statistics.png", "checkpoints", "csv")
        if (folder / p).exists()
    ]
    console.print(f"everything lies in {folder}: {', '.join(shown)}", highlight=False, soft_wrap=True)
