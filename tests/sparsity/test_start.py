"""Sparse from the first step on: by a structure, or with layouts from elsewhere."""

from __future__ import annotations

import pytest
import torch

from sat.layout import BlockLayout
from sat.ops.types import AttentionStatistics
from sat.sparsity import SparsityController, SparsityPhases
from sat.sparsity.start import starting_blocks

SHAPE = {"num_layers": 2, "num_heads": 2, "grid": (16, 16), "block_size": 4, "lengths": (64, 64)}
START = {"density": 0.25, "mask": "fisher", "revise_interval": 5}


def controller(**settings):
    return SparsityController(**{**SHAPE, **START, **settings})


def test_a_window_is_as_wide_as_its_density_allows():
    made = controller(start="window")
    assert made.all_sparse
    assert made.began_sparsely
    away = (torch.arange(16)[:, None] - torch.arange(16)).abs()
    for layout in made.layouts:
        assert layout.mask.sum() == 64  # a quarter of 256
        # Up to one away there are 46, up to two 74.
        assert layout.mask[0][away <= 1].all()
        assert not layout.mask[0][away > 2].any()
    assert made.layouts != controller(start="window", seed=1).layouts
    assert made.layouts == controller(start="window").layouts


def test_bigbird_has_a_first_row_and_column_a_window_and_random_blocks():
    made = controller(start="bigbird", density=0.4, per_head=True)
    masks = torch.cat([layout.mask for layout in made.layouts])
    assert masks.shape == (4, 16, 16)
    assert masks[:, 0].all()
    assert masks[:, :, 0].all()
    assert masks.sum((1, 2)).tolist() == [int(0.4 * 256)] * 4
    away = (torch.arange(16)[:, None] - torch.arange(16)).abs()
    inner = masks.clone()
    inner[:, 0] = inner[:, :, 0] = False
    near, far = inner & (away <= 1), inner & (away > 2)
    assert near.sum() / 4 >= 0.2 * 256 - 31 - 15  # what half of the density leaves beside the first row and column
    assert (far.sum((1, 2)) > 10).all()
    assert not torch.equal(masks[0], masks[1])


def test_settings_of_the_choice_hold():
    made = controller(start="window", keep_first_tokens=5, causal=True, density=0.5)
    (mask,) = made.layouts[0].mask
    assert mask[:, :2].tril().sum() == 16 + 15
    assert not mask.triu(1).any()
    assert mask.sum() == 136 * 0.5
    rows, columns = starting_blocks("window", (4, 16), 1, torch.Generator(), density=0.25)[0].nonzero(as_tuple=True)
    assert (columns // 4 - rows).abs().max() <= 1  # from corner to corner


@pytest.mark.parametrize("start", ["window", "bigbird"])
def test_density_is_kept_to_and_bounds_belong_to_the_whole(start):
    for causal, allowed in ((False, 256), (True, 136)):
        made = controller(start=start, density=0.25, min_density=0.2, max_density=0.3, causal=causal, per_head=True)
        assert [layout.nnz for layout in made.layouts] == [2 * int(0.25 * allowed)] * 2


def test_revision_begins_at_once_and_asks_for_nothing_else():
    made = controller(start="window", per_head=True)
    assert made.dense_layers == []
    assert all(made.watches(layer) for layer in range(2))
    scores = torch.zeros(2, 16, 16)
    scores[:, 8, 1] = 1.0
    assert made.revise(4, {0: scores, 1: scores}) == []
    assert [(r.layer, r.step) for r in made.revise(5, {0: scores, 1: scores})] == [(0, 5), (1, 5)]
    assert all(layout.mask[:, 8, 1].all() for layout in made.layouts)
    again = controller(start="bigbird", per_head=True)
    again.load_state_dict(made.state_dict())
    assert again.layouts == made.layouts
    assert again.began_sparsely
    assert [r.step for r in again.revise(10, {0: scores.mT, 1: scores.mT})] == [10, 10]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "ring"}, "start must be one of window, bigbird, or None, got 'ring'"),
        ({"start": "window", "revise_interval": None}, "without revise_interval would never change .* fixed structure"),
        ({"start": "window", "density": None, "coverage": 0.5}, "has no attention to measure a coverage of, got"),
        ({"start": "window", "per_layer": True}, "begins sparsely in all layers; set per_layer to False"),
        (
            {"start": "window", "density": 0.0625},
            "what is always kept are 16 of 256 blocks, and density=0.0625 has 16;",
        ),
        ({"start": "bigbird", "density": 0.17}, "needs room: the first row and column and what .* are 46 of 256 .* 43"),
        ({"start": "window", "density": 0.1, "causal": True}, "are 16 of 136 blocks, and density=0.1 has 13; raise"),
    ],
)
def test_what_needs_a_dense_phase_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        controller(**settings)


def test_a_guard_needs_a_dense_phase():
    with pytest.raises(ValueError, match=r"guard=0\.1 compares with the loss .*, which start='window'"):
        SparsityPhases(**START, start="window", guard=0.1)
    with pytest.raises(ValueError, match="which a run that begins with layouts does without"):
        SparsityPhases(**START, guard=0.1).begin_with([], "elsewhere")


def shaped(*shape, size=4):
    return BlockLayout(torch.ones(shape, dtype=torch.bool).tril(), size)


def test_layouts_from_elsewhere():
    made = controller(per_head=True, revise_interval=None, mask="direct")
    given = [shaped(1, 16, 16), shaped(2, 16, 16)]
    made.begin(given)
    assert made.all_sparse
    assert made.began_sparsely
    assert made.transition_steps == [0, 0]
    assert all(torch.equal(layout.mask, given[1].mask) for layout in made.layouts)
    assert not any(made.watches(layer) for layer in range(2))


@pytest.mark.parametrize(
    ("layouts", "settings", "message"),
    [
        ([shaped(16, 16)], {}, "there are layouts of 1 layers to begin with, but 2 layers"),
        ([shaped(8, 8)] * 2, {}, "in layer 0 has 8 x 8 blocks of 4, but the attention 16 x 16 of 4"),
        ([shaped(16, 16, size=8)] * 2, {}, "has 16 x 16 blocks of 8, but"),
        ([BlockLayout(torch.rand(2, 16, 16) < 0.5, 4)] * 2, {}, "one of 2 heads, but there is 1 .* set per_head to"),
        ([BlockLayout(torch.rand(3, 16, 16) < 0.5, 4)] * 2, {"per_head": True}, "one of 3 heads, .* make it one of 2"),
    ],
)
def test_layouts_that_do_not_fit(layouts, settings, message):
    with pytest.raises(ValueError, match=message):
        controller(**settings).begin(layouts)


def test_where_agreement_is_the_rule_there_are_no_score_matrices():
    settings = {"revise_interval": None, "mask": "direct", "agreement": 1.0, "agreement_lag": 2}
    made = controller(**settings)
    assert not made.needs_score_matrix
    pooled = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0))
    observed = {layer: AttentionStatistics(pooled, torch.tensor(1.5), None) for layer in range(2)}
    found = [made.observe(step, observed) for step in range(1, 4)]
    assert [len(each) for each in found] == [0, 0, 2]
    assert found[2][0].skewness == 1.5
    assert found[2][0].relative_change != found[2][0].relative_change  # unknown
    assert "score_matrix" not in str(made.state_dict())
    assert controller(revise_interval=None).needs_score_matrix
    spion = {"mask": "spion", "density": None, "quantile": 0.9, "revise_interval": None}
    assert controller(**{**spion, "agreement": 0.9}).needs_score_matrix


def attended(length, **settings):
    """Phases that have taken charge of an attention of so many tokens."""
    from sat.attention import AdaptiveAttention

    phases = SparsityPhases(**{"density": 0.25, **settings})
    attention = AdaptiveAttention(1, length, 4096)
    phases.attach("a model", {"attention": attention})
    phases.check_phases()
    return attention


def test_rules_that_compare_score_matrices_end_at_some_length():
    assert attended(8192).observe_score_matrix
    with pytest.raises(ValueError, match=r"16,384 x 16,384 entries, 1.0 GiB a layer, .* set agreement \(0.9, say\)"):
        attended(16384)
    assert not attended(16384, agreement=0.9).observe_score_matrix
    revised = {"mask": "fisher", "revise_interval": 10, "density": 0.5}
    assert attended(16384, start="window", **revised).is_sparse


def test_a_long_run_with_layouts_from_elsewhere_goes_on():
    from sat.attention import AdaptiveAttention

    length, states = 16384, []
    for begins in (True, False):
        phases, attention = SparsityPhases(density=0.25), AdaptiveAttention(1, length, 4096)
        if begins:
            phases.begin_with([shaped(4, 4, size=4096)], "elsewhere")
        phases.attach("a model", {"attention": attention})
        if not begins:  # as a trainer does it
            phases.load_state_dict(states[0])
            attention.set_layout(phases.controller.layouts[0])
        phases.check_phases()
        assert phases.all_sparse
        states.append(phases.state_dict())


def test_layouts_from_elsewhere_come_before_the_training():
    from sat.attention import AdaptiveAttention

    phases = SparsityPhases(density=0.25)
    phases.attach("a model", {"attention": AdaptiveAttention(1, 64, 4)})
    with pytest.raises(ValueError, match="begin_with comes too late"):
        phases.begin_with([shaped(16, 16)], "elsewhere")
