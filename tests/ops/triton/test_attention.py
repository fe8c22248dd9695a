# The fused kernels against dense attention in float64: on a GPU where there is one, else in Triton's interpreter.
import functools
import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from sat import ops
from sat.layout import BlockLayout
from sat.ops.triton import flash, flash_backward, index, masking
from sat.ops.triton.parameters import attention_tiles
from tests.ops import oracle

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
attend = functools.partial(ops.block_sparse_attention, backend="triton")


def tensors(shape: tuple[int, int, int, int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key and value on the CPU, as a projection leaves them: heads inside, so not contiguous."""
    batch, heads, length, keys, dim = shape
    return [torch.randn(batch, n, heads, dim).to(dtype).transpose(1, 2) for n in (length, keys, keys)]


def padding(batch: int, length: int) -> Tensor:
    """One full sample, one of the middle third (padded on both sides), one of nothing but padding."""
    position = torch.arange(length)
    return torch.stack([position >= 0, (position >= length // 3) & (position < 2 * length // 3), position < 0])[:batch]


def moved(options: dict) -> dict:
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()}


def check(inputs: list[Tensor], layout: BlockLayout, names: str = "qkv", **options) -> None:
    """Output and gradients: the error is at most twice PyTorch's at the same precision, both against float64."""
    bias = options.get("attn_bias")
    leaves = [*inputs] + ([] if bias is None else [bias])

    def run(function, dtype, device, layout):
        own = [x.detach().to(device, dtype or x.dtype).requires_grad_() for x in leaves]
        chosen = moved(options) if device == DEVICE else dict(options)
        if len(own) > 3:
            chosen["attn_bias"] = own[3]
        out = function(*own[:3], layout, **chosen)
        torch.manual_seed(1)
        grad = torch.randn(out.shape, dtype=torch.float64).to(inputs[0].dtype).to(out.dtype).to(device)
        return [x.detach().cpu() for x in (out, *torch.autograd.grad(out, own, grad))]

    cpu = torch.device("cpu")
    exact = run(oracle.attention, torch.float64, cpu, layout)
    pytorch = run(oracle.attention, None, cpu, layout)
    ours = run(attend, None, DEVICE, layout.to(DEVICE))
    assert ours[0].dtype == inputs[0].dtype
    for name, *results in zip(["output", "dq", "dk", "dv", "dbias"], ours, exact, pytorch, strict=False):
        if name == "dbias" and bias.shape[-1] == 1:
            # A softmax hardly sees what a whole row has in common (without pruned logits of 0, not at all): what is
            # added up here cancels, and the error of what is left is chance.
            torch.testing.assert_close(results[0].double(), results[1], rtol=1e-5, atol=1e-5)
        else:
            oracle.assert_as_exact_as_pytorch(*results, name)


# B, H, L, S, D; block size; options
CASES = {
    "even": ((2, 2, 64, 64, 16), 16, {}),
    "odd length": ((2, 2, 61, 61, 16), 16, {}),
    "cross": ((2, 2, 37, 90, 8), 16, {}),
    "short": ((1, 2, 3, 5, 8), 16, {}),
    "one query": ((1, 1, 1, 3, 8), 16, {}),
    "block 32": ((1, 2, 130, 100, 32), 32, {}),
    "block 64": ((1, 2, 130, 130, 24), 64, {}),
    "block 128": ((1, 1, 200, 200, 16), 128, {}),
    "causal": ((2, 2, 61, 61, 16), 16, {"is_causal": True}),
    "causal cross": ((2, 2, 70, 37, 16), 16, {"is_causal": True}),
    "key padding": ((3, 2, 61, 61, 16), 16, {"key_padding": True}),
    "both paddings": ((3, 2, 61, 61, 16), 16, {"key_padding": True, "query_padding": True}),
    "causal, padding": ((3, 1, 130, 130, 16), 64, {"is_causal": True, "key_padding": True, "query_padding": True}),
    "scale": ((2, 2, 64, 64, 16), 16, {"scale": 0.7}),
    "bias": ((2, 2, 61, 61, 16), 16, {"bias": (2, 2, 61, 61)}),
    "bias shared": ((2, 2, 61, 61, 16), 32, {"bias": (61, 61)}),
    "bias of keys": ((2, 2, 61, 45, 16), 16, {"bias": (2, 1, 1, 45)}),
    "bias of queries": ((2, 2, 45, 61, 16), 16, {"bias": (1, 2, 45, 1), "is_causal": True}),
    "everything": ((3, 2, 61, 75, 16), 16, {"bias": (1, 2, 61, 75), "is_causal": True, "key_padding": True}),
}


@pytest.mark.parametrize("pruned", ["drop", "zero"])
@pytest.mark.parametrize("name", CASES, ids=lambda name: name.replace(" ", "_"))
def test_equals_dense_attention(name, pruned):
    shape, size, options = CASES[name]
    batch, heads, length, keys, _ = shape
    options = dict(options)
    shared = len(name) % 2 == 0  # half of the cases each
    layout = oracle.random_layout(1 if shared else heads, -(-length // size), -(-keys // size), size)
    if options.pop("key_padding", False):
        options["key_padding_mask"] = padding(batch, keys)
    if options.pop("query_padding", False):
        options["query_padding_mask"] = padding(batch, length)
    if "bias" in options:
        options["attn_bias"] = torch.randn(options.pop("bias"))
    check(tensors(shape), layout, pruned=pruned, **options)


def test_a_single_token_attends_to_itself():
    query, key, value = (x.to(DEVICE).requires_grad_() for x in tensors((1, 1, 1, 1, 8)))
    out = attend(query, key, value, BlockLayout(torch.ones(1, 1, dtype=torch.bool, device=DEVICE), 16))
    out.sum().backward()
    assert torch.equal(out, value)
    assert torch.equal(value.grad, torch.ones_like(value))
    # Exactly 0 on paper; rowsum(dO * O) and dO V^T add the same numbers in another order.
    assert max(query.grad.abs().max(), key.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [16, 64])
def test_every_precision(dtype, size):
    layout = oracle.random_layout(2, -(-157 // size), -(-157 // size), size)
    check(tensors((3, 2, 157, 157, 32), dtype), layout, key_padding_mask=padding(3, 157), is_causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [8, 20, 80, 96, 128, 256])
def test_every_head_dimension(dim, dtype):
    check(tensors((1, 2, 77, 50, dim), dtype), oracle.random_layout(2, 3, 2, 32), pruned="zero")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_tiles_for_blocks_of_128(dtype):
    check(tensors((1, 1, 300, 300, 64), dtype), oracle.random_layout(1, 3, 3, 128, density=0.6))


def lines(heads: int, blocks: int, size: int) -> BlockLayout:
    """A diagonal, one row that sees everything and one column that everything sees."""
    mask = torch.eye(blocks, dtype=torch.bool).repeat(heads, 1, 1)
    mask[:, blocks // 2] = True
    mask[0, :, 1] = True
    mask[:, blocks - 2] = False
    return BlockLayout(mask, size)


@pytest.mark.parametrize("options", [{}, {"pruned": "zero", "is_causal": True, "key_padding_mask": padding(1, 443)}])
def test_long_rows_and_columns_are_cut_and_joined(options):
    layout = lines(2, 28, 16)
    check(tensors((1, 2, 443, 443, 16)), layout, **options)
    heavy = bool(options)
    tiles = attention_tiles(16, 16, torch.float32, DEVICE, heavy)
    cut = index.tile_index(layout.to(DEVICE), tiles[0], 2)
    assert cut.slots[:, :, 1].max() > 1, "the test's heavy row is not cut: it tests nothing"
    cut = index.tile_index(layout.to(DEVICE), tiles[9], 2, transposed=True)
    assert cut.slots[0, :, 1].max() > 1


def test_cut_lists_in_half_precision_and_of_several_pieces():
    """A block of 32 in tiles of 16 rows: each segment has two pieces."""
    layout = lines(1, 18, 32)
    query, key, value = (x.to(DEVICE).requires_grad_() for x in tensors((1, 1, 18 * 32 - 5, 18 * 32 - 5, 16)))
    tiles = [16, 32, 4, 1] * 2 + [32, 16, 4, 1]
    options = {"key_padding_mask": None, "query_padding_mask": None, "attn_bias": None, "is_causal": False}
    options |= {"dropout_p": 0.0, "scale": 0.25, "pruned": "drop"}
    ours = flash.block_sparse_attention(query, key, value, layout.to(DEVICE), tiles=tiles, **options)
    exact = oracle.attention(*(x.cpu().double() for x in (query, key, value)), layout)
    torch.testing.assert_close(ours.cpu().double(), exact, rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad(ours.square().sum(), (query, key, value))
    expected = torch.autograd.grad(exact.square().sum(), (query, key, value))
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-5)


def test_rows_without_blocks_give_zeros():
    blocks = torch.zeros(2, 3, 3, dtype=torch.bool)
    blocks[0, 1, 2] = True
    layout = BlockLayout(blocks, 16)
    for pruned in ("drop", "zero"):
        inputs = [x.to(DEVICE).requires_grad_() for x in tensors((2, 2, 40, 40, 8))]
        out = attend(*inputs, layout.to(DEVICE), pruned=pruned)
        assert torch.equal(out[:, 1], torch.zeros_like(out[:, 1]))
        assert torch.equal(out[:, 0, :16], torch.zeros_like(out[:, 0, :16]))
        assert out[:, 0, 16:32].abs().min() > 0
        out.sum().backward()
        for x in inputs:
            assert x.grad.isfinite().all()
            assert torch.equal(x.grad[:, 1], torch.zeros_like(x.grad[:, 1]))


def test_blocks_of_padding_and_of_the_future_are_never_read():
    """Their values are NaN here: reading one, even with a weight of 0, would show."""
    query, key, value = tensors((2, 1, 128, 128, 16))
    real = torch.zeros(2, 128, dtype=torch.bool)
    real[0, 32:64], real[1, :96] = True, True
    for x in (query, key, value):
        x[~real[:, None, :].expand(-1, 1, -1)] = torch.nan
    layout = oracle.random_layout(1, 8, 8, 16, density=1.0, empty_row=False).to(DEVICE)
    inputs = [x.to(DEVICE).requires_grad_() for x in (query, key, value)]
    options = {"key_padding_mask": real.to(DEVICE), "query_padding_mask": real.to(DEVICE), "is_causal": True}
    out = attend(*inputs, layout, **options)
    assert out.isfinite().all()
    grad = torch.where(real.to(DEVICE)[:, None, :, None], torch.ones_like(out), torch.nan)
    for gradient in torch.autograd.grad(out, inputs, grad):
        kept = gradient[real.to(DEVICE)[:, None, :].expand(-1, 1, -1)]
        assert kept.isfinite().all()


def test_any_strides():
    """Features apart, one key for all heads, every other token, and a query whose heads lie inside."""
    layout = oracle.random_layout(2, 4, 4, 16)
    query = torch.randn(2, 2, 16, 60).transpose(2, 3)
    key = torch.randn(2, 1, 60, 16).expand(2, 2, 60, 16)
    value = torch.randn(2, 2, 120, 20)[:, :, ::2, 2:18]
    query, key, value = (x.to(DEVICE) for x in (query, key, value))
    ours = attend(query, key, value, layout.to(DEVICE))
    contiguous = attend(*(x.contiguous() for x in (query, key, value)), layout.to(DEVICE))
    assert torch.equal(ours, contiguous)


def test_output_lies_in_memory_as_the_query_does():
    query, key, value = (x.to(DEVICE) for x in tensors((2, 3, 40, 40, 8)))
    out = attend(query, key, value, oracle.random_layout(3, 3, 3, 16).to(DEVICE))
    assert out.stride() == query.stride()
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()  # ready for the next projection, no copy


def test_more_than_two_to_the_31_elements():
    """Tokens lie so far apart that their addresses need 64 bits; only what is read takes memory."""
    tokens, dim, step = 40, 16, 2**31 // 32
    storage = torch.UntypedStorage(tokens * step * 2, device=DEVICE)  # bytes: 2 a number
    far = torch.empty(0, dtype=torch.bfloat16, device=DEVICE).set_(storage, 0, (1, 1, tokens, dim), (0, 0, step, 1))
    near = [x.to(DEVICE) for x in tensors((1, 1, tokens, tokens, dim), torch.bfloat16)]
    far.copy_(near[1])
    layout = oracle.random_layout(1, 3, 3, 16).to(DEVICE)
    assert torch.equal(attend(near[0], far, far, layout), attend(near[0], near[1], near[1], layout))


def test_features_that_lie_far_apart():
    tokens, dim, step = 20, 16, 2**31 // 12
    storage = torch.UntypedStorage(dim * step * 2, device=DEVICE)
    far = torch.empty(0, dtype=torch.bfloat16, device=DEVICE).set_(storage, 0, (1, 1, tokens, dim), (0, 0, 1, step))
    near = tensors((1, 1, tokens, tokens, dim), torch.bfloat16)[0].to(DEVICE)
    far.copy_(near)
    layout = oracle.random_layout(1, 2, 2, 16).to(DEVICE)
    assert torch.equal(attend(near, far, far, layout), attend(near, near, near, layout))


def test_repeatable_bit_for_bit():
    layout = oracle.random_layout(2, 3, 3, 16).to(DEVICE)
    inputs = [x.to(DEVICE).requires_grad_() for x in tensors((2, 2, 40, 40, 8))]
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        out = attend(*inputs, layout, dropout_p=0.2)
        runs.append([out, *torch.autograd.grad(out.sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@triton.jit
def keeps_kernel(kept, words, p, TOKENS: tl.constexpr, TILE: tl.constexpr):
    query = tl.program_id(0) * TILE + tl.arange(0, TILE)
    key = tl.program_id(1) * TILE + tl.arange(0, TILE)
    query_words = masking.dropout_words(words, 0, query, query < TOKENS, 2 * TOKENS)
    key_words = masking.dropout_words(words, 0, TOKENS + key, key < TOKENS, 2 * TOKENS)
    keeps = masking.dropout_keeps(query_words[:, None], key_words[None, :], p)
    tl.store(kept + query[:, None] * TOKENS + key[None, :], keeps.to(tl.int32))


class TestDropout:
    p = 0.3

    def test_drops_the_stated_share_and_keeps_the_mean(self):
        # With the identity for values, the output is the matrix of weights.
        query, key, _ = (x.to(DEVICE) for x in tensors((2, 2, 64, 64, 64)))
        value = torch.eye(64, device=DEVICE).expand(2, 2, 64, 64)
        layout = oracle.random_layout(2, 4, 4, 16, empty_row=False).to(DEVICE)
        plain = attend(query, key, value, layout)
        dropped = attend(query, key, value, layout, dropout_p=self.p)
        kept = dropped != 0
        torch.testing.assert_close(dropped[kept], plain[kept] / (1 - self.p))
        share = 1 - kept.sum() / (plain != 0).sum()
        assert abs(share - self.p) < 0.03
        every = kept.flatten(0, 1)[:, : layout.block_size, : layout.block_size][(plain != 0).flatten(0, 1)[:, 0, 0]]
        assert len(every.unique(dim=0)) == len(every) > 1  # heads and samples have masks of their own
        again = attend(query, key, value, layout, dropout_p=self.p)
        assert not torch.equal(again, dropped)  # another call draws another mask

    def test_drops_independently_along_rows_and_columns(self):
        tokens, tile = 512, 64
        kept = torch.empty(tokens, tokens, dtype=torch.int32, device=DEVICE)
        words = torch.randint(-(2**31), 2**31, (2 * tokens,), dtype=torch.int32, device=DEVICE)
        keeps_kernel[(tokens // tile, tokens // tile)](kept, words, self.p, TOKENS=tokens, TILE=tile)
        # Of unit variance, so that the sum of n products has a standard deviation of sqrt(n).
        x = (kept.cpu().double() - (1 - self.p)) / math.sqrt(self.p * (1 - self.p))
        pairs = torch.ones(tokens, tokens).triu(1) > 0
        # The four corners of rectangles: the sum modulo 2 of three of their words is the fourth.
        corners = x[:-1, :-1] * x[1:, :-1] * x[:-1, 1:] * x[1:, 1:]
        sums = {
            "all": (x.sum(), tokens**2),
            "rows": (x.sum(1), tokens),
            "columns": (x.sum(0), tokens),
            "two rows": ((x @ x.T)[pairs], tokens),
            "two columns": ((x.T @ x)[pairs], tokens),
            "corners": (corners.sum(), tokens**2),
        }
        for name, (found, count) in sums.items():
            assert found.abs().max() < 6 * math.sqrt(count), name  # some 10^5 numbers of a normal distribution

    @pytest.mark.parametrize("masked", [False, True])
    def test_gradients_use_the_same_mask(self, masked):
        """With more keys than queries, a group of rows a tile, and (``masked``) padding and a bias with a gradient."""
        batch, length, keys = 2, 40, 70
        query, key, _ = tensors((batch, 2, length, keys, keys))
        layout = oracle.random_layout(2, 3, 5, 16)
        eye = torch.eye(keys).expand(batch, 2, keys, keys)
        real = padding(3, keys)[[0, 1]]
        bias = torch.randn(1, 2, length, keys) if masked else None
        options = {"key_padding_mask": real if masked else None, "attn_bias": bias}

        def attended(query, key, value, bias):
            torch.manual_seed(3)
            own = moved({**options, "attn_bias": bias})
            return attend(query, key, value, layout.to(DEVICE), dropout_p=self.p, **own)

        kept = attended(*(x.to(DEVICE) for x in (query, key, eye)), bias).cpu() != 0
        leaves = [query, key, torch.randn(batch, 2, keys, keys), *([bias] if masked else [])]
        inputs = [x.detach().to(DEVICE).requires_grad_() for x in leaves]
        out = attended(*inputs[:3], inputs[3] if masked else None)
        exact_inputs = [x.detach().cpu().double().requires_grad_() for x in inputs]
        exact_options = options | {"attn_bias": exact_inputs[3] if masked else None}
        weights = oracle.attention(*exact_inputs[:2], eye.double(), layout, **exact_options)
        exact = torch.where(kept, weights / (1 - self.p), 0.0) @ exact_inputs[2]
        torch.testing.assert_close(out.cpu().double(), exact, rtol=1e-4, atol=1e-5)
        for ours, expected in zip(
            torch.autograd.grad(out.square().sum(), inputs),
            torch.autograd.grad(exact.square().sum(), exact_inputs),
            strict=True,
        ):
            torch.testing.assert_close(ours.cpu().double(), expected, rtol=1e-4, atol=1e-4)


def test_biases_of_minus_infinity_are_no_keys():
    inputs = tensors((1, 2, 45, 45, 8))
    layout = oracle.random_layout(2, 3, 3, 16)
    bias = torch.zeros(45, 45)
    bias[:, 7:] = -torch.inf
    bias[3] = -torch.inf
    check(inputs, layout, attn_bias=bias)


@pytest.mark.parametrize("fill", [-1e9, torch.finfo(torch.float32).min, 1e9], ids=str)
@pytest.mark.parametrize("pruned", ["drop", "zero"])
def test_rows_whose_scores_are_all_far_from_zero(fill, pruned):
    """An additive padding mask over all of a row's kept keys: still a softmax over them, and its gradients."""
    inputs = [x.to(DEVICE).requires_grad_() for x in tensors((1, 2, 61, 61, 8))]
    layout = BlockLayout(torch.eye(4, dtype=torch.bool, device=DEVICE), 16)
    bias = torch.zeros(1, 1, 1, 61, device=DEVICE)
    bias[..., 48:] = fill

    def run(backend):
        out = ops.block_sparse_attention(*inputs, layout, attn_bias=bias, pruned=pruned, backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    # So far out, float32 takes all of a row's scores for equal.
    for ours, expected in zip(run("triton"), run("reference"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # what NumPy says of it in the interpreter
def test_nan_in_a_query_is_not_hidden():
    query, key, value = (x.to(DEVICE) for x in tensors((1, 1, 32, 32, 8)))
    query[0, 0, :16] = torch.nan
    query.requires_grad_()
    layout = BlockLayout(torch.ones(2, 2, dtype=torch.bool, device=DEVICE), 16)
    out = attend(query, key, value, layout)
    out.sum().backward()
    assert out[0, 0, :16].isnan().all()
    assert out[0, 0, 16:].isfinite().all()
    assert query.grad[0, 0, :16].isnan().all()


def test_gradient_to_one_operand_only():
    tensor_list = [x.to(DEVICE) for x in tensors((1, 2, 40, 40, 8))]
    layout = oracle.random_layout(2, 3, 3, 16).to(DEVICE)
    leaves = [x.clone().requires_grad_() for x in tensor_list]
    expected = torch.autograd.grad(attend(*leaves, layout).square().sum(), leaves)
    for i in range(3):
        inputs = [x.clone().requires_grad_(i == j) for j, x in enumerate(tensor_list)]
        (grad,) = torch.autograd.grad(attend(*inputs, layout).square().sum(), inputs[i])
        assert torch.equal(grad, expected[i])


def test_opcheck():
    layout = oracle.random_layout(2, 2, 2, 16).to(DEVICE)
    query, key, value = (x.to(DEVICE).requires_grad_() for x in tensors((2, 2, 21, 21, 8)))
    keep = padding(2, 21).to(DEVICE)
    bias = torch.randn(1, 2, 21, 21, device=DEVICE, requires_grad=True)
    words = torch.randint(-(2**31), 2**31, (2, 2, 42), dtype=torch.int32, device=DEVICE)
    for extra, heavy in (((None, None, None, None, 0.0), False), ((keep, keep, bias, words, 0.2), True)):
        tiles = attention_tiles(16, 8, torch.float32, DEVICE, heavy)
        lists = flash.lists(layout, 4, tiles, True)
        arguments = (query, key, value, layout.mask, 16, tiles, lists, *extra, 0.3, False, True, "ieee")
        torch.library.opcheck(flash.block_attention, arguments)
    out, lse = flash.block_attention(*(x.detach() if isinstance(x, Tensor) else x for x in arguments))
    torch.library.opcheck(
        flash_backward.block_attention_backward,
        (
            torch.ones_like(out),
            out,
            lse,
            query.detach(),
            key.detach(),
            value.detach(),
            layout.mask,
            16,
            tiles[4:],
            lists[4:],
            keep,
            keep,
            bias.detach(),
            words,
            0.2,
            0.3,
            False,
            "ieee",
            True,
        ),
    )


def test_compiles_into_one_graph():
    layout = oracle.random_layout(2, 3, 3, 16).to(DEVICE)
    inputs = [x.to(DEVICE).requires_grad_() for x in tensors((2, 2, 45, 45, 8))]
    keep = padding(2, 45).to(DEVICE)

    def f(q, k, v):
        return attend(q, k, v, layout, key_padding_mask=keep).sin()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*inputs), f(*inputs)
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)
    torch.testing.assert_close(*grads)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_in_a_cuda_graph_a_changed_layout_is_seen():
    mask = oracle.random_layout(2, 4, 4, 16).mask.to(DEVICE)
    inputs = [x.to(DEVICE).requires_grad_() for x in tensors((2, 2, 64, 64, 16))]
    grad = torch.randn(2, 2, 64, 16, device=DEVICE)

    def step():
        out = attend(*inputs, BlockLayout(mask, 16))
        return [out, *torch.autograd.grad(out, inputs, grad)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        mask.copy_(oracle.random_layout(2, 4, 4, 16).mask)
        graph.replay()
        for ours, expected in zip(captured, step(), strict=True):
            assert torch.equal(ours, expected)
