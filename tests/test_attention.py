import copy

import pytest
import torch
import torch.nn.functional as F

from sat import ops
from sat.attention import AdaptiveAttention
from sat.layout import BlockLayout
from sat.patterns import Fixed
from tests.ops import oracle


def qkv(length: int = 40, batch: int = 3, heads: int = 2, dim: int = 8) -> list[torch.Tensor]:
    return [torch.randn(batch, length, heads, dim).transpose(1, 2).requires_grad_() for _ in range(3)]


def keep(length: int = 40) -> torch.Tensor:
    return torch.arange(length) < torch.tensor([[length], [length // 3], [0]])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_without_a_layout_it_is_pytorchs_dense_attention(is_causal, padded):
    attention = AdaptiveAttention(2, 40, 16, is_causal=is_causal)
    inputs = qkv()
    mask = keep() if padded else None
    out = attention(*inputs, key_padding_mask=mask)
    everything = BlockLayout(torch.ones(3, 3, dtype=torch.bool), 16)
    exact = oracle.attention(*inputs, everything, key_padding_mask=mask, is_causal=is_causal)
    torch.testing.assert_close(out, exact)
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, upstream)
    assert all(grad.isfinite().all() for grad in grads)
    torch.testing.assert_close(grads, torch.autograd.grad(exact, inputs, upstream))


@pytest.mark.parametrize("heads", [1, 2])
def test_with_a_layout_it_is_block_sparse(heads):
    attention = AdaptiveAttention(2, 40, 16)
    layout = oracle.random_layout(heads, 3, 3, 16)
    attention.set_layout(layout)
    assert attention.is_sparse
    assert torch.equal(attention.layout.mask, layout.mask.expand(2, 3, 3))
    query, key, value = qkv()
    mask = keep()
    out = attention(query, key, value, key_padding_mask=mask, query_padding_mask=mask)
    exact = oracle.attention(query, key, value, layout, key_padding_mask=mask, query_padding_mask=mask)
    torch.testing.assert_close(out, exact)
    attention.set_layout(None)
    assert attention.layout is None
    torch.testing.assert_close(attention(query, key, value), F.scaled_dot_product_attention(query, key, value))


def test_shorter_sequences_use_the_first_rows_and_columns():
    attention = AdaptiveAttention(2, 64, 16)
    layout = oracle.random_layout(2, 4, 4, 16, empty_row=False)
    attention.set_layout(layout)
    inputs = qkv(37)
    exact = oracle.attention(*inputs, BlockLayout(layout.mask[:, :3, :3], 16))
    torch.testing.assert_close(attention(*inputs), exact)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_checkpoint_of_either_phase_loads_into_a_fresh_module(tmp_path, sparse):
    saved = AdaptiveAttention(2, 40, 16)
    if sparse:
        saved.set_layout(oracle.random_layout(2, 3, 3, 16))
    torch.save(saved.state_dict(), tmp_path / "a.pt")
    for was_sparse in (False, True):
        fresh = AdaptiveAttention(2, 40, 16)
        if was_sparse:
            fresh.set_layout(BlockLayout(torch.eye(3, dtype=torch.bool), 16))
        fresh.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True))
        assert fresh.is_sparse == sparse
        inputs = qkv()
        assert torch.equal(fresh(*inputs), saved(*inputs))


def test_no_parameters():
    assert not list(AdaptiveAttention(2, 40, 16).parameters())


def test_statistics_are_taken_when_asked_for_of_the_first_samples():
    attention = AdaptiveAttention(2, 40, 16)
    query, key, value = qkv()
    attention(query, key, value)
    assert attention.statistics is None
    attention.observe_samples = 2
    mask = keep()
    attention(query, key, value, key_padding_mask=mask, query_padding_mask=mask)
    expected = ops.attention_statistics(
        query[:2], key[:2], 16, key_padding_mask=mask[:2], query_padding_mask=mask[:2], score_matrix=True,
        backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(tuple(attention.statistics), tuple(expected))
    assert not attention.statistics.pooled.requires_grad


@pytest.mark.parametrize("length", [40, 20])
def test_several_calls_in_a_batch_are_all_observed(length):
    """As of a layer that a model uses again, or of two towers: the means over the samples of all calls."""
    one, several = AdaptiveAttention(2, 40, 16), AdaptiveAttention(2, 40, 16)
    one.observe_samples = several.observe_samples = 3
    query, key, value = qkv(length)
    one(query, key, value)
    several(query[:1], key[:1], value[:1])
    several(query[1:], key[1:], value[1:])
    assert one.observed_samples == several.observed_samples == 3
    torch.testing.assert_close(tuple(several.statistics), tuple(one.statistics))


def test_evaluation_without_gradients_is_not_observed_nor_is_a_copy():
    attention = AdaptiveAttention(2, 40, 16)
    attention.observe_samples = 3  # and the training is broken off
    assert copy.deepcopy(attention).observe_samples == 0
    with torch.no_grad():
        attention.eval()(*qkv())
        assert attention.statistics is None
        attention.train()(*qkv())  # as activation checkpointing may do
    assert attention.statistics is not None


def test_statistics_of_short_batches_share_one_grid():
    attention = AdaptiveAttention(2, 64, 16)
    attention.observe_samples = 3
    attention(*qkv(20))
    assert attention.statistics.pooled.shape == (2, 4, 4)
    assert attention.statistics.score_matrix.shape == (64, 64)
    assert attention.statistics.score_matrix.sum().item() == pytest.approx(20)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [40, 20])
def test_the_gate_receives_what_the_loss_depends_on(length, padded, compiled):
    attention = AdaptiveAttention(2, 40, 16)
    inputs = qkv(length)
    mask = keep()[:, :length] if padded else None
    plain = torch.autograd.grad(attention(*inputs, key_padding_mask=mask).square().sum(), inputs)
    grad = 2 * attention(*inputs, key_padding_mask=mask).detach()
    attention.observe_samples = 2
    attention.block_gate = gate = torch.zeros(2, 3, 3, requires_grad=True)
    run = torch.compile(attention, fullgraph=True, backend="aot_eager") if compiled else attention
    run(*inputs, key_padding_mask=mask).square().sum().backward()
    torch.testing.assert_close(tuple(x.grad for x in inputs), plain)
    first = [x[:2] for x in (*inputs, grad)]
    expected = ops.block_sensitivity(*first, 16, key_padding_mask=None if mask is None else mask[:2])
    blocks = -(-length // 16)
    torch.testing.assert_close(gate.grad[:, :blocks, :blocks], expected)
    assert gate.grad.count_nonzero() == expected.count_nonzero() > 0
    assert copy.deepcopy(attention).block_gate is None


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [40, 20])
def test_the_gate_of_a_sparse_layer_knows_of_missing_blocks(length, padded, compiled):
    attention = AdaptiveAttention(2, 40, 16)
    layout = oracle.random_layout(2, 3, 3, 16)
    attention.set_layout(layout)
    inputs = qkv(length)
    mask = keep()[:, :length] if padded else None
    plain = torch.autograd.grad(attention(*inputs, key_padding_mask=mask).square().sum(), inputs)
    grad = 2 * attention(*inputs, key_padding_mask=mask).detach()
    attention.observe_samples = 2
    attention.block_gate = gate = torch.zeros(2, 3, 3, requires_grad=True)
    run = torch.compile(attention, fullgraph=True, backend="aot_eager") if compiled else attention
    run(*inputs, key_padding_mask=mask).square().sum().backward()
    torch.testing.assert_close(tuple(x.grad for x in inputs), plain)
    blocks = -(-length // 16)
    part = BlockLayout(layout.mask[:, :blocks, :blocks], 16)
    first = [x[:2] for x in (*inputs, grad)]
    expected = ops.block_sensitivity(*first, 16, layout=part, key_padding_mask=None if mask is None else mask[:2])
    torch.testing.assert_close(gate.grad[:, :blocks, :blocks], expected)
    assert expected[~part.mask].count_nonzero() > 0
    assert attention.statistics is None
    assert attention.observed_samples == 2


def test_no_block_matters_to_padded_queries():
    attention = AdaptiveAttention(2, 40, 8)
    attention.set_layout(oracle.random_layout(2, 5, 5, 8))
    attention.observe_samples, attention.block_gate = 2, torch.zeros(2, 5, 5, requires_grad=True)
    real = torch.arange(40) < torch.tensor([[16], [9], [40]])
    attention(*qkv(40), key_padding_mask=real, query_padding_mask=real).square().sum().backward()
    assert not attention.block_gate.grad[:, 2:].any()
    assert attention.block_gate.grad[:, 0, :2].any()
    assert not attention.block_gate.grad[:, :, 2:].any()  # whose keys are padding


def test_a_bias_cannot_be_watched():
    attention = AdaptiveAttention(2, 40, 16)
    attention.set_layout(oracle.random_layout(2, 3, 3, 16))
    attention.observe_samples, attention.block_gate = 2, torch.zeros(2, 3, 3, requires_grad=True)
    with pytest.raises(ValueError, match="an attention with attn_bias cannot be watched"):
        attention(*qkv(40), attn_bias=torch.zeros(40, 40))


@pytest.mark.parametrize("observe", [0, 2])
@pytest.mark.parametrize("sparse", [False, True])
def test_compiles_into_one_graph_in_both_phases(sparse, observe):
    attention = AdaptiveAttention(2, 40, 16, dropout=0.1)
    if sparse:
        attention.set_layout(oracle.random_layout(2, 3, 3, 16))
    attention.eval()
    attention.observe_samples = observe
    inputs, mask = qkv(), keep()
    expected = attention(*inputs, key_padding_mask=mask)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    attention.statistics = None
    torch.testing.assert_close(compiled(*inputs, key_padding_mask=mask), expected)
    assert (attention.statistics is not None) == bool(observe)
    attention.train()
    compiled(*inputs, key_padding_mask=mask).sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_under_autocast_mixed_dtypes_are_cast_in_both_phases(sparse, compiled):
    attention = AdaptiveAttention(2, 40, 16)
    attention.observe_samples = 2
    if sparse:
        attention.set_layout(oracle.random_layout(2, 3, 3, 16))
    query, key, value = qkv()  # float32, as a norm leaves query and key
    value = value.detach().bfloat16()
    expected = attention(query.bfloat16(), key.bfloat16(), value)
    statistics = attention.statistics
    attend = torch.compile(attention, fullgraph=True, backend="aot_eager") if compiled else attention
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(query, key, value)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(tuple(attention.statistics), tuple(statistics))
    out.float().sum().backward()
    assert query.grad.dtype == torch.float32


def test_dropout_acts_in_training_only():
    attention = AdaptiveAttention(2, 40, 16, dropout=0.5)
    inputs = qkv()
    for layout in (None, oracle.random_layout(2, 3, 3, 16)):
        attention.set_layout(layout)
        assert not torch.equal(attention.train()(*inputs), attention(*inputs))
        assert torch.equal(attention.eval()(*inputs), attention(*inputs))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 0, "seq_len": 8}, "num_heads must be at least 1, got 0"),
        ({"num_heads": 1, "seq_len": 24.0}, "seq_len must be an integer, got 24.0"),
        ({"num_heads": 1, "seq_len": 8, "block_size": 16}, "block_size 16 exceeds seq_len 8"),
        ({"num_heads": 1, "seq_len": 32, "dropout": 1.0}, "dropout must be at least 0 and below 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        AdaptiveAttention(**arguments)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (BlockLayout(torch.ones(3, 3, dtype=torch.bool), 8), "blocks of 8, this attention of 16"),
        (BlockLayout(torch.ones(2, 3, dtype=torch.bool), 16), "got 1 and 2 x 3"),
        (BlockLayout(torch.ones(3, 3, 3, dtype=torch.bool), 16), r"2 heads \(or 1\) and 3 x 3 blocks, got 3"),
    ],
)
def test_layouts_that_do_not_fit(layout, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveAttention(2, 40, 16).set_layout(layout)


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        (torch.ones(3, 3, dtype=torch.bool), r"got Tensor; make one by BlockLayout\(mask, block_size\)"),
        (Fixed(2), r"got Fixed; make one for a length by its method layout\(seq_len\)"),
    ],
)
def test_what_is_no_layout_is_refused(given, hint):
    attention = AdaptiveAttention(2, 40, 16)
    with pytest.raises(TypeError, match=f"layout must be a BlockLayout, {hint}"):
        attention.set_layout(given)
    assert not attention.is_sparse


def test_tensors_that_do_not_fit():
    attention = AdaptiveAttention(2, 40, 16)
    with pytest.raises(ValueError, match="made for 2 heads and up to 40 tokens, got 3 heads, 41 queries"):
        attention(*(torch.randn(1, 3, 41, 8) for _ in range(3)))


def test_says_its_phase():
    attention = AdaptiveAttention(2, 40, 16)
    assert "dense" in repr(attention)
    attention.set_layout(BlockLayout(torch.eye(3, dtype=torch.bool), 16))
    assert "sparse, density 0.333" in repr(attention)


@pytest.mark.parametrize("length", [32, 50])
def test_the_skewness_of_short_batches_is_that_of_the_matrix_that_they_leave(length):
    """As several batches and processes have it, whose matrices are averaged; and padding to the full length."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 2, 64, 8)
    padding = torch.zeros(4, 64, dtype=torch.bool)
    padding[:, :length] = True
    short, padded = AdaptiveAttention(2, 64, 8), AdaptiveAttention(2, 64, 8)
    for attention in (short, padded):
        attention.observe_samples = 4
    short.observe(query[:, :, :length], key[:, :, :length])
    padded.observe(query, key, padding, padding)
    matrix = short.statistics.score_matrix.double()
    centred = matrix - matrix.mean()
    expected = centred.pow(3).mean() / centred.square().mean() ** 1.5
    torch.testing.assert_close(short.statistics.skewness.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(padded.statistics.skewness.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("length", "seq_len"), [(33, 64), (5, 40), (40, 60), (17, 17)])
def test_a_part_of_a_block_counts_for_as_much_as_it_is(length, seq_len):
    """The same attention, padded to the full length, has the same mass in each block."""
    query, key = torch.randn(2, 3, 2, seq_len, 8)
    padding = torch.zeros(3, seq_len, dtype=torch.bool)
    padding[:, :length] = True
    short, padded = AdaptiveAttention(2, seq_len, 16), AdaptiveAttention(2, seq_len, 16)
    for attention in (short, padded):
        attention.observe_samples = 3
    short.observe(query[:, :, :length], key[:, :, :length])
    padded.observe(query, key, padding, padding)
    torch.testing.assert_close(short.statistics.pooled, padded.statistics.pooled, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_computes_what_its_own_buffers_say(use_buffers):
    attention = AdaptiveAttention(2, 40, 16)
    average = torch.optim.swa_utils.AveragedModel(
        torch.nn.ModuleDict({"a": attention, "b": torch.nn.Linear(2, 2)}),
        multi_avg_fn=None if use_buffers else torch.optim.swa_utils.get_ema_multi_avg_fn(0.9),
    )
    assert not average.module["a"].is_sparse
    layout = oracle.random_layout(2, 3, 3, 16)
    attention.set_layout(layout)
    average.update_parameters(torch.nn.ModuleDict({"a": attention, "b": torch.nn.Linear(2, 2)}))
    copied = average.module["a"]
    assert copied.is_sparse
    assert copied.layout == layout
    inputs = qkv()
    torch.testing.assert_close(copied(*inputs), oracle.attention(*inputs, layout))
    attention.set_layout(None)
    average.update_parameters(torch.nn.ModuleDict({"a": attention, "b": torch.nn.Linear(2, 2)}))
    assert not copied.is_sparse


def test_a_copy_on_the_meta_device_keeps_its_phase():
    attention = AdaptiveAttention(2, 40, 16)
    attention.set_layout(oracle.random_layout(2, 3, 3, 16))
    assert copy.deepcopy(attention).to("meta").is_sparse


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key_padding_mask": torch.ones(3, 40)}, TypeError, "key_padding_mask must be a bool tensor"),
        ({"key_padding_mask": torch.ones(3, 40, dtype=torch.int64)}, TypeError, "use mask.bool()"),
        ({"key_padding_mask": torch.ones(1, 40) > 0}, ValueError, r"must have the shape \[3, 40\], got \[1, 40\]"),
        ({"query_padding_mask": torch.ones(3, 39) > 0}, ValueError, r"query_padding_mask must have the shape"),
        ({"key": torch.zeros(1, 2, 40, 8)}, ValueError, "query and key must agree in batch"),
        ({"value": torch.zeros(3, 2, 40, 4)}, ValueError, "key and value must have one shape"),
        ({"key": torch.zeros(3, 2, 30, 8)}, ValueError, "key and value must have one shape"),
        ({"query": torch.zeros(2, 40, 8)}, ValueError, r"query must be \[batch, heads, length, head dimension\]"),
        ({"value": torch.zeros(3, 2, 40, 8).half()}, TypeError, "convert them to one dtype"),
    ],
)
def test_both_phases_refuse_the_same(sparse, change, error, message):
    """What trains wrongly in the dense phase would otherwise come out at the switch only."""
    attention = AdaptiveAttention(2, 40, 16)
    attention.set_layout(oracle.random_layout(2, 3, 3, 16) if sparse else None)
    with pytest.raises(error, match=message):
        attention(**(dict(zip(("query", "key", "value"), qkv(), strict=True)) | change))


def test_other_buffers_in_its_place_say_the_phase():
    """Those of torch.func.functional_call, and of a move to another device, have versions of their own."""
    attention, inputs = AdaptiveAttention(2, 40, 16), qkv()
    layout = oracle.random_layout(2, 3, 3, 16)
    sparse = AdaptiveAttention(2, 40, 16)
    sparse.set_layout(layout)
    for states in (sparse.state_dict(), {name: x.clone() for name, x in sparse.state_dict().items()}):
        out = torch.func.functional_call(attention, states, tuple(inputs))
        torch.testing.assert_close(out, oracle.attention(*inputs, layout))
        assert not attention.is_sparse
    attention.load_state_dict(AdaptiveAttention(2, 40, 16).state_dict())
    attention._apply(lambda x: x.clone())
    attention.sparse.copy_(sparse.sparse)
    assert attention.is_sparse


def test_a_compiled_one_notices_what_was_written_to_its_buffers_once_it_was_asked():
    attention, inputs = AdaptiveAttention(2, 40, 16), qkv()
    sparse = AdaptiveAttention(2, 40, 16)
    sparse.set_layout(oracle.random_layout(2, 3, 3, 16))
    compiled = torch.compile(attention, backend="aot_eager")
    compiled(*inputs)
    for name, buffer in attention.named_buffers():
        buffer.copy_(sparse.get_buffer(name))
    assert attention.is_sparse
    torch.testing.assert_close(compiled(*inputs), sparse(*inputs))


def test_made_on_the_meta_device_it_is_printed_and_reset():
    with torch.device("meta"):
        attention = AdaptiveAttention(2, 40, 16, dropout=0.1)
    assert "dense" in repr(attention)
    attention.load_state_dict(AdaptiveAttention(2, 40, 16).to("meta").state_dict())
    attention.to_empty(device="cpu")
    attention.layout_mask.random_()  # whatever was in the memory
    attention.sparse.fill_(True)
    attention.reset_parameters()
    assert not attention.is_sparse
    inputs = qkv()
    expected = F.scaled_dot_product_attention(*inputs)
    torch.testing.assert_close(attention(*inputs, dropout_p=1e-9), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sparse", [False, True])
def test_compiles_with_sizes_that_are_kept_open(sparse):
    """Layouts have a head each."""
    attention = AdaptiveAttention(2, 40, 16, is_causal=True)
    attention.set_layout(oracle.random_layout(2, 3, 3, 16) if sparse else None)
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (40, 37):
        inputs, padding = qkv(length), keep(length)
        out = compiled(*inputs, key_padding_mask=padding)
        torch.testing.assert_close(out, attention(*inputs, key_padding_mask=padding))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's attention one by one, under vmap
def test_of_many_models_called_at_once_the_phase_is_that_of_the_first():
    """As torch.func ensembles do, whose buffers have no single value."""
    models = [AdaptiveAttention(2, 16, 8) for _ in range(3)]
    _, buffers = torch.func.stack_module_state(models)
    query = torch.randn(3, 1, 2, 16, 8)
    base = models[0]
    out = torch.vmap(lambda states, x: torch.func.functional_call(base, states, (x, x, x)))(buffers, query)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, query, query))
    assert not base.is_sparse


def test_fake_buffers_keep_the_phase():
    from torch._subclasses.fake_tensor import FakeTensorMode

    attention = AdaptiveAttention(2, 16, 8)
    states = attention.state_dict()
    with FakeTensorMode() as mode:
        states = {name: mode.from_tensor(x) for name, x in states.items()}
        query = torch.empty(1, 2, 16, 8)
        out = torch.func.functional_call(attention, states, (query, query, query))
    assert out.shape == (1, 2, 16, 8)
    assert not attention.is_sparse


def test_a_checkpoint_that_is_loaded_in_inference_mode_is_computed_as_it_is():
    saved = AdaptiveAttention(2, 40, 16)
    saved.set_layout(oracle.random_layout(2, 3, 3, 16))
    inputs = [x.detach() for x in qkv()]
    with torch.inference_mode():
        attention = AdaptiveAttention(2, 40, 16)
        attention._apply(lambda x: x.clone())  # as a move to another device does
        attention.load_state_dict(saved.state_dict())
        assert attention.is_sparse
        torch.testing.assert_close(attention(*inputs), saved(*inputs))
