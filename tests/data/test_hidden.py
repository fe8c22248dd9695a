"""Tokens that are hidden, for a model to find."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sat.data import DATASETS, Digits, ListOps
from sat.data.hidden import hide_tokens


def batch(lengths=(40, 7, 1)) -> dict[str, torch.Tensor]:
    mask = torch.arange(40) < torch.tensor(lengths)[:, None]
    ids = torch.randint(1, 20, (len(lengths), 40), generator=torch.Generator().manual_seed(1)) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(len(lengths), dtype=torch.long)}


@pytest.mark.parametrize(("share", "counts"), [(0.4, [16, 3, 1]), (0.01, [1, 1, 1]), (0.99, [40, 7, 1])])
def test_a_share_of_the_real_tokens_is_hidden_and_asked_for(share, counts):
    given = batch()
    found = hide_tokens(share, given, np.random.default_rng(0))
    hidden = found["input_ids"] == -1
    assert hidden.sum(1).tolist() == counts
    assert not (hidden & ~given["attention_mask"]).any()
    assert torch.equal(found["labels"], torch.where(hidden, given["input_ids"], -100))
    assert torch.equal(found["input_ids"][~hidden], given["input_ids"][~hidden])
    assert torch.equal(found["attention_mask"], given["attention_mask"])
    assert (given["input_ids"] >= 0).all()  # the batch itself stays as it was


def test_all_tokens_are_hidden_alike():
    given = {"input_ids": torch.ones(2000, 10, dtype=torch.long)}
    hidden = hide_tokens(0.3, given, np.random.default_rng(0))["input_ids"] == -1
    assert (hidden.sum(1) == 3).all()
    torch.testing.assert_close(hidden.double().mean(0), torch.full((10,), 0.3).double(), atol=0.05, rtol=0)


def digits(**options) -> Digits:
    data = Digits(image_size=8, batch_size=16, hide=0.25, **options)
    data.prepare_data()
    data.setup()
    return data


def test_each_epoch_hides_others_and_a_seed_repeats_itself():
    train = digits().train_dataloader()
    first, second = ([x["input_ids"] for x in train] for _ in range(2))
    again = [x["input_ids"] for x in digits().train_dataloader()]
    other = next(iter(digits(seed=1).train_dataloader()))["input_ids"]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[0], other)
    assert all(((x == -1).sum(1) == 16).all() for x in first + second)


def test_validation_always_asks_the_same_of_a_sample():
    """Whatever the size of a batch, so that two runs are compared on the same."""
    small, large = (list(digits(eval_batch_size=size).val_dataloader()) for size in (7, 50))
    for name in ("input_ids", "labels"):
        assert torch.equal(torch.cat([x[name] for x in small]), torch.cat([x[name] for x in large]))
    ids = torch.cat([x["input_ids"] for x in small])
    assert len({tuple((row == -1).tolist()) for row in ids}) > len(ids) // 2


def test_a_prediction_chooses_among_all_tokens():
    assert (digits().answers, digits().num_classes) == (17, 10)
    assert Digits(image_size=8).answers == 10


@pytest.mark.parametrize("share", [0, 1, -0.2, 1.5, True, float("nan")])
def test_shares_that_hide_nothing_or_all_are_refused(share):
    with pytest.raises(ValueError, match=r"data.hide is a share of the tokens, above 0 and below 1, got"):
        ListOps(hide=share)


def test_data_of_other_kinds_is_refused():
    with pytest.raises(ValueError, match="hide is for models of our own that read one sequence a sample, not for"):
        DATASETS["retrieval"](hide=0.3)
