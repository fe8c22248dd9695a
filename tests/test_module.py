import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from sat.models import SequenceClassifier
from sat.module import ClassificationModule, parameter_groups


class Scores(nn.Module):
    """Logits looked up by the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 3)

    def forward(self, input_ids, attention_mask=None):
        return self.table(input_ids[:, 0])


def batches(count: int = 10) -> DataLoader:
    samples = [{"input_ids": torch.tensor([i % 10, 0]), "labels": torch.tensor(i % 3)} for i in range(4 * count)]
    return DataLoader(samples, batch_size=4)


def trainer(tmp_path, **options) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "accelerator": "cpu",
        "limit_val_batches": 0,
    }
    return pl.Trainer(default_root_dir=tmp_path, enable_model_summary=False, **{**quiet, **options})


def test_the_learning_rate_goes_up_then_down_linearly_to_the_end(tmp_path):
    module = ClassificationModule(Scores(), 3, lr=0.1, warmup_steps=4)
    rates = []

    class Record(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])
            assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)

    trainer(tmp_path, max_steps=20, callbacks=[Record()]).fit(module, batches(), batches())
    assert len(rates) == 20
    assert rates[0] == pytest.approx(0.1 / 25)
    rises, falls = torch.tensor(rates).diff()[:3], torch.tensor(rates).diff()[4:]
    assert max(rates) == pytest.approx(0.1, rel=0.05)
    assert rises.min() > 0
    assert falls.max() < 0
    assert max(rises.std(), falls.std()) < 1e-4
    assert rates[-1] < 0.1 / 10


def test_sharded_weights_are_looked_at_without_the_other_processes(monkeypatch):
    """One of them alone finds a NaN: what all would have to take part in would never come back."""
    module = ClassificationModule(Scores(), 3)
    monkeypatch.setattr("sat.module.FSDPModule", Scores)
    monkeypatch.setattr(Scores, "forward", None)  # would fail
    batch = {"input_ids": torch.zeros(2, 2, dtype=torch.int64), "labels": torch.zeros(2, dtype=torch.int64)}
    assert module._origin(batch) == ""
    module.model.table.weight.data[3, 1] = torch.inf
    assert "the weight table.weight is NaN or infinite" in module._origin(batch)


def test_accuracy_and_loss_are_what_they_say(tmp_path):
    module = ClassificationModule(Scores(), 3)
    loader = batches()
    (metrics,) = trainer(tmp_path).test(module, loader, verbose=False)
    samples = loader.dataset
    logits = module.model(torch.stack([s["input_ids"] for s in samples]))
    labels = torch.stack([s["labels"] for s in samples])
    assert metrics["test/acc"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert metrics["test/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_a_nan_loss_stops_the_run_before_the_weights_change(tmp_path):
    module = ClassificationModule(Scores(), 3)
    weights = []

    class Poison(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                weights.append(pl_module.model.table.weight.detach().clone())
                pl_module.model.table.weight.data[3] = torch.nan

    run = trainer(tmp_path, max_steps=10, callbacks=[Poison()])
    with pytest.raises(FloatingPointError, match=r"training loss is nan at step 3.*before this step changes"):
        run.fit(module, batches(), batches())
    keep = [i for i in range(10) if i != 3]
    assert torch.equal(module.model.table.weight.detach()[keep], weights[0][keep])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"lr": 0.0}, "lr must be above 0"),
        ({"warmup_steps": -1}, "warmup"),
        ({"layer_decay": 0.0}, "layer_decay must be above 0 and at most 1, got 0.0"),
        ({"layer_decay": 1.5}, "layer_decay must be above 0 and at most 1, got 1.5"),
        ({"metric": "f1"}, "f1 is that of class 1 of two, but there are 3 classes"),
    ],
)
def test_bad_arguments(option, message):
    with pytest.raises(ValueError, match=message):
        ClassificationModule(Scores(), 3, **option)


def test_endless_training_has_no_cycle(tmp_path):
    with pytest.raises(ValueError, match=r"set trainer.max_steps or trainer.max_epochs"):
        trainer(tmp_path, max_steps=-1, max_epochs=-1).fit(ClassificationModule(Scores(), 3), batches(), batches())


def test_f1_is_that_of_scikit_learn_over_all_batches(tmp_path):
    from sklearn.metrics import accuracy_score, f1_score

    module = ClassificationModule(Scores(), 2, metric="f1")
    module.model.table = nn.Embedding(10, 2)
    samples = [{"input_ids": torch.tensor([i * i % 10]), "labels": torch.tensor(int(i % 3 > 0))} for i in range(30)]
    loader = DataLoader(samples, batch_size=4)  # the last one is smaller
    quiet = trainer(tmp_path, limit_val_batches=1.0)
    (metrics,) = quiet.test(module, loader, verbose=False)
    logits = module.model(torch.stack([s["input_ids"] for s in samples]))
    labels = [int(s["labels"]) for s in samples]
    assert 0 < f1_score(labels, logits.argmax(1)) < 1
    assert metrics["test/f1"] == pytest.approx(f1_score(labels, logits.argmax(1)))
    assert metrics["test/acc"] == pytest.approx(accuracy_score(labels, logits.argmax(1)))
    (metrics,) = quiet.validate(module, loader, verbose=False)
    assert module.validation_f1 == metrics["val/f1"] == pytest.approx(f1_score(labels, logits.argmax(1)))


def test_the_model_gets_all_of_a_batch_but_the_labels():
    class Takes(nn.Module):
        def forward(self, **inputs):
            return sorted(inputs)

    batch = dict.fromkeys(["pixel_values", "labels", "token_type_ids"], torch.zeros(1))
    assert ClassificationModule(Takes(), 3)(batch) == ["pixel_values", "token_type_ids"]


class TestLayerDecay:
    def test_each_layer_has_its_learning_rate(self):
        model = SequenceClassifier(10, 8, 3, num_layers=3, width=8, block_size=4)
        groups = parameter_groups(model, 1.0, 0.5)
        rate = {id(p): group["lr"] for group in groups for p in group["params"]}
        named = dict(model.named_parameters())
        assert len(rate) == sum(len(group["params"]) for group in groups) == len(named)
        expected = {"encoder.tokens": 1 / 16, "encoder.positions": 1 / 16, "encoder.norm": 1, "head": 1}
        expected |= {f"encoder.layers.{layer}": 0.5 ** (3 - layer) for layer in range(3)}
        for name, parameter in named.items():
            (found,) = [lr for prefix, lr in expected.items() if name.startswith(prefix)]
            assert rate[id(parameter)] == found, name

    def test_frozen_parameters_are_left_out(self):
        model = SequenceClassifier(10, 8, 3, num_layers=2, width=8, block_size=4)
        model.encoder.layers.requires_grad_(False)
        assert [group["lr"] for group in parameter_groups(model, 1.0, 0.5)] == [1 / 8, 1.0]
        (group,) = parameter_groups(model, 1.0, 1.0)
        assert len(group["params"]) == sum(p.requires_grad for p in model.parameters())
        model.requires_grad_(False)
        with pytest.raises(ValueError, match="no parameter of SequenceClassifier is trainable"):
            parameter_groups(model, 1.0, 1.0)

    def test_a_model_without_layers(self):
        with pytest.raises(ValueError, match=r"layer_decay=0.5 needs layers, but Scores has no torch.nn.ModuleList"):
            parameter_groups(Scores(), 1.0, 0.5)

    def test_every_group_goes_through_the_cycle(self, tmp_path):
        model = nn.ModuleDict({"layers": nn.ModuleList([Scores()]), "head": Scores()})
        model.forward = lambda input_ids: model["head"](input_ids) + model["layers"][0](input_ids)
        module = ClassificationModule(model, 3, lr=0.1, warmup_steps=4, layer_decay=0.25)
        rates = []

        class Record(pl.Callback):
            def on_before_optimizer_step(self, trainer, pl_module, optimizer):
                rates.append([group["lr"] for group in optimizer.param_groups])

        trainer(tmp_path, max_steps=20, callbacks=[Record()]).fit(module, batches(), batches())
        assert max(rates) == [pytest.approx(0.025, rel=0.05), pytest.approx(0.1, rel=0.05)]
        assert all(below == pytest.approx(above / 4, rel=1e-3) for below, above in rates)
