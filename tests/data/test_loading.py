"""Order, ranks, positions: what the loaders promise without a trainer."""

from __future__ import annotations

from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, DistributedSampler

from sat.data import Digits
from sat.data.loading import Batch, EvalBatches, TrainBatches, TrainLoader, eval_loader


class Numbers(Dataset[Batch]):
    def __getitem__(self, positions: list[int]) -> Batch:
        return {"labels": torch.tensor(positions)}


def loader(size: int = 22, batch_size: int = 4, seed: int = 3, world_size: int = 1, rank: int = 0, workers: int = 0):
    batches = TrainBatches(size, batch_size, seed=seed, world_size=world_size, rank=rank, shuffle=True)
    return TrainLoader(Numbers(), batches, num_workers=workers)


def seen(batches) -> list[list[int]]:
    return [batch["labels"].tolist() for batch in batches]


def test_an_epoch_is_a_shuffle_into_full_batches_and_epochs_differ():
    train = loader()
    first, second = seen(train), seen(train)
    assert len(train) == len(first) == len(second) == 5
    for epoch in (first, second):
        assert all(len(batch) == 4 for batch in epoch)
        assert len({row for batch in epoch for row in batch}) == 20
    assert first != second
    assert [seen(again := loader()), seen(again)] == [first, second]
    assert seen(loader(seed=4)) != first


def test_set_epoch_chooses_the_epoch():
    train, other = loader(), loader()
    seen(train)
    second = seen(train)
    other.sampler.set_epoch(1)
    assert seen(other) == second
    other.sampler.set_epoch(1)
    assert seen(other) == second


@pytest.mark.parametrize(("accumulate", "batches"), [(1, 5), (2, 4), (4, 4), (5, 5), (6, 5)])
def test_an_epoch_has_whole_steps_of_accumulated_batches(accumulate: int, batches: int):
    """And all it has, where that is less than one step."""
    order = TrainBatches(22, 4, seed=3, world_size=1, rank=0, shuffle=True, accumulate=accumulate)
    assert list(order) == list(TrainBatches(22, 4, seed=3, world_size=1, rank=0, shuffle=True))[:batches]
    assert len(order) == batches


def test_accumulated_batches_are_those_of_a_larger_one():
    larger = TrainBatches(46, 8, seed=3, world_size=1, rank=0, shuffle=True)
    smaller = list(TrainBatches(46, 4, seed=3, world_size=1, rank=0, shuffle=True, accumulate=2))
    assert [a + b for a, b in zip(smaller[::2], smaller[1::2], strict=True)] == list(larger)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batches_of_one_process(world_size: int):
    whole = seen(loader(batch_size=8))
    parts = [seen(loader(batch_size=8 // world_size, world_size=world_size, rank=rank)) for rank in range(world_size)]
    assert [list(chain(*batch)) for batch in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_resume_in_mid_epoch_whatever_their_number_was(world_size: int):
    straight = loader(size=44, batch_size=8)
    expected = seen(straight) + seen(straight)
    before = loader(size=44, batch_size=4, world_size=2, rank=1)
    iterator = iter(before)
    for _ in range(3):
        next(iterator)
    parts = []
    for rank in range(world_size):
        train = loader(size=44, batch_size=8 // world_size, world_size=world_size, rank=rank)
        train.load_state_dict(before.state_dict())
        parts.append(seen(train) + seen(train))
    assert [list(chain(*batch)) for batch in zip(*parts, strict=True)] == expected[3:]


@pytest.mark.parametrize(("size", "world_size"), [(10, 1), (10, 2), (9, 2), (8, 3), (17, 4), (3, 3)])
def test_evaluation_sees_every_sample_once_in_as_many_batches_on_every_rank(size: int, world_size: int):
    shards = []
    for rank in range(world_size):
        batches = EvalBatches(size, 4, seed=0, world_size=world_size, rank=rank, shuffle=False)
        loader = eval_loader(Numbers(), batches, 0)
        shards.append(seen(loader))
        assert len(shards[-1]) == len(loader)
        assert all(1 <= len(batch) <= 4 for batch in shards[-1])
    assert len({len(shard) for shard in shards}) == 1
    assert sorted(row for shard in shards for batch in shard for row in batch) == list(range(size))
    if world_size == 1:
        assert list(chain(*shards[0])) == list(range(size))


@pytest.mark.parametrize("workers", [0, 1])
# Python 3.12 and later warn of any fork in a process that has threads; PyTorch forks its workers by default.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_state_counts_what_was_handed_out_and_resumes_there(workers: int):
    straight = loader()
    expected = seen(straight) + seen(straight)
    train = loader(workers=workers)
    iterator = iter(train)
    got = [next(iterator)["labels"].tolist() for _ in range(3)]
    state = train.state_dict()
    assert state["epoch"] == 0
    assert state["batches"] == 3  # the worker has fetched more
    assert all(type(value) is int for value in state.values())
    resumed = loader()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert len(resumed) == 5
    got += seen(resumed)
    assert len(got) == 5
    got += seen(resumed)
    assert got == expected


def test_a_state_from_the_end_of_an_epoch_begins_the_next():
    straight = loader()
    seen(straight)
    state = straight.state_dict()
    resumed = loader()
    resumed.load_state_dict(state)
    assert seen(resumed) == seen(straight)


def test_a_state_of_other_data_is_loaded_with_a_warning():
    train = loader(size=30)
    with pytest.warns(UserWarning, match=r"samples=22 \(now 30\), batches_per_epoch=5 \(now 7\)"):
        train.load_state_dict(loader().state_dict())


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    seen(loader())
    seen(eval_loader(Numbers(), EvalBatches(9, 4, seed=0, world_size=1, rank=0, shuffle=False), 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_lightning_leaves_samplers_of_this_kind_in_place():
    assert isinstance(loader().sampler, DistributedSampler)


def test_the_module_asks_its_trainer_for_the_rank():
    alone = Digits(batch_size=32)
    alone.setup()
    ranks = []
    for rank in range(2):
        digits = Digits(batch_size=16)
        digits.trainer = SimpleNamespace(world_size=2, global_rank=rank, training=False)
        digits.setup()
        ranks.append(next(iter(digits.train_dataloader())))
        assert len(digits.val_dataloader().sampler) == 6  # 162 samples, 81 a rank
    whole = next(iter(alone.train_dataloader()))
    for key, value in whole.items():
        assert torch.equal(torch.cat([part[key] for part in ranks]), value)


def test_held_out_samples_are_a_tenth_of_each_class_whatever_the_seed():
    def split(seed: int, **arguments: int) -> dict[str, torch.Tensor]:
        digits = Digits(seed=seed, **arguments)
        digits.setup()
        return {name: rows for name, (_, rows) in digits._rows.items()}

    digits = Digits()
    digits.setup()
    labels = digits._rows["train"][0]["labels"].numpy()
    rows = split(0)
    assert sorted(torch.cat(list(rows.values())).tolist()) == list(range(1797))
    assert {name: len(part) for name, part in rows.items()} == {"test": 180, "validation": 162, "train": 1455}
    for name in ("test", "validation"):
        counts = np.bincount(labels[rows[name].numpy()], minlength=10)
        assert np.abs(counts - len(rows[name]) * np.bincount(labels) / 1797).max() <= 1.5
    for name, other in split(1).items():
        assert torch.equal(rows[name], other)
    few = split(2, train_samples=50, eval_samples=7)
    assert {name: len(part) for name, part in few.items()} == {"test": 7, "validation": 7, "train": 50}
    for name, part in few.items():
        assert set(part.tolist()) < set(rows[name].tolist())


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_random_changes_depend_on_seed_epoch_batch_and_rank_alone(workers: int):
    def drawn(passes: int = 2, state: dict[str, int] | None = None, **options: int) -> list[float]:
        train = loader(workers=workers, **options)
        train.transform = lambda batch, generator: {**batch, "drawn": torch.tensor(generator.random())}
        if state:
            train.load_state_dict(state)
        return [float(batch["drawn"]) for _ in range(passes) for batch in train]

    before = torch.get_rng_state()
    whole = drawn()
    assert whole == drawn()
    assert torch.equal(torch.get_rng_state(), before)
    others = [*drawn(seed=4), *drawn(world_size=2, rank=1)]
    assert len({*whole, *others}) == len(whole) + len(others)
    state = {**loader().state_dict(), "epoch": 0, "batches": 3}
    assert drawn(state=state) == whole[3:]
