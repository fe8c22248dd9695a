import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

from sat.sparsity import LayerHistory, best_mass, block_mass, captured_mass, distance, skewness


@pytest.mark.parametrize("shape", [(2, 3), (37, 41), (256, 256)])
def test_skewness_is_that_of_scipy(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).exp()
    expected = scipy.stats.skew(matrix.double().numpy(), axis=None)
    assert skewness(matrix).item() == pytest.approx(expected, rel=1e-12)
    assert skewness(matrix).shape == ()
    assert skewness(matrix).dtype == torch.float64


def test_skewness_of_small_attention_weights():
    # Rows of a softmax over 4096 keys: tiny values, where float32 moments would lose digits.
    matrix = torch.softmax(torch.randn(64, 4096, generator=torch.Generator().manual_seed(1)), dim=1)
    assert skewness(matrix).item() == pytest.approx(scipy.stats.skew(matrix.double().numpy(), axis=None), rel=1e-10)


@pytest.mark.parametrize("value", [0.0, 1 / 3, 1 / 1024, -5.0])
def test_skewness_of_a_constant_matrix_is_zero(value):
    assert skewness(torch.full((8, 8), value)).item() == 0
    assert skewness(torch.full((8, 8), value, dtype=torch.float64)).item() == 0


def test_skewness_of_a_matrix_that_is_constant_but_for_rounding_is_zero():
    matrix = torch.full((75, 75), 1 / 75)
    matrix[3, 4:20] += torch.finfo(torch.float32).eps / 75
    assert scipy.stats.skew(matrix.double().numpy(), axis=None) > 10
    assert skewness(matrix).item() == 0
    matrix[3, 4] *= 1.01
    assert skewness(matrix).item() == pytest.approx(scipy.stats.skew(matrix.double().numpy(), axis=None))
    matrix[0, 0] = torch.nan
    assert skewness(matrix).isnan()


def test_distance_is_the_frobenius_norm_of_the_difference():
    a, b = torch.randn(2, 17, 23, generator=torch.Generator().manual_seed(2))
    assert distance(a, b).item() == pytest.approx(np.linalg.norm((a - b).numpy()), rel=1e-6)
    assert distance(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])).item() == 5
    with pytest.raises(ValueError, match="one shape"):
        distance(a, b[:3])


def test_block_mass_weighs_partial_blocks_by_their_elements():
    attention = torch.softmax(torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(3)), dim=2)
    pooled, mass = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.float64)
    for m, n in itertools.product(range(3), range(4)):
        block = attention[:, 2 * m : 2 * m + 2, 2 * n : 2 * n + 2]
        pooled[:, m, n] = block.mean((1, 2))
        mass[:, m, n] = block.double().sum((1, 2)) / attention.double().sum((1, 2))
    torch.testing.assert_close(block_mass(pooled, 2, 5, 7), mass, rtol=1e-6, atol=0)


def test_mass_of_a_head_without_attention_is_zero():
    pooled = torch.zeros(1, 2, 2)
    assert block_mass(pooled, 4, 8, 8).sum() == 0
    assert captured_mass(pooled, torch.ones(1, 2, 2, dtype=torch.bool), 4, 8, 8) == 0


def test_captured_and_best_mass_by_hand():
    # Blocks of 2 on 3 x 3 tokens: elements 4 2 / 2 1.
    pooled = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])  # masses 4 4 6 4, of 18
    mask = torch.tensor([[[True, False], [False, True]]])
    assert captured_mass(pooled, mask, 2, 3, 3) == pytest.approx(8 / 18)
    assert best_mass(pooled, mask, 2, 3, 3) == pytest.approx(10 / 18)


@pytest.mark.parametrize("shared", [False, True])
def test_best_mass_by_brute_force(shared):
    generator = torch.Generator().manual_seed(4)
    pooled = torch.rand(2, 2, 3, generator=generator)
    mask = torch.zeros(1 if shared else 2, 6, dtype=torch.bool)
    mask[0, :2] = True
    if not shared:
        mask[1, :4] = True  # heads may keep different numbers of blocks
    mask = mask.view(-1, 2, 3)
    mass = block_mass(pooled, 4, 7, 9).flatten(1)

    def best(head_mass, count):
        return max(sum(head_mass[list(chosen)]).item() for chosen in itertools.combinations(range(6), count))

    expected = best(mass.mean(0), 2) if shared else (best(mass[0], 2) + best(mass[1], 4)) / 2
    assert best_mass(pooled, mask, 4, 7, 9) == pytest.approx(expected)
    assert captured_mass(pooled, mask, 4, 7, 9) <= expected


def test_mass_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="10 queries"):
        block_mass(torch.zeros(1, 2, 2), 4, 10, 8)
    with pytest.raises(ValueError, match=r"torch\.bool"):
        captured_mass(torch.ones(3, 2, 2), torch.ones(2, 2, 2, dtype=torch.bool), 4, 8, 8)
    with pytest.raises(ValueError, match=r"torch\.bool"):
        best_mass(torch.ones(3, 2, 2), torch.ones(1, 2, 2), 4, 8, 8)


def at(value):
    """A score matrix whose distance to ``at(other)`` is ``|value - other|``."""
    return torch.tensor([[value, 0.0], [0.0, 0.0]], dtype=torch.float64)


def test_history_by_hand():
    history = LayerHistory()
    assert (history.skewness, history.distance, history.relative_change) == (None, None, None)
    history.update(at(0.0), 1.0)
    assert (history.skewness, history.distance, history.relative_change) == (1.0, None, None)
    history.update(at(2.0), 1.5)
    assert (history.skewness, history.distance, history.relative_change) == (1.5, 2.0, None)
    history.update(at(5.0), 1.25)
    assert (history.skewness, history.distance, history.relative_change) == (1.25, 3.0, 50.0)
    history.update(at(3.5), 1.0)
    assert (history.distance, history.relative_change) == (1.5, 50.0)
    assert history.observations == 4


def test_history_when_attention_stands_still():
    history = LayerHistory()
    for value in (1.0, 1.0, 1.0):
        history.update(at(value), 2.0)
    assert (history.distance, history.relative_change) == (0.0, 0.0)
    history.update(at(2.0), 2.0)
    assert (history.distance, history.relative_change) == (1.0, math.inf)


def test_smoothing_is_a_normalised_exponential_mean():
    values, skews = [0.0, 1.0, 3.0, 2.5, 2.0], [1.0, 2.0, 0.5, 1.5, 3.0]
    history = LayerHistory(smoothing=0.75)
    for value, skew in zip(values, skews, strict=True):
        history.update(at(value), skew)

    def mean(series):
        weights = 0.75 ** np.arange(len(series))[::-1]
        return float(np.average(series, weights=weights))

    distances = np.abs(np.diff(values))
    before, after = mean(distances[:-1]), mean(distances)
    assert history.skewness == pytest.approx(mean(skews))
    assert history.distance == pytest.approx(after)
    assert history.relative_change == pytest.approx(abs(after - before) / before * 100)


def test_smoothing_cancels_noise_and_keeps_trends():
    def last_change(smoothing, distances):
        history, value = LayerHistory(smoothing), 0.0
        history.update(at(value), 2.0)
        for step in distances:
            value += step
            history.update(at(value), 2.0)
        return history.relative_change

    noisy = [1.1 if step % 2 else 0.9 for step in range(80)]
    assert last_change(0.0, noisy) > 18
    assert last_change(0.9, noisy) < 1.3
    shrinking = [0.95**step for step in range(80)]
    assert last_change(0.0, shrinking) == pytest.approx(5)
    assert last_change(0.9, shrinking) == pytest.approx(5, abs=0.5)


def test_history_continues_from_its_state(tmp_path):
    values = [0.0, 1.0, 3.0, 2.5, 2.0]
    for stop in range(len(values)):
        whole, first, second = (LayerHistory(0.5) for _ in range(3))
        for value in values[:stop]:
            first.update(at(value), value)
        torch.save(first.state_dict(), tmp_path / "history.pt")
        second.load_state_dict(torch.load(tmp_path / "history.pt", weights_only=True))
        for value in values[stop:]:
            second.update(at(value), value)
        for value in values:
            whole.update(at(value), value)
        assert second.distance == whole.distance
        assert second.skewness == whole.skewness
        assert second.relative_change == whole.relative_change
        assert second.observations == 5


def test_history_drops_its_matrix_but_not_its_numbers():
    history = LayerHistory()
    history.update(at(0.0), 1.0)
    history.update(at(1.0), 2.0)
    history.drop_matrix()
    assert history.state_dict() == {"observations": 2, "skewness": 2.0, "distance": 1.0}
