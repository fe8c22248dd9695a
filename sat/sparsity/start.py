"""Floor 2: blocks to begin with where a dense phase cannot be afforded."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from sat.sparsity.selection import select_blocks

StartName = Literal["window", "bigbird"]


def starting_blocks(
    start: StartName, grid: tuple[int, int], num_layouts: int, generator: torch.Generator, **selection: Any
) -> Tensor:
    """The blocks of a structure, as many as a density allows.

    Args:
        start: ``window``: the blocks nearest to the diagonal, of equally near ones any; ``bigbird``: the first row and
            column, as many blocks near the diagonal as fill half of the density, and others at random, as in Zaheer et
            al., "Big Bird: Transformers for Longer Sequences", 2020.
        grid: ``(M, N)``, block rows and columns.
        num_layouts: ``G``; each draws for itself.
        generator: on the CPU.
        selection: ``density`` and other settings of :func:`select_blocks`, which hold here, too.

    Returns:
        bool ``[G, M, N]``.

    Raises:
        ValueError: the density has no room for the structure, or for no block that could ever be given up.
    """
    _check_room(start, grid, selection)
    chance = torch.rand((num_layouts, *grid), generator=generator, dtype=torch.float64)
    row, column = torch.arange(grid[0])[:, None], torch.arange(grid[1])
    nearness = chance - (row - column * grid[0] // grid[1]).abs()
    if start == "window":
        return select_blocks(nearness, **selection)
    selection = selection | {"keep_first": max(1, selection.get("keep_first", 0))}
    half = {"density": selection["density"] / 2, "min_density": 0.0, "max_density": 1.0}
    near = select_blocks(nearness, **selection | half)
    return select_blocks(chance + near, **selection)


def _check_room(start: StartName, grid: tuple[int, int], selection: dict[str, Any]) -> None:
    if grid == (1, 1):  # is kept, and that is all
        return
    first = {"keep_first": max(1, selection.get("keep_first", 0))} if start == "bigbird" else {}
    least = selection | {"density": 1e-9, "min_density": 0.0, "max_density": 1.0} | first
    always = int(select_blocks(torch.zeros(1, *grid), **least).sum())
    allowed = torch.ones(grid).tril() if selection.get("causal") else torch.ones(grid)
    budget = int(allowed.sum() * selection["density"])
    # Of BigBird's blocks the first row and column may be given up, of a window's the diagonal never.
    if always > budget or (start == "window" and always == budget):
        what = "the first row and column and " if start == "bigbird" else ""
        raise ValueError(
            f"start={start!r} needs room: {what}what is always kept are {always} of {int(allowed.sum())} blocks, and "
            f"density={selection['density']} has {budget}; raise density, or make block_size smaller"
        )
