# Longformer's attention against Hugging Face's layer and against masked softmax over the full matrix, in float64.
from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sat.baselines.longformer import LongformerAttention
from tests.ops.oracle import assert_as_exact_as_pytorch

NAMES = ("query", "key", "value", "global_query", "global_key", "global_value")


def dense(
    tensors: Sequence[Tensor],
    window: int,
    dilations: Sequence[int],
    count: int,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Tensor:
    """Longformer with the full matrix and PyTorch's softmax, in the dtype of the tensors."""
    query, key, value, global_query, global_key, global_value = tensors
    batch, _, length, dim = query.shape
    count = min(count, length)
    positions = torch.arange(length)
    apart = positions[None] - positions[:, None]
    seen = torch.stack([(apart % step == 0) & (apart.abs() <= step * window // 2) for step in dilations])
    seen = seen | (positions < count)
    real = torch.ones(batch, length, dtype=torch.bool) if key_mask is None else key_mask
    seen = seen[None] & real[:, None, None]

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = (q * dim**-0.5) @ k.transpose(2, 3)
        empty = ~mask.any(-1, keepdim=True)
        scores = scores.masked_fill(~mask & ~empty, -torch.inf)
        return (F.softmax(scores, -1) @ v).masked_fill(empty, 0)

    context = attend(query, key, value, seen)
    everything = real[:, None, None].expand(-1, 1, count, -1)
    rows = attend(global_query[:, :, :count], global_key, global_value, everything)
    context = torch.cat([rows, context[:, :, count:]], 2)
    return context if query_mask is None else context * query_mask[:, None, :, None]


def inputs(batch: int, heads: int, length: int, dim: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Six tensors as projections leave them: heads inside, not contiguous."""
    projected = torch.randn(6, batch, length, heads, dim, dtype=torch.float64).to(dtype)
    return [x.transpose(1, 2).detach().requires_grad_() for x in projected]


def run(attention: nn.Module, tensors: Sequence[Tensor], count: int, **masks: Tensor | None) -> Tensor:
    given = dict(zip(NAMES, tensors, strict=True))
    return attention(**(given if count else {name: given[name] for name in NAMES[:3]}), **masks)


def gradients(out: Tensor, upstream: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    grads = torch.autograd.grad(out, tensors, upstream, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(tensors, grads, strict=True)]


def padding(kind: str, batch: int, length: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "tails":
        lengths = torch.linspace(length, length // 2 + 1, batch).long()
        return torch.arange(length) < lengths[:, None]
    mask = torch.rand(batch, length) < 0.6
    mask[0, : length // 2] = False  # also the global tokens, and whole windows
    mask[-1] = False  # all padding
    return mask


@pytest.mark.parametrize("kind", ["none", "tails", "holes"])
@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("dilations", [[1, 1], [3, 3], [1, 4], [2, 300]], ids=str)
@pytest.mark.parametrize(("length", "window"), [(1, 2), (3, 64), (65, 2), (67, 64), (129, 64), (200, 8), (193, 40)])
def test_equals_masked_softmax(length: int, window: int, dilations: list[int], count: int, kind: str) -> None:
    tensors = inputs(3, 2, length, 4)
    dilation = dilations[0] if dilations[0] == dilations[1] else dilations
    attention = LongformerAttention(2, 200, window=window, dilation=dilation, num_global_tokens=count)
    mask = padding(kind, 3, length)
    query_mask = None if mask is None else mask.roll(1, 0)
    out = run(attention, tensors, count, key_padding_mask=mask, query_padding_mask=query_mask)
    expected = dense(tensors, window, dilations, count, mask, query_mask)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(out)
    for name, ours, theirs in zip(
        NAMES, gradients(out, upstream, tensors), gradients(expected, upstream, tensors), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_queries_without_a_key_give_exactly_zero() -> None:
    tensors = inputs(2, 2, 100, 4)
    mask = torch.ones(2, 100, dtype=torch.bool)
    mask[0, 20:80] = False
    mask[1] = False
    out = run(LongformerAttention(2, 100, window=8, num_global_tokens=0), tensors, 0, key_padding_mask=mask)
    assert (out[0, :, 24:76] == 0).all()
    assert (out[0, :, :24] != 0).all()
    assert (out[1] == 0).all()
    for grad in torch.autograd.grad(out, tensors[:3], torch.randn_like(out)):
        assert (grad[1] == 0).all()
        assert (grad[0, :, 24:76] == 0).all()


def test_short_global_queries_do() -> None:
    tensors = inputs(2, 2, 150, 4)
    attention = LongformerAttention(2, 150, num_global_tokens=3)
    short = [*tensors[:3], tensors[3][:, :, :3], *tensors[4:]]
    torch.testing.assert_close(run(attention, short, 3), run(attention, tensors, 3), rtol=0, atol=0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_equals_hugging_face(count: int, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, and gradients to the hidden states and all six projections."""
    pytest.importorskip("transformers")
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    softmax = F.softmax
    # Theirs takes the softmax in float32, whatever it is given.
    monkeypatch.setattr(F, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
    batch, length, heads, width, window = 3, 128, 2, 16, 32
    config = LongformerConfig(
        hidden_size=width, num_attention_heads=heads, attention_window=[window], attention_probs_dropout_prob=0.0
    )
    theirs = LongformerSelfAttention(config, layer_id=0).double()
    hidden = torch.randn(batch, length, width, dtype=torch.float64, requires_grad=True)
    real = torch.arange(length) < torch.tensor([[128], [70], [33]])
    if not padded:
        real = torch.ones_like(real)
    is_global = (torch.arange(length) < count).expand_as(real)
    (expected,) = theirs(
        hidden,
        attention_mask=torch.where(is_global, 10000.0, torch.where(real, 0.0, -10000.0)).double(),
        is_index_masked=~real,
        is_index_global_attn=is_global,
        is_global_attn=count > 0,
    )
    projections = [theirs.query, theirs.key, theirs.value]
    projections += [theirs.query_global, theirs.key_global, theirs.value_global] if count else []
    attention = LongformerAttention(heads, length, window=window, num_global_tokens=count)
    tensors = [project(hidden).unflatten(-1, (heads, -1)).transpose(1, 2) for project in projections]
    masks = {"key_padding_mask": real, "query_padding_mask": real} if padded else {}
    out = attention(**dict(zip(NAMES, tensors, strict=False)), **masks).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out * real[..., None], expected * real[..., None], rtol=1e-10, atol=1e-12)
    parameters = [hidden, *(x for project in projections for x in project.parameters())]
    upstream = torch.randn_like(out) * real[..., None]
    for ours, grad in zip(
        torch.autograd.grad(out, parameters, upstream),
        torch.autograd.grad(expected, parameters, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dilations", [[1, 1], [1, 3]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_exact_as_pytorch(dtype: torch.dtype, dilations: list[int]) -> None:
    tensors = inputs(2, 2, 300, 16, dtype)
    upstream = torch.randn(2, 2, 300, 16).to(dtype)
    mask = padding("tails", 2, 300)
    results = []
    attention = LongformerAttention(2, 300, dilation=dilations, num_global_tokens=2)
    for kind in ("ours", "exact", "pytorch"):
        given = [x.detach().double().requires_grad_() for x in tensors] if kind == "exact" else tensors
        if kind == "ours":
            out = run(attention, given, 2, key_padding_mask=mask, query_padding_mask=mask)
        else:
            out = dense(given, 64, dilations, 2, mask, mask)
        results.append([out.detach(), *gradients(out, upstream.to(out.dtype), given)])
    for name, ours, exact, pytorch in zip(("out", *NAMES), *results, strict=True):
        assert ours.dtype == dtype
        assert_as_exact_as_pytorch(ours, exact, pytorch, name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dilations", [[1, 1], [1, 3]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype: torch.dtype, dilations: list[int]) -> None:
    tensors = inputs(3, 2, 300, 16, dtype)
    upstream = torch.randn(3, 2, 300, 16).to(dtype)
    mask = padding("holes", 3, 300)
    assert mask is not None
    attention = LongformerAttention(2, 300, dilation=dilations, num_global_tokens=2).cuda()
    masks = {"key_padding_mask": mask.cuda(), "query_padding_mask": mask.cuda()}
    moved = [x.detach().cuda().requires_grad_() for x in tensors]
    out = run(attention, moved, 2, **masks)
    ours = [x.cpu() for x in (out.detach(), *gradients(out, upstream.cuda(), moved))]
    results = []
    for given in ([x.detach().double().requires_grad_() for x in tensors], tensors):
        expected = dense(given, 64, dilations, 2, mask, mask)
        results.append([expected.detach(), *gradients(expected, upstream.to(expected.dtype), given)])
    for name, *three in zip(("out", *NAMES), ours, *results, strict=True):
        assert_as_exact_as_pytorch(*three, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_half_precisions_do_not_overflow(dtype: torch.dtype, training: bool) -> None:
    """Scores of 16 * 200 * 200 are beyond float16 before they are scaled."""
    tensors = [
        x.sign().detach() * (1 if "value" in name else 200)
        for name, x in zip(NAMES, inputs(1, 2, 200, 16, dtype), strict=True)
    ]
    tensors = [x.requires_grad_() for x in tensors]
    attention = LongformerAttention(2, 200, dropout=0.1 * training).train(training)
    out = run(attention, tensors, 1)
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in gradients(out, torch.ones_like(out), tensors))


def test_autocast_decides_the_dtype() -> None:
    tensors = inputs(2, 2, 150, 16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(LongformerAttention(2, 150), tensors, 1)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), dense(tensors, 64, [1, 1], 1), rtol=0.05, atol=0.05)


def test_dropout_in_training_only() -> None:
    tensors = inputs(2, 2, 150, 4, torch.float32)
    tensors[2] = torch.ones_like(tensors[2]).requires_grad_()
    tensors[5] = torch.ones_like(tensors[5]).requires_grad_()
    attention = LongformerAttention(2, 150, dropout=0.25)
    out = run(attention, tensors, 1)
    assert not torch.allclose(out, torch.ones(()))
    assert not torch.allclose(out[:, :, :1], torch.ones(()))
    assert abs(out.mean() - 1) < 0.02
    assert all(grad.isfinite().all() for grad in gradients(out, torch.ones_like(out), tensors))
    torch.testing.assert_close(run(attention.eval(), tensors, 1), torch.ones(2, 2, 150, 4))


def test_dropout_where_queries_have_no_key() -> None:
    tensors = inputs(3, 2, 150, 4, torch.float32)
    mask = padding("holes", 3, 150)
    out = run(LongformerAttention(2, 150, window=8, dropout=0.25), tensors, 1, key_padding_mask=mask)
    empty = dense(tensors, 8, [1, 1], 1, mask) == 0
    assert empty.any()
    assert (out[empty] == 0).all()
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in gradients(out, torch.randn_like(out), tensors))


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            # An expanded tensor takes no memory for its repetitions.
            if isinstance(x, Tensor) and 0 not in x.stride():
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("dilation", [1, 2])
def test_memory_grows_with_the_length_not_its_square(dilation: int) -> None:
    largest = []
    for length in (1024, 4096):
        attention = LongformerAttention(2, length, window=32, dilation=dilation)
        tensors = inputs(1, 2, length, 8, torch.float32)
        with Largest() as mode:
            out = run(attention, tensors, 1, key_padding_mask=torch.ones(1, length, dtype=torch.bool))
            gradients(out, out.detach(), tensors)
        largest.append(mode.elements)
    assert largest[1] < 4.1 * largest[0]
    assert largest[1] < 4096 * 8 * 32


def test_compiles_whole() -> None:
    attention = LongformerAttention(2, 300, dilation=[1, 3], num_global_tokens=2)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for length in (300, 200):
        tensors = inputs(2, 2, length, 4)
        mask = padding("holes", 2, length)
        out, expected = (run(f, tensors, 2, key_padding_mask=mask) for f in (compiled, attention))
        torch.testing.assert_close(out, expected)
        upstream = torch.randn_like(out)
        for ours, grad in zip(gradients(out, upstream, tensors), gradients(expected, upstream, tensors), strict=True):
            torch.testing.assert_close(ours, grad)


def test_nothing_goes_into_a_checkpoint() -> None:
    assert not LongformerAttention(2, 100, dilation=[1, 2]).state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"seq_len": 0}, "seq_len must be at least 1, got 0"),
        ({"window": 7}, "window must be even, half of it on each side, got 7"),
        ({"window": 0}, "window must be at least 2, got 0"),
        ({"dilation": 0}, "dilation must be a whole number of at least 1, or 2 of them"),
        ({"dilation": [1, 2, 3]}, r"one for each head; got \[1, 2, 3\]"),
        ({"num_global_tokens": -1}, "num_global_tokens must be at least 0, got -1"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    ],
)
def test_settings_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LongformerAttention(**{"num_heads": 2, "seq_len": 100, **options})


def test_tensors_that_do_not_go_together() -> None:
    query, key, value, *others = inputs(2, 2, 100, 4)
    attention = LongformerAttention(2, 100)
    with pytest.raises(ValueError, match="1 global tokens; pass global_query, global_key and global_value"):
        attention(query, key, value)
    given = dict(zip(NAMES[3:], others, strict=True))
    with pytest.raises(ValueError, match="num_global_tokens=0; it takes no global query"):
        LongformerAttention(2, 100, num_global_tokens=0)(query, key, value, **given)
    with pytest.raises(ValueError, match="at least 3 rows"):
        LongformerAttention(2, 100, num_global_tokens=3)(
            query, key, value, **given | {"global_query": others[0][:, :, :2]}
        )
    with pytest.raises(ValueError, match="up to 99 tokens, as many keys as queries; got 2 heads, 100 queries"):
        LongformerAttention(2, 99)(query, key, value, **given)
    with pytest.raises(ValueError, match="got 2 heads, 50 queries and 100 keys"):
        attention(query[:, :, :50], key, value, **given)
    with pytest.raises(TypeError, match="key_padding_mask must be a bool tensor"):
        attention(query, key, value, **given, key_padding_mask=torch.ones(2, 100))
    with pytest.raises(ValueError, match=r"query_padding_mask must have the shape \[2, 100\]"):
        attention(query, key, value, **given, query_padding_mask=torch.ones(2, 99, dtype=torch.bool))
