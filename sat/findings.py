"""Floor 5: what a run has left behind, as far as it can be read: of a folder, a checkpoint, or files of layouts.

Whatever is missing or damaged is noted in a sentence, and the rest is read all the same.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sat.files import DamagedFile, read_safetensors, read_state, readable, shortened, whole_number
from sat.layout import BlockLayout
from sat.module import CHECKPOINT_VERSION
from sat.sparsity import PooledAttention

# What is in a run's folder; one of them is enough to know it by.
RUN_FILES = ("config.yaml", "summary.json", "checkpoints", "csv", "layouts", "attention")
# What sat.integrations.transformers writes beside a model's weights.
MODEL_LAYOUTS = "sat_layouts.safetensors"
MODEL_FORMAT, MODEL_FORMAT_VERSION = "sat.transformers", 1
# Beyond it, axes cannot compute their ends any more.
LARGEST = 1e300
# Numbers of a transition that are shown.
TRANSITION = ("step", "captured_mass", "best_mass", "empty_rows", "skewness", "relative_change")
# Of these, what is no longer so once layouts have been changed.
OF_THE_CHOICE = ("captured_mass", "best_mass", "empty_rows")


@dataclass
class Layer:
    """One attention layer, or one file of a layout.

    Attributes:
        name: for people.
        layout: its blocks; None: dense, or unknown.
        attention: what it attended to at its switch.
        transition: numbers of its switch by name, see :class:`sat.sparsity.Transition`; those that are not known or not
            finite are left out.
        forced: why it was switched though its criterion was not met; empty if it was.
        revised: steps after which its layout was changed.
        unread: whether it has a layout that could not be read.
    """

    name: str
    layout: BlockLayout | None = None
    attention: PooledAttention | None = None
    transition: dict[str, float] = field(default_factory=dict)
    forced: str = ""
    revised: list[int] = field(default_factory=list)
    unread: bool = False

    @property
    def switch_step(self) -> int | None:
        """The step after which it was sparse; None if it was not, or if that is not known."""
        return int(self.transition["step"]) if "step" in self.transition else None


@dataclass
class Findings:
    """All that could be read.

    Attributes:
        title: name of the run or of the files.
        source: where it was read.
        layers: from the input to the output, or in the order of the files.
        one_model: whether the layers follow each other in one model.
        summary: a run's summary.json, or as much of it as a checkpoint knows.
        config: a run's config.yaml.
        history: steps of the observations, and of each layer by number ``skewness``, ``relative_change`` (percent)
            and, where it is the rule, ``agreement`` (0 to 1).
        curves: steps and values by name, see :func:`sat.plots.plot_training`.
        theta: threshold of the skewness; None if there is none or it is not known.
        delta: threshold of the relative change, in percent, likewise.
        agreement: threshold of the agreement, likewise; where there is one, the others are none.
        notes: sentences on what is missing or could not be read.
    """

    title: str
    source: Path
    layers: list[Layer] = field(default_factory=list)
    one_model: bool = True
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    history: dict[int, list[dict[str, float]]] = field(default_factory=dict)
    curves: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    theta: float | None = None
    delta: float | None = None
    agreement: float | None = None
    notes: list[str] = field(default_factory=list)

    def layer(self, index: int) -> Layer:
        """The layer of a number; those that are not known yet come into being."""
        while len(self.layers) <= index:
            self.layers.append(Layer(f"layer {len(self.layers)}"))
        return self.layers[index]


def read(paths: Sequence[Path]) -> Findings:
    """Read a run's folder, a checkpoint, or files of layouts.

    Raises:
        FileNotFoundError: there is nothing at a path.
        ValueError: nothing there can be shown.
    """
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"there is nothing at {path}; give a run's folder, a checkpoint or layout files")
    paths = list({path.resolve(): path for path in reversed(paths)}.values())[::-1]  # each once
    first = paths[0]
    of_runs = [path for path in paths if path.is_dir() and any((path / name).exists() for name in RUN_FILES)]
    if of_runs and len(paths) > 1:
        raise ValueError(
            f"{of_runs[0]} is the folder of a run, and runs are shown one at a time; to see layouts beside each other, "
            f"give their folders or files, such as {of_runs[0] / 'layouts'}"
        )
    if of_runs:
        return _read_run(first)
    if len(paths) == 1 and first.is_file() and first.suffix == ".ckpt":
        found = Findings(f"{first.parent.name}/{first.name}", first)
        if not _add_checkpoint(found, first):
            raise ValueError(found.notes[0].rstrip("."))
        _add_config(found, first.parent.parent / "config.yaml")
        return found
    files: list[Path] = []
    for path in paths:
        files += _layout_files(path) if path.is_dir() else [path]
    if any(path.suffix == ".ckpt" for path in files):
        raise ValueError("only layout files can be shown beside each other; give a checkpoint on its own")
    return _read_layouts(first, files)


def _read_run(folder: Path) -> Findings:
    name = folder.resolve()
    found = Findings(f"{name.parent.name}/{name.name}", folder)
    _add_config(found, folder / "config.yaml")
    _add_config(found, folder / "config_resumed.yaml")  # of a run that went on, these decide from then on
    path = folder / "summary.json"
    if path.exists():
        try:
            found.summary = _mapping(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            found.notes.append(f"summary.json cannot be read ({_line(error)}).")
    said = found.summary.get("data_notes")
    found.notes += [f"{note}." for note in said if isinstance(note, str)] if isinstance(said, list) else []
    for each in _mappings(found.summary.get("transitions")):
        _add_transition(found, each)
    _add_files(found, folder)
    _add_revisions(found, found.summary)
    _add_csv(found, folder / "csv")
    checkpoint = _last_checkpoint(folder / "checkpoints")
    if not found.summary or not any(layer.layout for layer in found.layers):
        # A run that has not ended has its layouts in its checkpoint only.
        if checkpoint is not None and _add_checkpoint(found, checkpoint) and not path.exists():
            found.notes.append(
                f"This run has not ended: there is no summary.json. Layouts are those of its last checkpoint, at step "
                f"{found.summary.get('steps', 'unknown')}."
            )
        elif not path.exists():
            found.notes.append("This run has not ended, or was cut off: there is no summary.json.")
    if not (found.summary or found.history or found.curves or any(layer.layout for layer in found.layers)):
        why = f" {found.notes[0]}" if found.notes else ""
        raise ValueError(f"the run in {folder} has left nothing to show yet.{why}")
    return found


def _last_checkpoint(folder: Path) -> Path | None:
    """That of the end; a run that was cut off before it may have one of its best model."""
    if (folder / "last.ckpt").is_file():
        return folder / "last.ckpt"
    return max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)


def _add_config(found: Findings, path: Path) -> None:
    """The config, and with it the thresholds."""
    if not path.is_file():
        return
    try:
        found.config = _mapping(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        found.notes.append(f"{path.name} cannot be read ({_line(error)}), so the thresholds are not known.")
    model, sparsity = _mapping(found.config.get("model")), _mapping(found.config.get("sparsity"))
    found.theta, found.delta, found.agreement = _number(sparsity.get("theta")), _number(sparsity.get("delta")), None
    if model.get("attention") == "spion":  # has rules of its own, see sat.train
        found.theta, found.delta = None, _number(_mapping(model.get("attention_options")).get("change", 15.0))
    elif (least := _number(sparsity.get("agreement"))) is not None:
        found.theta, found.delta, found.agreement = None, None, least


def _add_transition(found: Findings, given: Mapping[str, Any]) -> None:
    index = given.get("layer")
    if not isinstance(index, int) or not 0 <= index < 10_000:
        return
    layer = found.layer(index)
    layer.transition = {name: number for name in TRANSITION if (number := _number(given.get(name))) is not None}
    layer.forced = str(given.get("missing", "")) if given.get("forced") else ""


def _add_revisions(found: Findings, given: Mapping[str, Any]) -> None:
    for each in _mappings(given.get("revisions")):
        index, step = each.get("layer"), each.get("step")
        if isinstance(index, int) and 0 <= index < len(found.layers) and isinstance(step, int):
            layer = found.layers[index]
            layer.revised.append(step)
            # These are of the blocks that were chosen at the switch.
            layer.transition = {name: value for name, value in layer.transition.items() if name not in OF_THE_CHOICE}


def _add_files(found: Findings, folder: Path) -> None:
    """Layouts and attention, ``layer0.safetensors`` and so on in two folders."""
    for kind, load in (("layouts", BlockLayout.load), ("attention", PooledAttention.load)):
        for path in sorted((folder / kind).glob("layer*.safetensors"), key=_natural):
            number = re.fullmatch(r"layer(\d{1,4})", path.stem)
            if number is None:
                continue
            try:
                read = load(path)
            except (OSError, ValueError, TypeError) as error:
                found.notes.append(f"{kind}/{path.name} is left out: {_line(error)}.")
                found.layer(int(number[1])).unread |= kind == "layouts"
                continue
            layer = found.layer(int(number[1]))
            if isinstance(read, BlockLayout):
                layer.layout = read
            else:
                layer.attention = read
    for layer in found.layers:
        if layer.layout is None or layer.attention is None:
            continue
        heads, *grid = layer.attention.pooled.shape
        sizes = layer.layout.shape, layer.layout.block_size
        if sizes != (tuple(grid), layer.attention.block_size) or layer.layout.num_heads not in (1, heads):
            found.notes.append(f"The attention of {layer.name} is left out: its layout is of another size.")
            layer.attention = None


def _add_csv(found: Findings, folder: Path) -> None:
    """Statistics and curves. A run that went on has a file for each of its parts, the later of which prevails."""
    for path in sorted(folder.glob("version_*/metrics.csv"), key=_natural):
        rows = []
        try:
            with path.open(encoding="utf-8", errors="replace", newline="") as file:
                for row in csv.DictReader(file):
                    numbers = {name: n for name, text in row.items() if name and (n := _number(text)) is not None}
                    if 0 <= numbers.get("step", -1) < 2**53:
                        rows.append((int(numbers.pop("step")) + 1, numbers))  # the logger counts from 0
        except (OSError, csv.Error) as error:
            found.notes.append(f"csv/{path.parent.name}/{path.name} cannot be read to its end ({_line(error)}).")
        if not rows:
            continue
        begin = min(step for step, _ in rows)
        found.history = {step: layers for step, layers in found.history.items() if step < begin}
        for name, (steps, values) in found.curves.items():
            count = sum(step < begin for step in steps)
            found.curves[name] = steps[:count], values[:count]
        for step, numbers in rows:
            _add_row(found, step, numbers)


def _add_row(found: Findings, step: int, numbers: Mapping[str, float]) -> None:
    for name, value in numbers.items():
        if (statistic := re.fullmatch(r"layer(\d{1,4})/(skewness|relative_change|agreement)", name)) is not None:
            index = int(statistic[1])
            layers = found.history.setdefault(step, [])
            layers += [{} for _ in range(index + 1 - len(layers))]
            layers[index][statistic[2]] = value
            found.layer(index)
        elif re.fullmatch(r"(train|val)/(loss|acc|f1|step_ms)", name):
            steps, values = found.curves.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)


def _add_checkpoint(found: Findings, path: Path) -> bool:
    """What a checkpoint knows and nothing better has told yet. Returns whether it could be read."""
    try:
        content = _mapping(read_state(path))
    except DamagedFile as error:
        found.notes.append(f"{path} is not a whole checkpoint ({_line(error)}); give another one.")
        return False
    if not isinstance(version := content.get("sat_version", CHECKPOINT_VERSION), int) or version > CHECKPOINT_VERSION:
        found.notes.append(
            f"{path} is a checkpoint of version {shortened(str(version))}, this version of SAT reads up to "
            f"{CHECKPOINT_VERSION}; upgrade SAT to read it."
        )
        return False
    callbacks = _mapping(content.get("callbacks"))
    if "state_dict" not in content or not callbacks:
        found.notes.append(f"{path} holds no training checkpoint; give one that sat.train wrote.")
        return False
    monitor, sparsity = (_mapping(callbacks.get(name)) for name in ("Monitor", "AdaptiveSparsity"))
    known = {
        "steps": content.get("global_step"),
        "attention": _mapping(content.get("attention")).get("name"),
        "began_sparsely": sparsity.get("began") or None,
        "validation_accuracy": monitor.get("validation_accuracy"),
        "validated_at": monitor.get("validated_at"),
        "gave_up": _mapping(sparsity.get("controller")).get("gave_up_at"),
        "median_step_ms": {
            str(phase): 1e3 * sorted(times)[len(times) // 2]
            for phase, times in _mapping(monitor.get("step_times")).items()
            if isinstance(times, list) and times and all(isinstance(time, float) for time in times)
        },
    }
    found.summary = {**{name: value for name, value in known.items() if value is not None}, **found.summary}
    structure = _mapping(_mapping(sparsity.get("controller")).get("structure"))
    if isinstance(count := structure.get("num_layers"), int) and 0 < count < 10_000:
        found.layer(count - 1)
    for each in _mappings(sparsity.get("transitions")):
        _add_transition(found, each)
    for index, each in enumerate(_mappings(_mapping(sparsity.get("controller")).get("layers"))):
        if "layout" not in each:
            continue
        try:
            layout = BlockLayout(each["layout"], structure["block_size"]).shared()
            layer = found.layer(index)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            found.notes.append(f"A layout in {path.name} is left out: {_line(error)}.")
            continue
        layer.layout, layer.unread = layer.layout or layout, False
    _add_revisions(found, sparsity)
    if not found.history:
        for record in _mappings(sparsity.get("history")):
            for index, values in enumerate(_mappings(record.get("layers"))):
                named = {f"layer{index}/{name}": n for name, v in values.items() if (n := _number(v)) is not None}
                if isinstance(step := record.get("step"), int):
                    _add_row(found, step, named)
    return True


def _layout_files(folder: Path) -> list[Path]:
    """The files of layouts in a folder; one that holds something else says what to give instead."""
    if (folder / MODEL_LAYOUTS).is_file():
        return [folder / MODEL_LAYOUTS]
    if files := sorted(folder.glob("*.safetensors"), key=_natural):
        return files
    runs = [path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/config.yaml")]
    if runs:
        newest = max(runs, key=lambda path: path.stat().st_mtime)
        count = f"{len(runs)} runs" if len(runs) > 1 else "a run"
        raise ValueError(f"{folder} holds {count}; give one of them, such as the newest, {newest}")
    raise ValueError(f"{folder} holds neither a run nor layouts; give a run's folder, such as runs/quickstart/TIME")


def _read_layouts(first: Path, files: Sequence[Path]) -> Findings:
    """Files of layouts beside each other; those that cannot be read are noted."""
    found = Findings(first.resolve().name if first.is_dir() or len(files) == 1 else f"{len(files)} layouts", first)
    by_file: list[tuple[Path, list[Layer]]] = []
    for path in files:
        try:
            layers = _read_layout(path)
        except (OSError, ValueError, TypeError) as error:
            found.notes.append(f"{path.name} is left out: {_line(error)}.")
            continue
        by_file.append((path, layers))
        found.layers += layers
    if len({layer.name for layer in found.layers}) < len(found.layers):
        # Files of one name, which lie in different folders, or of several models, whose layers have the same names.
        alike = len({path.stem for path, _ in by_file}) < len(by_file)
        for path, layers in by_file:
            place = str(path.parent if alike and path.name == MODEL_LAYOUTS else path.with_suffix(""))
            for layer in layers:
                own = place if alike else path.stem
                layer.name = f"{own}: {layer.name}" if len(layers) > 1 or path.name == MODEL_LAYOUTS else own
    for layer in found.layers:  # names that a file may have made what it likes
        layer.name = readable(layer.name)
    if not found.layers:
        raise ValueError(f"no layout could be read: {found.notes[0].rstrip('.')}")
    # Written by a run, or by a model; any other files may have nothing to do with each other.
    numbers = [re.fullmatch(r"layer (\d+)", layer.name) for layer in found.layers]
    in_order = [number is not None and int(number[1]) for number in numbers] == list(range(len(numbers)))
    found.one_model = len(files) == 1 or in_order
    return found


def _read_layout(path: Path) -> list[Layer]:
    try:
        metadata, masks = read_safetensors(path)
        if metadata.get("format") == MODEL_FORMAT:
            if (version := whole_number(metadata, "version")) > MODEL_FORMAT_VERSION:
                raise ValueError(
                    f"it has format {version} of layouts, this version of SAT reads up to {MODEL_FORMAT_VERSION}; "
                    f"upgrade SAT to read it"
                )
            size, sparse = whole_number(metadata, "block_size"), json.loads(metadata.get("sparse", ""))
            if not isinstance(sparse, list):
                raise DamagedFile("its list of sparse modules is none")
            names = sorted(masks, key=_natural)
            layouts = {name: BlockLayout(masks[name], size).shared() for name in names if name in sparse}
            return [Layer(name, layouts.get(name)) for name in names]
    except (DamagedFile, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"it is not a whole layout file ({_line(error)})") from error
    number = re.fullmatch(r"layer(\d+)", path.stem)
    return [Layer(f"layer {number[1]}" if number else path.stem, BlockLayout.load(path))]


def _natural(path: Path | str) -> list[Any]:
    """Sorts layer2 before layer10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]


def _mapping(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _mappings(value: Any) -> list[dict[Any, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list | tuple) else []


def _number(value: Any) -> float | None:
    """A finite number, be it written out; None for everything else, and for what is too large to be drawn."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) < LARGEST else None


def _line(error: BaseException) -> str:
    """What an error says, in one line that is not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 300 else f"{text[:300]}...").rstrip(".")
