import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from sat import ops
from sat.ops import torch_operations


def explicit(query, key, *, keep=None, keep_queries=None, causal=False, scale):
    """Weights ``[B, H, L, S]`` in NumPy and SciPy."""
    scores = np.einsum("bhld,bhsd->bhls", query.double().numpy(), key.double().numpy()) * scale
    if keep is not None:
        scores = np.where(keep.numpy()[:, None, None], scores, -np.inf)
    if causal:
        scores = np.where(np.tri(*scores.shape[2:], dtype=bool), scores, -np.inf)
    empty = np.isneginf(scores).all(-1, keepdims=True)
    weights = np.where(empty, 0, scipy.special.softmax(np.where(empty, 0, scores), -1))
    return weights if keep_queries is None else weights * keep_queries.numpy()[:, None, :, None]


@pytest.mark.parametrize("chunk", [None, 100])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"keep": 1}, {"keep": 1, "keep_queries": 1, "causal": 1}], ids=str
)
@pytest.mark.parametrize(("length", "keys", "size"), [(64, 64, 16), (61, 61, 16), (50, 70, 32), (1, 9, 4)])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equals_scipy_on_the_explicit_matrix(backend, length, keys, size, options, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(torch_operations, "CHUNK_ELEMENTS", chunk)
    query = 2 * torch.randn(3, length, 2, 8).transpose(1, 2)
    key = torch.randn(3, 2, keys, 8)
    options = dict(options)
    if "keep" in options:
        options["keep"] = torch.arange(keys) < torch.tensor([[keys], [keys // 2], [0]])
    if "keep_queries" in options:
        options["keep_queries"] = torch.arange(length) < torch.tensor([[length], [length // 2], [0]])
    weights = explicit(query, key, scale=0.4, **options)
    matrix = weights.mean((0, 1))
    statistics = ops.attention_statistics(
        query,
        key,
        size,
        key_padding_mask=options.get("keep"),
        query_padding_mask=options.get("keep_queries"),
        is_causal=bool(options.get("causal")),
        scale=0.4,
        score_matrix=True,
        backend=backend,
    )
    np.testing.assert_allclose(statistics.score_matrix.numpy(), matrix, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(statistics.skewness.item(), scipy.stats.skew(matrix, axis=None), rtol=1e-3)
    per_head = weights.mean(0)
    for row, column in np.ndindex(statistics.pooled.shape[1:]):
        block = per_head[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
        np.testing.assert_allclose(statistics.pooled[:, row, column], block.mean((1, 2)), rtol=1e-4, atol=1e-7)
    lean = ops.attention_statistics(query, key, size, backend=backend)
    assert lean.score_matrix is None


@pytest.mark.parametrize("chunk", [2**22, 100])
@pytest.mark.parametrize("length", [4, 25, 75, 100])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_constant_matrix_leans_to_neither_side(backend, length, chunk, monkeypatch):
    monkeypatch.setattr(torch_operations, "CHUNK_ELEMENTS", chunk)
    zeros = torch.zeros(3, 2, length, 8)
    assert ops.attention_statistics(zeros, zeros, 2, backend=backend).skewness == 0
    nothing = torch.zeros(3, length, dtype=torch.bool)
    query = torch.randn(3, 2, length, 8)
    options = {"query_padding_mask": nothing, "backend": backend}
    assert ops.attention_statistics(query, query, 2, **options).skewness == 0


def test_autocast_changes_nothing():
    query, key = torch.randn(2, 3, 2, 40, 16).unbind(0)
    for backend in ("reference", "torch"):
        expected = ops.attention_statistics(query, key, 16, score_matrix=True, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = ops.attention_statistics(query, key, 16, score_matrix=True, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(inside[:3], expected[:3], strict=True))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_nan_is_not_hidden(backend):
    query = torch.randn(2, 1, 8, 4)
    query[0, 0, 3] = torch.nan
    keep = torch.ones(2, 8, dtype=torch.bool)
    assert ops.attention_statistics(query, query, 4, key_padding_mask=keep, backend=backend).skewness.isnan()


def test_half_precision():
    query, key = torch.randn(2, 3, 2, 64, 16).unbind(0)
    full = ops.attention_statistics(query, key, 16)
    half = ops.attention_statistics(query.bfloat16(), key.bfloat16(), 16)
    torch.testing.assert_close(half.pooled, full.pooled, rtol=0.05, atol=1e-3)
    assert half.pooled.dtype == torch.float32


def test_memory_stays_below_the_explicit_matrix():
    """The largest temporary is a chunk, however many samples there are."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    query = torch.randn(16, 4, 512, 8)
    with Watch():
        torch_operations.attention_statistics._init_fn(query, query, 32, None, None, False, 1.0, True)
    assert 0 < largest <= torch_operations.CHUNK_ELEMENTS < 16 * 4 * 512 * 512


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_bad_block_size(size):
    x = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match="block_size must be a whole number of at least 1"):
        ops.attention_statistics(x, x, size)
