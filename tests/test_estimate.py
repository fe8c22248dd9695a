"""``--estimate true``: what is measured, what follows from it, and that nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sat import cli, estimate, ops, train
from sat.attention import AdaptiveAttention
from sat.estimate import Estimate, Kind
from sat.module import ClassificationModule

TINY = """
data: {name: digits, image_size: 8, batch_size: 16, train_samples: 128, eval_samples: 40}
model: {num_layers: 2, width: 16, num_heads: 2, mlp_dim: 16, dropout: 0.1, block_size: 8}
optimizer: {lr: 3.0e-3, warmup_steps: 3}
sparsity: {density: 0.3, agreement: 0.9, agreement_lag: 1, interval: 5, samples: 4, max_dense_steps: 15}
trainer: {max_steps: 40, accelerator: cpu, val_check_interval: 7, check_val_every_n_epoch: null, log_every_n_steps: 5}
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "PHASE_SECONDS", 0.0)  # as few steps as can be
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def made_up_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer takes 1 s densely, a quarter of it sparsely, and 10 s more when it is observed; the first call 100 s."""
    now = [0.0]
    forward, observe = AdaptiveAttention.forward, AdaptiveAttention.observe

    def timed(self: AdaptiveAttention, *args: Any, **options: Any) -> torch.Tensor:
        now[0] += 100 if now[0] == 0 else 0.25 if self.is_sparse else 1.0
        return forward(self, *args, **options)

    def observed(self: AdaptiveAttention, *args: Any) -> None:
        now[0] += 10
        observe(self, *args)

    monkeypatch.setattr(AdaptiveAttention, "forward", timed)
    monkeypatch.setattr(AdaptiveAttention, "observe", observed)
    monkeypatch.setattr(estimate, "clock", lambda device: now[0])


def run(*arguments: object) -> dict:
    return train.main([str(a) for a in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, status: int) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == status
    error = capsys.readouterr().err.strip()
    assert error.startswith("sat.train: ")
    assert "\n" not in error
    return error


@pytest.mark.usefixtures("made_up_time")
def test_the_phases_are_told_apart_and_nothing_is_left(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tiny.parent.rglob("*"))
    found = run("--config", tiny, "--estimate", "true")
    assert sorted(tiny.parent.rglob("*")) == before
    kinds = found["kinds"]
    assert {kind: cost["milliseconds"] for kind, cost in kinds.items()} == {
        "dense": 2000,
        "dense, observed": 22000,
        "sparse": 500,
        "validation, sparse": 500,
        "validation, dense": 2000,
    }
    assert kinds["dense"]["extra_seconds"] == 99  # the first call
    assert all(cost["peak_mib"] > 100 for cost in kinds.values())
    assert (found["steps"], found["validations"], found["batches"]) == (40, 5, {"validation": 3, "test": 3})
    assert found["dense_steps"] == (10, 15)
    assert found["forced"]
    assert found["density"] == 19 / 64
    tests = found["test_seconds"]
    assert tests == (3 * 0.5, 2 * 3 * 2.0)
    checkpoints = found["saves"] * found["checkpoint_seconds"]
    training = [
        99 + dense * (2 + 20 / 5) + (40 - dense) * 0.5 + 5 * 3 * (dense * 2 + (40 - dense) * 0.5) / 40
        for dense in (10, 15)
    ]
    expected = [t + test + found["setup_seconds"] + checkpoints for t, test in zip(training, tests, strict=True)]
    assert found["total_seconds"] == pytest.approx(expected)
    printed = capsys.readouterr().out
    for text in (
        "dense, observed",
        "one step in 5 is observed",
        "40 steps, 10 of them dense",
        "in all:",
        "0.297 of the",
    ):
        assert text in printed
    assert "was made sparse" not in printed


@pytest.mark.usefixtures("made_up_time")
def test_revisions_accumulation_and_an_endless_dense_phase(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--sparsity.mask", "fisher", "--sparsity.revise_interval", 10, "--sparsity.max_dense_steps", "null"]
    found = run("--config", tiny, "--estimate", "true", *options, "--trainer.accumulate_grad_batches", 2)
    milliseconds = {kind: cost["milliseconds"] for kind, cost in found["kinds"].items()}
    assert milliseconds["dense"] == 4000
    assert milliseconds["dense, observed"] == 24000  # the first 4 samples, of the first batch
    assert milliseconds["sparse, observed"] == milliseconds["sparse"] == 1000
    assert found["dense_steps"] == (10, 40)
    assert "max_dense_steps is null" in capsys.readouterr().out


@pytest.mark.usefixtures("made_up_time")
@pytest.mark.parametrize(
    ("options", "least"),
    [
        (["--sparsity.patience", 2], 15),
        (["--sparsity.min_dense_steps", 17], 17),
        (["--sparsity.agreement", "null"], 15),  # a change is known after three observations
        (["--sparsity.agreement_lag", 9], 20),  # forced before
    ],
)
def test_the_dense_phase_lasts_until_its_rule_can_be_met(tiny: Path, options: list[object], least: int) -> None:
    found = run("--config", tiny, "--estimate", "true", "--sparsity.max_dense_steps", 20, *options)
    assert found["dense_steps"] == (least, 20)


@pytest.mark.usefixtures("made_up_time")
def test_data_that_are_prepared_for_the_first_time_do_not_count(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, times = cli.DATASETS["digits"].prepare_data, iter([1000.0])

    def slow(self: object) -> None:
        prepare(self)
        clock = train.time.perf_counter
        offset = next(times, 0.0)
        monkeypatch.setattr(train.time, "perf_counter", lambda: clock() + offset)

    monkeypatch.setattr(cli.DATASETS["digits"], "prepare_data", slow)
    found = run("--config", tiny, "--estimate", "true", "--model.attention", "dense")
    assert 0 < found["setup_seconds"] < 900


@pytest.mark.usefixtures("made_up_time")
def test_an_attention_of_one_phase(tiny: Path) -> None:
    found = run("--config", tiny, "--estimate", "true", "--model.attention", "dense")
    assert set(found["kinds"]) == {"dense", "validation, dense"}
    assert found["dense_steps"] == (0, 0)
    least, most = found["total_seconds"]
    assert least - found["setup_seconds"] == pytest.approx(
        99 + 40 * 2 + 5 * 3 * 2 + 3 * 2 + found["saves"] * found["checkpoint_seconds"]
    )
    assert most - least == pytest.approx(3 * 2)  # the second test


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.max_steps", 20],
        ["--trainer.max_steps", 12, "--trainer.accumulate_grad_batches", 3, "--trainer.limit_val_batches", 2],
        ["--trainer.max_steps", -1, "--trainer.max_epochs", 3, "--trainer.val_check_interval", 0.5,
         "--trainer.check_val_every_n_epoch", 1, "--trainer.limit_train_batches", 6],
        ["--trainer.max_steps", 10, "--trainer.val_check_interval", 2, "--trainer.check_val_every_n_epoch", 1,
         "--trainer.limit_train_batches", 6],
    ],
)  # fmt: skip
def test_steps_and_validations_are_those_of_the_run(
    tiny: Path, options: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--config", tiny, "--model.attention", "dense", "--data.eval_batch_size", 3, *options]
    found = run(*options, "--estimate", "true")
    batches, validations = [], []
    step, end = ClassificationModule.validation_step, ClassificationModule.on_validation_epoch_end
    monkeypatch.setattr(ClassificationModule, "validation_step", lambda *a: batches.append(1) or step(*a))
    monkeypatch.setattr(
        ClassificationModule, "on_validation_epoch_end", lambda self: validations.append(1) or end(self)
    )
    summary = run(*options, "--trainer.num_sanity_val_steps", 0)
    assert found["steps"] == summary["steps"]
    assert found["validations"] == len(validations)
    assert found["validations"] * found["batches"]["validation"] == len(batches)


def test_of_a_phase_that_does_not_fit(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ops, "block_sparse_attention", full)
    message = refused(capsys, "--config", tiny, "--estimate", "true", status=1)
    assert "sparse training does not fit into the memory of" in message
    assert "with batches of 16; what needs less: --model.activation_checkpointing true" in message
    assert "--data.batch_size 8 with --trainer.accumulate_grad_batches 2" in message
    monkeypatch.setattr(ClassificationModule, "validation_step", full)
    message = refused(
        capsys,
        "--config",
        tiny,
        "--estimate",
        "true",
        "--model.attention",
        "dense",
        "--data.eval_batch_size",
        4,
        status=1,
    )
    assert "dense validation does not fit" in message
    assert message.endswith("with batches of 4; what needs less: --data.eval_batch_size 2")
    assert not Path("runs").exists()


def test_a_guard_is_no_hindrance(tiny: Path) -> None:
    estimated = ["--config", tiny, "--estimate", "true"]
    assert run(*estimated, "--sparsity.guard", 0.1)["kinds"].keys() == run(*estimated)["kinds"].keys()


def test_other_errors_stay_what_they_are(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> torch.Tensor:
        raise RuntimeError("something else")

    monkeypatch.setattr(ops, "block_sparse_attention", broken)
    with pytest.raises(RuntimeError, match="something else"):
        run("--config", tiny, "--estimate", "true")


def test_bad_input(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    estimated = ["--config", tiny, "--estimate", "true"]
    assert "leave --ckpt_path last out" in refused(capsys, *estimated, "--ckpt_path", "last", status=2)
    message = refused(capsys, *estimated, "--trainer.devices", 2, status=2)
    assert "this run has 2; give --trainer.devices 1" in message
    message = refused(capsys, *estimated, "--trainer.max_time", "00:00:10:00", status=2)
    assert "trainer.max_time=00:00:10:00 may end it before; leave max_time away" in message
    assert not Path("runs").exists()


def test_the_ends_of_the_range() -> None:
    kinds = {"dense": Kind(30.0, 0.0, 1.0, 2), "sparse": Kind(10.0, 0.0, 1.0, 2)}
    found = Estimate(kinds, 1000, (100, 600), True, 10, 0.1, 0, {"validation": 0, "test": 0}, 0, 0.0, 5.0)
    assert found.total_seconds() == pytest.approx((5 + 3 + 9, 5 + 18 + 4))
    assert estimate.duration(100) == "100.0 s"
    assert estimate.duration(600) == "10.0 min"
    assert estimate.duration(7300) == "2.0 h"
    assert estimate.duration(7 * 86400) == "7.0 days"
