# Longer sequences for pretrained models: which row lies where, what stays the same, what is refused.
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.attention import AdaptiveAttention
from sat.integrations.positions import extend_position_embeddings

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
TEXT = {**SIZES, "vocab_size": 40, "max_position_embeddings": 20}
OTHER = {
    "distilbert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16},
    "albert": {"embedding_size": 8},
    "electra": {"embedding_size": 8},
    "longformer": {"attention_window": 4},
    "esm": {"position_embedding_type": "absolute", "mask_token_id": 3},
}


def text_model(kind: str, head: str = "AutoModel", **options: Any) -> Any:
    """A tiny model of 20 rows, whose padding token is 1; in evaluation mode."""
    config = transformers.AutoConfig.for_model(kind, **{**TEXT, "pad_token_id": 1, **OTHER.get(kind, {}), **options})
    return getattr(transformers, head).from_config(config).eval()


def image_model(kind: str = "vit", head: str = "AutoModel", **options: Any) -> Any:
    """A tiny model for pictures of 32 x 32 pixels in patches of 8 x 8; in evaluation mode, its positions random."""
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, "image_size": 32, "patch_size": 8, **options})
    model = getattr(transformers, head).from_config(config).eval()
    nn.init.normal_(embeddings_of(model).position_embeddings)
    return model


def embeddings_of(model: Any) -> Any:
    (found,) = (module for module in model.modules() if getattr(module, "position_embeddings", None) is not None)
    return found


def table_of(model: Any) -> Tensor:
    table = embeddings_of(model).position_embeddings
    return table.weight if isinstance(table, nn.Embedding) else table


def tokens(length: int) -> Tensor:
    """Two sequences without a padding token."""
    return torch.randint(2, 40, (2, length))


def first_output(model: Any, inputs: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(inputs, **options)[0]


def shapes(model: Any) -> dict[str, torch.Size]:
    """Shapes of all parameters and buffers, also of those that are not saved."""
    return {name: x.shape for name, x in [*model.named_parameters(), *model.named_buffers()]}


# --- tables that are looked up by position -------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [21, 40, 47, 60])
def test_rows_of_bert_are_repeated_until_the_table_is_full(max_length: int) -> None:
    model = text_model("bert")
    trained = table_of(model).detach().clone()
    extend_position_embeddings(model, None, max_length)
    table = table_of(model)
    assert table.shape == (max_length, 16)
    for row in range(max_length):
        assert torch.equal(table[row], trained[row % 20])
    embeddings = embeddings_of(model)
    assert embeddings.position_embeddings.num_embeddings == max_length
    assert model.config.max_position_embeddings == max_length
    assert embeddings.position_ids.tolist() == [[*range(max_length)]]
    assert embeddings.token_type_ids.tolist() == [[0] * max_length]
    assert not {"embeddings.position_ids", "embeddings.token_type_ids"} & set(model.state_dict())


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("max_length", [20, 36, 41])
def test_rows_of_roberta_keep_their_offset(padding: int, max_length: int) -> None:
    model = text_model("roberta", pad_token_id=padding)
    trained = table_of(model).detach().clone()
    offset, usable = padding + 1, 20 - padding - 1
    extend_position_embeddings(model, None, max_length)
    table = table_of(model)
    assert torch.equal(table[:offset], trained[:offset])
    for token in range(max_length):
        assert torch.equal(table[offset + token], trained[offset + token % usable])
    assert len(table) == model.config.max_position_embeddings == max_length + offset
    embeddings = embeddings_of(model)
    assert embeddings.position_embeddings.padding_idx == padding
    assert embeddings.position_ids.tolist() == [[*range(max_length + offset)]]
    assert embeddings.token_type_ids.shape == (1, max_length + offset)
    inputs = torch.randint(padding + 1, 40, (2, max_length))
    assert first_output(model, inputs).isfinite().all()


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("bert", "AutoModel"),
        ("bert", "AutoModelForSequenceClassification"),
        ("bert", "AutoModelForMaskedLM"),
        ("distilbert", "AutoModelForSequenceClassification"),
        ("albert", "AutoModel"),
        ("electra", "AutoModelForTokenClassification"),
        ("roberta", "AutoModelForMaskedLM"),
        ("xlm-roberta", "AutoModelForSequenceClassification"),
        ("camembert", "AutoModel"),
        ("longformer", "AutoModel"),
        ("mpnet", "AutoModel"),
        ("esm", "AutoModel"),
    ],
)
def test_known_lengths_stay_and_new_ones_run_and_return(kind: str, head: str, tmp_path: Path) -> None:
    """Padded batches too; and plain transformers reads it back."""
    model = text_model(kind, head)
    offset = getattr(embeddings_of(model), "padding_idx", None)
    known = 20 if offset is None else 20 - offset - 1
    inputs = tokens(known)
    mask = torch.ones_like(inputs)
    inputs[1, 5:], mask[1, 5:] = 1, 0
    before = first_output(model, inputs, attention_mask=mask)
    extend_position_embeddings(model, None, 47)
    assert torch.equal(first_output(model, inputs, attention_mask=mask), before)

    longer = tokens(47)
    output = first_output(model, longer)
    assert output.isfinite().all()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(first_output(loaded, longer), output)
    # What the config alone makes has the same tables and buffers: none was forgotten.
    assert shapes(type(model)(model.config)) == shapes(model)
    with pytest.raises((IndexError, RuntimeError)):
        first_output(model, tokens(48))


def test_gradients_reach_the_new_rows() -> None:
    model = text_model("bert", "AutoModelForMaskedLM").train()
    extend_position_embeddings(model, None, 47)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = table_of(model).detach().clone()
    inputs = tokens(47)
    model(inputs, labels=inputs).loss.backward()
    assert (table_of(model).grad != 0).any(-1).all()
    optimizer.step()
    assert (table_of(model) != before).any(-1).all()
    assert not torch.equal(table_of(model)[0], table_of(model)[20]), "repeated rows are trained each on its own"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_dtype_and_freezing_stay(dtype: torch.dtype, requires_grad: bool) -> None:
    for model, size in ((text_model("roberta"), 47), (image_model(), 48)):
        model.to(dtype)
        table_of(model).requires_grad_(requires_grad)
        extend_position_embeddings(model, None, size)
        table = table_of(model)
        assert isinstance(table, nn.Parameter)
        assert (table.dtype, table.requires_grad) == (dtype, requires_grad)
        assert table.is_contiguous()
        assert table.is_leaf


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_the_device_stays() -> None:
    for model, inputs in ((text_model("bert"), tokens(47)), (image_model(), torch.randn(1, 3, 48, 48))):
        model.cuda()
        extend_position_embeddings(model, None, inputs.shape[-1])
        assert table_of(model).is_cuda
        assert first_output(model, inputs.cuda()).isfinite().all()


def test_extending_twice_and_by_the_encoder_inside() -> None:
    model = text_model("bert", "AutoModelForSequenceClassification")
    trained = table_of(model).detach().clone()
    extend_position_embeddings(model.base_model, None, 30)
    assert model.config.max_position_embeddings == 30
    extend_position_embeddings(model, None, 45)
    assert torch.equal(table_of(model), torch.cat([trained, trained[:10], trained[:15]]))


def test_the_same_length_changes_nothing() -> None:
    for model, size in ((text_model("bert"), 20), (text_model("roberta"), 18), (image_model(), 32)):
        table, config = table_of(model), model.config.to_dict()
        assert extend_position_embeddings(model, None, size) is None
        assert table_of(model) is table
        assert model.config.to_dict() == config


# --- tokenizers ----------------------------------------------------------------------------------------------------


def check_tokenizer(tokenizer: Any, folder: Path) -> None:
    text = "a word " * 200
    for kind, max_length in (("bert", 47), ("roberta", 61)):
        model = text_model(kind, vocab_size=len(tokenizer))
        extend_position_embeddings(model, tokenizer, max_length)
        tokenizer.save_pretrained(folder)
        for each in (tokenizer, transformers.AutoTokenizer.from_pretrained(folder)):
            assert each.model_max_length == max_length
            ids = each(text, truncation=True, return_tensors="pt")["input_ids"]
            assert ids.shape == (1, max_length)
        assert first_output(model, ids).shape[1] == max_length


def test_a_tokenizer_follows(tmp_path: Path) -> None:
    words = tmp_path / "vocab.txt"
    words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "word"]), encoding="utf-8")
    tokenizer = transformers.BertTokenizerFast(str(words), model_max_length=20)
    check_tokenizer(tokenizer, tmp_path / "saved")


def test_a_real_tokenizer_follows(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "models" / "bert-base-uncased-tokenizer"
    if not folder.is_dir():
        pytest.skip(f"no tokenizer at {folder}")
    check_tokenizer(transformers.BertTokenizerFast.from_pretrained(folder), tmp_path)


def test_a_tokenizer_is_set_to_the_length_that_a_model_has_already() -> None:
    class Tokenizer:
        model_max_length = 10**30

    tokenizer = Tokenizer()
    extend_position_embeddings(text_model("bert"), tokenizer, 20)
    assert tokenizer.model_max_length == 20


# --- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "special"), [("vit", 1), ("deit", 2), ("ijepa", 0)])
@pytest.mark.parametrize("size", [48, (48, 48), (32, 64), (72, 40)])
def test_patch_positions_are_interpolated(kind: str, special: int, size: Any, tmp_path: Path) -> None:
    model = image_model(kind)
    trained = table_of(model).detach().clone()
    height, width = (size, size) if isinstance(size, int) else size
    extend_position_embeddings(model, None, size)
    table = table_of(model)
    assert torch.equal(table[:, :special], trained[:, :special])
    # One feature after the other, so that no mistake in moving axes can hide.
    for feature in range(16):
        grid = trained[0, special:, feature].reshape(1, 1, 4, 4)
        exact, single = (
            F.interpolate(x, (height // 8, width // 8), mode="bicubic").reshape(-1) for x in (grid.double(), grid)
        )
        error = (table[0, special:, feature] - exact).abs().max()
        assert error <= 2 * (single - exact).abs().max()
    embeddings = embeddings_of(model)
    assert embeddings.image_size == embeddings.patch_embeddings.image_size == (height, width)
    assert embeddings.patch_embeddings.num_patches == height * width // 64
    assert model.config.image_size == (height if height == width else [height, width])

    pictures = torch.randn(2, 3, height, width)
    output = first_output(model, pictures)
    assert output.shape[1] == special + height * width // 64
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(first_output(loaded, pictures), output)
    extend_position_embeddings(loaded, None, (80, 80))  # from a size that is not square too
    assert first_output(loaded, torch.randn(1, 3, 80, 80)).isfinite().all()


@pytest.mark.parametrize("head", ["ViTForImageClassification", "DeiTForImageClassification"])
def test_it_is_what_transformers_interpolates_in_each_call(head: str) -> None:
    kind = head.partition("For")[0].lower()
    model = image_model(kind, "AutoModelForImageClassification", num_labels=3, architectures=[head])
    pictures = torch.randn(2, 3, 56, 56)
    expected = first_output(model, pictures, interpolate_pos_encoding=True)
    extend_position_embeddings(model, None, 56)
    torch.testing.assert_close(first_output(model, pictures), expected)
    model.train()(pictures, labels=torch.tensor([0, 2])).loss.backward()
    assert (table_of(model).grad != 0).any(-1).all()


def test_half_precision_is_rounded_once() -> None:
    model = image_model().bfloat16()
    trained = table_of(model).detach().clone()
    extend_position_embeddings(model, None, 48)
    grid = trained[:, 1:].double().unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    exact = F.interpolate(grid, (6, 6), mode="bicubic").flatten(2).mT
    rounding = torch.finfo(torch.bfloat16).eps / 2 * 1.01
    assert ((table_of(model)[:, 1:] - exact).abs() <= rounding * exact.abs() + 1e-6).all()


def test_masked_image_modelling_runs_at_the_new_size() -> None:
    model = image_model("vit", "AutoModelForMaskedImageModeling", encoder_stride=8)
    extend_position_embeddings(model, None, 48)
    mask = torch.arange(36)[None] % 2 == 0
    assert model(torch.randn(1, 3, 48, 48), bool_masked_pos=mask).reconstruction.shape == (1, 3, 48, 48)


@pytest.mark.parametrize(
    ("module", "name", "size"),
    [
        ("vit.image_processing_pil_vit", "ViTImageProcessorPil", (48, 64)),
        ("deit.image_processing_pil_deit", "DeiTImageProcessorPil", (48, 64)),
    ],
)
def test_an_image_processor_follows(module: str, name: str, size: tuple[int, int], tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    pytest.importorskip(f"transformers.models.{module}", exc_type=ImportError)
    kind = getattr(__import__(f"transformers.models.{module}", fromlist=[name]), name)
    sizes = {"size": {"height": 32, "width": 32}}
    if name.startswith("DeiT"):
        sizes = {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}}
    processor = kind(**sizes)
    model = image_model(name[:4].rstrip("I").lower())
    extend_position_embeddings(model, processor, size)
    processor.save_pretrained(tmp_path)
    picture = torch.randint(0, 256, (3, 100, 90), dtype=torch.uint8).numpy()
    for each in (processor, kind.from_pretrained(tmp_path)):
        pixels = each(picture, return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, *size)
        if "crop_size" in sizes:
            assert dict(each.size) == {"height": 60, "width": 80}, "the crop keeps 4/5 of each side, as before"
    assert first_output(model, pixels).isfinite().all()


# --- refused -------------------------------------------------------------------------------------------------------


def bert_of_another_numbering() -> Any:
    model = text_model("bert")
    model.embeddings.position_ids = model.embeddings.position_ids + 2
    return model


def bert_with_another_config() -> Any:
    model = text_model("bert")
    model.config.max_position_embeddings = 30
    return model


def vit_with_more_tokens() -> Any:
    model = image_model()
    model.embeddings.position_embeddings = nn.Parameter(torch.zeros(1, 21, 16))
    return model


def prepared() -> Any:
    model = text_model("bert")
    model.encoder.layer[0].attention.self.sat = AdaptiveAttention(2, 20, 4)
    return model


def on_meta(make: Callable[[], Any]) -> Any:
    return make().to("meta")


MODERN = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
TWO_TOWERS = {
    "text_config": {**TEXT, "pad_token_id": 1},
    "image_config": {**SIZES, "image_size": 32, "patch_size": 8},
    "multimodal_config": SIZES,
}


@pytest.mark.parametrize(
    ("make", "max_length", "error", "sentence"),
    [
        # What needs none.
        (lambda: text_model("modernbert", **MODERN), 47, ValueError, "rotary positions and needs no extension"),
        (lambda: text_model("llama", num_key_value_heads=1), 47, ValueError, "rotary positions and needs no extension"),
        (lambda: text_model("esm", position_embedding_type="rotary"), 47, ValueError, "rotary .* needs no extension"),
        (lambda: text_model("bloom", n_layer=1, n_head=2), 47, ValueError, "ALiBi positions and needs no extension"),
        (lambda: text_model("falcon", alibi=True), 47, ValueError, "needs no extension"),
        (
            lambda: text_model("t5", d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
            47,
            ValueError,
            "relative positions and needs no extension",
        ),
        (
            lambda: text_model("deberta-v2", relative_attention=True, position_biased_input=False),
            47,
            ValueError,
            "relative positions and needs no extension",
        ),
        (
            lambda: text_model("deberta", relative_attention=True, position_biased_input=True),
            47,
            ValueError,
            "relative positions beside learned ones",
        ),
        # What is computed and not learned.
        (lambda: text_model("distilbert", sinusoidal_pos_embds=True), 47, ValueError, "sinusoidal .*from_pretrained"),
        (lambda: image_model("vit_mae"), 48, ValueError, "sinusoidal .*ViTForImageClassification"),
        # What is kept in ways not known.
        (lambda: text_model("gpt2", n_embd=16), 47, ValueError, "GPT2Model has 0 tables named position_embeddings"),
        (lambda: transformers.FlavaModel(transformers.FlavaConfig(**TWO_TOWERS)), 47, ValueError, "2 tables .*one by"),
        (lambda: text_model("lilt", hidden_size=24), 47, ValueError, "another table of positions.*box_position_embed"),
        (
            lambda: text_model("visual_bert", visual_embedding_dim=8),
            47,
            ValueError,
            "another table of positions, .*visual_position_embeddings, .*extending one of the two would not do",
        ),
        (lambda: text_model("nystromformer"), 47, ValueError, "22 positions .* not numbered as in BERT or RoBERTa"),
        (bert_of_another_numbering, 47, ValueError, "20 positions of BertModel are not numbered"),
        (bert_with_another_config, 47, ValueError, "20 positions .*config.max_position_embeddings .30. - 1"),
        (vit_with_more_tokens, 48, ValueError, "not those of ViT or DeiT"),
        (lambda: image_model("yolos", image_size=[32, 32]), 48, ValueError, "not those of ViT or DeiT"),
        (lambda: image_model("dinov2"), 48, ValueError, "not those of ViT or DeiT.*by themselves"),
        # Lengths.
        (lambda: text_model("bert"), 19, ValueError, "takes 20 tokens.*not shortened to 19.*truncation=True"),
        (lambda: text_model("roberta"), 17, ValueError, "takes 18 tokens.*not shortened to 17"),
        (image_model, 24, ValueError, "32 x 32 pixels.*not shortened, to 24 x 24"),
        (image_model, (48, 24), ValueError, "not shortened, to 48 x 24"),
        (image_model, 50, ValueError, "50 x 50 pixels cannot be cut into patches of 8 x 8; .* 56 x 56"),
        *(
            (lambda: text_model("bert"), length, TypeError, "max_length must be an int of at least 1")
            for length in (0, -3, 47.0, True, "47", None, (47, 47))
        ),
        *(
            (image_model, length, TypeError, "size of its pictures in pixels, an int of at least 1 or")
            for length in (0, -8, 48.0, True, "48", None, (48,), (48, 48, 48), (48, 0), [48, 48.0])
        ),
        # States.
        (prepared, 47, ValueError, "prepared for SAT already.*extend its positions first"),
        (lambda: on_meta(lambda: text_model("bert")), 47, ValueError, 'on the device "meta".*load its weights first'),
        (lambda: on_meta(image_model), 48, ValueError, 'on the device "meta"'),
        (lambda: nn.Linear(2, 2), 47, TypeError, "needs a model of Hugging Face transformers.*got Linear"),
        (lambda: "bert-base-uncased", 47, TypeError, "needs a model of Hugging Face transformers.*got str"),
    ],
)
def test_refused_by_a_sentence(make: Callable[[], Any], max_length: Any, error: type, sentence: str) -> None:
    model = make()
    state, config = ({}, {}) if not hasattr(model, "config") else (shapes(model), model.config.to_dict())
    with pytest.raises(error, match=sentence):
        extend_position_embeddings(model, None, max_length)
    if hasattr(model, "config"):
        assert (shapes(model), model.config.to_dict()) == (state, config), "nothing was changed"


class NoSize:
    size = {"shortest_edge": 32}  # noqa: RUF012


@pytest.mark.parametrize(
    ("make", "tokenizer", "max_length", "sentence"),
    [
        (lambda: text_model("bert"), NoSize(), 47, "has a model_max_length, which NoSize has not"),
        (image_model, NoSize(), 48, "size of height and width, got NoSize with size {'shortest_edge': 32}"),
        (image_model, "vit", 48, "size of height and width, got str"),
    ],
)
def test_what_is_no_tokenizer_is_refused(
    make: Callable[[], Any], tokenizer: Any, max_length: int, sentence: str
) -> None:
    model = make()
    state = shapes(model)
    with pytest.raises(TypeError, match=sentence):
        extend_position_embeddings(model, tokenizer, max_length)
    assert shapes(model) == state


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("deberta", {"relative_attention": True, "position_biased_input": False}),
        ("deberta-v2", {"relative_attention": True, "position_biased_input": False}),
        ("modernbert", MODERN),
        ("llama", {"num_key_value_heads": 1}),
        ("bloom", {"n_layer": 1, "n_head": 2}),
    ],
)
def test_those_that_need_none_run_beyond_their_length(kind: str, options: dict[str, Any]) -> None:
    assert first_output(text_model(kind, **options), tokens(47)).isfinite().all()


def test_the_advice_for_sinusoidal_positions_holds(tmp_path: Path) -> None:
    model = text_model("distilbert", sinusoidal_pos_embds=True)
    inputs = tokens(20)
    model.save_pretrained(tmp_path)
    longer = type(model).from_pretrained(tmp_path, max_position_embeddings=47, ignore_mismatched_sizes=True).eval()
    assert torch.equal(first_output(longer, inputs), first_output(model, inputs))
    position, feature = 46, torch.arange(0, 16, 2, dtype=torch.float64)
    expected = torch.sin(position / 10000 ** (feature / 16)).float()
    torch.testing.assert_close(table_of(longer)[position, 0::2].detach(), expected)
