"""Floor 6: a run's files: configs, folders, layouts, the summary."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from sat.attention import AdaptiveAttention
from sat.baselines import StructureAttention
from sat.callback import AdaptiveSparsity
from sat.data import SequenceDataModule
from sat.files import NEW_FILE, disk_errors, reason, shortened, written_whole
from sat.layout import BlockLayout
from sat.models import PretrainedClassifier, SequenceClassifier
from sat.module import ClassificationModule
from sat.monitor import Monitor, device_name
from sat.plots import plot_carried, plot_layouts, plot_statistics

CONFIG_FOLDER = "configs"
# Of a layer that lacked nothing and yet stayed dense.
READY = "its criterion was met, and it waited for min_dense_steps or for other layers"
SECTIONS = ("data", "model", "optimizer", "sparsity", "trainer")
# Those that are shipped have less than 2,000 bytes and 3 levels, and values of less than 100 characters.
LONGEST_CONFIG, DEEPEST_CONFIG, LONGEST_VALUE = 2**16, 10, 1000


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
        _check_keys(yaml.compose(text, Loader=yaml.SafeLoader))
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
            raise ValueError(f"it has the alias *{shortened(event.anchor)}; write out what that stands for")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > LONGEST_VALUE:
            start = shortened(event.value, 20)
            raise ValueError(
                f"it has a value of {len(event.value):,} characters, {start}, at most are {LONGEST_VALUE:,}"
            )
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST_CONFIG:
            raise ValueError(f"it is nested more than {DEEPEST_CONFIG} levels deep")


def _check_keys(node: yaml.Node | None) -> None:
    """Refuse a key that a mapping has twice, of which YAML's reader would take the last and drop the first."""
    seen: dict[str, int] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if (before := seen.get(key.value)) is not None:
                raise ValueError(f"it has {shortened(key.value)} twice, in line {before} and in line {line}; join them")
            seen[key.value] = line
        _check_keys(value)
    for value in node.value if isinstance(node, yaml.SequenceNode) else ():
        _check_keys(value)


def _keys(content: Any) -> Iterator[Any]:
    """The keys of all mappings."""
    for key, value in content.items() if isinstance(content, dict) else ():
        yield key
        yield from _keys(value)
    for value in content if isinstance(content, list) else ():
        yield from _keys(value)


# Which samples a data set draws, but for their number.
DRAWN = {"name", "path", "image_size", "contour_length", "num_distractors", "min_length", "max_length", "draw_seed"}


def check_drawn(weights: Path, data: Mapping[str, Any]) -> None:
    """That another run's training set holds nothing of this one's validation and test sets, where both are drawn.

    The first samples are the same however many are drawn, and which of them are held out depends on the number.

    Raises:
        ValueError: the other run, if its settings are there, has drawn another number of the same.
    """
    file = weights.parent.parent / "config.yaml"
    if "num_samples" not in data or data.get("path") is not None or not file.is_file():
        return
    other = read_config(file).get("data", {})
    same = {name for name in data if name in DRAWN and other.get(name) == data[name]}
    drawn = other.get("num_samples")
    if same == DRAWN & set(data) and isinstance(drawn, int) and drawn != data["num_samples"]:
        raise ValueError(
            f"the run of {weights} has drawn {drawn:,} samples, this one draws {data['num_samples']:,}: "
            f"what is held out here may have been trained on there; set --data.num_samples "
            f"{drawn}, or another --data.draw_seed"
        )


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


def claim_folder(folder: Path) -> None:
    """Make the folder of a run that begins, which no other run may have.

    Raises:
        ValueError: another run was faster.
        OSError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise ValueError(
            f"another run has just begun in {folder}; start this one again, or give it a --name of its own"
        ) from error
    except OSError as error:
        raise _unwritable(folder, error) from error


def make_folder(folder: Path) -> None:
    """Make what is in a run's folder, and be sure that it can be written; what was left half written goes.

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
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> OSError:
    return OSError(f"cannot write to the run folder {folder} ({error.strerror}); choose another --output_dir")


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
        # Of what was chosen at the switch; what revisions have made of it has not been measured.
        held = {t.layer: t.captured_mass for t in sparsity.transitions} if sparsity and not sparsity.revisions else {}
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
        lines = {
            name: [[record["layers"][layer].get(name, math.nan) for record in sparsity.history] for layer in layers]
            for name in ("skewness", "relative_change", "agreement")
        }
        plot_statistics(
            [record["step"] for record in sparsity.history],
            lines["skewness"],
            lines["relative_change"],
            theta=sparsity.theta,
            delta=sparsity.delta,
            agreement=lines["agreement"] if sparsity.agreement is not None else None,
            least_agreement=sparsity.agreement,
            switch_steps=steps,
            names=[f"layer {layer}" for layer in layers],
            path=folder / "statistics.png",
        )


def save_model(
    folder: Path, classifier: PretrainedClassifier, data: SequenceDataModule, weights: Mapping[str, torch.Tensor]
) -> None:
    """Write ``model/`` into a run's folder: what ``save_pretrained`` writes, and the tokenizer or image processor.

    A folder of an earlier end of this run is replaced when the new one is whole.
    """
    target, written, old = folder / "model", folder / "model.partial", folder / ".model.old"
    if old.exists() and not target.exists():  # it was killed in between
        old.replace(target)
    for leftover in (written, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with disk_errors():
        classifier.save(written, weights, data.class_names)
    data.save_processor(written)
    for file in written.rglob("*.safetensors"):
        file.chmod(NEW_FILE)
    if target.exists():
        target.replace(old)
    written.replace(target)
    shutil.rmtree(old, ignore_errors=True)


def save_carried(folder: Path, carried: Sequence[tuple[BlockLayout, BlockLayout]]) -> None:
    """A picture of layouts that come from another run, as they were there and as they are here."""
    before, after = ([layouts[place].shared() for layouts in carried] for place in (0, 1))
    plot_carried(before, after, folder / "layouts_before_after.png")


def carried_text(carried: Sequence[tuple[BlockLayout, BlockLayout]]) -> str:
    """The same as a sentence."""
    there, here = carried[0]
    sizes = [f"{each.shape[0]} x {each.shape[1]} blocks of {each.block_size}" for each in (there, here)]
    densities = [sum(layouts[place].density for layouts in carried) / len(carried) for place in (0, 1)]
    return (
        f"begins sparsely, with its layouts: {sizes[0]} have become {sizes[1]}, of which {densities[1]:.3f} are kept "
        f"({densities[0]:.3f} before); layouts_before_after.png shows them"
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
    dense = sum(isinstance(m, AdaptiveAttention) and not m.is_sparse for m in module.modules())
    density = (sum(layout.density for layout in layouts) + dense) / (len(layouts) + dense) if layouts else None
    device = module.device
    packages = ("torch", "lightning", *(["transformers"] if isinstance(model, PretrainedClassifier) else []))
    summary: dict[str, Any] = {
        "name": name,
        "attention": model.attention,
        "attention_options": model.attention_options,
        "density": density if density is None else round(density, 4),
        "steps": trainer.global_step,
        "processes": trainer.world_size,
        "device": device_name(device),
        "versions": {package: metadata.version(package) for package in packages}
        | {"python": platform.python_version()},
        "validation_accuracy": {key: round(value, 6) for key, value in monitor.validation_accuracy.items()},
        "validated_at": monitor.validated_at,
        "median_step_ms": {phase: round(time, 2) for phase, time in times.items()},
        "peak_memory_mib": {key: round(value) for key, value in monitor.peak_memory.items()},
        "training_seconds": round(monitor.training_seconds, 1),
    }
    if monitor.switch_samples:
        summary["switch_samples"] = monitor.switch_samples
    if isinstance(model, PretrainedClassifier):
        summary["pretrained"] = model.pretrained
    if module.validation_f1 is not None:
        summary["validation_f1"] = round(module.validation_f1, 6)
    if len(times) == 2:
        summary["sparse_step_speedup"] = round(times["dense"] / times["sparse"], 2)
    if sparsity is not None and sparsity.controller is not None:
        summary["transitions"] = [
            {key: value for key, value in t._asdict().items() if key != "layout"} for t in sparsity.transitions
        ]
        if sparsity.began:
            summary["began_sparsely"] = sparsity.began
        if sparsity.revisions:
            summary["revisions"] = [r._asdict() for r in sparsity.revisions]
        if sparsity.controller.gave_up_at is not None:
            summary["gave_up"] = sparsity.controller.gave_up_at
        elif not sparsity.all_sparse:
            summary["not_switched"] = {
                str(layer): sparsity.controller.missing[layer] or READY for layer in sparsity.controller.dense_layers
            }
    return summary


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


def speedup_text(ratio: float) -> tuple[str, str]:
    """What a sparse step is beside a dense one, and by how much."""
    return (
        ("a sparse step is faster by", f"{ratio:.2f} x")
        if ratio >= 1
        else ("a sparse step is slower by", f"{1 / ratio:.2f} x")
    )


def print_summary(console: Console, folder: Path, summary: Mapping[str, Any]) -> None:
    """What a person wants to know at the end, and where the rest lies."""
    table = Table(title=f"{summary['name']}: {summary['steps']} steps", title_justify="left", show_header=False)
    validation, test, f1 = summary["validation_accuracy"], summary["test_accuracy"], summary.get("test_f1", {})
    attention, options = summary["attention"], summary["attention_options"]
    if attention != "adaptive":
        settings = ", ".join(f"{key} {value}" for key, value in options.items())
        table.add_row("attention", f"{attention} ({settings})" if settings else attention)
    if "gave_up" in summary:
        table.add_row("went back to dense attention, by its guard", f"at step {summary['gave_up']}")
    if summary["density"] is not None:
        table.add_row("share of the blocks kept", f"{summary['density']:.3f}")
    times, memory = summary["median_step_ms"], summary["peak_memory_mib"]
    if "before" in validation:
        part = f" (first {summary['switch_samples']:,} samples)" if "switch_samples" in summary else ""
        table.add_row(f"validation accuracy before the switch{part}", f"{validation['before']:.3f}")
        table.add_row(f"validation accuracy right after it{part}", f"{validation['after']:.3f}")
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
        table.add_row(*speedup_text(summary["sparse_step_speedup"]))
    for phase, mebibytes in memory.items():
        table.add_row(f"peak memory, {phase}", f"{mebibytes:,} MiB")
    console.print(table)
    for layer, missing in summary.get("not_switched", {}).items():
        console.print(f"layer {layer} stayed dense: {missing}", soft_wrap=True)
    shown = [
        p
        for p in (
            "summary.json",
            "layouts.png",
            "layouts_before_after.png",
            "layouts",
            "statistics.png",
            "checkpoints",
            "model",
            "csv",
        )
        if (folder / p).exists()
    ]
    console.print(f"everything lies in {folder}: {', '.join(shown)}", highlight=False, soft_wrap=True)
