# Fixed structures: against layouts that DeepSpeed made, and against loops written from its formulas.
from __future__ import annotations

import base64
import inspect
import json
import math
import random
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sat.layout import BlockLayout
from sat.ops import block_sparse_attention
from sat.patterns import BigBird, Dense, Fixed, Longformer, SlidingWindow, Variable, from_deepspeed

MODES = {
    "dense": Dense,
    "fixed": Fixed,
    "variable": Variable,
    "bigbird": BigBird,
    "bslongformer": Longformer,
    "local_sliding_window": SlidingWindow,
    "local": SlidingWindow,
}
CLASSES = [Dense, Fixed, Variable, BigBird, Longformer, SlidingWindow]
EXAMPLES = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / "structures.md").read_text(), re.DOTALL
)


def rows(mask: Tensor) -> list[str]:
    return ["".join("#" if kept else "." for kept in row) for row in mask.tolist()]


# --- what DeepSpeed made ------------------------------------------------------------------------------------------


def test_deepspeeds_own_layouts(shared_data: Path) -> None:
    file = shared_data / "design" / "deepspeed_layouts.json"
    if not file.is_file():
        pytest.skip(f"no {file}")
    cases = json.loads(file.read_text())
    assert len(cases) >= 16
    for case in cases:
        shape = case["layout"]["shape"]
        bits = np.unpackbits(np.frombuffer(base64.b64decode(case["layout"]["packbits_b64"]), np.uint8))
        expected = torch.from_numpy(bits[: math.prod(shape)].reshape(shape)).bool()
        structure = MODES[case["mode"]](**case["kwargs"])
        mask = structure.layout(case["seq_len"]).mask
        if structure.is_causal:
            expected = expected.tril()  # DeepSpeed's Fixed and Variable let the future in
        if not case["random"]:
            assert torch.equal(mask, expected), case
            continue
        fixed = MODES[case["mode"]](**{**case["kwargs"], "num_random_blocks": 0}).layout(case["seq_len"]).mask
        for found in (mask, expected):
            assert found.shape == fixed.shape
            assert (fixed <= found).all()
            assert ((found & ~fixed).sum(2) <= structure.num_random_blocks).all()
            assert (found & ~fixed).any()


@pytest.mark.parametrize(
    ("structure", "seq_len", "expected"),
    [
        (Fixed(1, num_local_blocks=2), 80, ["##.##", "##.##", ".####", ".####", ".#.##"]),
        # The tail is shorter than its global blocks: they start one block before it.
        (
            Fixed(1, num_local_blocks=4, num_global_blocks=2),
            80,
            ["#####", "#####", "#####", "#####", "..###"],
        ),
        (
            Fixed(1, num_local_blocks=3, horizontal_global_attention=True),
            80,
            ["###.#", "###.#", "#####", "..###", "#####"],
        ),
        # DeepSpeed set column 3 of row 2 here, and column 5 of row 4: blocks of the future.
        (
            Fixed(1, num_local_blocks=2, num_global_blocks=2, attention="unidirectional"),
            96,
            ["#.....", "##....", "###...", "####..", "#####.", "######"],
        ),
        (
            Variable(1, local_window_blocks=[1, 2], global_block_indices=[3, 9]),
            96,
            ["#..#..", ".###..", ".###..", "...##.", "...##.", "...#.#"],
        ),
        # DeepSpeed set columns 2 and 3 of all rows from 1 on.
        (
            Variable(
                1,
                local_window_blocks=[1],
                global_block_indices=[1],
                global_block_end_indices=[4],
                attention="unidirectional",
            ),
            80,
            ["#....", ".#...", ".##..", ".###.", ".####"],
        ),
        (BigBird(1, num_random_blocks=0), 80, ["#####", "###..", "####.", "#.###", "#..##"]),
        (
            BigBird(1, num_random_blocks=0, num_global_blocks=2, attention="unidirectional"),
            80,
            ["#....", "##...", "###..", "####.", "##.##"],
        ),
        (
            Longformer(1, num_sliding_window_blocks=1, global_block_indices=[2]),
            80,
            ["#.#..", ".##..", "#####", "..##.", "..#.#"],
        ),
        (SlidingWindow(1), 64, ["#...", "##..", ".##.", "..##"]),
        (SlidingWindow(1, num_sliding_window_blocks=2, attention="bidirectional"), 48, ["##.", "###", ".##"]),
        (Dense(1), 17, ["##", "##"]),
        (Fixed(1), 1, ["#"]),
    ],
    ids=repr,
)
def test_small_layouts(structure: Any, seq_len: int, expected: list[str]) -> None:
    assert rows(structure.layout(seq_len).mask[0]) == expected


def test_heads_take_their_global_blocks_in_turn() -> None:
    fixed = Fixed(5, different_layout_per_head=True, num_local_blocks=3, num_different_global_patterns=3)
    mask = fixed.layout(96).mask
    patterns = [("###..#", "..####"), ("###.#.", ".#.###"), ("####..", "#..###")]
    for head in range(5):
        upper, lower = patterns[head % 3]
        assert rows(mask[head]) == [upper] * 3 + [lower] * 3


# --- loops written from the formulas ------------------------------------------------------------------------------


def windows(mask: Tensor, sizes: list[int]) -> None:
    start = place = 0
    while start < len(mask):
        end = min(start + sizes[min(place, len(sizes) - 1)], len(mask))
        for row in range(start, end):
            for column in range(start, end):
                mask[row, column] = True
        start, place = end, place + 1


def fill(mask: Tensor, start: int, end: int, horizontal: bool) -> None:
    for index in range(max(start, 0), min(end, len(mask))):
        for other in range(len(mask)):
            mask[other, index] = True
            if horizontal:
                mask[index, other] = True


def sliding(mask: Tensor, size: int) -> None:
    for row in range(len(mask)):
        for column in range(len(mask)):
            if abs(row - column) <= size // 2:
                mask[row, column] = True


def ranges(structure: Any) -> list[tuple[int, int]]:
    starts, ends = structure.global_block_indices, structure.global_block_end_indices
    return [(s, s + 1) for s in starts] if ends is None else list(zip(starts, ends, strict=True))


def by_loops(structure: Any, blocks: int, head: int) -> Tensor:
    """One head's layout, without random blocks."""
    mask = torch.zeros(blocks, blocks, dtype=torch.bool)
    if isinstance(structure, Dense):
        mask[:] = True
    if isinstance(structure, Fixed):
        local, count = structure.num_local_blocks, structure.num_global_blocks
        windows(mask, [local])
        first = local - (1 + head % structure.num_different_global_patterns) * count
        end = blocks - blocks % local
        for start in range(first, end, local):
            fill(mask, start, start + count, structure.horizontal_global_attention)
        if blocks % local:
            start = min(end + first, blocks - count)
            fill(mask, start, start + count, structure.horizontal_global_attention)
    if isinstance(structure, Variable):
        windows(mask, list(structure.local_window_blocks))
        for start, end in ranges(structure):
            fill(mask, start, end, structure.horizontal_global_attention)
    if isinstance(structure, (BigBird, Longformer, SlidingWindow)):
        sliding(mask, structure.num_sliding_window_blocks)
    if isinstance(structure, BigBird):
        fill(mask, 0, structure.num_global_blocks, True)
    if isinstance(structure, Longformer):
        for start, end in ranges(structure):
            fill(mask, start, end, True)
    if structure.is_causal:
        for row in range(blocks):
            for column in range(row + 1, blocks):
                mask[row, column] = False
    return mask


ATTENTION = st.sampled_from(["bidirectional", "unidirectional"])
SMALL = st.integers(1, 6)


@st.composite
def directions(draw: st.DrawFn) -> dict[str, Any]:
    attention = draw(ATTENTION)
    return {"attention": attention, "horizontal_global_attention": attention == "bidirectional" and draw(st.booleans())}


@st.composite
def global_ranges(draw: st.DrawFn) -> dict[str, Any]:
    pairs = draw(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 5)), max_size=3))
    ends = draw(st.booleans())
    return {
        "global_block_indices": [start for start, _ in pairs],
        "global_block_end_indices": [start + size for start, size in pairs] if ends else None,
    }


@st.composite
def structures(draw: st.DrawFn) -> Any:
    kind = draw(st.sampled_from(CLASSES))
    common = {"num_heads": draw(st.integers(1, 4)), "block_size": draw(st.sampled_from([1, 3, 16]))}
    if kind is not SlidingWindow:
        common["different_layout_per_head"] = draw(st.booleans())
    if kind is Dense:
        return Dense(**common)
    if kind is Fixed:
        count, places = draw(st.integers(1, 3)), draw(SMALL)
        patterns = draw(st.integers(1, places)) if common["different_layout_per_head"] else 1
        return Fixed(
            **common,
            **draw(directions()),
            num_local_blocks=count * places,
            num_global_blocks=count,
            num_different_global_patterns=patterns,
        )
    if kind is Variable:
        sizes = draw(st.lists(SMALL, min_size=1, max_size=4))
        return Variable(**common, **draw(directions()), **draw(global_ranges()), local_window_blocks=sizes)
    common |= {"attention": draw(ATTENTION), "num_sliding_window_blocks": draw(SMALL)}
    if kind is BigBird:
        return BigBird(**common, num_random_blocks=0, num_global_blocks=draw(st.integers(0, 4)))
    return Longformer(**common, **draw(global_ranges())) if kind is Longformer else SlidingWindow(**common)


@settings(max_examples=300)
@given(structure=structures(), blocks=st.integers(1, 19), missing=st.integers(0, 15))
def test_formulas(structure: Any, blocks: int, missing: int) -> None:
    layout = structure.layout(blocks * structure.block_size - missing % structure.block_size)
    assert layout.mask.shape == (structure.num_heads, blocks, blocks)
    assert layout.block_size == structure.block_size
    assert layout.mask.is_contiguous()
    for head in range(structure.num_heads):
        expected = by_loops(structure, blocks, head if structure.different_layout_per_head else 0)
        assert torch.equal(layout.mask[head], expected)


# --- properties ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2, 5, 16, 33])
@pytest.mark.parametrize(
    "structure",
    [
        Fixed(3, attention="unidirectional", num_local_blocks=4, num_global_blocks=2),
        Fixed(
            8,
            different_layout_per_head=True,
            attention="unidirectional",
            num_local_blocks=6,
            num_global_blocks=3,
            num_different_global_patterns=2,
        ),
        Variable(2, attention="unidirectional", global_block_indices=[0, 3], global_block_end_indices=[2, 9]),
        Variable(2, attention="unidirectional", num_random_blocks=1, different_layout_per_head=True),
        BigBird(2, attention="unidirectional", num_global_blocks=3, different_layout_per_head=True),
        Longformer(2, attention="unidirectional", global_block_indices=[0, 4]),
        SlidingWindow(2),
    ],
    ids=repr,
)
def test_nothing_above_the_diagonal(structure: Any, blocks: int) -> None:
    mask = structure.layout(16 * blocks).mask
    assert structure.is_causal
    assert not mask.triu(1).any()
    assert mask.diagonal(dim1=1, dim2=2).all()


@pytest.mark.parametrize(
    "structure",
    [
        Dense(2),
        Fixed(4, different_layout_per_head=True, horizontal_global_attention=True, num_different_global_patterns=4),
        Variable(2, horizontal_global_attention=True, global_block_indices=[0, 7]),
        BigBird(2, num_random_blocks=0),
        Longformer(2, global_block_indices=[3]),
        SlidingWindow(2, attention="bidirectional"),
    ],
    ids=repr,
)
def test_symmetric(structure: Any) -> None:
    mask = structure.layout(301).mask
    assert not structure.is_causal
    assert torch.equal(mask, mask.mT)


@pytest.mark.parametrize("kind", [Variable, BigBird])
@pytest.mark.parametrize("attention", ["bidirectional", "unidirectional"])
@pytest.mark.parametrize("count", [1, 3, 12])
def test_random_blocks_a_row(kind: Any, attention: str, count: int) -> None:
    if kind is BigBird and attention == "unidirectional":
        count = 1  # the first row has no more
    # With a window of the diagonal only and no globals, every row has its random blocks and perhaps one more.
    bare: dict[str, Any] = (
        {"local_window_blocks": [1], "global_block_indices": []}
        if kind is Variable
        else {"num_sliding_window_blocks": 1, "num_global_blocks": 0}
    )
    structure = kind(6, 16, True, count, attention=attention, **bare)
    counts = structure.layout(12 * 16).mask.sum(2)
    available = torch.arange(1, 13) if attention == "unidirectional" else torch.full((12,), 12)
    expected = available.clamp(max=count)
    assert (counts >= expected).all()
    assert (counts <= (expected + 1).minimum(available)).all()
    if count < 12:
        assert (counts == expected).any()
        assert (counts == expected + 1).any()


@pytest.mark.parametrize("attention", ["bidirectional", "unidirectional"])
def test_random_blocks_are_drawn_evenly(attention: str) -> None:
    heads, blocks = 4000, 7
    count = 1 if attention == "unidirectional" else 3
    structure = BigBird(heads, 16, True, count, 1, 0, attention)  # type: ignore[arg-type]
    share = structure.layout(blocks * 16).mask.double().mean(0)
    for row in range(blocks):
        available = row + 1 if attention == "unidirectional" else blocks
        expected = torch.full((blocks,), min(count / available, 1), dtype=torch.float64)
        expected[available:] = 0
        expected[row] = 1  # the window
        # Four standard errors of a share of 4,000 draws are at most .032.
        torch.testing.assert_close(share[row], expected, atol=0.032, rtol=0)


def test_heads_differ_only_where_asked() -> None:
    for kind in (Variable, BigBird):
        shared = kind(3, num_random_blocks=2).layout(512).mask
        assert torch.equal(shared, shared[:1].expand_as(shared))
        own = kind(3, num_random_blocks=2, different_layout_per_head=True).layout(512).mask
        assert not torch.equal(own[0], own[1])
        assert not torch.equal(own[1], own[2])
        assert torch.equal(own[0], shared[0])
    patterns = Fixed(4, different_layout_per_head=True, num_different_global_patterns=2).layout(512).mask
    assert torch.equal(patterns[0], patterns[2])
    assert torch.equal(patterns[1], patterns[3])
    assert not torch.equal(patterns[0], patterns[1])


@pytest.mark.parametrize("kind", [Variable, BigBird])
def test_seeds(kind: Any) -> None:
    structure, same, other = (
        kind(2, num_random_blocks=2, different_layout_per_head=True, seed=seed) for seed in (3, 3, 4)
    )
    first = structure.layout(640)
    structure.layout(320)  # a length in between changes nothing
    assert first == structure.layout(640) == same.layout(640)
    assert first != other.layout(640)
    # Two structures of one length share nothing.
    assert kind(2, num_random_blocks=0).layout(640) != first


def test_the_programs_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]  # noqa: NPY002
    first = BigBird(2, num_random_blocks=3).layout(500)
    Variable(2, num_random_blocks=3).layout(500)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # type: ignore[index]  # noqa: NPY002
    assert random.getstate() == states[2]
    torch.manual_seed(6)
    assert BigBird(2, num_random_blocks=3).layout(500) == first


def test_layouts_are_made_on_the_cpu() -> None:
    with torch.device("meta"):
        layout = BigBird(2).layout(100)
    assert layout.device.type == "cpu"
    assert layout == BigBird(2).layout(100)


def test_a_layout_is_its_own() -> None:
    structure = Fixed(2)
    structure.layout(100).mask.fill_(False)
    assert structure.layout(100).nnz > 0


def test_a_long_sequence() -> None:
    layout = BigBird(1, attention="unidirectional").layout(65_536)
    # First row 1; second 2; others a window of 2, the first column unless it is in the window, and a random block.
    assert layout.shape == (4096, 4096)
    fixed = 1 + 2 + 3 * 4094
    assert fixed < layout.nnz <= fixed + 4096


def test_causal_attention_hides_the_future() -> None:
    structure = Fixed(2, num_local_blocks=4, num_global_blocks=2, attention="unidirectional")
    query, key, value = torch.randn(3, 1, 2, 100, 8).unbind(0)

    def attend() -> Tensor:
        return block_sparse_attention(query, key, value, structure.layout(100), is_causal=structure.is_causal)

    before = attend()
    key[:, :, 70:] += 1
    value[:, :, 70:] += 1
    after = attend()
    assert torch.equal(before[:, :, :70], after[:, :, :70])
    assert not torch.equal(before[:, :, 70:], after[:, :, 70:])


# --- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Dense, {"num_heads": None, "block_size": 16, "different_layout_per_head": False}),
        (
            Fixed,
            {
                "num_heads": None,
                "block_size": 16,
                "different_layout_per_head": False,
                "num_local_blocks": 4,
                "num_global_blocks": 1,
                "attention": "bidirectional",
                "horizontal_global_attention": False,
                "num_different_global_patterns": 1,
            },
        ),
        (
            Variable,
            {
                "num_heads": None,
                "block_size": 16,
                "different_layout_per_head": False,
                "num_random_blocks": 0,
                "local_window_blocks": (4,),
                "global_block_indices": (0,),
                "global_block_end_indices": None,
                "attention": "bidirectional",
                "horizontal_global_attention": False,
                "seed": 0,
            },
        ),
        (
            BigBird,
            {
                "num_heads": None,
                "block_size": 16,
                "different_layout_per_head": False,
                "num_random_blocks": 1,
                "num_sliding_window_blocks": 3,
                "num_global_blocks": 1,
                "attention": "bidirectional",
                "seed": 0,
            },
        ),
        (
            Longformer,
            {
                "num_heads": None,
                "block_size": 16,
                "different_layout_per_head": False,
                "num_sliding_window_blocks": 3,
                "global_block_indices": (0,),
                "global_block_end_indices": None,
                "attention": "bidirectional",
            },
        ),
        (
            SlidingWindow,
            {"num_heads": None, "block_size": 16, "num_sliding_window_blocks": 3, "attention": "unidirectional"},
        ),
    ],
)
def test_names_defaults_and_order_are_deepspeeds(kind: Any, expected: dict[str, Any]) -> None:
    parameters = inspect.signature(kind).parameters
    found = {name: None if p.default is p.empty else p.default for name, p in parameters.items()}
    assert list(found.items()) == list(expected.items())


@pytest.mark.parametrize("kind", CLASSES)
def test_attributes(kind: Any) -> None:
    structure = kind(3, 32)
    assert (structure.num_heads, structure.block_size, structure.different_layout_per_head) == (3, 32, False)
    assert structure.attention == ("unidirectional" if kind is SlidingWindow else "bidirectional")
    assert structure.is_causal is (kind is SlidingWindow)
    # A structure prints as the code that makes it.
    assert repr(structure).startswith(f"{kind.__name__}(num_heads=3, block_size=32")
    names = {kind.__name__: kind}
    assert repr(eval(repr(structure), names)) == repr(structure)


@pytest.mark.parametrize("kind", CLASSES)
def test_block_is_block_size(kind: Any) -> None:
    assert kind(2).block_size == 16
    assert kind(2, block=32).block_size == 32
    assert kind(2, 32, block=32).block_size == 32
    assert kind(2, block_size=32, block=32).block_size == 32
    for arguments in ({"block_size": 64}, {"block_size": 16}):
        with pytest.raises(ValueError, match=rf"block_size={arguments['block_size']} and block=32 .* give one"):
            kind(2, block=32, **arguments)
    with pytest.raises(ValueError, match="block_size=16 and block=32"):
        kind(2, 16, block=32)
    with pytest.raises(TypeError, match="block_size must be an integer, got 'x'"):
        kind(2, block="x")


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", ["num_heads", "block_size"])
def test_sizes(kind: Any, name: str) -> None:
    for wrong in (0, -3):
        with pytest.raises(ValueError, match=f"^{name} must be at least 1, got {wrong}$"):
            kind(**{"num_heads": 2, name: wrong})
    for wrong in (True, 2.0, "2", None):
        with pytest.raises(TypeError, match=f"^{name} must be an integer, got {wrong!r}$"):
            kind(**{"num_heads": 2, name: wrong})


@pytest.mark.parametrize("kind", CLASSES)
def test_lengths(kind: Any) -> None:
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"^seq_len must be at least 1, got {wrong}$"):
            kind(2).layout(wrong)
    for wrong in (64.0, True, None):
        with pytest.raises(TypeError, match=f"^seq_len must be an integer, got {wrong!r}$"):
            kind(2).layout(wrong)


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "sentence"),
    [
        *(
            (
                kind,
                {"attention": "causal"},
                ValueError,
                "attention must be 'bidirectional' or 'unidirectional', got 'cau",
            )
            for kind in CLASSES
            if kind is not Dense
        ),
        *(
            (
                kind,
                {"different_layout_per_head": 1},
                TypeError,
                "different_layout_per_head must be True or False, got 1",
            )
            for kind in CLASSES
            if kind is not SlidingWindow
        ),
        *(
            (
                kind,
                {"num_sliding_window_blocks": size},
                ValueError,
                f"num_sliding_window_blocks must be .* 1, got {size}",
            )
            for kind in (BigBird, Longformer, SlidingWindow)
            for size in (0, -3)
        ),
        *(
            (kind, {"num_random_blocks": -1}, ValueError, "num_random_blocks must be at least 0, got -1")
            for kind in (Variable, BigBird)
        ),
        *(
            (
                kind,
                {"horizontal_global_attention": True, "attention": "unidirectional"},
                ValueError,
                "horizontal_.*future",
            )
            for kind in (Fixed, Variable)
        ),
        *(
            (
                kind,
                {"horizontal_global_attention": "no"},
                TypeError,
                "horizontal_global_attention must be True or False",
            )
            for kind in (Fixed, Variable)
        ),
        *(
            (kind, arguments, error, sentence)
            for kind in (Variable, Longformer)
            for arguments, error, sentence in [
                (
                    {"global_block_indices": [0, -1]},
                    ValueError,
                    r"global_block_indices\[1\] must be at least 0, got -1",
                ),
                ({"global_block_indices": [0.0]}, TypeError, r"global_block_indices\[0\] must be an integer, got 0.0"),
                ({"global_block_indices": 3}, TypeError, "global_block_indices must be a list of integers .* got 3"),
                (
                    {"global_block_end_indices": [1, 2]},
                    ValueError,
                    "global_block_end_indices must have an end for each of the 1 global_block_indices, got 2",
                ),
                (
                    {"global_block_indices": [4], "global_block_end_indices": [4]},
                    ValueError,
                    "got the start 4 and the end 4",
                ),
            ]
        ),
        (Fixed, {"num_local_blocks": 0}, ValueError, "num_local_blocks must be at least 1, got 0"),
        (Fixed, {"num_global_blocks": 0}, ValueError, "num_global_blocks must be at least 1, got 0"),
        (Fixed, {"num_different_global_patterns": 0}, ValueError, "num_different_global_patterns must be at least 1"),
        (Fixed, {"num_local_blocks": 4.0}, TypeError, "num_local_blocks must be an integer, got 4.0"),
        (Fixed, {"num_global_blocks": 3}, ValueError, "must be a multiple of num_global_blocks, got 4 and 3"),
        (Fixed, {"num_different_global_patterns": 2}, ValueError, "set different_layout_per_head=True"),
        (
            Fixed,
            {"num_different_global_patterns": 3, "num_global_blocks": 2, "different_layout_per_head": True},
            ValueError,
            "at most num_local_blocks / num_global_blocks = 2, .* got 3",
        ),
        (Variable, {"local_window_blocks": []}, ValueError, r"local_window_blocks is empty; .* such as \[4\]"),
        (Variable, {"local_window_blocks": [2, 0]}, ValueError, r"local_window_blocks\[1\] must be at least 1, got 0"),
        (
            Variable,
            {"local_window_blocks": 4},
            TypeError,
            r"local_window_blocks must be a list .* such as \[4\], got 4",
        ),
        (Variable, {"local_window_blocks": "4"}, TypeError, "local_window_blocks must be a list of integers"),
        (Variable, {"local_window_blocks": [True]}, TypeError, "must be an integer, got True"),
        (BigBird, {"num_global_blocks": -1}, ValueError, "num_global_blocks must be at least 0, got -1"),
        (BigBird, {"num_random_blocks": 1.5}, TypeError, "num_random_blocks must be an integer, got 1.5"),
        (BigBird, {"seed": None}, TypeError, "seed must be an integer, got None"),
        (Variable, {"seed": -1}, ValueError, "seed must be at least 0, got -1"),
    ],
)
def test_refusals(kind: Any, arguments: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        kind(2, **arguments)


@pytest.mark.parametrize("count", [2, 5])
def test_more_random_blocks_than_a_causal_row_has(count: int) -> None:
    with pytest.raises(ValueError, match=f"num_random_blocks is {count}, .* the first row has only that one"):
        BigBird(2, num_random_blocks=count, attention="unidirectional")


@pytest.mark.parametrize(
    ("kind", "attention"),
    [(Variable, "bidirectional"), (Variable, "unidirectional"), (BigBird, "bidirectional")],
)
def test_more_random_blocks_than_a_row_has(kind: Any, attention: str) -> None:
    structure = kind(2, 32, num_random_blocks=5, attention=attention)
    with pytest.raises(ValueError, match=r"num_random_blocks is 5, but a row has only 4 blocks of 32 tokens"):
        structure.layout(128)
    full = structure.layout(129).mask[0]  # five blocks: each row takes all that it may see
    assert torch.equal(full, torch.ones(5, 5).tril().bool() if structure.is_causal else torch.ones(5, 5).bool())


# --- DeepSpeed's configuration files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, Fixed(4)),
        ({"mode": "dense", "block": 64}, Dense(4, 64)),
        (
            {
                "mode": "fixed",
                "block": 32,
                "different_layout_per_head": True,
                "num_local_blocks": 8,
                "num_global_blocks": 2,
                "attention": "bidirectional",
                "horizontal_global_attention": True,
                "num_different_global_patterns": 4,
            },
            Fixed(4, 32, True, 8, 2, "bidirectional", True, 4),
        ),
        (
            {
                "mode": "variable",
                "num_random_blocks": 2,
                "local_window_blocks": [1, 2],
                "global_block_indices": [0, 3],
                "global_block_end_indices": [1, 5],
                "attention": "unidirectional",
                "horizontal_global_attention": False,
            },
            Variable(4, 16, False, 2, [1, 2], [0, 3], [1, 5], "unidirectional"),
        ),
        ({"mode": "variable", "global_block_end_indices": None}, Variable(4)),
        ({"mode": "bigbird", "num_random_blocks": 2, "num_global_blocks": 2}, BigBird(4, 16, False, 2, 3, 2)),
        # DeepSpeed's reader of files takes no random blocks where none are named.
        ({"mode": "bigbird", "attention": "unidirectional"}, BigBird(4, 16, False, 0, attention="unidirectional")),
        (
            {"mode": "bslongformer", "num_sliding_window_blocks": 5, "global_block_indices": [2]},
            Longformer(4, 16, False, 5, [2]),
        ),
        ({"mode": "local_sliding_window", "attention": "bidirectional"}, SlidingWindow(4, attention="bidirectional")),
        ({"mode": "local", "block": 8, "num_sliding_window_blocks": 5}, SlidingWindow(4, 8, 5)),
    ],
)
def test_from_deepspeed(section: dict[str, Any], expected: Any) -> None:
    kept = json.loads(json.dumps(section))
    for config in (section, {"train_batch_size": 8, "sparse_attention": section}):
        structure = from_deepspeed(config, 4)
        assert repr(structure) == repr(expected)
        assert structure.layout(300) == expected.layout(300)
    assert section == kept


def test_keys_of_other_modes_are_warned_of() -> None:
    # The example of DeepSpeed's documentation: one section with the keys of all modes.
    section = {
        "mode": "fixed",
        "block": 16,
        "different_layout_per_head": True,
        "num_local_blocks": 4,
        "num_global_blocks": 1,
        "attention": "bidirectional",
        "horizontal_global_attention": False,
        "num_different_global_patterns": 4,
        "num_random_blocks": 0,
        "local_window_blocks": [4],
        "global_block_indices": [0],
        "global_block_end_indices": None,
        "num_sliding_window_blocks": 3,
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        structure = from_deepspeed(section, 4)
    assert repr(structure) == repr(Fixed(4, different_layout_per_head=True, num_different_global_patterns=4))
    said = [str(warning.message) for warning in caught]
    assert [text.split("=")[0] for text in said] == list(section)[-5:]
    assert all(" has no effect here: the mode is 'fixed', and " in text for text in said)
    assert said[0].endswith("num_random_blocks is for 'variable', 'bigbird' only")
    assert all(warning.filename == __file__ for warning in caught)


def test_a_dense_section_that_wants_to_be_causal_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="attention='unidirectional' .* the mode is 'dense', .* give is_causal=True"):
        assert not from_deepspeed({"mode": "dense", "attention": "unidirectional"}, 2).is_causal
    with pytest.warns(UserWarning, match="different_layout_per_head=True .* has no effect here"):
        from_deepspeed({"mode": "local", "different_layout_per_head": True}, 2)


@pytest.mark.parametrize(
    ("config", "error", "sentence"),
    [
        ([], TypeError, "must be a mapping of names to values, got list; read a file with json.load"),
        ("ds_config.json", TypeError, "must be a mapping .* got str"),
        (None, TypeError, "must be a mapping .* got NoneType"),
        ({"sparse_attention": None}, TypeError, "section sparse_attention .* got NoneType"),
        (
            {"mode": "bigbrid"},
            ValueError,
            r"mode must be one of 'dense', .* got 'bigbrid' \(did you mean 'bigbird'\?\)",
        ),
        ({"mode": "zzz"}, ValueError, r"got 'zzz'$"),
        ({"mode": None}, ValueError, "mode must be one of .* got None"),
        ({"mode": ["fixed"]}, ValueError, "mode must be one of"),
        (
            {"num_differnt_global_patterns": 2},
            ValueError,
            r"no key 'num_differnt_global_patterns' \(did you mean 'num_different_global_patterns'\?\); its keys",
        ),
        (
            {"block_size": 16},
            ValueError,
            r"no key 'block_size' .* its keys are mode, block, different_layout_per_head, ",
        ),
        ({"seed": 1}, ValueError, "no key 'seed'"),
        ({"num_heads": 4}, ValueError, "no key 'num_heads'"),
        ({1: 2}, ValueError, "no key 1"),
        ({"train_batch_size": 8}, ValueError, "no key 'train_batch_size'"),
        ({"block": None}, TypeError, "block_size must be an integer, got None"),
        ({"num_local_blocks": "4"}, TypeError, "num_local_blocks must be an integer, got '4'"),
        ({"mode": "variable", "local_window_blocks": []}, ValueError, "local_window_blocks is empty"),
    ],
)
def test_from_deepspeed_refuses(config: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        from_deepspeed(config, 4)


# --- the how-to ---------------------------------------------------------------------------------------------------


def test_the_picture_shows_what_the_how_to_makes(tmp_path: Path) -> None:
    from experiments.draw_structures import STRUCTURES, draw

    names: dict[str, Any] = {}
    exec(EXAMPLES[0], names)
    assert {title: repr(made) for title, made in names["structures"].items()} == {
        title: repr(made) for title, (_, made) in STRUCTURES.items()
    }
    for code, made in STRUCTURES.values():
        assert repr(eval(code, dict(names))) == repr(made)
    figure = draw(tmp_path / "structures.png")
    assert (tmp_path / "structures.png").read_bytes().startswith(b"\x89PNG")
    for axes, (_, made) in zip(figure.axes, STRUCTURES.values(), strict=True):
        assert torch.equal(torch.as_tensor(axes.get_images()[0].get_array()).bool(), made.layout(256).mask[0])


def test_ones_own_structure() -> None:
    names: dict[str, Any] = {}
    exec(EXAMPLES[-1], names)
    layout = names["Strided"](16, 2).layout(70)
    assert isinstance(layout, BlockLayout)
    assert rows(layout.mask[0]) == ["#....", ".#...", "#.#..", ".#.#.", "#.#.#"]
