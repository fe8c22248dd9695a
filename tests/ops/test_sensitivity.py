import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from sat import ops
from sat.ops import reference, sensitivity


def blocks_of(x, size, rows, columns):
    """``[H, rows, columns]`` sums over blocks by slices of ``[H, L, S]``."""
    parts = [
        [x[:, i * size : (i + 1) * size, j * size : (j + 1) * size].sum((1, 2)) for j in range(columns)]
        for i in range(rows)
    ]
    return torch.stack([torch.stack(row, 1) for row in parts], 1)


@pytest.mark.parametrize("chunk", [None, 100])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("length", "keys", "size"), [(64, 64, 16), (61, 61, 16), (50, 70, 32), (1, 9, 4)])
def test_equals_the_derivative_by_a_bias_of_each_score(length, keys, size, padded, causal, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(sensitivity, "CHUNK_ELEMENTS", chunk)
    query = 2 * torch.randn(3, length, 2, 8, dtype=torch.float64).transpose(1, 2)
    key, value = torch.randn(2, 3, 2, keys, 8, dtype=torch.float64).unbind(0)
    grad = torch.randn(3, 2, length, 8, dtype=torch.float64)
    options = {"is_causal": causal, "scale": 0.4}
    if padded:
        options["key_padding_mask"] = torch.arange(keys) < torch.tensor([[keys], [keys // 2], [0]])
    found = ops.block_sensitivity(query, key, value, grad, size, **options)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), reference.block_sensitivity(query, key, value, grad, size, **options))
    if padded and causal:
        return  # PyTorch's own attention has no rows without a key
    # PyTorch's attention with a bias for each score, one sample after the other.
    mean = 0
    for b in range(3):
        if padded and not options["key_padding_mask"][b].any():
            continue
        bias = torch.zeros(2, length, keys, dtype=torch.float64)
        if padded:
            bias = bias.masked_fill(~options["key_padding_mask"][b], -torch.inf)
        if causal:
            bias = bias.masked_fill(torch.ones(length, keys).triu(1).bool(), -torch.inf)
        bias.requires_grad_()
        out = F.scaled_dot_product_attention(query[b], key[b], value[b], attn_mask=bias, scale=0.4)
        (d_bias,) = torch.autograd.grad((out * grad[b]).sum(), bias)
        mean = mean + blocks_of(d_bias, size, *found.shape[1:]).square() / 3
    torch.testing.assert_close(found.double(), mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_exact_as_its_inputs(dtype):
    query, key, value, grad = torch.randn(4, 2, 2, 45, 16, dtype=torch.float64).to(dtype).unbind(0)
    exact = reference.block_sensitivity(*(x.double() for x in (query, key, value, grad)), 16, scale=0.25)
    found = ops.block_sensitivity(query, key, value, grad, 16, scale=0.25)
    # Whatever the inputs are, sums are in float32: of 256 terms that cancel in part.
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-6 * exact.max().item())


@pytest.mark.parametrize("length", [32, 21])
def test_the_gate_receives_the_sensitivity_of_the_observed_samples(length):
    query, key, value = torch.randn(3, 4, 2, length, 8, requires_grad=True).unbind(0)
    gate = torch.zeros(2, 4, 4, requires_grad=True)  # of 32 tokens
    first = slice(3)
    context = F.scaled_dot_product_attention(query, key, value)
    watched = ops.watch_blocks(context, gate, query[first], key[first], value[first], 8)
    assert torch.equal(watched, context)
    loss = watched.square().sum() + watched[:, 0].sum()
    plain = torch.autograd.grad(context.square().sum() + context[:, 0].sum(), query, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, query, retain_graph=True)[0], plain)
    context.retain_grad()
    loss.backward()
    rows = -(-length // 8)
    expected = ops.block_sensitivity(query[first], key[first], value[first], context.grad[first], 8)
    assert torch.equal(gate.grad[:, :rows, :rows], expected)
    assert gate.grad.sum() == expected.sum() > 0


def test_through_a_compiled_model_and_checkpoints():
    gate = torch.zeros(2, 4, 4, requires_grad=True)

    def layer(x):
        out = F.scaled_dot_product_attention(x, x, x)
        return ops.watch_blocks(out, gate, x[:1], x[:1], x[:1], 8).sin()

    x = torch.randn(2, 2, 32, 8, requires_grad=True)
    found = []
    for run in (
        layer,
        torch.compile(layer, fullgraph=True),
        lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True),
        lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False),
    ):
        gate.grad = None
        run(x).sum().backward()
        found.append(gate.grad)
    for each in found[1:]:
        torch.testing.assert_close(each, found[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_operators_are_registered_right():
    query, key, value, grad = torch.randn(4, 2, 2, 20, 8).unbind(0)
    keep = torch.ones(2, 20, dtype=torch.bool)
    opcheck(sensitivity.block_sensitivity, (query, key, value, grad, 8, keep, False, 0.5))
    context, gate = grad.clone().requires_grad_(), torch.zeros(2, 3, 3, requires_grad=True)
    opcheck(
        sensitivity.watch_blocks,
        (context, gate, query, key, value, 8, None, True, 0.5),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_bad_input():
    x = torch.randn(2, 2, 20, 8)
    with pytest.raises(ValueError, match=r"grad is the gradient .* \[2, 2, 20, 8\], got .*19"):
        ops.block_sensitivity(x, x, x, x[:, :, 1:], 8)
    with pytest.raises(ValueError, match="block_size must be a whole number of at least 1, got 0"):
        ops.block_sensitivity(x, x, x, x, 0)
    with pytest.raises(ValueError, match="key_padding_mask"):
        ops.block_sensitivity(x, x, x, x, 8, key_padding_mask=torch.ones(2, 19, dtype=torch.bool))
