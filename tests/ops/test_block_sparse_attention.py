import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sat import ops
from sat.layout import BlockLayout
from sat.ops import torch_blocks
from tests.ops import oracle

BACKENDS = ["reference", "torch"]


def tensors(shape: tuple[int, int, int, int, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    batch, heads, length, keys, dim = shape
    sizes = (length, keys, keys)
    # Laid out as a projection leaves them: heads inside, so [B, H, L, D] is not contiguous.
    return [torch.randn(batch, n, heads, dim).to(dtype).transpose(1, 2).requires_grad_() for n in sizes]


def padding(batch: int, length: int) -> Tensor:
    """One full sample, one of a third, one of nothing but padding."""
    lengths = torch.tensor([length, max(1, length // 3), 0])[:batch]
    return torch.arange(length) < lengths[:, None]


# B, H, L, S, D; block size; options
CASES = {
    "even": ((2, 2, 64, 64, 16), 16, {}),
    "odd length": ((2, 2, 61, 61, 16), 16, {}),
    "cross": ((2, 2, 37, 90, 8), 16, {}),
    "short": ((1, 2, 3, 5, 8), 16, {}),
    "one": ((1, 1, 1, 1, 8), 16, {}),
    "block 1": ((1, 2, 9, 7, 4), 1, {}),
    "block 5": ((2, 3, 33, 33, 12), 5, {}),
    "block 128": ((1, 2, 300, 300, 80), 128, {}),
    "causal": ((2, 2, 61, 61, 16), 16, {"is_causal": True}),
    "causal cross": ((2, 2, 70, 37, 16), 16, {"is_causal": True}),
    "key padding": ((3, 2, 61, 61, 16), 16, {"key_padding": True}),
    "both paddings": ((3, 2, 61, 61, 16), 16, {"key_padding": True, "query_padding": True}),
    "causal, padding": ((3, 2, 61, 61, 16), 16, {"is_causal": True, "key_padding": True}),
    "scale": ((2, 2, 64, 64, 16), 16, {"scale": 0.7}),
    "bias": ((2, 2, 61, 61, 16), 16, {"bias": (2, 2, 61, 61)}),
    "bias shared": ((2, 2, 61, 61, 16), 16, {"bias": (61, 61)}),
    "bias of keys": ((2, 2, 61, 45, 16), 16, {"bias": (2, 1, 1, 45)}),
    "bias of queries": ((2, 2, 45, 61, 16), 16, {"bias": (1, 2, 45, 1), "is_causal": True}),
    "everything": ((3, 2, 61, 75, 16), 16, {"bias": (1, 2, 61, 75), "is_causal": True, "key_padding": True}),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "_"))
def case(request):
    shape, size, options = CASES[request.param]
    options = dict(options)
    batch, _, length, keys, _ = shape
    if options.pop("key_padding", False):
        options["key_padding_mask"] = padding(batch, keys)
    if options.pop("query_padding", False):
        options["query_padding_mask"] = padding(batch, length)
    if "bias" in options:
        options["attn_bias"] = torch.randn(options.pop("bias"), dtype=torch.float64, requires_grad=True)
    return shape, size, options


def layout_for(shape: tuple[int, ...], size: int, heads: int | None = None) -> BlockLayout:
    _, all_heads, length, keys, _ = shape
    return oracle.random_layout(heads or all_heads, -(-length // size), -(-keys // size), size)


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad(out, inputs, torch.randn(out.shape, dtype=torch.float64).to(out.dtype)))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composed"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per_head"])
@pytest.mark.parametrize("pruned", ["drop", "zero"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_dense_attention_in_float64(case, backend, pruned, shared, fused):
    shape, size, options = case
    layout = layout_for(shape, size, 1 if shared else None)
    inputs = tensors(shape)
    bias = options.get("attn_bias")
    leaves = inputs + ([bias] if bias is not None else [])
    ours = ops.block_sparse_attention(*inputs, layout, pruned=pruned, backend=backend, fused=fused, **options)
    exact = oracle.attention(*inputs, layout, pruned=pruned, **options)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)
    for grad, expected in zip(gradients(ours, leaves), gradients(exact, leaves), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_pytorchs_own_attention(backend):
    query, key, value = tensors((2, 3, 50, 50, 16))
    layout = BlockLayout(oracle.random_layout(3, 4, 4, 16, empty_row=False).mask | torch.eye(4, dtype=torch.bool), 16)
    mask = oracle.element_mask(layout, 50, 50) & torch.ones(50, 50, dtype=torch.bool).tril()
    mask[:, range(50), range(50)] = True  # SDPA gives NaN or 0 for empty rows, by version: keep them out of this test
    ours = ops.block_sparse_attention(query, key, value, layout, is_causal=True, backend=backend)
    expected_mask = oracle.element_mask(layout, 50, 50) & torch.ones(50, 50, dtype=torch.bool).tril()
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=expected_mask)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composed"])
@pytest.mark.parametrize("pruned", ["drop", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_is_at_most_twice_pytorchs(backend, dtype, pruned, fused):
    shape = (3, 2, 157, 157, 32)
    layout = layout_for(shape, 32)
    options = {"key_padding_mask": padding(3, 157), "is_causal": True, "pruned": pruned}
    inputs = tensors(shape, dtype)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = oracle.attention(*exact_inputs, layout, **options)
    pytorch = oracle.attention(*inputs, layout, **options)
    ours = ops.block_sparse_attention(*inputs, layout, backend=backend, fused=fused, **options)
    assert ours.dtype == dtype
    oracle.assert_as_exact_as_pytorch(ours, exact, pytorch, "output")
    names = ["query", "key", "value"]
    rows = zip(names, gradients(ours, inputs), gradients(exact, exact_inputs), gradients(pytorch, inputs), strict=True)
    for name, grad, exact_grad, pytorch_grad in rows:
        oracle.assert_as_exact_as_pytorch(grad, exact_grad, pytorch_grad, f"gradient to {name}")


@pytest.mark.parametrize("pruned", ["drop", "zero"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composed"])
def test_gradcheck(pruned, fused):
    inputs = tensors((2, 2, 7, 7, 3))
    bias = torch.randn(1, 2, 7, 7, dtype=torch.float64, requires_grad=True)
    layout = oracle.random_layout(2, 3, 3, 3)
    keep = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])

    def attend(q, k, v, bias):
        return ops.block_sparse_attention(
            q, k, v, layout, attn_bias=bias, key_padding_mask=keep, pruned=pruned, fused=fused, backend="torch"
        )

    assert torch.autograd.gradcheck(attend, (*inputs, bias))


@pytest.mark.parametrize("pruned", ["drop", "zero"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_blocks_give_zeros(backend, pruned):
    inputs = tensors((2, 2, 40, 40, 8), torch.float32)
    blocks = torch.zeros(2, 3, 3, dtype=torch.bool)
    blocks[0, 1, 2] = True
    layout = BlockLayout(blocks, 16)
    out = ops.block_sparse_attention(*inputs, layout, backend=backend, pruned=pruned)
    assert torch.equal(out[:, 1], torch.zeros_like(out[:, 1]))
    assert torch.equal(out[:, 0, :16], torch.zeros(2, 16, 8))
    assert out[:, 0, 16:32].abs().min() > 0
    out.sum().backward()
    for x in inputs:
        assert x.grad.isfinite().all()
        assert torch.equal(x.grad[:, 1], torch.zeros_like(x.grad[:, 1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_future_and_padding_do_not_leak(backend):
    query, key, value = (x.detach() for x in tensors((1, 2, 45, 45, 8)))
    layout = oracle.random_layout(2, 3, 3, 16, density=1.0, empty_row=False)
    keep = torch.arange(45)[None] < 40
    options = {"is_causal": True, "key_padding_mask": keep, "backend": backend}
    before = ops.block_sparse_attention(query, key, value, layout, **options)
    key[:, :, 20:], value[:, :, 20:] = 9.0, -7.0
    after = ops.block_sparse_attention(query, key, value, layout, **options)
    assert torch.equal(before[:, :, :20], after[:, :, :20])
    key[:, :, 40:], value[:, :, 40:] = -3.0, 1e6
    torch.testing.assert_close(ops.block_sparse_attention(query, key, value, layout, **options), after)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fused", [True, False])
def test_padding_masks_of_any_strides(backend, fused):
    query, key, value = tensors((2, 2, 64, 64, 8), torch.float32)
    layout = BlockLayout(torch.ones(4, 4, dtype=torch.bool), 16)
    mask = (torch.rand(64, 2) < 0.7).T  # of a model whose sequence comes first, in whole blocks
    found, expected = (
        ops.block_sparse_attention(query, key, value, layout, key_padding_mask=x, backend=backend, fused=fused)
        for x in (mask, mask.contiguous())
    )
    assert torch.equal(found, expected)


def test_padded_blocks_cost_nothing():
    layout = oracle.random_layout(2, 4, 4, 16, density=1.0, empty_row=False)
    query, key, _ = tensors((3, 2, 64, 64, 8))
    keep = padding(3, 64)
    problem = torch_blocks.Problem(query, key, layout.mask, 16, keep, keep, None, False, 1.0, False)
    kept = sum(len(chunk.columns) for chunk in problem.chunks())
    assert kept == 2 * (4 * 4 + 2 * 2 + 0)  # 64, 21 and 0 tokens: 4, 2 and 0 blocks a side, for 2 heads


@pytest.mark.parametrize("chunk", [1, 300, 5000])
def test_chunks_change_nothing_but_the_order_of_work(monkeypatch, chunk):
    inputs = tensors((2, 2, 100, 100, 8), torch.float32)
    layout = oracle.random_layout(2, 13, 13, 8)
    whole = ops.block_sparse_attention(*inputs, layout, backend="torch")
    whole_grads = gradients(whole, inputs)
    monkeypatch.setattr(torch_blocks, "CHUNK_SCORES_CPU", chunk)
    split = ops.block_sparse_attention(*inputs, layout, backend="torch")
    torch.testing.assert_close(split, whole)
    torch.testing.assert_close(gradients(split, inputs), whole_grads)


def test_repeatable_bit_for_bit():
    inputs = tensors((2, 2, 100, 100, 8), torch.float32)
    layout = oracle.random_layout(2, 13, 13, 8)
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        out = ops.block_sparse_attention(*inputs, layout, dropout_p=0.2, backend="torch")
        runs.append([out, *gradients(out, inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_evaluation_then_training():
    """Buffers that were made in inference mode may not be written outside it."""
    torch_blocks.Workspace._kept.__dict__.clear()
    inputs = tensors((1, 1, 32, 32, 8), torch.float32)
    layout = oracle.random_layout(1, 2, 2, 16)
    with torch.inference_mode():
        evaluated = ops.block_sparse_attention(*inputs, layout)
    trained = ops.block_sparse_attention(*inputs, layout)
    trained.sum().backward()
    assert torch.equal(evaluated, trained)


class TestDropout:
    p = 0.3

    @pytest.mark.parametrize("fused", [True, False], ids=["fused", "composed"])
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_drops_the_stated_share_and_keeps_the_mean(self, backend, fused):
        # With the values set to the identity, the output is the matrix of weights.
        query, key, _ = (x.detach() for x in tensors((8, 2, 64, 64, 64)))
        value = torch.eye(64, dtype=torch.float64).expand(8, 2, 64, 64)
        layout = oracle.random_layout(2, 4, 4, 16, empty_row=False)
        options = {"backend": backend, "fused": fused}
        plain = ops.block_sparse_attention(query, key, value, layout, **options)
        dropped = ops.block_sparse_attention(query, key, value, layout, dropout_p=self.p, **options)
        kept = dropped != 0
        assert ((dropped - plain / (1 - self.p)).abs()[kept] < 1e-12).all()
        share = 1 - kept.sum() / (plain != 0).sum()
        assert abs(share - self.p) < 0.01

    def test_gradients_use_the_same_mask(self):
        inputs = tensors((1, 2, 20, 20, 4))
        layout = oracle.random_layout(2, 4, 4, 5)

        def attend(q, k, v):
            torch.manual_seed(3)
            return ops.block_sparse_attention(q, k, v, layout, dropout_p=self.p, backend="torch")

        assert torch.autograd.gradcheck(attend, inputs)


def test_gradient_to_one_operand_only():
    query, key, value = (x.detach() for x in tensors((1, 2, 40, 40, 8)))
    layout = oracle.random_layout(2, 3, 3, 16)
    expected = dict(zip("qkv", gradients_of_all(query, key, value, layout), strict=True))
    for name, index in zip("qkv", range(3), strict=True):
        inputs = [query, key, value]
        inputs[index] = inputs[index].clone().requires_grad_()
        out = ops.block_sparse_attention(*inputs, layout, backend="torch")
        (grad,) = gradients(out, [inputs[index]])
        torch.testing.assert_close(grad, expected[name])


def gradients_of_all(query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout) -> list[Tensor]:
    inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    return gradients(oracle.attention(*inputs, layout), inputs)


def test_opcheck():
    layout = oracle.random_layout(2, 4, 4, 16)
    keep = padding(3, 61)
    for dtype in (torch.float32, torch.bfloat16):
        query, key, value = tensors((3, 2, 61, 61, 8), dtype)
        bias = torch.randn(1, 2, 61, 61, requires_grad=True)
        seed = torch.tensor(7)
        for extra in ((None, None, None, None, 0.0), (keep, keep, bias, seed, 0.2)):
            arguments = (query, key, value, layout.mask, 16, *extra, 0.3, False, True)
            torch.library.opcheck(torch_blocks.block_attention, arguments)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composed"])
def test_compiles_into_one_graph(fused):
    inputs = tensors((2, 2, 61, 61, 8), torch.float32)
    layout = oracle.random_layout(2, 4, 4, 16)
    keep = padding(2, 61)

    def attend(q, k, v):
        return ops.block_sparse_attention(q, k, v, layout, key_padding_mask=keep, fused=fused).sin()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*inputs), attend(*inputs)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients(out, inputs), gradients(expected, inputs))


class TestBadArguments:
    layout = BlockLayout(torch.ones(2, 4, 4, dtype=torch.bool), 16)

    def attend(self, *inputs, layout=None, **options):
        layout = self.layout if layout is None else layout
        return ops.block_sparse_attention(*inputs, layout, **options)

    def good(self):
        return [torch.randn(2, 2, 64, 8) for _ in range(3)]

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (lambda q, k, v: (q[0], k, v), ValueError, r"query must be \[batch, heads.*\[2, 64, 8\]"),
            (lambda q, k, v: (q, k, v[..., :4]), ValueError, r"key and value must have one shape"),
            (lambda q, k, v: (q, k[:, :1], v[:, :1]), ValueError, r"agree in batch, heads and head dim"),
            (lambda q, k, v: (q, k[..., :4], v[..., :4]), ValueError, r"\[2, 2, 64, 8\] and \[2, 2, 64, 4\]"),
            (lambda q, k, v: (q, k.double(), v), TypeError, r"query is torch.float32 but key is torch.float64"),
            (lambda q, k, v: (q.int(), k.int(), v.int()), TypeError, r"got torch.int32"),
            (lambda q, k, v: (q, k.to("meta"), v), ValueError, r"query is on cpu but key is on meta"),
            (lambda q, k, v: (q[:0], k[:0], v[:0]), ValueError, r"query is empty"),
            (lambda q, k, v: (q[:, :, :0], k, v), ValueError, r"query is empty"),
            (lambda q, k, v: (q, k, v.tolist()), TypeError, r"value must be a tensor, got list"),
            (lambda q, k, v: (q[:, :, :40], k, v), ValueError, r"4 x 4 blocks of 16 does not fit 40 queries"),
        ],
    )
    def test_tensors(self, change, error, message):
        with pytest.raises(error, match=message):
            self.attend(*change(*self.good()))

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"backend": "cuda"}, ValueError, "backend must be one of .* got 'cuda'"),
            ({"pruned": "keep"}, ValueError, "pruned must be one of 'drop', 'zero', got 'keep'"),
            ({"dropout_p": 1.0}, ValueError, "dropout_p must be at least 0 and below 1, got 1.0"),
            ({"dropout_p": 1 - 1e-8}, ValueError, "below 1, got 0.99999999, which is 1 in float32"),
            ({"key_padding_mask": torch.ones(2, 64)}, TypeError, "key_padding_mask must be a bool tensor"),
            ({"key_padding_mask": torch.ones(2, 63, dtype=torch.bool)}, ValueError, r"shape \[2, 64\], got \[2, 63\]"),
            ({"key_padding_mask": [[True] * 64] * 2}, TypeError, "key_padding_mask must be a tensor, got list"),
            ({"query_padding_mask": 3}, TypeError, "query_padding_mask must be a tensor, got int"),
            ({"attn_bias": 0.5}, TypeError, "attn_bias must be a tensor, got float"),
            ({"attn_bias": 0.5, "fused": False}, TypeError, "attn_bias must be a tensor, got float"),
            ({"attn_bias": torch.ones(64, 64, dtype=torch.bool)}, TypeError, "key_padding_mask, is_causal"),
            ({"attn_bias": torch.ones(3, 1, 64, 64)}, ValueError, r"broadcastable to \[2, 2, 64, 64\]"),
            ({"layout": torch.ones(4, 4)}, TypeError, "layout must be a BlockLayout, got Tensor"),
            ({"layout": BlockLayout(torch.ones(3, 4, 4, dtype=torch.bool), 16)}, ValueError, "has 3 heads but query"),
            ({"layout": BlockLayout(torch.ones(4, 4, dtype=torch.bool), 32)}, ValueError, "these need 2 x 2 blocks"),
            (
                {"layout": BlockLayout(torch.ones(4, 4, dtype=torch.bool).to("meta"), 16)},
                ValueError,
                "layout is on meta",
            ),
        ],
    )
    def test_options(self, options, error, message):
        with pytest.raises(error, match=message):
            self.attend(*self.good(), **options)


def test_expanded_bias_keeps_its_gradient():
    inputs = tensors((2, 2, 40, 40, 8))
    layout = oracle.random_layout(2, 3, 3, 16)
    bias = torch.randn(40, 40, dtype=torch.float64, requires_grad=True)
    ours = ops.block_sparse_attention(*inputs, layout, attn_bias=bias.expand(2, 2, 40, 40))
    exact = oracle.attention(*inputs, layout, attn_bias=bias)
    torch.testing.assert_close(gradients(ours, [bias]), gradients(exact, [bias]))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expanded_bias_that_is_a_leaf_has_a_gradient_everywhere(backend, fused):
    inputs = tensors((2, 2, 40, 40, 8))
    layout = oracle.random_layout(2, 3, 3, 16)
    bias = torch.randn(1, 1, 1, 40, dtype=torch.float64).expand(2, 2, 40, 40).requires_grad_()
    ours = ops.block_sparse_attention(*inputs, layout, attn_bias=bias, backend=backend, fused=fused)
    exact = oracle.attention(*inputs, layout, attn_bias=bias)
    torch.testing.assert_close(gradients(ours, [bias]), gradients(exact, [bias]))


@pytest.mark.parametrize("length", [64, 61])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_very_low_scores_in_rows_of_which_nothing_is_pruned(backend, fused, length):
    query, key, value = (x.detach() for x in tensors((2, 2, length, length, 16), torch.float32))
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[1, 2, 3] = False  # the rows of this block count logits of 0, which outweigh all else
    layout = BlockLayout(mask, 16)
    bias = torch.randn(length, length) - 1200
    out = ops.block_sparse_attention(
        query, key, value, layout, attn_bias=bias, pruned="zero", backend=backend, fused=fused
    )
    scores = query.double() @ key.double().transpose(2, 3) / 4 + bias.double()
    expected = torch.softmax(scores, -1) @ value.double()
    expected[:, 1, 32:48] = 0
    torch.testing.assert_close(out, expected.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend, dtype, fused):
    inputs = tensors((2, 2, 61, 61, 16), dtype)
    layout = oracle.random_layout(2, 4, 4, 16)
    bias = torch.randn(2, 1, 61, 61, requires_grad=True)
    options = {"attn_bias": bias, "is_causal": True, "pruned": "zero", "backend": backend, "fused": fused}
    outside = ops.block_sparse_attention(*inputs, layout, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ops.block_sparse_attention(*inputs, layout, **options)
    assert inside.dtype == dtype
    assert torch.equal(inside, outside)
    for ours, expected in zip(gradients(inside, [*inputs, bias]), gradients(outside, [*inputs, bias]), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_products_too_large_for_float16_before_they_are_scaled(backend, fused):
    query, key = torch.full((2, 1, 2, 48, 16), 80.0, dtype=torch.float16).unbind(0)  # 102400, scaled 25600
    value = torch.randn(1, 2, 48, 8, dtype=torch.float16).repeat(1, 1, 1, 2)
    layout = oracle.random_layout(2, 3, 3, 16)
    ours = ops.block_sparse_attention(query, key, value, layout, backend=backend, fused=fused)
    exact = oracle.attention(query.double(), key.double(), value.double(), layout)
    torch.testing.assert_close(ours, exact.half(), rtol=2e-3, atol=2e-3)
