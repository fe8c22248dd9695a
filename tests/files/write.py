"""``python -m tests.files.write``: a small file of each kind that this version writes, for later versions to read."""

from __future__ import annotations

import os
import shutil
import tempfile
import tomllib
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from sat import train
from sat.files import save_state
from sat.layout import BlockLayout
from sat.saving import SaveLast
from tests.interruption.conftest import COMMAND, write_inputs

FOLDER = Path(__file__).parent
VERSION = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text())["project"]["version"]

SAVED, STEPS = 12, 16
# A checkpoint of a few kilobytes: the model of tests/interruption, made smaller still.
SMALL = ["--model.num_layers", "1", "--model.width", "4", "--model.mlp_dim", "4", "--model.head_dim", "4"]
SMALL += ["--data.seq_len", "16", "--model.block_size", "4", "--trainer.max_steps", str(STEPS)]
# Said, because what is the default may change between versions.
SMALL += ["--sparsity.mask", "direct", "--sparsity.per_head", "false", "--sparsity.by_offset", "false"]
CRITERION: dict[str, Any] = {"theta": None, "delta": 1e9, "max_dense_steps": 2, "interval": 1}


def layout() -> BlockLayout:
    """Two heads, 3 x 3 blocks of 8."""
    return BlockLayout(torch.stack([torch.eye(3), torch.ones(3, 3).tril()]).bool(), 8)


def pretrained() -> Any:
    """A model of Hugging Face with one layer of two heads, for 24 tokens."""
    from transformers import BertConfig, BertModel

    from sat.integrations.transformers import register

    register()
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = BertConfig(vocab_size=8, max_position_embeddings=24, **sizes)
    return BertModel._from_config(config, attn_implementation="sat")


def callback(model: Any) -> Any:
    """The callback of Hugging Face's Trainer, in charge of such a model."""
    from sat.integrations.trainer import SparsityCallback
    from sat.integrations.transformers import prepare

    made = SparsityCallback(block_size=8, density=0.5, mask="direct", per_head=False, by_offset=False, **CRITERION)
    made.attach("BertModel", prepare(model, 24, 8))
    return made


def main(folder: Path = FOLDER) -> None:
    """Write this version's files into a folder of its name; an existing one stays."""
    from sat.integrations.transformers import save_layouts

    target = folder / VERSION
    target.mkdir()
    layout().save(target / "layout.safetensors")

    model = pretrained()
    phases = callback(model)
    (attention,) = phases.attentions.values()
    for _ in range(2):
        phases.before_batch(1)
        model(input_ids=torch.arange(24)[None] % 8)
        phases.after_batch(ends_step=True)
    save_state(phases.state_dict(), target / "sat_phases.pt")
    attention.set_layout(layout())
    save_layouts(model, target)

    here = Path.cwd()
    with tempfile.TemporaryDirectory() as place:
        write_inputs(Path(place))
        os.chdir(place)
        original = SaveLast.on_train_batch_start

        def pressed(self: SaveLast, trainer: Any, *args: Any) -> None:
            self.interrupted = trainer.global_step == SAVED
            original(self, trainer, *args)

        try:
            with mock.patch.object(SaveLast, "on_train_batch_start", pressed):
                train.main([*COMMAND, *SMALL])
        except SystemExit:
            (last,) = Path("runs").glob("tiny/*/checkpoints/last.ckpt")
            shutil.copyfile(last, target / "last.ckpt")
        finally:
            os.chdir(here)


if __name__ == "__main__":
    main()
