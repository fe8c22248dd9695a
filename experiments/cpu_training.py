"""A training step of the paper's CIFAR-10 model on a CPU, dense and sparse, and what the statistics cost.

python -m experiments.cpu_training               (about half a minute on 2 cores; writes results/cpu_training.json)
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from rich.console import Console

from experiments import record
from experiments.gpu_suite.layouts import learned_like
from sat.attention import AdaptiveAttention
from sat.callback import AdaptiveSparsity
from sat.models import SequenceClassifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="at least 2 (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds is {args.rounds}, expected at least 2: of one there is no spread")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = SequenceClassifier(256, 1024, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens, labels = torch.randint(256, (args.batch_size, 1024)), torch.randint(10, (args.batch_size,))
    attentions = [module for module in model.modules() if isinstance(module, AdaptiveAttention)]
    layouts = [learned_like(32, args.density, 1, 32, "cpu", seed) for seed, _ in enumerate(attentions)]
    defaults = AdaptiveSparsity(density=args.density)
    sparsity = AdaptiveSparsity(density=args.density, agreement=0.9, interval=1, min_dense_steps=10**9)
    sparsity.attach("the model", {str(i): attention for i, attention in enumerate(attentions)})

    def step() -> None:
        loss = F.cross_entropy(model(tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def dense() -> None:
        for attention in attentions:
            attention.set_layout(None)
        step()

    def observed() -> None:
        sparsity.before_batch(args.batch_size)
        dense()
        sparsity.after_batch(ends_step=True)

    def sparse() -> None:
        for attention, layout in zip(attentions, layouts, strict=True):
            attention.set_layout(layout)
        step()

    times = record.interleaved({"dense": dense, "dense, observed": observed, "sparse": sparse}, args.rounds)
    extra = record.ratio(times, "dense, observed", "dense") - 1
    figures = {
        "batch_size": args.batch_size,
        "density": layouts[0].density,
        **{name: record.summary(values) for name, values in times.items()},
        "sparse step faster by": record.ratio(times, "dense", "sparse"),
        "statistics, share of the dense phase": round(extra / defaults.interval, 4),
        "statistics, every so many steps": defaults.interval,
    }
    console = Console()
    console.print(figures)
    path = record.save("cpu_training", "python -m experiments.cpu_training", figures)
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
