"""Every method by its name: in the encoder, by its options, and in a whole run of the trainer."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sat import patterns, train
from sat.baselines import (
    METHODS,
    BigBirdAttention,
    ExplicitAttention,
    FlexAttention,
    LongformerAttention,
    LSGAttention,
    StructureAttention,
    make_baseline,
)
from sat.baselines.flex import visited_blocks
from sat.layout import BlockLayout
from sat.models import SequenceClassifier
from tests.ops import oracle
from tests.test_train import TINY, interrupt_at

OPTIONS = {
    "explicit": {},
    "structure": {"mode": "fixed", "block": 8, "num_local_blocks": 2},
    "longformer": {"window": 8, "num_global_tokens": 2},
    "bigbird": {"block_size": 4, "num_random_blocks": 1},
    "lsg": {"block_size": 8, "sparse_block_size": 8, "num_global_tokens": 2},
}
METHOD = pytest.mark.parametrize("method", list(OPTIONS))


def make_model(method: str, **options: object) -> SequenceClassifier:
    torch.manual_seed(0)
    return SequenceClassifier(
        20,
        60,
        4,
        width=16,
        num_heads=2,
        mlp_dim=16,
        dropout=0.0,
        block_size=8,
        attention=method,
        attention_options=OPTIONS[method] | options,
    )


def make_batch() -> tuple[Tensor, Tensor]:
    mask = torch.arange(60) < torch.tensor([60, 37, 9])[:, None]
    return torch.randint(1, 20, (3, 60)) * mask, mask


@METHOD
def test_padding_changes_nothing_and_every_parameter_learns(method):
    model, (ids, mask) = make_model(method), make_batch()
    logits = model(ids, mask)
    assert torch.equal(logits, model(ids.masked_fill(~mask, 7), mask))
    logits.square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


@METHOD
def test_sequences_of_every_length(method):
    model = make_model(method).double().eval()
    for length in (1, 7, 33, 60):
        ids = torch.randint(1, 20, (2, length))
        exact = model(ids, torch.ones(2, length, dtype=torch.bool))
        torch.testing.assert_close(model(ids), exact)


@METHOD
def test_bfloat16_under_autocast(method):
    model, (ids, mask) = make_model(method), make_batch()
    exact = model(ids, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids, mask)
    logits.sum().backward()
    assert (logits.float() - exact).abs().max() < 0.05 * exact.abs().max() + 0.02


@METHOD
def test_compiles_into_one_graph(method):
    model, (ids, mask) = make_model(method), make_batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, mask), model(ids, mask))


@METHOD
def test_a_copy_computes_the_same(method):
    model, (ids, mask) = make_model(method), make_batch()
    expected = model(ids, mask)
    other = make_model(method)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids, mask), expected)


def random_heads(length: int, batch: int = 2) -> list[Tensor]:
    return [torch.randn(batch, 2, length, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def test_explicit_is_dense_attention():
    query, key, value = random_heads(21)
    keep, keep_queries = torch.rand(2, 21) < 0.7, torch.rand(2, 21) < 0.7
    keep[1] = False
    layout = BlockLayout(torch.ones(1, 3, 3, dtype=torch.bool), 8)
    options = {"key_padding_mask": keep, "query_padding_mask": keep_queries}
    upstream = torch.randn(2, 2, 21, 8, dtype=torch.float64)
    results = []
    for out in (
        ExplicitAttention(2, 21)(query, key, value, **options),
        oracle.attention(query, key, value, layout, **options),
    ):
        results.append([out, *torch.autograd.grad(out, (query, key, value), upstream)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_explicit_does_not_overflow_in_half_precision():
    query = torch.full((1, 1, 4, 64), 40.0, dtype=torch.float16)  # its products sum to 102,400
    assert ExplicitAttention(1, 4)(query, query, query).isfinite().all()


def test_explicit_drops_weights_in_training():
    attention = ExplicitAttention(2, 400, dropout=0.25)
    query, key, _ = random_heads(400)
    value = torch.ones(2, 2, 400, 1, dtype=torch.float64).expand(-1, -1, -1, 8)
    sums = attention(query, key, value)[..., 0]  # of the weights that are left, which are larger by a third
    assert sums.std() > 0.01
    assert sums.mean().item() == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(attention.eval()(query, key, value), value)


@pytest.mark.parametrize("make", [ExplicitAttention, lambda *sizes: FlexAttention(*sizes, patterns.BigBird(2, 8))])
def test_what_does_not_fit_is_refused(make):
    attention = make(2, 60)
    query = torch.randn(2, 2, 60, 8)
    wrong: list[tuple[tuple[Tensor, ...], dict[str, Tensor], str]] = [
        ((query[:, :1],) * 3, {}, "made for 2 heads.*got 1"),
        ((query, query.double(), query), {}, "query is torch.float32 but key is torch.float64"),
        (
            (query,) * 3,
            {"key_padding_mask": torch.ones(2, 70, dtype=torch.bool)},
            r"the shape \[2, 60\], got \[2, 70\]",
        ),
        ((query,) * 3, {"key_padding_mask": torch.ones(2, 60).int()}, "key_padding_mask must be a bool tensor"),
        ((query,) * 3, {"query_padding_mask": torch.ones(1, 60).bool()}, r"query_padding_mask must have the shape"),
    ]
    for tensors, masks, message in wrong:
        with pytest.raises((TypeError, ValueError), match=message):
            attention(*tensors, **masks)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExplicitAttention(2, 60, dropout=1.5), "dropout"),
        (lambda: BigBirdAttention(2, 60, seed=1.5), "seed must be an integer, got 1.5"),
    ],
)
def test_what_cannot_be_made_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize("structure", [patterns.Fixed(2, 8, attention="unidirectional"), patterns.BigBird(2, 8)])
def test_structure_computes_its_blocks(structure):
    attention = StructureAttention(2, 60, structure)
    for length in (60, 21):
        inputs, keep = random_heads(length), torch.rand(2, length) < 0.7
        expected = oracle.attention(
            *inputs, structure.layout(length), key_padding_mask=keep, is_causal=structure.is_causal
        )
        torch.testing.assert_close(attention(*inputs, key_padding_mask=keep), expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("size", [8, 48, 200])
@pytest.mark.parametrize("causal", [False, True])
def test_flex_computes_the_same_blocks(size, causal):
    """Uncompiled, which is all that a CPU can do without a backward pass."""

    class Random:
        is_causal = causal

        def layout(self, seq_len: int) -> BlockLayout:
            blocks = -(-seq_len // size)
            mask = torch.rand(2, blocks, blocks, generator=torch.Generator().manual_seed(1)) < 0.3
            return BlockLayout(mask | torch.eye(blocks, dtype=torch.bool), size)

    query, key, value = (torch.randn(2, 2, 300, 16) for _ in range(3))
    keep = torch.rand(2, 300) < 0.8
    keep[:, :size] = True
    for masks in ({}, {"key_padding_mask": keep, "query_padding_mask": keep}):
        ours = FlexAttention(2, 300, Random())(query, key, value, **masks)
        expected = StructureAttention(2, 300, Random())(query, key, value, **masks)
        torch.testing.assert_close(ours, expected)
    # Uncompiled, FlexAttention reads the mask function only; compiled, the lists of blocks of 128.
    layout = Random().layout(300)
    visited = F.max_pool2d(F.pad(layout.element_mask(300, 300).float(), (0, 84, 0, 84)), 128).bool()
    counts, columns = visited_blocks(layout, 300)
    for head, row in itertools.product(range(2), range(3)):
        listed = columns[0, head, row, : counts[0, head, row]]
        assert listed.tolist() == visited[head, row].nonzero()[:, 0].tolist()


def test_each_layer_draws_random_blocks_of_its_own():
    first, second = (make_baseline("bigbird", 2, 600, block_size=32, layer=i).layout for i in (0, 1))
    assert first != second
    assert make_baseline("bigbird", 2, 600, block_size=32, layer=1).layout == second


def test_random_blocks_of_a_structure_have_a_seed_and_differ_between_layers(tmp_path):
    config = tmp_path / "ds_config.json"
    config.write_text(json.dumps({"mode": "bigbird", "block": 32, "num_random_blocks": 2}))
    for options in ({"mode": "bigbird", "num_random_blocks": 2}, {"deepspeed": str(config)}):
        made = [
            make_baseline("structure", 2, 1024, block_size=32, layer=layer, options=options | seed).layout
            for layer, seed in ((0, {}), (1, {}), (0, {"seed": 1}), (0, {"seed": 2}))
        ]
        assert made[1] == made[2] == patterns.BigBird(2, 32, num_random_blocks=2, seed=1).layout(1024).shared()
        assert made[0] != made[1] != made[3]


def test_a_structure_from_files(tmp_path):
    config = tmp_path / "ds_config.json"
    config.write_text(json.dumps({"train_batch_size": 8, "sparse_attention": {"mode": "bslongformer", "block": 4}}))
    attention = make_baseline("structure", 2, 40, block_size=8, options={"deepspeed": str(config)})
    assert attention.layout == patterns.Longformer(2, 4).layout(40).shared()
    attention.layout.save(tmp_path / "layout.safetensors")
    again = make_baseline("structure", 2, 40, block_size=8, options={"layout": str(tmp_path / "layout.safetensors")})
    assert again.layout == attention.layout
    with pytest.raises(ValueError, match="10 x 10 blocks of 4, which do not fit 50 tokens"):
        make_baseline("structure", 2, 50, block_size=8, options={"layout": str(tmp_path / "layout.safetensors")})
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is not a JSON file"):
        make_baseline("structure", 2, 40, block_size=8, options={"deepspeed": str(tmp_path / "broken.json")})
    with pytest.raises(ValueError, match="cannot read the DeepSpeed configuration"):
        make_baseline("structure", 2, 40, block_size=8, options={"deepspeed": str(tmp_path / "none.json")})
    for content in ({}, {"train_batch_size": 8}, []):
        (tmp_path / "none.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"none.json has no section sparse_attention"):
            make_baseline("structure", 2, 40, block_size=8, options={"deepspeed": str(tmp_path / "none.json")})
    with pytest.raises(ValueError, match="says it all; leave out mode"):
        make_baseline("structure", 2, 40, block_size=8, options={"deepspeed": str(config), "mode": "fixed"})


def test_a_saved_layout_of_causal_attention_is_asked_what_it_is(tmp_path):
    causal = make_baseline(
        "structure", 2, 40, block_size=8, options={"mode": "local_sliding_window", "attention": "unidirectional"}
    )
    path = str(tmp_path / "layout.safetensors")
    causal.layout.save(path)
    with pytest.raises(ValueError, match=r"has no block above the diagonal, .*set model\.attention_options\.attention"):
        make_baseline("structure", 2, 40, block_size=8, options={"layout": path})
    inputs = torch.randn(3, 1, 2, 40, 8).unbind(0)
    for attention in ("unidirectional", "bidirectional"):
        again = make_baseline("structure", 2, 40, block_size=8, options={"layout": path, "attention": attention})
        assert torch.equal(again(*inputs), causal(*inputs)) == (attention == "unidirectional")
    with pytest.raises(ValueError, match="attention must be bidirectional or unidirectional, got 'both'"):
        make_baseline("structure", 2, 40, block_size=8, options={"layout": path, "attention": "both"})


def test_each_layer_of_longformer_may_have_a_window_of_its_own():
    model = SequenceClassifier(
        8, 64, 2, num_layers=2, width=8, num_heads=2, mlp_dim=8, block_size=8, attention="longformer",
        attention_options={"window": [4, 16]},
    )  # fmt: skip
    assert [layer.attention.window for layer in model.encoder.layers] == [4, 16]


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (patterns.Fixed, "got Fixed itself; make one of it"),
        ("fixed", "got str"),
        (patterns.Fixed(2).layout(64), "got BlockLayout, which is for one length; sat.ops.block_sparse_attention"),
    ],
)
def test_what_gives_no_layouts_is_refused(structure, message):
    with pytest.raises(TypeError, match=message):
        StructureAttention(2, 64, structure)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (LongformerAttention, {"window": 16.0}),
        (LongformerAttention, {"dilation": 2.0}),
        (BigBirdAttention, {"block_size": 8.0}),
        (BigBirdAttention, {"num_random_blocks": 1.0}),
        (LSGAttention, {"block_size": 8.0}),
        (LSGAttention, {"sparsity_factor": 2.0}),
    ],
)
def test_sizes_are_integers(method, options):
    ((name, value),) = options.items()
    with pytest.raises((TypeError, ValueError), match=f"{name} must be an? .*{value}"):
        method(2, 64, **options)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("explicit", {"window": 3}, "explicit has no option 'window'; it has none"),
        ("longformer", {"windw": 3}, "longformer has no option 'windw'; it has window, dilation, num_global_tokens"),
        ("longformer", {"window": "wide"}, "window of longformer must be a number like 64, got 'wide'"),
        ("longformer", {"window": True}, "window of longformer must be a number like 64, got True"),
        ("longformer", {"window": 3}, "window must be even"),
        ("longformer", {"dilation": [1, 2, 3]}, "dilation must be"),
        ("longformer", {"window": ["64"]}, "window of longformer must be a number like 64, got '64'"),
        ("longformer", {"window": [64, 32]}, "window of longformer is a list of 2, but there are 1 layers; give"),
        ("bigbird", {"seed": [1]}, "seed of bigbird must be a number like 0, got [1]"),
        ("structure", {"seed": -1}, "seed of structure must be a whole number of at least 0, got -1"),
        ("lsg", {"selection": 3}, "selection of lsg must be a word like 'norm', got 3"),
        ("lsg", {"selection": "best"}, "selection"),
        ("bigbird", {"num_random_blocks": -1}, "num_random_blocks must be at least 0"),
        ("structure", {"mode": "fixd"}, "fixd"),
        ("structure", {"mode": "fixed", "num_local_block": 2}, "num_local_block"),
        ("structure", {"layout": 3}, "layout of structure is the path of a file, got 3"),
        ("sparse", {}, "unknown method 'sparse'; there are explicit, longformer"),
    ],
)
def test_bad_options(method, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_baseline(method, 2, 64, block_size=8, options=options)


def test_flex_wants_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match=r"trains on a GPU only; model\.attention=structure computes the same"):
        make_baseline("flex", 2, 64, block_size=8)


def test_every_method_is_one_of_the_models():
    for method in METHODS:
        if method != "flex":
            SequenceClassifier(20, 64, 4, attention=method)
    with pytest.raises(ValueError, match="attention must be one of adaptive, spion, dense"):
        SequenceClassifier(20, 64, 4, attention="sparse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dense attention has no options"):
        SequenceClassifier(20, 64, 4, attention="dense", attention_options={"window": 3})


# Whole runs


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def arguments(method: str) -> list[str]:
    given = [("--model.attention_options." + key, str(value)) for key, value in OPTIONS.get(method, {}).items()]
    return ["--model.attention", method, *(word for pair in given for word in pair)]


@pytest.mark.parametrize("method", [*OPTIONS, "spion"])
def test_trains_by_a_one_line_override_and_resumes_bit_for_bit(tiny, monkeypatch, capsys, method):
    command = ["--config", str(tiny), "--trainer.max_steps", "12", "--trainer.val_check_interval", "2"]
    command += arguments(method)
    summary = train.main([*command, "--name", "whole"])
    assert summary["attention"] == method
    assert set(summary["median_step_ms"]) == ({"dense", "sparse"} if method == "spion" else {method})
    assert "process" in summary["peak_memory_mib"]
    assert (summary["density"] is not None) == (method in ("structure", "bigbird", "spion"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        with pytest.raises(SystemExit):
            train.main(command)
    train.main([*command, "--ckpt_path", "last"])
    states = []
    for name in ("whole", "tiny"):
        (folder,) = Path("runs", name).iterdir()
        states.append(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
        assert (folder / "layouts.png").is_file() == (method in ("structure", "bigbird", "spion"))
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("method", ["structure", "longformer", "lsg", "spion"])
def test_trains_in_bfloat16(tiny, method):
    summary = train.main(
        ["--config", str(tiny), "--trainer.max_steps", "4", "--trainer.precision", "bf16-mixed", *arguments(method)]
    )
    assert summary["steps"] == 4


def test_spion_switches_by_its_own_rules(tiny, capsys):
    command = ["--config", str(tiny), "--model.attention", "spion", "--trainer.val_check_interval", "2"]
    summary = train.main([*command, "--model.attention_options.change", "1e6"])
    assert [t["step"] for t in summary["transitions"]] == [6, 6]  # at the third evaluation
    summary = train.main([*command, "--model.attention_options.change", "1e-6"])
    assert "distance still changes" in summary["not_switched"]["0"]
    # A bound that is meant for SAT is put off, for ten evaluations or half of the steps.
    summary = train.main([*command, "--model.attention_options.change", "1e-6", "--sparsity.max_dense_steps", "1"])
    steps = summary["steps"]
    assert [t["step"] for t in summary["transitions"]] == [min(20, steps // 2)] * 2
    # SAT's own settings of the criterion stay outside, and steps are counted, not batches.
    other = ["--sparsity.patience", "9", "--sparsity.per_layer", "true", "--sparsity.min_dense_steps", "19"]
    other += ["--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "4"]
    summary = train.main([*command, *other, "--model.attention_options.change", "1e6"])
    assert [t["step"] for t in summary["transitions"]] == [6, 6]
    for options, message in (
        (["--model.attention_options.quantil", "0.5"], "spion has no option 'quantil'; it has quantile, change, inter"),
        (["--model.attention_options.quantile", "much"], "quantile of spion must be a number, got 'much'"),
        (["--model.attention_options.quantile", "1.5"], "spion needs 0 <= quantile < 1"),
        (["--model.attention_options.change", "-3"], "spion needs 0 <= quantile < 1, a change above 0"),
        (["--model.attention_options.interval", "1.5"], "interval of spion must be a whole number, got 1.5"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            train.main([*command, *options])
        assert message in capsys.readouterr().err


def test_goes_on_only_with_the_same_fixed_blocks(tiny, capsys, tmp_path):
    config = tmp_path / "ds_config.json"
    config.write_text('{"mode": "fixed", "block": 8, "num_local_blocks": 2}')
    command = ["--config", str(tiny), "--trainer.max_steps", "4", "--model.attention", "structure"]
    files = ["--model.attention_options.deepspeed", str(config)]
    train.main([*command, *files])
    config.write_text('{"mode": "fixed", "block": 8}')
    for change in (files, ["--model.block_size", "16"]):
        if change != files:
            train.main(command)
        capsys.readouterr()
        with pytest.raises(SystemExit):
            train.main([*command, *change, "--ckpt_path", "last"])
        assert "was trained with other fixed blocks than this run has" in capsys.readouterr().err


def test_goes_on_only_with_the_same_method_and_options(tiny, capsys):
    command = ["--config", str(tiny), "--trainer.max_steps", "4"]
    train.main([*command, *arguments("structure")])
    for other, message in (
        (arguments("bigbird"), "was trained with model.attention=structure, this run has bigbird"),
        ([*arguments("structure"), "--model.attention_options.block", "16"], "'block': 8"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            train.main([*command, *other, "--ckpt_path", "last"])
        assert message in capsys.readouterr().err
