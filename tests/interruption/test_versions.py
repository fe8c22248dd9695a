"""What earlier versions wrote is read; what a newer one wrote is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sat import cli, train
from sat.layout import BlockLayout
from sat.module import CHECKPOINT_VERSION
from sat.sparsity.phases import STATE_VERSION
from tests.files import write
from tests.interruption.conftest import COMMAND, write_inputs

RELEASES = sorted(path for path in write.FOLDER.iterdir() if path.is_dir() and path.name[0].isdigit())


def test_every_release_has_left_its_files():
    assert write.VERSION in {path.name for path in RELEASES}, "python -m tests.files.write makes them"


# What a released file goes on from lies in another folder than it did.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def goes_on(checkpoint: Path) -> dict:
    return train.main([*COMMAND, *write.SMALL, "--ckpt_path", str(checkpoint)])


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
class TestEarlier:
    def test_layout(self, release: Path):
        assert BlockLayout.load(release / "layout.safetensors") == write.layout()

    def test_checkpoint(self, release: Path, place: Path):
        """It was written in the sparse phase, in the middle of an epoch, four steps before the end."""
        path = release / "last.ckpt"
        saved = torch.load(path, weights_only=True)
        summary = goes_on(path)
        assert (saved["global_step"], summary["steps"]) == (write.SAVED, write.STEPS)
        assert [t["step"] for t in summary["transitions"]] == [9]
        (folder,) = (place / "runs" / "tiny").iterdir()
        mask = saved["state_dict"]["model.encoder.layers.0.attention.layout_mask"]
        assert torch.equal(BlockLayout.load(folder / "layouts" / "layer0.safetensors").mask.expand_as(mask), mask)

    def test_weights_of_the_checkpoint(self, release: Path, place: Path):
        path = release / "last.ckpt"
        arguments = [*COMMAND, *write.SMALL, "--init_from", str(path)]
        run = train.Run(*cli.parse(arguments), train.Console())
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert all(torch.equal(saved[name], parameter) for name, parameter in run.module.named_parameters())

    def test_layouts_of_a_pretrained_model(self, release: Path):
        from sat.integrations.transformers import load_layouts

        model = write.pretrained()
        (state,) = load_layouts(model, release).values()
        assert state.layout == write.layout()

    def test_state_of_the_trainers_callback(self, release: Path):
        callback = write.callback(write.pretrained())
        callback.load_state_dict(torch.load(release / "sat_phases.pt", weights_only=True))
        assert callback.controller is not None
        assert callback.controller.transition_steps == [2]


def changed(source: Path, target: Path, **values: object) -> Path:
    checkpoint = torch.load(source, weights_only=True)
    for name, value in values.items():
        checkpoint.pop(name) if value is None else checkpoint.update({name: value})
    torch.save(checkpoint, target)
    return target


def test_a_checkpoint_of_before_the_first_release_has_no_version(place: Path):
    path = changed(RELEASES[0] / "last.ckpt", place / "old.ckpt", sat_version=None)
    state = torch.load(path, weights_only=True)
    del state["callbacks"]["AdaptiveSparsity"]["version"]
    torch.save(state, path)
    assert goes_on(path)["steps"] == write.STEPS


@pytest.mark.parametrize("option", ["--ckpt_path", "--init_from"])
def test_a_newer_checkpoint_is_refused_by_name(place: Path, capsys, option: str):
    path = changed(RELEASES[-1] / "last.ckpt", place / "new.ckpt", sat_version=CHECKPOINT_VERSION + 1)
    with pytest.raises(SystemExit) as stop:
        train.main([*COMMAND, *write.SMALL, option, str(path)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"{path} is a checkpoint of version {CHECKPOINT_VERSION + 1}, this version of SAT reads up to" in error
    assert not (place / "runs").exists()


def test_a_newer_state_of_the_callback_is_refused():
    callback = write.callback(write.pretrained())
    state = torch.load(RELEASES[-1] / "sat_phases.pt", weights_only=True) | {"version": STATE_VERSION + 1}
    with pytest.raises(ValueError, match=f"state of SparsityCallback has version {STATE_VERSION + 1}, this version"):
        callback.load_state_dict(state)


def test_the_files_can_be_written_again(tmp_path: Path):
    write.main(tmp_path)
    names = {path.name for path in RELEASES[-1].iterdir()}
    assert {path.name for path in (tmp_path / write.VERSION).iterdir()} == names
    assert sum(path.stat().st_size for path in RELEASES[-1].iterdir()) < 100_000
