"""Floor 2: the attention modules that are watched, as far as sparsity knows them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from sat.layout import BlockLayout

if TYPE_CHECKING:  # the type only: importing the operators would load Triton
    from sat.ops.types import AttentionStatistics


class Attention(Protocol):
    """What an attention module must have; :class:`sat.attention.AdaptiveAttention` has it."""

    num_heads: int
    seq_len: int
    block_size: int
    is_causal: bool
    observe_samples: int
    observe_score_matrix: bool
    observed_samples: int
    statistics: AttentionStatistics | None
    layout_mask: Tensor
    block_gate: Tensor | None

    @property
    def is_sparse(self) -> bool: ...  # noqa: D102

    @property
    def layout(self) -> BlockLayout | None: ...  # noqa: D102

    def set_layout(self, layout: BlockLayout | None) -> None: ...  # noqa: D102


def left_by(attention: Attention) -> dict[str, Tensor]:
    """What a batch has left in a module, by name; of a sparse one the sensitivity alone, of an evaluation not that.

    On the CPU where the device is one without float64, in which the rules reckon (Apple's).
    """
    statistics = attention.statistics
    values = {} if statistics is None else {k: v for k, v in statistics._asdict().items() if v is not None}
    if attention.block_gate is not None and attention.block_gate.grad is not None:
        values["sensitivity"] = attention.block_gate.grad
    return {name: x.cpu() if x.device.type == "mps" else x for name, x in values.items()}
