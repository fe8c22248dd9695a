import pytest
import torch
from torch import nn

from sat import ops
from sat.layout import BlockLayout
from sat.models import Encoder, SequenceClassifier
from sat.models.dropout import Dropout
from tests.ops import oracle

SMALL = {"num_layers": 2, "width": 16, "num_heads": 2, "mlp_dim": 24, "dropout": 0.0, "block_size": 16}


def pytorchs_encoder(ours: Encoder) -> nn.Module:
    """PyTorch's own pre-LayerNorm encoder with our weights."""
    layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, "gelu", batch_first=True, norm_first=True)
    theirs = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False)
    names = {
        "self_attn.in_proj_weight": "query_key_value.weight",
        "self_attn.in_proj_bias": "query_key_value.bias",
        "self_attn.out_proj.weight": "attention_out.weight",
        "self_attn.out_proj.bias": "attention_out.bias",
        "linear1.weight": "mlp.0.weight",
        "linear1.bias": "mlp.0.bias",
        "linear2.weight": "mlp.3.weight",
        "linear2.bias": "mlp.3.bias",
        "norm1.weight": "attention_norm.weight",
        "norm1.bias": "attention_norm.bias",
        "norm2.weight": "mlp_norm.weight",
        "norm2.bias": "mlp_norm.bias",
    }
    state = {
        f"layers.{i}.{n}": ours.state_dict()[f"layers.{i}.{names[n]}"] for i in range(2) for n in layer.state_dict()
    }
    theirs.load_state_dict(state | {"norm.weight": ours.norm.weight, "norm.bias": ours.norm.bias})
    return theirs


@pytest.mark.parametrize("sparse", [False, True])
def test_equals_pytorchs_transformer_encoder(sparse):
    encoder = Encoder(30, 40, **SMALL)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    mask = None
    if sparse:
        layout = BlockLayout(oracle.random_layout(1, 3, 3, 16).mask | torch.eye(3, dtype=torch.bool), 16)
        for layer in encoder.layers:
            layer.attention.set_layout(layout)
        mask = ~layout.element_mask(40, 40)[0]
    tokens = torch.randint(0, 30, (2, 40))
    theirs = pytorchs_encoder(encoder)(encoder.tokens(tokens) + encoder.positions, mask=mask)
    torch.testing.assert_close(encoder(tokens), theirs)


def test_the_papers_model_has_its_size_and_start():
    model = SequenceClassifier(256, 1024, 10)
    assert model.encoder.tokens.weight.shape == (256, 64)
    assert model.encoder.positions.shape == (1024, 64)
    for table in (model.encoder.tokens.weight, model.encoder.positions):
        assert abs(table.std().item() - 0.02) < 1e-3
    layer = 4 * 64 * 64 + 4 * 64 + 2 * 64 * 128 + 128 + 64 + 4 * 64
    head = 64 * 128 + 128 + 128 * 10 + 10
    assert sum(p.numel() for p in model.parameters()) == 256 * 64 + 1024 * 64 + 2 * layer + 2 * 64 + head


@pytest.mark.parametrize("sparse", [False, True])
def test_padding_changes_nothing_and_counts_in_the_mean(sparse):
    model = SequenceClassifier(30, 40, 4, **SMALL).eval()
    if sparse:
        for layer in model.encoder.layers:
            layer.attention.set_layout(oracle.random_layout(2, 3, 3, 16, density=0.8, empty_row=False))
    tokens = torch.randint(1, 30, (2, 40))
    mask = torch.arange(40) < torch.tensor([[40], [13]])
    features = model.encoder(tokens, mask)
    assert (features[1, 13:] == 0).all()
    logits = model(tokens, mask)
    torch.testing.assert_close(logits, model.head(features.sum(1) / 40))
    other = torch.where(mask, tokens, torch.randint(1, 30, (2, 40)))
    torch.testing.assert_close(model(other, mask), logits)


@pytest.mark.parametrize("sparse", [False, True])
def test_compiles_into_one_graph_in_both_phases(sparse):
    model = SequenceClassifier(30, 40, 4, **SMALL)
    if sparse:
        for layer in model.encoder.layers:
            layer.attention.set_layout(oracle.random_layout(2, 3, 3, 16))
    tokens, mask = torch.randint(0, 30, (2, 40)), torch.arange(40) < torch.tensor([[40], [13]])
    expected = model(tokens, mask)
    expected.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, mask)
    out.sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close([p.grad for p in model.parameters()], grads)


class TestDropout:
    @pytest.mark.parametrize("shape", [(1000, 1003), (3,)])
    @pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
    def test_drops_the_stated_share_independently_and_scales_the_rest(self, p, shape):
        x = torch.randn(shape).abs() + 1
        out = Dropout(p)(x)
        kept = out != 0
        torch.testing.assert_close(out[kept], x[kept] / (1 - p))
        if x.numel() > 1000:
            spread = (p * (1 - p) / x.numel()) ** 0.5
            assert abs(1 - kept.float().mean().item() - p) < 5 * spread
            for lane in range(4):  # four elements share one draw: neighbours must not be alike
                neighbours = kept.flatten()[:1000000].view(-1, 4).float().sub(1 - p)
                correlation = (neighbours[:, lane] * neighbours[:, (lane + 1) % 4]).mean() / (p * (1 - p))
                assert abs(correlation.item()) < 0.02

    def test_gradient_passes_what_was_kept(self):
        x = torch.ones(50, 7, requires_grad=True)
        out = Dropout(0.3)(x)
        out.sum().backward()
        torch.testing.assert_close(x.grad, out.detach())

    def test_compiles(self):
        x = torch.ones(1000)
        out = torch.compile(Dropout(0.5), fullgraph=True, backend="aot_eager")(x)
        assert 300 < (out == 0).sum() < 700
        assert set(out.tolist()) == {0.0, 2.0}

    def test_does_nothing_in_evaluation(self):
        x = torch.randn(5, 5)
        assert Dropout(0.3).eval()(x) is x

    def test_follows_the_seed(self):
        x = torch.ones(100)
        torch.manual_seed(4)
        first = Dropout(0.5)(x)
        torch.manual_seed(4)
        assert torch.equal(first, Dropout(0.5)(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"num_heads": 3}, "width 16 cannot be split among 3 heads"),
        ({"dropout": 1.5}, "dropout must be at least 0 and below 1, got 1.5"),
        ({"attention": "sparse"}, "attention must be one of adaptive, spion, dense, .*, got 'sparse'"),
        ({"block_size": 64}, "block_size 64 exceeds seq_len 40"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        SequenceClassifier(30, 40, 4, **{**SMALL, **change})


def test_layouts_survive_a_checkpoint(tmp_path):
    model = SequenceClassifier(30, 40, 4, **SMALL).eval()
    model.encoder.layers[1].attention.set_layout(BlockLayout(torch.eye(3, dtype=torch.bool), 16))
    torch.save(model.state_dict(), tmp_path / "m.pt")
    fresh = SequenceClassifier(30, 40, 4, **SMALL).eval()
    fresh.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    tokens = torch.randint(0, 30, (2, 40))
    assert torch.equal(fresh(tokens), model(tokens))


def trained(checkpointing: bool, attention: str, observe: bool, compiled: bool) -> dict[str, torch.Tensor]:
    """Loss, gradients and what was observed, of one step with dropout and padding."""
    torch.manual_seed(0)
    options = {**SMALL, "dropout": 0.2, "activation_checkpointing": checkpointing}
    model = SequenceClassifier(30, 40, 4, **options, attention=attention if attention != "sparse" else "adaptive")
    attentions = [layer.attention for layer in model.encoder.layers]
    for each in attentions:
        if attention == "sparse":
            each.set_layout(BlockLayout(torch.eye(3, dtype=torch.bool), 16))
        if observe:
            each.observe_samples, each.block_gate = 2, torch.zeros(2, 3, 3, requires_grad=True)
    tokens, mask = torch.randint(0, 30, (3, 40)), torch.arange(40) < torch.tensor([[40], [13], [20]])
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    torch.manual_seed(1)
    loss = run(tokens, mask).square().sum()
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()} | {"loss": loss.detach()}
    for index, each in enumerate(attentions if observe else []):
        found[f"sensitivity {index}"] = each.block_gate.grad
        if attention != "sparse":
            found |= {f"{name} {index}": value for name, value in each.statistics._asdict().items()}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize(
    ("attention", "observe", "compiled"),
    [
        ("adaptive", False, False),
        ("adaptive", True, False),
        ("adaptive", True, True),
        ("sparse", False, False),
        ("sparse", True, False),
        ("sparse", True, True),
        ("longformer", False, False),
        ("lsg", False, False),
    ],
)
def test_activation_checkpointing_changes_nothing_bit_for_bit(attention, observe, compiled, monkeypatch):
    calls = []
    original = ops.attention_statistics
    if not compiled:
        monkeypatch.setattr(ops, "attention_statistics", lambda *a, **k: calls.append(1) or original(*a, **k))
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        without = trained(False, attention, observe, compiled)
        observed = len(calls)
        found = trained(True, attention, observe, compiled)
    assert found.keys() == without.keys()
    for name, value in without.items():
        assert torch.equal(found[name], value), name
    assert observed == (2 if attention == "adaptive" and observe and not compiled else 0)
    assert len(calls) == 2 * observed  # not once more in the backward pass


def test_activation_checkpointing_holds_the_inputs_of_layers_only():
    held = {}
    for checkpointing in (False, True):
        options = {**SMALL, "num_layers": 8, "activation_checkpointing": checkpointing}
        model, sizes = SequenceClassifier(30, 40, 4, **options), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            model(torch.randint(0, 30, (2, 40)))
        held[checkpointing] = sum(sizes)
    assert held[True] < held[False] / 4


def test_a_hidden_token_has_its_position_and_nothing_else():
    model = SequenceClassifier(20, 32, 20, **SMALL, per_token=True)
    ids = torch.randint(0, 20, (2, 32))
    ids[:, 5], ids[1, 9] = -1, -1
    seen = []
    model.encoder.layers[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    logits = model(ids)
    found = model.head(model.encoder(ids))
    torch.testing.assert_close(logits, torch.stack([found[0, 5], found[1, 5], found[1, 9]]))
    torch.testing.assert_close(seen[0][:, 5], model.encoder.positions[5].expand(2, -1))
    expected = model.encoder.tokens.weight[ids[:, 6]] + model.encoder.positions[6]
    torch.testing.assert_close(seen[0][:, 6], expected)
    torch.nn.functional.cross_entropy(logits, torch.tensor([3, 3, 4])).backward()
    assert model.encoder.tokens.weight.grad.isfinite().all()


def test_two_towers_do_not_predict_tokens():
    with pytest.raises(ValueError, match="per_token is for one sequence a sample"):
        SequenceClassifier(20, 32, 20, **SMALL, per_token=True, towers=2)


@pytest.mark.parametrize("grid", [None, (6, 6)])
def test_sines_tell_how_far_apart_positions_are(grid):
    """Their products depend on the distance alone, on pictures on that of rows and that of columns."""
    model = SequenceClassifier(20, 36, 3, **{**SMALL, "width": 32}, positions="sine", grid=grid)
    table = model.encoder.positions.detach().double()
    assert table.square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-4)
    products = table @ table.mT
    rows, columns = grid or (1, 36)
    row, column = torch.arange(36) // columns, torch.arange(36) % columns
    apart = (row[:, None] - row).abs() * columns + (column[:, None] - column).abs()
    for distance in apart.unique():
        own = products[apart == distance]
        assert own.max() - own.min() < 1e-8
    assert products[0].argmax() == 0
    nearest = sorted(range(1, 36), key=lambda place: -products[0, place].item())
    assert set(nearest[:2]) == ({1, columns} if rows > 1 else {1, 2})


def test_positions_that_there_are_not():
    with pytest.raises(ValueError, match="positions must be one of random, sine, got 'learned'"):
        SequenceClassifier(20, 36, 3, **SMALL, positions="learned")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="width 6 cannot hold sines and cosines of 2 coordinates"):
        SequenceClassifier(20, 36, 3, **{**SMALL, "width": 6}, positions="sine", grid=(6, 6))
