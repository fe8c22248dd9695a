"""The study of rules for the blocks: what they choose, and what they go by."""

import json

import pytest
import torch
import torch.nn.functional as F

from experiments import masks
from sat.attention import AdaptiveAttention
from sat.layout import BlockLayout

SHAPE = (masks.LAYERS, masks.HEADS, masks.SIDE, masks.SIDE)
DENSITY = 0.1
COUNT = int(masks.SIDE**2 * DENSITY)


@pytest.fixture
def seen():
    generator = torch.Generator().manual_seed(0)
    made = masks.Observations()
    names = ("mass", "largest", "energy", "signed", "absolute", "sensitivity")
    made.sums = {name: torch.rand(SHAPE, generator=generator, dtype=torch.float64) for name in names}
    made.sums["signed"] -= 0.5
    made.weight = 1.0
    return made


def chosen(rule, seen):
    return masks.choose(rule, seen, DENSITY, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [name for name, rule in masks.RULES.items() if rule is not None])
def test_every_rule_keeps_a_tenth_of_the_blocks(name, seen):
    rule = masks.RULES[name]
    kept = chosen(rule, seen)
    assert kept.shape == SHAPE
    assert kept.dtype == torch.bool
    if rule.shared:
        assert kept.sum() == int(kept.numel() * DENSITY)
    elif rule.coverage:
        assert 0 <= int(kept.numel() * DENSITY) - kept.sum() < kept.shape[0] * kept.shape[1]
        mass = seen.mean(rule.scores)
        shares = (mass * kept).sum((2, 3)) / mass.sum((2, 3))
        assert shares.max() - shares.min() < 0.02
    else:
        assert (kept.sum((2, 3)) == COUNT).all()
    if rule.diagonal:
        assert kept.diagonal(dim1=2, dim2=3).all()
    if not rule.per_head:
        assert torch.equal(kept[:, 0], kept[:, 1])


def test_windows_are_the_blocks_nearest_to_the_diagonal(seen):
    away = (torch.arange(masks.SIDE)[:, None] - torch.arange(masks.SIDE)).abs()
    window = chosen(masks.RULES["window"], seen)
    assert window[:, :, away <= 1].all()
    assert (away.expand(SHAPE)[window] <= 2).all()


def test_the_relation_divides_by_what_rows_and_columns_have(seen):
    rows, columns = torch.rand(2, masks.SIDE, dtype=torch.float64) + 0.1
    relation = torch.rand(SHAPE, dtype=torch.float64)
    relation = relation / relation.sum(3, keepdim=True)
    for _ in range(200):  # of equal rows and columns, so that dividing gives it back
        relation = relation / relation.sum(2, keepdim=True)
        relation = relation / relation.sum(3, keepdim=True)
    plain = masks.Observations()
    plain.sums, plain.weight = {"mass": relation}, 1.0
    scaled = masks.Observations()
    scaled.sums, scaled.weight = {"mass": relation * 3}, 1.0
    assert torch.equal(chosen(masks.RULES["relation 1"], plain), chosen(masks.RULES["mass"], scaled))
    popular = masks.Observations()
    popular.sums, popular.weight = {"mass": rows[:, None] * columns}, 1.0
    popular.sums["mass"] = popular.sums["mass"].expand(SHAPE).clone()
    # Attention that is nothing but popularity has no relation: all scores are alike, ties go to the lower index.
    kept = chosen(masks.Rule("relation", 1.0, diagonal=False, rows=0), popular)
    product = popular.sums["mass"].sum(3, keepdim=True) * popular.sums["mass"].sum(2, keepdim=True)
    assert torch.allclose(popular.sums["mass"] / product, (popular.sums["mass"] / product)[..., :1, :1])
    assert kept.sum() == COUNT * masks.LAYERS * masks.HEADS


def test_each_head_has_the_exponent_whose_blocks_are_worth_most(seen):
    mass = seen.mean("mass")
    product = mass.sum(3, keepdim=True) * mass.sum(2, keepdim=True)
    plain, relation = (chosen(masks.Rule("relation", exponent), seen) for exponent in (0.0, 1.0))
    worth = torch.zeros(SHAPE, dtype=torch.float64)
    worth[0, 0], worth[0, 1], worth[1] = plain[0, 0], relation[0, 1], relation[1]
    seen.sums["sensitivity"] = worth + 0.01 * (mass / product).clamp(max=1)
    kept = chosen(masks.RULES["relation, by head"], seen)
    assert torch.equal(kept[0, 0], plain[0, 0])
    assert torch.equal(kept[0, 1], relation[0, 1])
    assert torch.equal(kept[1], relation[1])


def test_a_signed_gradient_keeps_what_lessens_the_loss(seen):
    kept = chosen(masks.Rule("signed", diagonal=False, rows=0), seen)
    signed = seen.mean("signed")
    assert signed[kept].max() <= signed[~kept].max()
    for layer, head in ((0, 0), (1, 1)):
        assert signed[layer, head][kept[layer, head]].max() <= signed[layer, head][~kept[layer, head]].min()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_studied_attention_is_attention(padded, sparse):
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(3, 2, masks.LENGTH, 8, generator=generator, requires_grad=True) for _ in range(3)]
    options = {}
    if padded:
        real = torch.arange(masks.LENGTH) < torch.tensor([[200], [256], [31]])
        options = {"key_padding_mask": real, "query_padding_mask": real}
    studied, plain = masks.Studied(), AdaptiveAttention(masks.HEADS, masks.LENGTH, masks.BLOCK)
    if sparse:
        mask = torch.rand(SHAPE[1:], generator=generator) < 0.3
        mask |= torch.eye(masks.SIDE, dtype=torch.bool)
        for each in (studied, plain):
            each.set_layout(BlockLayout(mask, masks.BLOCK))
    studied.studied = True
    weight = torch.randn(3, 2, masks.LENGTH, 8, generator=generator)
    if padded:
        weight = weight * real[:, None, :, None]
    found, expected = studied(*inputs, **options), plain(*inputs, **options)
    torch.testing.assert_close(found * (weight != 0), expected * (weight != 0), rtol=1e-4, atol=1e-5)
    (found * weight).mean().backward()
    bias = torch.zeros(3, 2, masks.SIDE, masks.SIDE, requires_grad=True)
    if not sparse:
        scores = bias.repeat_interleave(masks.BLOCK, 2).repeat_interleave(masks.BLOCK, 3)
        if padded:
            scores = scores.masked_fill(~real[:, None, None], -torch.inf)
        out = F.scaled_dot_product_attention(*inputs, attn_mask=scores)
        (slope,) = torch.autograd.grad((out * weight).mean(), bias)
        torch.testing.assert_close(studied.seen["signed"], 3 * slope.mean(0), rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(studied.seen["absolute"], 3 * slope.abs().mean(0), rtol=1e-3, atol=1e-7)
        mass = studied.seen["mass"].sum((1, 2))
        torch.testing.assert_close(mass, torch.full((2,), (200 + 256 + 31) / 3 / 256 if padded else 1.0))
    assert studied.seen["sensitivity"].shape == SHAPE[1:]


def command(tmp_path, *arguments):
    masks.main(["--out", str(tmp_path), *arguments])


def test_a_table_of_what_has_been_measured(tmp_path, capsys):
    settings = {"steps": 500, "density": 0.1}
    run = {"task": "digits", "captured_mass": 0.1, "best_mass": 0.2, "settings": settings}
    runs = [{**run, "rule": "mass", "seed": seed, "accuracy": accuracy} for seed, accuracy in enumerate((0.5, 0.7))]
    runs.append({**run, "rule": "mass", "seed": 0, "accuracy": 0.1, "settings": {"steps": 1000, "density": 0.1}})
    (tmp_path / "masks.json").write_text(json.dumps({"runs": runs}))
    command(tmp_path, "--table")
    shown = capsys.readouterr().out
    assert "0.600 (2)" in shown
    assert "50%" in shown
    with pytest.raises(SystemExit, match="nothing has been measured with these settings yet"):
        command(tmp_path, "--table", "--density", "0.2")


def test_what_cannot_be_is_refused(tmp_path, capsys):
    for arguments, said in (
        (["--steps", "10"], "--steps must be at least 100"),
        (["--density", "2"], "--density must be 1/32"),
    ):
        with pytest.raises(SystemExit):
            command(tmp_path, *arguments)
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit, match=str(tmp_path / "cifar10")) as stop:
        command(tmp_path, "--tasks", "cifar10", "--seeds", "0", "--rules", "window", "--data", str(tmp_path))
    assert "\n" not in str(stop.value)
