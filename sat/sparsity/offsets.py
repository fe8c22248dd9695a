"""Floor 2: blocks by their offset from the diagonal, as young attention can tell no more of them.

In the first tenth of a training single blocks hardly differ but by how popular their keys are. What they have in common
along a diagonal does stand out, for it is a mean over all of it, over heads and layers: on text the neighbours, on
pictures read row by row the pixels above and below.
"""

from __future__ import annotations

import torch
from torch import Tensor

# So many blocks of no preference are added to the mean of each offset: far offsets have few blocks of their own.
PRIOR_BLOCKS = 4


def offset_scores(scores: Tensor, *, num_heads: int, causal: bool = False) -> Tensor:
    """What the blocks of each offset from the diagonal are worth, in all layouts together.

    Each score is compared with what its row and its column make one expect, their means: a key that everybody depends
    on tells nothing of who depends on whom. The mean of these ratios over an offset, and over all layouts, is what all
    of its blocks are worth; equal ones go by their own scores.

    Where a layer has several layouts, those of its heads 0, 2, 4 ... prefer the blocks on and before the diagonal,
    whatever the others are worth, and heads 1, 3, 5 ... those on and after it: with the same blocks for all, a layer
    would see half as far. Not when causal.

    Args:
        scores: ``[G, M, N]``, 0 or more, larger = more important; the layouts of one layer behind each other.
        num_heads: layouts of one layer.
        causal: only blocks of the lower triangle, ``column <= row``, count.

    Returns:
        ``[G, M, N]``, float64, on the device of the scores; 1 is what an offset is worth of which nothing is known.

    Source: ours; the directions are those of Shen et al., "DiSAN: Directional Self-Attention Network", AAAI 2018.
    """
    layouts, rows, columns = scores.shape
    scores = scores.double().clamp(min=0)
    row, column = torch.arange(rows, device=scores.device)[:, None], torch.arange(columns, device=scores.device)
    offset = column - (row if causal else row * columns // rows)
    allowed = offset <= 0 if causal else torch.ones_like(offset, dtype=torch.bool)

    scores = scores * allowed
    by_row = scores.sum(2, keepdim=True) / allowed.sum(1, keepdim=True)
    by_column = scores.sum(1, keepdim=True) / allowed.sum(0, keepdim=True).clamp(min=1)
    expected = by_row * by_column * allowed.sum() / scores.sum((1, 2), keepdim=True)
    ratios = torch.where(expected > 0, scores / expected, 1.0).mean(0)

    place = (offset - offset.min()).flatten()
    counted = allowed.flatten().double()
    sums = torch.zeros(int(place.max()) + 1, dtype=torch.float64, device=scores.device)
    blocks = sums.index_add(0, place, counted)
    worth = (sums.index_add(0, place, ratios.flatten() * counted) + PRIOR_BLOCKS) / (blocks + PRIOR_BLOCKS)
    # Where offsets are alike the nearer one is preferred, and of one offset the blocks of the larger scores.
    own = scores / scores.amax((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    found = worth[place].view(rows, columns) - 1e-6 * offset.abs() / (rows + columns) + 1e-9 * own
    if num_heads > 1 and not causal:
        ahead = (torch.arange(layouts, device=scores.device) % num_heads % 2 == 1)[:, None, None]
        found = found - (1 + worth.max()) * torch.where(ahead, offset < 0, offset > 0)
    return found
