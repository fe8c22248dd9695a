import pytest
import torch

from sat.sparsity import Criterion, LayerHistory


def history_of(skews, distances, smoothing=0.0):
    """A history with these skewnesses and, from the second observation on, these distances."""
    history, position = LayerHistory(smoothing), 0.0
    for skew, step in zip(skews, [0.0, *distances], strict=True):
        position += step
        history.update(torch.tensor([[position]], dtype=torch.float64), skew)
    return history


def test_the_papers_rule():
    criterion = Criterion()
    assert criterion.judge(history_of([1.8] * 3, [1.0, 1.01])) == (True, 1, "")
    assert criterion.judge(history_of([1.7] * 3, [1.0, 1.01])).met  # skewness >= theta
    assert not criterion.judge(history_of([1.69] * 3, [1.0, 1.01])).met
    assert not criterion.judge(history_of([1.8] * 3, [1.0, 1.02])).met
    # The change must be below delta, not equal to it: 1.0 -> 1.5 is 50 % in floating point too.
    assert not Criterion(delta=50.0).judge(history_of([1.8] * 3, [1.0, 1.5])).met
    assert Criterion(delta=50.1).judge(history_of([1.8] * 3, [1.0, 1.5])).met
    # Shrinking and growing count alike.
    assert not criterion.judge(history_of([1.8] * 3, [1.0, 0.98])).met


def test_only_the_last_observation_counts_without_smoothing():
    assert Criterion().judge(history_of([0.1, 0.1, 1.7], [3.0, 3.0])).met
    assert not Criterion().judge(history_of([9.0, 9.0, 1.6], [3.0, 3.0])).met


def test_too_few_observations():
    criterion = Criterion()
    assert criterion.judge(LayerHistory()) == (False, 0, "no observation yet")
    assert criterion.judge(history_of([2.0], [])).missing == (
        "the change of the distance is known after 3 observations, so far 1"
    )
    assert not criterion.judge(history_of([2.0] * 2, [0.0])).met


def test_what_is_missing_is_said():
    criterion = Criterion()
    assert criterion.judge(history_of([1.21] * 3, [1.0, 1.048])).missing == (
        "skewness 1.21 < 1.70; distance still changes by 4.80 % >= 1.30 %"
    )
    assert criterion.judge(history_of([1.6996] * 3, [1.0, 1.0])).missing == "skewness 1.6996 < 1.70"
    smoothed = Criterion(smoothing=0.5).judge(history_of([1.0] * 3, [1.0, 1.0], smoothing=0.5))
    assert smoothed.missing == "smoothed skewness 1.00 < 1.70"


def test_attention_that_suddenly_moves_has_not_settled():
    verdict = Criterion().judge(history_of([2.0] * 4, [0.0, 0.0, 1.0]))
    assert verdict.missing == "distance still changes by inf % >= 1.30 %"


@pytest.mark.parametrize("settings", [{}, {"patience": 3}, {"agreement": 0.5, "agreement_lag": 2, "patience": 2}])
def test_the_least_number_of_observations(settings):
    criterion = Criterion(**settings, theta=None, delta=1e9)
    history, streak = LayerHistory(0.0), 0
    for seen in range(1, 10):
        history.update(torch.full((4, 4), float(seen)), 1.0)
        verdict = criterion.judge(history, streak, 1.0 if seen > criterion.agreement_lag else None)
        streak = verdict.streak
        if verdict.met:
            break
    assert seen == criterion.least_observations


def test_patience_counts_observations_in_a_row():
    criterion = Criterion(patience=3)
    good, bad = history_of([2.0] * 3, [1.0, 1.0]), history_of([1.0] * 3, [1.0, 1.0])
    streak, met = 0, []
    for history in (good, good, bad, good, good, good, good):
        verdict = criterion.judge(history, streak)
        streak = verdict.streak
        met.append(verdict.met)
    assert met == [False, False, False, False, False, True, True]
    assert criterion.judge(good, 1).missing == "thresholds kept for 2 of 3 observations in a row"


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"theta": float("nan")}, "theta"),
        ({"theta": float("inf")}, "theta"),
        ({"delta": 0.0}, "delta"),
        ({"delta": float("nan")}, "delta"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"smoothing": -0.1}, "smoothing"),
        ({"patience": 0}, "patience"),
    ],
)
def test_values_out_of_range_are_refused(settings, name):
    with pytest.raises(ValueError, match=name):
        Criterion(**settings)


def test_what_is_missing_can_be_told_from_the_bound():
    assert "skewness 1.30 < 1.304" in Criterion(theta=1.304).judge(history_of([1.3] * 3, [1.0, 1.0])).missing
    assert "agreement 0.99 < 0.995" in Criterion(agreement=0.995).judge(LayerHistory(), agreement=0.994).missing
