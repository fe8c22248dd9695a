import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sat.sparsity import revise_blocks, select_blocks
from sat.sparsity.selection import add_blocks

BARE = {"keep_diagonal": False, "min_blocks_per_row": 0}


def grid(text):
    """A mask from rows of x and dots."""
    return torch.tensor([[[mark == "x" for mark in row] for row in text.split()]])


def is_mask(found, text):
    expected = grid(text)
    assert torch.equal(found, expected), f"\n{found.int()}\nexpected\n{expected.int()}"


S3 = torch.tensor([[[1.0, 9.0, 2.0], [8.0, 3.0, 4.0], [7.0, 6.0, 5.0]]])


def test_density_takes_the_largest_scores():
    is_mask(select_blocks(S3, density=4 / 9, **BARE), ".x. x.. xx.")
    is_mask(select_blocks(S3, density=0.49, **BARE), ".x. x.. xx.")  # int(4.41)
    is_mask(select_blocks(S3, density=1.0, **BARE), "xxx xxx xxx")
    is_mask(select_blocks(S3, density=0.1, **BARE), "... ... ...")  # int(0.9): the paper's selection may be empty


def test_diagonal_counts_inside_the_budget():
    is_mask(select_blocks(S3, density=5 / 9, min_blocks_per_row=0), "xx. xx. ..x")


def test_what_must_be_kept_wins_over_the_budget():
    is_mask(select_blocks(S3, density=0.1), "x.. .x. ..x")
    is_mask(select_blocks(S3, density=0.1, keep_diagonal=False, min_blocks_per_row=1), ".x. x.. x..")
    is_mask(select_blocks(S3, density=0.1, keep_diagonal=True, min_blocks_per_row=2), "xx. xx. x.x")


def test_the_first_rows_and_columns_are_kept():
    is_mask(select_blocks(S3, density=0.1, keep_first=1, **BARE), "xxx x.. x..")
    is_mask(select_blocks(S3, density=6 / 9, keep_first=1, **BARE), "xxx x.. xx.")  # they count inside the budget
    is_mask(select_blocks(S3, density=0.1, keep_first=2, causal=True, **BARE), "x.. xx. xx.")
    for count in (-1, 4):
        with pytest.raises(ValueError, match=f"keep_first must be 0 to 3, the blocks in a row, got {count}"):
            select_blocks(S3, density=0.1, keep_first=count)


def test_the_rows_best_blocks_count_inside_the_budget():
    scores = torch.tensor([[[9.0, 8.0, 7.0], [1.0, 2.0, 0.0], [6.0, 5.0, 4.0]]])
    is_mask(select_blocks(scores, density=4 / 9, keep_diagonal=False), "xx. .x. x..")
    is_mask(select_blocks(scores, density=4 / 9, **BARE), "xxx ... x..")


def test_ties_go_to_the_lower_index():
    is_mask(select_blocks(torch.zeros(1, 4, 4), density=6 / 16, **BARE), "xxxx xx.. .... ....")
    is_mask(select_blocks(torch.zeros(1, 4, 4), density=6 / 16), "xxx. .x.. ..x. ...x")
    is_mask(select_blocks(torch.zeros(1, 4, 4), density=0.01, keep_diagonal=False), "x... x... x... x...")


def test_causal_keeps_the_lower_triangle_only():
    scores = torch.arange(16.0).flip(0).view(1, 4, 4)  # the upper right is large
    is_mask(select_blocks(scores, density=0.6, causal=True, **BARE), "x... xx.. xxx. ....")  # int(10 * 0.6)
    is_mask(select_blocks(scores, density=1.0, causal=True), "x... xx.. xxx. xxxx")
    # A row that has fewer blocks than the minimum keeps what it has.
    is_mask(select_blocks(scores, density=0.1, causal=True, min_blocks_per_row=3), "x... xx.. xxx. xx.x")


def test_diagonal_of_a_grid_that_is_not_square():
    is_mask(select_blocks(torch.zeros(1, 2, 4), density=0.1, min_blocks_per_row=0), "x... ..x.")
    is_mask(select_blocks(torch.zeros(1, 4, 2), density=0.1, min_blocks_per_row=0), "x. x. .x .x")
    is_mask(select_blocks(torch.zeros(1, 2, 4), density=0.1, min_blocks_per_row=0, causal=True), "x... .x..")
    is_mask(select_blocks(torch.zeros(1, 4, 2), density=0.1, min_blocks_per_row=0, causal=True), "x. .x .x .x")


def test_coverage_takes_the_fewest_blocks_that_reach_it():
    mass = S3.double() / S3.sum()  # 9 8 7 6 ... of 45
    for reached, coverage in enumerate((9 / 45, 17 / 45, 24 / 45, 30 / 45), start=1):
        assert select_blocks(S3, coverage=coverage - 1e-9, mass=mass, **BARE).sum() == reached
        assert select_blocks(S3, coverage=coverage + 1e-9, mass=mass, **BARE).sum() == reached + 1
    assert select_blocks(S3, coverage=1.0, mass=mass, **BARE).all()


def test_full_coverage_leaves_blocks_without_mass_away():
    mass = torch.tensor([[[0.1, 0.2, 0.0], [0.3, 0.4, 0.0], [0.0, 0.0, 0.0]]])
    is_mask(select_blocks(mass, coverage=1.0, mass=mass, **BARE), "xx. xx. ...")
    is_mask(select_blocks(mass, coverage=1.0, mass=mass), "xx. xx. ..x")
    assert not select_blocks(mass, coverage=0.5, mass=torch.zeros(1, 3, 3), **BARE).any()


def test_coverage_follows_the_order_of_the_scores():
    mass = S3.double().flip(1, 2) / S3.sum()  # masses 5 6 7 / 4 3 8 / 2 9 1 of 45, in order of score: 6 4 2 9 1 8 3 7 5
    is_mask(select_blocks(S3, coverage=20 / 45, mass=mass, **BARE), ".x. x.. xx.")


def test_coverage_is_bounded():
    mass = S3.double() / S3.sum()
    assert select_blocks(S3, coverage=0.01, mass=mass, min_density=0.34, **BARE).sum() == 3
    assert select_blocks(S3, coverage=0.99, mass=mass, max_density=0.34, **BARE).sum() == 3


def test_each_layout_has_its_own_coverage():
    mass = torch.tensor([[[0.97, 0.01], [0.01, 0.01]], [[0.25, 0.25], [0.25, 0.25]]])
    assert select_blocks(mass, coverage=0.9, mass=mass, **BARE).sum((1, 2)).tolist() == [1, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either density or coverage"),
        ({"density": 0.5, "coverage": 0.5}, "either density or coverage"),
        ({"density": 0.0}, "density is a share"),
        ({"density": 1.1}, "density is a share"),
        ({"density": math.nan}, "density is a share"),
        ({"coverage": 0.0}, "coverage is a share"),
        ({"coverage": 0.5}, "needs mass"),
        ({"coverage": 0.5, "mass": torch.ones(1, 3, 4)}, "shape of the scores"),
        ({"coverage": 0.5, "mass": torch.full((1, 3, 3), math.nan)}, "NaN"),
        ({"coverage": 0.5, "mass": -torch.ones(1, 3, 3)}, "negative"),
        ({"coverage": 0.5, "min_density": 0.5, "max_density": 0.4}, "bounds"),
        ({"density": 0.1, "min_density": 0.2}, "outside its bounds"),
        ({"density": 0.5, "min_blocks_per_row": 4}, "min_blocks_per_row"),
        ({"density": 0.5, "min_blocks_per_row": -1}, "min_blocks_per_row"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        select_blocks(S3, **arguments)


def test_scores_that_have_no_order_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        select_blocks(S3.where(S3 != 5, math.nan), density=0.5)
    with pytest.raises(ValueError, match="layouts, rows, columns"):
        select_blocks(S3[0], density=0.5)


@st.composite
def cases(draw):
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    # Few distinct values, so that ties are common.
    scores = torch.randint(0, draw(st.sampled_from([2, 5, 1000])), shape, generator=generator).float()
    options = {
        "keep_diagonal": draw(st.booleans()),
        "min_blocks_per_row": draw(st.integers(0, shape[2])),
        "causal": draw(st.booleans()),
    }
    return scores, options, draw(st.floats(0.01, 1.0)), generator


def allowed_and_diagonal(scores, causal):
    _, rows, columns = scores.shape
    allowed = torch.ones(rows, columns, dtype=torch.bool)
    row = torch.arange(rows)
    if causal:
        return allowed.tril(), row.clamp(max=columns - 1)
    return allowed, row * columns // rows


def check_constraints(kept, scores, options):
    allowed, diagonal = allowed_and_diagonal(scores, options["causal"])
    assert not (kept & ~allowed).any()
    if options["keep_diagonal"]:
        assert kept[:, torch.arange(kept.shape[1]), diagonal].all()
    assert (kept.sum(2) >= allowed.sum(1).clamp(max=options["min_blocks_per_row"])).all()


@settings(max_examples=150, deadline=None)
@given(cases())
def test_density_keeps_budget_diagonal_and_rows(case):
    scores, options, density, _ = case
    kept = select_blocks(scores, density=density, **options)
    check_constraints(kept, scores, options)

    allowed, _ = allowed_and_diagonal(scores, options["causal"])
    forced = select_blocks(scores, density=1e-9, **options)  # a budget of 0 leaves what must be kept
    assert (forced <= kept).all()
    expected = forced.sum((1, 2)).clamp(min=int(int(allowed.sum()) * density))
    assert torch.equal(kept.sum((1, 2)), expected)

    # No block outside is better than one that was kept by its score.
    for layout in range(len(scores)):
        chosen, left = kept[layout] & ~forced[layout], ~kept[layout] & allowed
        if chosen.any() and left.any():
            assert scores[layout][chosen].min() >= scores[layout][left].max()
    assert torch.equal(kept, select_blocks(scores.clone(), density=density, **options))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_coverage_is_reached_with_the_fewest_blocks(case):
    scores, options, coverage, generator = case
    allowed, _ = allowed_and_diagonal(scores, options["causal"])
    mass = torch.rand(scores.shape, generator=generator, dtype=torch.float64) * allowed
    mass = mass / mass.sum((1, 2), keepdim=True)
    kept = select_blocks(scores, coverage=coverage, mass=mass, **options)
    check_constraints(kept, scores, options)
    forced = select_blocks(scores, density=1e-9, **options)
    for layout in range(len(scores)):
        assert mass[layout][kept[layout]].sum() >= coverage - 1e-12
        chosen = kept[layout] & ~forced[layout]
        if chosen.any():
            # The last block taken (lowest score, of equals the highest index) was needed.
            lowest = scores[layout].masked_fill(~chosen, math.inf)
            last = int((lowest == lowest.min()).flatten().nonzero()[-1])
            without = kept[layout].flatten().clone()
            without[last] = False
            assert mass[layout].flatten()[without].sum() < coverage + 1e-12


def test_a_shared_budget_lets_the_larger_scores_win_wherever_they_are():
    scores = torch.cat([S3, S3 + 5.1])  # 6.1 to 14.1 in the second
    found = select_blocks(scores, density=0.5, share_budget=True, **BARE)
    is_mask(found[:1], ".x. x.. ...")
    is_mask(found[1:], ".x. xxx xxx")
    # What must be kept is kept in each.
    found = select_blocks(scores, density=0.5, share_budget=True)
    is_mask(found[:1], "x.. .x. ..x")
    is_mask(found[1:], "xx. xx. x.x")
    assert torch.equal(select_blocks(S3, density=0.4, share_budget=True), select_blocks(S3, density=0.4))


def test_a_shared_budget_counts_coverage_over_all():
    scores = torch.cat([S3, S3 + 5.1])
    mass = torch.zeros(2, 3, 3)
    mass[0, 0, 1], mass[1] = 1.0, 1 / 9
    # In the order 14.1 ... 9.1, 9: six ninths of one head, then all of the other.
    found = select_blocks(scores, mass=mass, coverage=0.8, share_budget=True, **BARE)
    is_mask(found[:1], ".x. ... ...")
    is_mask(found[1:], ".x. x.x xxx")
    assert select_blocks(scores, mass=mass, coverage=1.0, share_budget=True, max_density=0.5, **BARE).sum() == 9


# Revisions


def test_the_weakest_make_place_for_the_strongest():
    scores = torch.tensor([[[1.0, 9.0, 2.0], [8.0, 3.0, 4.0], [7.0, 6.0, 5.0]]])
    kept = grid("x.x x.x ...")  # 1, 2, 8, 4
    is_mask(revise_blocks(kept, scores, share=0.25, **BARE), ".xx x.x ...")
    is_mask(revise_blocks(kept, scores, share=0.5, **BARE), ".x. x.x x..")
    # 4 and 6; then 8, which no missing block exceeds.
    is_mask(revise_blocks(kept, scores, share=1.0, **BARE), ".x. x.. xx.")
    is_mask(revise_blocks(kept, scores, share=0.0, **BARE), "x.x x.x ...")


def test_what_is_required_is_not_given_up():
    scores = torch.tensor([[[1.0, 9.0, 2.0], [8.0, 3.0, 4.0], [7.0, 6.0, 5.0]]])
    kept = grid("x.x x.. ..x")
    is_mask(revise_blocks(kept, scores, share=1.0, min_blocks_per_row=0), "xx. x.. ..x")  # the diagonal block 1 stays
    # A row's only block stays, however weak it is.
    kept = grid("x.. xx. xx.")
    is_mask(revise_blocks(kept, scores, share=1.0, keep_diagonal=False), "xx. x.. xx.")
    kept = grid("xxx x.. x..")
    is_mask(revise_blocks(kept, scores, share=1.0, keep_first=1, **BARE), "xxx x.. x..")
    causal = revise_blocks(grid("x.. xx. ..x"), scores, share=1.0, causal=True, **BARE)
    is_mask(causal, "... x.. xxx")


def test_layouts_trade_with_each_other_only_under_a_shared_budget():
    scores = torch.stack([torch.full((2, 2), 1.0), torch.full((2, 2), 5.0)])
    scores += torch.arange(8).view(2, 2, 2) / 100
    kept = torch.cat([grid("xx .."), grid("x. ..")])
    apart = revise_blocks(kept, scores, share=1.0, **BARE)
    assert apart.sum((1, 2)).tolist() == [2, 1]
    together = revise_blocks(kept, scores, share=1.0, share_budget=True, **BARE)
    assert together.sum((1, 2)).tolist() == [0, 3]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 7),
    layouts=st.integers(1, 3),
    share=st.floats(0, 1),
    diagonal=st.booleans(),
    least=st.integers(0, 2),
    shared=st.booleans(),
)
def test_revision_equals_one_swap_after_the_other(seed, size, layouts, share, diagonal, least, shared):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(layouts, size, size, generator=generator) < 0.4
    scores = torch.randint(0, 9, kept.shape, generator=generator).float()
    least = min(least, size)
    options = {"keep_diagonal": diagonal, "min_blocks_per_row": least}
    found = revise_blocks(kept, scores, share=share, share_budget=shared, **options)
    groups = [range(layouts)] if shared else [[g] for g in range(layouts)]
    expected = kept.clone()
    for group in groups:
        may_go = []
        for g in group:
            for i in range(size):
                row = sorted((j for j in range(size) if kept[g, i, j]), key=lambda j: (-scores[g, i, j].item(), j))
                fixed = {i} & set(row) if diagonal else set()
                for j in row:
                    if len(fixed) < least:
                        fixed.add(j)
                may_go += [(scores[g, i, j].item(), (g, i, j)) for j in row if j not in fixed]
        missing = [(-scores[g, i, j].item(), (g, i, j)) for g in group for i, j in (~kept[g]).nonzero().tolist()]
        limit = max(int(torch.tensor(int(kept[list(group)].sum())) * share), 1 if share else 0)
        for (weak, old), (strong, new) in list(zip(sorted(may_go), sorted(missing), strict=False))[:limit]:
            if -strong > weak:
                expected[old], expected[new] = False, True
    assert torch.equal(found, expected)
    assert found.sum() == kept.sum()


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), size=st.integers(1, 7), causal=st.booleans(), shared=st.booleans())
def test_twice_as_many_are_all_that_were_and_the_best_others(seed, size, causal, shared):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(3, size, size, generator=generator) < torch.rand(3, 1, 1, generator=generator)
    kept = kept.tril() if causal else kept
    scores = torch.randint(0, 9, kept.shape, generator=generator).float()
    found = add_blocks(kept, scores, causal=causal, share_budget=shared)
    expected = kept.clone()
    for group in [range(3)] if shared else [[0], [1], [2]]:
        others = [(-scores[g, i, j].item(), (g, i, j)) for g in group for i, j in (~kept[g]).nonzero().tolist()]
        others = sorted(each for each in others if not causal or each[1][2] <= each[1][1])
        for _, block in others[: int(kept[list(group)].sum())]:
            expected[block] = True
    assert torch.equal(found, expected)


def test_revisions_that_cannot_be():
    kept, scores = torch.ones(1, 2, 2, dtype=torch.bool), torch.zeros(1, 2, 2)
    with pytest.raises(ValueError, match=r"got the shapes \[1, 2, 2\] and \[1, 2, 3\]"):
        revise_blocks(kept, torch.zeros(1, 2, 3), share=0.5)
    with pytest.raises(ValueError, match=r"must be 0 to 1, got 1\.5"):
        revise_blocks(kept, scores, share=1.5)
    with pytest.raises(ValueError, match="contain NaN"):
        revise_blocks(kept, scores * math.nan, share=0.5)
