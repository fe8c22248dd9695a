"""Our Longformer and BigBird layers on a CPU beside those of Hugging Face, and beside fused dense attention.

python -m experiments.cpu_baselines              (about 2 minutes on 2 cores; writes results/cpu_baselines.json)

Layer against layer, projections of queries, keys and values included, in one run and in turn.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from experiments import memory, record
from sat.baselines import BigBirdAttention, LongformerAttention

BATCH, LENGTH, WIDTH, HEADS = 8, 1024, 64, 2
WINDOW, BLOCK, RANDOM_BLOCKS = 64, 32, 3
# Ours, what it is compared with, what both compute.
PAIRS = (
    ("longformer", "hugging face longformer", f"window of {WINDOW}"),
    ("longformer, 1 global token", "hugging face longformer, 1 global token", f"window of {WINDOW}"),
    ("bigbird", "hugging face bigbird", f"blocks of {BLOCK}, {RANDOM_BLOCKS} random ones a row"),
)
DENSE = "fused dense"


class Layer(nn.Module):
    """Projections and one of our attentions, or PyTorch's."""

    def __init__(self, attention: nn.Module | None, num_global_tokens: int = 0) -> None:
        super().__init__()
        self.projection = nn.Linear(WIDTH, 3 * WIDTH)
        self.global_projection = nn.Linear(WIDTH, 3 * WIDTH) if num_global_tokens else None
        self.attention: Callable[..., Tensor] = attention or F.scaled_dot_product_attention

    def heads(self, projection: nn.Linear, x: Tensor) -> Tensor:
        return projection(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        others: dict[str, Tensor] = {}
        if self.global_projection is not None:
            names = ("global_query", "global_key", "global_value")
            others = dict(zip(names, self.heads(self.global_projection, x), strict=True))
        return self.attention(*self.heads(self.projection, x), **others).transpose(1, 2).flatten(2)


class HuggingFaceLongformer(nn.Module):
    """Theirs, with the first tokens global. Their masks are made once."""

    def __init__(self, num_global_tokens: int) -> None:
        from transformers import LongformerConfig
        from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

        super().__init__()
        config = LongformerConfig(
            hidden_size=WIDTH,
            num_attention_heads=HEADS,
            attention_window=[WINDOW],
            attention_probs_dropout_prob=0.0,
        )
        self.attention = LongformerSelfAttention(config, layer_id=0)
        is_global = (torch.arange(LENGTH) < num_global_tokens).expand(BATCH, -1)
        self.options = {
            "attention_mask": is_global * 10000.0,
            "is_index_masked": torch.zeros_like(is_global),
            "is_index_global_attn": is_global,
            "is_global_attn": num_global_tokens > 0,
        }

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, **self.options)[0]


class HuggingFaceBigBird(nn.Module):
    """Theirs, in training, where it draws its random blocks anew in each call. Their masks are made once."""

    def __init__(self) -> None:
        from transformers import BigBirdConfig
        from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

        super().__init__()
        config = BigBirdConfig(
            hidden_size=WIDTH,
            num_attention_heads=HEADS,
            block_size=BLOCK,
            num_random_blocks=RANDOM_BLOCKS,
            max_position_embeddings=LENGTH,
        )
        self.attention = BigBirdBlockSparseAttention(config, seed=0)
        blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(BATCH, LENGTH), BLOCK)
        self.options = {"band_mask": band, "from_mask": rows, "to_mask": columns}
        self.options |= {"from_blocked_mask": blocked, "to_blocked_mask": blocked}

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, **self.options)[0]


def make(name: str) -> nn.Module:
    """One layer, by its name in the table."""
    count = 1 if "global" in name else 0
    if name == "bigbird":
        return Layer(BigBirdAttention(HEADS, LENGTH, block_size=BLOCK, num_random_blocks=RANDOM_BLOCKS))
    if name.startswith("longformer"):
        return Layer(LongformerAttention(HEADS, LENGTH, window=WINDOW, num_global_tokens=count), count)
    if name == DENSE:
        return Layer(None)
    return HuggingFaceBigBird() if "bigbird" in name else HuggingFaceLongformer(count)


class Step:
    """Forward and backward of one layer."""

    def __init__(self, name: str) -> None:
        self.layer = make(name)
        self.x = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
        self.grad = torch.randn(BATCH, LENGTH, WIDTH)
        self.wanted = [self.x, *self.layer.parameters()]

    def __call__(self) -> None:
        # Hugging Face's layer has global projections, used or not.
        torch.autograd.grad(self.layer(self.x), self.wanted, self.grad, allow_unused=True)


def with_a_small_one(name: str) -> tuple[Step, Callable[[], Any]]:
    """What ``memory.peak_mib`` asks for."""
    small = Layer(None)
    return Step(name), lambda: small(torch.randn(1, 8, WIDTH)).sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="calls of each layer")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if importlib.util.find_spec("transformers") is None:
        raise SystemExit("this comparison needs Hugging Face's transformers; install it with: pip install transformers")
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    names = [name for pair in PAIRS for name in pair[:2]] + [DENSE]
    times = record.interleaved({name: Step(name) for name in names}, args.rounds)
    rows: dict[str, dict[str, Any]] = {
        name: {
            **record.summary(times[name]),
            "extra_memory_mib": memory.peak_mib(with_a_small_one, name, threads=args.threads),
        }
        for name in names
    }
    faster = {ours: record.ratio(times, theirs, ours) for ours, theirs, _ in PAIRS}

    console = Console()
    table = Table(
        title=f"forward + backward, [{BATCH}, {LENGTH}, {WIDTH}], {HEADS} heads, float32, {args.threads} threads"
    )
    for column in ("layer", "ms", "quartiles", "extra MiB", "x faster than Hugging Face's"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for name, row in rows.items():
        low, high = row["quartiles_ms"]
        ratio = f"{faster[name]:.2f}" if name in faster else ""
        table.add_row(name, f"{row['median_ms']:.1f}", f"{low:.1f} to {high:.1f}", f"{row['extra_memory_mib']}", ratio)
    console.print(table)
    figures: dict[str, Any] = {
        "transformers": transformers.__version__,
        "shape": {"batch": BATCH, "length": LENGTH, "width": WIDTH, "heads": HEADS},
        "rounds": args.rounds,
        "layers": rows,
        "pairs": [
            {"ours": ours, "theirs": theirs, "both": both, "faster": faster[ours]} for ours, theirs, both in PAIRS
        ],
        "faster than fused dense": {ours: record.ratio(times, DENSE, ours) for ours, _, _ in PAIRS},
    }
    path = record.save("cpu_baselines", "OMP_NUM_THREADS=2 python -m experiments.cpu_baselines", figures)
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
