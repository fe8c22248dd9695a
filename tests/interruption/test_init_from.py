"""A new run that begins with the weights of another: densely after sparse training, sparsely after dense training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sat import cli, report, train
from sat.attention import AdaptiveAttention
from sat.layout import BlockLayout
from sat.scaling import scale_layout
from tests.interruption import processes
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


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the processes have that are compared with, bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def last(folder: Path) -> dict:
    (found,) = folder.glob("tiny/*/checkpoints/last.ckpt")
    return torch.load(found, weights_only=True)


def weights(checkpoint: dict) -> dict[str, torch.Tensor]:
    state = checkpoint["state_dict"]
    return {name: tensor for name, tensor in state.items() if not name.endswith(("layout_mask", "sparse"))}


def begun(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: object) -> train.Run:
    """A run as it stands before its first step."""
    monkeypatch.chdir(folder)
    return train.Run(*cli.parse([*COMMAND, *map(str, arguments)]), train.Console())


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
        (["--init_from", "RUN", "--model.num_heads", 1], "was trained with model.num_heads=2, this run has 1"),
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


LONGER = ["--data.seq_len", 96, "--model.block_size", 8]
REVISED = ["--sparsity.mask", "fisher", "--sparsity.revise_interval", 6]


def given(*arguments: object) -> list[str]:
    return [*COMMAND, *map(str, arguments)]


def test_what_was_learned_is_carried_to_longer_sequences(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = last(runs / "sparse")
    run = begun(monkeypatch, runs, "--init_from", run_folder_of(runs, "sparse"), *LONGER, *REVISED)
    found, expected = run.module.state_dict(), weights(source)
    positions = expected.pop("model.encoder.positions")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    # New positions lie a quarter of the way to the neighbours of the one they come from.
    between = 0.75 * positions[1:] + 0.25 * positions[:-1]
    torch.testing.assert_close(found["model.encoder.positions"][2::2], between)
    attentions = [m for m in run.module.modules() if isinstance(m, AdaptiveAttention)]
    for attention, state in zip(
        attentions, source["callbacks"]["AdaptiveSparsity"]["controller"]["layers"], strict=True
    ):
        assert attention.is_sparse
        carried = scale_layout(BlockLayout(state["layout"], 8), 48, 96)
        assert torch.equal(attention.layout.mask, carried.mask.expand(2, -1, -1))

    def folder_of(name: str) -> Path:
        (folder,) = (tmp_path / name / "tiny").iterdir()
        return folder

    (tmp_path / "one").mkdir()
    options = given("--init_from", run_folder_of(runs, "sparse"), *LONGER, *REVISED)
    summary = train.main([*options, "--output_dir", str(tmp_path / "one")])
    assert summary["began_sparsely"] == f"the layouts of {run_folder_of(runs, 'sparse')}/checkpoints/last.ckpt"
    assert (summary["transitions"], summary["steps"]) == ([], 20)
    assert {revision["step"] for revision in summary["revisions"]} <= {6, 12, 18}
    assert list(summary["median_step_ms"]) == ["sparse"]
    assert (folder_of("one") / "layouts_before_after.png").is_file()
    # Its config says the same again, and a run that was stopped goes on as if it had not been.
    again = ["--config", str(folder_of("one") / "config.yaml"), "--output_dir", str(tmp_path / "two")]
    (runs / "output").unlink(missing_ok=True)
    status, output = processes.run(runs, again, ("send", "sat.module:ClassificationModule.training_step", 15, 9))
    assert status == -9, output
    assert "begins sparsely, with its layouts: 6 x 6 blocks of 8 have become 12 x 12 blocks of 8" in output
    train.main([*again, "--ckpt_path", str(folder_of("two") / "checkpoints" / "last.ckpt")])
    first, second = (last(tmp_path / name) for name in ("one", "two"))
    assert all(torch.equal(tensor, second["state_dict"][name]) for name, tensor in first["state_dict"].items())
    for folder in ("one", "two"):
        page = report.main([str(folder_of(folder))]).read_text()
        assert "Training was sparse from the first step on, with the layouts of" in page
        assert "There was no dense phase" in page


def test_a_checkpoint_of_a_run_without_a_dense_phase_can_be_shown(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(runs)
    start = ["--sparsity.start", "window", "--output_dir", "started", "--trainer.max_steps", 4]
    summary = train.main(given(*start, *REVISED))
    assert summary["began_sparsely"] == "window"
    assert "begins sparsely, with the structure window" in capsys.readouterr().out
    page = report.main([str(run_folder_of(runs, "started") / "checkpoints" / "last.ckpt")]).read_text()
    assert "Training was sparse from the first step on, with the structure window" in page


@pytest.mark.parametrize(
    ("arguments", "sparse"),
    [
        (["--init_layouts", "true"], True),
        (["--init_layouts", "true", "--model.block_size", 16], True),
        ([], False),
        ([*LONGER, "--init_layouts", "false"], False),
        ([*LONGER, "--init_layouts", "false", "--sparsity.start", "bigbird", *REVISED], True),
        ([*LONGER, "--model.attention", "dense"], False),
    ],
)
def test_layouts_are_carried_as_one_says(
    runs: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[object], sparse: bool
):
    run = begun(monkeypatch, runs, "--init_from", run_folder_of(runs, "sparse"), *arguments)
    assert [m.is_sparse for m in run.module.modules() if isinstance(m, AdaptiveAttention)] == [sparse] * 2
    assert bool(run.carried) == ("true" in arguments)


@pytest.mark.parametrize(
    ("source", "arguments", "expected"),
    [
        (
            "sparse",
            ["--data.seq_len", 40],
            "was trained on 48 tokens, this run has 40; what was learned can be carried",
        ),
        ("sparse", ["--data.seq_len", 100], "48 tokens: 100 tokens are no whole multiple of 48, .* such as 144"),
        ("sparse", [*LONGER, "--model.num_heads", 1], "was trained with model.num_heads=2, this run has 1"),
        ("sparse", [*LONGER, "--sparsity.guard", 0.1], "guard=0.1 compares with the loss of the dense phase"),
        ("dense", ["--init_layouts", "true"], "has no layouts to begin with, for its training was not sparse in all"),
        (
            "sparse",
            ["--init_layouts", "true", "--model.attention", "dense"],
            "gives layouts to adaptive attention, but",
        ),
    ],
)
def test_what_cannot_be_carried_is_refused(
    runs: Path, monkeypatch: pytest.MonkeyPatch, source: str, arguments: list[object], expected: str
):
    with pytest.raises(ValueError, match=expected):
        begun(monkeypatch, runs, "--init_from", run_folder_of(runs, source), *arguments)


def test_layouts_need_a_run_to_come_from(runs: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(
        ValueError, match="--init_layouts true takes layouts from another run; name it with --init_from"
    ):
        begun(monkeypatch, runs, "--init_layouts", "true")


def test_pictures_are_stretched_along_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    small = ["--name", "digits", "--data.name", "digits", "--data.batch_size", 8, "--model.width", 16]
    small += ["--sparsity.density", 0.3, "--sparsity.interval", 1, "--sparsity.max_dense_steps", 1]
    small += ["--trainer.accelerator", "cpu", "--trainer.limit_val_batches", 1, "--trainer.limit_test_batches", 1]
    size = ["--data.image_size", 8, "--model.block_size", 8, "--trainer.max_steps", 2]
    train.main([*map(str, [*small, *size])])
    (folder,) = (tmp_path / "runs" / "digits").iterdir()
    options = [*small, "--data.image_size", 16, "--model.block_size", 16, "--trainer.max_steps", 2]
    run = train.Run(*cli.parse([*map(str, options), "--init_from", str(folder)]), train.Console())
    learned = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    name = "model.encoder.positions"
    before, after = learned[name].unflatten(0, (8, 8)), run.module.state_dict()[name].unflatten(0, (16, 16))
    expected = 0.75 * before[1:, 0] + 0.25 * before[:-1, 0]  # the first column of pixels has no neighbour on its left
    torch.testing.assert_close(after[2::2, 0], expected)
    for index, attention in enumerate(m for m in run.module.modules() if isinstance(m, AdaptiveAttention)):
        kept = learned[f"model.encoder.layers.{index}.attention.layout_mask"]
        # A block is a row of pixels, in both.
        assert torch.equal(attention.layout_mask, kept.repeat_interleave(2, 1).repeat_interleave(2, 2))
