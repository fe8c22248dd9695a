"""Floor 2: learnable block masks, and how they are fitted to what a layer's attention looks like.

The learners see pooled attention only, never queries and keys: no gradient reaches the model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

MaskName = Literal["gram", "bilinear", "direct"]

# Weight of the past at each observation of a Fisher mask: the last ten or so count.
FISHER_DECAY = 0.9


class GramMask(nn.Module):
    """The paper's learnable mask: the Gram matrix ``W W^T`` of one parameter ``W`` ``[G, N, rank]``.

    Symmetric and, as ``W`` starts positive, with a heavy diagonal: attention that looks one way is out of its reach.
    It is here to repeat the paper.

    Args:
        num_layouts: ``G``, the number of heads, or 1 when they share one layout.
        size: ``N``, blocks a side.
        rank: columns of ``W``; the paper takes the head dimension.
        generator: source of the initial values.

    Source: Yoon et al., IEEE Access 12 (2024), the dense phase of SAT (``W_P``).
    """

    def __init__(self, num_layouts: int, size: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(_factor((num_layouts, size, rank), generator))

    def forward(self) -> Tensor:
        """Scores ``[G, N, N]``."""
        return self.weight @ self.weight.mT


class BilinearMask(nn.Module):
    """A mask of low rank that need not be symmetric: ``U V^T`` with ``U`` ``[G, M, rank]`` and ``V`` ``[G, N, rank]``.

    Args:
        num_layouts: ``G``, the number of heads, or 1 when they share one layout.
        grid: ``(M, N)``, block rows and columns.
        rank: columns of ``U`` and ``V``.
        generator: source of the initial values.
    """

    def __init__(self, num_layouts: int, grid: tuple[int, int], rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.rows = nn.Parameter(_factor((num_layouts, grid[0], rank), generator))
        self.columns = nn.Parameter(_factor((num_layouts, grid[1], rank), generator))

    def forward(self) -> Tensor:
        """Scores ``[G, M, N]``."""
        return self.rows @ self.columns.mT


class DirectMask(nn.Module):
    """One logit a block, ``[G, M, N]``: fits anything, and so amounts to a running mean of the pooled attention.

    It starts at the first observation.

    Args:
        num_layouts: ``G``, the number of heads, or 1 when they share one layout.
        grid: ``(M, N)``, block rows and columns.
    """

    def __init__(self, num_layouts: int, grid: tuple[int, int]) -> None:
        super().__init__()
        # Uniform attention, in the units of the fit: without an observation no block is preferred.
        self.logits = nn.Parameter(torch.ones((num_layouts, *grid), dtype=torch.float32, device="cpu"))

    def forward(self) -> Tensor:
        """Scores ``[G, M, N]``."""
        return self.logits


def make_mask(
    name: MaskName, grid: tuple[int, int], *, num_layouts: int = 1, rank: int = 32, generator: torch.Generator
) -> nn.Module:
    """A learnable block mask whose ``forward()`` gives scores ``[G, M, N]``, float32 on the CPU.

    Args:
        name: ``"gram"`` (the paper's), ``"bilinear"`` or ``"direct"``.
        grid: ``(M, N)``, block rows and columns.
        num_layouts: ``G``, the number of heads, or 1 when they share one layout.
        rank: columns of the factors; ``"direct"`` has none.
        generator: source of the initial values; the global one is never touched.

    Raises:
        ValueError: an unknown name, a rank below 1, or a Gram mask for a grid that is not square.
    """
    if name not in get_args(MaskName):
        raise ValueError(f"mask must be one of {', '.join(map(repr, get_args(MaskName)))}, got {name!r}")
    if rank < 1:
        raise ValueError(f"mask_rank must be at least 1, got {rank}; the paper uses the head dimension")
    if name == "direct":
        return DirectMask(num_layouts, grid)
    if name == "bilinear":
        return BilinearMask(num_layouts, grid, rank, generator)
    if grid[0] != grid[1]:
        raise ValueError(
            f"a gram mask is symmetric and needs as many block rows as columns, got {grid[0]} x {grid[1]}; "
            f"use 'bilinear' or 'direct'"
        )
    return GramMask(num_layouts, grid[0], rank, generator)


class FisherMask:
    """Blocks by how much the loss depends on them: a running mean of their Fisher information, ``[G, M, N]``.

    Nothing is fitted. Observations are shares of the sum over all layers, so that neither the loss's scale nor a single
    batch with large gradients counts, and layers can be compared.

    Args:
        num_layouts: ``G``, the number of heads, or 1 when they share one layout.
        grid: ``(M, N)``, block rows and columns.

    Source: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018; the blocks are ours.
    """

    def __init__(self, num_layouts: int, grid: tuple[int, int]) -> None:
        self._sum = torch.zeros((num_layouts, *grid), dtype=torch.float64, device="cpu")
        self.weight = 0.0  # of the observations so far; 0 where there is none

    def fit(self, share: Tensor) -> None:
        """Take in one observation: ``[H, M, N]``, the blocks' share of what the loss depends on."""
        share = share.detach().to("cpu", torch.float64)
        if self._sum.shape[0] == 1:
            share = share.sum(0, keepdim=True)
        self._sum = FISHER_DECAY * self._sum + share
        self.weight = FISHER_DECAY * self.weight + 1

    def scores(self) -> Tensor:
        """The mean ``[G, M, N]``; 0 before the first observation."""
        return self._sum / max(self.weight, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """A copy: further observations do not change it."""
        return {"sum": self._sum.clone(), "weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self._sum, self.weight = state["sum"].to("cpu", copy=True), float(state["weight"])


class MaskLearner:
    """A mask with an Adam optimizer of its own, fitted to pooled attention by mean squared error.

    The target is in units of uniform attention (``pooled * S``, so that uniform attention is 1 everywhere). Raw values
    are about ``1/S``, less than one step of the optimizer: the fit would jump around them. A common factor does not
    change which blocks are largest.

    Args:
        mask: one of :func:`make_mask`.
        lr: learning rate, in units of uniform attention.
    """

    def __init__(self, mask: nn.Module, lr: float) -> None:
        self.mask = mask
        self.optimizer = torch.optim.Adam(mask.parameters(), lr=lr)

    def fit(self, pooled: Tensor, key_length: int, steps: int) -> None:
        """Take ``steps`` gradient steps towards one observation.

        Heads that share a layout are averaged first: the mean squared error to each head has the same gradient as the
        error to their mean.

        Args:
            pooled: ``[H, M, N]``, mean attention weight of each block, any device.
            key_length: ``S``, in tokens.
            steps: number of gradient steps.
        """
        with undisturbed(), torch.enable_grad():
            target = pooled.detach().to("cpu", torch.float32, copy=True) * key_length
            if self.mask().shape[0] == 1:
                target = target.mean(0, keepdim=True)
            if isinstance(self.mask, DirectMask) and not self.optimizer.state:
                # Steps of the size of the learning rate would take a hundred to get to where the first observation is.
                self.mask.logits.data.copy_(target)
            for _ in range(steps):
                self.optimizer.zero_grad(set_to_none=True)
                # The sum instead of the mean: Adam ignores the factor M * N, except for its epsilon, which should stay
                # far below the gradients on large grids too.
                (self.mask() - target).square().sum().backward()
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def scores(self) -> Tensor:
        """The mask's present scores ``[G, M, N]``, in units of uniform attention, without gradient."""
        with undisturbed(), torch.no_grad():
            return self.mask().clone()

    def state_dict(self) -> dict[str, Any]:
        """A copy of the parameters and the optimizer's state: further fitting does not change it."""
        return copy.deepcopy({"mask": self.mask.state_dict(), "optimizer": self.optimizer.state_dict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.mask.load_state_dict(state["mask"])
        self.optimizer.load_state_dict(state["optimizer"])
        # The optimizer takes over some tensors as they are: as a view of the state, or on the device it was loaded to.
        for slots in self.optimizer.state.values():
            slots.update({name: value.to("cpu", copy=True) for name, value in slots.items()})


@contextmanager
def undisturbed() -> Iterator[None]:
    """Compute in the same way wherever the caller stands: inside inference mode, CPU autocast or busy data loaders.

    One thread, because these products are tiny: two threads that wait for each other beside busy data loaders take
    many times as long, and the rounding would depend on the number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_num_threads(threads)


def _factor(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """The paper's uniform(0, 1) draw, scaled so that a product of two factors starts at 1 on average.

    That is uniform attention in the units of the fit; unscaled it would start at ``rank / 4`` and spend the first
    hundred steps on shrinking.
    """
    draw = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
    return draw * (2 / shape[-1] ** 0.5)
