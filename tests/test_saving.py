"""Checkpoints of a Trainer that is not ours."""

import fsspec
import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from sat.saving import WholeCheckpoints


class Line(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.line(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("where", ["memory://bucket/run/a.ckpt", "here/a.ckpt"])
def test_checkpoints_are_where_they_were_asked_for(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    trainer = pl.Trainer(
        max_steps=2, plugins=[WholeCheckpoints()], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Line()
    trainer.fit(module, DataLoader(torch.randn(8, 2), batch_size=2))
    trainer.save_checkpoint(where)
    with fsspec.open(where, "rb") as file:
        saved = torch.load(file, weights_only=True)
    assert torch.equal(saved["state_dict"]["line.weight"], module.line.weight)
    local = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert local == ([] if "://" in where else [where])
