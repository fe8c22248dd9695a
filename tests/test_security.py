"""What the files and names of strangers never do: run code, import modules, lead out of their folder."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import typing
import zipfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from sat import checkpoints, cli
from sat.data import CIFAR10, DATASETS, INaturalist, YelpPolarity
from sat.layout import BlockLayout
from sat.models import SequenceClassifier
from sat.module import ClassificationModule

BASE = {"data": {"name": "digits"}}
COMMANDS = {
    "os.system": {"class_path": "os.system", "init_args": {"command": "touch canary"}},
    "subprocess.Popen": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "canary"]}},
    "module": {"class_path": "canary_module.Canary"},
}


@pytest.fixture
def nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder with a module that leaves a trace where it is imported, in the place where Python looks first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "canary_module.py").write_text("from pathlib import Path\nPath('canary').touch()\nclass Canary: pass\n")
    for place, name in ((os, "system"), (subprocess, "Popen")):
        monkeypatch.setattr(place, name, lambda *_, **__: (tmp_path / "canary").touch())
    yield
    assert not (tmp_path / "canary").exists()
    assert "canary_module" not in sys.modules


def refused(content: Any) -> str:
    path = Path("config.yaml")
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r".") as caught:
        cli.parse(["--config", str(path)])
    return str(caught.value)


@pytest.mark.usefixtures("nothing_runs")
class TestConfigs:
    @pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
    @pytest.mark.parametrize("section", ["data", "model", "optimizer", "sparsity", "trainer"])
    def test_no_section_takes_a_class(self, section: str, command: dict[str, Any]) -> None:
        message = refused({**BASE, section: {**BASE.get(section, {}), **command}})
        assert "config.yaml has a class_path; configs choose by name" in message

    @pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
    @pytest.mark.parametrize(
        "option", ["callbacks", "logger", "plugins", "profiler", "strategy", "accelerator", "precision"]
    )
    def test_no_option_of_the_trainer_takes_a_class(self, option: str, command: dict[str, Any]) -> None:
        assert "class_path" in refused({**BASE, "trainer": {option: command}})
        assert "class_path" in refused({**BASE, "trainer": {option: [command]}})

    @pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
    def test_nor_does_the_command_line(self, command: dict[str, Any]) -> None:
        """Where the check of the file does not look; jsonargparse imports what an option of any type names."""
        for options in ({"window": command}, {"window": [command]}, command):
            for name in ("--model.attention_options", "--model.attention_options.window"):
                try:
                    arguments, _ = cli.parse(["--data.name", "digits", name, json.dumps(options)])
                except ValueError:
                    continue
                for value in (arguments.model.attention_options or {}).values():
                    assert isinstance(value, str | int | float | list | None), value

    def test_texts_that_are_yaml_again_are_texts(self) -> None:
        for text in ("{class_path: canary_module.Canary}", "{x: {class_path: canary_module.Canary}}"):
            content = {**BASE, "model": {"attention_options": {"selection": text}}}
            Path("config.yaml").write_text(yaml.safe_dump(content))
            arguments, _ = cli.parse(["--config", "config.yaml"])
            assert arguments.model.attention_options == {"selection": text}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("!!python/object/apply:os.system ['touch canary']", "could not determine a constructor"),
            ("data: !!python/name:os.system ''", "could not determine a constructor"),
            ("data: {name: digits}\nseed: !!python/module:canary_module ''", "could not determine a constructor"),
            ("data: &a {name: digits}\nmodel: *a", r"it has the alias \*a; write out what that stands for"),
            ("data: {name: digits}\nmodel: {attention_options: '{a: &a [1], b: [*a, *a]}'}", r"alias \*a"),
            (f"data: {{name: '{'9' * 5000}'}}", r"a value of 5,000 characters, 9{20}\.\.\., at most are 1,000$"),
            ("[" * 10_000, "nested more than 10 levels deep"),
            ("data: {name: digits}\nseed: " + "9" * 5000, "config that can be read"),
            ("data: {name: digits}\n# " + "x" * 70_000, "bytes, a config at most 65,536"),
            ("data: {name: digits}\nconfig: other.yaml", "names another config"),
            ("data: {name: digits}\n3: 4", "has the key 3"),
            ("data: {name: [digits]}", "unknown data set"),
            ("data: {name: digits}\nmodel: other.yaml", "must map sections"),
            ("data: {name: digits}\nname: ../outside", "name must be that of a folder inside of output_dir"),
            ("data: {name: digits}\nname: /outside", "name must be that of a folder inside of output_dir"),
        ],
    )
    def test_yaml_that_asks_for_more_than_options(self, text: str, message: str) -> None:
        assert re.search(message, refused(text))


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize("name", DATASETS)
def test_every_option_is_of_a_plain_type(name: str, pretrained: bool) -> None:
    """For a class, and for Any, jsonargparse imports what the value names."""

    def leaves(hint: Any) -> list[Any]:
        if typing.get_origin(hint) is typing.Literal:
            return []
        parts = typing.get_args(hint)
        return [leaf for part in parts for leaf in leaves(part)] if parts else [hint]

    plain = (int, float, str, bool, type(None), timedelta)
    for action in cli.build_parser(name, pretrained)._actions:
        hint = getattr(action, "_typehint", None)
        assert hint is None or all(leaf in plain for leaf in leaves(hint)), f"{action.dest}: {hint}"


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch canary",)


class TestPickles:
    """In the place of every file that is read."""

    @pytest.fixture(params=["pickle", "torch", "old torch"])
    def pickled(self, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.chdir(tmp_path)
        path = tmp_path / "file"
        if request.param == "pickle":
            path.write_bytes(pickle.dumps(Code()))
        else:
            content = {"state_dict": {}, "loops": {}, "callbacks": Code()}
            torch.save(content, path, _use_new_zipfile_serialization=request.param == "torch")
        yield path
        assert not (tmp_path / "canary").exists()

    def test_as_a_checkpoint(self, pickled: Path) -> None:
        model = SequenceClassifier(20, 16, 3, num_layers=1, width=8, num_heads=1, mlp_dim=8, block_size=8)
        with pytest.raises(ValueError, match=f"{pickled} is not a whole checkpoint") as caught:
            checkpoints.check_checkpoint(pickled, ClassificationModule(model, 3), model)
        assert "weights_only" not in str(caught.value)  # PyTorch's advice how to run it

    def test_as_a_layout(self, pickled: Path) -> None:
        with pytest.raises(ValueError, match=f"{pickled} is not a whole layout file"):
            BlockLayout.load(pickled)

    def test_as_layouts_of_a_model(self, pickled: Path) -> None:
        from transformers import BertConfig, BertModel

        from sat.integrations.transformers import load_layouts

        pickled.rename(pickled.parent / "sat_layouts.safetensors")
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        with pytest.raises(ValueError, match="is not a whole file of layouts"):
            load_layouts(BertModel(BertConfig(vocab_size=9, max_position_embeddings=16, **sizes)), pickled.parent)

    def test_as_a_cache(self, pickled: Path, caplog: pytest.LogCaptureFixture) -> None:
        folder = pickled.parent
        pq.write_table(pa.table({"text": ["a", "b"] * 9, "label": [0, 1] * 9}), folder / "train.parquet")
        data = YelpPolarity(path=str(folder), cache_dir=str(folder / "cache"), batch_size=2, seq_len=4)
        data.prepare_data()
        (file,) = (folder / "cache").iterdir()
        file.write_bytes(pickled.read_bytes())
        with caplog.at_level(logging.WARNING):
            data.prepare_data()
            data.prepare_data()
        assert caplog.text.count("is damaged") == 1  # and was made anew

    def test_as_a_config(self, pickled: Path) -> None:
        with pytest.raises(ValueError, match=f"{pickled} is not a config"):
            cli.parse(["--config", str(pickled)])


def test_a_checkpoint_that_unpacks_to_a_thousandfold_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "loops": {}, "callbacks": {}, "x": torch.zeros(2**20)}, tmp_path / "plain.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "plain.ckpt") as plain,
        zipfile.ZipFile(tmp_path / "small.ckpt", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for entry in plain.namelist():
            small.writestr(entry, plain.read(entry))
    assert (tmp_path / "small.ckpt").stat().st_size < 2**14
    model = SequenceClassifier(20, 16, 3, num_layers=1, width=8, num_heads=1, mlp_dim=8, block_size=8)
    with pytest.raises(ValueError, match="it is compressed"):
        checkpoints.check_checkpoint(tmp_path / "small.ckpt", ClassificationModule(model, 3), model)


@pytest.mark.parametrize("value", [2, 255])
def test_bools_that_are_neither_are_refused(tmp_path: Path, value: int) -> None:
    """PyTorch counts such a byte as itself in a sum and as one elsewhere: offsets would lead out of memory."""
    path = tmp_path / "layout.safetensors"
    metadata = {"format": "sat.BlockLayout", "version": "1", "block_size": "16"}  # later ones hold no bools
    save_file({"mask": torch.ones(1, 3, 3, dtype=torch.bool)}, path, metadata=metadata)
    data = bytearray(path.read_bytes())
    data[-1] = value
    path.write_bytes(data)
    with pytest.raises(ValueError, match="mask holds other bytes than 0 and 1"):
        BlockLayout.load(path)


class TestPaths:
    """Of pictures, in files that describe pictures."""

    @pytest.fixture
    def secret(self, tmp_path: Path) -> Path:
        path = tmp_path / "secret.png"
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)
        (tmp_path / "data").mkdir()
        return path

    def table(self, folder: Path, kind: pa.DataType, **picture: Any) -> None:
        pictures = pa.array([picture] * 4, pa.struct([("bytes", kind), ("path", pa.string())]))
        pq.write_table(pa.table({"img": pictures, "label": [0, 1, 0, 1]}), folder / "train.parquet")

    def prepare(self, folder: Path) -> None:
        CIFAR10(path=str(folder), cache_dir=str(folder / "cache"), batch_size=1).prepare_data()

    @pytest.mark.parametrize("name", ["../secret.png", "absolute"])
    def test_the_path_of_a_parquet_file_is_not_opened(self, secret: Path, name: str) -> None:
        name = str(secret) if name == "absolute" else name
        self.table(secret.parent / "data", pa.binary(), bytes=None, path=name)
        with pytest.raises(ValueError, match="has no bytes; store the pictures inside"):
            self.prepare(secret.parent / "data")

    def test_nor_a_path_in_the_place_of_bytes(self, secret: Path) -> None:
        self.table(secret.parent / "data", pa.string(), bytes=str(secret), path=None)
        with pytest.raises(ValueError, match=r"expected \{bytes, path\}"):
            self.prepare(secret.parent / "data")

    def test_a_format_that_another_program_reads_is_refused(self, secret: Path) -> None:
        eps = io.BytesIO()
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(eps, "EPS")
        self.table(secret.parent / "data", pa.binary(), bytes=eps.getvalue(), path=None)
        with pytest.raises(ValueError, match="cannot be decoded"):
            self.prepare(secret.parent / "data")

    @pytest.mark.parametrize("name", ["../secret.png", "absolute", "train_val2018/a/../../../secret.png"])
    def test_the_list_of_inaturalist_leads_nowhere(self, secret: Path, name: str) -> None:
        folder = secret.parent / "data"
        for place in ("a", "b"):
            (folder / "train_val2018" / place).mkdir(parents=True)
            for number in range(3):
                secret_copy = folder / "train_val2018" / place / f"{number}.png"
                secret_copy.write_bytes(secret.read_bytes())
        named = [{"file_name": str(secret) if name == "absolute" else name}, {"file_name": "train_val2018/a/0.png"}]
        (folder / "val2018.json").write_text(json.dumps({"images": named}))
        data = INaturalist(path=str(folder), cache_dir=str(folder / "cache"), num_classes=2, batch_size=1)
        with pytest.raises(ValueError, match=r"names 2 validation picture.* of which 1 are missing"):
            data.load()
