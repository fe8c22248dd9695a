"""What attention allocates: nothing of the square of the length, in either phase, observed or not."""

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from sat import ops
from sat.attention import AdaptiveAttention
from sat.layout import BlockLayout
from sat.ops import sensitivity, torch_operations

HEADS, BATCH, BLOCK, LENGTH = 1, 1, 64, 2048


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporaries of a constant size, made small beside what would grow."""
    for module in (sensitivity, torch_operations):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", 2**17)


def allocated(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes of the largest allocation, and the most that were held at a time; by PyTorch's allocator on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as watched:
        call()
    results = watched.profiler.kineto_results  # type: ignore[union-attr]
    changes = torch.tensor([event.nbytes() for event in results.events() if event.name() == "[memory]"])
    return int(changes.max()), int(changes.cumsum(0).max())


def training(length: int, *, sparse: bool = False, padded: bool = False, watched: bool = False, **options: object):
    """Forward and backward of an attention module."""
    attention = AdaptiveAttention(HEADS, length, BLOCK, **options)  # type: ignore[arg-type]
    if sparse:
        blocks = torch.arange(length // BLOCK)
        attention.set_layout(BlockLayout((blocks[:, None] - blocks).abs() <= 1, BLOCK))
    inputs = [torch.randn(BATCH, HEADS, length, 16, requires_grad=True) for _ in range(3)]
    real = (torch.arange(length) < length - 5).expand(BATCH, -1) if padded else None

    def call() -> None:
        if watched:
            attention.observe = lambda *_: None  # type: ignore[method-assign]
            attention.observe_samples = BATCH
            attention.block_gate = torch.zeros(attention.layout_mask.shape, requires_grad=True)
        attention(*inputs, key_padding_mask=real).sum().backward()

    return call


def observing(length: int, **options: bool):
    query, key = torch.randn(2, 4, HEADS, length, 16).unbind(0)
    real = (torch.arange(length) < length - 5).expand(4, -1)
    return lambda: ops.attention_statistics(query, key, BLOCK, key_padding_mask=real, **options)


CASES = {
    "dense": training,
    "dense, padded": lambda length: training(length, padded=True),
    "dense, dropout": lambda length: training(length, dropout=0.1),
    "dense, dropout, padded": lambda length: training(length, dropout=0.1, padded=True),
    "dense, causal": lambda length: training(length, is_causal=True),
    "dense, causal, padded": lambda length: training(length, is_causal=True, padded=True),
    "dense, sensitivity": lambda length: training(length, watched=True, padded=True),
    "statistics": observing,
    "statistics, causal": lambda length: observing(length, is_causal=True),
    "sparse": lambda length: training(length, sparse=True),
    "sparse, dropout, padded": lambda length: training(length, sparse=True, dropout=0.1, padded=True),
    "sparse, causal": lambda length: training(length, sparse=True, is_causal=True),
    "sparse, sensitivity": lambda length: training(length, sparse=True, watched=True),
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_has_the_size_of_the_square_of_the_length(case: str) -> None:
    largest, held = allocated(CASES[case](LENGTH))
    assert largest < LENGTH**2  # a matrix of bools for a single head
    assert held < 3 * LENGTH**2


def test_the_square_would_be_seen() -> None:
    largest, _ = allocated(lambda: torch.softmax(torch.randn(LENGTH, 32) @ torch.randn(32, LENGTH), -1))
    assert largest == 4 * LENGTH**2
