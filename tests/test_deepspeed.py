"""What users of DeepSpeed's Sparse Attention know by name, against dense float64; and the page that leads them here."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sat import ops, patterns
from sat.deepspeed import SparseSelfAttention, pad_to_block_size, unpad_sequence_output
from sat.layout import BlockLayout
from tests.ops import oracle

TRITON = pytest.mark.skipif(
    ops.triton is None or not ops.triton.INTERPRETED, reason="these tensors are on the CPU: for the interpreter only"
)


class Banded:
    """A structure of one's own: each block sees itself and the one before, head 1 the first block too."""

    block_size = 16

    def __init__(self, is_causal: bool = False) -> None:
        self.is_causal = is_causal
        self.calls: list[int] = []

    def layout(self, seq_len: int) -> BlockLayout:
        self.calls.append(seq_len)
        blocks = -(-seq_len // self.block_size)
        mask = torch.ones(2, blocks, blocks, dtype=torch.bool).triu(-1)
        mask = mask.tril(0 if self.is_causal else 1)
        mask[1, :, 0] = True
        return BlockLayout(mask, self.block_size)


def make_inputs(length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key and value ``[2, 2, L, 8]``, not contiguous."""
    return [torch.randn(2, length, 2, 8).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


def dense_weights(
    query: Tensor, key: Tensor, layout: BlockLayout, added: list[Tensor], allowed: list[Tensor]
) -> Tensor:
    """Attention weights by a dense masked softmax in the dtype of the query; rows without a key are 0."""
    scores = torch.einsum("bhld,bhsd->bhls", query, key) * query.shape[-1] ** -0.5
    for x in added:
        scores = scores + x
    length = query.shape[2]
    kept = oracle.element_mask(layout, length, length)[None]
    for x in allowed:
        kept = kept & x
    scores = scores.masked_fill(~kept, -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return F.softmax(scores.masked_fill(empty, 0), -1).masked_fill(empty, 0)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("padding_mode", "attention_mode"), [("add", "mul"), ("mul", "add")])
@pytest.mark.parametrize("length", [1, 37, 64])
def test_attention_with_everything(backend, is_causal, padding_mode, attention_mode, length):
    query, key, value = make_inputs(length)
    rpe = torch.randn(1, 2, length, length, dtype=torch.float64, requires_grad=True)
    numbers = torch.randn(2, length, dtype=torch.float64).relu()  # about half of them 0
    numbers[1] = 0  # under "mul", a sample without a single key
    padding = numbers.clone().requires_grad_(padding_mode == "add")
    mask = torch.randn(length, length, dtype=torch.float64).relu().requires_grad_(attention_mode == "add")
    added, allowed = [rpe], [torch.ones(length, length, dtype=torch.bool).tril()] if is_causal else []
    (added if padding_mode == "add" else allowed).append(
        padding[:, None, None] if padding_mode == "add" else padding[:, None, None] != 0
    )
    (added if attention_mode == "add" else allowed).append(mask if attention_mode == "add" else mask != 0)

    attention = SparseSelfAttention(Banded(is_causal), padding_mode, attention_mode, backend=backend)
    ours = attention(query, key, value, rpe=rpe, key_padding_mask=padding, attn_mask=mask)
    expected = dense_weights(query, key, Banded(is_causal).layout(length), added, allowed) @ value
    torch.testing.assert_close(ours, expected)
    leaves = [x for x in (query, key, value, rpe, padding, mask) if x.requires_grad]
    upstream = torch.randn_like(expected)
    for grad, wanted in zip(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("torch", torch.float32),
        ("torch", torch.bfloat16),
        ("torch", torch.float16),
        pytest.param("triton", torch.float32, marks=TRITON),
        pytest.param("triton", torch.bfloat16, marks=TRITON),
    ],
    ids=str,
)
def test_error_is_at_most_twice_pytorchs(backend, dtype):
    length = 37
    query, key, value = (x.detach() for x in make_inputs(length, dtype))
    rpe = torch.randn(1, 2, length, length).to(dtype)
    padding = torch.zeros(2, 1, 1, length, dtype=dtype)  # as BERT makes it
    padding[0, ..., 30:] = -10000.0
    mask = (torch.rand(length, length) < 0.8).to(dtype).fill_diagonal_(1)
    attention = SparseSelfAttention(Banded(is_causal=True), backend=backend)
    ours = attention(query, key, value, rpe, padding, mask)
    assert ours.dtype == dtype

    layout = attention._layout_for(length, 2, query.device)
    allowed = [torch.ones(length, length, dtype=torch.bool).tril(), mask != 0]
    exact_inputs = [x.double() for x in (query, key, value)]
    exact = dense_weights(*exact_inputs[:2], layout, [rpe.double(), padding.double()], allowed) @ exact_inputs[2]
    kept = oracle.element_mask(layout, length, length) & allowed[0] & allowed[1]
    bias = (rpe.float() + padding.float()).masked_fill(~kept, -torch.inf).to(dtype)
    pytorch = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    oracle.assert_as_exact_as_pytorch(ours, exact, pytorch, "context")


@pytest.mark.parametrize("structure", [patterns.Fixed, patterns.Variable, patterns.BigBird, patterns.Longformer])
def test_no_token_sees_its_future(structure):
    """DeepSpeed's unidirectional layouts leaked: whole blocks of them, and all diagonal blocks inside."""
    attention = SparseSelfAttention(structure(2, attention="unidirectional"))
    length = 100
    query, key, value = (x.detach() for x in make_inputs(length))
    expected = attention(query, key, value)
    for last in (0, 15, 16, 50, 98):
        changed = [x.clone() for x in (query, key, value)]
        for x in changed:
            x[:, :, last + 1 :] = torch.randn_like(x[:, :, last + 1 :])
        torch.testing.assert_close(attention(*changed)[:, :, : last + 1], expected[:, :, : last + 1])


def test_a_layout_is_made_once_a_length_and_never_shared():
    first, second = Banded(), Banded()
    attentions = [SparseSelfAttention(first), SparseSelfAttention(second)]
    for length in (40, 100, 48, 33, 40):
        for attention in attentions:
            attention(*make_inputs(length))
    assert first.calls == second.calls == [40, 100]  # 33 to 48 tokens are three blocks
    layouts = [attention._layout_for(40, 2, torch.device("cpu")) for attention in attentions]
    assert layouts[0] is attentions[0]._layout_for(40, 2, torch.device("cpu"))
    assert layouts[0] is not layouts[1]
    assert layouts[0].derived is not layouts[1].derived


def test_a_pattern_needs_nothing_but_a_layout():
    class Diagonal:
        def layout(self, seq_len: int) -> BlockLayout:
            return BlockLayout(torch.eye(-(-seq_len // 8), dtype=torch.bool), 8)

    attention = SparseSelfAttention(Diagonal())
    assert not attention.is_causal
    for length in (20, 23, 7):
        inputs = make_inputs(length)
        torch.testing.assert_close(attention(*inputs), oracle.attention(*inputs, Diagonal().layout(length)))


def test_two_configurations_of_one_length_do_not_mix():
    """DeepSpeed kept what it derived from layouts by length only, for all modules together."""
    inputs = make_inputs(64)
    everything, nearby = (
        patterns.Dense(2),
        patterns.SlidingWindow(2, attention="bidirectional", num_sliding_window_blocks=1),
    )
    for structure in (everything, nearby):
        expected = oracle.attention(*inputs, structure.layout(64))
        torch.testing.assert_close(SparseSelfAttention(structure)(*inputs), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_layouts_of_its_own(duplicate):
    attention = SparseSelfAttention(Banded())
    inputs = make_inputs(40)
    expected = attention(*inputs)
    other = duplicate(attention)
    torch.testing.assert_close(other(*inputs), expected)
    layouts = [x._layout_for(40, 2, torch.device("cpu")) for x in (attention, other)]
    assert layouts[0] is not layouts[1]
    assert not attention.state_dict()


def test_a_layout_that_evaluation_made_serves_training():
    attention = SparseSelfAttention(Banded())
    inputs = make_inputs(40)
    with torch.inference_mode():
        attention(*(x.detach() for x in inputs))
    attention(*inputs).sum().backward()
    assert inputs[0].grad is not None


def test_max_seq_length_takes_the_corner_of_one_layout():
    structure = patterns.Fixed(2)  # windows of four blocks: where a layout ends, its last window is another
    cut, own = SparseSelfAttention(structure, max_seq_length=160), SparseSelfAttention(structure)
    inputs = make_inputs(90)
    corner = BlockLayout(structure.layout(160).mask[:, :6, :6], 16)
    assert corner != structure.layout(90)
    torch.testing.assert_close(cut(*inputs), oracle.attention(*inputs, corner))
    torch.testing.assert_close(own(*inputs), oracle.attention(*inputs, structure.layout(90)))
    with pytest.raises(ValueError, match="made for up to 160 tokens, got 161; raise max_seq_length"):
        cut(*make_inputs(161))


def test_a_checkpoint_of_deepspeeds_brings_its_layout():
    class OfDeepSpeed(torch.nn.Module):
        """What DeepSpeed's module has in a checkpoint."""

        def __init__(self, layout: Tensor) -> None:
            super().__init__()
            self.register_buffer("master_layout", layout)

    drawn = (torch.rand(2, 6, 6) < 0.4).long()
    saved = torch.nn.ModuleList([OfDeepSpeed(drawn)]).state_dict()
    model = torch.nn.ModuleList([SparseSelfAttention(patterns.BigBird(2, seed=7))])
    model.load_state_dict(saved)
    inputs, corner = make_inputs(70), BlockLayout(drawn[:, :5, :5].bool(), 16)
    torch.testing.assert_close(model[0](*inputs), oracle.attention(*inputs, corner))
    again = torch.nn.ModuleList([SparseSelfAttention(patterns.BigBird(2))])
    again.load_state_dict(model.state_dict())  # and ours brings it back
    torch.testing.assert_close(copy.deepcopy(again)[0](*inputs), oracle.attention(*inputs, corner))
    with pytest.raises(ValueError, match="made for up to 96 tokens, got 97"):
        model[0](*make_inputs(97))
    with pytest.raises(RuntimeError, match=r"0.master_layout of the shape \[6, 6\] is no layout of this pattern"):
        model.load_state_dict({"0.master_layout": drawn[0]})
    plain = SparseSelfAttention(patterns.BigBird(2))
    plain.load_state_dict({})
    assert not plain.state_dict()


def test_bool_masks_mean_the_same_in_either_mode():
    inputs = make_inputs(40)
    real, mask = torch.rand(2, 40) < 0.7, torch.rand(40, 40) < 0.7
    expected = dense_weights(*inputs[:2], Banded().layout(40), [], [real[:, None, None], mask]) @ inputs[2]
    for mode in ("add", "mul"):
        attention = SparseSelfAttention(Banded(), mode, mode)
        torch.testing.assert_close(attention(*inputs, key_padding_mask=real, attn_mask=mask), expected)
        torch.testing.assert_close(attention(*inputs, key_padding_mask=real[:, None, None], attn_mask=mask), expected)


def test_autocast_brings_the_inputs_to_one_dtype():
    attention = SparseSelfAttention(Banded())
    query, key, value = (x.detach() for x in make_inputs(40, torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = attention(query, key, value.bfloat16())
    assert torch.equal(ours, attention(query.bfloat16(), key.bfloat16(), value.bfloat16()))


def test_it_compiles():
    attention = SparseSelfAttention(Banded(is_causal=True))
    inputs, rpe = make_inputs(37), torch.randn(2, 37, 37, dtype=torch.float64)
    expected = attention(*inputs, rpe=rpe)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, rpe=rpe), expected)


def test_a_module_shows_its_pattern():
    text = str(SparseSelfAttention(patterns.BigBird(4)))
    assert "BigBird(num_heads=4" in text
    assert "attn_mask_mode='mul'" in text


class Broken:
    def layout(self, seq_len: int) -> Tensor:
        return torch.ones(1, 3, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: SparseSelfAttention("fixed"), TypeError, r"with a method layout\(seq_len\) .* got str"),
        (lambda x: SparseSelfAttention(Banded), TypeError, "got Banded itself; make one of it"),
        (lambda x: SparseSelfAttention(Banded(), max_seq_length=64.0), TypeError, "max_seq_length must be an integer"),
        (
            lambda x: SparseSelfAttention(Banded(), "plus"),
            ValueError,
            "key_padding_mask_mode must be one of 'add', 'mul'",
        ),
        (
            lambda x: SparseSelfAttention(Banded(), "add", "or"),
            ValueError,
            "attn_mask_mode must be one of 'add', 'mul'",
        ),
        (
            lambda x: SparseSelfAttention(Banded(), max_seq_length=0),
            ValueError,
            "max_seq_length must be at least 1, got 0",
        ),
        (
            lambda x: SparseSelfAttention(Broken())(x, x, x),
            TypeError,
            "Broken.layout must return a BlockLayout, got Tensor",
        ),
        (lambda x: SparseSelfAttention(patterns.Dense(3))(x, x, x), ValueError, "layouts for 3 heads, but there are 2"),
        (
            lambda x: SparseSelfAttention(Banded())(x, x[:, :, 1:], x[:, :, 1:]),
            ValueError,
            "one length, got 40 .* 39 keys",
        ),
        (
            lambda x: SparseSelfAttention(Banded())(x, x.mT, x),
            ValueError,
            "must agree in batch, heads and head dimension",
        ),
        (lambda x: SparseSelfAttention(Banded())(x, x, x.half()), TypeError, "query is torch.float32 but value"),
        (
            lambda x: SparseSelfAttention(Banded())(x, x, x, key_padding_mask=torch.ones(2, 40).long()),
            TypeError,
            r"key_padding_mask is torch.int64, .*key_padding_mask.bool\(\)",
        ),
        (
            lambda x: SparseSelfAttention(Banded())(x, x, x, rpe=x),
            ValueError,
            r"rpe must be broadcastable to \[2, 2, 40",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(2, 2, 40, 8))


# Products of DeepSpeed's MatMul.


def to_values(dense: Tensor, layout: BlockLayout) -> Tensor:
    """Kept blocks of ``[B, H, L, S]``, filled up with 0 past the end."""
    (rows, columns), size = layout.shape, layout.block_size
    dense = F.pad(dense, (0, columns * size - dense.shape[3], 0, rows * size - dense.shape[2]))
    blocks = [
        dense[:, h, r * size : (r + 1) * size, c * size : (c + 1) * size] for h, r, c in layout.mask.nonzero().tolist()
    ]
    return torch.stack(blocks, 1)


@pytest.mark.parametrize("backend", ["reference", "torch", pytest.param("triton", marks=TRITON)])
@pytest.mark.parametrize("trans_b", [False, True])
@pytest.mark.parametrize("trans_a", [False, True])
@pytest.mark.parametrize("mode", ["sdd", "dsd", "dds"])
def test_matmul_and_its_gradients(backend, mode, trans_a, trans_b):
    """``sparse`` is op(A) @ op(B); a sparse operand lies as its layout says, and is transposed with it."""
    length, layout = 24, BlockLayout(torch.tensor([[[1, 1], [0, 0]], [[0, 1], [0, 1]]]).bool(), 16)
    kept = oracle.element_mask(layout, length, length)
    shapes = {
        "sdd": ((length, 8), (8, length)),
        "dsd": ((length, length), (length, 8)),
        "dds": ((8, length), (length, length)),
    }[mode]
    shapes = [
        shape[::-1] if transposed else shape for shape, transposed in zip(shapes, (trans_a, trans_b), strict=True)
    ]
    a, b = (torch.randn(1, 2, *shape, requires_grad=True) for shape in shapes)
    given_a = to_values(a, layout) if mode == "dsd" else a
    given_b = to_values(b, layout) if mode == "dds" else b
    options = {"trans_a": trans_a, "trans_b": trans_b, "backend": backend}
    out = ops.matmul(given_a, given_b, layout, mode, **options)
    upstream = torch.randn_like(out)
    # Past the end there are no positions: their gradient is nobody's.
    upstream = upstream * to_values(torch.ones(1, 2, length, length), layout) if mode == "sdd" else upstream
    ours = [out, *torch.autograd.grad(out, [a, b], upstream)]

    def dense(dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (a, b)]
        left = inputs[0] * kept if mode == "dsd" else inputs[0]
        right = inputs[1] * kept if mode == "dds" else inputs[1]
        product = (left.mT if trans_a else left) @ (right.mT if trans_b else right)
        product = to_values(product, layout) if mode == "sdd" else product
        return [product, *torch.autograd.grad(product, inputs, upstream.to(dtype))]

    for what, mine, exact, pytorch in zip("cab", ours, dense(torch.float64), dense(torch.float32), strict=True):
        oracle.assert_as_exact_as_pytorch(mine, exact, pytorch, what)

    # DeepSpeed's gradients were wrong or missing where only one operand needed them.
    for index, grad in ((0, ours[1]), (1, ours[2])):
        needs = [x if i == index else x.detach() for i, x in enumerate((given_a, given_b))]
        alone = ops.matmul(*needs, layout, mode, **options)
        torch.testing.assert_close(torch.autograd.grad(alone, (a, b)[index], upstream, retain_graph=True)[0], grad)


# Padding.


@pytest.mark.parametrize(("length", "pad_len"), [(1, 15), (16, 0), (37, 11)])
def test_pad_and_unpad(length, pad_len):
    ids, kinds = torch.randint(5, 90, (2, length)), torch.randint(2, (2, length))
    mask = torch.randint(2, (2, length))
    positions = torch.arange(length)[None]
    embeds = torch.randn(2, length, 6, requires_grad=True)
    table = torch.nn.Embedding(90, 6)
    padded = pad_to_block_size(16, ids, mask, kinds, positions, embeds, pad_token_id=3, model_embeddings=table)
    assert padded[0] == pad_len
    for name, before, after, fill in zip(
        ("ids", "mask", "kinds", "positions"), (ids, mask, kinds, positions), padded[1:5], (3, 0, 0, 0), strict=True
    ):
        assert after.shape == (before.shape[0], length + pad_len), name
        assert after.dtype == before.dtype, name
        assert torch.equal(after[:, :length], before), name
        assert (after[:, length:] == fill).all(), name
    assert torch.equal(padded[5][:, :length], embeds)
    assert (padded[5][:, length:] == table.weight[3]).all()
    assert torch.equal(unpad_sequence_output(pad_len, padded[5]), embeds)
    upstream = torch.randn(2, length, 6)
    unpad_sequence_output(pad_len, padded[5] * 2).backward(upstream)
    torch.testing.assert_close(embeds.grad, upstream * 2)


def test_what_was_not_given_is_not_made_but_the_mask():
    ids = torch.randint(5, 90, (2, 10))
    pad_len, padded, mask, *rest = pad_to_block_size(8, ids)
    assert (pad_len, rest) == (6, [None, None, None])
    assert padded.shape == (2, 16)
    assert torch.equal(mask, (torch.arange(16) < 10).long().expand(2, -1))  # or the padding would be attended to
    assert pad_to_block_size(5, ids) == (0, ids, None, None, None, None)
    mask = pad_to_block_size(8, ids, torch.ones(2, 10, dtype=torch.bool))[2]
    assert mask.dtype == torch.bool
    assert not mask[:, 10:].any()


def test_embeddings_without_their_module_are_padded_with_zeros():
    embeds = torch.randn(2, 10, 4, dtype=torch.bfloat16, requires_grad=True)
    pad_len, _, mask, _, _, padded = pad_to_block_size(8, inputs_embeds=embeds)
    assert (pad_len, padded.dtype, mask.sum()) == (6, torch.bfloat16, 20)
    assert (padded[:, 10:] == 0).all()
    padded.sum().backward()
    assert (embeds.grad == 1).all()


def test_padding_changes_nothing_that_is_not_padded():
    """As DeepSpeed's users do it, and as nobody here has to."""
    table, attention = torch.nn.Embedding(90, 16).double(), SparseSelfAttention(Banded(), "mul")
    ids = torch.randint(1, 90, (2, 37))

    def model(ids, mask):
        x = table(ids).unflatten(-1, (2, 8)).transpose(1, 2)
        return attention(x, x, x, key_padding_mask=mask).transpose(1, 2).flatten(2)

    pad_len, padded, mask, *_ = pad_to_block_size(16, ids)
    torch.testing.assert_close(unpad_sequence_output(pad_len, model(padded, mask)), model(ids, None))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pad_to_block_size(16), "nothing to pad: give input_ids or inputs_embeds"),
        (
            lambda: pad_to_block_size(0, torch.ones(1, 3).long()),
            "block_size must be a whole number of at least 1, got 0",
        ),
        (
            lambda: pad_to_block_size(16, torch.ones(2, 3).long(), torch.ones(2, 1, 1, 3)),
            r"attention_mask must have the shape \[2, 3\], got \[2, 1, 1, 3\]",
        ),
        (lambda: pad_to_block_size(16, torch.ones(2, 3).long(), torch.ones(1, 3)), r"attention_mask .* got \[1, 3\]"),
        (
            lambda: pad_to_block_size(16, torch.ones(2, 3).long(), inputs_embeds=torch.ones(2, 4, 5)),
            r"inputs_embeds must have the shape \[2, 3, width\], got \[2, 4, 5\]",
        ),
        (lambda: pad_to_block_size(16, torch.ones(3).long()), r"input_ids must have the shape"),
        (lambda: unpad_sequence_output(4, torch.ones(1, 4, 2)), "below the sequence's 4 tokens, got 4"),
        (lambda: unpad_sequence_output(-1, torch.ones(1, 4, 2)), "got -1"),
    ],
)
def test_bad_padding(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_padding_of_no_tensor():
    with pytest.raises(TypeError, match="input_ids must be a tensor, got list"):
        pad_to_block_size(16, [[1, 2]])


def test_the_page_names_structures_that_exist(project_root):
    page = (project_root / "docs" / "deepspeed.md").read_text(encoding="utf-8")
    names = re.findall(r"`sat\.patterns\.(\w+)", page)
    assert names
    for name in names:
        assert hasattr(patterns, name), name
