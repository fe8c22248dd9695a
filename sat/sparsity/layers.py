"""Floor 2: the layers of a model as the controller sees them, and what happens to all of them together."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sat.layout import BlockLayout
from sat.sparsity.criterion import Verdict
from sat.sparsity.events import Revision
from sat.sparsity.masks import FisherMask, MaskLearner
from sat.sparsity.statistics import LayerHistory

logger = logging.getLogger(__name__)


class Layer:
    """One layer's part of the state: dense as long as it has no layout."""

    def __init__(self, history: LayerHistory, learner: MaskLearner | FisherMask | None) -> None:
        self.history = history
        self.learner = learner  # None under "spion", which learns nothing, and in a sparse phase without revisions
        self.verdict = Verdict(False, 0, "no observation yet")
        self.choices: list[Tensor] = []  # of the latest observations, oldest first, where their agreement is the rule
        self.agreement: float | None = None
        self.layout: BlockLayout | None = None
        self.transition_step: int | None = None

    @property
    def nothing_learned(self) -> bool:
        """Whether its Fisher mask has not seen a gradient yet."""
        return isinstance(self.learner, FisherMask) and not self.learner.weight

    def state_dict(self, choices: bool) -> dict[str, Any]:
        """Tensors, numbers and strings; with the latest choices and their agreement where these are the rule."""
        state: dict[str, Any] = {"history": self.history.state_dict(), "verdict": self.verdict._asdict()}
        if self.learner is not None:
            state["learner"] = self.learner.state_dict()
        if choices:
            state["choices"] = [choice.clone() for choice in self.choices]
            state["agreement"] = or_nan(self.agreement)
        if self.layout is not None:
            state["layout"] = self.layout.mask.clone()
            state["transition_step"] = self.transition_step
        return state

    def load_state_dict(
        self, saved: Mapping[str, Any], block_size: int, most_choices: int, learner: MaskLearner | FisherMask | None
    ) -> None:
        """Take over what :meth:`state_dict` gave.

        Args:
            saved: the state.
            block_size: edge of a block, in tokens.
            most_choices: so many of the latest choices are kept.
            learner: a new one; None where none is wanted.
        """
        self.history.load_state_dict(saved["history"])
        self.verdict = Verdict(**saved["verdict"])
        self.choices = [choice.to("cpu", copy=True) for choice in saved.get("choices", [])][-most_choices:]
        agreement = saved.get("agreement", math.nan)
        self.agreement = None if math.isnan(agreement) else agreement
        self.learner, self.layout, self.transition_step = None, None, saved.get("transition_step")
        if "layout" in saved:
            self.layout = BlockLayout(saved["layout"].to("cpu", copy=True), block_size)
        if learner is not None and (self.layout is None or "learner" in saved):
            learner.load_state_dict(saved["learner"])
        elif not isinstance(learner, FisherMask):
            learner = None  # it is wanted only from now on, and what it would learn from is over
        self.learner = learner


def change_layouts(
    layers: Sequence[Layer],
    step: int,
    change: Callable[[Tensor, Tensor], Tensor],
    together: bool,
    rescore: Callable[[list[Tensor]], list[Tensor]] = list,
) -> list[Revision]:
    """Give every layer the layout that follows from its present one and its scores; none if one of them has no scores.

    Args:
        layers: all of them.
        step: optimizer steps already done.
        change: of layouts and scores ``[G, M, N]``.
        together: call it once, for the layouts of all layers behind each other.
        rescore: makes the scores that count from those of all layers.

    Returns:
        The layers whose layouts change.
    """
    before, scores = [], []
    for layer in layers:
        if layer.layout is None or layer.learner is None or layer.nothing_learned:
            return []
        before.append(layer.layout)
        scores.append(layer.learner.scores())
    masks, scores = [layout.mask for layout in before], rescore(scores)
    if together:
        after = change(torch.cat(masks), torch.cat(scores)).split(len(masks[0]))
    else:
        after = tuple(change(kept, each) for kept, each in zip(masks, scores, strict=True))
    revisions = []
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        if torch.equal(old.mask, new):
            continue
        layers[index].layout = layout = BlockLayout(new.clone(), old.block_size)
        new_blocks = int((new & ~old.mask).sum()) / max(layout.nnz, 1)
        revisions.append(Revision(index, step, new_blocks, layout.density))
    return revisions


def fit_fisher(
    layers: Sequence[Layer], step: int, sensitivities: Mapping[int, Tensor | None], expected: list[int]
) -> bool:
    """Let the Fisher masks take in what a backward pass has left, as shares of the sum over the layers.

    Args:
        layers: all of them.
        step: optimizer steps already done, for messages.
        sensitivities: layer index -> ``[H, M, N]``, of those that were observed.
        expected: that shape.

    Returns:
        Whether there was something to take in; a warning says so if not.

    Raises:
        ValueError: one is missing, or has another shape.
    """
    found = {}
    for index, sensitivity in sensitivities.items():
        if sensitivity is None or list(sensitivity.shape) != expected:
            given = "none" if sensitivity is None else f"the shape {list(sensitivity.shape)}"
            raise ValueError(
                f"layer {index} at step {step}: mask='fisher' needs the sensitivity of the blocks, {expected}, got "
                f"{given}; it is measured in a backward pass through the attention"
            )
        found[index] = sensitivity.detach().to("cpu", torch.float64)
    total = float(sum(x.sum() for x in found.values()))
    if not 0 < total < math.inf:
        # Ordinary in float16, where the scaler of the loss leaves out a step whose gradients overflow.
        logger.warning("no gradient observed at step %d: the loss depends on the blocks by %g", step, total)
        return False
    for index, sensitivity in found.items():
        learner = layers[index].learner
        assert isinstance(learner, FisherMask)
        learner.fit(sensitivity / total)
    return True


def or_nan(value: float | None) -> float:
    """The value, and NaN for what is not defined yet."""
    return math.nan if value is None else value
