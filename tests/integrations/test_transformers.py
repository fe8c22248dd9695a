# SAT in models of Hugging Face transformers: what "sdpa" computes until there are layouts, then exactly what they say.
from __future__ import annotations

import copy
import json
import pickle
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    DebertaV2Config,
    DebertaV2Model,
    DeepseekV3Config,
    DeepseekV3Model,
    DeiTConfig,
    DeiTModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralModel,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
    T5Model,
    ViTConfig,
    ViTModel,
    masking_utils,
)
from transformers.masking_utils import AttentionMaskInterface, create_bidirectional_mask, create_causal_mask, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from sat import ops
from sat.attention import AdaptiveAttention
from sat.integrations import transformers as integration
from sat.integrations.transformers import load_layouts, prepare, register, save_layouts
from sat.layout import BlockLayout
from sat.patterns import Fixed

pytestmark = [
    # transformers calls what PyTorch has begun to retire, and its hub client what Python has.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

LENGTH, BLOCK, HEADS = 37, 8, 4
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 32}
TEXT = {**SIZES, "vocab_size": 50, "max_position_embeddings": 48}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {**SIZES, "image_size": 24, "patch_size": 4}  # 36 patches and one special token, or two

MODELS: dict[str, tuple[type[PreTrainedModel], Callable[[], Any]]] = {
    "bert": (BertModel, lambda: BertConfig(**TEXT)),
    "roberta": (RobertaModel, lambda: RobertaConfig(**{**TEXT, "max_position_embeddings": 50})),
    "distilbert": (
        DistilBertModel,
        lambda: DistilBertConfig(
            vocab_size=50, dim=32, n_heads=HEADS, n_layers=2, hidden_dim=32, max_position_embeddings=48
        ),
    ),
    "modernbert": (
        ModernBertModel,
        lambda: ModernBertConfig(
            **TEXT, **SPECIAL, cls_token_id=1, sep_token_id=2, local_attention=8, global_attn_every_n_layers=2
        ),
    ),
    "vit": (ViTModel, lambda: ViTConfig(**IMAGE)),
    "deit": (DeiTModel, lambda: DeiTConfig(**IMAGE)),
    "llama": (LlamaModel, lambda: LlamaConfig(**TEXT, **SPECIAL, num_key_value_heads=2)),
    "gpt2": (
        GPT2Model,
        lambda: GPT2Config(
            vocab_size=50, n_embd=32, n_layer=2, n_head=HEADS, n_positions=48, bos_token_id=1, eos_token_id=2
        ),
    ),
    # Values narrower than queries and keys.
    "deepseek": (
        DeepseekV3Model,
        lambda: DeepseekV3Config(
            **TEXT,
            **SPECIAL,
            num_key_value_heads=HEADS,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=6,
            first_k_dense_replace=2,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        ),
    ),
    "decoder": (BertLMHeadModel, lambda: BertConfig(**TEXT, is_decoder=True)),
}
CAUSAL = ("llama", "gpt2", "deepseek", "decoder")
TEXTS = [name for name in MODELS if name not in ("vit", "deit")]
CASES = [
    (name, padding) for name in MODELS for padding in ("none", "right", "left") if name in TEXTS or padding == "none"
]


def make(name: str, implementation: str = "sat", seed: int = 0, dropout: float = 0.0) -> PreTrainedModel:
    """The same weights for the same seed, whatever the implementation."""
    torch.manual_seed(seed)
    cls, config = MODELS[name]
    settings = config()
    for option in ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop"):
        if hasattr(settings, option):
            setattr(settings, option, dropout)
    model = cls._from_config(settings, attn_implementation=implementation)
    for parameter in model.parameters():  # attention that is not uniform, and position tables that are not 0
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def batch_of(name: str, padding: str = "none", length: int = LENGTH) -> dict[str, Any]:
    """Three samples of 37 tokens, or two pictures; padded ones have 37, 20 and 9 real tokens."""
    generator = torch.Generator().manual_seed(1)
    if name in ("vit", "deit"):
        return {"pixel_values": torch.randn(2, 3, 24, 24, generator=generator)}
    batch: dict[str, Any] = {"input_ids": torch.randint(3, 50, (3, length), generator=generator)}
    if padding != "none":
        mask = torch.arange(length) < torch.tensor([length, 20, 9])[:, None]
        batch["attention_mask"] = (mask if padding == "right" else mask.flip(1)).long()
    if name in CAUSAL:
        batch["use_cache"] = False
    return batch


def cast(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}


def features(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    return model(**batch)[0]


def gradients(model: PreTrainedModel, output: Tensor, real: Tensor | None = None) -> list[Tensor]:
    weight = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(2))
    if real is not None:  # what padding gives is nobody's business
        output, weight = output[real.bool()], weight[real.bool()]
    (output * weight).sum().backward()
    # Parameters without a gradient take no part: a pooler, or an unused table.
    return [p.grad for n, p in model.named_parameters() if p.grad is not None and ".sat." not in n]


def reached(length: int, seq_len: int) -> Tensor:
    """Which share of the elements of each block a sequence of this length has: its mean is one over the whole block."""
    share = [min(BLOCK, length - i) / min(BLOCK, seq_len - i) for i in range(0, length, BLOCK)]
    return torch.outer(torch.tensor(share), torch.tensor(share))


def random_layouts(model: PreTrainedModel, seed: int = 3) -> dict[str, AdaptiveAttention]:
    """A layout of its own for each head of each layer; a few rows are empty."""
    generator = torch.Generator().manual_seed(seed)
    states = prepare(model, block_size=BLOCK)
    for state in states.values():
        mask = torch.rand(state.layout_mask.shape, generator=generator) < 0.5
        mask[0, 1] = False
        state.set_layout(BlockLayout(mask, BLOCK))
    return states


@pytest.fixture
def oracle() -> Iterator[dict[nn.Module, BlockLayout]]:
    """An attention implementation "oracle" by the definition, with transformers' own masks in full.

    Layouts by module; modules without one are dense. Rows without a key, and padded queries in layers with a layout,
    give 0.
    """
    layouts: dict[nn.Module, BlockLayout] = {}

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(-1, -2) * (options.get("scaling") or query.shape[-1] ** -0.5)
        length, keys = scores.shape[-2:]
        if mask is None:  # models of images make none
            allowed = torch.ones_like(scores, dtype=torch.bool)
        elif mask.dtype == torch.bool:
            allowed = mask.expand(len(query), query.shape[1], length, keys)
        else:
            allowed, scores = torch.ones_like(scores, dtype=torch.bool), scores + mask
        if module in layouts:
            layout = layouts[module]
            blocks = -(-length // BLOCK)
            allowed = allowed & BlockLayout(layout.mask[:, :blocks, :blocks], BLOCK).element_mask(length, keys)
            if "padding" in layouts:
                allowed = allowed & layouts["padding"][:, None, :, None].bool()
        weights = F.softmax(scores.masked_fill(~allowed, -torch.inf), -1).masked_fill(~allowed, 0)
        return (weights.nan_to_num(0) @ value).transpose(1, 2).contiguous(), None

    def mask(*args: Any, **kwargs: Any) -> Tensor:
        return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})

    AttentionInterface.register("oracle", attention)
    AttentionMaskInterface.register("oracle", mask)
    yield layouts  # type: ignore[misc]
    del AttentionInterface._global_mapping["oracle"], AttentionMaskInterface._global_mapping["oracle"]


def oracle_of(name: str, states: dict[str, AdaptiveAttention], oracle: Any, padding: Tensor | None = None) -> Any:
    """The same model in float64 with the same layouts, by the definition."""
    model = make(name, "oracle").double()
    oracle.update({model.get_submodule(path): state.layout for path, state in states.items()})
    if padding is not None:
        oracle["padding"] = padding
    return model


# --- the dense phase ---


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "padding"), CASES)
def test_without_layouts_it_is_sdpa(name: str, padding: str, dtype: torch.dtype, prepared: bool) -> None:
    batch = cast(batch_of(name, padding), dtype)
    expected_model, model = make(name, "sdpa").to(dtype), make(name).to(dtype)
    if prepared:
        prepare(model, block_size=BLOCK)
    expected, output = features(expected_model, batch), features(model, batch)
    assert torch.equal(output.nan_to_num(9), expected.nan_to_num(9))
    real = batch.get("attention_mask")
    for ours, theirs in zip(gradients(model, output, real), gradients(expected_model, expected, real), strict=True):
        assert torch.equal(ours.nan_to_num(9), theirs.nan_to_num(9))


@pytest.mark.parametrize("name", ["bert", "modernbert", "vit", "llama"])
def test_dropout_draws_what_sdpa_draws(name: str) -> None:
    batch = batch_of(name, "right")
    outputs = []
    for implementation in ("sdpa", "sat"):
        model = make(name, implementation, dropout=0.3).train()
        if implementation == "sat":
            prepare(model, block_size=BLOCK)
        torch.manual_seed(5)
        outputs.append(features(model, batch))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], features(model, batch))  # there is dropout


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_gradient_checkpointing_changes_nothing_and_observes_once(
    name: str, sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    original = ops.attention_statistics
    monkeypatch.setattr(ops, "attention_statistics", lambda *a, **k: calls.append(1) or original(*a, **k))
    found = []
    for checkpointing in (False, True):
        model = make(name, dropout=0.3).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        states = random_layouts(model) if sparse else prepare(model, block_size=BLOCK)
        for state in states.values():
            state.observe_samples = 2
            state.block_gate = torch.zeros(state.layout_mask.shape, requires_grad=True)
        torch.manual_seed(5)
        grads = gradients(model, features(model, batch_of(name, "right")))
        grads += [state.block_gate.grad for state in states.values() if state.block_gate is not None]  # type: ignore[misc]
        grads += [state.statistics.pooled for state in states.values() if state.statistics is not None]
        found.append(grads)
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert len(calls) == (0 if sparse else 2 * 2)


def test_from_pretrained_and_set_attn_implementation(tmp_path: Path) -> None:
    make("bert", "sdpa").save_pretrained(tmp_path)
    batch = batch_of("bert", "right")
    expected = features(AutoModel.from_pretrained(tmp_path), batch)
    model = AutoModel.from_pretrained(tmp_path, attn_implementation="sat")
    assert model.config._attn_implementation == "sat"
    assert torch.equal(features(model, batch), expected)
    switched = AutoModel.from_pretrained(tmp_path)
    switched.set_attn_implementation("sat")
    assert torch.equal(features(switched, batch), expected)
    random_layouts(switched)
    assert not torch.allclose(features(switched, batch), expected)
    switched.set_attn_implementation("sdpa")  # and back: states are not used
    assert torch.equal(features(switched, batch), expected)
    register()  # again does no harm


def test_generation_with_a_cache_stays_dense() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**TEXT, **SPECIAL, num_key_value_heads=2)
    tokens = torch.randint(3, 50, (2, 7))
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(tokens, **options)
    states = prepare(model, block_size=BLOCK)
    assert torch.equal(model.generate(tokens, **options), expected)
    for state in states.values():
        state.set_layout(BlockLayout(torch.ones(6, 6, dtype=torch.bool), BLOCK))
    assert torch.equal(model.generate(tokens, use_cache=False, **options), expected)
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(tokens, **options)


# --- masks ---


@pytest.mark.parametrize("causal", [False, True])
def test_plain_padding_is_a_small_mask(causal: bool) -> None:
    create = create_causal_mask if causal else create_bidirectional_mask
    config = make("llama" if causal else "bert").config
    embeddings = torch.empty(2, 4096, 1)
    padding = torch.ones(2, 4096, dtype=torch.long)
    assert _create(create, config, embeddings, padding) is None
    assert _create(create, config, embeddings, None) is None
    padding[1, 100:] = 0
    mask = _create(create, config, embeddings, padding)
    assert mask.shape == ((2, 4096) if causal else (2, 1, 1, 4096))
    assert mask.dtype == torch.bool
    assert mask.untyped_storage().nbytes() <= 2 * 4096
    assert torch.equal(mask.view(2, 4096), padding.bool())


def _create(create: Callable[..., Any], config: Any, embeddings: Tensor, padding: Tensor | None, **more: Any) -> Any:
    if create is create_causal_mask:
        more = {"past_key_values": None, **more}
    return create(config=config, inputs_embeds=embeddings, attention_mask=padding, **more)


def test_masks_of_other_kinds_are_those_of_sdpa() -> None:
    def first_half(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key < 8

    embeddings, padding = torch.empty(2, 16, 1), torch.ones(2, 16, dtype=torch.long)
    padding[0, 10:] = 0
    position_ids = torch.cat([torch.arange(6), torch.arange(10)])[None]
    ours, theirs = make("llama").config, make("llama", "sdpa").config
    for options in (
        {"attention_mask": padding, "and_mask_function": first_half},
        {"attention_mask": padding, "or_mask_function": first_half},
        {"attention_mask": None, "position_ids": position_ids.expand(2, -1)},
    ):
        arguments = {"inputs_embeds": embeddings, "past_key_values": None, **options}
        mask = create_causal_mask(config=ours, **arguments)
        assert mask.shape == (2, 1, 16, 16)
        assert torch.equal(mask, create_causal_mask(config=theirs, **arguments))


def test_masks_that_must_be_in_full_are() -> None:
    # A model that goes on to join its mask to another asks for all of it; its positions must not be told by is_causal.
    padding = torch.ones(2, 16, dtype=torch.bool)
    padding[0, 10:] = False
    sizes: dict[str, Any] = {"batch_size": 2, "q_length": 16, "kv_length": 16, "attention_mask": padding}
    for function, skip in (
        (masking_utils.causal_mask_function, "allow_is_causal_skip"),
        (masking_utils.bidirectional_mask_function, "allow_is_bidirectional_skip"),
    ):
        arguments = {**sizes, "mask_function": function, "allow_is_causal_skip": False}
        expected = sdpa_mask(**arguments)
        assert torch.equal(integration._mask(**arguments | {skip: False}), expected)
        assert integration._mask(**arguments | {skip: True}).numel() == 32


def test_a_small_causal_mask_is_causal_whatever_the_module_says() -> None:
    model = make("bert")
    module = model.encoder.layer[0].attention.self
    query, key, value = torch.randn(3, 2, HEADS, LENGTH, 8, dtype=torch.float64)
    padding = torch.ones(2, LENGTH, dtype=torch.bool)
    padding[1, 20:] = False
    allowed = padding[:, None, None] & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed).transpose(1, 2)
    dense, _ = integration._attention(module, query, key, value, padding)
    assert torch.equal(dense, expected)
    for state in prepare(model, block_size=BLOCK).values():
        state.set_layout(BlockLayout(torch.ones(6, 6, dtype=torch.bool), BLOCK))
    sparse, _ = integration._attention(module, query, key, value, padding)
    assert sparse.is_contiguous()
    torch.testing.assert_close(sparse[padding], expected[padding], rtol=1e-12, atol=1e-12)
    assert not sparse[~padding].any()  # padded queries give 0


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_padding_never_leaks(name: str, padding: str, sparse: bool) -> None:
    model, batch = make(name), batch_of(name, padding)
    real = batch["attention_mask"].bool()
    if sparse:
        random_layouts(model)
    if name == "roberta":  # numbers its positions by the padding token otherwise
        batch["position_ids"] = torch.arange(LENGTH).expand(3, -1) + 2
    before = features(model, batch)
    batch["input_ids"] = torch.where(real, batch["input_ids"], (batch["input_ids"] + 7) % 40 + 5)
    after = features(model, batch)
    assert torch.equal(before[real], after[real])
    if padding == "left" or name not in CAUSAL:  # causal models look at nothing to their right
        assert not torch.equal(features(model, {**batch, "attention_mask": None})[real], after[real])


# --- the sparse phase ---


@pytest.mark.parametrize(("name", "padding"), CASES)
def test_with_layouts_it_is_the_masked_softmax(name: str, padding: str, oracle: Any) -> None:
    batch = cast(batch_of(name, padding), torch.float64)
    model = make(name).double()
    states = random_layouts(model)
    expected_model = oracle_of(name, states, oracle, batch.get("attention_mask"))
    expected, output = features(expected_model, batch), features(model, batch)
    real = batch.get("attention_mask", torch.ones(output.shape[:2])).bool()
    torch.testing.assert_close(output[real], expected[real], rtol=1e-9, atol=1e-9)
    pairs = zip(gradients(model, output, real), gradients(expected_model, expected, real), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_with_layouts_it_is_eager_under_a_mask_of_each_head() -> None:
    # A source that is wholly transformers': its eager attention under a 4-D mask [B, H, L, L].
    batch, expected_model, model = batch_of("bert", "right"), make("bert", "eager").double(), make("bert").double()
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(HEADS, 6, 6, generator=generator) < 0.4
    mask[:, :, 0] = True  # each query keeps a real key
    for state in prepare(model, block_size=BLOCK).values():
        state.set_layout(BlockLayout(mask, BLOCK))
    real = batch.pop("attention_mask").bool()
    layout = BlockLayout(mask[:, :5, :5], BLOCK).element_mask(LENGTH, LENGTH)
    allowed = layout & real[:, None, None, :]
    eager_mask = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    expected = features(expected_model, {**batch, "attention_mask": eager_mask})
    output = features(model, {**batch, "attention_mask": real.long()})
    torch.testing.assert_close(output[real], expected[real], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["bool", "float", "smallest", "one row", "one row of numbers"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_users_own_mask_is_used_exactly(name: str, kind: str, oracle: Any) -> None:
    batch = batch_of(name)
    mask = torch.rand(3, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(4)) < 0.7
    mask[:, :, :, 20:30] = False
    mask[1, 0, 5] = False
    if kind.startswith("one row"):
        mask = mask[:, :, 4:5]
    given: Tensor = mask
    if kind in ("float", "one row of numbers"):
        given = torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        given = given.masked_fill(~mask, -torch.inf)
    elif kind == "smallest":
        given = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    model = make(name).double()
    dense = features(model, {**batch, "attention_mask": given})
    assert torch.equal(
        dense.nan_to_num(9), features(make(name, "sdpa").double(), {**batch, "attention_mask": given}).nan_to_num(9)
    )
    states = random_layouts(model)
    expected_model = oracle_of(name, states, oracle)
    meant = mask if kind == "smallest" else given  # the smallest number means masked, also where nothing else is kept
    output = features(model, {**batch, "attention_mask": given})
    expected = features(expected_model, {**batch, "attention_mask": meant})
    if kind == "one row":  # bool and the same for every query: padding, whose own rows are 0
        real = mask[:, 0, 0]
        output, expected = output[real], expected[real]
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)


def test_packed_sequences_stay_apart(oracle: Any) -> None:
    batch = batch_of("llama")
    batch["position_ids"] = torch.cat([torch.arange(20), torch.arange(17)]).expand(3, -1)
    model = make("llama").double()
    output = features(model, batch)
    assert torch.equal(output, features(make("llama", "sdpa").double(), batch))
    states = random_layouts(model)
    before = features(model, batch)
    torch.testing.assert_close(before, features(oracle_of("llama", states, oracle), batch), rtol=1e-9, atol=1e-9)
    batch["input_ids"] = batch["input_ids"].clone()
    batch["input_ids"][:, :20] = 7
    after = features(model, batch)
    assert torch.equal(before[:, 20:], after[:, 20:])
    assert not torch.equal(before[:, :20], after[:, :20])


def test_a_position_bias_is_honoured(oracle: Any) -> None:
    torch.manual_seed(0)
    model = T5EncoderModel._from_config(
        T5Config(vocab_size=50, d_model=32, d_ff=32, num_layers=2, num_heads=HEADS, d_kv=8), attn_implementation="sat"
    ).double()
    model.eval()
    batch = batch_of("bert", "right")
    real = batch["attention_mask"].bool()
    if not integration._uses_interface(type(model.encoder.block[0].layer[0].SelfAttention)):
        pytest.skip("T5 of this version of transformers does not go through the interface")
    states = prepare(model, 48, BLOCK)
    for state in states.values():
        mask = torch.rand(HEADS, 6, 6, generator=torch.Generator().manual_seed(3)) < 0.5
        mask[:, :, 0] = True
        state.set_layout(BlockLayout(mask, BLOCK))
    layout = BlockLayout(mask[:, :5, :5], BLOCK).element_mask(LENGTH, LENGTH)
    output = features(model, batch)
    gradient = torch.autograd.grad(output[real].sum(), model.get_input_embeddings().weight)[0]
    model.set_attn_implementation("eager")
    allowed = layout & real[:, None, None, :]
    eager_mask = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    expected = features(model, {**batch, "attention_mask": eager_mask})
    torch.testing.assert_close(output[real], expected[real], rtol=1e-9, atol=1e-9)
    expected_gradient = torch.autograd.grad(expected[real].sum(), model.get_input_embeddings().weight)[0]
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-8)
    model.set_attn_implementation("sat")
    for state in states.values():
        state.set_layout(None)
        state.observe_samples = 2
    with pytest.raises(ValueError, match="position bias"):
        features(model, batch)


def test_dropout_and_scale_come_from_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama", dropout=0.25)
    states = random_layouts(model)
    for module in model.layers:
        module.self_attn.scaling = 0.5
    seen: list[tuple[float, float]] = []
    real = ops.block_sparse_attention

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        seen.append((kwargs["dropout_p"], kwargs["scale"]))
        return real(*args, **kwargs)

    monkeypatch.setattr(ops, "block_sparse_attention", attention)
    features(model, batch_of("llama"))
    features(model.train(), batch_of("llama"))
    assert seen == [(0.0, 0.5)] * 2 + [(0.25, 0.5)] * 2
    assert all(state.training for state in states.values())


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("name", ["bert", "vit", "llama", "gpt2"])
def test_statistics_are_those_of_the_models_queries_and_keys(name: str, padding: str) -> None:
    model, batch = make(name), batch_of(name, padding)
    states = prepare(model, block_size=BLOCK)
    captured: dict[nn.Module, tuple[Tensor, Tensor, float]] = {}

    def capture(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        captured[module] = query, key, kwargs["scaling"]
        return inner(module, query, key, value, mask, **kwargs)

    inner = AttentionInterface._global_mapping["sat"]
    AttentionInterface.register("sat", capture)
    try:
        for state in states.values():
            state.observe_samples = 2
        observed = features(model, batch)
        for state in states.values():
            state.observe_samples = 0
        assert torch.equal(observed, features(model, batch))  # looking changes nothing
    finally:
        register()
    for path, state in states.items():
        query, key, scale = captured[model.get_submodule(path)]
        mask = batch.get("attention_mask")
        mask = None if mask is None else mask[:2].bool()
        expected = ops.attention_statistics(
            query[:2],
            key[:2].repeat_interleave(HEADS // key.shape[1], 1),
            BLOCK,
            key_padding_mask=mask,
            query_padding_mask=mask,
            is_causal=name in CAUSAL,
            scale=scale,
            score_matrix=True,
        )
        found = state.statistics
        assert found is not None
        assert found.score_matrix is not None
        assert expected.score_matrix is not None
        length, blocks = query.shape[2], -(-query.shape[2] // BLOCK)
        assert torch.equal(found.pooled[:, :blocks, :blocks], expected.pooled * reached(length, state.seq_len))
        assert torch.equal(found.score_matrix[:length, :length], expected.score_matrix)
        assert found.score_matrix[length:].sum() == 0
        # Of the whole matrix, whatever the batch's length: several batches are averaged.
        whole = scipy.stats.skew(found.score_matrix.double().flatten().numpy())
        assert found.skewness.item() == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("name", ["bert", "vit", "llama", "gpt2", "deepseek"])
def test_the_sensitivity_is_that_of_the_models_own_backward_pass(name: str, padding: str) -> None:
    model, batch = make(name), batch_of(name, padding)
    plain = features(model, batch)
    plain.square().sum().backward()
    expected_gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    states = prepare(model, block_size=BLOCK)
    captured: dict[nn.Module, list[Tensor]] = {}

    def capture(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        context, weights = inner(module, query, key, value, mask, **kwargs)
        context.retain_grad()
        captured[module] = [query, key, value, context]
        return context, weights

    inner = AttentionInterface._global_mapping["sat"]
    AttentionInterface.register("sat", capture)
    try:
        for state in states.values():
            state.observe_samples = 2
            state.block_gate = torch.zeros(state.layout_mask.shape, requires_grad=True)
        features(model, batch).square().sum().backward()
    finally:
        register()
    for gradient, parameter in zip(expected_gradients, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    for path, state in states.items():
        query, key, value, context = captured[model.get_submodule(path)]
        gradient = context.grad
        assert gradient is not None
        mask = batch.get("attention_mask")
        narrower = query.shape[3] - value.shape[3]
        value, gradient = F.pad(value, (0, narrower)), F.pad(gradient.transpose(1, 2), (0, narrower))
        expected = ops.block_sensitivity(
            query[:2],
            *(x[:2].repeat_interleave(HEADS // x.shape[1], 1) for x in (key, value)),
            gradient[:2],
            BLOCK,
            key_padding_mask=None if mask is None else mask[:2].bool(),
            is_causal=name in CAUSAL,
            scale=float(query.shape[3] ** -0.5),
        )
        assert state.block_gate is not None
        found = state.block_gate.grad
        assert found is not None
        torch.testing.assert_close(found[:, : expected.shape[1], : expected.shape[2]], expected)
        assert expected.count_nonzero() > 0


def test_the_sensitivity_under_autocast() -> None:
    # Rotary embeddings turn queries and keys into float32, beside values in bfloat16.
    model, batch = make("llama"), batch_of("llama")
    states = prepare(model, block_size=BLOCK)
    for state in states.values():
        state.observe_samples = 2
        state.block_gate = torch.zeros(state.layout_mask.shape, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        features(model, batch).square().sum().backward()
    for state in states.values():
        assert state.block_gate is not None
        assert state.block_gate.grad is not None
        assert state.block_gate.grad.isfinite().all()
        assert state.block_gate.grad.count_nonzero() > 0


def test_causality_is_what_the_model_asks_for() -> None:
    # CLIP's text model is causal by its call, its modules say that they are not.
    config = CLIPTextConfig(**TEXT, projection_dim=8, bos_token_id=1, eos_token_id=2)
    model = CLIPTextModel._from_config(config, attn_implementation="sat").double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    tokens = batch_of("bert")["input_ids"]
    states = prepare(model, block_size=BLOCK)
    for state in states.values():
        state.observe_samples = 1
    features(model, {"input_ids": tokens})
    for state in states.values():
        state.observe_samples = 0
        assert state.statistics is not None
        assert state.statistics.score_matrix is not None
        assert state.statistics.score_matrix.triu(1).sum() == 0
        state.set_layout(BlockLayout(torch.ones(6, 6, dtype=torch.bool), BLOCK))
    output = features(model, {"input_ids": tokens})
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(output, features(model, {"input_ids": tokens}), rtol=1e-9, atol=1e-9)


# --- preparing ---


def test_which_modules_are_prepared_and_how() -> None:
    lengths = {"bert": 48, "roberta": 48, "distilbert": 48, "modernbert": 48, "vit": 37, "deit": 38, "llama": 48}
    registers = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**IMAGE))
    assert [state.seq_len for state in prepare(registers).values()] == [41, 41]
    for name, seq_len in lengths.items():
        model = make(name, "sdpa")
        states = prepare(model)
        assert model.config._attn_implementation == "sat"
        assert len(states) == (1 if name == "modernbert" else 2)
        for path, state in states.items():
            assert model.get_submodule(path).sat is state
            assert (state.num_heads, state.seq_len, state.block_size) == (HEADS, seq_len, 16)
            assert state.is_causal == (name == "llama")
            assert not state.is_sparse
            assert not state.training
        assert prepare(model) == states
        assert prepare(model, seq_len) == states
        with pytest.raises(ValueError, match=f"prepared already, with seq_len={seq_len}.*block_size=8"):
            prepare(model, block_size=8)
        with pytest.raises(ValueError, match=r"pruned='zero'"):
            prepare(model, pruned="zero")


def test_cross_attention_and_sliding_windows_stay_as_they_are() -> None:
    decoder = BertLMHeadModel._from_config(
        BertConfig(**TEXT, is_decoder=True, add_cross_attention=True), attn_implementation="sdpa"
    ).eval()
    gpt2 = GPT2Model._from_config(
        GPT2Config(
            vocab_size=50,
            n_embd=32,
            n_layer=1,
            n_head=4,
            n_positions=48,
            bos_token_id=1,
            eos_token_id=2,
            add_cross_attention=True,
        ),
        attn_implementation="sdpa",
    )
    batch = {**batch_of("decoder"), "encoder_hidden_states": torch.randn(3, LENGTH, 32)}
    expected = features(decoder, batch)
    assert [path.rsplit(".", 2)[-2:] for path in prepare(decoder)] == [["attention", "self"]] * 2
    assert torch.equal(features(decoder, batch), expected)
    assert list(prepare(gpt2)) == ["h.0.attn"]
    windowed = MistralModel._from_config(
        MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=8), attn_implementation="sat"
    ).eval()
    batch = {**batch_of("llama", "left"), "use_cache": False}
    output = features(windowed, batch)
    windowed.set_attn_implementation("sdpa")
    assert torch.equal(output, features(windowed, batch))
    with pytest.raises(ValueError, match="sliding window"):
        prepare(windowed)
    plain = MistralModel._from_config(
        MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=None), attn_implementation="sat"
    )
    assert len(prepare(plain)) == 2


def test_models_that_cannot_be_prepared() -> None:
    with pytest.raises(TypeError, match=r"got Linear"):
        prepare(nn.Linear(2, 2))  # type: ignore[arg-type]
    deberta = DebertaV2Model(DebertaV2Config(**TEXT))
    with pytest.raises(ValueError, match="does not go through transformers' AttentionInterface"):
        prepare(deberta)
    clip = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=IMAGE))
    with pytest.raises(ValueError, match="CLIPModel is made of several models"):
        prepare(clip)
    for model, options, sentence in (
        (make("bert"), {"block_size": 64}, "block_size 64 exceeds seq_len 48"),
        (make("bert"), {"seq_len": 0}, "seq_len must be at least 1"),
        (make("bert"), {"pruned": "Zero"}, "pruned must be"),
        (make("bert"), {"backend": "cuda"}, "backend must be"),
    ):
        with pytest.raises(ValueError, match=sentence):
            prepare(model, **options)  # type: ignore[arg-type]
        assert not integration._states(model)
    long = LlamaModel._from_config(
        LlamaConfig(**{**TEXT, "max_position_embeddings": 131_072}), attn_implementation="sat"
    )
    with pytest.raises(ValueError, match=r"takes up to 131072 tokens; pass seq_len"):
        prepare(long)
    assert len(prepare(long, 64)) == 2


def test_encoder_decoders_are_refused() -> None:
    model = T5Model(T5Config(vocab_size=50, d_model=32, d_ff=32, num_layers=1, num_heads=4, d_kv=8))
    with pytest.raises(ValueError, match=r"several models|AttentionInterface"):
        prepare(model)


# --- saving and loading ---


def test_save_pretrained_keeps_layouts_beside_plain_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification._from_config(BertConfig(**TEXT), attn_implementation="sat").eval()
    before = sorted(model.state_dict())
    states = random_layouts(model)
    next(iter(states.values())).set_layout(None)  # a mixed phase
    assert sorted(k for k in model.state_dict() if ".sat." not in k) == before
    assert len(model.state_dict()) == len(before) + 4  # for Lightning's checkpoints
    batch = batch_of("bert", "right")
    expected = features(model, batch)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "sat_layouts.safetensors").is_file()
    assert not list(tmp_path.glob(".*"))

    plain, info = BertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert plain.config._attn_implementation == "sdpa"  # the folder is that of a plain model

    loaded = BertForSequenceClassification.from_pretrained(tmp_path, attn_implementation="sat")
    again = load_layouts(loaded, tmp_path)
    assert [state.is_sparse for state in again.values()] == [False, True]
    assert all(torch.equal(again[path].layout_mask, states[path].layout_mask) for path in states)
    assert torch.equal(features(loaded, batch), expected)
    assert torch.equal(features(plain, batch), features(BertForSequenceClassification.from_pretrained(tmp_path), batch))
    load_layouts(plain, str(tmp_path))  # switches a plain model too
    assert torch.equal(features(plain, batch), expected)
    load_layouts(loaded, tmp_path)  # into a prepared model
    bare = BertModel.from_pretrained(tmp_path)  # the same model without its head
    load_layouts(bare, tmp_path)
    assert torch.equal(bare.eval()(**batch)[0], loaded.bert(**batch)[0])


def test_layouts_alone_and_parts_and_other_processes(tmp_path: Path) -> None:
    model = make("bert")
    with pytest.raises(ValueError, match="no layouts to save; prepare it first"):
        save_layouts(model, tmp_path)
    states = random_layouts(model)
    save_layouts(model, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["sat_layouts.safetensors"]
    other = load_layouts(make("bert"), tmp_path / "new")
    assert all(torch.equal(a.layout_mask, b.layout_mask) for a, b in zip(states.values(), other.values(), strict=True))
    # What is wrapped around a model changes no name.
    for wrapper in (torch.compile, nn.DataParallel):
        save_layouts(wrapper(model), tmp_path / "wrapped")
        other = load_layouts(wrapper(make("bert")), tmp_path / "wrapped")
        assert list(other) == list(states)
        for a, b in zip(states.values(), other.values(), strict=True):
            assert torch.equal(a.layout_mask, b.layout_mask)
    for call in (save_layouts, load_layouts):
        with pytest.raises(TypeError, match="belong to a model of Hugging Face transformers, got Linear; pass the"):
            call(nn.Linear(1, 1), tmp_path / "new")
    model.save_pretrained(tmp_path / "second", is_main_process=False)
    assert not (tmp_path / "second" / "sat_layouts.safetensors").exists()
    # A part saves plain weights too, and its layouts.
    whole = BertForSequenceClassification._from_config(BertConfig(**TEXT), attn_implementation="sat")
    random_layouts(whole)
    whole.bert.save_pretrained(tmp_path / "part")
    _, info = BertModel.from_pretrained(tmp_path / "part", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert len(load_layouts(make("bert"), tmp_path / "part")) == 2


def test_the_hub_gets_the_layouts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("bert")
    random_layouts(model)
    pushed: list[tuple[str, list[str]]] = []

    def push(self: Any, repo_id: str, **kwargs: Any) -> None:  # what PushToHubMixin does, without a network
        self.save_pretrained(tmp_path / "temporary")
        pushed.append((repo_id, sorted(path.name for path in (tmp_path / "temporary").iterdir())))

    monkeypatch.setattr(PreTrainedModel, "push_to_hub", push)
    model.push_to_hub("me/direct")
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/saved", commit_message="layouts")
    model.save_pretrained(tmp_path / "unnamed", push_to_hub=True)
    assert [repo for repo, _ in pushed] == ["me/direct", "me/saved", "unnamed"]
    assert all("sat_layouts.safetensors" in files and "model.safetensors" in files for _, files in pushed)
    assert (tmp_path / "mine" / "sat_layouts.safetensors").is_file()

    # Back from the hub: one file is asked for.
    asked = []

    def download(repo_id: str, filename: str) -> str:
        asked.append((repo_id, filename))
        return str(tmp_path / "mine" / filename)

    monkeypatch.setattr(integration, "hf_hub_download", download)
    assert all(state.is_sparse for state in load_layouts(make("bert"), "me/saved").values())
    assert asked == [("me/saved", "sat_layouts.safetensors")]


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    model = make("bert")
    for name in ("nobody/nothing", "no folder: <>"):
        with pytest.raises(FileNotFoundError, match="is no folder here, and no model that can be reached"):
            load_layouts(model, name)
    with pytest.raises(FileNotFoundError, match=r"has no sat_layouts\.safetensors"):
        load_layouts(model, tmp_path)
    random_layouts(model)
    save_layouts(model, tmp_path)
    path = tmp_path / "sat_layouts.safetensors"
    whole = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        masks = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with pytest.raises(ValueError, match="a model of type bert, not roberta"):
        load_layouts(make("roberta"), tmp_path)
    three = BertModel._from_config(BertConfig(**{**TEXT, "num_hidden_layers": 3}), attn_implementation="sat")
    with pytest.raises(ValueError, match=r"2 attention modules, where this BertModel has 3; encoder.layer.2"):
        load_layouts(three, tmp_path)
    heads = BertModel._from_config(BertConfig(**{**TEXT, "num_attention_heads": 2}), attn_implementation="sat")
    with pytest.raises(ValueError, match=r"is \[4, 6, 6\], where this model's 2 heads"):
        load_layouts(heads, tmp_path)
    sized = make("bert")
    prepare(sized, 32, BLOCK)
    with pytest.raises(ValueError, match="prepared already, with seq_len=32"):
        load_layouts(sized, tmp_path)
    for changes, sentence in (
        ({"version": "2"}, "format 2 of layouts, this version of SAT reads up to 1; upgrade"),
        ({"format": "pt"}, "none that save_layouts wrote"),
        ({"sparse": "["}, "not a whole file of layouts"),
        ({"seq_len": "64"}, r"64 tokens in blocks of 8 make \[4, 8, 8\]"),
    ):
        save_file(masks, path, metadata={**metadata, **changes})
        with pytest.raises(ValueError, match=sentence):
            load_layouts(make("bert"), tmp_path)
    save_file(masks, path, metadata={k: v for k, v in metadata.items() if k != "pruned"})
    with pytest.raises(ValueError, match="not a whole file"):
        load_layouts(make("bert"), tmp_path)
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        fresh = make("bert")
        with pytest.raises(ValueError, match="not a whole file of layouts"):
            load_layouts(fresh, tmp_path)
        assert not integration._states(fresh)
    path.write_bytes(whole)
    assert json.loads(metadata["sparse"]) == list(masks)
    assert all(state.is_sparse for state in load_layouts(make("bert"), tmp_path).values())


# --- what models go through ---


def test_copies_and_pickles_are_models_of_their_own(tmp_path: Path) -> None:
    model, batch = make("bert"), batch_of("bert", "right")
    random_layouts(model)
    expected = features(model, batch)
    for number, other in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        assert torch.equal(features(other, batch), expected)
        for state in integration._states(other).values():
            state.set_layout(None)
        other.save_pretrained(tmp_path / str(number))
        assert not any(state.is_sparse for state in load_layouts(make("bert"), tmp_path / str(number)).values())
    assert torch.equal(features(model, batch), expected)
    state_dict = model.state_dict()
    fresh = make("bert", seed=1)
    prepare(fresh, block_size=BLOCK)
    fresh.load_state_dict(state_dict)
    assert torch.equal(features(fresh, batch), expected)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_gradient_checkpointing(name: str) -> None:
    batch, grads = batch_of(name, "right"), []
    for checkpointing in (False, True):
        model = make(name)
        random_layouts(model)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        grads.append(gradients(model, features(model, batch), batch["attention_mask"]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions(dtype: torch.dtype) -> None:
    batch = batch_of("llama", "right")
    model = make("llama")
    states = random_layouts(model)
    expected = features(model, batch)
    model.to(dtype)
    assert all(state.layout_mask.dtype == torch.bool for state in states.values())
    real = batch["attention_mask"].bool()
    output = features(model, batch)
    assert output.dtype == dtype
    assert (output.float() - expected)[real].abs().mean() < 0.1 * expected[real].abs().mean()
    for state in states.values():
        state.set_layout(None)
        state.observe_samples = 2
    features(model, batch)
    assert all(state.statistics is not None for state in states.values())


def test_autocast_observes_what_it_computes_with() -> None:
    model, batch = make("bert"), batch_of("bert", "right")
    states = prepare(model, block_size=BLOCK)
    for state in states.values():
        state.observe_samples = 2
    with torch.autocast("cpu", torch.bfloat16):
        output = features(model, batch)
        assert torch.equal(output, features(make("bert", "sdpa"), batch))
        query, key, value = torch.randn(3, 1, HEADS, LENGTH, 8)  # as after rotary positions in float32
        path, state = next(iter(states.items()))
        state.statistics = None  # of the model's own call
        integration._attention(model.get_submodule(path), query, key, value, None)
    expected = ops.attention_statistics(query.bfloat16(), key.bfloat16(), BLOCK)
    assert state.statistics is not None
    assert torch.equal(state.statistics.pooled[:, :5, :5], expected.pooled * reached(LENGTH, state.seq_len))
    for state in states.values():
        state.observe_samples = 0
        state.set_layout(BlockLayout(torch.ones(6, 6, dtype=torch.bool), BLOCK))
    with torch.autocast("cpu", torch.bfloat16):
        assert features(model, batch).isfinite().all()


@pytest.mark.parametrize("name", ["bert", pytest.param("llama", marks=pytest.mark.long)])
def test_compiles_in_one_graph_in_either_phase(name: str) -> None:
    batch, model = batch_of(name, "right"), make(name)
    real = batch["attention_mask"].bool()
    states = prepare(model, block_size=BLOCK)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch)[0][real], features(model, batch)[real], rtol=1e-5, atol=1e-5)
    random_layouts(model)
    assert all(state.is_sparse for state in states.values())
    torch.testing.assert_close(compiled(**batch)[0][real], features(model, batch)[real], rtol=1e-5, atol=1e-5)


# --- bad input ---


def test_attention_weights_are_never_formed() -> None:
    sentence = r"output_attentions=True.*set_attn_implementation\(.eager.\)"
    for name in MODELS:
        model, batch = make(name), batch_of(name)
        if name in ("bert", "llama"):  # most models hand it to their attention
            with pytest.raises(ValueError, match=sentence):
                model(**batch, output_attentions=True)
        prepare(model, block_size=BLOCK)
        with pytest.raises(ValueError, match=sentence):
            model(**batch, output_attentions=True)
        model(**batch, output_attentions=False)
        model.set_attn_implementation("eager")
        assert model(**batch, output_attentions=True).attentions[0].shape[1] == HEADS


def test_calls_that_a_layout_cannot_serve() -> None:
    model = make("bert")
    states = prepare(model, 32, BLOCK)
    batch = batch_of("bert")
    assert torch.equal(features(model, batch), features(make("bert", "sdpa"), batch))  # longer, but dense
    for state in states.values():
        state.observe_samples = 1
    with pytest.raises(ValueError, match="prepared for up to 32 tokens, got 37"):
        features(model, batch)
    for state in states.values():
        state.observe_samples = 0
        state.set_layout(BlockLayout(torch.ones(4, 4, dtype=torch.bool), BLOCK))
    with pytest.raises(ValueError, match="prepared for up to 32 tokens, got 37"):
        features(model, batch)

    module = model.encoder.layer[0].attention.self
    query = torch.randn(1, HEADS, 8, 8)
    with pytest.raises(ValueError, match="passes a paged key/value cache, which the sparse phase cannot use"):
        integration._attention(module, query, query, query, None, cache=object())
    for state in states.values():  # in either phase
        state.set_layout(None)
    for option in ("softcap", "s_aux"):
        with pytest.raises(ValueError, match=f"BertSelfAttention passes {option}, which .* cannot honour"):
            integration._attention(module, query, query, query, None, **{option: torch.zeros(HEADS)})
    with pytest.raises(ValueError, match=r"mask of shape \[1, 8\] and torch.int64"):
        integration._attention(module, query, query, query, torch.ones(1, 8, dtype=torch.long))


def test_masks_that_statistics_or_pruned_logits_cannot_serve() -> None:
    model, batch = make("bert"), batch_of("bert")
    states = prepare(model, block_size=BLOCK, pruned="zero")
    mask = torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    for state in states.values():
        state.observe_samples = 1
    with pytest.raises(ValueError, match="cannot be observed under a mask of queries by keys"):
        features(model, {**batch, "attention_mask": mask})
    with pytest.raises(ValueError, match=r"cannot be observed under .* or one that weighs keys"):
        features(model, {**batch, "attention_mask": torch.randn(3, 1, 1, LENGTH)})
    # A mask that the model extended itself tells padding.
    padding = batch_of("bert", "right")["attention_mask"]
    features(model, {**batch, "attention_mask": padding})
    expected = [state.statistics for state in states.values()]
    extended = (1.0 - padding[:, None, None].float()) * torch.finfo(torch.float32).min
    features(model, {**batch, "attention_mask": extended})
    for state, statistics in zip(states.values(), expected, strict=True):
        assert state.statistics is not None
        assert statistics is not None
        torch.testing.assert_close(state.statistics.pooled, statistics.pooled)
        state.observe_samples = 0
        state.set_layout(BlockLayout(torch.eye(6, dtype=torch.bool), BLOCK))
    with pytest.raises(ValueError, match=r"with pruned=.zero. a mask may only tell padding"):
        features(model, {**batch, "attention_mask": mask})
    assert features(model, {**batch, "attention_mask": padding}).isfinite().all()


@pytest.mark.parametrize("version", [None, "4.57.1", "5.9.0"])
def test_without_transformers_a_sentence_says_what_to_install(
    version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", version and SimpleNamespace(__version__=version))
    sentence = r"needs the package transformers, 5\.10 or newer, and .*pip install 'transformers>=5\.10'"
    with pytest.raises(ImportError, match=sentence):
        runpy.run_path(integration.__file__)


@pytest.mark.parametrize("causal", [False, True])
def test_a_unidirectional_pattern_hides_the_future_where_the_model_does(causal):
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        is_decoder=causal,
    )  # fmt: skip
    model = BertModel(config).eval()
    pattern = Fixed(2, 16, attention="unidirectional")
    for attention in prepare(model, seq_len=64, block_size=16).values():
        attention.set_layout(pattern.layout(64))
    ids = torch.randint(0, 50, (1, 64))
    other = ids.clone()
    other[0, 15] = (ids[0, 15] + 1) % 50
    changed = (model(ids).last_hidden_state != model(other).last_hidden_state).any(2)[0].nonzero()
    # As docs/deepspeed.md says: to the token, or to the end of the own block.
    assert int(changed[0]) == (15 if causal else 0)
