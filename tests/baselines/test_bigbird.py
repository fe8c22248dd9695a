# BigBird's attention against Hugging Face's, given the same random blocks, and against masked attention, in float64.
from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sat.baselines.bigbird import BigBirdAttention, bigbird_layout
from sat.layout import BlockLayout
from sat.ops import block_sparse_attention
from tests.ops import oracle


def fixed_blocks(blocks: int) -> Tensor:
    """What all heads see, row by row."""
    mask = torch.zeros(blocks, blocks, dtype=torch.bool)
    for row in range(blocks):
        for column in range(blocks):
            mask[row, column] = 0 in (row, column) or blocks - 1 in (row, column) or abs(row - column) <= 1
    return mask


def inputs(batch: int, heads: int, length: int, dim: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    projected = torch.randn(3, batch, length, heads, dim, dtype=torch.float64).to(dtype)
    return [x.transpose(1, 2).detach().requires_grad_() for x in projected]


HEADS, WIDTH, BLOCK, LENGTH = 2, 16, 4, 56  # 14 blocks


class HuggingFace:
    """Their layer in float64, the random blocks it used, and ours on the same projections."""

    def __init__(self, seed: int) -> None:
        pytest.importorskip("transformers")
        from transformers import BigBirdConfig
        from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

        config = BigBirdConfig(
            hidden_size=WIDTH,
            num_attention_heads=HEADS,
            block_size=BLOCK,
            num_random_blocks=3,
            max_position_embeddings=LENGTH,
        )
        self.layer = BigBirdBlockSparseAttention(config, seed=seed).double()
        self.create_masks = BigBirdModel.create_masks_for_block_sparse_attn
        self.hidden = torch.randn(3, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)

    def attend(self, real: Tensor) -> Tensor:
        blocked, band, rows, columns = self.create_masks(real.double(), BLOCK)
        masks = {"band_mask": band, "from_mask": rows, "to_mask": columns}
        return self.layer(self.hidden, **masks, from_blocked_mask=blocked, to_blocked_mask=blocked)[0]

    def project(self) -> list[Tensor]:
        layer = self.layer
        return [
            f(self.hidden).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (layer.query, layer.key, layer.value)
        ]

    def assert_equal(self, ours: Tensor, theirs: Tensor, real: Tensor) -> None:
        ours = ours.transpose(1, 2).flatten(2)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        parameters = [self.hidden, *self.layer.parameters()]
        upstream = torch.randn_like(ours) * real[..., None]
        for mine, grad in zip(
            torch.autograd.grad(ours, parameters, upstream),
            torch.autograd.grad(theirs, parameters, upstream),
            strict=True,
        ):
            torch.testing.assert_close(mine, grad, rtol=1e-10, atol=1e-12)


def real_tokens(padded: bool) -> Tensor:
    lengths = torch.tensor([[LENGTH], [41], [18]]) if padded else torch.tensor([[LENGTH]] * 3)
    return torch.arange(LENGTH) < lengths


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_hugging_face_with_its_random_blocks(seed: int, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = HuggingFace(seed)
    drawn: list[Any] = []
    draw = theirs.layer._bigbird_block_rand_mask_with_head
    monkeypatch.setattr(
        theirs.layer, "_bigbird_block_rand_mask_with_head", lambda **options: drawn.append(draw(**options)) or drawn[-1]
    )
    real = real_tokens(padded)
    expected = theirs.attend(real)
    (blocks,) = drawn
    random_blocks = torch.stack([torch.as_tensor(head) for head in blocks]).long()
    layout = bigbird_layout(random_blocks, BLOCK)
    assert layout.nnz == HEADS * (int(fixed_blocks(14).sum()) + 12 * 3), "theirs drew a block that is seen anyway"
    masks = {"key_padding_mask": real, "query_padding_mask": real} if padded else {}
    theirs.assert_equal(block_sparse_attention(*theirs.project(), layout, **masks), expected, real)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_hugging_face_equals_it_with_our_random_blocks(
    training: bool, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = BigBirdAttention(HEADS, 100, block_size=BLOCK, seed=5).train(training)
    layout = attention.layout_for(LENGTH, torch.device("cpu"))
    random_blocks = (layout.mask & ~fixed_blocks(14))[:, 1:-1].nonzero()[:, 2].view(HEADS, 12, 3)
    theirs = HuggingFace(seed=0)
    theirs.layer.train(training)
    monkeypatch.setattr(
        theirs.layer, "_bigbird_block_rand_mask_with_head", lambda **options: list(random_blocks.numpy())
    )
    real = real_tokens(padded)
    masks = {"key_padding_mask": real, "query_padding_mask": real} if padded else {}
    theirs.assert_equal(attention(*theirs.project(), **masks), theirs.attend(real), real)


def test_full_attention_up_to_the_length_of_hugging_face() -> None:
    pytest.importorskip("transformers")
    from transformers import BigBirdConfig, BigBirdModel

    config = BigBirdConfig(
        vocab_size=10,
        hidden_size=8,
        num_attention_heads=2,
        num_hidden_layers=1,
        intermediate_size=8,
        block_size=2,
        num_random_blocks=1,
        max_position_embeddings=64,
    )
    attention = BigBirdAttention(2, 64, block_size=2, num_random_blocks=1)
    for length in (10, 13, 14, 15, 16, 20):
        model = BigBirdModel(config).eval()
        model(torch.ones(1, length, dtype=torch.long))
        layout = attention.layout_for(length, torch.device("cpu"))
        assert (layout.density == 1) == (model.attention_type == "original_full"), length


@pytest.mark.parametrize(
    ("length", "size", "count"), [(1024, 32, 3), (1000, 32, 3), (177, 16, 3), (60, 4, 0), (97, 4, 2)]
)
def test_the_layout(length: int, size: int, count: int) -> None:
    attention = BigBirdAttention(4, length, block_size=size, num_random_blocks=count, seed=3)
    mask = attention.layout_mask
    blocks = -(-length // size)
    fixed = fixed_blocks(blocks)
    assert mask.shape == (4 if count else 1, blocks, blocks)  # without random blocks, all heads are alike
    assert mask[:, fixed].all()
    assert ((mask & ~fixed).sum(2)[:, 1:-1] == count).all()
    assert mask[:, [0, -1]].all()
    if count:
        assert not torch.equal(mask[0], mask[1])
        other = BigBirdAttention(4, length, block_size=size, num_random_blocks=count, seed=4)
        assert not torch.equal(mask, other.layout_mask)


def test_random_blocks_reach_everywhere() -> None:
    mask = BigBirdAttention(64, 512).layout_mask & ~fixed_blocks(16)
    assert (mask.any(0) | fixed_blocks(16)).all()
    # 3 of 11 candidates in rows 2 to 13: each is drawn by 17 of 64 heads or so.
    assert mask[:, 2:-2].sum(0)[~fixed_blocks(16)[2:-2]].float().std() < 6


def test_one_layout_a_length() -> None:
    state = torch.get_rng_state()
    attention, again = (BigBirdAttention(2, 1000, seed=7) for _ in range(2))
    long, short = (attention.layout_for(length, torch.device("cpu")) for length in (1000, 600))
    assert torch.equal(long.mask, attention.layout_mask)
    assert long == again.layout_for(1000, torch.device("cpu"))
    assert (
        short
        == again.layout_for(600, torch.device("cpu"))
        == BigBirdAttention(2, 600, seed=7).layout_for(600, torch.device("cpu"))
    )
    attention.eval()
    assert attention.layout_for(600, torch.device("cpu")) is short, "made anew, its derived lists are lost"
    assert torch.equal(torch.get_rng_state(), state), "the global random state has moved"
    torch.manual_seed(1)
    assert short == BigBirdAttention(2, 1000, seed=7).layout_for(600, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["none", "tails", "holes"])
@pytest.mark.parametrize("length", [1, 15, 88, 89, 200, 250])
def test_equals_masked_attention(length: int, kind: str) -> None:
    attention = BigBirdAttention(2, 250, block_size=8)
    tensors = inputs(3, 2, length, 8)
    mask = None
    if kind == "tails":
        mask = torch.arange(length) < torch.tensor([[length], [length // 2], [1]])
    elif kind == "holes":
        mask = torch.rand(3, length) < 0.6
        mask[1] = False
    out = attention(*tensors, key_padding_mask=mask, query_padding_mask=mask)
    layout = attention.layout_for(length, torch.device("cpu"))
    expected = oracle.attention(*tensors, layout, key_padding_mask=mask, query_padding_mask=mask)
    assert (layout.density == 1) == (length <= 88)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(out)
    for ours, grad in zip(
        torch.autograd.grad(out, tensors, upstream), torch.autograd.grad(expected, tensors, upstream), strict=True
    ):
        torch.testing.assert_close(ours, grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_exact_as_pytorch(dtype: torch.dtype) -> None:
    attention = BigBirdAttention(2, 250, block_size=8)
    tensors = inputs(2, 2, 250, 16, dtype)
    upstream = torch.randn(2, 2, 250, 16).to(dtype)

    def results(given: Sequence[Tensor], out: Tensor) -> list[Tensor]:
        return [out.detach(), *torch.autograd.grad(out, given, upstream.to(out.dtype))]

    layout = attention.layout_for(250, torch.device("cpu"))
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    exact = results(doubles, oracle.attention(*doubles, layout))
    pytorch = results(tensors, oracle.attention(*tensors, layout))
    for name, *three in zip(
        ("out", "query", "key", "value"), results(tensors, attention(*tensors)), exact, pytorch, strict=True
    ):
        oracle.assert_as_exact_as_pytorch(*three, name)


def test_dropout_in_training_only() -> None:
    attention = BigBirdAttention(2, 250, block_size=8, dropout=0.25)
    query, key, value = inputs(2, 2, 250, 8, torch.float32)
    value = torch.ones_like(value)
    out = attention(query, key, value)
    assert not torch.allclose(out, torch.ones(()))
    assert abs(out.mean() - 1) < 0.02
    torch.testing.assert_close(attention.eval()(query, key, value), torch.ones(2, 2, 250, 8))


def test_autocast_decides_the_dtype() -> None:
    attention = BigBirdAttention(2, 250, block_size=8)
    tensors = inputs(2, 2, 250, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*tensors)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), attention(*tensors), rtol=0.05, atol=0.05)


def test_the_layout_moves_but_is_not_saved() -> None:
    attention = BigBirdAttention(2, 250, block_size=8)
    assert not attention.state_dict()
    attention.load_state_dict({})
    assert copy.deepcopy(attention).to("meta").layout_mask.device.type == "meta"


def test_a_layout_made_in_inference_mode_serves_training() -> None:
    attention = BigBirdAttention(2, 250, block_size=8)
    tensors = inputs(2, 2, 200, 8)
    with torch.inference_mode():
        attention(*tensors)
    attention(*tensors).sum().backward()
    assert all(x.grad is not None for x in tensors)


def test_a_copy_gives_the_same() -> None:
    attention = BigBirdAttention(2, 250, block_size=8)
    tensors = inputs(2, 2, 200, 8)
    out = attention(*tensors)
    assert torch.equal(copy.deepcopy(attention)(*tensors), out)


def test_compiles_whole() -> None:
    attention = BigBirdAttention(2, 250, block_size=8)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for length in (250, 200, 170, 50):
        tensors = inputs(2, 2, length, 8)
        expected = attention(*tensors)  # makes the layouts of shorter lengths, which a graph cannot
        out = compiled(*tensors)
        torch.testing.assert_close(out, expected)
        for ours, grad in zip(
            torch.autograd.grad(out.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True
        ):
            torch.testing.assert_close(ours, grad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"seq_len": 0}, "seq_len must be at least 1, got 0"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"num_random_blocks": -1}, "num_random_blocks must be at least 0, got -1"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    ],
)
def test_settings_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BigBirdAttention(**{"num_heads": 2, "seq_len": 100, **options})


def test_tensors_that_do_not_go_together() -> None:
    query, key, value = inputs(2, 2, 100, 4)
    with pytest.raises(ValueError, match="made for 3 heads"):
        BigBirdAttention(3, 100)(query, key, value)
    with pytest.raises(ValueError, match="got 2 heads, 50 queries and 100 keys"):
        BigBirdAttention(2, 100)(query[:, :, :50], key, value)


def test_random_blocks_by_hand() -> None:
    layout = bigbird_layout(torch.tensor([[[2], [2], [0], [5], [1]]]), 16)
    expected = fixed_blocks(7)
    expected[4, 5] = expected[5, 1] = True
    assert layout == BlockLayout(expected, 16)


@pytest.mark.parametrize(
    ("random_blocks", "error", "message"),
    [
        (torch.zeros(2, 3, 1), TypeError, "must be a tensor of torch.int64, got torch.float32"),
        ([[[0]]], TypeError, "must be a tensor of torch.int64, got list"),
        (torch.zeros(2, 3, dtype=torch.long), ValueError, r"got the shape \[2, 3\]"),
        (torch.full((2, 3, 1), 5), ValueError, "for 5 block rows must lie between 0 and 4, got values from 5 to 5"),
        (torch.full((2, 3, 1), -1), ValueError, "must lie between 0 and 4"),
    ],
)
def test_random_blocks_that_do_not_do(random_blocks: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bigbird_layout(random_blocks, 16)
