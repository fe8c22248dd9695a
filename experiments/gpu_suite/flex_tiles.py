"""Tiles for FlexAttention's backward pass on blocks smaller than 128, by the class that PyTorch lets others replace.

Apart, because it needs private modules of PyTorch: where these have changed, importing this fails
and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._inductor.config
from torch._inductor.choices import InductorChoices
from torch._inductor.template_heuristics.triton import FlexBwDConfig
from torch._inductor.virtualized import V

tile: int | None = None  # None: PyTorch's own choice


class Choices(InductorChoices):
    """PyTorch's choices, but for the backward tile of half precisions (those of float32 fit every block)."""

    def get_flex_attention_bwd_configs(self, head_dim: int, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
        if tile is None or dtype == torch.float32:
            return super().get_flex_attention_bwd_configs(head_dim, dtype, *args, **kwargs)
        return [FlexBwDConfig(tile, tile, tile, tile, 3 if head_dim <= 64 else 2, 4)]


def install() -> None:
    """From now on, in this thread and in those that compile later."""
    torch._inductor.config.inductor_choices_class = Choices
    V.set_choices_handler(Choices())
