"""Which blocks to keep: a pretrained ViT on CIFAR-10, made sparse by each rule and not trained any further.

    python -m experiments.block_choice --pretrained MODEL --data DATA

A few hundred training pictures are observed; test accuracy is then measured on 2,000 test pictures. Rules:
attention mass against Fisher information, one budget a layout against one that all layers and heads share, with and
without the diagonal and the CLS token's row and column. Writes experiments/results/block_choice.json.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments import record
from sat.data import CIFAR10RGB
from sat.integrations.transformers import prepare
from sat.models.pretrained import PretrainedClassifier
from sat.sparsity import SparsityPhases

TOKENS = 65  # 8 x 8 patches and CLS
BATCH = 64
RULES: dict[str, dict[str, Any]] = {
    "mass": {"mask": "direct"},
    "mass, shared budget": {"mask": "direct", "share_budget": True},
    "Fisher": {"mask": "fisher"},
    "Fisher, shared budget": {"mask": "fisher", "share_budget": True},
}
KEPT: dict[str, dict[str, Any]] = {
    "diagonal and CLS": {"keep_diagonal": True, "keep_first_tokens": 1},
    "diagonal": {"keep_diagonal": True},
    "nothing": {"keep_diagonal": False},
}


def accuracy(model: PretrainedClassifier, batches: list[dict[str, torch.Tensor]]) -> float:
    """Share of the pictures that are told right."""
    model.eval()
    with torch.no_grad():
        right = [model(pixel_values=b["pixel_values"]).argmax(1) == b["labels"] for b in batches]
    return torch.cat(right).float().mean().item()


def made_sparse(
    dense: PretrainedClassifier, batches: list[dict[str, torch.Tensor]], block_size: int, settings: dict[str, Any]
) -> tuple[PretrainedClassifier, SparsityPhases]:
    """A copy of the model that has observed the batches and then been given layouts; its weights stay."""
    model = copy.deepcopy(dense).eval()
    when: dict[str, Any] = {"theta": None, "delta": 1e9, "interval": 1, "min_dense_steps": len(batches)}
    phases = SparsityPhases(**when, samples=BATCH, by_offset=False, **settings)
    phases.attach("the ViT", prepare(model.model, TOKENS, block_size))
    for batch in batches:
        phases.before_batch(len(batch["labels"]))
        F.cross_entropy(model(pixel_values=batch["pixel_values"]), batch["labels"]).backward()
        phases.after_batch(ends_step=True)
    assert phases.all_sparse
    return model, phases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", required=True, help="folder of a ViT for 32 x 32 pictures in patches of 4")
    parser.add_argument("--data", help="folder of CIFAR-10; from the hub when not given")
    parser.add_argument("--block_sizes", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.35])
    parser.add_argument("--batches", type=int, default=8, help=f"of {BATCH} training pictures, to observe")
    args = parser.parse_args()
    torch.manual_seed(0)
    dense = PretrainedClassifier(10, "pictures", pretrained=args.pretrained, dropout=0.0)
    data = CIFAR10RGB(
        path=args.data, processor=args.pretrained, batch_size=BATCH, eval_batch_size=200, eval_samples=2000
    )
    data.prepare_data()
    data.setup("fit")
    loader = iter(data.train_dataloader())
    seen = [next(loader) for _ in range(args.batches)]
    unseen = list(data.test_dataloader())
    rows = []
    cases = [(b, d, k, r) for b in args.block_sizes for d in args.densities for k in KEPT for r in RULES]
    for block_size, density, kept, rule in track(cases, "rules"):
        settings = {"density": density, "per_head": True, **RULES[rule], **KEPT[kept]}
        model, phases = made_sparse(dense, seen, block_size, settings)
        layers = [[round(getattr(t, name), 3) for t in phases.transitions] for name in ("density", "captured_mass")]
        found = {"block_size": block_size, "density": density, "kept": kept, "rule": rule}
        rows.append({**found, "accuracy": accuracy(model, unseen), "densities": layers[0], "captured_mass": layers[1]})
    whole = accuracy(dense, unseen)
    table = Table(title=f"accuracy without further training; dense {whole:.3f}")
    for column in ("blocks of", "density", "always kept", *RULES):
        table.add_column(column, justify="left" if column == "always kept" else "right")
    for start in range(0, len(rows), len(RULES)):
        line = rows[start : start + len(RULES)]
        first = line[0]
        figures = [f"{row['accuracy']:.3f}" for row in line]
        table.add_row(str(first["block_size"]), str(first["density"]), first["kept"], *figures)
    Console().print(table)
    command = "python -m experiments.block_choice --pretrained MODEL --data DATA"
    path = record.save("block_choice", command, {"dense": whole, "observed": BATCH * args.batches, "rules": rows})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
