import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from sat.module import ClassificationModule


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
    return pl.Trainer(default_root_dir=tmp_path, enable_model_summary=False, **quiet, **options)


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


@pytest.mark.parametrize(("option", "message"), [({"lr": 0.0}, "lr must be above 0"), ({"warmup_steps": -1}, "warmup")])
def test_bad_arguments(option, message):
    with pytest.raises(ValueError, match=message):
        ClassificationModule(Scores(), 3, **option)


def test_endless_training_has_no_cycle(tmp_path):
    with pytest.raises(ValueError, match=r"set trainer.max_steps or trainer.max_epochs"):
        trainer(tmp_path, max_steps=-1, max_epochs=-1).fit(ClassificationModule(Scores(), 3), batches(), batches())
