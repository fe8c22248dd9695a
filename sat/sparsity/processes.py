"""Floor 2: one decision in several processes: their statistics become one mean, their layouts are compared.

Both are collective: every process of the default process group makes the calls, in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor

from sat.layout import BlockLayout
from sat.sparsity.statistics import skewness

if TYPE_CHECKING:  # the type only: importing the operators would load Triton
    from sat.ops.types import AttentionStatistics


class LayoutsDiffer(RuntimeError):
    """Processes that train one model together have come to different layouts."""


class Observed(NamedTuple):
    """What was seen of one layer by names (see AttentionStatistics), and of how many samples it is the mean."""

    samples: int
    values: dict[str, Tensor]

    @property
    def means(self) -> dict[str, Tensor]:
        """What is a mean over samples, as opposed to the skewness, which is one of the mean matrix.

        Where there is no score matrix, no rule depends on the skewness, and the mean of several serves to be logged.
        """
        return {name: x for name, x in self.values.items() if name != "skewness" or "score_matrix" not in self.values}

    @property
    def statistics(self) -> AttentionStatistics:
        """All of it, from a dense layer."""
        from sat.ops.types import AttentionStatistics

        missing = {} if "skewness" in self.values else {"skewness": skewness(self.values["score_matrix"]).float()}
        return AttentionStatistics(**self.values, **missing)


def merged(first: Observed | None, second: Observed) -> Observed:
    """The means of both; each sample counts as much as any other."""
    if first is None:
        return second
    samples = first.samples + second.samples
    means = {
        name: x.lerp(second.values[name], second.samples / samples)
        for name, x in first.means.items()
        if name in second.values  # a batch without a backward pass leaves no sensitivity
    }
    return Observed(samples, means)


def mean_over_processes(
    observed: Mapping[int, Observed], layers: Iterable[int], device: torch.device
) -> dict[int, Observed]:
    """The means over all samples that any process has observed, the same in all processes.

    Args:
        observed: by layer, what this process has; it may have nothing.
        layers: the layers that are observed, the same in all processes.
        device: where the values are.

    Returns:
        By layer, without the layers that no process has observed.
    """
    shapes = {index: {name: x.shape for name, x in o.means.items()} for index, o in observed.items()}
    every = _gathered({index: (observed[index].samples, shapes[index]) for index in observed})
    result = {}
    for index in layers:
        parts = [each[index] for each in every if index in each]
        if not parts:
            continue
        total = sum(samples for samples, _ in parts)
        mine = observed[index].means if index in observed else {}
        means = {}
        for name, shape in parts[0][1].items():
            if any(name not in each for _, each in parts):
                continue
            # Factors that sum to 1, instead of a division at the end: what one process alone has observed stays as it
            # is, to the last bit.
            share = mine[name] * (observed[index].samples / total) if mine else torch.zeros(shape, device=device)
            torch.distributed.all_reduce(share)
            means[name] = share
        result[index] = Observed(total, means)
    return result


def check_same_layouts(layouts: Mapping[str, BlockLayout | None], step: int) -> None:
    """That all processes have the same layouts, by their SHA-256.

    Args:
        layouts: by the name of the attention module; None while it is dense.
        step: optimizer steps done, for the message.

    Raises:
        LayoutsDiffer: in all processes alike; names the layer and the ranks.
    """
    every = _gathered({name: _digest(layout) for name, layout in layouts.items()})
    odd = [rank for rank, each in enumerate(every) if each != every[0]]
    if odd:
        names = dict.fromkeys(name for each in every for name in each)
        where = next(name for name in names if any(each.get(name) != every[0].get(name) for each in every))
        ranks = f"rank{'s' * (len(odd) > 1)} {', '.join(map(str, odd))}"
        raise LayoutsDiffer(
            f"the layout of {where} differs between processes at step {step}: {ranks} of {len(every)} "
            f"{'have' if len(odd) > 1 else 'has'} another one than rank 0, though all decide by the same statistics; "
            f"start them again from one checkpoint, with the same settings and versions on every machine"
        )


def _digest(layout: BlockLayout | None) -> str:
    if layout is None:
        return "dense"
    mask = layout.mask.cpu().contiguous()
    return hashlib.sha256(f"{layout.block_size} {list(mask.shape)} ".encode() + mask.numpy().tobytes()).hexdigest()


def _gathered(mine: dict[Any, Any]) -> list[dict[Any, Any]]:
    """Small values of all processes, in the order of the ranks."""
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, mine)
    return every
