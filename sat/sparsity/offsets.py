"""Floor 2: blocks by their offset from the diagonal, as young attention can tell no more of them.

In the first tenth of a training single blocks hardly differ but by how popular their keys are. What they have in common
along a diagonal does stand out, for it is a mean over all of it, over heads and layers: on text the neighbours, on
pictures read row by row the pixels above and below.
"""

from __future__ import annotations

import torch
from torch import Tensor

# An offset counts for what it is worth beyond so many standard errors of its mean: of the 2 N - 1 offsets of a young
# model, some lie two away from 1 by chance, the far ones above all, which have few blocks.
STANDARD_ERRORS = 3.0


def offset_scores(scores: Tensor, *, num_heads: int, causal: bool = False) -> Tensor:
    """What the blocks of each offset from the diagonal are worth, in all layouts together.

    Each score is compared with what its row and its column make one expect, their means: a key that everybody depends
    on tells nothing of who depends on whom. What an offset is worth is the mean of these ratios over its blocks and
    over all layouts, drawn towards 1 by three standard errors (soft thresholding). Of offsets that do not stand out,
    the nearer ones are preferred; of the blocks of one offset, those of the larger scores.

    Where a layer has several layouts, those of its heads 0, 2, 4 ... prefer the blocks on and before the diagonal,
    whatever the others are worth, and heads 1, 3, 5 ... those on and after it: with the same blocks for all, a layer
    would see half as far. Not when causal.

    Args:
        scores: ``[G, M, N]``, 0 or more, larger = more important; the layouts of one layer behind each other.
        num_heads: layouts of one layer.
        causal: only blocks of the lower triangle, ``column <= row``, count.

    Returns:
        ``[G, M, N]``, float64, on the device of the scores; about 1 for an offset that does not stand out.

    Source: ours. Thresholds: Donoho and Johnstone, "Ideal spatial adaptation by wavelet shrinkage", 1994. Directions:
    Shen et al., "DiSAN: Directional Self-Attention Network", AAAI 2018.
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

    place = offset - offset.min()
    sums = torch.zeros(int(place.max()) + 1, dtype=torch.float64, device=scores.device)
    blocks = sums.index_add(0, place.flatten(), allowed.flatten().double()).clamp(min=1)
    means = sums.index_add(0, place.flatten(), (ratios * allowed).flatten()) / blocks
    variance = ((ratios - means[place]).square() * allowed).sum() / allowed.sum()
    effect = means - 1
    worth = 1 + effect.sign() * (effect.abs() - STANDARD_ERRORS * (variance / blocks).sqrt()).clamp(min=0)

    own = scores / scores.amax((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    found = worth[place] - 1e-6 * offset.abs() / (rows + columns) + 1e-12 * own
    if num_heads > 1 and not causal:
        ahead = (torch.arange(layouts, device=scores.device) % num_heads % 2 == 1)[:, None, None]
        found = found - (1 + worth.abs().max()) * torch.where(ahead, offset < 0, offset > 0)
    return found
