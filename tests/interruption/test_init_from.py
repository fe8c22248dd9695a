"""A new run that begins with the weights of another: densely after sparse training, sparsely after dense training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sat import train
from sat.attention import AdaptiveAttention
from tests.interruption.conftest import COMMAND, run_folder, write_inputs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one sparse run and one dense run."""
    folder = tmp_path_factory.mktemp("runs")
    write_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main([*COMMAND, "--output_dir", "sparse"])
        train.main([*COMMAND, "--output_dir", "dense", "--model.attention", "dense", "--seed", "1"])
    return folder


def last(folder: Path) -> dict:
    (found,) = folder.glob("tiny/*/checkpoints/last.ckpt")
    return torch.load(found, weights_only=True)


def weights(checkpoint: dict) -> dict[str, torch.Tensor]:
    state = checkpoint["state_dict"]
    return {name: tensor for name, tensor in state.items() if not name.endswith(("layout_mask", "sparse"))}


def begun(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: object) -> train.Run:
    """A run as it stands before its first step."""
    monkeypatch.chdir(folder)
    return train.Run(*train.parse([*COMMAND, *map(str, arguments)]), train.Console())


@pytest.mark.parametrize(("source", "attention"), [("sparse", "dense"), ("dense", "adaptive"), ("sparse", "adaptive")])
def test_weights_are_taken_over_and_nothing_else(
    runs: Path, monkeypatch: pytest.MonkeyPatch, source: str, attention: str
):
    run = begun(monkeypatch, runs, "--init_from", run_folder_of(runs, source), "--model.attention", attention)
    found, expected = run.module.state_dict(), weights(last(runs / source))
    assert expected
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not any(m.is_sparse for m in run.module.modules() if isinstance(m, AdaptiveAttention))
    assert all(m.layout_mask.all() for m in run.module.modules() if isinstance(m, AdaptiveAttention))
    assert run.checkpoint is None
    assert not run.folder.exists()  # until prepare(): a new one


def run_folder_of(runs: Path, source: str) -> Path:
    (found,) = (runs / source / "tiny").iterdir()
    return found


def test_a_sparse_run_goes_on_densely(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(runs)
    source = run_folder_of(runs, "sparse") / "checkpoints" / "best.ckpt"
    options = ["--init_from", str(source), "--model.attention", "dense", "--output_dir", str(tmp_path / "runs")]
    summary = train.main([*COMMAND, *options, "--trainer.max_steps", "4"])
    assert (summary["attention"], summary["steps"], summary["density"]) == ("dense", 4, None)
    assert f"begins with the weights of {source}" in capsys.readouterr().out
    # Its config repeats it.
    folder = run_folder(tmp_path)
    train.main(["--config", str(folder / "config.yaml"), "--output_dir", str(tmp_path / "again")])
    first, second = weights(last(tmp_path / "runs")), weights(last(tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_dense_run_goes_on_sparsely(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(runs)
    summary = train.main(
        [*COMMAND, "--init_from", str(run_folder_of(runs, "dense")), "--output_dir", str(tmp_path / "runs")]
    )
    assert [t["step"] for t in summary["transitions"]] == [9, 9]


def test_of_both_options_the_checkpoint_to_go_on_from_prevails(runs: Path, monkeypatch: pytest.MonkeyPatch):
    run = begun(monkeypatch, runs, "--init_from", "nowhere", "--output_dir", "sparse", "--ckpt_path", "last")
    assert run.weights is None
    assert run.checkpoint is not None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--init_from", "nowhere"], "--init_from nowhere: there is no checkpoint at nowhere; give a checkpoint, or"),
        (["--init_from", "texts"], "--init_from texts: there is no checkpoint at texts/checkpoints/last.ckpt"),
        (["--init_from", "tiny.yaml"], "tiny.yaml is not a whole checkpoint"),
        (["--init_from", "RUN", "--model.width", 32], "is a checkpoint of another model: model."),
        (["--init_from", "RUN", "--model.attention", "longformer"], "is in this model only"),
    ],
)
def test_what_does_not_fit_is_refused(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys, arguments: list[object], expected: str
):
    monkeypatch.chdir(runs)
    given = [str(run_folder_of(runs, "sparse")) if a == "RUN" else str(a) for a in arguments]
    with pytest.raises(SystemExit) as stop:
        train.main([*COMMAND, *given])
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err
    assert not (runs / "runs").exists()
