"""What the processes of these tests do. Imported once, by the server that they are forked from."""

from __future__ import annotations

import os
import signal
from typing import Any

import lightning.pytorch as pl
import sklearn.datasets  # noqa: F401  the digits; imported late by sat.data
import torch
import torch.distributed

from sat import ops, train
from sat.callback import AdaptiveSparsity
from sat.saving import SaveLast
from sat.sparsity.processes import Observed, mean_over_processes


def run(
    arguments: list[Any], kill: tuple[int, str, int] | None = None, interrupt: tuple[int, int] | None = None
) -> Any:
    """``python -m sat.train`` with these arguments.

    Args:
        arguments: its own.
        kill: rank, moment ("step": as the step begins; "switch": when its layouts are in place) and step: there the
            process of this rank is killed; or with "freeze", as the step begins, it stops to answer.
        interrupt: rank and step: when it begins, this rank, and no other, hears of Ctrl-C.
    """
    SaveLast.__init__.__defaults__ = (4,)
    rank = int(os.environ.get("RANK", 0))
    begin, end = SaveLast.on_train_batch_start, AdaptiveSparsity._check_processes

    def begins(self: SaveLast, trainer: Any, *rest: Any) -> None:
        if kill == (rank, "step", trainer.global_step):
            os.kill(os.getpid(), signal.SIGKILL)
        if kill == (rank, "freeze", trainer.global_step):
            os.kill(os.getpid(), signal.SIGSTOP)
        self.interrupted = self.interrupted or interrupt == (rank, trainer.global_step)
        begin(self, trainer, *rest)

    def switches(self: AdaptiveSparsity) -> None:
        if kill == (rank, "switch", self._steps) and self.layouts:
            os.kill(os.getpid(), signal.SIGKILL)
        end(self)

    SaveLast.on_train_batch_start, AdaptiveSparsity._check_processes = begins, switches
    return train.main([str(argument) for argument in arguments])


def run_tampered(arguments: list[Any]) -> Any:
    """The same, but one block of the second layer's layout is another one on rank 1."""
    set_layout = train.AdaptiveAttention.set_layout

    def tampered(self: Any, layout: Any) -> None:
        set_layout(self, layout)
        if layout is not None and os.environ["RANK"] == "1" and self.tampered:
            self.layout_mask[0, 0, 5] ^= True

    train.AdaptiveAttention.set_layout = tampered
    attach = AdaptiveSparsity.attach

    def marks(self: Any, model: str, attentions: dict[str, Any], **rest: Any) -> None:
        for index, attention in enumerate(attentions.values()):
            attention.tampered = index == 1
        attach(self, model, attentions, **rest)

    AdaptiveSparsity.attach = marks
    return train.main([str(argument) for argument in arguments])


def average(shares: list[list[int]], length: int) -> list[dict[int, Any]]:
    """Means over processes, of statistics that are the process's own share of a batch.

    Args:
        shares: by layer, how many samples each rank has of it.
        length: of the sequences.

    Returns:
        The means, and what the operator gives for the whole batch of each layer, as tuples of tensors.
    """
    strategy = pl.Trainer(accelerator="cpu", devices=len(shares[0]), strategy="ddp", logger=False).strategy
    strategy.setup_environment()
    rank = torch.distributed.get_rank()
    observed, expected = {}, {}
    for layer, counts in enumerate(shares):
        torch.manual_seed(layer)
        query, key = torch.randn(2, max(1, sum(counts)), 2, length, 8)
        before, mine = sum(counts[:rank]), counts[rank]
        if mine:
            part = slice(before, before + mine)
            statistics = ops.attention_statistics(query[part], key[part], 8, score_matrix=True)
            values = statistics._replace(skewness=torch.tensor(torch.nan))._asdict()  # nobody's mean
            observed[layer] = Observed(mine, {name: x for name, x in values.items() if x is not None})
        if any(counts):
            expected[layer] = ops.attention_statistics(query, key, 8, score_matrix=True, backend="reference")
    found = mean_over_processes(observed, range(len(shares)), torch.device("cpu"))
    together = {layer: part.statistics for layer, part in found.items()}
    return [{layer: tuple(x) for layer, x in each.items()} for each in (together, expected)]


class Attends(pl.LightningModule):
    """One attention layer on made-up sequences; its weights stand still."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = train.AdaptiveAttention(2, 32, 8)
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        query, key, value = batch.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4) * self.weight
        return self.attention(query, key, value).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def sequences(count: int) -> torch.Tensor:
    return torch.randn(count, 32, 48, generator=torch.Generator().manual_seed(0))


def observe(batches: list[list[list[int]]], samples: int) -> list[tuple[float, float]]:
    """Skewness and distance at each step of a training with these batches.

    Args:
        batches: by step's batch and rank, the rows of a batch; ``batches`` are one accumulation, again and again.
        samples: of the callback.
    """
    processes = len(batches[0])
    rows = [each[int(os.environ.get("RANK", 0))] for each in batches]
    sparsity = AdaptiveSparsity(density=0.3, theta=1e9, interval=1, samples=samples)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        max_steps=2,
        accumulate_grad_batches=len(batches),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[sparsity],
    )
    loader = torch.utils.data.DataLoader(sequences(40), batch_sampler=rows * 2)  # type: ignore[arg-type]
    trainer.fit(Attends(), loader)
    return [(record["layers"][0]["skewness"], record["layers"][0]["distance"]) for record in sparsity.history]


def hugging_face(folder: str, processes: int) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
    """What was observed, and the layouts, in 8 steps of 8 samples with Hugging Face's Trainer; weights stand still.

    They do because its Trainer takes the loss of each batch of an accumulation in full or as a part, as it takes the
    model to have done already, which is not of interest here.
    """
    import transformers

    from sat.integrations.trainer import SparsityCallback
    from tests.integrations.test_trainer import make_model, make_samples

    callback = SparsityCallback(
        density=0.3, block_size=4, interval=2, theta=-100.0, delta=1e6, keep_first_tokens=1, samples=5
    )
    arguments = transformers.TrainingArguments(
        folder,
        max_steps=8,
        learning_rate=0.0,
        per_device_train_batch_size=8 // processes**2,
        gradient_accumulation_steps=processes,
        logging_steps=4,
        save_steps=8,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=7,
    )
    torch.manual_seed(0)
    config = make_model().config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = transformers.BertForSequenceClassification(config)
    transformers.Trainer(model, arguments, train_dataset=make_samples(), callbacks=[callback]).train()
    return callback.history, [layout.mask for layout in callback.layouts.values()]
