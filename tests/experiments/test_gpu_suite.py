import json
import math
import sys
from pathlib import Path

import pytest
import torch

from experiments.gpu_suite import (
    arithmetic,
    attention,
    clock,
    competitors,
    correct,
    layouts,
    operations,
    suite,
    tune,
    worker,
)
from experiments.gpu_suite.__main__ import main
from experiments.gpu_suite.case import Case, Section, Setting, number, text_table
from experiments.gpu_suite.sections import SECTIONS
from experiments.gpu_suite.subprocesses import run_limited
from sat.layout import BlockLayout
from tests.experiments import processes
from tests.ops import oracle


@pytest.mark.parametrize("density", [0.02, 0.05, 0.25, 0.8, 1.0])
@pytest.mark.parametrize("blocks", [1, 8, 64])
def test_learned_like_layouts_reach_their_density(blocks, density):
    layout = layouts.learned_like(blocks, density, 3, 16, "cpu")
    kept = max(blocks, round(blocks * blocks * density))
    assert layout.mask.sum((1, 2)).tolist() == [kept] * 3
    assert layout.mask.diagonal(dim1=1, dim2=2).all()
    assert layout == layouts.learned_like(blocks, density, 3, 16, "cpu")


def test_learned_like_layouts_have_verticals_and_differ_between_heads_and_seeds():
    layout = layouts.learned_like(64, 0.1, 2, 16, "cpu")
    assert (layout.mask.sum(1).max(1).values > 30).all()
    assert not torch.equal(layout.mask[0], layout.mask[1])
    assert layout != layouts.learned_like(64, 0.1, 2, 16, "cpu", seed=1)
    assert layouts.learned_like(64, 0, 2, 16, "cpu", per_row=5).nnz == 2 * 64 * 5


def test_uneven_layouts_have_what_they_are_for():
    layout = layouts.uneven(8, 2, 16, "cpu", empty=True, heavy=True)
    assert layout.mask[:, 0, :7].all()
    assert not layout.mask[:, 1].any()
    assert not layout.mask[:, :, 7].any()


def test_operations_are_those_of_dense_attention_at_density_1():
    batch, heads, length, head_dim, size = 3, 2, 64, 8, 16
    blocks = heads * (length // size) ** 2
    products = 2 * (2 * batch * heads * length * length * head_dim)  # two products, multiply and add
    assert arithmetic.forward_operations(blocks, size, head_dim, batch) == products


def test_floor_is_the_slower_of_arithmetic_and_memory():
    assert arithmetic.floor_ms(2e12, 1e9, tflops=1.0, terabytes=1.0) == pytest.approx(2000)
    assert arithmetic.floor_ms(1e9, 2e12, tflops=1.0, terabytes=1.0) == pytest.approx(2000)
    tensor = 3 * 2 * 64 * 8 * 2
    assert arithmetic.least_bytes(64, 2, 8, 3, 2, backward=False) == 4 * tensor
    assert arithmetic.least_bytes(64, 2, 8, 3, 2, backward=True) == 8 * tensor


def test_break_even_is_interpolated():
    densities, dense = [0.1, 0.2, 0.4], [5.0, 5.0, 5.0]
    assert arithmetic.break_even(densities, [1.0, 3.0, 7.0], dense) == pytest.approx(0.3)
    assert arithmetic.break_even(densities, [1.0, 2.0, 5.0], dense) is None
    assert arithmetic.break_even(densities, [6.0, 7.0, 8.0], dense) is None


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_budget_is_shared_by_weight_and_what_is_left_over_goes_on():
    clock = Clock()
    budget = suite.Budget(100, {"a": 1, "b": 1, "c": 2}, clock)
    case = Case("case", lambda seconds: {}, seconds=10)
    budget.enter("a")
    assert budget.left() == 25
    clock.now += 16
    assert not budget.allows(case)
    assert budget.elapsed() == 16
    budget.enter("b")
    assert budget.left() == pytest.approx(84 / 3)
    clock.now += 60  # longer than it was given
    budget.enter("c")
    assert budget.left() == pytest.approx(24)
    assert budget.limit(case) == pytest.approx(24 + suite.GRACE)
    clock.now += 100
    assert not budget.allows(case)
    assert budget.limit(case) == 1


class FakeWorker:
    def __init__(self, replies):
        self.replies, self.asked = replies, []

    def run(self, section, case, seconds, limit):
        self.asked.append(case)
        assert seconds < limit
        return self.replies.get(case, {"status": "ok", "line": "done"})

    def stop(self, *, kill):
        pass


def make_section(name, *cases):
    return Section(
        name, 1, lambda setting: list(cases), lambda records: text_table(name, ["case"], [[r["case"]] for r in records])
    )


def test_suite_lists_what_failed_and_what_did_not_fit(tmp_path, monkeypatch, capsys):
    quick, broken = (Case(name, lambda seconds: {}, seconds=1) for name in ("quick", "broken"))
    slow = Case("slow", lambda seconds: {}, seconds=1000)
    fake = FakeWorker({"broken": {"status": "failed", "error": "ValueError: no"}})
    monkeypatch.setattr(suite, "Worker", lambda setting: fake)
    run = suite.Suite(
        [make_section("correct", slow, broken, quick)], Setting(tmp_path, smoke=True), 1, "command", "abc"
    )
    run.run()
    assert fake.asked == ["broken", "quick"]
    assert run.failed("correct")
    saved = json.loads((tmp_path / "gpu_smoke_correct.json").read_text())
    assert saved["counts"] == {"ok": 1, "failed": 1, "not run": 1}
    assert saved["commit"] == "abc"
    assert [r["status"] for r in saved["cases"]] == ["not run", "failed", "ok"]
    closing = run.closing()
    assert "FAILED broken: ValueError: no" in closing
    assert "not run: slow" in closing
    assert "broken: failed: ValueError: no" in capsys.readouterr().out


def test_a_suite_goes_on_where_another_ended(tmp_path, monkeypatch):
    cases = [Case(name, lambda seconds: {}, seconds=1) for name in ("done", "broken", "waiting")]
    old = {"correct": {"commit": "old", "cases": [{"case": "done", "status": "ok", "line": "x"}]}}
    old["correct"]["cases"].append({"case": "broken", "status": "failed", "error": "no"})
    (tmp_path / "gpu_smoke_correct.json").write_text(json.dumps(old["correct"]))
    fake = FakeWorker({})
    monkeypatch.setattr(suite, "Worker", lambda setting: fake)
    out = Setting(tmp_path / "out", smoke=True)
    run = suite.Suite([make_section("correct", *cases)], out, 1, "command", "new", resume=tmp_path)
    run.run()
    assert fake.asked == ["broken", "waiting"]
    saved = json.loads((tmp_path / "out" / "gpu_smoke_correct.json").read_text())
    assert saved["counts"] == {"ok": 3, "failed": 0, "not run": 0}
    assert saved["cases"][0] == {"commit": "old", "case": "done", "status": "ok", "line": "x"}
    (tmp_path / "gpu_smoke_correct.json").write_text("{")
    with pytest.raises(ValueError, match=r"gpu_smoke_correct\.json holds no results of this suite"):
        suite.Suite([make_section("correct", *cases)], out, 1, "command", "new", resume=tmp_path)
    with pytest.raises(SystemExit):
        main(["--smoke", "--out", str(tmp_path), "--resume", str(tmp_path / "none")])


@pytest.mark.parametrize(
    ("code", "wrote", "line"),
    [(0, True, "done"), (3, True, "as far as the time went"), (None, True, "as far as the time went"), (1, False, "")],
)
def test_what_the_tuner_finds_is_in_the_record_also_where_its_time_is_up(monkeypatch, code, wrote, line):
    def limited(command, seconds, environment):
        assert float(command[command.index("--minutes") + 1]) * 60 < seconds
        if wrote:
            Path(environment["SAT_TUNING"]).write_text(json.dumps({"H200": {"attention": [64, 64, 4, 2]}}))
        return code, "attention: 2 -> 1 ms"

    monkeypatch.setattr(tune, "run_limited", limited)
    if not wrote:
        with pytest.raises(RuntimeError, match="ended by code 1 with 0 GPUs tuned: attention: 2 -> 1 ms"):
            tune.tune(300)
        return
    found = tune.tune(300)
    assert found == {"output": "attention: 2 -> 1 ms", "kept": {"H200": {"attention": [64, 64, 4, 2]}}, "line": line}


def test_a_device_that_the_sanitizer_does_not_know_is_no_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(correct.shutil, "which", lambda name: name)
    monkeypatch.setattr(correct, "run_limited", lambda *_: (255, "Error: Device not supported. Please refer to"))
    assert correct.run_sanitizer(Setting(tmp_path), 100)["status"] == "not run"
    monkeypatch.setattr(correct, "run_limited", lambda *_: (9, "ERROR SUMMARY: 1 error"))
    with pytest.raises(AssertionError, match="ERROR SUMMARY: 1 error"):
        correct.run_sanitizer(Setting(tmp_path), 100)


def test_closing_tables_fit_into_the_end_of_a_log(tmp_path, monkeypatch):
    cases = [Case(f"case {i} {'x' * 40}", lambda seconds: {}, seconds=0) for i in range(600)]
    monkeypatch.setattr(suite, "Worker", lambda setting: FakeWorker({}))
    sections = [make_section("correct", *cases), make_section("attention", *cases[:5])]
    run = suite.Suite(sections, Setting(tmp_path, smoke=True), 1, "command", "")
    monkeypatch.setattr(run, "save", lambda section: None)
    run.run()
    closing = run.closing()
    assert 5000 < len(closing) < 12_000
    assert "more rows, in the results" in closing
    assert closing.endswith("attention: 5 ok, 0 failed, 0 not run")


def test_a_case_that_ends_its_process_or_hangs_costs_only_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "serve", processes.serve)
    handle = worker.Worker(Setting(tmp_path, smoke=True))
    try:
        assert handle.run("any", "works", 1, 60) == {"status": "ok"}
        assert "ended by code 3" in handle.run("any", "exits", 1, 60)["error"]
        assert "did not end within 1 s" in handle.run("any", "hangs", 1, 1)["error"]
        assert handle.run("any", "breaks", 1, 60) == {"status": "failed"}
        assert handle.run("any", "works", 1, 60) == {"status": "ok"}
    finally:
        handle.stop(kill=True)


def test_other_programs_end_in_time_with_what_they_started():
    code, output = run_limited([sys.executable, "-c", "print('out'); raise SystemExit(4)"], 60)
    assert (code, output.strip()) == (4, "out")
    assert run_limited(["sh", "-c", "echo begun; sleep 60 & wait"], 0.5) == (None, "begun\n")


def test_measure_calls_in_turn_and_errors_are_kept():
    called = []

    def fail():
        raise ValueError("not  for\nme")

    found, times = clock.figures(
        {"a": lambda: called.append("a"), "b": lambda: called.append("b"), "c": fail}, "cpu", 3
    )
    assert found["c"] == {"error": "ValueError: not for me"}
    assert set(found["a"]["ms"]) == {"min", "median", "max"}
    assert len(times["a"].wall) == 3
    assert clock.faster({"x": clock.Times([4, 6], [1, 1]), "y": clock.Times([2, 2], [1, 1])}, "x", "y") == 2.5
    assert clock.faster(times, "a", "c") is None


def test_numbers_have_so_many_digits():
    assert [number(x) for x in (None, 0.01234, 1.234, 12.34, 1234.5)] == ["-", "0.0123", "1.23", "12.3", "1234"]
    assert number(math.pi, 1) == "3"


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("density", [0.05, 0.9])
def test_coarse_mask_is_the_same_function(heads, density):
    layout = BlockLayout(torch.rand(heads, 16, 16) < density, 16)
    mask = competitors.coarse_block_mask(layout, 256)
    assert mask.BLOCK_SIZE == (128, 128)
    query, key = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    declared_full = torch.zeros(heads, 2, 2, dtype=torch.bool)
    declared = torch.zeros(heads, 2, 2, dtype=torch.bool)
    for head in range(heads):
        for row in range(2):
            full = mask.full_kv_indices[0, head, row, : mask.full_kv_num_blocks[0, head, row]]
            partial = mask.kv_indices[0, head, row, : mask.kv_num_blocks[0, head, row]]
            declared_full[head, row, full.long()] = True
            declared[head, row, torch.cat([full, partial]).long()] = True
    for head in range(3):
        inside = mask.mask_mod(torch.tensor(0), torch.tensor(head % 3), query, key)
        own = head if heads > 1 else 0
        large = torch.kron(declared[own], torch.ones(128, 128)).bool()
        full = torch.kron(declared_full[own], torch.ones(128, 128)).bool()
        assert torch.equal(full | (large & inside), layout.element_mask(256, 256)[own])


@pytest.mark.parametrize("pruned", ["drop", "zero"])
def test_dense_check_agrees_with_the_oracle(pruned):
    shape, length = (2, 3, 50, 8), 50
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    tensors.append(torch.randn(3, length, length, dtype=torch.float64, requires_grad=True))
    grad = torch.randn(shape, dtype=torch.float64)
    layout = layouts.uneven(4, 3, 16, "cpu", empty=True, heavy=True)
    real = torch.arange(length) < torch.tensor([[50], [31]])
    allowed = real[:, None, :].expand(-1, length, -1).tril()
    found = correct.dense(tensors, grad, layouts.element_mask(layout, length), allowed, real, pruned, torch.float64)
    out = oracle.attention(
        *tensors[:3],
        layout,
        attn_bias=tensors[3],
        key_padding_mask=real,
        query_padding_mask=real,
        is_causal=True,
        pruned=pruned,
    )
    torch.testing.assert_close(found, [out, *torch.autograd.grad(out, tensors, grad)])


def test_wrong_results_are_refused():
    exact = [torch.ones(10, dtype=torch.float64)]
    close = [torch.full((10,), 1 + 1e-7)]
    found = correct.compare(["output"], close, exact, close)
    assert found["errors"]["output"]["relative_error"] < 1e-6
    assert "status" not in found
    for wrong in (1.001, math.nan):
        found = correct.compare(["output"], [torch.full((10,), wrong)], exact, close)
        assert found["status"] == "failed"
        assert found["error"].startswith("output: error")


def test_outcomes_are_counted_in_both_forms_of_output():
    output = (
        "tests/a.py::test_x[1-a b] PASSED   [ 50%]\n"
        "tests/a.py::test_y FAILED          [100%]\n"
        "[gw1] [  5%] PASSED tests/a.py::test_z \n"
        "[gw0] [ 15%] SKIPPED tests/a.py::test_w \n"
        "FAILED tests/a.py::test_y - assert\n"
    )
    assert correct.count_outcomes(output) == {"PASSED": 2, "FAILED": 1, "ERROR": 0, "SKIPPED": 1}


@pytest.mark.parametrize("smoke", [True, False])
def test_cases_have_names_of_their_own_and_most_important_shapes_come_first(smoke, tmp_path):
    setting = Setting(tmp_path, smoke)
    for section in SECTIONS.values():
        names = [case.name for case in section.cases(setting)]
        assert len(set(names)) == len(names) > 0
    plan = attention.plan(setting)
    assert len({shape for shape, _ in plan}) == len(plan)
    assert all(shape.length % shape.block_size == 0 for shape, _ in plan)


def test_tasks_are_the_papers():
    assert [task.density for task in operations.TASKS] == [0.05, 0.08, 0.04, 0.021]


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--smoke"])


def test_smoke_run_goes_through_every_section(tmp_path, capsys):
    code = main(["--smoke", "--minutes", "20", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert code == 0, printed
    for name in ("correct", "attention", "operations", "training", "long"):
        saved = json.loads((tmp_path / f"gpu_smoke_{name}.json").read_text())
        assert saved["smoke"] is True
        assert saved["counts"]["failed"] == 0, printed
        assert f"{name}: {saved['counts']['ok']} ok, 0 failed" in printed
        assert saved["counts"]["not run"] == (name == "correct")
    assert "not run: compute-sanitizer" in printed
