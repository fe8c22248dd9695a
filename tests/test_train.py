"""The command as its user types it: whole runs on few small digits, interruption, bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from rich.console import Console

from sat import cli, runs, train
from sat.attention import AdaptiveAttention
from sat.data.digits import Digits
from sat.layout import BlockLayout
from sat.models import SequenceClassifier
from sat.monitor import Monitor
from sat.saving import SaveLast

TINY = """
data: {name: digits, image_size: 8, batch_size: 16, train_samples: 128, eval_samples: 40}
model: {num_layers: 2, width: 16, num_heads: 2, mlp_dim: 16, dropout: 0.1, block_size: 8}
optimizer: {lr: 3.0e-3, warmup_steps: 3}
sparsity: {density: 0.3, theta: -100.0, delta: 1000000.0, interval: 3, samples: 4}
trainer: {max_steps: 20, accelerator: cpu, val_check_interval: 7, check_val_every_n_epoch: null, log_every_n_steps: 5}
"""
SWITCH = 9  # the criterion is always met, as soon as it is defined: at the third observation


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def run(*arguments: object) -> dict:
    return train.main([str(a) for a in arguments])


def run_folder(name: str = "tiny") -> Path:
    (folder,) = Path("runs", name).iterdir()
    return folder


def refused(capsys, *arguments: object, status: int = 2) -> str:
    """The one sentence with which the command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == status
    error = capsys.readouterr().err.strip()
    assert error.startswith("sat.train: ")
    assert "\n" not in error
    return error


def test_a_whole_run_leaves_everything_in_its_folder(tiny, capsys):
    summary = run("--config", tiny)
    folder = run_folder()
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["steps"] == 20
    assert [t["step"] for t in summary["transitions"]] == [SWITCH, SWITCH]
    assert not any(t["forced"] for t in summary["transitions"])
    assert set(summary["validation_accuracy"]) == {"before", "after", "latest"}
    assert summary["validated_at"] == 14
    assert set(summary["test_accuracy"]) == {"final", "best"}
    assert set(summary["median_step_ms"]) == {"dense", "sparse"}
    assert summary["peak_memory_mib"]["process"] > 100
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    monitor = next(state for name, state in checkpoint["callbacks"].items() if name.startswith("Monitor"))
    steps = sum(sum(times) for times in monitor["step_times"].values())
    assert steps <= monitor["training_seconds"] == pytest.approx(summary["training_seconds"], abs=0.051)
    for layer in range(2):
        layout = BlockLayout.load(folder / "layouts" / f"layer{layer}.safetensors")
        assert layout.nnz == 2 * int(8 * 8 * 0.3)
        mask = checkpoint["state_dict"][f"model.encoder.layers.{layer}.attention.layout_mask"]
        assert torch.equal(mask, layout.mask)
    for name in ("layouts.png", "statistics.png", "checkpoints/best.ckpt", "csv/version_0/metrics.csv"):
        assert (folder / name).stat().st_size > 0
    assert list((folder / "tensorboard").glob("events.*"))
    header = (folder / "csv/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"layer0/skewness", "layer1/distance", "layer1/relative_change", "train/loss", "val/acc"} <= set(header)
    printed = capsys.readouterr().out
    for text in ("Switch to sparse attention at step 9, by its criterion", "before the switch", str(folder)):
        assert text in printed


def test_on_a_terminal_a_bar_counts_the_steps(tiny, capsys, monkeypatch):
    monkeypatch.setattr(train, "Console", lambda **options: Console(force_terminal=True, width=110, **options))
    run("--config", tiny)
    printed = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    for text in ("sparse", "20/20 loss", "testing", "3/3"):  # what stands there in between depends on the time
        assert text in printed


def test_brackets_in_names_are_no_markup(tiny, capsys):
    run("--config", tiny, "--name", "[red]lr=3", "--trainer.max_steps", 2, "--output_dir", "out[/x]")
    (folder,) = Path("out[/x]/[red]lr=3").iterdir()
    printed = capsys.readouterr().out
    assert "[red]lr=3: " in printed
    assert f"everything lies in {folder}" in printed


def test_the_saved_config_repeats_the_run(tiny):
    run("--config", tiny, "--sparsity.density", 0.5, "--trainer.max_steps", 6, "--seed", 3)
    saved = run_folder() / "config.yaml"
    content = yaml.safe_load(saved.read_text())
    assert content["sparsity"]["density"] == 0.5
    assert content["trainer"]["max_steps"] == 6
    run("--config", saved, "--name", "again")
    first, second = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (run_folder(), run_folder("again"))
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_time_leaves_out_what_is_measured_at_the_switch(tiny, monkeypatch):
    ahead = 0.0
    original = train.Monitor._measure_switch

    def slow(self, *args):
        nonlocal ahead
        ahead += 1000
        original(self, *args)

    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + ahead, monotonic=time.monotonic)
    monkeypatch.setattr("sat.monitor.time", clock)
    monkeypatch.setattr(train.Monitor, "_measure_switch", slow)
    assert 0 < run("--config", tiny)["training_seconds"] < 1000
    assert ahead == 1000


def test_dense_beside_adaptive(tiny):
    summary = run("--config", tiny, "--model.attention", "dense")
    assert set(summary["median_step_ms"]) == {"dense"}
    assert not (run_folder() / "layouts").exists()


def test_a_run_that_never_switches_says_what_was_missing(tiny, capsys):
    summary = run("--config", tiny, "--sparsity.theta", 1e6, "--trainer.max_steps", 8)
    assert set(summary["not_switched"]) == {"0", "1"}
    assert "layer 1 stayed dense: skewness" in capsys.readouterr().out


def test_a_forced_switch_says_so(tiny, capsys):
    summary = run("--config", tiny, "--sparsity.theta", 1e6, "--sparsity.max_dense_steps", 5, "--trainer.max_steps", 8)
    assert all(t["forced"] and "skewness" in t["missing"] for t in summary["transitions"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "at step 6, forced by max_dense_steps" in printed
    assert "missing: layer 0: skewness" in printed


def interrupt_at(monkeypatch, step: int) -> None:
    """As if Ctrl-C had been pressed during the step that ends as the ``step``-th."""
    original = SaveLast.on_train_batch_start

    def pressed(self, trainer, *args):
        self.interrupted = self.interrupted or trainer.global_step == step
        original(self, trainer, *args)

    monkeypatch.setattr(SaveLast, "on_train_batch_start", pressed)


# Epochs have 8 steps, validation comes every 7.
@pytest.mark.parametrize(
    "step",
    [
        2,
        pytest.param(7, marks=pytest.mark.long),
        8,
        SWITCH,
        SWITCH + 1,
        pytest.param(14, marks=pytest.mark.long),
        16,
        19,
    ],
)
def test_interrupted_and_resumed_is_bit_for_bit_the_whole_run(tiny, monkeypatch, capsys, step):
    run("--config", tiny, "--name", "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        message = refused(capsys, "--config", tiny, status=130)
        assert f"interrupted at step {step}" in message
        assert "--ckpt_path last" in message
    summary = run("--config", tiny, "--ckpt_path", "last")
    folders = run_folder("whole"), run_folder("tiny")
    assert summary["steps"] == 20
    whole, resumed = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in folders)
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name
    states = [c["optimizer_states"][0]["state"] for c in (whole, resumed)]
    assert all(torch.equal(states[0][i]["exp_avg_sq"], states[1][i]["exp_avg_sq"]) for i in states[0])
    layouts = [[BlockLayout.load(p) for p in sorted((f / "layouts").iterdir())] for f in folders]
    assert layouts[0] == layouts[1]
    summaries = [json.loads((f / "summary.json").read_text()) for f in folders]
    for key in ("transitions", "test_accuracy", "validation_accuracy", "best_checkpoint"):
        assert summaries[0][key] == summaries[1][key], key


def test_resuming_keeps_the_metrics_of_the_first_part(tiny, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        refused(capsys, "--config", tiny, status=130)
    first = (run_folder() / "csv/version_0/metrics.csv").read_text()
    last = run_folder() / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    monitor = next(state for name, state in checkpoint["callbacks"].items() if name.startswith("Monitor"))
    assert monitor["training_seconds"] > 0
    monitor |= {"training_seconds": 1000.0, "peak_memory": {"process": 1e6}}  # as if it had been a long part
    torch.save(checkpoint, last)
    summary = run("--config", tiny, "--ckpt_path", "last")
    assert 1000 < summary["training_seconds"] < 1100
    assert summary["peak_memory_mib"]["process"] == 1_000_000
    assert (run_folder() / "csv/version_0/metrics.csv").read_text() == first
    assert (run_folder() / "csv/version_1/metrics.csv").is_file()


def test_weights_that_became_nan_are_not_saved(tiny, monkeypatch, capsys):
    original = SaveLast.on_train_batch_start

    def poison(self, trainer, pl_module, *args):
        if trainer.global_step == 6:  # a save is due, and no loss has shown it yet
            pl_module.model.head[0].weight.data[0, 0] = torch.nan
        original(self, trainer, pl_module, *args)

    monkeypatch.setattr(SaveLast, "on_train_batch_start", poison)
    monkeypatch.setattr(SaveLast.__init__, "__defaults__", (3,))
    message = refused(capsys, "--config", tiny, status=1)
    assert "model.head.0.weight has become NaN or infinite by step 6" in message
    last = torch.load(run_folder() / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 3
    assert str(run_folder() / "checkpoints" / "last.ckpt") in message


def test_layers_that_switched_keep_their_numbers(tmp_path):
    model = SequenceClassifier(20, 32, 3, block_size=8)
    layout = BlockLayout(torch.eye(4, dtype=torch.bool), 8)
    model.encoder.layers[1].attention.set_layout(layout)
    found = runs.layouts_of(model)
    assert found == {1: layout}  # one head, because the two are alike
    runs.save_layouts(tmp_path, found, None)
    assert [p.name for p in (tmp_path / "layouts").iterdir()] == ["layer1.safetensors"]


def test_pruned_scores_count_as_the_model_was_told():
    found = {}
    for pruned in ("drop", "zero"):
        torch.manual_seed(0)
        model = SequenceClassifier(20, 32, 3, num_layers=1, block_size=8, pruned=pruned).eval()
        layer = model.encoder.layers[0]
        layer.query_key_value.weight.data[:128] = 0  # queries and keys: all scores are 0
        layer.query_key_value.bias.data[:128] = 0
        layer.attention.set_layout(BlockLayout(torch.eye(4, dtype=torch.bool), 8))
        layer.attention.register_forward_hook(lambda module, given, context: found.update({module.pruned: context}))
        model(torch.arange(20)[None].expand(2, -1)[:, :16].repeat(1, 2))
    # 8 of 32 keys are kept; where the others count, each has a weight of 1/32 instead of 1/8.
    torch.testing.assert_close(4 * found["zero"], found["drop"])
    with pytest.raises(ValueError, match="pruned must be one of drop, zero, got 'nothing'"):
        SequenceClassifier(20, 32, 3, pruned="nothing")  # type: ignore[arg-type]


@pytest.mark.parametrize("attention", ["adaptive", "dense"])
def test_a_run_goes_on_only_as_it_began(tiny, monkeypatch, capsys, attention):
    other = "dense" if attention == "adaptive" else "adaptive"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 12)
        refused(capsys, "--config", tiny, "--model.attention", attention, status=130)
    files = {p: p.read_bytes() for p in run_folder().rglob("*") if p.is_file()}
    resume = ["--config", tiny, "--ckpt_path", "last", "--model.attention"]
    assert f"was trained with model.attention={attention}" in refused(capsys, *resume, other)
    longer = refused(capsys, *resume, attention, "--trainer.max_steps", 30)
    assert "learning-rate cycle has 20 steps, this run 30" in longer
    for name, value, expected in (
        ("lr", 1e-6, r"optimizer\.lr \(times layer_decay\) of 0\.003, which would prevail over this run's 1e-06"),
        ("warmup_steps", 7, r"optimizer\.warmup_steps of 3, which would prevail over this run's 7"),
        ("weight_decay", 0.3, r"optimizer\.weight_decay of 0\.0, which would prevail over this run's 0\.3"),
        ("betas", "[0.5, 0.9]", r"optimizer\.betas of .*, which would prevail over this run's \(0\.5, 0\.9\)"),
        ("eps", 1e-3, r"optimizer\.eps of 1e-06, which would prevail over this run's 0\.001"),
        ("layer_decay", 0.5, r"optimizer\.lr \(times layer_decay\) of 0\.003, which would .* this run's .*, 0\.003"),
    ):
        assert re.search(expected, refused(capsys, *resume, attention, f"--optimizer.{name}", value))
    assert "with model.num_heads=2, this run has 1" in refused(capsys, *resume, attention, "--model.num_heads", 1)
    if attention == "adaptive":
        assert "per_head" in refused(capsys, *resume, attention, "--sparsity.per_head", "false")
        assert "with model.pruned='drop'" in refused(capsys, *resume, attention, "--model.pruned", "zero")
    assert all(p.read_bytes() == content for p, content in files.items())


def test_of_two_runs_that_begin_at_once_one_is_refused(tiny):
    both = [train.Run(*cli.parse(["--config", str(tiny)]), Console(quiet=True)) for _ in range(2)]
    for one in both[1:]:  # as if both had begun in the same second
        one.folder = both[0].folder
    both[0].prepare()
    files = {path: path.read_bytes() for path in both[0].folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"another run has just begun in .*; start this one again"):
        both[1].prepare()
    assert files
    assert all(path.read_bytes() == content for path, content in files.items())


def test_a_layer_that_is_still_dense_keeps_all_of_its_blocks(tiny):
    training = train.Run(*cli.parse(["--config", str(tiny)]), Console(quiet=True))
    attentions = [module for module in training.model.modules() if isinstance(module, AdaptiveAttention)]
    attentions[0].set_layout(BlockLayout(torch.eye(8, dtype=torch.bool), 8))
    summary = runs.summarize(
        "tiny", training.trainer, training.module, training.model, training.monitor, training.sparsity
    )
    assert summary["density"] == round((1 / 8 + 1) / 2, 4)


def test_ctrl_c_before_the_first_step_promises_no_checkpoint(tiny, monkeypatch, capsys):
    interrupt_at(monkeypatch, 0)
    message = refused(capsys, "--config", tiny, status=130)
    assert "--ckpt_path" not in message


def test_settings_that_only_lightning_refuses_leave_no_folder(tiny, capsys):
    """It would be the newest, and ``--ckpt_path last`` would begin anew there."""
    run("--config", tiny)
    done = run_folder()
    both = ["--trainer.val_check_interval", 500, "--trainer.check_val_every_n_epoch", 1]
    assert "val_check_interval" in refused(capsys, "--config", tiny, *both)
    without = ["--sparsity.guard", 0.1, "--trainer.limit_val_batches", 0]
    assert "guard=0.1 goes by the loss on validation data, and with" in refused(capsys, "--config", tiny, *without)
    assert run_folder() == done
    assert run("--config", tiny, "--ckpt_path", "last")["steps"] == 20
    assert run_folder() == done


def test_what_begins_anew_is_recorded_as_it_is_then(tiny, monkeypatch, capsys):
    interrupt_at(monkeypatch, 0)
    refused(capsys, "--config", tiny, status=130)
    monkeypatch.undo()
    monkeypatch.chdir(tiny.parent)
    assert run("--config", tiny, "--ckpt_path", "last", "--trainer.max_steps", 12)["steps"] == 12
    assert "max_steps: 12" in (run_folder() / "config.yaml").read_text()
    assert not (run_folder() / "config_resumed.yaml").exists()


def test_settings_that_a_run_did_not_go_on_with_leave_no_trace(tiny, capsys):
    run("--config", tiny)
    said = refused(
        capsys, "--config", tiny, "--ckpt_path", "last", "--trainer.max_steps", 40, "--sparsity.density", 0.5
    )
    assert "learning-rate cycle" in said
    assert not (run_folder() / "config_resumed.yaml").exists()
    (run_folder() / "config_resumed.yaml").write_text("before")
    refused(capsys, "--config", tiny, "--ckpt_path", "last", "--trainer.max_steps", 40)
    assert (run_folder() / "config_resumed.yaml").read_text() == "before"


def test_what_took_the_place_of_a_test_set_is_kept(tiny, monkeypatch, capsys):
    assert "data_notes" not in run("--config", tiny)  # the digits never had one
    assert "test set" not in capsys.readouterr().out
    monkeypatch.setattr(Digits, "published", ("train", "test"))
    said = "Digits: no test set there: 180 training samples are held out as one"
    assert run("--config", tiny, "--name", "other")["data_notes"] == [said]
    assert said in capsys.readouterr().out


def test_a_model_is_pretrained_on_hidden_tokens_and_taken_up(tiny, capsys):
    found = run("--config", tiny, "--data.hide", 0.25, "--model.positions", "sine")
    said = capsys.readouterr().out
    assert "25% of the tokens hidden, to be found among 17" in said
    assert [each["step"] for each in found["transitions"]] == [SWITCH, SWITCH]
    assert found["test_accuracy"]["final"] > 0.3  # most pixels are black
    pretrained = run_folder()
    state = torch.load(pretrained / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert state["model.head.2.weight"].shape[0] == 17

    taken = {}

    class Stop(Exception):
        pass

    def keep(self):
        taken.update({name: x.clone() for name, x in self.module.state_dict().items()})
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Run, "train", keep)
        with pytest.raises(Stop):
            run("--config", tiny, "--init_from", pretrained, "--name", "taken")
    assert f"begins with the weights of {pretrained}/checkpoints/last.ckpt, but for the head, which is new" in (
        " ".join(capsys.readouterr().out.split())
    )
    learned = [name for name in state if name.startswith("model.encoder.") and "attention.layout" not in name]
    assert len(learned) > 10
    for name in learned:
        if not name.endswith(("layout_mask", "sparse")):
            assert torch.equal(taken[name], state[name])
    assert taken["model.head.2.weight"].shape[0] == 10
    # Nor is a pretraining taken for a training to go on with.
    assert "of another model" in refused(capsys, "--config", tiny, "--ckpt_path", pretrained)


def test_a_pretraining_goes_on_as_if_it_had_not_been_stopped(tiny, monkeypatch, capsys):
    whole = run("--config", tiny, "--data.hide", 0.25, "--name", "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 12)
        refused(capsys, "--config", tiny, "--data.hide", 0.25, status=130)
    found = run("--config", tiny, "--data.hide", 0.25, "--ckpt_path", "last")
    assert found["test_accuracy"] == whole["test_accuracy"]
    states = [
        torch.load(run_folder(name) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "tiny")
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_broken_machine_is_not_blamed_on_the_checkpoint(tiny, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        refused(capsys, "--config", tiny, status=130)

    def broken(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error.")

    monkeypatch.setattr(train.Monitor, "on_train_batch_start", broken)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        run("--config", tiny, "--ckpt_path", "last")


def test_another_accumulation_is_refused_on_a_resume(tiny, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        refused(capsys, "--config", tiny, status=130)
    other = ["--config", tiny, "--ckpt_path", "last", "--trainer.accumulate_grad_batches", 2]
    assert "accumulate_grad_batches=1, this run has 2; a run goes on with the same" in refused(capsys, *other)


def test_accuracy_around_the_switch_is_measured_as_validation_computes(tiny, monkeypatch, capsys):
    """Under autocast, if the run is; and says of how many samples it is, if not of all."""
    kinds = []
    original = SequenceClassifier.forward

    def noted(self, *args, **kwargs):
        logits = original(self, *args, **kwargs)
        kinds.append((self.training, logits.dtype))
        return logits

    monkeypatch.setattr(SequenceClassifier, "forward", noted)
    monkeypatch.setattr(train, "Monitor", lambda *args: Monitor(*args, switch_batches=2))
    options = ["--trainer.precision", "bf16-mixed", "--data.eval_batch_size", 8]
    summary = run("--config", tiny, *options)
    assert set(kinds) == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert summary["switch_samples"] == 16
    assert "validation accuracy right after it (first 16 samples)" in capsys.readouterr().out


def test_the_summary_says_when_the_guard_went_back_to_dense_attention(capsys, tmp_path):
    summary = {
        **{"name": "x", "steps": 20, "attention": "adaptive", "attention_options": {}, "density": None},
        **{"validation_accuracy": {"before": 0.5, "after": 0.4}, "test_accuracy": {}, "gave_up": 15},
        **{"median_step_ms": {}, "peak_memory_mib": {}},
    }
    runs.print_summary(Console(width=120), tmp_path, summary)
    assert re.search(r"went back to dense attention, by its guard +│ at step 15", capsys.readouterr().out)


def test_ctrl_c_in_the_last_step_leaves_before_the_test(tiny, monkeypatch, capsys):
    original = train.Monitor.on_train_end

    def pressed(self, trainer, *args):
        next(c for c in trainer.callbacks if isinstance(c, SaveLast)).interrupted = True
        original(self, trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train.Monitor, "on_train_end", pressed)
        assert "interrupted at step 20, the last one" in refused(capsys, "--config", tiny, status=130)
    assert not (run_folder() / "summary.json").exists()
    assert run("--config", tiny, "--ckpt_path", "last")["steps"] == 20


def test_names(tiny):
    tiny.write_text("name: mine\n" + TINY)
    args, _ = cli.parse(["--config", str(tiny)])
    assert args.name == "mine"
    args, _ = cli.parse(["--config", str(tiny), "--name", "yours"])
    assert args.name == "yours"
    args, _ = cli.parse(["--config", "yelp", "--name", "yelp", "--data.name", "yelp"])
    assert (args.name, args.data.name) == ("yelp", "yelp")


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.long), 0.1])
def test_compiled(tiny, dropout, monkeypatch):
    # The graphs are what is ours; turning them into machine code would take a minute and a C++ compiler.
    compile_model = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compile_model(self, backend="aot_eager", **kw))
    summary = run("--config", tiny, "--compile", "true", "--model.dropout", dropout, "--sparsity.per_layer", "true")
    assert len(summary["transitions"]) == 2


@pytest.mark.long
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_runs_of_one_seed_are_alike_bit_for_bit(tiny, backend, monkeypatch):
    compile_model = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compile_model(self, backend=backend, **kw))
    weights = []
    for name in ("one", "two"):
        torch.compiler.reset()
        summary = run("--config", tiny, "--compile", "true", "--model.dropout", 0.1, "--name", name)
        assert len(summary["transitions"]) == 2
        last = torch.load(run_folder(name) / "checkpoints" / "last.ckpt", weights_only=True)
        weights.append(last["state_dict"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_ctrl_c_saves_and_leaves(tiny):
    command = [sys.executable, "-m", "sat.train", "--config", str(tiny), "--trainer.max_steps", "100000"]
    root = Path(train.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tiny.parent
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "interrupted at step" in errors
    steps = torch.load(run_folder() / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert steps > 0


def test_a_nan_loss_ends_the_run_and_keeps_the_last_good_checkpoint(tiny, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        refused(capsys, "--config", tiny, status=130)
    last = run_folder() / "checkpoints" / "last.ckpt"
    good = last.read_bytes()
    original = SaveLast.on_train_batch_start

    def poison(self, trainer, pl_module, *args):
        if trainer.global_step == 6:
            pl_module.model.head[0].weight.data[0, 0] = torch.nan
        original(self, trainer, pl_module, *args)

    monkeypatch.setattr(SaveLast, "on_train_batch_start", poison)
    message = refused(capsys, "--config", tiny, "--ckpt_path", "last", status=1)
    assert "the training loss is nan at step 6" in message
    assert str(last) in message
    assert last.read_bytes() == good


def test_a_checkpoint_with_a_damaged_state_is_refused_by_name(tiny, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_at(patch, SWITCH + 1)
        refused(capsys, "--config", tiny, status=130)
    last = run_folder() / "checkpoints" / "last.ckpt"
    for where, value in (
        (("controller", "layers", 0, "transition_step"), {}),
        (("controller", "revised_at"), "soon"),
        (("controller", "gave_up_at"), -3),
        (("revisions",), [{"layer": 0, "step": -1}]),
        (("guard", "worse"), "much"),
    ):
        state = torch.load(last, weights_only=True)
        (name,) = (key for key in state["callbacks"] if key.startswith("AdaptiveSparsity"))
        at = state["callbacks"][name]
        for step in where[:-1]:
            at = at[step]
        at[where[-1]] = value
        torch.save(state, "damaged.ckpt")
        message = refused(capsys, "--config", tiny, "--ckpt_path", "damaged.ckpt")
        assert "damaged.ckpt is not a whole checkpoint (the state of AdaptiveSparsity in it is none)" in message, where


class TestConfigs:
    @pytest.mark.parametrize("path", sorted(runs.shipped_configs().glob("*.yaml")), ids=lambda p: p.stem)
    def test_every_shipped_config_is_valid_and_opens_with_its_command(self, path):
        arguments, _ = cli.parse(["--config", path.name])
        assert arguments.name == path.stem
        assert f"python -m sat.train --config {path.name}" in path.read_text()
        assert arguments.model.attention == "adaptive"
        options = arguments.data.as_dict()
        data_set = cli.DATASETS[options.pop("name")]
        if data_set.__name__ in ("INaturalist", "Retrieval"):  # no home on the hub: the user names a folder
            options["path"] = str(path.parent)
        train.AdaptiveSparsity(**arguments.sparsity.as_dict())
        if data_set.inputs != "ids":
            return  # tests/test_pretrained.py runs them
        data = data_set(**options)
        sizes = (data.vocab_size, data.seq_len, data.num_classes)
        cli.SequenceClassifier(*sizes, towers=data.towers, **arguments.model.as_dict())

    def test_the_papers_settings(self):
        # Yoon et al. 2024, hyperparameters: layers, block, density, batch, lr, warm-up, steps
        table = {
            "cifar10": (2, 32, 0.05, 256, 2e-3, 175, 10_000),
            "inaturalist": (2, 32, 0.04, 512, 3e-3, 800, 10_000),
            "ag_news": (4, 32, 0.08, 512, 9e-4, 80, 30_000),
            "yelp": (4, 32, 0.05, 512, 7e-4, 80, 30_000),
        }
        for name, expected in table.items():
            args, _ = cli.parse(["--config", name])
            found = (
                args.model.num_layers,
                args.model.block_size,
                args.sparsity.density,
                args.data.batch_size,
                args.optimizer.lr,
                args.optimizer.warmup_steps,
                args.trainer.max_steps,
            )
            assert found == expected
            assert (args.model.width, args.model.num_heads, args.model.mlp_dim, args.model.dropout) == (64, 2, 128, 0.1)
            assert args.optimizer.eps == 1e-6
            # Which blocks, and when, as we recommend: within a tenth of the steps.
            sparsity = args.sparsity
            assert (sparsity.mask, sparsity.per_head, sparsity.by_offset) == ("fisher", True, True)
            assert (sparsity.agreement, sparsity.lr_factor) == (0.9, 1.0)
            assert sparsity.max_dense_steps == args.trainer.max_steps / 10
            assert (args.trainer.gradient_clip_val, args.trainer.gradient_clip_algorithm) == (1.0, "value")

    def test_the_settings_as_published(self):
        """The hyperparameters of Yoon et al. 2024, written out; configs/*_paper.yaml are to stay what was published."""
        table = {
            # classes, L, layers, density, batch, lr, warm-up, steps, theta
            "cifar10_paper": (10, 1024, 2, 0.05, 256, 2e-3, 175, 10_000, 1.7),
            "inaturalist_paper": (14, 1024, 2, 0.04, 512, 3e-3, 800, 10_000, 1.7),
            "ag_news_paper": (4, 1024, 4, 0.08, 512, 9e-4, 80, 30_000, 1.7),
            "yelp_paper": (2, 1024, 4, 0.05, 512, 7e-4, 80, 30_000, 1.3),
        }
        for name, (classes, length, layers, density, batch, lr, warmup, steps, theta) in table.items():
            args, _ = cli.parse(["--config", name])
            options = args.data.as_dict()
            data = cli.DATASETS[options.pop("name")](**{**options, "path": "anywhere"})
            assert (data.num_classes, data.seq_len, data.batch_size) == (classes, length, batch)
            model, sparsity, trainer = args.model, args.sparsity, args.trainer
            assert (model.attention, model.num_layers, model.block_size) == ("adaptive", layers, 32)
            assert (model.width, model.num_heads, model.mlp_dim, model.head_dim) == (64, 2, 128, 128)
            assert (model.dropout, model.pruned) == (0.1, "zero")
            optimizer = args.optimizer
            assert (optimizer.lr, optimizer.warmup_steps, optimizer.weight_decay) == (lr, warmup, 0)
            assert (tuple(optimizer.betas), optimizer.eps, optimizer.layer_decay) == ((0.9, 0.999), 1e-6, 1)
            # One Gram mask of rank D = 64 / 2 a layer; int(32 * 32 * density) blocks and nothing else are kept.
            assert (sparsity.mask, sparsity.mask_rank) == ("gram", 32)
            assert (sparsity.per_head, sparsity.share_budget, sparsity.by_offset) == (False, False, False)
            assert (sparsity.density, sparsity.coverage) == (density, None)
            assert (sparsity.min_density, sparsity.max_density) == (0, 1)
            assert (sparsity.keep_diagonal, sparsity.min_blocks_per_row, sparsity.keep_first_tokens) == (False, 0, 0)
            # All layers at once, the first step at which all are ready, on the whole batch, however long it takes.
            assert (sparsity.theta, sparsity.delta, sparsity.smoothing, sparsity.patience) == (theta, 1.3, 0, 1)
            assert (sparsity.interval, sparsity.samples, sparsity.per_layer) == (1, batch, False)
            assert (sparsity.min_dense_steps, sparsity.max_dense_steps, sparsity.lr_factor) == (0, None, 0.5)
            assert sparsity.agreement is sparsity.revise_interval is sparsity.guard is None
            assert (trainer.max_steps, trainer.precision, trainer.accumulate_grad_batches) == (steps, "16-mixed", 1)
            assert (trainer.gradient_clip_val, trainer.gradient_clip_algorithm) == (1.0, "value")

    def test_two_machines_see_the_samples_of_one_process(self):
        one, many = (cli.parse(["--config", name])[0] for name in ("cifar10", "cifar10_ddp"))
        assert many.trainer.num_nodes * many.trainer.devices * many.data.batch_size == one.data.batch_size
        assert (many.trainer.strategy, many.process_timeout) == ("ddp", 600)
        for section in ("model", "optimizer", "sparsity"):
            assert many[section] == one[section]

    def test_overrides_come_after_the_config(self):
        args, _ = cli.parse(["--config=cifar10.yaml", "--sparsity.density", "0.1", "--data.path", "DIR"])
        assert (args.sparsity.density, args.data.path, args.data.batch_size) == (0.1, "DIR", 256)

    def test_help_explains_every_section(self, capsys):
        with pytest.raises(SystemExit) as stop:
            train.main(["--help"])
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        for option in ("--sparsity.density", "--data.path", "--model.attention", "--trainer.max_steps", "--ckpt_path"):
            assert option in printed
        assert "default: 0.1" in printed
        assert "--model.num_layers NUM_LAYERS" in printed
        assert "--model.pretrained NAME_OR_FOLDER" in printed
        assert "what follows is for a model of our own; for a pretrained one, see" in " ".join(printed.split())

    @pytest.mark.parametrize("way", [["--config", "bert_mrpc"], ["--model.pretrained", "x", "--data.name", "imdb"]])
    def test_help_for_a_pretrained_model(self, capsys, way):
        with pytest.raises(SystemExit) as stop:
            train.main([*way, "--help"])
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        for option in ("--model.freeze_backbone", "--optimizer.layer_decay", "--data.tokenizer", "--data.path"):
            assert f"{option} " in printed
        assert "--model.num_layers NUM_LAYERS" not in printed
        assert "what follows is for a pretrained model; for one of our own, see" in " ".join(printed.split())


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["--config", "cifar11.yaml"], "no config 'cifar11.yaml'; give the path of a YAML file, or one of ag_news"),
            (["--config"], "--config needs a value"),
            (["--trainer.max_steps", 5], "no data set chosen"),
            (["--data.name", "mnist"], "unknown data set 'mnist' in data.name; there are digits, cifar10"),
            (["--config", "tiny.yaml", "--sparsity.densty", 0.1], "densty"),
            (["--conf", "tiny.yaml", "--data.name", "digits"], "conf"),
            (["--data.name", "--output_dir", "x"], "--data.name needs a value"),
            (["--config", "tiny.yaml", "--trainer.max_steps", 0], "trainer.max_steps must be at least 1"),
            (["--config", "tiny.yaml", "--trainer.max_steps", -1], "set trainer.max_steps or max_epochs"),
            (["--config", "tiny.yaml", "--trainer.max_epochs", 0], "max_epochs is 0, which trains nothing"),
            (["--config", "tiny.yaml", "--trainer.limit_train_batches", 0], "limit_train_batches is 0, which trains"),
            (
                ["--config", "tiny.yaml", "--model.attention", "spion", "--trainer.accumulate_grad_batches", 0],
                "accumulate_grad_batches must be at",
            ),
            *(
                (
                    ["--config", "tiny.yaml", f"--trainer.limit_{split}_batches", 0.0001, *estimate],
                    f"trainer.limit_{split}_batches=0.0001 of ",
                )
                for split in ("train", "val", "test")
                for estimate in ([], ["--estimate", "true"])
            ),
            *(
                (
                    ["--config", "tiny.yaml", "--sparsity.guard", 0.1, "--trainer.limit_val_batches", 0, *estimate],
                    "sparsity.guard=0.1 goes by the loss on validation data",
                )
                for estimate in ([], ["--estimate", "true"])
            ),
            *(
                (
                    ["--config", "tiny.yaml", "--trainer.strategy", name, "--trainer.devices", 2],
                    f"strategy={name} forks",
                )
                for name in ("ddp_spawn", "ddp_fork", "ddp_notebook")
            ),
            (["--config", "tiny.yaml", "--data.num_workers", 10**5], "would start as many processes; set --data.num_w"),
            (["--config", "tiny.yaml", "--trainer.accumulate_grad_batches", 0], "accumulate_grad_batches must be at"),
            (["--config", "tiny.yaml", "--trainer.val_check_interval", 0], "val_check_interval must be above 0"),
            (
                ["--config", "tiny.yaml", "--process_timeout", 0],
                "process_timeout must be 1 to 1,000,000,000 seconds, got 0",
            ),
            (["--config", "tiny.yaml", "--process_timeout", 10**15], "process_timeout must be 1 to 1,000,000,000"),
            (["--config", "tiny.yaml", "--trainer.check_val_every_n_epoch", 0], "check_val_every_n_epoch must be at"),
            (["--config", "tiny.yaml", "--optimizer.betas", "[1.5,2]"], "betas must be at least 0 and below 1"),
            (["--config", "tiny.yaml", "--optimizer.eps", -1], "weight_decay and eps must be at least 0"),
            (["--config", "tiny.yaml", "--trainer.precision", "transformer-engine"], "transformer"),
            (["--config", "tiny.yaml", "--trainer.max_steps", "many"], "max_steps"),
            (["--config", "tiny.yaml", "--model.attention", "sparse"], "attention"),
            (["--config", "tiny.yaml", "--sparsity.density", 1.5], "density"),
            (["--config", "tiny.yaml", "--sparsity.coverage", 0.5], "coverage"),
            (["--config", "tiny.yaml", "--sparsity.smoothing", 2], "smoothing"),
            (["--config", "tiny.yaml", "--sparsity.start", "ring"], "ring"),
            (["--config", "tiny.yaml", "--sparsity.start", "window"], "without revise_interval would never change"),
            (["--config", "path256.yaml", "--sparsity.guard", 0.1], "start='window' does without; leave guard away"),
            (
                ["--config", "pathx.yaml", "--sparsity.agreement", "null"],
                "1.0 GiB a layer, in memory and in checkpoint",
            ),
            (["--config", "tiny.yaml", "--model.block_size", 100], "block_size 100 exceeds seq_len 64"),
            (["--config", "tiny.yaml", "--model.num_heads", 3], "width 16 cannot be split among 3 heads"),
            (["--config", "tiny.yaml", "--data.batch_size", 0], "batch_size"),
            (["--config", "tiny.yaml", "--data.batch_size", 500], "fewer than one batch of 500"),
            (["--config", "tiny.yaml", "--output_dir", "tiny.yaml"], "choose another --output_dir"),
            (["--config", "tiny.yaml", "--ckpt_path", "last"], "no run in runs/tiny has a checkpoint yet"),
            (["--config", "tiny.yaml", "--ckpt_path", "none.ckpt"], "no checkpoint at none.ckpt"),
            (["--config", "tiny.yaml", "--ckpt_path", "tiny.yaml"], "tiny.yaml is not a whole checkpoint"),
            (["--config", "tiny.yaml", "--trainer.accelerator", "abacus"], "abacus"),
            (["--config", "tiny.yaml", "--trainer.precision", "3"], "precision"),
            (["--config", "cifar10.yaml", "--data.path", "nowhere"], "nowhere"),
            (["--config", "cifar10.yaml", "--data.cache_dir", "cache"], "--data.path"),
        ],
    )
    def test_is_refused_with_a_sentence_before_any_work(self, tiny, capsys, arguments, expected):
        assert expected in refused(capsys, *arguments)
        assert not list(Path().glob("runs/*/*"))

    @pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "data: 3\n"])
    def test_a_file_that_is_no_config(self, tiny, capsys, text):
        tiny.write_text(text)
        assert "tiny.yaml is not a" in refused(capsys, "--config", tiny)

    def test_a_section_that_a_file_has_twice(self, tiny, capsys):
        tiny.write_text(f"{TINY}\nextra: 1\nmodel: {{num_layers: 1}}\n")
        assert "it has model twice, in line " in refused(capsys, "--config", tiny)
        tiny.write_text("data: {name: digits, name: digits}\n")
        assert "it has name twice, in line 1 and in line 1" in refused(capsys, "--config", tiny)
        tiny.write_text("data:\n  name: digits\n  name: digits\n")
        assert "it has name twice, in line 2 and in line 3; join them" in refused(capsys, "--config", tiny)

    def test_a_model_that_memory_cannot_hold(self, tiny, capsys):
        sentence = refused(capsys, "--config", tiny, "--data.image_size", 40_000, status=1)
        assert "do not fit into memory; make the sequences shorter" in sentence

    def test_samples_that_another_run_was_trained_on(self, tiny, capsys, monkeypatch):
        drawn = ["--data.name", "listops", "--data.num_samples"]
        text = TINY.replace("image_size: 8", "seq_len: 64, min_length: 5, max_length: 60").replace("name: digits", "")
        tiny.write_text(text.replace("{,", "{"))
        with monkeypatch.context() as patch:
            interrupt_at(patch, 2)
            refused(capsys, "--config", tiny, *drawn, 1000, status=130)
        before = ["--config", tiny, "--init_from", run_folder(), "--name", "next"]
        sentence = refused(capsys, *before, *drawn, 500)
        assert "has drawn 1,000 samples, this one draws 500: what is held out here may have been trained on" in sentence
        assert not Path("runs", "next").exists()
        for arguments in ([*drawn, 1000], [*drawn, 500, "--data.draw_seed", 1]):
            train.Run(*cli.parse([*map(str, before), *map(str, arguments)]), train.Console())

    def test_an_unknown_key_in_a_file(self, tiny, capsys):
        tiny.write_text(TINY + "\nextra: {a: 1}\n")
        assert "extra" in refused(capsys, "--config", tiny)

    def test_checkpoints_that_do_not_fit(self, tiny, monkeypatch, capsys):
        with monkeypatch.context() as patch:
            interrupt_at(patch, 2)
            refused(capsys, "--config", tiny, status=130)
        last = run_folder() / "checkpoints" / "last.ckpt"
        other = refused(capsys, "--config", tiny, "--ckpt_path", last, "--model.width", 32)
        assert "is a checkpoint of another model: model." in other
        assert "16] there and " in other
        deeper = refused(capsys, "--config", tiny, "--ckpt_path", last, "--model.num_layers", 3)
        assert "is a checkpoint of another model: model.encoder.layers.2" in deeper
        whole = last.read_bytes()
        last.write_bytes(whole[: len(whole) // 2])
        assert "is not a whole checkpoint" in refused(capsys, "--config", tiny, "--ckpt_path", last)
        torch.save({"weights": torch.ones(3)}, last)
        assert "holds no training checkpoint" in refused(capsys, "--config", tiny, "--ckpt_path", last)

    def test_a_checkpoint_that_would_run_code_is_refused(self, tiny, capsys, tmp_path):
        class Harm:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "harm"),)

        torch.save({"state_dict": {}, "loops": Harm(), "callbacks": {}}, tmp_path / "bad.ckpt")
        assert "is not a whole checkpoint" in refused(capsys, "--config", tiny, "--ckpt_path", tmp_path / "bad.ckpt")
        assert not (tmp_path / "harm").exists()
