"""Floor 2: which settings of the controller go together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, get_args

from sat.sparsity.masks import MaskName
from sat.sparsity.start import StartName

if TYPE_CHECKING:  # the type only: the controller calls these
    from sat.sparsity.controller import SparsityController

# Tokens up to which the rule may compare score matrices [L, L]: of 256 MiB a layer.
LONGEST_COMPARED = 8192
# Blocks of which torch.quantile finds the threshold.
MOST_TRACED = 2**24


def check_settings(controller: SparsityController) -> None:
    """Refuse what is out of range or does not go together, with a sentence (ValueError)."""
    masks = ("fisher", *get_args(MaskName), "spion")
    if controller.mask not in masks:
        raise ValueError(f"mask must be one of {', '.join(map(repr, masks))}, got {controller.mask!r}")
    at_least_one = {
        "num_layers": controller.num_layers,
        "num_heads": controller.num_heads,
        "block_size": controller.block_size,
        "the query length": controller.lengths[0],
        "the key length": controller.lengths[1],
        "mask_steps": controller.mask_steps,
    }
    for name, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    expected = (-(-controller.lengths[0] // controller.block_size), -(-controller.lengths[1] // controller.block_size))
    if controller.grid != expected:
        raise ValueError(
            f"grid is {controller.grid}, but {controller.lengths[0]} queries and {controller.lengths[1]} keys in "
            f"blocks of {controller.block_size} make {expected}; give that, or another block_size"
        )
    if not 0 < controller.mask_lr < math.inf:
        raise ValueError(f"mask_lr must be above 0 and finite, got {controller.mask_lr}; 0.05 fits within 100 steps")
    if not 0 <= controller.keep_first_tokens <= min(controller.lengths):
        raise ValueError(
            f"keep_first_tokens must be 0 to {min(controller.lengths)}, the tokens of a sequence, got "
            f"{controller.keep_first_tokens}; 1 keeps the CLS token"
        )
    if controller.min_dense_steps < 0:
        raise ValueError(f"min_dense_steps must be at least 0, got {controller.min_dense_steps}; 0 sets no minimum")
    if controller.max_dense_steps is not None and controller.max_dense_steps < max(1, controller.min_dense_steps):
        raise ValueError(
            f"max_dense_steps must be at least 1 and at least min_dense_steps ({controller.min_dense_steps}), got "
            f"{controller.max_dense_steps}; None waits for the criterion without end"
        )
    if controller.share_budget and controller.per_layer:
        raise ValueError(
            "share_budget compares the layers' blocks with each other, so all layers must leave the dense phase "
            "together; set per_layer to False"
        )
    if controller.revise_interval is not None:
        if controller.revise_interval < 1:
            raise ValueError(f"revise_interval must be at least 1 step, got {controller.revise_interval}; None: never")
        if not 0 < controller.revise_share <= 1:
            raise ValueError(f"revise_share must be above 0 and at most 1, got {controller.revise_share}")
        if controller.mask != "fisher":
            raise ValueError(
                f"revise_interval needs mask='fisher', which can tell what a missing block would be worth; got "
                f"mask={controller.mask!r}"
            )


def check_spion(controller: SparsityController, density: float | None, coverage: float | None) -> None:
    """Refuse settings of other masks beside ``mask="spion"``, likewise."""
    if controller.quantile is None or not 0 <= controller.quantile < 1:
        raise ValueError(f"mask='spion' needs a quantile, at least 0 and below 1, got {controller.quantile}; try 0.96")
    if density is not None or coverage is not None:
        raise ValueError(
            f"mask='spion' keeps what lies above its quantile, so leave density and coverage away, got "
            f"density={density} and coverage={coverage}"
        )
    rows, columns = controller.grid
    if rows != columns or rows * columns > MOST_TRACED:
        raise ValueError(
            f"mask='spion' follows the diagonals of at most {math.isqrt(MOST_TRACED):,} x {math.isqrt(MOST_TRACED):,} "
            f"blocks, as many rows as columns, got {rows:,} x {columns:,}; use larger blocks, or another mask"
        )
    if controller.per_head:
        raise ValueError(
            "mask='spion' reads the score matrix, a mean over heads; it has no layouts per_head; set it to False"
        )
    if controller.by_offset:
        raise ValueError("mask='spion' traces patterns of its own; it has no scores to take by_offset; set it to False")
    if controller.share_budget:
        raise ValueError("mask='spion' keeps what lies above its quantile; it has no budget to share_budget of")


def check_start(controller: SparsityController, start: str, coverage: float | None) -> None:
    """Refuse what a run without a dense phase cannot do, likewise."""
    if start not in get_args(StartName):
        raise ValueError(f"start must be one of {', '.join(get_args(StartName))}, or None, got {start!r}")
    if coverage is not None:
        raise ValueError(
            f"start={start!r} has no attention to measure a coverage of, got coverage={coverage}; give a density"
        )
    if controller.per_layer:
        raise ValueError(f"start={start!r} begins sparsely in all layers; set per_layer to False")
    if controller.revise_interval is None:
        raise ValueError(
            f"start={start!r} without revise_interval would never change its blocks; set revise_interval and "
            f"mask='fisher', or train with a fixed structure (of sat.patterns, or --model.attention structure)"
        )


def check_length(controller: SparsityController) -> None:
    """Refuse score matrices that would be too large, likewise; SPION has no way without."""
    longest = max(controller.lengths)
    if controller.needs_score_matrix and controller.mask != "spion" and longest > LONGEST_COMPARED:
        size = controller.lengths[0] * controller.lengths[1] * 4 / 2**30
        raise ValueError(
            f"theta and delta compare score matrices of {controller.lengths[0]:,} x {controller.lengths[1]:,} entries, "
            f"{size:.1f} GiB a layer, in memory and in checkpoints; for more than {LONGEST_COMPARED:,} tokens set "
            f"agreement (0.9, say), which compares choices of blocks, or start, which needs no dense phase"
        )
