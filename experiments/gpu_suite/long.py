"""One training step of encoder layers on a long sequence: sparse, at fixed kept blocks a row, against dense."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from experiments.gpu_suite import clock, layouts
from experiments.gpu_suite.case import Case, Record, Section, Setting, number, text_table
from sat.attention import AdaptiveAttention
from sat.models.encoder import EncoderLayer


class Sizes(NamedTuple):
    """A stack of encoder layers, batch 1."""

    length: int
    block_size: int
    kept_a_row: int  # blocks
    width: int = 512
    num_heads: int = 8
    mlp_dim: int = 2048
    num_layers: int = 2

    @property
    def name(self) -> str:
        return f"L {self.length} b {self.block_size}, {self.kept_a_row} blocks a row"


class Stack(nn.Module):
    """Encoder layers, without embeddings and head."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        attentions = [
            AdaptiveAttention(sizes.num_heads, sizes.length, sizes.block_size) for _ in range(sizes.num_layers)
        ]
        self.layers = nn.ModuleList(
            EncoderLayer(sizes.width, sizes.num_heads, sizes.mlp_dim, 0.0, attention) for attention in attentions
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, None)
        return x


def step(sizes: Sizes, setting: Setting, *, sparse: bool) -> Callable[[], None]:
    """Forward and backward of a stack of its own."""
    torch.manual_seed(0)
    stack = Stack(sizes).to(setting.device)
    tokens = torch.randn(1, sizes.length, sizes.width, device=setting.device)
    if sparse:
        for seed, layer in enumerate(stack.layers):
            attention = layer.attention
            attention.backend = setting.backend  # type: ignore[union-attr]
            blocks = -(-sizes.length // sizes.block_size)
            layout = layouts.learned_like(
                blocks, 0, sizes.num_heads, sizes.block_size, setting.device, seed, sizes.kept_a_row
            )
            attention.set_layout(layout)  # type: ignore[union-attr,operator]

    def run() -> None:
        with torch.autocast(setting.device, dtype=torch.bfloat16):
            loss = stack(tokens).float().square().mean()
        stack.zero_grad()
        loss.backward()

    return run


def run(sizes: Sizes, setting: Setting, seconds: float) -> Record:
    steps = {"sparse": step(sizes, setting, sparse=True), "dense": step(sizes, setting, sparse=False)}
    found, times = clock.figures(steps, setting.device, rounds=3 if setting.smoke else 5)
    if "error" in found["sparse"]:
        raise RuntimeError(found["sparse"]["error"])
    faster = clock.faster(times, "dense", "sparse", wall=True)
    shown = {name: number(f["wall_ms"]["median"]) if "wall_ms" in f else f["error"] for name, f in found.items()}
    line = f"sparse {shown['sparse']} ms, dense {shown['dense']} ms"
    return {**sizes._asdict(), "times": found, "sparse_faster": faster, "line": line}


def cases(setting: Setting) -> list[Case]:
    stacks = (Sizes(65536, 64, 16), Sizes(65536, 128, 8), Sizes(65536, 32, 32), Sizes(16384, 64, 16))
    if setting.smoke:
        stacks = (Sizes(256, 32, 3, 16, 2, 32, 1),)  # type: ignore[assignment]
    return [Case(s.name, partial(run, s, setting), seconds=1 if setting.smoke else 15) for s in stacks]


def table(records: list[Record]) -> str:
    rows = []
    for r in records:
        cells = []
        for name in ("sparse", "dense"):
            figures = r["times"][name]
            both = (figures["wall_ms"]["median"], figures["peak_mib"]) if "wall_ms" in figures else (None, None)
            cells += [number(value) for value in both]
        rows.append([r["case"], *cells, number(r["sparse_faster"])])
    header = ["long: a step of 2 layers", "sparse ms", "MiB", "dense ms", "MiB", "faster"]
    return text_table("", header, rows).lstrip("\n")


SECTION = Section("long", 0.08, cases, table)
