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
    """
    chance = torch.rand((num_layouts, *grid), generator=generator, dtype=torch.float64)
    row, column = torch.arange(grid[0])[:, None], torch.arange(grid[1])
    nearness = chance - (row - column * grid[0] // grid[1]).abs()
    if start == "window":
        return select_blocks(nearness, **selection)
    selection = selection | {"keep_first": max(1, selection.get("keep_first", 0))}
    near = select_blocks(nearness, **selection | {"density": selection["density"] / 2})
    return select_blocks(chance + near, **selection)
