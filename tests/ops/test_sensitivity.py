import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from sat import ops
from sat.layout import BlockLayout
from sat.ops import reference, sensitivity


def problem(length, keys, padded):
    query = 2 * torch.randn(3, length, 2, 8, dtype=torch.float64).transpose(1, 2)
    key, value = torch.randn(2, 3, 2, keys, 8, dtype=torch.float64).unbind(0)
    grad = torch.randn(3, 2, length, 8, dtype=torch.float64)
    options = {"scale": 0.4}
    if padded:
        options["key_padding_mask"] = torch.arange(keys) < torch.tensor([[keys], [keys // 2], [0]])
    return (query, key, value, grad), options


SHAPES = [(64, 64, 16), (61, 61, 16), (50, 70, 32), (1, 9, 4)]


@pytest.mark.parametrize("chunk", [None, 100])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kept", [None, 0.4])
@pytest.mark.parametrize(("length", "keys", "size"), SHAPES)
def test_equals_leaving_each_block_out_or_taking_it_in(length, keys, size, kept, padded, causal, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(sensitivity, "CHUNK_ELEMENTS", chunk)
    tensors, options = problem(length, keys, padded)
    if kept:
        mask = torch.rand(2, -(-length // size), -(-keys // size)) < kept
        mask[0, 0] = False  # a row that keeps nothing
        options["layout"] = BlockLayout(mask, size)
    found = ops.block_sensitivity(*tensors, size, is_causal=causal, **options)
    assert found.dtype == torch.float32
    expected = reference.block_sensitivity(*tensors, size, is_causal=causal, **options)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize(("length", "keys", "size"), SHAPES)
def test_equals_what_pytorchs_attention_changes_by(length, keys, size, keeps):
    tensors, options = problem(length, keys, padded=False)
    query, key, value, grad = tensors
    rows, columns = -(-length // size), -(-keys // size)
    mask = torch.ones(2, rows, columns, dtype=torch.bool)
    if keeps:
        mask = torch.rand(2, rows, columns) < 0.6
        mask[:, :, 0] = True  # PyTorch's attention has no rows without a key
        options["layout"] = BlockLayout(mask, size)
    found = ops.block_sensitivity(*tensors, size, **options)

    def output(mask):
        elements = mask.repeat_interleave(size, 1).repeat_interleave(size, 2)[:, :length, :keys]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=elements, scale=0.4)

    for head in range(2):
        for i in range(rows):
            for j in range(columns):
                other = mask.clone()
                other[head, i, j] = ~other[head, i, j]
                if not other[head, i].any():
                    continue
                change = ((output(other) - output(mask)) * grad).sum((1, 2, 3))
                torch.testing.assert_close(found[head, i, j].double(), change.square().mean(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kept", [None, 0.2, 0.8])
@pytest.mark.parametrize("spread", [2.0, 7.0, 12.0])
def test_sharp_attention_in_float32(spread, kept):
    """A block may hold all of a row but a rest that is far below rounding, or be missing and outweigh all others."""
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        query, key, value, grad = torch.randn(4, 2, 2, 21, 8, generator=generator).unbind(0)
        layout = None
        if kept:
            layout = BlockLayout(torch.rand(2, 6, 6, generator=generator) < kept, 4)
        found = ops.block_sensitivity(query, key, value, grad, 4, layout=layout, scale=spread / 8**0.5)
        exact = (x.double() for x in (query, key, value, grad))
        exact = reference.block_sensitivity(*exact, 4, layout=layout, scale=spread / 8**0.5)
        torch.testing.assert_close(found.double(), exact, rtol=2e-3, atol=1e-5 * exact.max().item())


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
    assert (expected > 0).all()
    assert not gate.grad[:, rows:].any()
    assert not gate.grad[:, :, rows:].any()


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
    mask = torch.rand(2, 3, 3) < 0.5
    opcheck(sensitivity.block_sensitivity, (query, key, value, grad, 8, mask, keep, False, 0.5))
    context, gate = grad.clone().requires_grad_(), torch.zeros(2, 3, 3, requires_grad=True)
    opcheck(
        sensitivity.watch_blocks,
        (context, gate, query, key, value, 8, mask, None, True, 0.5),
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
    layout = BlockLayout(torch.ones(1, 3, 3, dtype=torch.bool), 8)
    with pytest.raises(ValueError, match="the layout has blocks of 8, but block_size is 4"):
        ops.block_sensitivity(x, x, x, x, 4, layout=layout)
    with pytest.raises(ValueError, match="layout"):
        ops.block_sensitivity(x, x[:, :, :16], x[:, :, :16], x, 8, layout=layout)
