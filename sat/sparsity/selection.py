"""Floor 2: from scores to kept blocks."""

from __future__ import annotations

import torch
from torch import Tensor


def select_blocks(
    scores: Tensor,
    *,
    density: float | None = None,
    coverage: float | None = None,
    mass: Tensor | None = None,
    min_density: float = 0.0,
    max_density: float = 1.0,
    keep_diagonal: bool = True,
    min_blocks_per_row: int = 1,
    keep_first: int = 0,
    causal: bool = False,
    share_budget: bool = False,
) -> Tensor:
    """Keep the blocks of the largest score, each of the ``G`` layouts for itself.

    Blocks that are kept in any case count inside the budget and win when they alone exceed it: the diagonal, the first
    rows and columns, and in each row its best blocks until the row has ``min_blocks_per_row`` (a kept diagonal block is
    one of them). With ``keep_diagonal=False, min_blocks_per_row=0`` this is the paper's selection, and rows may stay
    empty. Ties go to the lower index, row by row.

    Args:
        scores: ``[G, M, N]``, larger = more important.
        density: keep ``int(M * N * density)`` blocks, 0 < density <= 1. When causal, of the lower triangle's blocks.
        coverage: instead of a density: keep the fewest blocks, in order of score, that hold this share of all mass,
            0 < coverage <= 1, within the two bounds below.
        mass: ``[G, M, N]``, share of attention in each block, for ``coverage``; see
            :func:`sat.sparsity.statistics.block_mass`.
        min_density: least share of blocks to keep, counted like ``density``.
        max_density: largest share of blocks to keep, counted like ``density``.
        keep_diagonal: keep the blocks ``(i, i)``; where ``M != N`` the blocks ``(i, i * N // M)``, from one corner to
            the other, and when causal ``(i, min(i, N - 1))``, for a causal mask starts at the upper left corner.
        min_blocks_per_row: least number of blocks in a row (or all that causality leaves).
        keep_first: keep so many block rows and block columns at the start whole: special tokens that see all and are
            seen by all.
        causal: only blocks of the lower triangle, ``column <= row``, may be kept.
        share_budget: compare the scores of all layouts with each other and count density, coverage and bounds over all
            of them together, so that one may keep more blocks than another.

    Returns:
        bool ``[G, M, N]``, on the device of the scores.

    Raises:
        ValueError: a value is out of range, scores or masses contain NaN, or a shape does not fit.

    Source: Yoon et al., IEEE Access 12 (2024), the transition of SAT (density); the rest is ours.
    """
    if scores.dim() != 3:
        raise ValueError(f"scores are [layouts, rows, columns], got the shape {list(scores.shape)}")
    num_layouts, rows, columns = scores.shape
    check_selection(density, coverage, min_density, max_density, min_blocks_per_row, columns)
    if not 0 <= keep_first <= columns:
        raise ValueError(f"keep_first must be 0 to {columns}, the blocks in a row, got {keep_first}")
    if scores.isnan().any():
        raise ValueError("the scores of the blocks contain NaN, so there is no largest one; look for NaN in the model")

    allowed = torch.ones(rows, columns, dtype=torch.bool, device=scores.device)
    if causal:
        allowed = allowed.tril()
    required = _required(scores, allowed, keep_diagonal, min_blocks_per_row, keep_first, causal)

    budgets = 1 if share_budget else num_layouts
    by_budget, sure = scores.reshape(budgets, -1), required.view(budgets, -1)
    others, at_least = (allowed & ~required).view(budgets, -1), sure.sum(1, keepdim=True)
    candidates = int(allowed.sum()) * (num_layouts // budgets)
    if density is not None:
        budget = torch.full((budgets, 1), int(candidates * density), device=scores.device)
    else:
        assert coverage is not None
        masses = _checked_mass(mass, scores).view(budgets, -1)
        budget = at_least + _covering(by_budget, masses, sure, others, coverage)
        budget = budget.clamp(int(candidates * min_density), int(candidates * max_density))
    return (sure | _best(by_budget, others, budget - at_least)).view(num_layouts, rows, columns)


def revise_blocks(
    kept: Tensor,
    scores: Tensor,
    *,
    share: float,
    keep_diagonal: bool = True,
    min_blocks_per_row: int = 1,
    keep_first: int = 0,
    causal: bool = False,
    share_budget: bool = False,
) -> Tensor:
    """Swap the weakest kept blocks for the strongest missing ones; as many blocks stay kept as were.

    The weakest is compared with the strongest, the next with the next, and a pair is swapped if the missing block has
    the larger score. Blocks that :func:`select_blocks` would keep in any case are not given up: the diagonal, the first
    rows and columns, and in each row the best ``min_blocks_per_row`` of its kept ones.

    Args:
        kept: bool ``[G, M, N]``, the layouts in use.
        scores: ``[G, M, N]``, larger = more important, of kept and missing blocks alike.
        share: of the kept blocks, at most so many are swapped, 0 to 1; where that is less than one block, one.
        keep_diagonal: as in :func:`select_blocks`, and what follows.
        min_blocks_per_row: least number of blocks in a row, as far as it has them.
        keep_first: block rows and block columns at the start.
        causal: only blocks of the lower triangle are taken in.
        share_budget: swap between layouts, too.

    Returns:
        bool ``[G, M, N]``, on the device of the scores.

    Raises:
        ValueError: shapes differ, the share is out of range, or scores contain NaN.

    Source: Evci et al., "Rigging the Lottery", 2020 (RigL), with blocks of attention in place of weights.
    """
    if kept.shape != scores.shape or scores.dim() != 3:
        raise ValueError(
            f"layouts and scores are [layouts, rows, columns], got the shapes {list(kept.shape)} and "
            f"{list(scores.shape)}"
        )
    if not 0 <= share <= 1:
        raise ValueError(f"the share of the blocks to swap must be 0 to 1, got {share}")
    if scores.isnan().any():
        raise ValueError("the scores of the blocks contain NaN, so there is no largest one; look for NaN in the model")
    num_layouts, rows, columns = scores.shape
    kept = kept.to(scores.device)
    allowed = torch.ones(rows, columns, dtype=torch.bool, device=scores.device)
    if causal:
        allowed = allowed.tril()
    required = _required(scores, kept, keep_diagonal, min_blocks_per_row, keep_first, causal)

    budgets = 1 if share_budget else num_layouts
    scores, kept, required = (x.reshape(budgets, -1) for x in (scores, kept, required))
    may_go, may_come = kept & ~required, ~kept & allowed.expand(num_layouts, -1, -1).reshape(budgets, -1)
    limit = (kept.sum(1, keepdim=True) * share).int().clamp(min=1 if share else 0)
    # Infinite scores stand for what cannot be swapped, and never make a pair.
    most = int(limit.max())
    weakest = scores.masked_fill(~may_go, torch.inf).topk(most, largest=False).values
    strongest = scores.masked_fill(~may_come, -torch.inf).topk(most).values
    # The further down, the stronger the one and the weaker the other: the pairs that are swapped come first.
    swapped = ((strongest > weakest) & (torch.arange(most, device=scores.device) < limit)).sum(1, keepdim=True)
    revised = kept & ~_best(-scores, may_go, swapped) | _best(scores, may_come, swapped)
    return revised.view(num_layouts, rows, columns)


def add_blocks(kept: Tensor, scores: Tensor, *, causal: bool = False, share_budget: bool = False) -> Tensor:
    """Keep twice as many blocks: all that were kept, and as many of the others, by their scores.

    Args:
        kept: bool ``[G, M, N]``, the layouts in use.
        scores: ``[G, M, N]``, larger = more important. Ties go to the lower index.
        causal: only blocks of the lower triangle are taken in.
        share_budget: count over all layouts together instead of for each.

    Returns:
        bool ``[G, M, N]``, on the device of the scores; all blocks where there are not twice as many.
    """
    kept = kept.to(scores.device)
    missing = ~kept if not causal else ~kept & torch.ones_like(kept).tril()
    budgets = 1 if share_budget else len(scores)
    twice = kept.view(budgets, -1).sum(1, keepdim=True)
    return kept | _best(scores.reshape(budgets, -1), missing.view(budgets, -1), twice).view_as(kept)


def agreement(now: Tensor, before: Tensor, *, keep_diagonal: bool, keep_first: int = 0, causal: bool = False) -> float:
    """Of the blocks that are chosen now, the share that were chosen before, too.

    Those that are kept in any case, the diagonal and the first rows and columns, do not count: they always agree.

    Args:
        now: bool ``[G, M, N]``.
        before: bool ``[G, M, N]``.
        keep_diagonal: as in :func:`select_blocks`, and what follows.
        keep_first: block rows and block columns at the start.
        causal: only blocks of the lower triangle could be chosen.

    Returns:
        0 to 1; 1 if nothing is left to choose.
    """
    chosen = now & ~_required(now.float(), now, keep_diagonal, 0, keep_first, causal)
    return (chosen & before).sum().item() / max(chosen.sum().item(), 1) if chosen.any() else 1.0


def check_selection(
    density: float | None,
    coverage: float | None,
    min_density: float,
    max_density: float,
    min_blocks_per_row: int,
    columns: int,
) -> None:
    """Refuse settings of :func:`select_blocks` that are out of range, with a sentence (ValueError)."""
    if (density is None) == (coverage is None):
        raise ValueError(
            f"give either density or coverage, got density={density} and coverage={coverage}; density fixes the share "
            f"of kept blocks, coverage the share of attention that they hold"
        )
    for name, value in (("density", density), ("coverage", coverage)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name} is a share and must be above 0 and at most 1, got {value}")
    if not 0 <= min_density <= max_density <= 1:
        raise ValueError(
            f"the bounds must be 0 <= min_density <= max_density <= 1, got min_density={min_density} and "
            f"max_density={max_density}"
        )
    if density is not None and not min_density <= density <= max_density:
        raise ValueError(
            f"density={density} lies outside its bounds {min_density} to {max_density}; leave min_density and "
            f"max_density away, they are meant for coverage"
        )
    if not 0 <= min_blocks_per_row <= columns:
        raise ValueError(
            f"min_blocks_per_row must be 0 to {columns}, the blocks in a row, got {min_blocks_per_row}; 0 allows "
            f"empty rows"
        )


def _required(
    scores: Tensor, candidates: Tensor, keep_diagonal: bool, min_blocks_per_row: int, keep_first: int, causal: bool
) -> Tensor:
    """Blocks ``[G, M, N]`` that are kept whatever the budget, of the candidates ``[G, M, N]`` (or ``[M, N]``)."""
    rows, columns = scores.shape[1:]
    required = torch.zeros_like(scores, dtype=torch.bool)
    if keep_diagonal:
        row = torch.arange(rows, device=scores.device)
        required[:, row, row.clamp(max=columns - 1) if causal else row * columns // rows] = True
    required[:, :keep_first] = True
    required[:, :, :keep_first] = True
    required &= candidates
    if min_blocks_per_row > 0:
        wanted = min_blocks_per_row - required.sum(2, keepdim=True)
        required |= _best(scores, candidates & ~required, wanted)
    return required


def _best(scores: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """Of each row those of the largest scores: bool, as ``among``; ties go to the lower index.

    Args:
        scores: ``[..., n]``.
        among: bool ``[..., n]``, which ones can be chosen.
        count: ``[..., 1]``, how many are wanted; fewer are chosen where there are not as many.
    """
    wanted = count.clamp(0, scores.shape[-1])
    most = int(wanted.max())
    if most == 0:
        return torch.zeros_like(among)
    # Not by sorting: of millions of blocks, a few are wanted.
    last = scores.masked_fill(~among, -torch.inf).topk(most).values.gather(-1, (wanted - 1).clamp(min=0))
    better, equal = among & (scores > last), among & (scores == last)
    left = wanted - better.sum(-1, keepdim=True, dtype=torch.int32)
    return better | (equal & (equal.cumsum(-1, dtype=torch.int32) <= left))


def _checked_mass(mass: Tensor | None, scores: Tensor) -> Tensor:
    if mass is None:
        raise ValueError("coverage needs mass, the share of attention in each block; block_mass gives it")
    if mass.shape != scores.shape:
        raise ValueError(f"mass must have the shape of the scores, {list(scores.shape)}, got {list(mass.shape)}")
    if not (mass >= 0).all():
        raise ValueError("mass is a share of attention, but it contains negative values or NaN")
    return mass.to(scores.device, torch.float64).contiguous()


def _covering(scores: Tensor, mass: Tensor, required: Tensor, others: Tensor, coverage: float) -> Tensor:
    """Least number ``[G, 1]`` of others, by score, that hold the coverage of all mass together with what is required.

    The other arguments are ``[G, n]``.
    """
    held, never = (mass.masked_fill(~each, 0).sum(1, keepdim=True) for each in (required, ~(required | others)))
    order = scores.masked_fill(~others, -torch.inf).argsort(dim=1, descending=True, stable=True)
    reached = held + mass.masked_fill(~others, 0).gather(1, order).cumsum(1)
    # Against the running sum's own end, so that a coverage of 1 is reached in spite of rounding.
    target = coverage * (reached[:, -1:] + never)
    return torch.where(held < target, (reached < target).sum(1, keepdim=True) + 1, 0)
