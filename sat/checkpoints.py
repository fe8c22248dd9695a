"""Floor 5: checkpoints that are gone on from, or give their weights: found, read without running anything, checked."""

from __future__ import annotations

import reprlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from sat.baselines import fingerprint
from sat.callback import AdaptiveSparsity
from sat.files import holds_bools, reason, shortened
from sat.models import PretrainedClassifier, SequenceClassifier
from sat.module import CHECKPOINT_VERSION

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
