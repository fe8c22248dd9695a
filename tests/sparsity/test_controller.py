import math

import pytest
import torch

from sat.layout import BlockLayout
from sat.ops.types import AttentionStatistics
from sat.sparsity import SparsityController, block_mass, revise_blocks, select_blocks
from sat.sparsity.selection import agreement
from sat.sparsity.spion import spion_blocks

# Small on purpose: 2 heads, 8 x 8 tokens in blocks of 2.
SHAPE = {"num_layers": 2, "num_heads": 2, "grid": (4, 4), "block_size": 2, "lengths": (8, 8)}


BARE = {"keep_diagonal": False, "min_blocks_per_row": 0}


def controller(**settings):
    return SparsityController(**{**SHAPE, "density": 0.5, **settings})


def statistics(position=0.0, skew=2.0, seed=0, pooled=None):
    """Statistics whose score matrix lies ``position`` away from zero, so that distances are differences."""
    if pooled is None:
        logits = 3 * torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(seed))
        pooled = torch.softmax(logits, dim=2) / 2
    matrix = torch.zeros(8, 8)
    matrix[0, 0] = position
    return AttentionStatistics(pooled, torch.tensor(skew), matrix)


def drive(made, layers, first=1, every=1):
    """Feed histories ``[(skewnesses, distances), ...]``, one a layer; gives ``{step: transitions}``."""
    positions = [[sum(distances[:t]) for t in range(len(distances) + 1)] for _, distances in layers]
    found = {}
    for t in range(len(positions[0])):
        step = first + every * t
        observed = {n: statistics(positions[n][t], layers[n][0][t], seed=n) for n in made.dense_layers}
        transitions = made.observe(step, observed)
        if transitions:
            found[step] = transitions
        if made.all_sparse:
            break
    return found


SPION = {"mask": "spion", "density": None, "quantile": 0.5}

# Relative changes, from the third observation on:         1.0   18.8  0.8   0.8   0.8  percent
FIRST = ([2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0], [1.0, 1.01, 1.2, 1.21, 1.22, 1.23])
#                                                           0     0     10    0.5   0
SECOND = ([1.0, 1.0, 1.0, 1.0, 1.8, 1.8, 1.8], [2.0, 2.0, 2.0, 2.2, 2.21, 2.21])


def steps_of(found):
    return {step: [transition.layer for transition in transitions] for step, transitions in found.items()}


def test_the_papers_rule_waits_until_every_layer_is_ready():
    found = drive(controller(), [FIRST, SECOND])
    assert steps_of(found) == {6: [0, 1]}
    assert [t.forced for t in found[6]] == [False, False]
    assert [t.missing for t in found[6]] == ["", ""]
    assert found[6][0].relative_change == pytest.approx(100 / 121, rel=1e-3)
    assert found[6][1].skewness == pytest.approx(1.8)


def test_layer_by_layer():
    made = controller(per_layer=True)
    assert steps_of(drive(made, [FIRST, SECOND])) == {3: [0], 6: [1]}
    assert made.transition_steps == [3, 6]


def sensitive(found, **others):
    return statistics(**others)._replace(sensitivity=found)


def test_fisher_keeps_what_the_loss_depends_on_most_in_all_layers_together():
    generator = torch.Generator().manual_seed(3)
    first, second = torch.rand(2, 2, 4, 4, generator=generator)
    settings = {"mask": "fisher", "per_head": True, "share_budget": True, "max_dense_steps": 2, "density": 0.5}
    made = controller(**settings, keep_diagonal=False, min_blocks_per_row=0)
    # The second layer's blocks matter a hundred times as much; the scale differs from one observation to the next.
    assert made.observe(1, {0: sensitive(first), 1: sensitive(100 * second)}) == []
    state = made.state_dict()
    transitions = made.observe(2, {0: sensitive(1e6 * first), 1: sensitive(1e8 * second)})
    scores = torch.cat([first, 100 * second])
    expected = scores >= scores.flatten().sort(descending=True).values[31]  # half of 2 layers x 2 heads x 16 blocks
    assert torch.equal(torch.cat([t.layout.mask for t in transitions]), expected)
    assert transitions[0].density < transitions[1].density
    again = controller(**settings, keep_diagonal=False, min_blocks_per_row=0)
    again.load_state_dict(state)
    other = again.observe(2, {0: sensitive(1e6 * first), 1: sensitive(1e8 * second)})
    assert all(torch.equal(a.layout.mask, b.layout.mask) for a, b in zip(transitions, other, strict=True))


def test_by_offset_the_layers_choose_together_and_heads_look_back_and_ahead_by_turns():
    # Layer 0 depends on what is three blocks away, layer 1 on one key, whoever asks.
    wide = {"grid": (12, 12), "block_size": 1, "lengths": (12, 12)}
    settings = wide | {"mask": "fisher", "per_head": True, "max_dense_steps": 1, "density": 21 / 144}
    three = (torch.arange(12)[:, None] - torch.arange(12)).abs().eq(3)
    first, second = torch.ones(2, 12, 12) + 3 * three, torch.ones(2, 12, 12) + 9 * torch.arange(12).eq(1)
    observed = {n: sensitive(found, pooled=torch.full((2, 12, 12), 1 / 144)) for n, found in enumerate((first, second))}
    observed = {n: each._replace(score_matrix=torch.zeros(12, 12)) for n, each in observed.items()}
    back = torch.eye(12).bool() | three.tril()
    for transition in controller(**settings, by_offset=True).observe(1, observed):
        assert torch.equal(transition.layout.mask, torch.stack([back, back.mT]))
    # One by one, layer 1 would have taken the key.
    alone = controller(**settings)
    assert alone.observe(1, observed)[1].layout.mask[:, :, 1].sum() > 12
    # More blocks of the same kind.
    narrow = settings | {"density": 9 / 144, "keep_scores": True, **BARE}
    made = controller(**narrow, by_offset=True)
    made.observe(1, observed)
    made.add_blocks(5)
    for layout in made.layouts:
        assert layout.nnz == 2 * 18
        assert not layout.mask[0].triu(1).any()
        assert not layout.mask[1].tril(-1).any()


def test_by_offset_a_coverage_is_reached_by_what_holds_most_on_either_side():
    near = torch.ones(2, 4, 4) + 9 * ((torch.arange(4)[:, None] - torch.arange(4)).abs() <= 1)
    settings = {"mask": "fisher", "per_head": True, "max_dense_steps": 1, "density": None, "coverage": 0.9}
    made = controller(**settings, by_offset=True)
    pooled = near / near.sum(2, keepdim=True) / 2
    (transition, _) = made.observe(1, {n: sensitive(near, pooled=pooled) for n in range(2)})
    assert torch.equal(transition.layout.mask, near > 1)


def test_by_offset_heads_that_share_a_layout_look_both_ways():
    made = controller(mask="fisher", by_offset=True, max_dense_steps=1, density=10 / 16)
    near = torch.ones(2, 4, 4) + (torch.arange(4)[:, None] - torch.arange(4)).abs().eq(1)
    (transition, _) = made.observe(1, {0: sensitive(near), 1: sensitive(near)})
    assert torch.equal(transition.layout.mask[0], (torch.arange(4)[:, None] - torch.arange(4)).abs() <= 1)


def test_by_offset_heads_of_a_causal_model_all_look_back():
    near = torch.ones(2, 4, 4) + (torch.arange(4)[:, None] - torch.arange(4)).abs().eq(1)
    made = controller(mask="fisher", per_head=True, by_offset=True, causal=True, max_dense_steps=1, density=7 / 10)
    (transition, _) = made.observe(1, {n: sensitive(near) for n in range(2)})
    expected = torch.ones(4, 4).tril().triu(-1).bool()
    assert torch.equal(transition.layout.mask, torch.stack([expected, expected]))


@pytest.mark.parametrize("density", [0.04, 0.05, 0.1])
def test_by_offset_what_says_nothing_settles_at_once(density):
    # A budget that ends within an offset: what is taken of it must not be drawn anew with each observation.
    made = SparsityController(
        2, 2, (32, 32), 1, (32, 32),
        mask="fisher", per_head=True, by_offset=True, agreement=0.9, agreement_lag=3, density=density,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    even = torch.full((2, 32, 32), 1 / 1024)
    for step in range(1, 5):
        observed = {n: sensitive(torch.rand(2, 32, 32, generator=generator) + 0.5, pooled=even) for n in range(2)}
        transitions = made.observe(step, observed)
    assert [t.step for t in transitions] == [4, 4]
    for transition in transitions:
        back, ahead = transition.layout.mask
        assert back.sum() == ahead.sum() == int(density * 1024)
        assert back.triu(1).sum() == back.tril(-4).sum() == 0
        assert ahead.tril(-1).sum() == ahead.triu(4).sum() == 0


@pytest.mark.parametrize("settings", [{"share_budget": True}, {"per_layer": True}, {"keep_first_tokens": 1}])
def test_by_offset_goes_together_with(settings):
    near = torch.ones(2, 4, 4) + (torch.arange(4)[:, None] - torch.arange(4)).abs().eq(1)
    made = controller(mask="fisher", per_head=True, by_offset=True, max_dense_steps=1, density=7 / 16, **settings)
    for transition in made.observe(1, {n: sensitive(near) for n in range(2)}):
        expected = torch.ones(4, 4).tril().triu(-1).bool()
        if "keep_first_tokens" in settings:
            assert transition.layout.mask[:, 0].all()
            assert transition.layout.mask[:, :, 0].all()
        else:
            assert torch.equal(transition.layout.mask, torch.stack([expected, expected.mT]))


def test_fisher_adds_the_heads_that_share_a_layout():
    made = controller(mask="fisher", max_dense_steps=1, density=1 / 16, keep_diagonal=False, min_blocks_per_row=0)
    found = torch.zeros(2, 4, 4)
    found[0, 1, 2] = found[1, 1, 2] = 2.0
    found[0, 3, 3] = 3.0
    (transition, _) = made.observe(1, {0: sensitive(found), 1: sensitive(found)})
    assert transition.layout.mask.nonzero().tolist() == [[0, 1, 2]]


def test_fisher_leaves_out_gradients_that_overflowed_and_says_so(caplog):
    made = controller(mask="fisher", max_dense_steps=2)
    found = torch.rand(2, 4, 4)
    made.observe(1, {0: sensitive(found), 1: sensitive(found * math.inf)})
    assert "no gradient observed at step 1: the loss depends on the blocks by inf" in caplog.text
    # At the bound, too: a head that begins at 0 has no gradient at its first step.
    assert made.observe(2, {0: sensitive(found * 0), 1: sensitive(found * 0)}) == []
    assert "step 2: the loss depends on the blocks by 0" in caplog.text
    assert made.observed_at is None
    assert math.isnan(made.latest[0]["skewness"])  # as if nothing had been observed
    assert [t.step for t in made.observe(3, {0: sensitive(found), 1: sensitive(found)})] == [3, 3]
    assert made.observed_at == 3


@pytest.mark.parametrize("factor", [0.0, math.inf])
def test_choices_that_stay_because_nothing_was_observed_have_not_settled(factor):
    made = controller(mask="fisher", agreement=0.95, agreement_lag=1, density=0.5)
    first, second = torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    made.observe(1, {n: sensitive(first) for n in range(2)})
    assert made.observe(2, {n: sensitive(second * factor) for n in range(2)}) == []
    made.observe(3, {n: sensitive((1 - first) ** 8) for n in range(2)})
    assert made.latest[0]["agreement"] < 0.95  # with the choice of step 1


def test_revisions_that_cannot_be_are_refused_with_a_sentence():
    found = {n: torch.rand(2, 4, 4) for n in range(2)}
    with pytest.raises(ValueError, match="nothing to revise at step 5: revise_interval is None"):
        controller(mask="fisher").revise(5, found)
    with pytest.raises(ValueError, match=r"nothing to revise at step 5: \[0, 1\] are dense"):
        controller(mask="fisher", revise_interval=1).revise(5, found)


def test_layouts_to_begin_with_are_all_taken_or_none():
    made = controller(mask="fisher")
    fitting, other = (BlockLayout(torch.ones(n, n, dtype=torch.bool), 16) for n in (4, 3))
    with pytest.raises(ValueError, match="the layout to begin with in layer 1"):
        made.begin([BlockLayout(fitting.mask, made.block_size), BlockLayout(other.mask, made.block_size)])
    assert made.layouts == [None, None]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mask": "fischer"}, "mask must be one of 'fisher', 'gram', 'bilinear', 'direct', 'spion', got 'fischer'"),
        (
            {"mask": "spion", "quantile": 0.9, "density": None, "grid": (4, 5), "lengths": (8, 10)},
            "as many rows as columns, got 4 x 5",
        ),
        (
            {"mask": "spion", "quantile": 0.9, "density": None, "grid": (4200, 4200), "lengths": (8400, 8400)},
            "at most 4,096 x 4,096 blocks",
        ),
    ],
)
def test_masks_that_there_are_not(settings, said):
    with pytest.raises(ValueError, match=said):
        controller(**settings)


def test_fisher_needs_a_backward_pass():
    made = controller(mask="fisher")
    with pytest.raises(ValueError, match=r"layer 0 at step 1: mask='fisher' needs the sensitivity .* got none"):
        made.observe(1, {0: statistics(), 1: statistics()})
    with pytest.raises(ValueError, match=r"got the shape \[2, 4\]"):
        made.observe(1, {0: sensitive(torch.rand(2, 4)), 1: sensitive(torch.rand(2, 4, 4))})


REVISING = {"mask": "fisher", "per_head": True, "max_dense_steps": 1, "keep_diagonal": False, "min_blocks_per_row": 0}


def switched(**settings):
    """A controller whose layers have left the dense phase at step 1, and by which scores."""
    made = controller(**{**REVISING, "density": 0.25, "revise_interval": 4, "revise_share": 0.5, **settings})
    scores = torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(5)) + 0.01
    made.observe(1, {n: sensitive(scores[n]) for n in range(2)})
    return made, scores


def test_revisions_swap_blocks_when_it_is_time():
    made, scores = switched()
    assert made.watches(0)
    before = [layout.mask.clone() for layout in made.layouts]
    other = scores.flip(3)
    for step in (2, 3, 4):
        assert made.revise(step, dict(enumerate(other))) == []
    revisions = made.revise(5, dict(enumerate(other)))
    assert [(r.layer, r.step) for r in revisions] == [(0, 5), (1, 5)]
    weights = [0.9**n for n in range(5)]
    total = sum(w * x / x.sum() for w, x in zip(weights, [other] * 4 + [scores], strict=True)) / sum(weights)
    for index, revision in enumerate(revisions):
        expected = revise_blocks(before[index], total[index], share=0.5, **BARE)
        assert torch.equal(made.layouts[index].mask, expected)
        assert revision.new_blocks == pytest.approx((expected & ~before[index]).sum().item() / 8)
        assert revision.new_blocks > 0
        assert revision.density == 0.25
    assert made.revise(6, dict(enumerate(scores))) == []
    assert made.transition_steps == [1, 1]


def test_revisions_under_a_shared_budget_move_blocks_between_layers():
    made, scores = switched(share_budget=True, revise_share=1.0)
    for step in range(2, 6):
        revisions = made.revise(step, {0: scores[0] * 1e-3, 1: scores[1]})
    assert [r.density for r in revisions] == [0.0, 0.5]


def test_revisions_go_on_after_a_restart():
    settings = {**REVISING, "density": 0.25, "revise_interval": 4, "revise_share": 0.5}
    made, _ = switched()
    later = torch.rand(6, 2, 2, 4, 4, generator=torch.Generator().manual_seed(6))
    for step in range(2, 5):
        made.revise(step, dict(enumerate(later[step - 2])))
    again = controller(**settings)
    again.load_state_dict(made.state_dict())
    still = controller(**{**settings, "revise_interval": None})
    still.load_state_dict(made.state_dict())
    assert not still.watches(0)
    assert still.layouts == made.layouts
    for step in range(5, 8):
        found = [each.revise(step, dict(enumerate(later[step - 2]))) for each in (made, again)]
        assert found[0] == found[1]
        assert bool(found[0]) == (step == 5)
    # Revisions that are wanted only after the switch begin to learn then, and wait as long as others.
    late = controller(**settings)
    late.load_state_dict(still.state_dict())
    found = [late.revise(step, dict(enumerate(later[0]))) for step in range(8, 13)]
    assert [bool(each) for each in found] == [False] * 4 + [True]


def test_revisions_that_cannot_be():
    with pytest.raises(ValueError, match="revise_interval must be at least 1 step, got 0"):
        controller(mask="fisher", revise_interval=0)
    with pytest.raises(ValueError, match="revise_share must be above 0 and at most 1, got 0"):
        controller(mask="fisher", revise_interval=5, revise_share=0)
    with pytest.raises(ValueError, match=r"revise_interval needs mask='fisher', .* got mask='direct'"):
        controller(revise_interval=5)
    made, scores = switched()
    with pytest.raises(ValueError, match=r"the sensitivities of all 2 layers, got those of \[1\] at step 5"):
        made.revise(5, {1: scores[1]})


def observed(made, scores, step):
    return made.observe(step, {n: sensitive(scores[n]) for n in made.dense_layers})


def test_leaves_when_the_choice_agrees_with_an_earlier_one():
    settings = {"mask": "fisher", "per_head": True, "agreement": 0.9, "agreement_lag": 3, "theta": 1e9}
    made = controller(**settings)
    generator = torch.Generator().manual_seed(8)
    for step in range(1, 8):  # a hundred times as large each time: the newest observation decides
        assert observed(made, torch.rand(2, 2, 4, 4, generator=generator), step) == []
    values = [layer["agreement"] for layer in made.latest]
    assert all(0 < value < 0.9 for value in values)
    assert made.missing == [f"agreement {value:.2f} < 0.90" for value in values]
    settled = torch.rand(2, 2, 4, 4, generator=generator) ** 8
    again = controller(**settings)
    for step in range(8, 60):
        before = made.state_dict()
        if observed(made, settled, step):
            break
    again.load_state_dict(before)
    assert observed(again, settled, step)
    assert again.layouts == made.layouts
    assert again.latest == made.latest
    assert all(layer["agreement"] >= 0.9 for layer in made.latest)
    # The running mean has to come round to the settled scores, and then to stay for three observations.
    assert 10 < step < 40


def test_the_agreement_is_that_of_two_choices_some_observations_apart():
    made = controller(mask="fisher", agreement=1.0, agreement_lag=2, density=0.25, **BARE)
    chosen = []
    generator = torch.Generator().manual_seed(9)
    mean, weight = torch.zeros(1, 4, 4, dtype=torch.float64), 0.0
    for step in range(1, 7):
        scores = torch.rand(2, 2, 4, 4, generator=generator)
        found = observed(made, scores, step)
        mean = 0.9 * mean + scores[0].double().sum(0, keepdim=True) / scores.double().sum()
        weight = 0.9 * weight + 1
        chosen.append(select_blocks(mean / weight, density=0.25, **BARE))
        value = made.latest[0]["agreement"]
        if step <= 2:
            assert math.isnan(value)
            assert made.missing[0] == "the agreement is known once blocks have been chosen 3 times"
        elif not found:
            assert value == (chosen[-1] & chosen[-3]).sum().item() / 4


def test_agreement_leaves_out_what_is_kept_in_any_case():
    eye = torch.eye(4, dtype=torch.bool)[None]
    now, before = eye.clone(), eye.clone()
    assert agreement(now, before, keep_diagonal=True) == 1.0
    now[0, 0, 1:3] = before[0, 0, 2:] = True
    assert agreement(now, before, keep_diagonal=True) == 0.5
    assert agreement(now, before, keep_diagonal=False) == 5 / 6
    now[0, :, 0] = now[0, 0] = before[0, :, 0] = before[0, 0] = True
    now[0, 2, 1] = True
    assert agreement(now, before, keep_diagonal=True, keep_first=1) == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"agreement": 0.0}, "agreement is a share of the blocks and must be above 0 and at most 1, got 0"),
        ({"agreement": 1.5}, "must be above 0 and at most 1, got 1.5"),
        ({"agreement": 0.9, "agreement_lag": 0}, "agreement_lag must be at least 1 observation, got 0"),
    ],
)
def test_agreements_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        controller(**settings)


def test_a_shared_budget_needs_layers_that_leave_together():
    with pytest.raises(ValueError, match=r"share_budget .* set per_layer to False"):
        controller(share_budget=True, per_layer=True)
    with pytest.raises(ValueError, match="no budget to share_budget of"):
        controller(**SPION, share_budget=True)
    with pytest.raises(ValueError, match="patterns of its own; it has no scores to take by_offset"):
        controller(**SPION, by_offset=True)


def test_spion_waits_for_the_distance_alone_and_traces_the_scores():
    made = controller(**SPION, theta=None, delta=15.0)
    found = drive(made, [([-5.0] * 7, FIRST[1]), ([-5.0] * 7, SECOND[1])])
    assert steps_of(found) == {3: [0, 1]}  # changes of 1 and 0 percent
    pooled = torch.zeros(2, 4, 4)
    made = controller(**SPION, theta=None, delta=1e9)
    matrix = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)).softmax(1)
    for step in range(3):
        transitions = made.observe(
            step, {n: AttentionStatistics(pooled, torch.tensor(0.0), matrix * (1 + step)) for n in range(2)}
        )
    assert torch.equal(transitions[0].layout.mask, spion_blocks(3 * matrix[None], 2, 0.5))
    causal = controller(**SPION, theta=None, max_dense_steps=1, causal=True)
    (first, _) = causal.observe(1, {n: AttentionStatistics(pooled, torch.tensor(0.0), matrix) for n in range(2)})
    assert torch.equal(first.layout.mask, spion_blocks(matrix[None], 2, 0.5).tril())


@pytest.mark.parametrize("settings", [{"density": 0.01}, SPION | {"quantile": 0.99, "theta": None}])
def test_the_blocks_of_the_first_tokens_are_kept(settings):
    made = controller(**settings, keep_first_tokens=3, max_dense_steps=1)
    for transition in made.observe(1, {n: statistics(1.0, seed=n) for n in range(2)}):
        assert transition.layout.mask[:, :2].all()  # blocks of 2 tokens
        assert transition.layout.mask[:, :, :2].all()
        assert not transition.layout.mask[:, 2:, 2:].all()


def test_patience():
    assert steps_of(drive(controller(patience=2), [FIRST, SECOND])) == {7: [0, 1]}
    assert steps_of(drive(controller(patience=2, per_layer=True), [FIRST, SECOND])) == {6: [0], 7: [1]}


def test_thresholds():
    assert steps_of(drive(controller(theta=1.0), [FIRST, SECOND])) == {3: [0, 1]}
    assert steps_of(drive(controller(theta=1.9), [FIRST, SECOND])) == {}
    assert steps_of(drive(controller(delta=0.7, per_layer=True), [FIRST, SECOND])) == {6: [1]}


def test_observations_at_an_interval():
    assert steps_of(drive(controller(), [FIRST, SECOND], first=50, every=50)) == {300: [0, 1]}


def test_no_transition_before_min_dense_steps():
    assert steps_of(drive(controller(min_dense_steps=6), [FIRST, SECOND])) == {6: [0, 1]}
    assert steps_of(drive(controller(min_dense_steps=7), [FIRST, SECOND])) == {7: [0, 1]}
    assert steps_of(drive(controller(min_dense_steps=5, per_layer=True), [FIRST, SECOND])) == {5: [0], 6: [1]}


def test_max_dense_steps_forces_and_says_what_was_missing():
    found = drive(controller(max_dense_steps=45), [FIRST, SECOND], first=10, every=10)
    assert steps_of(found) == {50: [0, 1]}
    assert [t.forced for t in found[50]] == [True, True]
    assert found[50][0].missing == ""
    assert found[50][1].missing == "distance still changes by 10.00 % >= 1.30 %"


def test_max_dense_steps_forces_only_the_layers_that_are_not_ready():
    found = drive(controller(max_dense_steps=5, per_layer=True), [([2.0] * 7, [1.0, 2.0, 4.0, 4.0, 4.0, 4.0]), SECOND])
    assert steps_of(found) == {5: [0, 1]}
    assert [t.forced for t in found[5]] == [False, True]


def test_a_forced_transition_at_the_first_observation():
    found = drive(controller(max_dense_steps=1), [FIRST, SECOND])
    assert steps_of(found) == {1: [0, 1]}
    assert math.isnan(found[1][0].relative_change)
    assert "3 observations" in found[1][0].missing


def test_phases_and_layouts():
    made = controller(per_layer=True)
    assert [made.phase(n) for n in (0, 1)] == ["dense", "dense"]
    assert made.missing == ["no observation yet"] * 2
    drive(made, [(FIRST[0][:4], FIRST[1][:3]), (SECOND[0][:4], SECOND[1][:3])])
    assert [made.phase(n) for n in (0, 1)] == ["sparse", "dense"]
    assert made.dense_layers == [1]
    assert not made.all_sparse
    assert made.layouts[0].shape == (4, 4)
    assert made.layouts[1] is None
    assert made.missing[1] == "skewness 1.00 < 1.70"


def test_latest_values_for_logging():
    made = controller(theta=9.0)
    assert all(math.isnan(made.latest[0][name]) for name in ("skewness", "distance", "relative_change"))
    drive(made, [([1.0, 2.0, 3.0], [1.0, 1.5]), ([1.0, 9.0, 9.5], [1.0, 1.0])])
    assert made.latest[0] == {"skewness": 3.0, "distance": 1.5, "relative_change": 50.0, "met": 0.0}
    assert made.latest[1] == {"skewness": 9.5, "distance": 1.0, "relative_change": 0.0, "met": 1.0}


@pytest.mark.parametrize("per_head", [False, True])
def test_the_transition_reports_what_it_kept(per_head):
    pooled = torch.zeros(2, 4, 4)
    pooled[0, :, 0], pooled[1, :, 3] = 0.5, 0.5  # head 0 looks at column 0, head 1 at column 3
    made = controller(
        theta=9.0,
        max_dense_steps=20,
        density=0.25,
        per_head=per_head,
        keep_diagonal=False,
        min_blocks_per_row=0,
        mask_steps=20,
    )
    for step in range(1, 21):
        transitions = made.observe(step, {n: statistics(pooled=pooled) for n in (0, 1)})
    found = transitions[0]
    assert found.density == 0.25
    if per_head:
        assert found.layout.mask.nonzero()[:, 2].tolist() == [0] * 4 + [3] * 4
        assert (found.captured_mass, found.best_mass, found.empty_rows) == (1.0, 1.0, 0)
    else:
        # Both columns hold half the mass, and ties are resolved by what little the fit differs by.
        assert found.layout.num_heads == 1
        assert found.captured_mass == found.best_mass == 0.5
        assert found.empty_rows == 4 - int(found.layout.mask.any(2).sum())
    assert found.layout == made.layouts[0]


def test_coverage():
    bare = {"min_blocks_per_row": 0, "keep_diagonal": False}
    made = controller(theta=9.0, max_dense_steps=30, density=None, coverage=0.8, **bare)
    for step in range(1, 31):
        found = made.observe(step, {n: statistics(seed=n) for n in (0, 1)})
    for n, transition in enumerate(found):
        assert transition.captured_mass >= 0.8
        mass = block_mass(statistics(seed=n).pooled, 2, 8, 8).mean(0, keepdim=True)
        fewest = select_blocks(mass, coverage=0.8, mass=mass, **bare)
        assert transition.layout.nnz == fewest.sum()  # after 300 steps the learner knows the order


def test_the_masks_average_over_observations():
    made = controller(theta=9.0, max_dense_steps=40, min_blocks_per_row=0, keep_diagonal=False)
    generator, truth = torch.Generator().manual_seed(0), statistics(seed=5).pooled
    for step in range(1, 41):
        noisy = (truth + 0.03 * torch.randn(truth.shape, generator=generator)).clamp(min=0)
        found = made.observe(step, {n: statistics(pooled=noisy) for n in (0, 1)})
    expected = select_blocks(truth.mean(0, keepdim=True), density=0.5, min_blocks_per_row=0, keep_diagonal=False)
    agreement = (found[0].layout.mask & expected).sum() / expected.sum()
    assert agreement >= 7 / 8


@pytest.mark.parametrize("mask", ["gram", "bilinear", "direct", "spion"])
@pytest.mark.parametrize("per_layer", [False, True])
def test_a_restored_controller_decides_the_same_bit_for_bit(mask, per_layer, tmp_path):
    settings = {"mask": mask, "per_layer": per_layer, "smoothing": 0.3, "patience": 2, "delta": 30.0, "mask_steps": 3}
    settings |= SPION if mask == "spion" else {"per_head": True, "density": 0.3}
    settings |= {"max_dense_steps": 9}
    generator = torch.Generator().manual_seed(3)
    positions = torch.rand(10, 2, generator=generator).cumsum(0).tolist()
    skews = (1.5 + torch.rand(10, 2, generator=generator)).tolist()

    def go(made, steps):
        for t in steps:
            observed = {n: statistics(positions[t][n], skews[t][n], seed=10 * t + n) for n in made.dense_layers}
            found.extend(made.observe(t, observed))

    found = []
    whole = controller(**settings)
    go(whole, range(10))
    expected, found = found, []
    assert len(expected) == 2
    for stop in range(10):
        found = []
        first = controller(**settings)
        go(first, range(stop))
        torch.save(first.state_dict(), tmp_path / "state.pt")
        second = controller(**settings, seed=99)  # another start, to be overwritten
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        go(second, range(stop, 10))
        assert found == expected
        assert [repr(values) for values in second.latest] == [repr(values) for values in whole.latest]


def test_a_state_is_not_changed_by_what_follows():
    made = controller()
    made.observe(1, {n: statistics(seed=n) for n in (0, 1)})
    state = made.state_dict()
    restored = controller()
    restored.load_state_dict(state)
    logits = state["layers"][0]["learner"]["mask"]["logits"].clone()
    for other in (made, restored):
        other.observe(2, {n: statistics(1.0, seed=n) for n in (0, 1)})
    assert torch.equal(state["layers"][0]["learner"]["mask"]["logits"], logits)
    assert state["layers"][0]["learner"]["optimizer"]["state"][0]["step"] == 10
    assert state["layers"][0]["history"]["observations"] == 1


def test_a_dense_state_brings_a_sparse_controller_back():
    made = controller(max_dense_steps=2)
    made.observe(1, {n: statistics(seed=n) for n in (0, 1)})
    state = made.state_dict()
    first = made.observe(2, {n: statistics(seed=n) for n in (0, 1)})
    made.load_state_dict(state)
    assert made.dense_layers == [0, 1]
    assert made.transition_steps == [None, None]
    assert repr(made.observe(2, {n: statistics(seed=n) for n in (0, 1)})) == repr(first)


def test_the_score_matrix_is_dropped_at_the_transition():
    made = controller(max_dense_steps=2)
    made.observe(1, {n: statistics() for n in (0, 1)})
    assert all("score_matrix" in layer["history"] for layer in made.state_dict()["layers"])
    made.observe(2, {n: statistics() for n in (0, 1)})
    assert not any("score_matrix" in layer["history"] or "learner" in layer for layer in made.state_dict()["layers"])
    assert made.observe(3, {}) == []


@pytest.mark.parametrize(
    "other",
    [{"num_layers": 3}, {"grid": (8, 8), "block_size": 1}, {"num_heads": 1}, {"mask": "gram"}, {"per_head": True}],
)
def test_a_state_of_another_structure_is_refused(other):
    with pytest.raises(ValueError, match=f"{next(iter(other))} = "):
        controller(**other).load_state_dict(controller().state_dict())


@pytest.mark.parametrize("name", ["pooled", "skewness", "score_matrix"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_statistics_that_are_not_finite_are_refused_and_change_nothing(name, value):
    made = controller()
    made.observe(1, {n: statistics() for n in (0, 1)})
    broken = statistics(1.0)
    getattr(broken, name).view(-1)[0] = value
    with pytest.raises(FloatingPointError, match=f"layer 1 at step 7: {name}"):
        made.observe(7, {0: statistics(1.0), 1: broken})
    assert all(layer["history"]["observations"] == 1 for layer in made.state_dict()["layers"])


def test_statistics_that_do_not_fit_are_refused():
    made = controller()
    with pytest.raises(ValueError, match=r"\[0, 1\], got \[0\] at step 4"):
        made.observe(4, {0: statistics()})
    with pytest.raises(ValueError, match="score_matrix=True"):
        made.observe(4, {0: statistics(), 1: statistics()._replace(score_matrix=None)})
    with pytest.raises(ValueError, match=r"pooled must be \[2, 4, 4\], got \[1, 4, 4\]"):
        made.observe(4, {0: statistics(pooled=torch.ones(1, 4, 4)), 1: statistics()})


@pytest.mark.parametrize(
    "settings",
    [
        {"theta": math.nan},
        {"delta": -1.0},
        {"smoothing": 1.0},
        {"patience": 0},
        {"min_dense_steps": -1},
        {"max_dense_steps": 0},
        {"min_dense_steps": 10, "max_dense_steps": 9},
        {"mask": "dense"},
        {"mask": "gram", "mask_rank": 0},
        {"mask_lr": 0.0},
        {"mask_lr": math.inf},
        {"mask_steps": 0},
        {"density": None},
        {"density": 0.0},
        {"density": 0.5, "coverage": 0.5},
        {"density": None, "coverage": 2.0},
        {"density": None, "coverage": 0.5, "min_density": 0.5, "max_density": 0.1},
        {"min_blocks_per_row": 5},
        {"num_layers": 0},
        {"num_heads": 0},
        {"block_size": 0},
        {"keep_first_tokens": -1},
        {"keep_first_tokens": 9},
        {"quantile": 0.5},
        SPION | {"quantile": None},
        SPION | {"quantile": 1.0},
        SPION | {"density": 0.5},
        SPION | {"per_head": True},
        {"lengths": (9, 8)},
        {"grid": (4, 5)},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    # The sentence names the setting, or for lengths the grid that they contradict.
    name = "grid" if "lengths" in settings else next(reversed(settings)).replace("min_density", "max_density")
    with pytest.raises(ValueError, match=name):
        controller(**settings)


def test_a_grid_that_is_not_square_and_partial_blocks():
    made = SparsityController(1, 1, (2, 3), 4, (7, 9), density=0.5, max_dense_steps=1)
    pooled = torch.rand(1, 2, 3, generator=torch.Generator().manual_seed(0))
    observed = AttentionStatistics(pooled, torch.tensor(0.0), torch.rand(7, 9))
    (found,) = made.observe(1, {0: observed})
    assert found.layout.fits(7, 9)
    assert found.layout.nnz == 3
    with pytest.raises(ValueError, match="as many block rows"):
        SparsityController(1, 1, (2, 3), 4, (7, 9), density=0.5, mask="gram")


def test_the_surroundings_of_the_caller_do_not_matter():
    plain, inside = (controller(max_dense_steps=3, mask="bilinear") for _ in range(2))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for step in (1, 2, 3):
        expected = plain.observe(step, {n: statistics(step, seed=n) for n in (0, 1)})
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            found = inside.observe(step, {n: statistics(step, seed=n) for n in (0, 1)})
    assert found == expected
    assert torch.equal(torch.get_rng_state(), before)


def test_a_controller_that_gave_up_with_nothing_learned_goes_on_after_a_restart():
    made, _ = switched()
    sparse = controller(**{**REVISING, "revise_interval": None})
    sparse.load_state_dict(made.state_dict())
    guarded = {**REVISING, "revise_interval": None, "mask": "fisher", "keep_scores": True}
    for _ in range(2):
        again = controller(**guarded)
        again.load_state_dict(sparse.state_dict())
        again.give_up(9)
        sparse = again
    assert sparse.gave_up_at == 9
    assert not sparse.watches(0)
