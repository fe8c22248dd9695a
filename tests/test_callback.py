"""AdaptiveSparsity in a LightningModule that is not ours."""

import logging
import math

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sat.attention import AdaptiveAttention
from sat.callback import AdaptiveSparsity
from sat.layout import BlockLayout

LENGTH, WIDTH, HEADS = 32, 16, 2


class SomebodysModel(pl.LightningModule):
    """A regression with two attention layers, manual projections, and a scheduler of its own."""

    def __init__(self, scheduler: str = "constant") -> None:
        super().__init__()
        self.scheduler = scheduler
        self.projections = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.first = AdaptiveAttention(HEADS, LENGTH, 8)
        self.second = AdaptiveAttention(HEADS, LENGTH, 8)
        self.rates: list[float] = []

    def forward(self, x):
        for projection, attention in zip(self.projections, (self.first, self.second), strict=True):
            query, key, value = projection(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            x = x + attention(query, key, value).transpose(1, 2).flatten(2)
        return x

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self(x), y)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        optimizer.register_step_post_hook(lambda o, *_: self.rates.append(o.param_groups[0]["lr"]))
        schedulers = {
            "constant": torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
            "exponential": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
            "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
        }
        return [optimizer], [{"scheduler": schedulers[self.scheduler], "interval": "step"}]


def data() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, LENGTH, WIDTH, generator=generator)
    return DataLoader(TensorDataset(x, x.roll(1, 1)), batch_size=4)


def fit(tmp_path, sparsity, module=None, **options):
    module = module or SomebodysModel()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    options = {"max_steps": 20, **quiet, **options}
    options = {"callbacks": [sparsity], **options}
    trainer = pl.Trainer(default_root_dir=tmp_path, enable_model_summary=False, **options)
    trainer.fit(module, data())
    return module


def always(**options) -> AdaptiveSparsity:
    """Thresholds that anything meets, as soon as the change is defined: at the third observation."""
    return AdaptiveSparsity(**{"density": 0.3, "theta": -1e9, "delta": 1e9, "interval": 2, **options})


def test_switches_by_its_criterion_and_puts_the_layouts_in_place(tmp_path):
    sparsity = always()
    module = fit(tmp_path, sparsity)
    assert [t.step for t in sparsity.transitions] == [6, 6]
    assert not any(t.forced for t in sparsity.transitions)
    for name, attention in (("first", module.first), ("second", module.second)):
        assert attention.is_sparse
        assert sparsity.layouts[name] == attention.layout
        assert attention.layout.mask.sum().item() == HEADS * int(4 * 4 * 0.3)
    assert [record["step"] for record in sparsity.history] == [2, 4, 6]


def test_without_a_transition_training_is_untouched(tmp_path):
    torch.manual_seed(1)
    plain = SomebodysModel()
    watched = SomebodysModel()
    watched.load_state_dict(plain.state_dict())
    fit(tmp_path, pl.Callback(), plain)
    fit(tmp_path, AdaptiveSparsity(density=0.3, theta=1e9, interval=1), watched)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))


def test_forced_transition_says_what_was_missing(tmp_path, caplog):
    sparsity = AdaptiveSparsity(density=0.3, theta=1e9, delta=1.0, interval=3, max_dense_steps=7)
    with caplog.at_level(logging.WARNING):
        fit(tmp_path, sparsity)
    assert [(t.step, t.forced) for t in sparsity.transitions] == [(9, True), (9, True)]
    assert all("skewness" in t.missing for t in sparsity.transitions)
    assert "layer 0 was made sparse at step 9 by max_dense_steps; missing: skewness" in caplog.text


@pytest.mark.parametrize("scheduler", ["constant", "exponential", "cosine"])
def test_learning_rate_factor_leaves_the_scheduler_alone(tmp_path, scheduler):
    plain = fit(tmp_path, pl.Callback(), SomebodysModel(scheduler)).rates
    scaled = fit(tmp_path, always(lr_factor=0.25), SomebodysModel(scheduler)).rates
    assert scaled[:6] == plain[:6]
    assert scaled[6:] == pytest.approx([0.25 * rate for rate in plain[6:]])


def test_without_a_dense_phase_the_learning_rate_is_that_of_the_schedule(tmp_path):
    plain = fit(tmp_path, pl.Callback(), SomebodysModel("exponential")).rates
    sparsity = always(lr_factor=0.25, mask="fisher", revise_interval=4, start="window", density=0.5)
    module = fit(tmp_path, sparsity, SomebodysModel("exponential"))
    assert module.rates == plain
    assert module.first.is_sparse
    assert (sparsity.transitions, sparsity.history) == ([], [])
    assert {r.step for r in sparsity.revisions} <= {4, 8, 12, 16, 20}
    assert sparsity.revisions


def test_where_agreement_is_the_rule_no_score_matrix_is_computed(tmp_path, monkeypatch):
    asked = []
    original = AdaptiveAttention.observe

    def observe(self, *args, **kwargs):
        original(self, *args, **kwargs)
        asked.append(self.statistics.score_matrix is not None)

    monkeypatch.setattr(AdaptiveAttention, "observe", observe)
    sparsity = always(agreement=0.5, agreement_lag=2)
    fit(tmp_path, sparsity, accumulate_grad_batches=2, max_steps=8)
    assert [t.step for t in sparsity.transitions] == [6, 6]
    assert asked
    assert not any(asked)
    # Of several batches, the mean of their skewness; no distance.
    assert all(layer["skewness"] == layer["skewness"] for record in sparsity.history for layer in record["layers"])
    assert all(layer["distance"] != layer["distance"] for record in sparsity.history for layer in record["layers"])
    asked.clear()
    fit(tmp_path, always(), max_steps=6)
    assert all(asked)


def test_learning_rate_is_restored_and_hooks_are_removed(tmp_path):
    sparsity = always(lr_factor=0.5)
    module = fit(tmp_path, sparsity)
    assert not sparsity._factor._hooks
    assert module.rates[-1] == pytest.approx(0.05)


def test_gradient_accumulation_counts_optimizer_steps(tmp_path):
    sparsity = always()
    fit(tmp_path, sparsity, accumulate_grad_batches=3, max_steps=8)
    assert [record["step"] for record in sparsity.history] == [2, 4, 6]
    assert [t.step for t in sparsity.transitions] == [6, 6]


def test_per_layer_and_per_head(tmp_path):
    sparsity = always(per_layer=True, per_head=True, coverage=0.5, density=None)
    module = fit(tmp_path, sparsity)
    assert sparsity.all_sparse
    assert all(t.captured_mass >= 0.5 for t in sparsity.transitions)
    assert all(t.layout.num_heads == HEADS for t in sparsity.transitions)
    assert module.first.layout.mask.diagonal(dim1=1, dim2=2).all()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_fisher_learns_from_the_trainings_own_gradients(tmp_path, accumulate):
    torch.manual_seed(1)
    plain, watched = SomebodysModel(), SomebodysModel()
    watched.load_state_dict(plain.state_dict())
    options = {"max_steps": 6, "accumulate_grad_batches": accumulate}
    fit(tmp_path, pl.Callback(), plain, **options)
    sparsity = always(mask="fisher", per_head=True, share_budget=True, samples=4, keep_diagonal=False)
    fit(tmp_path, sparsity, watched, **options)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert sparsity.all_sparse
    kept = torch.stack([layout.mask for layout in sparsity.layouts.values()])
    assert kept.sum() == int(2 * HEADS * 16 * 0.3)
    assert [a.block_gate for a in sparsity.attentions.values()] == [None, None]
    assert [name for name, _ in watched.named_parameters()] == [name for name, _ in plain.named_parameters()]


class Copying(pl.LightningModule):
    """Each token is to give the content of the token half a sequence away, which positions point at from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = AdaptiveAttention(1, LENGTH, 4)
        self.out = nn.Linear(WIDTH, WIDTH)
        nn.init.eye_(self.out.weight)
        self.losses: list[float] = []
        self.kept: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        x, _ = batch
        key = (10 * torch.eye(LENGTH)).expand(len(x), 1, -1, -1)
        value = F.pad(x, (0, LENGTH - WIDTH))[:, None]
        context = self.attention(key.roll(LENGTH // 2, 2), key, value)[:, 0, :, :WIDTH]
        loss = F.mse_loss(self.out(context), x.roll(LENGTH // 2, 1))
        self.losses.append(loss.item())
        self.kept.append(self.attention.layout_mask[0].clone())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_revisions_find_the_blocks_that_the_task_needs(tmp_path, accumulate):
    sparsity = always(
        mask="fisher", density=2 / 8, keep_diagonal=False, revise_interval=4, revise_share=0.5, samples=8, interval=1
    )
    module = Copying()
    needed = torch.eye(8, dtype=torch.bool).roll(4, 1)
    wrong = torch.eye(8, dtype=torch.bool) | torch.eye(8, dtype=torch.bool).roll(2, 1)

    class Misled(pl.Callback):
        """The layout at the switch has none of the right blocks."""

        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 3 and sparsity.all_sparse and not sparsity.revisions:
                layout = BlockLayout(wrong[None], 4)
                module.attention.set_layout(layout)
                sparsity.controller._layers[0].layout = layout

    options = {"callbacks": [sparsity, Misled()], "max_steps": 12, "accumulate_grad_batches": accumulate}
    fit(tmp_path, None, module, **options)
    assert sparsity.revisions[0].step == 7
    assert sparsity.revisions[0].new_blocks == 0.5
    assert not (module.kept[3 * accumulate] & needed).any()
    assert (module.kept[-1] & needed).sum() == 8
    assert module.kept[-1].sum() == 16
    assert module.losses[6 * accumulate] > 0.5
    assert module.losses[-1] < 0.1


class Validated(SomebodysModel):
    """Its validation loss is as it is told."""

    def __init__(self, losses: list[float], name: str = "val/loss") -> None:
        super().__init__()
        self.losses, self.name, self.seen = losses, name, []

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.seen.append(self.first.layout_mask.float().mean().item())
            self.log(self.name, self.losses[len(self.seen) - 1])


def guarded(tmp_path, losses, **options):
    sparsity = always(guard=0.1, density=0.1, min_blocks_per_row=0, keep_diagonal=False, **options)
    module = Validated(losses)
    module.val_dataloader = data
    fit(tmp_path, sparsity, module, max_steps=4 * len(losses), val_check_interval=4, limit_val_batches=1)
    return sparsity, module


@pytest.mark.parametrize("mask", ["direct", "fisher"])
def test_the_guard_adds_blocks_and_goes_back_to_dense(tmp_path, caplog, mask):
    # The switch is after step 6, between the first two validations.
    losses = [1.0, 1.05, 1.2, 1.09, 1.2, 1.2, 1.2, math.nan, 1.2, 0.5, 2.0]
    sparsity, module = guarded(tmp_path, losses, mask=mask, per_head=True)
    one, two, four = 1 / 16, 2 / 16, 4 / 16
    # Two in a row, not two in all; a loss that is NaN counts as well.
    assert module.seen == [1.0, one, one, one, one, one, two, two, four, four, four]
    assert [(r.layer, r.step, r.density) for r in sparsity.revisions] == [
        (0, 24, two), (1, 24, two), (0, 32, four), (1, 32, four),
    ]  # fmt: skip
    warnings = [r.getMessage() for r in caplog.records if "stays more than" in r.getMessage()]
    assert warnings[0] == (
        "step 24: the validation loss, 1.2000, stays more than 0.1 above the best of the dense phase, 1.0000; training "
        "keeps twice as many blocks from now on, 0.125 of all"
    )
    assert len(warnings) == 2
    sparsity, module = guarded(tmp_path, [*losses[:9], 1.2, 1.2, 9.0], mask=mask)
    assert module.seen[8:] == [four, four, 1.0, 1.0]
    assert "training goes on densely" in caplog.text
    assert sparsity.layouts == {}
    assert not sparsity.all_sparse
    # For good, and so it is after a restart.
    again = always(guard=0.1, mask=mask)
    again.attach("a model", dict(sparsity.attentions))
    again.load_state_dict(sparsity.state_dict())
    assert not any(again.controller.watches(layer) for layer in range(2))


def test_what_is_saved_after_a_validation_is_what_was_validated(tmp_path):
    sparsity = always(guard=0.1, guard_patience=1, density=0.1, min_blocks_per_row=0, keep_diagonal=False)
    module = Validated([1.0, *[2.0] * 5])
    module.val_dataloader = data
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, monitor="val/loss")
    options = {"callbacks": [sparsity, keep], "enable_checkpointing": True, "limit_val_batches": 1}
    fit(tmp_path, sparsity, module, max_steps=24, val_check_interval=4, **options)
    saved = [torch.load(tmp_path / f"step={step}.ckpt", weights_only=True) for step in range(4, 25, 4)]
    masks = [state["state_dict"]["first.layout_mask"].float().mean().item() for state in saved]
    assert masks == module.seen == [1.0, 1 / 16, 2 / 16, 4 / 16, 1.0, 1.0]
    assert sparsity.controller.gave_up_at == 16


def test_a_guard_without_a_dense_validation_says_that_it_does_nothing(tmp_path, caplog):
    sparsity = always(guard=0.1, density=0.1)
    module = Validated([9.0, math.nan])
    module.val_dataloader = data
    fit(tmp_path, sparsity, module, max_steps=16, val_check_interval=8, limit_val_batches=1)
    said = "guard=0.1 does nothing: there was no validation in the dense phase"
    assert caplog.text.count(said) == 1
    assert sparsity.revisions == []
    assert sparsity.all_sparse


def test_without_a_guard_nothing_happens_at_whatever_cost(tmp_path):
    sparsity = always(density=0.1)
    module = Validated([1.0, 9.0, 9.0, 9.0, 9.0])
    module.val_dataloader = data
    fit(tmp_path, sparsity, module, max_steps=20, val_check_interval=4, limit_val_batches=1)
    assert sparsity.all_sparse
    assert sparsity.revisions == []


def test_a_guard_without_a_loss_is_refused(tmp_path):
    module = Validated([1.0], "accuracy")
    module.val_dataloader = data
    with pytest.raises(ValueError, match=r"guard=0.1 needs the validation loss, .* Validated logs .*accuracy"):
        fit(tmp_path, always(guard=0.1), module, max_steps=8, val_check_interval=4, limit_val_batches=1)


@pytest.mark.parametrize("mask", ["direct", "fisher", "revised", "start"])
@pytest.mark.parametrize("stop", [3, 6, 11])
def test_resumed_runs_reach_the_same_layouts_and_weights(tmp_path, stop, mask):
    torch.manual_seed(2)
    revised = {"mask": "fisher", "revise_interval": 2, "keep_diagonal": False, "density": 0.6}
    options = {"revised": revised, "start": {**revised, "start": "bigbird"}}.get(mask, {"mask": mask})
    start = SomebodysModel().state_dict()

    def module():
        made = SomebodysModel("exponential")
        made.load_state_dict(start)
        return made

    whole, whole_sparsity = module(), always(**options)
    fit(tmp_path, whole_sparsity, whole, max_steps=16)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}

    def trainer(sparsity, steps):
        return pl.Trainer(
            default_root_dir=tmp_path, enable_model_summary=False, callbacks=[sparsity], max_steps=steps, **quiet
        )

    # A loader without a position of its own is good for one epoch: 16 batches, of which the first ``stop`` are used up.
    first = trainer(always(**options), stop)
    first.fit(module(), data())
    first.save_checkpoint(tmp_path / "a.ckpt")

    class Rest:
        def __len__(self):
            return 16

        def __iter__(self):
            return iter(list(data())[stop:])

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    resumed, resumed_sparsity = module(), always(**options)
    trainer(resumed_sparsity, 16).fit(resumed, Rest(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert [t.step for t in resumed_sparsity.transitions] == [t.step for t in whole_sparsity.transitions]
    assert [t.step for t in whole_sparsity.transitions] == ([] if mask == "start" else [6, 6])
    assert resumed_sparsity.layouts == whole_sparsity.layouts
    assert resumed_sparsity.revisions == whole_sparsity.revisions
    assert bool(whole_sparsity.revisions) == (mask in ("revised", "start"))
    assert resumed_sparsity.began == whole_sparsity.began == ("bigbird" if mask == "start" else "")
    assert str(resumed_sparsity.history) == str(whole_sparsity.history)  # as text, since nan differs from itself
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_second_fit_with_another_model_begins_anew(tmp_path):
    sparsity = always()
    fit(tmp_path, sparsity)
    again = fit(tmp_path, sparsity)
    assert [t.step for t in sparsity.transitions] == [6, 6]
    assert again.first.is_sparse
    assert again.rates[0] == pytest.approx(0.1)


def test_two_optimizers_are_one_step(tmp_path):
    class Manual(SomebodysModel):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(p.parameters(), lr=0.1) for p in self.projections]

    sparsity = always()
    fit(tmp_path, sparsity, Manual(), max_steps=24)
    assert [record["step"] for record in sparsity.history] == [2, 4, 6]


def test_a_batch_that_skips_a_layer_is_not_observed(tmp_path):
    class Skipping(SomebodysModel):
        def forward(self, x):
            if self.training and self.trainer.global_step == 3:
                return x + 0 * sum(p.sum() for p in self.parameters())
            return super().forward(x)

    sparsity = always()
    fit(tmp_path, sparsity, Skipping())
    assert [record["step"] for record in sparsity.history] == [2, 6, 8]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("mask", ["direct", "fisher"])
def test_a_batch_that_is_skipped_is_not_observed_by_its_gradient(tmp_path, caplog, mask):
    class SkipsBatches(SomebodysModel):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 3 else loss

    sparsity = always(mask=mask)
    fit(tmp_path, sparsity, SkipsBatches())
    steps = [record["step"] for record in sparsity.history]
    assert steps[0] == 2
    assert steps[-1] == (8 if mask == "fisher" else 6)
    assert ("no gradient came back to first and second; layers that the loss does not depend on" in caplog.text) == (
        mask == "fisher"
    )


def test_a_failed_step_restores_the_learning_rate(tmp_path):
    class Failing(SomebodysModel):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 8:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    module = Failing()
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(tmp_path, always(), module)
    assert module.optimizers().param_groups[0]["lr"] == pytest.approx(0.1)


def test_sparse_weights_without_the_callbacks_state_are_refused(tmp_path):
    module = SomebodysModel()
    sparse = fit(tmp_path, always())
    module.load_state_dict(sparse.state_dict())
    with pytest.raises(ValueError, match="first is sparse, but the state of AdaptiveSparsity says otherwise"):
        fit(tmp_path, always(), module)


def test_several_blocks_a_row(tmp_path):
    sparsity = always(min_blocks_per_row=2)
    module = fit(tmp_path, sparsity)
    assert module.first.layout.mask.sum(2).min() >= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.1, "interval": 0}, "interval must be at least 1 step, got 0"),
        ({"density": 0.1, "samples": 0}, "samples must be at least 1, got 0"),
        ({"density": 0.1, "lr_factor": 0.0}, "lr_factor must be above 0 and at most 1, got 0.0"),
        ({"density": 1.5}, "density"),
        ({"coverage": -0.1}, "coverage"),
        ({}, "density"),
        ({"density": 0.1, "smoothing": 1.0}, "smoothing"),
        ({"density": 0.1, "mask": "random"}, "mask"),
        ({"density": 0.1, "keep_first_tokens": -1}, "keep_first_tokens must be at least 0"),
        ({"density": 0.1, "min_blocks_per_row": -1}, "min_blocks_per_row must be 0 to"),
    ],
)
def test_bad_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveSparsity(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"keep_first_tokens": 10**6},
            f"keep_first_tokens must be 0 to {LENGTH}, the tokens of a sequence, got 1000000",
        ),
        ({"min_blocks_per_row": 10**6}, "min_blocks_per_row must be 0 to 4, the blocks in a row, got 1000000"),
    ],
)
def test_what_a_model_has_not_is_refused_when_it_is_known(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveSparsity(density=0.1, **options).find_attention(SomebodysModel())


def test_a_model_without_adaptive_attention_is_refused(tmp_path):
    class Plain(SomebodysModel):
        def __init__(self):
            super().__init__()
            self.first = self.second = nn.Identity()

    with pytest.raises(ValueError, match=r"found no sat\.attention\.AdaptiveAttention in Plain"):
        fit(tmp_path, always(), Plain())


def test_layers_of_two_kinds_are_refused(tmp_path):
    module = SomebodysModel()
    module.second = AdaptiveAttention(HEADS, LENGTH, 16)
    with pytest.raises(ValueError, match="differ between first and second"):
        fit(tmp_path, always(), module)


class Late(SomebodysModel):
    """Made when Lightning asks for it."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.scheduler, self.rates = "constant", []

    def build(self) -> None:
        if not hasattr(self, "first"):
            made = SomebodysModel()
            self.projections, self.first, self.second = made.projections, made.first, made.second


class InSetup(Late):
    def setup(self, stage):
        self.build()


class InConfigureModel(Late):
    def configure_model(self):
        self.build()


@pytest.mark.parametrize("module", [InSetup, InConfigureModel])
def test_models_that_are_made_late_switch_and_resume(tmp_path, module):
    torch.manual_seed(0)
    whole = always()
    fit(tmp_path, whole, module(), limit_train_batches=4)
    assert len(whole.layouts) == 2
    torch.manual_seed(0)
    begun = always()

    class Saves(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"step={trainer.global_step}.ckpt")

    fit(tmp_path, begun, module(), max_steps=8, limit_train_batches=4, callbacks=[begun, Saves()])
    for step in (4, 8):
        resumed, again = always(), module()
        trainer = pl.Trainer(
            default_root_dir=tmp_path, callbacks=[resumed], max_steps=20, limit_train_batches=4, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu", enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(again, data(), ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True)
        assert [t.step for t in resumed.transitions] == [t.step for t in whole.transitions]
        assert resumed.layouts == whole.layouts


def test_a_module_without_attention_is_still_refused(tmp_path):
    class Nothing(SomebodysModel):
        def __init__(self) -> None:
            pl.LightningModule.__init__(self)
            self.scheduler, self.one = "constant", nn.Parameter(torch.ones(1))

    with pytest.raises(ValueError, match=r"found no sat\.attention\.AdaptiveAttention in Nothing"):
        fit(tmp_path, always(), Nothing())


@pytest.mark.parametrize("buffers", [False, True])
def test_averages_of_the_weights_have_the_latest_layouts_or_are_refused(tmp_path, buffers):
    sparsity = always()
    average = EMAWeightAveraging(use_buffers=buffers)
    if buffers:
        with pytest.raises(ValueError, match=r"EMAWeightAveraging averages buffers too, .*; give it use_buffers=False"):
            fit(tmp_path, sparsity, callbacks=[average, sparsity])
        return
    module = fit(tmp_path, sparsity, callbacks=[average, sparsity])
    assert module.first.layout == sparsity.controller.layouts[0]
    assert average._average_model.module.first.layout == sparsity.controller.layouts[0]


def test_a_callback_that_saves_too_early_is_refused(tmp_path):
    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.save_checkpoint(tmp_path / "a.ckpt")

    sparsity = always()
    with pytest.raises(ValueError, match="put AdaptiveSparsity before it in callbacks"):
        fit(tmp_path, sparsity, callbacks=[Saves(), sparsity])
    sparsity = always()
    fit(tmp_path, sparsity, callbacks=[sparsity, Saves()])
    assert (tmp_path / "a.ckpt").is_file()


def test_layouts_that_came_from_elsewhere_are_noticed(tmp_path):
    sparsity = always()
    module = fit(tmp_path, sparsity, max_steps=10)
    other = {name: x.clone() for name, x in module.state_dict().items()}
    other["first.layout_mask"] = torch.eye(4, dtype=torch.bool).flip(0).expand(2, -1, -1).clone()
    module.load_state_dict(other)
    with pytest.raises(ValueError, match="first has another layout than the state of AdaptiveSparsity knows"):
        fit(tmp_path, sparsity, module)


def test_a_training_that_is_broken_off_in_an_observed_step_leaves_nothing_watching(tmp_path):
    class Broken(SomebodysModel):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.first.observe_samples:
                raise RuntimeError("out of memory")
            return loss

    module = Broken()
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(tmp_path, always(mask="fisher"), module)
    for attention in (module.first, module.second):
        assert (attention.observe_samples, attention.statistics, attention.block_gate) == (0, None, None)


@pytest.mark.parametrize(("length", "warned"), [(LENGTH, False), (LENGTH - 8, False), (LENGTH - 9, False), (16, True)])
def test_a_grid_that_no_sequence_fills_is_warned_of(tmp_path, caplog, length, warned):
    class Short(SomebodysModel):
        def training_step(self, batch, batch_idx):
            return super().training_step([x[:, :length] for x in batch], batch_idx)

    fit(tmp_path, always(), Short(), max_steps=7)
    assert ("no sequence that was observed is longer than" in caplog.text) == warned
    assert (f"longer than {length} tokens, and layouts are made for {LENGTH}" in caplog.text) == warned


def test_the_sequences_of_two_towers_are_counted(tmp_path):
    """Two batches of an accumulation: the first ones of the whole batch are observed, as in one process."""
    counted = []

    class Pairs(SomebodysModel):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Module()
            self.model.towers = 2

        def training_step(self, batch, batch_idx):
            counted.append(self.first.observe_samples)
            return super().training_step([torch.cat([x, x]) for x in batch], batch_idx)

    fit(tmp_path, always(samples=12, interval=1), Pairs(), max_steps=1, accumulate_grad_batches=2)
    assert counted == [12, 4]  # 4 pairs in a batch are 8 sequences
