"""What SAT adds to a step of two processes on a CPU: statistics, their mean over the processes, the switch.

python -m experiments.distributed_overhead     (some minutes on 2 cores; writes results/distributed_overhead.json)
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from experiments import record
from sat.attention import AdaptiveAttention
from sat.callback import AdaptiveSparsity
from sat.models import SequenceClassifier
from sat.ops import sensitivity


class Classifier(pl.LightningModule):
    """The paper's CIFAR-10 model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = SequenceClassifier(256, 1024, 10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Timed(AdaptiveSparsity):
    """The callback, with a clock at each of its doors; times in milliseconds, one entry a step."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.parts: dict[str, list[float]] = {
            name: [] for name in ("observing", "sensitivity", "deciding", "comparing")
        }
        self.steps: dict[str, list[float]] = {"dense": [], "observed": [], "switch": [], "sparse": []}
        self.ours: dict[str, list[float]] = {name: [] for name in self.steps}
        self._now: dict[str, float] = {}
        self._began = 0.0

    def clocked(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self._now[name] = self._now.get(name, 0.0) + 1e3 * (time.perf_counter() - start)

        return call

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        assert self.controller is not None
        self.controller.observe = self.clocked("deciding", self.controller.observe)  # type: ignore[method-assign]
        for module in pl_module.modules():
            if isinstance(module, AdaptiveAttention):
                module.observe = self.clocked("observing", module.observe)  # type: ignore[method-assign]
        # Backward passes call it.
        timed = self.clocked("sensitivity", sensitivity.block_sensitivity)
        sensitivity.block_sensitivity = timed  # type: ignore[assignment]
        self._began = time.perf_counter()

    def on_train_batch_start(self, *arguments: Any) -> None:
        self.clocked("before", super().on_train_batch_start)(*arguments)

    def on_train_batch_end(self, *arguments: Any) -> None:
        sparse, seen = self.all_sparse, len(self.history)
        # Apart, because it is not ours: the backward passes of the processes have not ended at the same moment.
        self.clocked("waiting", torch.distributed.barrier)()
        self.clocked("after", super().on_train_batch_end)(*arguments)
        now, self._now = self._now, {}
        kind = (
            "sparse" if sparse else "switch" if self.all_sparse else "observed" if len(self.history) > seen else "dense"
        )
        end = time.perf_counter()
        self.steps[kind].append(1e3 * (end - self._began))
        self.ours[kind].append(now["before"] + now["after"] + now.get("observing", 0.0) + now.get("sensitivity", 0.0))
        if kind == "observed":
            for name in ("observing", "sensitivity", "deciding"):
                self.parts[name].append(now.get(name, 0.0))
            self.parts["comparing"].append(now["after"] - now["deciding"])
        self._began = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dense_steps", type=int, default=100)
    parser.add_argument("--sparse_steps", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=8, help="per process")
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--note", default="", help="what else the machine was doing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    at = args.dense_steps
    sparsity = Timed(density=args.density, agreement=0.9, min_dense_steps=at, max_dense_steps=at)
    steps = args.dense_steps + args.sparse_steps
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=steps,
        callbacks=[sparsity],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    samples = steps * args.batch_size * 2
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (samples, 1024), generator=generator, dtype=torch.int64)
    data = TensorDataset(tokens, torch.randint(10, (samples,), generator=generator))
    rank = int(os.environ.get("LOCAL_RANK", 0))
    sampler: DistributedSampler[Any] = DistributedSampler(data, num_replicas=2, rank=rank, shuffle=False)
    trainer.fit(Classifier(), DataLoader(data, batch_size=args.batch_size, sampler=sampler))
    if trainer.global_rank > 0:
        return
    dense = [*sparsity.steps["dense"][1:], *sparsity.steps["observed"]]
    ours = [*sparsity.ours["dense"][1:], *sparsity.ours["observed"]]
    sparse_ours, sparse = sum(sparsity.ours["sparse"]), sum(sparsity.steps["sparse"])
    figures = {
        "processes": 2,
        "batch_size": args.batch_size,
        "density": args.density,
        "samples": sparsity.samples,
        "interval": sparsity.interval,
        "step": {name: record.summary(x) for name, x in sparsity.steps.items() if len(x) > 1},
        "of an observed step, ours": {
            "statistics": record.summary(sparsity.parts["observing"]),
            "sensitivity of the loss to blocks": record.summary(sparsity.parts["sensitivity"]),
            "mean over the processes, comparing layouts": record.summary(sparsity.parts["comparing"]),
            "criterion and choice of blocks": record.summary(sparsity.parts["deciding"]),
        },
        "at the switch, ours_ms": round(statistics.mean(sparsity.ours["switch"]), 2),
        "ours, share of the dense phase": round(sum(ours) / sum(dense), 4),
        "ours, share of the sparse phase": round(sparse_ours / sparse, 5),
        "note": args.note,
    }
    console = Console()
    console.print(figures)
    path = record.save("distributed_overhead", "python -m experiments.distributed_overhead", figures)
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
