"""What several processes, and several batches of an accumulation, observe together."""

from __future__ import annotations

import pytest
import torch

from sat import ops
from tests.distributed import work
from tests.distributed.processes import launch


def values(outcomes):
    assert [o.status for o in outcomes] == [0] * len(outcomes), outcomes
    return [o.value for o in outcomes]


def test_means_over_processes_are_those_of_all_samples(folder):
    # By layer, the samples of each rank: alike, uneven, one that has none, and a layer that nobody has observed.
    results = values(launch(2, folder, work.average, [[4, 4], [5, 2], [0, 3], [0, 0]], 28))
    for found, expected in results:
        assert sorted(found) == [0, 1, 2]
        for layer, statistics in found.items():
            assert statistics[0].dtype == torch.float32
            torch.testing.assert_close(statistics, expected[layer])
    assert all(
        torch.equal(a, b)
        for layer in (0, 1, 2)
        for a, b in zip(*(each[0][layer] for each in results), strict=True)
        if a is not None
    )


@pytest.mark.parametrize(
    ("batches", "samples", "rows"),
    [
        # By batch of the accumulation and rank, as many rows; of the whole batch, those that are looked at.
        ([[[0, 1, 2, 3], [4, 5, 6, 7]]], 6, range(6)),
        ([[[0, 1, 2, 3], [4, 5, 6, 7]]], 3, range(3)),  # rank 1 has nothing to look at
        ([[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]], 7, range(7)),
        ([[[0, 1, 2, 3], [4, 5, 6]], [[7, 8], [9]]], 40, range(10)),  # all, though no two batches are of one size
        ([[[0, 1, 2, 3]], [[4, 5, 6, 7]], [[8, 9, 10]]], 9, range(9)),
    ],
)
def test_an_observation_is_of_the_first_samples_of_the_whole_batch(folder, batches, samples, rows):
    results = values(launch(len(batches[0]), folder, work.observe, batches, samples))
    query, key, _ = work.sequences(40)[list(rows)].unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    expected = ops.attention_statistics(query, key, 8, backend="reference").skewness
    for history in results:
        assert str(history) == str(results[0])  # as text, since nan differs from itself
        assert len(history) == 2
        for skewness, _ in history:
            torch.testing.assert_close(torch.tensor(skewness), expected)
        assert history[1][1] == 0  # the same samples again: nothing has moved


def test_hugging_faces_trainer(folder):
    ((history, masks),) = values(launch(1, folder, work.hugging_face, "one", 1))
    assert [record["step"] for record in history] == [2, 4, 6]
    assert len(masks) == 2
    for other_history, other_masks in values(launch(2, folder, work.hugging_face, "two", 2)):
        assert all(torch.equal(a, b) for a, b in zip(masks, other_masks, strict=True))
        for record, other in zip(history, other_history, strict=True):
            for layer, other_layer in zip(record["layers"], other["layers"], strict=True):
                found, expected = (torch.tensor([*x.values()], dtype=torch.float32) for x in (other_layer, layer))
                torch.testing.assert_close(found, expected, equal_nan=True)
