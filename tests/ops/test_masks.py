"""Biases and masks of sparse_softmax in all their modes, against a dense masked softmax in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sat import ops
from sat.layout import BlockLayout
from sat.ops import masks
from tests.ops import oracle

TRITON = pytest.mark.skipif(
    ops.triton is None or not ops.triton.INTERPRETED, reason="these tensors are on the CPU: for the interpreter only"
)
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch", pytest.param("triton", marks=TRITON)])
BATCH, HEADS, LENGTH, KEYS, SIZE = 2, 2, 19, 37, 16
SCALE = 0.3


def make_layout() -> BlockLayout:
    """One head lacks a block row, the other all but one block of it."""
    mask = torch.tensor([[[1, 0, 1], [0, 0, 0]], [[0, 1, 1], [1, 0, 0]]], dtype=torch.bool)
    return BlockLayout(mask, SIZE)


def to_values(dense: Tensor, layout: BlockLayout, fill: float = 0.0) -> Tensor:
    """Kept blocks of ``[B, H, L, S]``, filled up past the end."""
    (rows, columns), size = layout.shape, layout.block_size
    dense = F.pad(dense, (0, columns * size - dense.shape[3], 0, rows * size - dense.shape[2]), value=fill)
    return torch.stack(
        [
            dense[:, h, r * size : (r + 1) * size, c * size : (c + 1) * size]
            for h, r, c in layout.mask.nonzero().tolist()
        ],
        1,
    )


def dense_softmax(scores: Tensor, layout: BlockLayout, added: list[Tensor], allowed: list[Tensor]) -> Tensor:
    """Dense, masked, in the dtype of the scores; rows without a key are 0."""
    logits = scores * SCALE
    for x in added:
        logits = logits + x
    kept = oracle.element_mask(layout, *scores.shape[2:])[None]
    for x in allowed:
        kept = kept & x
    logits = logits.masked_fill(~kept, -torch.inf)
    empty = (logits == -torch.inf).all(-1, keepdim=True)
    return F.softmax(logits.masked_fill(empty, 0), -1).masked_fill(empty, 0)


def additive(*shape: int) -> Tensor:
    """What is met in additive masks: trained numbers, -10000, the lowest number, -inf."""
    x = torch.randn(shape)
    kind = torch.rand(shape)
    x[kind < 0.3] = -10000.0
    x[kind < 0.2] = torch.finfo(torch.float32).min
    x[kind < 0.1] = -torch.inf
    return x


def multiplicative(*shape: int) -> Tensor:
    """0 where masked, all kinds of numbers elsewhere; one row of it is masked throughout."""
    x = torch.randn(shape).masked_fill(torch.rand(shape) < 0.4, 0)
    x[1] = 0
    return x


def make_mask(kind: str, *shape: int) -> tuple[dict, Tensor | None, Tensor | None]:
    """The mask and its mode, then what it adds and what it allows."""
    dtype, mode = kind.split(" ")
    if dtype == "bool":
        mask = multiplicative(*shape) != 0
        return {"mask": mask, "mode": mode}, None, mask
    if mode == "add":
        mask = additive(*shape).requires_grad_()
        return {"mask": mask, "mode": mode}, mask, None
    mask = multiplicative(*shape)
    mask = mask.sign().long() if dtype == "int" else mask
    return {"mask": mask, "mode": mode}, None, mask != 0


KINDS = ["bool add", "bool mul", "float add", "float mul", "int mul"]


# The modes are resolved before the backend: Triton, slow in the interpreter, gets each of them, but not each pair.
CASES = [
    pytest.param(backend, padding, attention, marks=TRITON if backend == "triton" else ())
    for backend in ("reference", "torch", "triton")
    for padding in (None, *KINDS)
    for attention in (None, *KINDS)
    if backend != "triton" or padding in (None, attention) or attention is None
]


@pytest.mark.parametrize(("backend", "padding", "attention"), CASES)
def test_every_mode_against_dense(backend, padding, attention):
    layout = make_layout()
    scores = torch.randn(BATCH, HEADS, LENGTH, KEYS, requires_grad=True)
    rpe = torch.randn(1, HEADS, LENGTH, KEYS, requires_grad=True)
    options: dict = {"rpe": rpe}
    added, allowed = [rpe], []
    if padding is not None:
        given, adds, allows = make_mask(padding, BATCH, KEYS)
        options |= {"key_padding_mask": given["mask"], "key_padding_mask_mode": given["mode"]}
        added += [] if adds is None else [adds]
        allowed += [] if allows is None else [allows[:, None, None]]
    if attention is not None:
        given, adds, allows = make_mask(attention, LENGTH, KEYS)
        options |= {"attn_mask": given["mask"], "attn_mask_mode": given["mode"]}
        added += [] if adds is None else [adds]
        allowed += [] if allows is None else [allows]
    leaves = [scores, *added]

    values = to_values(scores, layout, -torch.inf)
    ours = ops.sparse_softmax(
        values, layout, scale=SCALE, query_length=LENGTH, key_length=KEYS, backend=backend, **options
    )
    upstream = torch.randn_like(ours)
    ours_all = [ours, *torch.autograd.grad(ours, leaves, upstream)]

    def dense(dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in leaves]
        broadcast = [x[:, None, None] if x.shape == (BATCH, KEYS) else x for x in inputs[1:]]
        out = to_values(dense_softmax(inputs[0], layout, broadcast, allowed), layout)
        return [out, *torch.autograd.grad(out, inputs, upstream.to(dtype))]

    names = ["weights", "scores", "rpe", "masks", "masks"]
    for what, mine, exact, pytorch in zip(names, ours_all, dense(torch.float64), dense(torch.float32), strict=False):
        oracle.assert_as_exact_as_pytorch(mine, exact, pytorch, what)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(backend, dtype):
    """Masks of the usual numbers beside an embedding, all in half precision."""
    layout = make_layout()
    scores, rpe = torch.randn(BATCH, HEADS, LENGTH, KEYS).to(dtype), torch.randn(HEADS, LENGTH, KEYS).to(dtype)
    padding = torch.zeros(BATCH, KEYS, dtype=dtype)
    padding[0, 20:], padding[1] = -10000.0, -10000.0  # the second sample's rows are all alike: a softmax as without
    future = torch.zeros(LENGTH, KEYS, dtype=dtype).masked_fill(
        torch.ones(LENGTH, KEYS).triu(5) > 0, torch.finfo(dtype).min
    )
    ours = ops.sparse_softmax(
        to_values(scores, layout, -torch.inf),
        layout,
        scale=SCALE,
        rpe=rpe,
        key_padding_mask=padding,
        attn_mask=future,
        query_length=LENGTH,
        backend=backend,
    )
    assert ours.dtype == dtype

    def dense(compute):
        added = [x.to(compute) for x in (rpe, padding[:, None, None], future)]
        return to_values(dense_softmax(scores.to(compute), layout, added, []), layout)

    oracle.assert_as_exact_as_pytorch(ours, dense(torch.float64), dense(torch.float32).to(dtype), "weights")


@BACKENDS
def test_fully_masked_rows_are_zero(backend):
    layout = BlockLayout(torch.ones(1, 2, dtype=torch.bool), 16)
    scores = torch.randn(2, 2, 16, 16, requires_grad=True)
    lowest = torch.finfo(torch.float32).min
    nothing = {
        "key_padding_mask": [torch.zeros(2, 32, dtype=torch.bool), torch.full((2, 32), -torch.inf)],
        "attn_mask": [torch.zeros(16, 32, dtype=torch.bool), torch.full((16, 32), -torch.inf)],
    }
    cases: list[dict] = [{name: mask} for name, given in nothing.items() for mask in given]
    cases += [
        {"key_padding_mask": torch.zeros(2, 32), "key_padding_mask_mode": "mul"},
        {"attn_mask": torch.zeros(16, 32), "attn_mask_mode": "mul"},
        {"key_padding_mask": torch.full((2, 32), lowest), "attn_mask": torch.full((16, 32), lowest)},
    ]
    for options in cases:
        weights = ops.sparse_softmax(scores, layout, backend=backend, **options)
        assert (weights == 0).all(), options
        assert (torch.autograd.grad(weights.sum(), scores)[0] == 0).all(), options


@BACKENDS
def test_all_that_is_given_is_added(backend):
    layout = make_layout()
    values = torch.randn(BATCH, layout.nnz, SIZE, SIZE)
    pieces = [
        torch.randn(shape) for shape in [(HEADS, LENGTH, KEYS), (1, HEADS, 1, KEYS), (BATCH, KEYS), (LENGTH, KEYS)]
    ]
    bias, rpe, padding, mask = pieces
    ours = ops.sparse_softmax(
        values, layout, attn_bias=bias, rpe=rpe, key_padding_mask=padding, attn_mask=mask, backend=backend
    )
    total = bias + rpe + padding[:, None, None] + mask
    expected = ops.sparse_softmax(values, layout, attn_bias=total, backend=backend)
    torch.testing.assert_close(ours, expected)


def test_pruned_logits_heed_padding_but_no_attention_mask():
    layout = make_layout()
    values = torch.randn(BATCH, layout.nnz, SIZE, SIZE, dtype=torch.float64)
    real, allowed = torch.rand(BATCH, KEYS) < 0.6, torch.rand(LENGTH, KEYS) < 0.6
    options: dict = {"pruned": "zero", "query_length": LENGTH}
    ours = ops.sparse_softmax(
        values, layout, key_padding_mask=real.float(), key_padding_mask_mode="mul", attn_mask=allowed, **options
    )
    bias = torch.zeros(LENGTH, KEYS, dtype=torch.float64).masked_fill(~allowed, -torch.inf)
    expected = ops.sparse_softmax(values, layout, key_padding_mask=real, attn_bias=bias, backend="reference", **options)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", ["rpe", "attn_mask"])
def test_lengths_come_from_any_of_them(name):
    layout = make_layout()
    values = torch.randn(BATCH, layout.nnz, SIZE, SIZE)
    given = torch.randn(LENGTH, KEYS)
    ours = ops.sparse_softmax(values, layout, **{name: given})
    torch.testing.assert_close(ours, ops.sparse_softmax(values, layout, attn_bias=given))


def test_non_contiguous_masks():
    layout = make_layout()
    values = torch.randn(BATCH, layout.nnz, SIZE, SIZE)
    mask, rpe = torch.randn(KEYS, LENGTH).relu(), torch.randn(LENGTH, KEYS, HEADS)
    padding = torch.randn(BATCH, 2 * KEYS)[:, ::2]
    options = {"key_padding_mask": padding, "attn_mask": mask.mT, "attn_mask_mode": "mul", "rpe": rpe.movedim(2, 0)}
    ours = ops.sparse_softmax(values, layout, **options)
    contiguous = {key: x.contiguous() if isinstance(x, Tensor) else x for key, x in options.items()}
    assert torch.equal(ours, ops.sparse_softmax(values, layout, **contiguous))


SHAPE = (BATCH, HEADS, LENGTH, KEYS)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"key_padding_mask": torch.zeros(BATCH, KEYS)}, (BATCH, 1, 1, KEYS)),
        ({"attn_mask": torch.ones(LENGTH, KEYS, dtype=torch.bool)}, (1, 1, LENGTH, KEYS)),
        ({"attn_mask": torch.ones(1, 1, LENGTH, KEYS).expand(SHAPE), "attn_mask_mode": "mul"}, (1, 1, LENGTH, KEYS)),
        ({"attn_mask": torch.zeros(LENGTH, KEYS).expand(SHAPE)}, (1, 1, LENGTH, KEYS)),
        ({"rpe": torch.zeros(HEADS, 1, KEYS), "attn_mask": torch.zeros(LENGTH, KEYS)}, (1, HEADS, LENGTH, KEYS)),
        (
            {"key_padding_mask": torch.ones(BATCH, KEYS, dtype=torch.bool), "rpe": torch.zeros(1, HEADS, LENGTH, KEYS)},
            (1, HEADS, LENGTH, KEYS),
        ),
    ],
)
def test_nothing_is_spread_out_needlessly(options, expected):
    _, bias = masks.combine(torch.zeros(1), SHAPE, **options)
    assert bias.shape == expected


def test_a_single_bias_is_handed_on_as_it_is():
    rpe = torch.randn(1, HEADS, LENGTH, KEYS, dtype=torch.bfloat16)
    padding, bias = masks.combine(torch.zeros(1), SHAPE, rpe=rpe)
    assert padding is None
    assert bias.dtype == torch.bfloat16
    assert bias.data_ptr() == rpe.data_ptr()
    assert masks.combine(torch.zeros(1), SHAPE) == (None, None)


def test_it_compiles():
    layout = make_layout()
    values = torch.randn(BATCH, layout.nnz, SIZE, SIZE)
    options = {
        "rpe": torch.randn(HEADS, LENGTH, KEYS),
        "key_padding_mask": torch.randn(BATCH, KEYS),
        "attn_mask": torch.randn(LENGTH, KEYS).relu(),
        "attn_mask_mode": "mul",
    }
    compiled = torch.compile(ops.sparse_softmax, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(values, layout, **options), ops.sparse_softmax(values, layout, **options))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rpe": torch.zeros(3, LENGTH, KEYS)}, ValueError, r"rpe must be broadcastable to \[2, 2, 19, 37\], got \[3,"),
        ({"rpe": torch.zeros(LENGTH, KEYS).bool()}, TypeError, "rpe must be a floating-point tensor .* got torch.bool"),
        ({"rpe": 3.0}, TypeError, "rpe must be a tensor, got float"),
        ({"attn_mask": [[True]]}, TypeError, "attn_mask must be a tensor, got list"),
        ({"attn_mask": torch.zeros(LENGTH, KEYS + 1)}, ValueError, r"attn_mask must be broadcastable .* \[19, 38\]"),
        ({"attn_mask": torch.ones(LENGTH, KEYS).long()}, TypeError, r"attn_mask is torch.int64, .*attn_mask.bool\(\)"),
        ({"attn_mask": torch.ones(LENGTH, KEYS) * 1j}, TypeError, "attn_mask must be bool, integer, .*complex64"),
        ({"attn_mask_mode": "or"}, ValueError, "attn_mask_mode must be one of 'add', 'mul', got 'or'"),
        ({"key_padding_mask_mode": None}, ValueError, "key_padding_mask_mode must be one of 'add', 'mul', got None"),
        ({"key_padding_mask": torch.ones(BATCH, KEYS).int()}, TypeError, "is torch.int32, but in the mode 'add'"),
        ({"key_padding_mask": torch.ones(1, KEYS)}, ValueError, r"must have the shape \[2, 37\], got \[1, 37"),
        ({"key_padding_mask": torch.ones(BATCH, KEYS, device="meta")}, ValueError, "on meta, the tensors are on cpu"),
        ({"attn_mask": torch.ones(LENGTH, KEYS, device="meta")}, ValueError, "on meta, the tensors are on cpu"),
    ],
)
def test_bad_arguments(options, error, message):
    layout = make_layout()
    values = torch.randn(BATCH, layout.nnz, SIZE, SIZE)
    with pytest.raises(error, match=message):
        ops.sparse_softmax(values, layout, query_length=LENGTH, key_length=KEYS, **options)
