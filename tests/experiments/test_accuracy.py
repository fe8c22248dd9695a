"""The experiment on accuracy: settings, what is trained again, what is counted together. Trains a few digits."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from experiments import accuracy, accuracy_settings, accuracy_show
from sat import cli, train
from sat.data import DATASETS
from sat.saving import SaveLast

DIGITS = ["--tasks", "digits", "--seeds", "0", "--steps", "20"]


@pytest.fixture
def started(monkeypatch, tmp_path) -> list[list[str]]:
    """The commands that were executed; in this process, which is faster, and with few digits."""
    commands = []

    def execute(command: list[str], log: Path, environment: dict[str, str]) -> int:
        assert environment == {"OMP_NUM_THREADS": "1"}
        commands.append(command)
        few = ["--data.image_size", "8", "--data.eval_samples", "40", "--model.width", "16", "--model.num_layers", "1"]
        try:
            train.main([*command[3:], *few])
        except SystemExit as stop:
            log.write_text("sat.train: what it says\n")
            return int(stop.code or 0)
        return 0

    monkeypatch.setattr(accuracy, "execute", execute)
    monkeypatch.chdir(tmp_path)
    return commands


def measure(*arguments: str) -> list[dict]:
    """Run the experiment; its results."""
    accuracy.main([*arguments, "--out", "out"])
    return json.loads(Path("out/accuracy_small.json").read_text())["runs"]


def refused(*arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        accuracy.main([*arguments, "--out", "out"])
    assert isinstance(stop.value.code, str)
    assert stop.value.code.startswith("experiments.accuracy: ")
    return stop.value.code


class TestSettings:
    @pytest.mark.parametrize("method", ["longformer", "bigbird", "lsg", "window"])
    def test_small_methods_are_as_dense_as_the_task_says(self, method):
        own = accuracy_settings.overrides("small", "cifar10", method, 1000, {})
        found = accuracy_settings.density(accuracy_settings.settings("cifar10", own, {}), 256)
        assert found == pytest.approx(0.1, rel=0.1)

    def test_density_is_the_share_of_keys_that_are_seen(self):
        """Counted from what the methods are, see their papers."""
        options = {"model.num_heads": 2, "model.block_size": 8}

        def share(name: str, length: int, **more: object) -> float | None:
            return accuracy_settings.density(options | accuracy_settings.attention_options(name, **more), length)

        window = sum(min(i + 3, 39) - max(i - 3, 0) + 1 for i in range(40))
        with_global = window + 2 * (40 - 4)  # a row and a column, 4 of each within the window
        assert share("longformer", 40, window=6, num_global_tokens=0) == round(window / 40**2, 4)
        assert share("longformer", 40, window=6) == round(with_global / 40**2, 4)
        # 5 blocks of 8: the global token, blocks beside each other, on either side up to 2 x 4 sparse tokens beyond.
        keys = [16 + 8, 24 + 8, 24 + 4 + 4, 24 + 8, 16 + 8]
        seen = sum(8 * (1 + count) for count in keys) + 41
        assert share("lsg", 40, block_size=8, sparse_block_size=8, sparsity_factor=2) == round(seen / 41**2, 4)
        assert (
            share("structure", 64, mode="local", block=16, num_sliding_window_blocks=1, attention="bidirectional")
            == 0.25
        )
        assert share("dense", 64) == share("explicit", 64) == 1
        assert share("adaptive", 64) is None

    @pytest.mark.parametrize(
        ("blocks", "density", "window"), [(32, 0.1, 3), (64, 0.05, 3), (64, 0.08, 5), (4, 0.01, 1)]
    )
    def test_the_window_nearest_to_a_density(self, blocks, density, window):
        assert accuracy_settings.window_blocks(blocks, density) == window

    def test_the_papers_baselines(self):
        for task in ("cifar10", "ag_news"):
            found = {
                m: accuracy_settings.overrides("paper", task, m, 3000, {}) for m in ("longformer", "bigbird", "lsg")
            }
            assert found["longformer"]["model.attention_options.window"] == 64
            bigbird = {"model.attention_options.block_size": 32, "model.attention_options.num_random_blocks": 3}
            assert bigbird.items() <= found["bigbird"].items()
            lsg = {"block_size": 32, "sparse_block_size": 32, "sparsity_factor": 2, "selection": "norm"}
            assert {f"model.attention_options.{key}": value for key, value in lsg.items()}.items() <= found[
                "lsg"
            ].items()

    @pytest.mark.parametrize("task", ["cifar10", "inaturalist", "ag_news", "yelp"])
    def test_the_papers_scale_changes_nothing_but_the_length(self, task):
        steps = accuracy_settings.TASKS[task].steps
        own = accuracy_settings.overrides("paper", task, "sat-paper", steps, {})
        config = accuracy_settings.flat(accuracy_settings.read_config(f"configs/{task}_paper.yaml"))
        changed = {name for name, value in own.items() if config[name] != value}
        of_length = {"trainer.max_steps", "trainer.val_check_interval", "sparsity.max_dense_steps"}
        assert of_length - {"trainer.val_check_interval"} <= changed <= of_length | {"optimizer.warmup_steps"}
        whole = accuracy_settings.overrides("paper", task, "sat-paper", config["trainer.max_steps"], {})
        assert whole["optimizer.warmup_steps"] == config["optimizer.warmup_steps"]

    @pytest.mark.parametrize("scale", ["small", "paper"])
    def test_the_training_takes_every_setting(self, scale):
        tasks = accuracy_settings.DEFAULT_TASKS[scale]
        for task, method in [("cifar10", m) for m in accuracy_settings.METHODS] + [(task, "sat") for task in tasks]:
            own = accuracy_settings.overrides(scale, task, method, 1000, {})
            run = accuracy.Run(task, method, 0, own, None, {}, None, None, 0.5)
            args, _ = cli.parse(run.command(Path("nowhere"), "run", own, None)[3:])
            assert args.model.attention == own["model.attention"]


class TestRuns:
    def test_what_is_done_is_not_done_again(self, started, capsys):
        first = measure(*DIGITS, "--methods", "dense", "sat-paper")
        assert [(run["task"], run["method"], run["seed"]) for run in first] == [
            ("digits", "dense", 0),
            ("digits", "sat-paper", 0),
        ]
        dense, paper = first
        assert (dense["density"], paper["density"]) == (1.0, 0.0938)  # int(.1 * 64) = 6 blocks
        assert paper["summary"]["transitions"][0]["step"] == 2
        digits = DATASETS["digits"](image_size=16)
        digits.prepare_data()
        digits.setup("test")
        labels = [int(label) for batch in digits.test_dataloader() for label in batch["labels"]]
        assert paper["most_frequent_class"] == round(max(map(labels.count, labels)) / len(labels), 4)
        assert all(run["summary"]["steps"] == 20 and run["summary"]["training_seconds"] > 0 for run in first)
        assert not list(Path("out/runs").rglob("*.ckpt"))
        for name in ("accuracy", "cost"):
            assert Path(f"out/plots/accuracy_small_{name}.png").read_bytes().startswith(b"\x89PNG")
        printed = capsys.readouterr().out
        assert "2 runs, 0 of them done before" in printed
        assert f"accuracy {dense['summary']['test_accuracy']['final']:.3f}" in printed
        assert measure(*DIGITS, "--methods", "dense", "sat-paper") == first
        assert len(started) == 2

    def test_other_options_are_trained_and_never_counted_together(self, started, monkeypatch, capsys):
        monkeypatch.setattr(accuracy, "execute", _instead(0.5))
        old = measure(*DIGITS, "--methods", "dense", "sat", "dense")
        assert len(old) == 2
        monkeypatch.setattr(accuracy, "execute", _instead(0.75))
        monkeypatch.setitem(accuracy_settings.SAT, "sparsity.interval", 4)
        both = measure(*DIGITS, "--methods", "dense", "sat")
        assert [run["method"] for run in both] == ["dense", "sat", "sat"]  # dense has no such setting
        rows, left_out = accuracy_show.comparable(both, ["dense", "sat"])
        assert rows == {"digits": {"dense": [old[0]], "sat": [both[2]]}}
        assert left_out == [old[1]]
        assert "or without accuracy: 1 runs (digits, sat)" in " ".join(capsys.readouterr().out.split())
        monkeypatch.setitem(accuracy_settings.SMALL, "optimizer.lr", 1e-3)
        rows, left_out = accuracy_show.comparable(measure(*DIGITS, "--methods", "dense"), ["dense", "sat"])
        assert list(rows["digits"]) == ["dense"]
        assert len(left_out) == 3
        measure(*DIGITS, "--methods", "dense", "--table", "--steps", "20")
        assert "digits: 20 steps of 32, target density 0.1" in capsys.readouterr().out

    def test_a_run_that_was_cut_off_goes_on_in_its_middle(self, started, monkeypatch):
        original = SaveLast.on_train_batch_start

        def pressed(self, trainer, *args):
            self.interrupted = trainer.global_step == 12
            original(self, trainer, *args)

        with monkeypatch.context() as patch:
            patch.setattr(SaveLast, "on_train_batch_start", pressed)
            assert "interrupted; the same command goes on" in refused(*DIGITS, "--methods", "sat", "dense")
        (last,) = Path("out/runs").rglob("last.ckpt")
        assert torch.load(last, weights_only=True)["global_step"] == 12
        seen = []
        monkeypatch.setattr(
            SaveLast, "on_train_batch_start", lambda self, trainer, *args: seen.append(trainer.global_step)
        )
        (run,) = measure(*DIGITS, "--methods", "sat")
        assert seen == list(range(12, 20))
        assert run["summary"]["steps"] == 20
        assert "--ckpt_path" not in started[0]
        assert started[1][-2:] == ["--ckpt_path", "last"]

    def test_a_killed_run_says_so(self, started, monkeypatch, capsys):
        def execute(command: list[str], log: Path, environment: dict[str, str]) -> int:
            log.write_text("step 329/1000")
            return -9

        monkeypatch.setattr(accuracy, "execute", execute)
        refused(*DIGITS, "--methods", "dense")
        assert "failed: ended by SIGKILL, which a lack of memory does, too, after: step 329/1000" in " ".join(
            capsys.readouterr().out.split()
        )

    def test_a_failed_run_does_not_stop_the_others(self, started, monkeypatch, capsys):
        good = _instead(0.5)

        def execute(command: list[str], log: Path, environment: dict[str, str]) -> int:
            if "dense" not in command:
                return good(command, log, environment)
            log.write_text("first\nout of memory\n")
            return 1

        monkeypatch.setattr(accuracy, "execute", execute)
        assert "1 of the runs failed; the same command tries them again" in refused(
            *DIGITS, "--methods", "dense", "sat"
        )
        assert "digits, dense, seed 0 failed: out of memory (out/runs" in capsys.readouterr().out
        monkeypatch.setattr(accuracy, "execute", good)
        assert [run["method"] for run in measure(*DIGITS, "--methods", "dense", "sat")] == ["sat", "dense"]

    def test_no_run_begins_after_the_minutes(self, started, capsys):
        assert "nothing has been measured yet" in refused(*DIGITS, "--minutes", "0")
        assert started == []
        assert "0 minutes are over; the same command trains the 7 that are left" in capsys.readouterr().out

    def test_prepare_trains_nothing(self, started, capsys):
        accuracy.main(["--tasks", "digits", "--prepare", "--out", "out"])
        assert started == []
        assert "prepared: digits" in capsys.readouterr().out

    def test_a_structure_from_a_file(self, started, monkeypatch):
        monkeypatch.setattr(accuracy, "execute", _instead(0.5))
        Path("mine.json").write_text(json.dumps({"sparse_attention": {"mode": "fixed", "block": 32}}))
        (run,) = [
            r for r in measure(*DIGITS, "--methods", "dense", "--structure", "mine.json") if r["method"] == "mine"
        ]
        assert run["density"] == 0.625  # 8 x 8 blocks: 2 windows of 4 x 4, and the last column of each over all rows
        assert run["options"]["model.attention_options.mode"] == "fixed"


def _instead(accuracy_found: float):
    """A training that leaves nothing but a summary."""

    def execute(command: list[str], log: Path, environment: dict[str, str]) -> int:
        folder = Path(command[command.index("--output_dir") + 1]) / "run" / "now"
        folder.mkdir(parents=True)
        attention = command[command.index("--model.attention") + 1]
        summary = {
            "attention": attention,
            "density": 0.1 if attention == "adaptive" else None,
            "test_accuracy": {"final": accuracy_found},
            "median_step_ms": {"dense": 2.0, "sparse": 1.0} if attention == "adaptive" else {attention: 2.0},
            "peak_memory_mib": {"process": 100},
            "training_seconds": 3.0,
        }
        (folder / "summary.json").write_text(json.dumps(summary))
        return 0

    return execute


def run_of(**values) -> dict:
    options = {"trainer.max_steps": 20, "data.batch_size": 32, "sparsity.density": 0.1, "model.attention": "adaptive"}
    summary = {
        "attention": "adaptive",
        "test_accuracy": {"final": values.pop("found", 0.5)},
        "median_step_ms": {"dense": 4.0, "sparse": 2.0},
        "peak_memory_mib": {"dense": 100, "sparse": 50},
        "training_seconds": 9.0,
        "transitions": [{"step": 7}],
    }
    run = {"task": "yelp", "method": "sat", "seed": 0, "density": 0.1, "options": options, "summary": summary}
    return {**run, **values}


class TestShows:
    def test_a_row_has_mean_and_deviation_and_both_phases(self):
        rows, _ = accuracy_show.comparable([run_of(found=0.4), run_of(found=0.6, seed=1)], [])
        (table,) = accuracy_show.tables(rows)
        cells = [next(iter(column.cells)) for column in table.columns]
        # The sample's standard deviation of .4 and .6 is sqrt(.02).
        assert cells == ["sat", ".100", ".500 ± .141", "2", "7", "4.0 → 2.0", "100 → 50", "9"]

    def test_phases(self):
        one = run_of()
        assert accuracy_show.phases([one], "median_step_ms") == (4.0, 2.0)
        one["summary"]["median_step_ms"] = {"dense": 3.0}
        assert accuracy_show.phases([one], "median_step_ms") == (None, 3.0)


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (
                ["--tasks", "cifar10", "--data", "nowhere"],
                "there is no folder nowhere/cifar10; correct --data or --tasks",
            ),
            (["--tasks", "inaturalist"], "no copy of iNaturalist 2018 with super-categories is known on the hub"),
            (["--tasks", "digits", "--steps", "3"], "--steps must be at least 10, got 3"),
            (["--tasks", "digits", "--seeds", "-1"], "--seeds must be at least 0, got -1"),
            (["--scale", "paper", "--prepare", "--tasks", "digits"], "the task digits is there for --scale small only"),
            (["--table"], "nothing has been measured yet"),
            (["--tasks", "digits", "--structure", "none.json"], "--structure none.json is no JSON file"),
            (["--tasks", "digits", "--structure", "empty.json"], "--structure empty.json says no mode"),
            (["--tasks", "digits", "--structure", "sat.json"], "has the name of another method, sat; rename"),
            (["--tasks", "digits", "--structure", "odd.json"], "wide"),
        ],
    )
    def test_is_refused_with_a_sentence_before_any_training(self, started, arguments, expected):
        Path("empty.json").write_text("{}")
        Path("sat.json").write_text('{"mode": "fixed"}')
        Path("odd.json").write_text('{"mode": "wide"}')
        assert expected in refused(*arguments)
        assert started == []

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_the_papers_scale_needs_a_gpu(self, started):
        assert "takes days without a GPU" in refused("--scale", "paper")

    @pytest.mark.parametrize("option", ["--tasks", "--methods"])
    def test_unknown_names(self, capsys, option):
        with pytest.raises(SystemExit) as stop:
            accuracy.main([option, "nothing"])
        assert stop.value.code == 2
        assert "invalid choice: 'nothing' (choose from" in capsys.readouterr().err

    def test_results_of_something_else(self, started):
        Path("out").mkdir()
        Path("out/accuracy_small.json").write_text('{"runs": [{"task": "digits"}]}')
        assert "accuracy_small.json holds no results of this experiment" in refused(*DIGITS)


def test_a_program_that_fails_says_its_last_line(tmp_path):
    log = tmp_path / "log.txt"
    assert accuracy.execute(["sh", "-c", "echo first; echo $OWN >&2; exit 3"], log, {"OWN": "last"}) == 3
    assert log.read_text() == "first\nlast\n"
    assert accuracy.execute(["sh", "-c", "kill -TERM $$"], log, {}) == -signal.SIGTERM
