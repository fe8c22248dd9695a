"""Numbers that go wrong on the way: each is reported with its step and its place, and nothing is spoilt by it."""

from __future__ import annotations

import logging
import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sat import ops
from sat.callback import AdaptiveSparsity
from sat.layout import BlockLayout
from sat.models import SequenceClassifier
from sat.module import ClassificationModule

CLASSES, LENGTH, STEPS = 3, 32, 12


class Pictures(nn.Module):
    """Floating-point features before an encoder of ours, as a pretrained vision model has them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(LENGTH, LENGTH)
        self.head = nn.Linear(LENGTH, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.scale(pixel_values).relu())


def classifier(**options: Any) -> SequenceClassifier:
    arguments = {"num_layers": 2, "width": 16, "num_heads": 2, "mlp_dim": 16, "block_size": 8, "dropout": 0.0}
    return SequenceClassifier(20, LENGTH, CLASSES, **{**arguments, **options})


def batches(pictures: bool = False, **changes: Any) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(STEPS):
        batch = {"labels": torch.randint(0, CLASSES, (4,), generator=generator)}
        if pictures:
            batch["pixel_values"] = torch.rand(4, LENGTH, generator=generator)
        else:
            batch["input_ids"] = torch.randint(0, 20, (4, LENGTH), generator=generator)
        made.append({**batch, **changes})
    return made


def fit(tmp_path: Any, model: nn.Module, data: list, *callbacks: Callback, **options: Any) -> ClassificationModule:
    module = ClassificationModule(model, CLASSES, warmup_steps=2)
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        **{"limit_val_batches": 0, **options},
    )
    loader = DataLoader(data, batch_size=None)
    trainer.fit(module, loader, loader)
    return module


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_picture_that_is_not_finite_is_named_with_its_step(tmp_path, value):
    data = batches(pictures=True)
    data[5]["pixel_values"][2, 7] = value
    model = Pictures()
    with pytest.raises(FloatingPointError, match="at step 5, because pixel_values of its batch contains NaN or inf"):
        fit(tmp_path, model, data)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    model = Pictures()
    with torch.no_grad():
        model.head.weight[1, 1] = math.nan
    with pytest.raises(FloatingPointError, match=r"at step 0, because the weight head\.weight is NaN or infinite"):
        fit(tmp_path, model, batches(pictures=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_first_layer_to_overflow_is_named(tmp_path, compiled):
    model = Pictures()
    with torch.no_grad():
        model.head.weight.fill_(3e38)
    if compiled:
        model.compile(backend="eager", fullgraph=True)
    with pytest.raises(FloatingPointError, match="at step 0, first in the output of head"):
        fit(tmp_path, model, batches(pictures=True))


class Spoil(Callback):
    """At a step, a gradient becomes what it should not."""

    def __init__(self, step: int, name: str, value: float) -> None:
        self.step, self.name, self.value, self.before = step, name, value, {}

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == self.step:
            self.before = copied(pl_module.model)
            pl_module.get_parameter(self.name).grad.view(-1)[0] = self.value


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(tmp_path, value, clip):
    name = "model.encoder.layers.1.attention_out.weight"
    spoil = Spoil(4, name, value)
    model = classifier()
    with pytest.raises(FloatingPointError, match=f"the gradient of {name} is NaN or infinite at step 4"):
        fit(tmp_path, model, batches(), spoil, gradient_clip_val=clip)
    assert all(torch.equal(spoil.before[name], value) for name, value in model.state_dict().items())


def test_gradients_that_are_large_but_finite_are_nobodys_business(tmp_path):
    module = fit(tmp_path, classifier(), batches(), Spoil(4, "model.head.0.weight", 1e30))
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("layer", [0, 1])
def test_scores_that_are_not_finite_are_reported_with_step_and_layer(tmp_path, monkeypatch, layer):
    """Though the loss is finite: statistics are taken of the first samples alone, at some steps alone."""
    from sat.sparsity import SparsityController

    original = SparsityController.observe

    def observe(self: SparsityController, step: int, statistics: Any) -> Any:
        if step == 4:
            statistics[layer].pooled[0, 0, 0] = math.nan
        return original(self, step, statistics)

    monkeypatch.setattr(SparsityController, "observe", observe)
    sparsity = AdaptiveSparsity(density=0.5, interval=2, theta=1e9)
    with pytest.raises(FloatingPointError, match=f"layer {layer} at step 4: pooled contains NaN"):
        fit(tmp_path, classifier(), batches(), sparsity)


def test_a_validation_loss_that_is_not_finite_is_reported_and_training_goes_on(tmp_path, caplog):
    data = batches(pictures=True)

    class Once(Callback):
        def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
            batch["pixel_values"] = batch["pixel_values"].clone()
            batch["pixel_values"][0, 0] = math.nan

    with caplog.at_level(logging.WARNING, logger="sat.module"):
        module = fit(
            tmp_path, Pictures(), data, Once(), limit_val_batches=3, val_check_interval=6, num_sanity_val_steps=0
        )
    assert module.trainer.global_step == STEPS
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2  # once a validation
    assert said[0] == "the val loss is nan at step 6, because pixel_values of its batch contains NaN or infinite values"


def uniform(model: SequenceClassifier, layer: int) -> None:
    """Every query finds all keys alike, for good: the scores of the layer are constant."""
    projection = model.encoder.layers[layer].query_key_value
    width = projection.in_features
    projection.weight.data[: 2 * width] = 0
    projection.bias.data[: 2 * width] = 0
    projection.weight.register_hook(lambda g: torch.cat([torch.zeros_like(g[: 2 * width]), g[2 * width :]]))
    projection.bias.register_hook(lambda g: torch.cat([torch.zeros_like(g[: 2 * width]), g[2 * width :]]))


def test_constant_scores_have_no_skew_and_keep_their_layer_dense(tmp_path):
    model = classifier()
    uniform(model, 1)
    sparsity = AdaptiveSparsity(density=0.5, interval=2, theta=0.001, delta=1e9, per_layer=True)
    fit(tmp_path, model, batches(), sparsity)
    layers = [record["layers"][1] for record in sparsity.history]
    assert all(layer["skewness"] == 0 for layer in layers)
    assert all(layer["distance"] == 0 for layer in layers[1:])  # the first has none
    assert not model.encoder.layers[1].attention.is_sparse
    assert "skewness 0.00" in sparsity.controller.missing[1]


def test_constant_scores_at_a_forced_switch_make_a_layout_all_the_same(tmp_path):
    model = classifier()
    uniform(model, 0)
    uniform(model, 1)
    sparsity = AdaptiveSparsity(density=0.5, interval=2, theta=1.7, max_dense_steps=6)
    fit(tmp_path, model, batches(), sparsity)
    assert [t.forced for t in sparsity.transitions] == [True, True]
    for transition in sparsity.transitions:
        assert transition.layout.density == 0.5
        assert transition.captured_mass == pytest.approx(0.5)
        assert transition.skewness == 0


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_attention_to_padding_only_is_zero_and_its_statistics_are_finite(backend):
    query, key, value = torch.randn(3, 2, 2, LENGTH, 8, requires_grad=True).unbind(0)
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1] = False
    layout = BlockLayout(torch.eye(4, dtype=torch.bool), 8)
    out = ops.block_sparse_attention(query, key, value, layout, key_padding_mask=mask, backend=backend)
    assert (out[1] == 0).all()
    gradients = torch.autograd.grad(out.sum(), (query, key, value))
    assert all(g.isfinite().all() and (g[1] == 0).all() for g in gradients)
    found = ops.attention_statistics(query, key, 8, key_padding_mask=mask, score_matrix=True)
    assert all(x.isfinite().all() for x in (found.pooled, found.skewness, found.score_matrix))


def test_a_run_on_padding_only_stays_finite(tmp_path):
    data = batches(attention_mask=torch.zeros(4, LENGTH, dtype=torch.bool))
    # No gradient comes back to the attention, for the masks that learn from it: they say so (tests/sparsity).
    sparsity = AdaptiveSparsity(density=0.5, interval=2, theta=None, delta=1e9, mask="direct")
    module = fit(tmp_path, classifier(), data, sparsity)
    assert all(p.isfinite().all() for p in module.parameters())
    assert module.trainer.global_step == STEPS


def test_labels_of_one_class(tmp_path):
    module = fit(
        tmp_path, classifier(), batches(labels=torch.ones(4, dtype=torch.int64)), AdaptiveSparsity(density=0.5)
    )
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(
    "criterion", [{"theta": 1e9}, {"delta": 1e-12, "theta": -1e9}, {"patience": 10**6, "theta": -1e9}]
)
def test_thresholds_that_never_hold_leave_the_run_dense_and_say_why(tmp_path, criterion):
    sparsity = AdaptiveSparsity(density=0.5, interval=1, **{"delta": 1e9, **criterion})
    model = classifier()
    fit(tmp_path, model, batches(), sparsity)
    assert sparsity.transitions == []
    assert all(sparsity.controller.missing)
    assert not any(layer.attention.is_sparse for layer in model.encoder.layers)
