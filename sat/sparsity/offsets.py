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

    Each score is compared with what the popularity of its row and its column makes one expect: a key that everybody
    depends on tells nothing of who depends on whom. What an offset is worth is the sum of its scores over the sum of
    what was expected, over all layouts, drawn towards 1 by three standard errors (soft thresholding). Of offsets that
    do not stand out, the nearer ones are preferred; of the blocks of one offset, those of the larger scores.

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
    row, column = torch.arange(rows, device=scores.device)[:, None], torch.arange(columns, device=scores.device)
    offset = column - (row if causal else row * columns // rows)
    allowed = (offset <= 0 if causal else torch.ones_like(offset, dtype=torch.bool)).double()

    # Layout by layout: on large grids a copy of all of them takes gigabytes.
    found, expected = (torch.zeros(rows, columns, dtype=torch.float64, device=scores.device) for _ in range(2))
    for each in scores:
        share = each.double().clamp(min=0) * allowed
        share = share / share.sum().clamp(min=torch.finfo(torch.float64).tiny)
        found += share
        expected += _by_popularity(share, allowed)

    place = (offset - offset.min()).flatten()
    nothing = torch.zeros(int(place.max()) + 1, dtype=torch.float64, device=scores.device)
    weight = nothing.index_add(0, place, expected.flatten())
    known = weight > 0
    worth = torch.where(known, nothing.index_add(0, place, found.flatten()) / weight.where(known, weight + 1), 1.0)
    # Of one variance in units of what is expected: an offset of few blocks says nothing of its own.
    off = found - worth[place].view(rows, columns) * expected
    sure = expected > 0
    variance = torch.where(sure, off.square() / expected.where(sure, expected + 1), 0.0).sum() / sure.sum().clamp(min=1)
    error = (variance / weight.where(known, weight + 1)).sqrt()
    effect = worth - 1
    worth = 1 + effect.sign() * (effect.abs() - STANDARD_ERRORS * error).clamp(min=0)

    near = worth[place].view(rows, columns) - 1e-6 * offset.abs() / (rows + columns)
    largest = scores.amax((1, 2), keepdim=True).double().clamp(min=torch.finfo(torch.float64).tiny)
    by_offset = near + 1e-12 * scores.double().clamp(min=0) / largest
    if num_heads > 1 and not causal:
        for head in range(layouts):
            away = offset < 0 if head % num_heads % 2 else offset > 0
            by_offset[head] -= (1 + worth.abs().max()) * away
    return by_offset


def _by_popularity(share: Tensor, allowed: Tensor) -> Tensor:
    """What is expected where rows and columns alone decide: of the sums of ``share``, a product of two factors.

    Where all blocks are allowed the first round is exact; below a diagonal it takes some (iterative proportional
    fitting, Deming and Stephan 1940).
    """
    by_row, by_column, expected = share.sum(1, keepdim=True), share.sum(0, keepdim=True), allowed
    for _ in range(1 if allowed.all() else 10):
        for dim, wanted in ((1, by_row), (0, by_column)):
            now = expected.sum(dim, keepdim=True)
            expected = expected * torch.where(now > 0, wanted / now.where(now > 0, now + 1), 0.0)
    return expected
