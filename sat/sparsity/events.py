"""Floor 2: what happens to a layer, as values: it leaves the dense phase, its layout changes."""

from __future__ import annotations

from typing import NamedTuple

from sat.layout import BlockLayout


class Transition(NamedTuple):
    """One layer leaves the dense phase.

    Attributes:
        layer: its index.
        layout: the blocks it keeps, on the CPU; 1 head when the layout is shared.
        step: optimizer steps done.
        forced: ``max_dense_steps`` was reached without the criterion.
        missing: what this layer's criterion lacked at a forced transition; empty if this layer was ready itself.
        density: kept blocks over all blocks, 0 to 1.
        captured_mass: share of the attention mass that the kept blocks hold.
        best_mass: the largest share that as many blocks could hold.
        empty_rows: block rows without a block, summed over the layout's heads.
        skewness: what the criterion compared with theta.
        relative_change: what the criterion compared with delta, in percent; nan if too early to tell.
    """

    layer: int
    layout: BlockLayout
    step: int
    forced: bool
    missing: str
    density: float
    captured_mass: float
    best_mass: float
    empty_rows: int
    skewness: float
    relative_change: float


class Revision(NamedTuple):
    """One sparse layer's layout changes.

    Attributes:
        layer: its index; what it keeps from now on is in the controller's ``layouts``.
        step: optimizer steps done.
        new_blocks: share of its blocks that it did not keep before, 0 to 1.
        density: kept blocks over all blocks, 0 to 1; with ``share_budget`` layers gain or lose some.
    """

    layer: int
    step: int
    new_blocks: float
    density: float
