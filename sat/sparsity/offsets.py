"""Floor 2: blocks by their offset from the diagonal, as young attention can tell no more of them.

In the first tenth of a training single blocks hardly differ but by how popular their keys are. What they have in common
along a diagonal can stand out before, for it is a mean over all of it, over heads and layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

# An offset counts for what it is worth beyond so many standard errors of its mean: of the 2 N - 1 offsets of a young
# model, some lie two away from 1 by chance, the far ones above all, which have few blocks.
STANDARD_ERRORS = 3.0
# Median of the square of a standard normal variable.
MEDIAN_SQUARE = 0.4549364


def offset_scores(scores: Tensor, *, num_heads: int, causal: bool = False) -> Tensor:
    """What the blocks of each offset from the diagonal are worth, in all layouts together.

    Each score is compared with what the popularity of its row and its column makes one expect: a key that everybody
    depends on tells nothing of who depends on whom. What an offset is worth is the sum of its scores over the sum of
    what was expected, over all layouts, drawn towards 1 by three standard errors (soft thresholding). Of offsets that
    do not stand out, the nearer ones are preferred. Where a budget ends within an offset, its blocks are taken evenly
    along the diagonal: by their scores, they would be those of popular keys, and others with each observation.

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

    # Layout by layout: on large grids each copy of all of them takes gigabytes.
    found, expected = (torch.zeros(rows, columns, dtype=torch.float64, device=scores.device) for _ in range(2))
    for each in scores:
        share = each.double().clamp(min=0) * allowed
        share = share / share.sum().clamp(min=torch.finfo(torch.float64).tiny)
        found += share
        expected += _by_popularity(share, allowed)

    place = (offset - offset.min()).flatten()
    nothing = torch.zeros(int(place.max()) + 1, dtype=torch.float64, device=scores.device)

    def along(values: Tensor) -> Tensor:
        return nothing.index_add(0, place, values.flatten())

    weight = along(expected)
    known = weight > 0
    weight = weight.where(known, 1.0)
    worth = torch.where(known, along(found) / weight, 1.0)
    # The larger of two errors. By how much blocks lie apart anywhere, as a share of what is expected of them, for a few
    # blocks cannot tell. And by how much those of the offset do: one that is worth a lot does not speak for the others.
    apart = (found - worth[place].view(rows, columns) * expected).square()
    sure = expected > 0
    # Not the quotient of the squares: what is hardly expected, in rows that were seen long ago, has none.
    typical = (apart[sure].sqrt() / expected[sure]).square().median() / MEDIAN_SQUARE if sure.any() else nothing.sum()
    error = torch.maximum(typical * along(expected.square()), along(apart)).sqrt() / weight
    effect = worth - 1
    worth = 1 + effect.sign() * (effect.abs() - STANDARD_ERRORS * error).clamp(min=0)

    near = worth[place].view(rows, columns) - 1e-6 * offset.abs() / (rows + columns)
    # The place along the diagonal decides between equal ones only, and does so however much these are worth: by a part
    # of what separates them from the next lower ones, which 64 bits still tell apart.
    levels, level = near.unique(return_inverse=True)
    room = torch.minimum(levels.diff(prepend=levels[:1] - 1) / 2, 5e-7 * levels.abs().clamp(min=1))
    by_offset = near - room[level] * _evenly(rows, scores.device)[:, None]
    if num_heads == 1 or causal:
        return by_offset.repeat(layouts, 1, 1)
    ahead, back = (by_offset - (1 + worth.abs().max()) * away for away in (offset < 0, offset > 0))
    return torch.stack((back, ahead))[torch.arange(layouts, device=scores.device) % num_heads % 2]


def _evenly(count: int, device: torch.device) -> Tensor:
    """Numbers from 0 to 1 of which the smallest, however many, lie evenly: 0, 1/2, 1/4, 3/4 ... (van der Corput)."""
    left, found = torch.arange(count, device=device), torch.zeros(count, dtype=torch.float64, device=device)
    for power in range(1, count.bit_length() + 1):
        found += left % 2 / 2**power
        left = left // 2
    return found


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
