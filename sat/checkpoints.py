"""Floor 5: checkpoints that are gone on from, or give their weights: found, read without running anything, checked."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from sat.baselines import fingerprint
from sat.callback import AdaptiveSparsity
from sat.files import read_state, reason, shortened
from sat.layout import BlockLayout
from sat.models import PretrainedClassifier, SequenceClassifier
from sat.module import CHECKPOINT_VERSION
from sat.scaling import Grid, interpolate_positions, position_grids

# Where our own encoder has its learned positions, [L, W].
POSITIONS = "model.encoder.positions"
HEAD = "model.head."
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
                    "transition_step": int,
                    "choices": [torch.Tensor],
                    "agreement": float,
                }
            ],
            "revised_at": int,
            "gave_up_at": int,
        },
        "guard": {"best_dense_loss": float, "worse": int, "latest_loss": float},
        "revisions": [{"layer": int, "step": int, "new_blocks": float, "density": float}],
        "began": str,
        "transitions": [
            {"layout": torch.Tensor, "layer": int, "step": int, "empty_rows": int, "forced": bool, "missing": str}
            | dict.fromkeys(("density", "captured_mass", "best_mass", "skewness", "relative_change"), float)
        ],
    },
    "Monitor": {
        "step_times": {str: [float]},
        "validation_accuracy": {str: float},
        "switch_samples": int,
        "validated_at": int,
        "training_seconds": float,
        "peak_memory": {str: float},
    },
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
        return _existing(ckpt_path, "--ckpt_path")
    last = [folder / "last.ckpt" for folder in runs_of_this_name.glob("*/checkpoints")]
    if not last:
        raise FileNotFoundError(
            f"--ckpt_path last: no run in {runs_of_this_name} has a checkpoint yet; start one without --ckpt_path"
        )
    return max(last, key=lambda path: (path if path.is_file() else path.parent).stat().st_mtime_ns)


def _read_checkpoint(path: Path, option: str) -> dict[str, Any]:
    """Tensors, numbers and strings of a checkpoint of ours.

    Raises:
        ValueError: it is cut short, damaged, newer or something else.
    """
    version = None
    try:
        checkpoint = read_state(path)
        sections = ("state_dict", "loops", "callbacks")
        if isinstance(checkpoint, dict) and all(isinstance(checkpoint.get(name), dict) for name in sections):
            version = checkpoint.get("sat_version", CHECKPOINT_VERSION)
            if not isinstance(version, int):
                raise ValueError(f"its version is {reprlib.repr(version)}")
            if version <= CHECKPOINT_VERSION:
                _check_state(checkpoint)
                return checkpoint
    except Exception as error:  # whatever a changed file lacks
        raise ValueError(f"{path} is not a whole checkpoint ({reason(error)}); give another {option}") from error
    if version is not None:
        raise ValueError(
            f"{path} is a checkpoint of version {version}, this version of SAT reads up to {CHECKPOINT_VERSION}; "
            f"upgrade SAT to read it"
        )
    raise ValueError(f"{path} holds no training checkpoint; give one that sat.train wrote")


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
    if not all(isinstance(name, str) for name in checkpoint["state_dict"]):
        raise ValueError("its weights have other names than texts")
    processes = checkpoint.get("processes")
    if processes is not None:
        names = ("count", "batch_size", "accumulate_grad_batches")
        if not _fits(processes, dict.fromkeys(names, int)) or not all(processes.get(name) for name in names):
            raise ValueError(f"its processes are {reprlib.repr(processes)}")
    for name, pattern in STATES.items():
        for key, state in checkpoint["callbacks"].items():
            if not str(key).startswith(name):
                continue
            if not _fits(state, pattern):
                raise ValueError(f"the state of {name} in it is none")
            if any(len(each) < 4 for each in state.get("revisions", [])):
                raise ValueError(f"the revisions of {name} in it are not whole")
            if state.get("history"):  # of which a picture is drawn, layer by layer
                count, drawn = len(state["controller"]["layers"]), {"skewness", "relative_change"}
                found = [record["layers"] for record in state["history"] if "step" in record]
                whole = all(len(layers) == count and all(drawn <= layer.keys() for layer in layers) for layers in found)
                if not whole or len(found) < len(state["history"]):
                    raise ValueError(f"the history of {name} in it is not whole")


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
    if (pruned := was.get("pruned", "drop")) != getattr(model, "pruned", "drop"):
        raise ValueError(
            f"{path} was trained with model.pruned={reprlib.repr(pruned)}, this run has another; go on with what it "
            f"was started with"
        )
    _check_heads(path, was, model)
    _check_weights(path, module.state_dict(), checkpoint["state_dict"], "--ckpt_path")


def find_weights(init_from: str) -> Path:
    """The checkpoint to take weights from: a file, or the last one of a run's folder.

    Raises:
        FileNotFoundError: there is none.
    """
    return _existing(init_from, "--init_from")


def _existing(given: str, option: str) -> Path:
    path = Path(given)
    if path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise FileNotFoundError(
            f"{option} {given}: there is no checkpoint at {path}; give a checkpoint, or the folder of a run that has "
            f"one"
        )
    return path


class Learned(NamedTuple):
    """What a run has learned of attention.

    Attributes:
        layouts: one a layer, as they are there; none where a layer is dense.
        length: tokens that they are for.
        new_head: whether it answers another question than here, so that the head here is a new one.
    """

    layouts: list[BlockLayout]
    length: int
    new_head: bool = False


def load_weights(path: Path, module: LightningModule, *, pictures: bool = False) -> Learned:
    """Take over the weights of a checkpoint, whatever its phase; the layouts stay as they are here.

    Positions that our own encoder has learned at a shorter length are interpolated. Where it has learned there to find
    hidden tokens, and here to tell classes, or the other way round, the head stays as it is here.

    Args:
        path: the checkpoint.
        module: whose weights they become.
        pictures: its tokens are the pixels of square pictures, row by row.

    Returns:
        The layouts there.

    Raises:
        ValueError: it is not a checkpoint, or one of another model, or of sequences that cannot be stretched to those
            here.
    """
    checkpoint = _read_checkpoint(path, "--init_from")
    ours, theirs = (
        {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] not in ("layout_mask", "sparse")}
        for state in (module.state_dict(), checkpoint["state_dict"])
    )
    there, here = theirs.get(POSITIONS), ours.get(POSITIONS)
    if isinstance(there, Tensor) and here is not None and there.dim() == 2 and there.is_floating_point():
        grids = _grids(path, len(there), len(here), pictures)
        theirs[POSITIONS] = there if len(there) == len(here) else interpolate_positions(there, *grids)
    attention = checkpoint.get("attention")
    found_tokens = isinstance(attention, dict) and attention.get("per_token") is True
    new_head = found_tokens != getattr(module.model, "per_token", False)
    if new_head:
        # Pretrained on hidden tokens: what was learned of them is not asked here.
        theirs = {name: tensor for name, tensor in theirs.items() if not str(name).startswith(HEAD)}
        theirs |= {name: tensor for name, tensor in ours.items() if name.startswith(HEAD)}
    _check_weights(path, ours, theirs, "--init_from")
    _check_heads(path, attention, module.model)
    try:
        learned = _learned(checkpoint)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:  # of a file that somebody changed
        raise ValueError(f"{path} is not a whole checkpoint ({reason(error)}); give another --init_from") from error
    module.load_state_dict({**module.state_dict(), **theirs})
    return learned._replace(new_head=new_head)


def _grids(path: Path, length: int, new_length: int, pictures: bool) -> tuple[Grid, Grid]:
    """See :func:`position_grids`, with sentences that name the checkpoint."""
    if length > new_length:
        raise ValueError(
            f"{path} was trained on {length:,} tokens, this run has {new_length:,}; what was learned can be carried to "
            f"longer sequences only, so begin with a run of at most {new_length:,}"
        )
    try:
        return position_grids(length, new_length, pictures=pictures)
    except ValueError as error:
        raise ValueError(f"{path} was trained on {length:,} tokens: {error}") from error


def _learned(checkpoint: dict[str, Any]) -> Learned:
    controller = checkpoint["callbacks"].get(AdaptiveSparsity.__qualname__, {}).get("controller")
    if controller is None or not all("layout" in layer for layer in controller["layers"]):
        return Learned([], 0)
    structure = controller["structure"]
    length = structure["lengths"][0]
    layouts = [BlockLayout(layer["layout"].cpu(), structure["block_size"]) for layer in controller["layers"]]
    if not isinstance(length, int) or not all(layout.fits(length, length) for layout in layouts):
        raise ValueError(f"its layouts are not those of {reprlib.repr(length)} tokens")
    return Learned(layouts, length)


def _check_heads(path: Path, attention: Any, model: object) -> None:
    """Weights have the same shapes whatever the number of heads; those of a pretrained model are its config's."""
    there, here = attention.get("num_heads") if isinstance(attention, dict) else None, getattr(model, "num_heads", None)
    if None not in (there, here) and there != here:
        raise ValueError(
            f"{path} was trained with model.num_heads={reprlib.repr(there)}, this run has {here}; give the same number"
        )


def _check_weights(path: Path, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], option: str) -> None:
    odd = sorted(set(ours) ^ set(theirs), key=str)
    if odd:
        where = "this model" if odd[0] in ours else "the checkpoint"
        raise ValueError(
            f"{path} is a checkpoint of another model: {shortened(str(odd[0]))} is in {where} only; start it with the "
            f"config that the checkpoint was made with"
        )
    for name, tensor in ours.items():
        if not isinstance(theirs[name], torch.Tensor) or _kind(tensor) != _kind(theirs[name]):
            raise ValueError(f"{path} is not a whole checkpoint ({name} is of another kind); give another {option}")
        if tensor.shape != theirs[name].shape:
            raise ValueError(
                f"{path} is a checkpoint of another model: {name} has the shape {list(theirs[name].shape)} there and "
                f"{list(tensor.shape)} here; start it with the config that the checkpoint was made with"
            )


def check_processes(path: Path, trainer: Trainer, batch_size: int) -> None:
    """That a run goes on with as many batches a step, and in other processes with the same samples at each step.

    Args:
        path: its checkpoint, which :func:`check_checkpoint` has found good.
        trainer: that of the run that goes on.
        batch_size: samples a batch, per process, in that run.

    Raises:
        ValueError: it does not, with the settings that would.
    """
    was = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("processes")
    if was is None:
        return
    if was["accumulate_grad_batches"] != trainer.accumulate_grad_batches:
        raise ValueError(
            f"{path} was trained with trainer.accumulate_grad_batches={was['accumulate_grad_batches']}, this run has "
            f"{trainer.accumulate_grad_batches}; a run goes on with the same"
        )
    if was["count"] == trainer.world_size:
        return
    together = was["count"] * was["batch_size"]
    if together != trainer.world_size * batch_size:
        fitting, rest = divmod(together, trainer.world_size)
        advice = f"a number of processes that divides {together}" if rest else f"--data.batch_size {fitting}"
        raise ValueError(
            f"{path} was trained on {together} samples at a time, {was['batch_size']} in each of {was['count']} "
            f"process{'es' * (was['count'] > 1)}, this run has {batch_size} in each of {trainer.world_size}; go on "
            f"with {advice}"
        )
