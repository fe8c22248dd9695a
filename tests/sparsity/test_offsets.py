import math
from statistics import NormalDist, median_low

import pytest
import torch

from sat.sparsity import offset_scores, select_blocks


def away(rows, columns):
    return torch.arange(columns) - torch.arange(rows)[:, None]


def popular(rows, columns, seed=0):
    """Scores that a row and a column make up between them: nobody prefers anybody."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, 1, generator=generator).double() * torch.rand(1, columns, generator=generator).double()


def by_hand(scores, causal=False):
    """The same, block by block: what each offset is worth, and its standard error."""
    layouts, rows, columns = scores.shape
    allowed = [(i, j) for i in range(rows) for j in range(columns) if not causal or j <= i]
    found, expected = (dict.fromkeys(allowed, 0.0) for _ in range(2))
    for g in range(layouts):
        total = sum(scores[g, i, j].item() for i, j in allowed)
        share = {(i, j): scores[g, i, j].item() / total for i, j in allowed}
        fitted = dict.fromkeys(allowed, 1.0)
        for _ in range(10):
            for axis in (0, 1):
                for line in range((rows, columns)[axis]):
                    places = [place for place in allowed if place[axis] == line]
                    factor = sum(share[p] for p in places) / sum(fitted[p] for p in places)
                    fitted.update({p: fitted[p] * factor for p in places})
        found = {p: found[p] + share[p] for p in allowed}
        expected = {p: expected[p] + fitted[p] for p in allowed}
    lines = {o: [p for p in allowed if p[1] - p[0] == o] for o in range(1 - rows, columns)}
    weight = {o: sum(expected[p] for p in line) for o, line in lines.items() if line}
    worth = {o: sum(found[p] for p in lines[o]) / weight[o] for o in weight}
    apart = {p: (found[p] - worth[p[1] - p[0]] * expected[p]) ** 2 for p in allowed}
    # The median of the square of a normal variable is .6745 ** 2 times its variance.
    typical = median_low(apart[p] / expected[p] ** 2 for p in allowed) / NormalDist().inv_cdf(0.75) ** 2
    anywhere = {o: typical * sum(expected[p] ** 2 for p in lines[o]) for o in weight}
    own = {o: sum(apart[p] for p in lines[o]) for o in weight}
    return {o: (worth[o], math.sqrt(max(anywhere[o], own[o])) / weight[o]) for o in weight}


@pytest.mark.parametrize("causal", [False, True])
def test_offsets_are_worth_what_stands_out_of_their_rows_and_columns(causal):
    scores = torch.rand(4, 9, 9, generator=torch.Generator().manual_seed(1)).double()
    scores *= 1 + 3 * (away(9, 9) == -2) + 2 * (away(9, 9) == 1)
    found, expected = offset_scores(scores, num_heads=1, causal=causal), by_hand(scores, causal)
    stand_out = set()
    for i in range(9):
        for j in range(i + 1 if causal else 9):
            worth, error = expected[j - i]
            effect = max(abs(worth - 1) - 3 * error, 0) * math.copysign(1, worth - 1)
            stand_out |= {j - i} if effect > 0 else set()
            torch.testing.assert_close(found[:, i, j], torch.full((4,), 1 + effect).double(), atol=2e-6, rtol=0)
    assert stand_out == ({-2} if causal else {-2, 1})


def test_a_causal_model_with_an_attention_sink_keeps_what_is_near():
    sink, early = torch.ones(32, 32), 1 / (1.0 + torch.arange(32)).expand(32, 32)
    sink[:, 0] = 30
    for scores in (sink, early):
        kept = select_blocks(offset_scores(scores[None].tril(), num_heads=1, causal=True), density=0.1, causal=True)
        assert (away(32, 32)[kept[0]] >= -1).all()


def test_a_block_that_is_rarely_reached_does_not_decide():
    scores = popular(32, 32) * (1 + 0.5 * (away(32, 32).abs() == 3))
    scores[-1] *= 0.01
    scores[:, -1] *= 0.01
    found = offset_scores(scores[None], num_heads=1)[0]
    assert found.diagonal(3)[0] > 1.3
    assert 0.9 < found[0, 0] < 1.1


def test_what_does_not_stand_out_of_chance_is_chosen_by_nearness():
    scores = 1 + 0.3 * torch.rand(4, 16, 16, generator=torch.Generator().manual_seed(2))
    kept = select_blocks(offset_scores(scores, num_heads=1), density=46 / 256)
    assert torch.equal(kept, (away(16, 16).abs() <= 1).expand(4, 16, 16))


def test_popular_keys_do_not_hide_who_depends_on_whom():
    # Every second neighbour is worth a tenth more, which is far less than what keys differ by.
    scores = popular(12, 12) * (1 + 0.1 * (away(12, 12).abs() == 2))
    kept = select_blocks(offset_scores(scores[None], num_heads=1), density=32 / 144)[0]
    assert torch.equal(kept, (away(12, 12).abs() == 2) | (away(12, 12) == 0))
    assert not torch.equal(select_blocks(scores[None], density=32 / 144)[0], kept)


def test_heads_look_back_and_ahead_by_turns():
    scores = popular(8, 8).expand(6, 8, 8) * (1 + 0.5 * (away(8, 8).abs() == 3))
    kept = select_blocks(offset_scores(scores, num_heads=3), density=13 / 64)
    for layout, direction in zip(kept, [-3, 3, -3, -3, 3, -3], strict=True):
        assert torch.equal(layout, (away(8, 8) == 0) | (away(8, 8) == direction))


def test_a_head_that_may_keep_more_than_one_side_has_takes_the_best_of_the_other():
    scores = popular(6, 6).expand(2, 6, 6) * (1 + 0.5 * (away(6, 6).abs() == 1))
    kept = select_blocks(offset_scores(scores, num_heads=2), density=26 / 36)
    assert torch.equal(kept[0], (away(6, 6) <= 0) | (away(6, 6) == 1))
    assert torch.equal(kept[1], (away(6, 6) >= 0) | (away(6, 6) == -1))
    assert select_blocks(offset_scores(scores, num_heads=2), density=1.0).all()


def test_causal_heads_all_look_back():
    scores = popular(8, 8).expand(2, 8, 8) * (1 + 0.5 * (away(8, 8) == -2))
    kept = select_blocks(offset_scores(scores, num_heads=2, causal=True), density=14 / 36, causal=True)
    assert torch.equal(kept, ((away(8, 8) == 0) | (away(8, 8) == -2)).expand(2, 8, 8))


def test_layers_without_a_preference_follow_those_with_one():
    scores = torch.stack([popular(8, 8) * (1 + 0.4 * (away(8, 8).abs() == 2)), popular(8, 8, seed=3)])
    kept = select_blocks(offset_scores(scores, num_heads=1), density=20 / 64)
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[1], (away(8, 8).abs() == 2) | (away(8, 8) == 0))


def test_where_nothing_is_known_near_blocks_are_kept():
    for scores in (torch.ones(1, 8, 8), torch.zeros(1, 8, 8)):
        kept = select_blocks(offset_scores(scores, num_heads=1), density=22 / 64)
        assert torch.equal(kept[0], away(8, 8).abs() <= 1)


def test_a_single_block_does_not_speak_for_its_offset():
    scores = 1 + 0.3 * torch.rand(2, 32, 32, generator=torch.Generator().manual_seed(5)).double()
    scores[0, 3, 20] = 40
    kept = select_blocks(offset_scores(scores, num_heads=1), density=94 / 1024)
    assert torch.equal(kept, (away(32, 32).abs() <= 1).expand(2, 32, 32))


@pytest.mark.parametrize("sigma", [0.3, 0.6, 1.0])
def test_chance_seldom_stands_out_however_scores_are_spread(sigma):
    generator = torch.Generator().manual_seed(6)
    found = 0
    for _ in range(40):
        scores = popular(32, 32, seed=1) * (sigma * torch.randn(4, 32, 32, generator=generator).double()).exp()
        kept = select_blocks(offset_scores(scores, num_heads=1), density=94 / 1024)
        found += not torch.equal(kept, (away(32, 32).abs() <= 1).expand(4, 32, 32))
    assert found <= 8  # 63 offsets in each


@pytest.mark.parametrize("budget", [8, 12, 16, 24])
def test_part_of_an_offset_is_taken_evenly_whatever_its_scores(budget):
    first, second = (torch.rand(2, 33, 33, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4))
    density = (33 + budget) / 33**2
    kept = select_blocks(offset_scores(first, num_heads=2), density=density)
    assert torch.equal(kept, select_blocks(offset_scores(second, num_heads=2), density=density))
    for layout, direction in zip(kept, (-1, 1), strict=True):
        assert layout.diagonal().all()
        places = layout.diagonal(direction).nonzero().flatten()
        assert len(places) == budget
        gaps = places.diff(prepend=torch.tensor([-1]), append=torch.tensor([32]))
        assert gaps.max() <= 2 * math.ceil(33 / (budget + 1)), gaps


def test_padding_that_nobody_depends_on_changes_nothing():
    scores = popular(8, 8) * (1 + 0.5 * (away(8, 8).abs() == 2))
    scores[6:] = scores[:, 6:] = 0
    found = offset_scores(scores[None], num_heads=1)
    assert found.isfinite().all()
    kept = select_blocks(found, density=20 / 64, min_blocks_per_row=0)[0]
    assert torch.equal(kept, (away(8, 8).abs() == 2) | (away(8, 8) == 0))


def test_grids_that_are_not_square_have_their_diagonal_from_corner_to_corner():
    found = offset_scores(torch.ones(2, 4, 9), num_heads=2)
    kept = select_blocks(found, density=8 / 36, keep_diagonal=False, min_blocks_per_row=0)
    diagonal = torch.tensor([0, 2, 4, 6])  # 9 columns to 4 rows
    for layout, direction in zip(kept, (-1, 1), strict=True):
        expected = {(row, int(column)) for row, column in enumerate(diagonal)}
        expected |= {(row, int(column) + direction) for row, column in enumerate(diagonal)} - {(0, -1)}
        places = {(row, column) for row, column in layout.nonzero().tolist()}
        assert expected <= places
        assert len(places - expected) == 8 - len(expected)


@pytest.mark.parametrize("size", [64, 2048])
def test_blocks_of_one_offset_lie_evenly_however_much_it_is_worth(size):
    """Half of all lies on one diagonal, of which not all blocks can be kept."""
    scores = torch.ones(1, size, size)
    scores.diagonal(3, dim1=1, dim2=2)[:] = size
    found = offset_scores(scores, num_heads=1)[0].diagonal(3)
    for kept in (size // 2, size // 5):
        first = found.argsort(descending=True, stable=True)[:kept]  # of equal ones the first
        chosen = torch.zeros(len(found)).index_fill_(0, first, 1.0)
        quarters = torch.stack([part.mean() for part in chosen.tensor_split(4)])
        torch.testing.assert_close(quarters, torch.full((4,), kept / len(found)), atol=0.07, rtol=0)


def test_what_was_seen_long_ago_does_not_make_everything_undefined():
    """The square of what is expected there is 0 in 64 bits."""
    scores = popular(16, 16) * (1 + 0.5 * (away(16, 16).abs() == 3))
    scores[-1] *= 1e-170
    scores[:, -1] *= 1e-170
    found = offset_scores(scores[None], num_heads=1)
    assert found.isfinite().all()
    assert found[0].diagonal(3)[0] > 1.3
