"""SDDMM, sparse softmax and SpMM in Triton, against dense float64 PyTorch and SciPy, sharing no code with SAT."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sat.layout import BlockLayout
from sat.ops.triton import launch
from sat.ops.triton.index import tile_index
from sat.ops.triton.sddmm import block_sddmm, sddmm, value_index
from sat.ops.triton.softmax import block_softmax, sparse_softmax
from sat.ops.triton.spmm import block_spmm, spmm
from tests.ops import oracle

device = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    device == "cpu" and not launch.INTERPRETED, reason="no GPU, and TRITON_INTERPRET is not set"
)

# Block size, head dimension, dtype, queries, keys, and heads of the layout, which two heads use.
CASES = pytest.mark.parametrize(
    ("size", "dim", "dtype", "length", "keys", "layout_heads"),
    [
        (16, 8, torch.float32, 37, 50, 2),
        (16, 80, torch.bfloat16, 48, 33, 1),
        (16, 32, torch.float16, 16, 100, 2),
        (32, 32, torch.float16, 70, 40, 1),
        (32, 80, torch.float32, 64, 32, 2),
        (64, 32, torch.bfloat16, 100, 130, 2),
        (64, 8, torch.float32, 64, 70, 1),
        (128, 8, torch.float16, 130, 128, 1),
    ],
    ids=str,
)
BATCH, HEADS = 2, 2


def make_layout(layout_heads: int, length: int, keys: int, size: int) -> BlockLayout:
    """Random blocks, with an empty row and an empty column where there are several."""
    mask = torch.rand(layout_heads, -(-length // size), -(-keys // size)) < 0.6
    mask[:, 0, 0] = True
    mask[:, 1:, 1:] &= torch.rand(()) < 0.8
    mask[:, -1] &= mask.shape[1] == 1
    mask[0, :, -1] &= mask.shape[2] == 1
    return BlockLayout(mask.to(device), size)


def make_heavy_layout() -> BlockLayout:
    """One row and one column of 20 blocks, else the diagonal: the two lists are cut into segments."""
    mask = torch.eye(20, dtype=torch.bool)[None].repeat(2, 1, 1)
    mask[:, 3] = True
    mask[:, :, 5] = True
    return BlockLayout(mask.to(device), 16)


def each_block(layout: BlockLayout) -> list[tuple[int, int, int]]:
    """Head, row and column of each block, in the order of the values."""
    rows, columns = layout.shape
    every = ((h, r, c) for h in range(HEADS) for r in range(rows) for c in range(columns))
    return [(h, r, c) for h, r, c in every if layout.mask[h % layout.num_heads, r, c]]


def to_values(dense: Tensor, layout: BlockLayout, fill: float) -> Tensor:
    """Kept blocks of ``[B, H, L, S]``, filled up past the end."""
    size, (rows, columns) = layout.block_size, layout.shape
    dense = F.pad(dense, (0, columns * size - dense.shape[3], 0, rows * size - dense.shape[2]), value=fill)
    blocks = [dense[:, h, r * size :, c * size :][:, :size, :size] for h, r, c in each_block(layout)]
    return torch.stack(blocks, 1)


def to_dense(values: Tensor, layout: BlockLayout, length: int, keys: int) -> Tensor:
    """``[B, H, L, S]`` of values, 0 elsewhere; what lies past the end is cut off."""
    size, (rows, columns) = layout.block_size, layout.shape
    dense = values.new_zeros(values.shape[0], HEADS, rows * size, columns * size)
    for number, (h, r, c) in enumerate(each_block(layout)):
        dense[:, h, r * size : (r + 1) * size, c * size : (c + 1) * size] = values[:, number]
    return dense[:, :, :length, :keys]


def past_the_end(layout: BlockLayout, length: int, keys: int) -> Tensor:
    """Bool ``[1, nnz, b, b]``."""
    return to_values(torch.zeros(1, HEADS, length, keys, device=device), layout, 1.0) == 1


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def random_rows(length: int, dim: int, dtype: torch.dtype) -> Tensor:
    """``[B, H, length, D]``, not contiguous."""
    return randn(BATCH, length, HEADS, dim, dtype=dtype).transpose(1, 2)


def check(ours, oracle_function, inputs: list[Tensor], upstream: Tensor, names: str) -> None:
    """Result and gradients are as exact as those of the oracle, computed by PyTorch in the same precision."""
    results = []
    for function, dtype in ((ours, None), (oracle_function, torch.float64), (oracle_function, None)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        out = function(*leaves)
        gradients = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
        assert dtype is not None or [x.dtype for x in gradients] == [x.dtype for x in inputs]
        results.append([out.detach(), *gradients])
    for name, found, exact, pytorch in zip(names.split(), *results, strict=True):
        assert found.shape == exact.shape
        infinite = exact.isinf()
        assert torch.equal(found[infinite].double(), exact[infinite]), name
        found, exact, pytorch = (x.masked_fill(infinite, 0) for x in (found, exact, pytorch))
        oracle.assert_as_exact_as_pytorch(found, exact, pytorch, name)


@CASES
def test_sddmm(size, dim, dtype, length, keys, layout_heads):
    layout = make_layout(layout_heads, length, keys, size)
    query, key = random_rows(length, dim, dtype), random_rows(keys, dim, dtype)
    upstream = randn(BATCH, len(each_block(layout)), size, size, dtype=dtype)
    upstream = upstream.masked_fill(past_the_end(layout, length, keys), torch.nan)  # these are no positions
    check(
        lambda q, k: sddmm(q, k, layout, -torch.inf),
        lambda q, k: to_values(q @ k.transpose(2, 3), layout, -torch.inf),
        [query, key],
        upstream,
        "sddmm query key",
    )


@CASES
@pytest.mark.parametrize("transpose", [False, True])
def test_spmm(size, dim, dtype, length, keys, layout_heads, transpose):
    layout = make_layout(layout_heads, length, keys, size)
    inner, outer = (length, keys) if transpose else (keys, length)
    value = random_rows(inner, dim, dtype)
    past = past_the_end(layout, length, keys)
    weights = randn(BATCH, len(each_block(layout)), size, size, dtype=dtype).transpose(2, 3)
    weights = weights.masked_fill(past, 1000)

    def expected(w: Tensor, v: Tensor) -> Tensor:
        dense = to_dense(w.masked_fill(past, 0), layout, length, keys)
        return (dense.transpose(2, 3) if transpose else dense) @ v

    check(
        lambda w, v: spmm(w, v, layout, transpose, outer),
        expected,
        [weights, value],
        random_rows(outer, dim, dtype),
        "spmm weights value",
    )


@pytest.mark.parametrize("transpose", [False, True])
def test_spmm_adds_nothing_from_past_the_end(transpose):
    layout = make_layout(2, 37, 50, 16)
    inner, outer = (37, 50) if transpose else (50, 37)
    past = past_the_end(layout, 37, 64) if transpose else past_the_end(layout, 48, 50)
    weights = randn(BATCH, layout.nnz, 16, 16, dtype=torch.float32)
    value = random_rows(inner, 8, torch.float32)
    ours, expected = (
        spmm(weights.masked_fill(past, fill), value, layout, transpose, outer) for fill in (torch.inf, 0.0)
    )
    assert torch.equal(ours, expected)


def test_spmm_equals_scipys():
    scipy_sparse = pytest.importorskip("scipy.sparse")
    layout = make_layout(2, 48, 64, 16)
    weights, value = torch.randn(1, layout.nnz, 16, 16), torch.randn(1, HEADS, 64, 8)
    ours = spmm(weights.to(device), value.to(device), layout, False, 48).cpu()
    for head in range(HEADS):
        own = [number for number, block in enumerate(each_block(layout)) if block[0] == head]
        matrix = scipy_sparse.bsr_array(
            (
                weights[0, own].double().numpy(),
                torch.tensor([each_block(layout)[number][2] for number in own], dtype=torch.int32).numpy(),
                torch.cat([torch.zeros(1), layout.mask[head].cpu().sum(1).cumsum(0)]).int().numpy(),
            ),
            shape=(48, 64),
        )
        exact = torch.from_numpy(matrix @ value[0, head].double().numpy())
        pytorch = torch.from_numpy(matrix.toarray()).float() @ value[0, head]
        oracle.assert_as_exact_as_pytorch(ours[0, head], exact, pytorch, "spmm")


def dense_softmax(
    scores: Tensor, bias: Tensor | None, layout: BlockLayout, length: int, keys: int, **options
) -> Tensor:
    """Weights as values. Under ``"zero"``, logits of 0 stand where a permitted key is outside of the layout."""
    mask = layout.mask.repeat_interleave(layout.block_size, 1).repeat_interleave(layout.block_size, 2)
    allowed = torch.ones(scores.shape[0], 1, length, keys, dtype=torch.bool, device=device)
    if options["key_padding_mask"] is not None:
        allowed = allowed & options["key_padding_mask"][:, None, None]
    if options["is_causal"]:
        allowed = allowed.tril()
    kept = allowed & mask[:, :length, :keys]
    logits = to_dense(scores, layout, length, keys) * options["scale"]
    if bias is not None:
        logits = logits + bias
    counted = kept if options["pruned"] == "drop" else allowed
    logits = torch.where(kept, logits, 0).masked_fill(~counted, -torch.inf)
    dead = (logits == -torch.inf).all(-1, keepdim=True)
    weights = F.softmax(logits.masked_fill(dead, 0), -1).masked_fill(dead | ~kept, 0)
    return to_values(weights, layout, 0.0)


@pytest.mark.parametrize(
    ("size", "dtype", "length", "keys", "layout_heads", "bias_shape", "padding", "is_causal", "pruned"),
    [
        (16, torch.float32, 37, 50, 2, None, False, False, "drop"),
        (16, torch.float32, 37, 50, 2, (1, 2, 37, 50), True, True, "drop"),
        (16, torch.float32, 37, 30, 1, (2, 1, 37, 30), True, True, "zero"),
        (16, torch.bfloat16, 50, 50, 2, (1, 1, 1, 50), False, True, "zero"),
        (32, torch.float32, 64, 70, 1, (1, 1, 64, 1), True, False, "zero"),
        (32, torch.float16, 40, 64, 2, None, True, False, "drop"),
        (64, torch.bfloat16, 70, 100, 1, None, False, False, "zero"),
        (64, torch.float16, 64, 64, 2, (2, 2, 1, 1), False, True, "drop"),
        (128, torch.float32, 130, 140, 1, None, False, True, "zero"),
    ],
    ids=str,
)
def test_sparse_softmax(size, dtype, length, keys, layout_heads, bias_shape, padding, is_causal, pruned):
    layout = make_layout(layout_heads, length, keys, size)
    options = {"scale": 0.7, "key_padding_mask": None, "is_causal": is_causal, "pruned": pruned}
    if padding:
        options["key_padding_mask"] = torch.rand(BATCH, keys, device=device) < torch.tensor([[0.7], [0.0]]).to(device)
    values = randn(BATCH, len(each_block(layout)), size, size, dtype=dtype)
    past = past_the_end(layout, length, keys)
    inputs = [values.masked_fill(past, -torch.inf)]
    if bias_shape is not None:
        inputs.append(randn(*bias_shape, dtype=dtype))

    def ours(scores: Tensor, bias: Tensor | None = None) -> Tensor:
        lengths = {"num_heads": HEADS, "query_length": length, "key_length": keys}
        return sparse_softmax(scores, layout, attn_bias=bias, **lengths, **options)

    def expected(scores: Tensor, bias: Tensor | None = None) -> Tensor:
        return dense_softmax(scores, bias, layout, length, keys, **options)

    check(ours, expected, inputs, values, "softmax scores bias"[: None if bias_shape else -5])
    assert (ours(*inputs).masked_select(past) == 0).all()


def test_sparse_softmax_takes_a_bias_of_minus_infinity_and_large_scores():
    layout = make_layout(1, 20, 40, 16)
    scores = randn(1, len(each_block(layout)), 16, 16, dtype=torch.float32) * 1000
    bias = torch.zeros(1, 1, 20, 40, device=device)
    bias[..., 3, :] = bias[..., ::3] = -torch.inf
    for pruned in ("drop", "zero"):
        options = {"scale": 1.0, "key_padding_mask": None, "is_causal": False, "pruned": pruned}
        ours = sparse_softmax(
            scores, layout, num_heads=HEADS, query_length=20, key_length=40, attn_bias=bias, **options
        )
        expected = dense_softmax(scores.double(), bias.double(), layout, 20, 40, **options)
        torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=1e-5)


def test_long_lists_are_cut_and_joined():
    layout, length = make_heavy_layout(), 20 * 16 - 3
    for transposed in (False, True):
        cut = tile_index(layout, 16, HEADS, transposed=transposed)
        assert cut.capacity > 0
        assert (cut.segments[:, :2, 0] >= 0).all()
        assert (cut.slots[:, :, 1].amax(1) > 1).all()
    query, key = randn(1, HEADS, length, 8, dtype=torch.float32), randn(1, HEADS, length, 8, dtype=torch.float32)
    values = randn(1, layout.nnz, 16, 16, dtype=torch.float32)
    check(
        lambda q, k: sddmm(q, k, layout, 0.0),
        lambda q, k: to_values(q @ k.transpose(2, 3), layout, 0.0),
        [query, key],
        values,
        "sddmm query key",
    )
    check(
        lambda w, v: spmm(w, v, layout, False, length),
        lambda w, v: to_dense(w, layout, length, length) @ v,
        [values, query],
        key,
        "spmm weights value",
    )


@pytest.mark.parametrize(("masked", "pruned"), [(False, "drop"), (True, "zero")])
def test_softmax_of_long_rows_is_cut_and_joined(masked, pruned):
    layout, length = make_heavy_layout(), 20 * 16 - 3
    values = randn(BATCH, layout.nnz, 16, 16, dtype=torch.float32)
    padding = torch.ones(BATCH, length, dtype=torch.bool, device=device)
    padding[0, :70] = padding[0, 200:] = padding[1, 250:] = False  # also whole segments of the long row
    options = {"scale": 0.5, "key_padding_mask": padding if masked else None, "is_causal": masked, "pruned": pruned}
    lengths = {"num_heads": HEADS, "query_length": length, "key_length": length}
    check(
        lambda s, bias: sparse_softmax(s, layout, attn_bias=bias, **lengths, **options),
        lambda s, bias: dense_softmax(s, bias, layout, length, length, **options),
        [values, randn(1, HEADS, length, length, dtype=torch.float32)],
        values.roll(1, 2),
        "softmax scores bias",
    )


def test_softmax_does_not_read_blocks_of_padding_or_of_the_future():
    layout = make_heavy_layout()
    lengths = {"num_heads": HEADS, "query_length": 320, "key_length": 320}
    padding = torch.ones(1, 320, dtype=torch.bool, device=device)
    padding[:, :16] = padding[:, 300:] = False
    scores = randn(1, layout.nnz, 16, 16, dtype=torch.float32)
    unread = torch.tensor([c in (0, 19) or c > r for _, r, c in each_block(layout)], device=device)
    scores[:, unread] = torch.nan
    options = {"key_padding_mask": padding, "is_causal": True, "pruned": "drop", "scale": 0.5, "attn_bias": None}
    scores.requires_grad_()
    weights = sparse_softmax(scores, layout, **lengths, **options)
    gradient = torch.autograd.grad(weights, scores, scores.detach())[0]
    assert weights.isfinite().all()
    assert gradient.isfinite().all()
    assert (weights[:, unread] == 0).all()
    assert (gradient[:, unread] == 0).all()


def compose(query: Tensor, key: Tensor, bias: Tensor, layout: BlockLayout) -> Tensor:
    lengths = {"num_heads": HEADS, "query_length": query.shape[2], "key_length": key.shape[2]}
    options = {"scale": 0.3, "key_padding_mask": None, "is_causal": True, "pruned": "zero"}
    scores = sddmm(query, key, layout, -torch.inf)
    weights = sparse_softmax(scores, layout, attn_bias=bias, **lengths, **options)
    return spmm(weights, key, layout, False, query.shape[2])


def gradients(function, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def test_results_repeat_bit_for_bit():
    layout, heavy = make_layout(2, 37, 37, 16), make_heavy_layout()
    inputs = [random_rows(37, 8, torch.bfloat16), random_rows(37, 8, torch.bfloat16)]
    inputs.append(randn(1, 1, 1, 37, dtype=torch.float32))
    heavy_inputs = [randn(1, heavy.nnz, 16, 16, dtype=torch.bfloat16), randn(1, HEADS, 320, 8, dtype=torch.bfloat16)]
    for function, leaves in (
        (lambda q, k, bias: compose(q, k, bias, layout), inputs),
        (lambda w, v: spmm(w, v, heavy, False, 320), heavy_inputs),
    ):
        once, again = (gradients(function, leaves) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_gradients_may_be_expanded():
    layout = make_layout(2, 37, 37, 16)
    values = randn(BATCH, layout.nnz, 16, 16, dtype=torch.float32)
    query, key = random_rows(37, 8, torch.float32), random_rows(37, 8, torch.float32)
    lengths = {"num_heads": HEADS, "query_length": 37, "key_length": 37}
    options = {"scale": 0.3, "key_padding_mask": None, "is_causal": False, "pruned": "zero", "attn_bias": None}
    for function, inputs in (
        (lambda q, k: sddmm(q, k, layout, 0.0), [query, key]),
        (lambda w, v: spmm(w, v, layout, True, 37), [values, query]),
        (lambda s: sparse_softmax(s, layout, **lengths, **options), [values]),
    ):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(*leaves)
        upstream = torch.ones((), device=device).expand(out.shape)
        expanded, dense = (torch.autograd.grad(out, leaves, g, retain_graph=True) for g in (upstream, upstream.clone()))
        assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


def test_a_layout_without_blocks_gives_zeros():
    layout = BlockLayout(torch.zeros(1, 2, 2, dtype=torch.bool, device=device), 16)
    query = random_rows(20, 8, torch.float32).requires_grad_()
    scores = sddmm(query, query, layout, -torch.inf)
    assert scores.shape == (BATCH, 0, 16, 16)
    out = spmm(scores, query, layout, False, 20)
    assert (out == 0).all()
    assert (torch.autograd.grad(out.sum(), query)[0] == 0).all()


def test_opcheck():
    layout = BlockLayout(torch.tensor([[[True, True]], [[False, True]]], device=device), 16)
    query, key = (randn(1, HEADS, n, 8, dtype=torch.float32).requires_grad_() for n in (10, 20))
    values = randn(1, layout.nnz, 16, 16, dtype=torch.float32).requires_grad_()
    bias = randn(1, 1, 10, 20, dtype=torch.float32).requires_grad_()
    padding = torch.rand(1, 20, device=device) < 0.5
    lists, check_op = value_index(layout, HEADS, columns=True), torch.library.opcheck
    check_op(block_sddmm, (query, key, lists, layout.nnz, 16, 0.0, "ieee"))
    check_op(block_spmm, (values, query, lists, True, 20, "ieee"))
    check_op(block_softmax, (values, bias, padding, layout.mask, lists[:5], HEADS, 10, 20, 0.5, True, True))
    check_op(block_softmax, (values, None, None, layout.mask, lists[:5], HEADS, 10, 20, 0.5, False, False))


@pytest.mark.parametrize("layout_heads", [1, 2])
def test_compiles_in_one_graph(layout_heads):
    layout = make_layout(layout_heads, 37, 37, 16)
    inputs = [random_rows(37, 8, torch.float32), random_rows(37, 8, torch.float32)]
    inputs.append(randn(1, 1, 37, 37, dtype=torch.float32))
    compiled = torch.compile(compose, fullgraph=True, backend="aot_eager")
    found = gradients(lambda *x: compiled(*x, layout), inputs)
    for ours, eager in zip(found, gradients(lambda *x: compose(*x, layout), inputs), strict=True):
        torch.testing.assert_close(ours, eager)
    assert layout.derived  # by the eager run, not by the compiled one


def test_autocast_changes_nothing():
    layout = make_layout(2, 37, 37, 16)
    inputs = [random_rows(37, 8, torch.float32), random_rows(37, 8, torch.float32)]
    inputs.append(randn(1, 1, 37, 37, dtype=torch.float32))
    expected = compose(*inputs, layout)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = compose(*inputs, layout)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, expected)
