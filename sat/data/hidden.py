"""Floor 3, data: tokens that are hidden, for a model to find."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from sat.data.loading import Batch

HIDDEN = -1  # the id of a hidden token
NOT_ASKED = -100  # the label of a token that is there


def hide_tokens(share: float, batch: Batch, generator: np.random.Generator) -> Batch:
    """Hide a share of each sequence's real tokens, at least one; what they were becomes the labels.

    Args:
        share: above 0, below 1; rounded to whole tokens.
        batch: ``input_ids`` int64 ``[B, L]``, perhaps ``attention_mask`` bool ``[B, L]``, and labels, which go.
        generator: decides which.

    Returns:
        The batch with the id -1 for hidden tokens, and ``labels`` int64 ``[B, L]``: the ids of these, -100 elsewhere.

    Source: Devlin et al., "BERT", 2019 (masked language modelling, without its replacements); on the data of the task
    itself and for pixels too: Amos, Berant and Gupta, "Never Train from Scratch", ICLR 2024.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    chance = torch.from_numpy(generator.random(tuple(ids.shape)))
    if mask is not None:
        chance = chance.masked_fill(~mask, 2.0)
    real = torch.full((len(ids), 1), ids.shape[1]) if mask is None else mask.sum(1, keepdim=True)
    count = (real * share).round().long().clamp(min=1)
    hidden = (chance.argsort(1).argsort(1) < count) & (chance < 2)
    return {
        **batch,
        "input_ids": ids.masked_fill(hidden, HIDDEN),
        "labels": ids.masked_fill(~hidden, NOT_ASKED),
    }


class Hidden(Dataset[Batch]):
    """Another map from positions to a batch, in which tokens are hidden: always the same ones of a sample.

    Args:
        data: the other.
        share: as of :func:`hide_tokens`.
    """

    def __init__(self, data: Dataset[Batch], share: float) -> None:
        self.data, self.share = data, share

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, positions: list[int]) -> Batch:
        """See :func:`hide_tokens`."""
        batch = self.data[positions]
        rows = [
            hide_tokens(
                self.share, {name: x[i : i + 1] for name, x in batch.items()}, np.random.default_rng([0, position])
            )
            for i, position in enumerate(positions)
        ]
        return {name: torch.cat([row[name] for row in rows]) for name in batch}
