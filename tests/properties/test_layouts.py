"""What holds for every layout, shape, mask and threshold, not for examples only."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sat import ops
from sat.layout import BlockLayout
from sat.sparsity.criterion import Criterion
from sat.sparsity.selection import select_blocks
from sat.sparsity.statistics import LayerHistory, best_mass, captured_mass, skewness

masks = arrays.arrays(bool, arrays.array_shapes(min_dims=3, max_dims=3, max_side=7)).map(torch.from_numpy)
sizes = st.integers(1, 64)
# Of scores: ties, both signs, infinities, but no NaN.
numbers = st.one_of(st.sampled_from([0.0, 1.0, -1.0, math.inf, -math.inf]), st.floats(-1e6, 1e6, width=32))


@given(masks, sizes)
def test_a_layout_is_scipys_block_matrix_and_comes_back_from_its_file(mask: torch.Tensor, size: int) -> None:
    layout = BlockLayout(mask, size)
    for head in range(layout.num_heads):
        expected = scipy.sparse.csr_array(mask[head].numpy())
        first, last = int(layout.crow_indices[head, 0]), int(layout.crow_indices[head, -1])
        assert (layout.crow_indices[head] - first).tolist() == expected.indptr.tolist()
        assert layout.col_indices[first:last].tolist() == expected.indices.tolist()
        transposed = scipy.sparse.csr_array(mask[head].T.numpy())
        assert layout.row_indices[first:last].tolist() == transposed.indices.tolist()
    with tempfile.TemporaryDirectory() as folder:
        layout.save(Path(folder) / "x.safetensors")
        assert BlockLayout.load(Path(folder) / "x.safetensors") == layout


@given(masks, st.integers(1, 5), st.data())
def test_the_element_mask_is_the_kronecker_product_cut_to_length(mask: torch.Tensor, size: int, data: st.DataObject):
    lengths = [data.draw(st.integers((blocks - 1) * size + 1, blocks * size)) for blocks in mask.shape[1:]]
    expected = [np.kron(head, np.ones((size, size), bool))[: lengths[0], : lengths[1]] for head in mask.numpy()]
    assert np.array_equal(BlockLayout(mask, size).element_mask(*lengths).numpy(), np.stack(expected))


@settings(max_examples=40)
@given(st.data())
def test_attention_over_any_layout_is_the_masked_softmax_in_float64(data: st.DataObject) -> None:
    heads, size, dim = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    queries, keys = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30))
    seed, causal = data.draw(st.integers(0, 2**20)), data.draw(st.booleans())
    generator = torch.Generator().manual_seed(seed)
    shape = (-(-queries // size), -(-keys // size))
    layout = BlockLayout(torch.rand(heads, *shape, generator=generator) < data.draw(st.sampled_from([0, 0.3, 1])), size)
    kept = torch.rand(2, keys, generator=generator) < data.draw(st.sampled_from([0, 0.5, 1]))
    query, key, value = (
        torch.randn(2, heads, length, dim, generator=generator, dtype=torch.float64) for length in (queries, keys, keys)
    )
    allowed = layout.element_mask(queries, keys) & kept[:, None, None]
    if causal:
        allowed = allowed & torch.ones(queries, keys, dtype=torch.bool).tril()
    scores = (query @ key.mT / dim**0.5).masked_fill(~allowed, -math.inf)
    expected = torch.nan_to_num(scores.softmax(-1)) @ value  # a row of nothing gives 0
    for backend in ("torch", "reference"):
        found = ops.block_sparse_attention(
            query, key, value, layout, key_padding_mask=kept, is_causal=causal, backend=backend
        )
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@given(
    arrays.arrays(np.float32, arrays.array_shapes(min_dims=3, max_dims=3, max_side=6), elements=numbers),
    st.floats(0, 1, exclude_min=True),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_a_selection_keeps_its_budget_its_rows_and_the_best(
    scores: np.ndarray, density: float, diagonal: bool, causal: bool, data: st.DataObject
) -> None:
    _, rows, columns = scores.shape
    least = data.draw(st.integers(0, columns))
    found = select_blocks(
        torch.from_numpy(scores), density=density, keep_diagonal=diagonal, min_blocks_per_row=least, causal=causal
    )
    assert found.shape == scores.shape
    allowed = torch.ones(rows, columns, dtype=torch.bool)
    allowed = allowed.tril() if causal else allowed
    assert not (found & ~allowed).any()
    in_a_row = torch.minimum(allowed.sum(1), torch.tensor(least))
    assert (found.sum(2) >= in_a_row).all()
    budget = int(int(allowed.sum()) * density)
    assert (found.sum((1, 2)) >= budget).all()
    if not diagonal and least == 0:
        assert (found.sum((1, 2)) == budget).all()
        for kept, values in zip(found, torch.from_numpy(scores), strict=True):
            if 0 < budget < int(allowed.sum()):
                assert values[kept].min() >= values[allowed & ~kept].max()


@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
        elements=st.floats(0, 1, width=32),
    ),
    st.data(),
)
def test_mass_lies_between_nothing_and_the_best(pooled: np.ndarray, data: st.DataObject) -> None:
    _, rows, columns = pooled.shape
    size = data.draw(st.integers(1, 8))
    lengths = [data.draw(st.integers((blocks - 1) * size + 1, blocks * size)) for blocks in (rows, columns)]
    mask = torch.from_numpy(data.draw(arrays.arrays(bool, pooled.shape)))
    attention = torch.from_numpy(pooled)
    captured, best = (f(attention, mask, size, *lengths) for f in (captured_mass, best_mass))
    assert -1e-9 <= captured <= best + 1e-9 <= 1 + 2e-9
    everything = captured_mass(attention, torch.ones_like(mask), size, *lengths)
    assert everything == pytest.approx(float((attention.flatten(1).sum(1) > 0).double().mean()), abs=1e-9)


@given(arrays.arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 6)), elements=st.floats(0, 1)))
def test_skewness_is_scipys_or_0_and_always_finite(matrix: np.ndarray) -> None:
    found = float(skewness(torch.from_numpy(matrix)))
    assert math.isfinite(found)
    if matrix.std() > 1e-3 * max(matrix.mean(), 1e-3):
        assert found == pytest.approx(float(scipy.stats.skew(matrix, axis=None)), rel=1e-6, abs=1e-6)


@given(
    st.lists(arrays.arrays(np.float32, (3, 3), elements=st.floats(0, 1, width=32)), min_size=1, max_size=8),
    st.floats(0, 1, exclude_max=True),
    st.floats(-10, 10),
    st.floats(0, 1e6, exclude_min=True),
    st.integers(1, 4),
)
def test_whatever_is_observed_the_criterion_says_yes_or_what_is_missing(
    observed: list[np.ndarray], smoothing: float, theta: float, delta: float, patience: int
) -> None:
    history, criterion, streak = LayerHistory(smoothing), Criterion(theta, delta, smoothing, patience), 0
    for matrix in observed:
        history.update(torch.from_numpy(matrix), float(skewness(torch.from_numpy(matrix))))
        verdict = criterion.judge(history, streak)
        assert verdict.met == (not verdict.missing)
        assert not verdict.met or verdict.streak >= patience
        assert verdict.streak in (0, streak + 1)
        assert not verdict.met or history.observations >= 2 + patience
        streak = verdict.streak
    copy = LayerHistory(smoothing)
    copy.load_state_dict(history.state_dict())
    assert criterion.judge(copy, streak) == criterion.judge(history, streak)
