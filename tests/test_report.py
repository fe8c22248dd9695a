"""The report as its user asks for it: of a real run, of parts of it, and of what others left half done."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sat import report, train
from sat.findings import read
from sat.layout import BlockLayout
from sat.sections import share_text
from sat.sparsity import PooledAttention, captured_mass

CONFIG = """
data: {name: digits, image_size: 8, batch_size: 16, train_samples: 128, eval_samples: 40}
model: {num_layers: 2, width: 16, num_heads: 2, mlp_dim: 16, dropout: 0.1, block_size: 8}
optimizer: {lr: 3.0e-3, warmup_steps: 3}
sparsity: {density: 0.3, per_head: true, theta: -100.0, delta: 1000000.0, interval: 3, samples: 4}
trainer: {max_steps: 20, accelerator: cpu, val_check_interval: 7, check_val_every_n_epoch: null, log_every_n_steps: 5}
"""
SWITCH = 9
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks a page as it reads it: closed tags, nothing from elsewhere, no script."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.pictures: list[dict] = []
        self.words = ""
        text = path.read_text(encoding="utf-8")
        self.feed(text)
        self.close()
        assert self.open == []
        assert self.links <= self.ids
        assert not re.search(r"https?:|url\(|@import|<script", text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert tag not in ("script", "iframe", "object", "embed", "link", "base")
        assert not any(name.startswith("on") for name in attributes)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in attributes:
            assert attributes["id"] not in self.ids
            self.ids.add(attributes["id"])
        if "href" in attributes:
            assert attributes["href"].startswith("#")
            self.links.add(attributes["href"][1:])
        if tag == "img":
            assert attributes["src"].startswith("data:image/png;base64,iVBOR")
            assert len(attributes["alt"]) > 20
            self.pictures.append(attributes)
        else:
            assert "src" not in attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words += data + "\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.yaml").write_text(CONFIG)
    train.main(["--config", str(folder / "tiny.yaml"), "--output_dir", str(folder / "runs")])
    (run,) = (folder / "runs" / "tiny").iterdir()
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def made(capsys, *arguments: object) -> tuple[Page, str]:
    """The page, and what was printed."""
    path = report.main([str(a) for a in arguments])
    printed = capsys.readouterr().out
    assert f"page: {path}" in printed
    assert not list(path.parent.glob("*.tmp"))
    return Page(path), " ".join(printed.split())


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        report.main([str(a) for a in arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("sat.report: ")
    assert "\n" not in error
    return error


def test_a_whole_run(run, capsys):
    page, printed = made(capsys, run)
    summary = json.loads((run / "summary.json").read_text())
    for text in (f"switched to sparse attention at step {SWITCH}, by the criterion", "median step, sparse"):
        assert text in page.words
        assert text in printed
    for transition in summary["transitions"]:
        for key in ("captured_mass", "best_mass"):
            assert f"{transition[key]:.1%}" in page.words
            assert f"{transition[key]:.1%}" in printed
    # Two layers, the statistics, the training, the reach.
    assert len(page.pictures) == 5
    assert len(page.links) == 5
    for heading in ("Layers", "Blocks and attention", "When to switch", "Training", "Connectivity"):
        assert heading in page.words
    assert "skewness at least -100 and change below 1e+06 %" in page.words


def test_the_switch_keeps_what_was_attended_to(run):
    summary = json.loads((run / "summary.json").read_text())
    for transition in summary["transitions"]:
        name = f"layer{transition['layer']}.safetensors"
        attention, layout = PooledAttention.load(run / "attention" / name), BlockLayout.load(run / "layouts" / name)
        assert (attention.step, attention.query_length, attention.key_length) == (SWITCH, 64, 64)
        held = captured_mass(attention.pooled, layout.mask, 8, 64, 64)
        assert held == pytest.approx(transition["captured_mass"], rel=1e-6)


def test_tensorboard_has_images_of_the_switch(run):
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {f"{kind}/layer{i}" for kind in ("layouts", "attention") for i in (0, 1)}
    (image,) = events.Images("layouts/layer0")
    assert image.step == SWITCH
    assert (image.width, image.height) == (2 * 160 + 4, 160)


def test_what_took_the_place_of_a_test_set_is_said(run):
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "data_notes": ["Yelp: no test set there"]}))
    assert read([run]).notes == ["Yelp: no test set there."]


def test_what_is_read_of_a_run(run):
    found = read([run])
    assert found.notes == []
    assert sorted(found.history) == [3, 6, 9]  # the logger counts from 0
    assert found.curves["val/acc"][0] == [7, 14]
    assert set(found.curves) == {"train/loss", "train/acc", "train/step_ms", "val/loss", "val/acc"}
    assert (found.theta, found.delta) == (-100, 1e6)
    assert [layer.switch_step for layer in found.layers] == [SWITCH] * 2


def test_a_checkpoint_knows_the_same_layouts(run, capsys):
    page, _ = made(capsys, run / "checkpoints" / "last.ckpt")
    assert (run / "checkpoints" / "last.report.html").is_file()
    assert f"at step {SWITCH}, by the criterion" in page.words
    one, other = read([run]), read([run / "checkpoints" / "last.ckpt"])
    assert [layer.layout for layer in one.layers] == [layer.layout for layer in other.layers]
    assert one.history == {
        step: [pytest.approx({k: v for k, v in layer.items() if k in ("skewness", "relative_change")}) for layer in row]
        for step, row in other.history.items()
    }


def test_a_checkpoint_of_the_dense_phase(run, capsys):
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    sparsity = state["callbacks"]["AdaptiveSparsity"]
    sparsity["transitions"] = []
    for layer in sparsity["controller"]["layers"]:
        del layer["layout"]
    state["global_step"] = 7
    torch.save(state, run / "dense.ckpt")
    page, _ = made(capsys, run / "dense.ckpt")
    assert "after step 7, every layer is still dense" in page.words
    assert len(page.pictures) == 1  # the statistics


def test_a_checkpoint_of_a_run_that_went_back_to_dense_attention_says_so(run, capsys):
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    controller = state["callbacks"]["AdaptiveSparsity"]["controller"]
    controller["gave_up_at"] = 15
    for layer in controller["layers"]:
        del layer["layout"]
    torch.save(state, run / "gave_up.ckpt")
    page, _ = made(capsys, run / "gave_up.ckpt")
    assert "At step 15 it went back to dense attention" in page.words


def test_a_run_of_before_the_attention_was_kept(run, capsys):
    shutil.rmtree(run / "attention")
    page, _ = made(capsys, run)
    assert "What was attended to at the switch is not known here" in page.words
    assert len(page.pictures) == 5


def test_a_run_without_a_switch(run, capsys):
    summary = json.loads((run / "summary.json").read_text())
    del summary["transitions"]
    summary |= {"density": None, "not_switched": {"0": "skewness 1.20 < 1.70"}}
    (run / "summary.json").write_text(json.dumps(summary))
    for name in ("layouts", "attention", "checkpoints"):
        shutil.rmtree(run / name)
    page, printed = made(capsys, run)
    for text in ("has not switched to sparse attention", "layer 0: skewness 1.20 < 1.70"):
        assert text in page.words
        assert text in printed
    assert len(page.pictures) == 2
    assert "Connectivity" not in page.words


def test_a_run_that_was_cut_off_shows_its_last_checkpoint(run, capsys):
    (run / "summary.json").unlink()
    shutil.rmtree(run / "layouts")
    metrics = run / "csv" / "version_0" / "metrics.csv"
    metrics.write_bytes(metrics.read_bytes()[:-9])
    page, printed = made(capsys, run)
    assert "has not ended: there is no summary.json" in printed
    assert "last checkpoint, at step 20" in page.words
    assert len(page.pictures) == 5


def test_a_run_that_was_cut_off_after_its_switch_is_not_called_dense(run, capsys):
    (run / "summary.json").unlink()
    shutil.rmtree(run / "layouts")
    (run / "checkpoints" / "last.ckpt").rename(run / "checkpoints" / "best.ckpt")
    page, _ = made(capsys, run)
    assert "2 layers keep" in page.words
    shutil.rmtree(run / "checkpoints")
    page, printed = made(capsys, run)
    assert "This training switched to sparse attention, but its layouts are not known" in page.words
    assert printed.count("unknown") == 2
    shutil.rmtree(run / "attention")
    (run / "config.yaml").write_text("model: {attention: longformer}")
    page, _ = made(capsys, run)
    assert "This run learned no layouts" in page.words


def test_revisions_of_a_run_that_began_sparsely(run, capsys):
    summary = json.loads((run / "summary.json").read_text())
    del summary["transitions"]
    summary |= {"began_sparsely": "window", "revisions": [{"layer": 1, "step": 8}, {"layer": 0, "step": 12}]}
    (run / "summary.json").write_text(json.dumps(summary))
    page, _ = made(capsys, run)
    assert "Layouts were changed 2 times after that, last at step 12" in page.words


def test_a_resumed_run_has_the_thresholds_that_it_went_on_with(run, capsys):
    (run / "config_resumed.yaml").write_text("sparsity: {theta: -7, delta: 9}")
    page, _ = made(capsys, run)
    assert "skewness at least -7 and change below 9 %" in page.words


def test_f1_and_a_sparse_step_that_is_slower(run, capsys):
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"validation_f1": 0.8123, "test_f1": {"final": 0.7777, "best": 0.7999}, "sparse_step_speedup": 0.8}
    (run / "summary.json").write_text(json.dumps(summary))
    page, printed = made(capsys, run)
    for text in ("0.812", "0.778", "0.800", "a sparse step is slower by", "1.25 ×"):
        assert text in page.words
        assert text in printed


def test_a_run_that_went_back_has_no_sparse_phase_to_the_end(run, capsys):
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"gave_up": 15}))
    shutil.rmtree(run / "layouts")
    shutil.rmtree(run / "checkpoints")
    page, printed = made(capsys, run)
    assert "At step 15 it went back to dense attention" in page.words
    assert "unknown" not in printed


def test_the_page_is_there_also_where_nobody_reads_the_tables(run):
    command = f"{sys.executable} -m sat.report {run} | head -c 1"
    subprocess.run(["sh", "-c", command], cwd=Path(__file__).parents[1], check=True, capture_output=True, timeout=300)
    assert (run / "report.html").stat().st_size > 1000


def test_runs_are_shown_one_at_a_time_and_files_once(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "other")
    assert "runs are shown one at a time" in refused(capsys, run, other)
    page, _ = made(capsys, run, run)
    assert "switched to sparse attention" in page.words
    page, _ = made(capsys, *[run / "layouts" / "layer0.safetensors"] * 2)
    assert len(page.pictures) == 2  # the layout and its reach
    metadata = {"format": "sat.transformers", "version": "1", "block_size": "16", "sparse": '["a", "b"]'}
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        save_file(
            {layer: torch.ones(1, 4, 4, dtype=torch.bool) for layer in "ab"},
            tmp_path / name / "sat_layouts.safetensors",
            metadata,
        )
    page, _ = made(capsys, tmp_path / "x", tmp_path / "y")
    assert f"{tmp_path / 'y'}: b" in page.words


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0.0%"), (2.4e-4, "0.02%"), (0.1234, "12.3%"), (0.9999, "over 99.9%"), (1, "100.0%")]
)
def test_shares_are_not_rounded_to_nothing_or_all(share, text):
    assert share_text(share) == text


def test_damaged_files_are_named_and_the_rest_is_shown(run, capsys):
    (run / "summary.json").write_text('{"steps": 20, "trans')
    for name in ("layouts/layer1.safetensors", "attention/layer0.safetensors", "checkpoints/last.ckpt"):
        (run / name).write_bytes((run / name).read_bytes()[:100])
    (run / "config.yaml").write_text("{a: [")
    page, printed = made(capsys, run)
    for name in ("summary.json", "layouts/layer1.safetensors", "attention/layer0.safetensors", "config.yaml"):
        assert name in printed
        assert name in page.words
    assert "thresholds are not known" in page.words
    assert "the layout of a layer could not be read" in page.words
    assert "unknown" in page.words


def test_results_of_another_version(run, capsys):
    (run / "summary.json").write_text(json.dumps({"steps": "many", "transitions": [{"layer": "first"}, 3], "new": {}}))
    metadata = {"format": "sat.BlockLayout", "version": "99", "block_size": "8"}
    save_file({"mask": torch.ones(1, 8, 8, dtype=torch.bool)}, run / "layouts" / "layer0.safetensors", metadata)
    page, printed = made(capsys, run)
    assert "“steps” is left out" in printed
    assert "layout format 99" in page.words


def test_a_run_that_went_on_from_an_earlier_step(run):
    later = run / "csv" / "version_1"
    later.mkdir()
    (later / "metrics.csv").write_text("step,train/loss,layer0/skewness\n5,7.5,\n5,,1.25\n8,6.5,\n")
    found = read([run])
    steps, losses = found.curves["train/loss"]
    assert steps == [5, 6, 9]
    assert losses[1:] == [7.5, 6.5]
    assert sorted(found.history) == [3, 6]
    assert found.history[6] == [{"skewness": 1.25}]


def test_layout_files_of_different_sizes_side_by_side(run, tmp_path, capsys):
    for name, blocks in (("small", 4), ("large", 9)):
        BlockLayout(torch.rand(blocks, blocks) < 0.5, 16).save(tmp_path / f"{name}.safetensors")
    page, printed = made(capsys, tmp_path / "small.safetensors", tmp_path / "large.safetensors")
    assert (tmp_path / "report.html").is_file()
    assert "4 × 4" in printed
    assert "9 × 9" in printed
    assert "these files are not named like them" in page.words
    page, _ = made(capsys, run / "layouts", tmp_path / "small.safetensors", "--out", tmp_path / "other.html")
    assert len(page.pictures) == 3


def test_folders_and_files_of_one_name(run, tmp_path, capsys):
    page, _ = made(capsys, run / "layouts")
    assert (run / "layouts" / "report.html").is_file()
    assert "Connectivity" in page.words
    BlockLayout(torch.eye(8, dtype=torch.bool), 8).save(tmp_path / "layer0.safetensors")
    page, _ = made(capsys, run / "layouts" / "layer0.safetensors", tmp_path / "layer0.safetensors")
    for folder in (run / "layouts", tmp_path):
        assert f"\n{folder / 'layer0'}\n" in page.words


def test_layouts_of_a_fine_tuned_model(tmp_path, capsys):
    metadata = {"format": "sat.transformers", "version": "1", "block_size": "16"}
    names = [f"encoder.layer.{index}.attention" for index in (10, 2)]
    masks = {name: torch.rand(2, 4, 4) < 0.5 for name in names}
    save_file(masks, tmp_path / "sat_layouts.safetensors", metadata | {"sparse": json.dumps(names[:1])})
    found = read([tmp_path])
    assert [(layer.name, layer.layout is None) for layer in found.layers] == [(names[1], True), (names[0], False)]
    page, _ = made(capsys, tmp_path)
    assert "1 of 2 layers" in page.words


def test_markup_in_names_is_text(tmp_path, capsys):
    BlockLayout(torch.eye(3, dtype=torch.bool), 8).save(tmp_path / "[red]<b>x&.safetensors")
    page, printed = made(capsys, tmp_path / "[red]<b>x&.safetensors")
    assert "[red]<b>x&" in page.words
    assert printed.count("[red]<b>x&") > 1  # not only in the name of the page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is nothing at nowhere"),
        (["."], "holds neither a run nor layouts"),
        (["runs"], "holds 2 runs; give one of them, such as the newest, runs/"),
        (["runs/a"], "has left nothing to show yet"),
        (["half.ckpt"], "half.ckpt is not a whole checkpoint"),
        (["half.ckpt", "numbers.ckpt"], "only layout files"),
        (["numbers.ckpt"], "holds no training checkpoint"),
        (["half.safetensors"], "no layout could be read: half.safetensors is left out"),
        (["note.txt"], "no layout could be read"),
        (["runs/a", "--out", "runs"], "is a folder; give a file in it"),
        (["runs/a", "--out", "a.safetensors"], "ends in .html"),
        (["runs/a", "--out", "no/where.html"], "folder that does not exist"),
    ],
)
def test_bad_input_ends_with_a_sentence(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/a", "runs/b"):
        Path(name).mkdir(parents=True)
        (Path(name) / "config.yaml").write_text(CONFIG)
    torch.save({"weights": torch.ones(1000)}, "numbers.ckpt")
    Path("half.ckpt").write_bytes(Path("numbers.ckpt").read_bytes()[:500])
    Path("half.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    Path("note.txt").write_text("a note")
    if arguments == ["."]:
        shutil.rmtree("runs")
        Path("half.safetensors").unlink()
    before = sorted(Path().rglob("*"))
    assert message in refused(capsys, *arguments)
    assert sorted(Path().rglob("*")) == before


def test_an_old_page_stays_where_a_new_one_cannot_be_written(run, capsys, monkeypatch):
    (run / "report.html").write_text("old")

    def fail(self, *_: object, **__: object) -> None:
        self.touch()
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", fail)
    assert "cannot be written" in refused(capsys, run)
    assert (run / "report.html").read_text() == "old"
    assert not list(run.glob(".*"))


def test_no_code_comes_out_of_a_checkpoint(tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"state_dict": {}, "callbacks": {"a": Trap()}}, tmp_path / "trap.ckpt")
    refused(capsys, tmp_path / "trap.ckpt")
    assert not (tmp_path / "sprung").exists()


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        report.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for text in ("checkpoint", "layout files", "--out FILE", "python -m sat.report runs/"):
        assert text in printed


@pytest.mark.parametrize("name", ["a$x_{$b", "run$1 vs $2", "\x1b[31mred\x1b]0;title\x07", "x\u202eyz"])
def test_whatever_a_layer_is_called_is_shown_as_text(name, tmp_path, capsys):
    """No formula for Matplotlib, nothing that steers the terminal or turns letters round."""
    metadata = {"format": "sat.transformers", "version": "1", "block_size": "16", "sparse": json.dumps([name])}
    mask = torch.eye(4, dtype=torch.bool)[None].repeat(2, 1, 1)
    mask[1, 3, 0] = True
    save_file({name: mask}, tmp_path / "sat_layouts.safetensors", metadata)
    page, printed = made(capsys, tmp_path / "sat_layouts.safetensors")
    shown = "".join("\ufffd" if c in "\x1b\x07\u202e" else c for c in name)
    assert shown in page.words
    assert shown in printed
    assert page.pictures


def test_what_cannot_be_written_or_drawn_is_said_and_the_rest_is_shown(run, capsys):
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "device": "x\udfff", "gave_up": 10**400}))
    (metrics,) = run.glob("csv/version_*/metrics.csv")
    page, printed = made(capsys, run)
    assert "x\ufffd" in printed
    assert "Layers" in page.words
    (run / "summary.json").write_text(json.dumps(summary))
    lines = metrics.read_text().splitlines()
    loss = lines[0].split(",").index("train/loss")
    names = lines[0].split(",")
    lines.append(",".join("1.7e308" if i == loss else "25" if name == "step" else "" for i, name in enumerate(names)))
    metrics.write_text("\n".join(lines))
    page, printed = made(capsys, run)
    assert "Layers" in page.words
    assert len(page.pictures) >= 3


def test_layers_of_two_models_are_told_apart(tmp_path, capsys):
    masks = {f"layer.{i}.attention": torch.rand(1, 4, 4) < 0.5 for i in range(2)}
    for name in ("before", "after"):
        metadata = {"format": "sat.transformers", "version": "1", "block_size": "16", "sparse": json.dumps([*masks])}
        save_file(masks, tmp_path / f"{name}.safetensors", metadata)
    page, printed = made(capsys, tmp_path / "before.safetensors", tmp_path / "after.safetensors")
    for name in ("before", "after"):
        for layer in masks:
            assert f"{name}: {layer}" in page.words
    assert "4 layouts keep" in printed


def test_agreement_that_was_recorded_is_shown_without_a_config(run, capsys):
    (run / "config.yaml").unlink()
    (metrics,) = run.glob("csv/version_*/metrics.csv")
    metrics.write_text(metrics.read_text().replace("relative_change", "agreement"))
    page, _ = made(capsys, run)
    assert "The rule here was the agreement" in page.words
