"""Floor 2: the phase machine. Statistics go in, block layouts come out.

Everything here lives on the CPU, except for the score matrices that successive observations are compared with: these
stay where they came from.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from sat.layout import BlockLayout
from sat.sparsity.criterion import Criterion
from sat.sparsity.events import Revision, Transition
from sat.sparsity.layers import Layer, change_layouts, fit_fisher, or_nan
from sat.sparsity.masks import FisherMask, MaskLearner, MaskName, make_mask, undisturbed
from sat.sparsity.offsets import offset_scores
from sat.sparsity.selection import add_blocks, check_selection, revise_blocks, select_blocks
from sat.sparsity.selection import agreement as agreement_of
from sat.sparsity.settings import check_settings, check_spion, check_start
from sat.sparsity.spion import spion_blocks
from sat.sparsity.start import StartName, starting_blocks
from sat.sparsity.statistics import LayerHistory, best_mass, block_mass, captured_mass

if TYPE_CHECKING:  # the type only: importing the operators would load Triton
    from sat.ops.types import AttentionStatistics

logger = logging.getLogger(__name__)

Phase = Literal["dense", "sparse"]

# What revise_blocks shares with select_blocks.
_REVISED_BY = ("keep_diagonal", "min_blocks_per_row", "keep_first", "causal", "share_budget")


class SparsityController:
    """Decides when each layer leaves the dense phase, and which blocks it keeps.

    The mask learners live here, with optimizers of their own: no gradient reaches the model, and the model's own
    optimizer never changes. The same observations in the same order give the same decisions, so ranks that are fed
    averaged statistics agree without talking to each other.

    Captured and best mass are measured on the observation at which the transition happens, not on a running mean: a
    plain number that can be checked. With a noisy observation (few samples) both vary together. ``coverage`` counts
    mass on that same observation, while the order of the blocks comes from the learner, which has averaged.

    Args:
        num_layers: number of attention layers.
        num_heads: heads of each layer.
        grid: ``(M, N)``, block rows and columns.
        block_size: edge of a block in tokens.
        lengths: ``(L, S)``, query and key length in tokens.
        theta: see :class:`Criterion`, as ``delta``, ``smoothing`` and ``patience``; None leaves skewness out.
        delta: in percent.
        smoothing: 0 is the paper's rule.
        patience: in observations.
        agreement: share of the blocks; in place of theta and delta.
        agreement_lag: in observations.
        per_layer: True: each layer leaves when it is ready. False (the paper's): all leave together, at the first
            observation at which every layer is ready.
        min_dense_steps: no transition before this many optimizer steps.
        max_dense_steps: at the first observation from this step on, layers that are still dense leave, ready or not.
        mask: ``"direct"``, ``"bilinear"`` or ``"gram"`` (the paper's), see :func:`make_mask`; ``"fisher"``, which needs
            the statistics' sensitivity, see :class:`FisherMask`; or ``"spion"``, which learns nothing and traces
            patterns in the score matrix at the transition, see :func:`spion_blocks`.
        mask_rank: rank of the gram and bilinear masks.
        mask_lr: learning rate of the masks, in units of uniform attention.
        mask_steps: gradient steps of the masks at each observation.
        quantile: of ``"spion"`` and nothing else, in place of density and coverage.
        density: share of blocks to keep; see :func:`select_blocks` for this and what follows.
        coverage: share of attention mass to keep, instead of a density.
        min_density: bound for ``coverage``.
        max_density: bound for ``coverage``.
        per_head: one layout a head; otherwise one that all heads of a layer share (the paper's).
        keep_diagonal: the paper's selection does not.
        min_blocks_per_row: 0 in the paper's selection.
        keep_first_tokens: the blocks of the first so many tokens (CLS and other special tokens) are kept, as rows and
            as columns; 0 in the paper.
        causal: only blocks of the lower triangle.
        share_budget: count the budget over all layers and heads together instead of for each layout. By offset, all
            layers have the same scores, so that only revisions make a difference between them.
        by_offset: choose blocks by their offset from the diagonal, and for heads by turns on either side of it, see
            :func:`offset_scores`, from the scores of all layers that a choice is made for; instead of one by one, as
            revisions do.
        revise_interval: once all layers are sparse, swap blocks at the first observation that is so many steps after
            the switch or the revision before; see :func:`revise_blocks`. None: layouts stay as they are. Needs
            ``mask="fisher"``.
        revise_share: at most this share of the kept blocks is swapped at a time, or one block where that is less.
        start: begin sparsely with the blocks of a structure, see :func:`starting_blocks`; None: in a dense phase, which
            alone has a use for the settings from theta to max_dense_steps. Needs a density and ``revise_interval``.
        keep_scores: keep what the masks have learned after the switch, so that :meth:`add_blocks` can be called.
        seed: of the masks' initial values; the global generator is not touched.

    Raises:
        ValueError: a value is out of range, or the grid does not fit the lengths.

    Source: Yoon et al., IEEE Access 12 (2024), the three phases of SAT.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        grid: tuple[int, int],
        block_size: int,
        lengths: tuple[int, int],
        *,
        theta: float | None = 1.7,
        delta: float = 1.3,
        smoothing: float = 0.0,
        patience: int = 1,
        agreement: float | None = None,
        agreement_lag: int = 10,
        per_layer: bool = False,
        min_dense_steps: int = 0,
        max_dense_steps: int | None = None,
        mask: MaskName | Literal["fisher", "spion"] = "direct",
        mask_rank: int = 32,
        mask_lr: float = 0.05,
        mask_steps: int = 10,
        quantile: float | None = None,
        density: float | None = None,
        coverage: float | None = None,
        min_density: float = 0.0,
        max_density: float = 1.0,
        per_head: bool = False,
        keep_diagonal: bool = True,
        min_blocks_per_row: int = 1,
        keep_first_tokens: int = 0,
        causal: bool = False,
        share_budget: bool = False,
        by_offset: bool = False,
        revise_interval: int | None = None,
        revise_share: float = 0.3,
        start: StartName | None = None,
        keep_scores: bool = False,
        seed: int = 0,
    ) -> None:
        self.num_layers, self.num_heads, self.block_size = num_layers, num_heads, block_size
        self.grid, self.lengths = (grid[0], grid[1]), (lengths[0], lengths[1])
        self.criterion = Criterion(theta, delta, smoothing, patience, agreement, agreement_lag)
        self.per_layer, self.per_head, self.mask = per_layer, per_head, mask
        self.min_dense_steps, self.max_dense_steps = min_dense_steps, max_dense_steps
        self.mask_rank, self.mask_lr, self.mask_steps = mask_rank, mask_lr, mask_steps
        self.quantile, self.keep_first_tokens, self.share_budget = quantile, keep_first_tokens, share_budget
        self.by_offset = by_offset
        self.revise_interval, self.revise_share = revise_interval, revise_share
        self.keep_scores = keep_scores or revise_interval is not None
        self._revised_at: int | None = None
        self.observed_at: int | None = None  # the step of the latest observation in the dense phase that counted
        self.gave_up_at: int | None = None  # the step at which training went back to dense attention, for good
        check_settings(self)
        if start is not None:
            check_start(self, start, coverage)
        if mask == "spion":
            check_spion(self, density, coverage)
        else:
            check_selection(density, coverage, min_density, max_density, min_blocks_per_row, self.grid[1])
            if quantile is not None:
                raise ValueError(f"quantile={quantile} belongs to mask='spion'; with mask={mask!r} give a density")
        self._selection: dict[str, Any] = {
            "density": density,
            "coverage": coverage,
            "min_density": min_density,
            "max_density": max_density,
            "keep_diagonal": keep_diagonal,
            "min_blocks_per_row": min_blocks_per_row,
            "keep_first": -(-keep_first_tokens // block_size),
            "causal": causal,
            "share_budget": share_budget,
        }
        # One generator for all layers in turn: they start differently, and the same for the same seed.
        generator = torch.Generator("cpu").manual_seed(seed)
        self._layers = [Layer(LayerHistory(smoothing), self._learner(generator)) for _ in range(num_layers)]
        if start is not None:
            # A density for each layout: before anything is known none has a claim to more.
            selection = self._selection | {"share_budget": False}
            blocks = partial(starting_blocks, start, self.grid, self._num_layouts, generator, **selection)
            self.begin([BlockLayout(blocks(), block_size) for _ in range(num_layers)])

    def _learner(self, generator: torch.Generator) -> MaskLearner | FisherMask | None:
        if self.mask == "spion":
            return None
        if self.mask == "fisher":
            return FisherMask(self._num_layouts, self.grid)
        mask = make_mask(self.mask, self.grid, num_layouts=self._num_layouts, rank=self.mask_rank, generator=generator)
        return MaskLearner(mask, self.mask_lr)

    # What the outside asks.

    def phase(self, layer: int) -> Phase:
        """The layer's phase, from stored state."""
        return "dense" if self._layers[layer].layout is None else "sparse"

    @property
    def _num_layouts(self) -> int:
        """Of each layer."""
        return self.num_heads if self.per_head else 1

    @property
    def _shape(self) -> list[int]:
        """Of what is measured block by block."""
        return [self.num_heads, *self.grid]

    @property
    def all_sparse(self) -> bool:
        """Whether every layer has left the dense phase."""
        return all(layer.layout is not None for layer in self._layers)

    @property
    def began_sparsely(self) -> bool:
        """Whether there was no dense phase, from stored state: a transition comes after a step."""
        return all(step == 0 for step in self.transition_steps)

    @property
    def needs_score_matrix(self) -> bool:
        """Whether the rule that ends the dense phase, or the choice of blocks, reads score matrices ``[L, S]``."""
        return self.criterion.agreement is None or self.mask == "spion"

    @property
    def dense_layers(self) -> list[int]:
        """The layers whose statistics the next observation needs."""
        return [index for index, layer in enumerate(self._layers) if layer.layout is None]

    def watches(self, layer: int) -> bool:
        """Whether the next observation needs this layer: for :meth:`observe`, or once all are sparse :meth:`revise`."""
        if self.gave_up_at is not None:
            return False
        return self.phase(layer) == "dense" or (self.revise_interval is not None and self.all_sparse)

    @property
    def layouts(self) -> list[BlockLayout | None]:
        """Each layer's layout, on the CPU; None while it is dense."""
        return [layer.layout for layer in self._layers]

    @property
    def transition_steps(self) -> list[int | None]:
        """The step at which each layer left the dense phase; None while it is dense."""
        return [layer.transition_step for layer in self._layers]

    @property
    def missing(self) -> list[str]:
        """What each layer's criterion lacked at its latest observation, for people; empty if it was met."""
        return [layer.verdict.missing for layer in self._layers]

    @property
    def latest(self) -> list[dict[str, float]]:
        """Each layer's latest values, for logging: skewness, distance, relative_change (percent), met (0 or 1).

        And where it is the rule, agreement (0 to 1).

        The values are those that the criterion compares, thus after smoothing; nan where not defined yet. A sparse
        layer keeps its last ones.
        """
        return [
            {
                "skewness": or_nan(layer.history.skewness),
                "distance": or_nan(layer.history.distance),
                "relative_change": or_nan(layer.history.relative_change),
                "met": float(layer.verdict.met),
                **({} if self.criterion.agreement is None else {"agreement": or_nan(layer.agreement)}),
            }
            for layer in self._layers
        ]

    @property
    def causal(self) -> bool:
        """Whether only blocks of the lower triangle may be kept; to be set before the observation that it is for."""
        return bool(self._selection["causal"])

    @causal.setter
    def causal(self, causal: bool) -> None:
        self._selection["causal"] = causal

    # What happens.

    def begin(self, layouts: Sequence[BlockLayout]) -> None:
        """Begin sparsely, with layouts that were not chosen here.

        Args:
            layouts: one a layer, of 1 head or, with ``per_head``, of as many as there are.

        Raises:
            ValueError: they do not fit the layers.
        """
        if len(layouts) != self.num_layers:
            raise ValueError(f"there are layouts of {len(layouts)} layers to begin with, but {self.num_layers} layers")
        wanted = [layout.shared() for layout in layouts]
        for index, layout in enumerate(wanted):
            rows, columns = layout.shape
            if (rows, columns) != self.grid or layout.block_size != self.block_size:
                raise ValueError(
                    f"the layout to begin with in layer {index} has {rows} x {columns} blocks of {layout.block_size}, "
                    f"but the attention {self.grid[0]} x {self.grid[1]} of {self.block_size}"
                )
            if layout.num_heads not in (1, self._num_layouts):
                advice = f"make it one of {self.num_heads}" if self.per_head else "set per_head to True"
                raise ValueError(
                    f"the layout to begin with in layer {index} is one of {layout.num_heads} heads, but there "
                    f"{'are' if self.per_head else 'is'} {self._num_layouts} to a layer; {advice}"
                )
        for layer, layout in zip(self._layers, wanted, strict=True):
            mask = layout.mask.to("cpu", copy=True).expand(self._num_layouts, -1, -1).contiguous()
            layer.layout, layer.transition_step = BlockLayout(mask, self.block_size), 0
            if not self.keep_scores:
                layer.learner = None

    @undisturbed()
    def observe(self, step: int, statistics: Mapping[int, AttentionStatistics]) -> list[Transition]:
        """Take in the statistics of all layers that are still dense.

        A refused observation leaves the controller as it was, and so does one without a finite gradient other than 0
        where ``mask="fisher"`` learns from gradients, as an overflow in float16 has: a warning says so, and
        ``observed_at`` stays what it was.

        Args:
            step: optimizer steps already done.
            statistics: layer index -> statistics; exactly the ``dense_layers``. With the score matrices where the
                controller ``needs_score_matrix``, which keeps them: do not write to them afterwards.

        Returns:
            The transitions that happen now, in the order of the layers; usually none.

        Raises:
            ValueError: a layer too many or too few, a shape that does not fit, or no score matrix.
            FloatingPointError: a statistic is NaN or infinite.
        """
        dense = self.dense_layers
        if sorted(statistics) != dense:
            raise ValueError(
                f"an observation needs the statistics of exactly the layers still dense, {dense}, got "
                f"{sorted(statistics)} at step {step}"
            )
        matrices = {index: self._checked(step, index, statistics[index]) for index in dense}

        if self.mask == "fisher":
            sensitivities = {index: statistics[index].sensitivity for index in dense}
            if not fit_fisher(self._layers, step, sensitivities, self._shape):
                # Nothing was observed: choices that stay the same for that reason have not settled.
                self._without_gradient(step)
                return []
        self.observed_at = step
        for index in dense:
            layer, observed = self._layers[index], statistics[index]
            layer.history.update(matrices[index], observed.skewness.item())
            if isinstance(layer.learner, MaskLearner):
                layer.learner.fit(observed.pooled, self.lengths[1], self.mask_steps)
        pooled = {index: statistics[index].pooled.detach().cpu() for index in dense}
        kept = self._choose_blocks(pooled) if self.criterion.agreement is not None else {}
        self._compare_choices(kept)
        for index in dense:
            layer = self._layers[index]
            layer.verdict = self.criterion.judge(layer.history, layer.verdict.streak, layer.agreement)

        if step < self.min_dense_steps:
            return []
        ready = [index for index in dense if self._layers[index].verdict.met]
        if not self.per_layer and ready != dense:
            ready = []
        overdue = self.max_dense_steps is not None and step >= self.max_dense_steps
        leaving = dense if overdue else ready
        if not leaving:
            return []
        kept = kept or self._choose_blocks({index: pooled[index] for index in leaving})
        return [
            self._leave_dense(step, index, pooled[index], kept[index], forced=index not in ready) for index in leaving
        ]

    def _without_gradient(self, step: int) -> None:
        """Say so where it has been like that all the time, and layouts are overdue."""
        never = [layer for layer in self._layers if layer.layout is None and layer.nothing_learned]
        if never and self.max_dense_steps is not None and step >= self.max_dense_steps:
            missing = (
                "no observation had a finite gradient other than 0, so mask='fisher' cannot tell blocks apart; look "
                "for a diverged loss, or use mask='direct'"
            )
            logger.warning("no layouts at step %d, though max_dense_steps is over: %s", step, missing)
            for layer in never:
                layer.verdict = layer.verdict._replace(missing=missing)

    def _compare_choices(self, kept: Mapping[int, Tensor]) -> None:
        """How far what would be chosen now agrees with earlier choices."""
        fixed = {name: self._selection[name] for name in ("keep_diagonal", "keep_first", "causal")}
        for index, now in kept.items():
            layer = self._layers[index]
            if len(layer.choices) == self.criterion.agreement_lag:
                layer.agreement = agreement_of(now, layer.choices.pop(0), **fixed)
            layer.choices.append(now)

    @undisturbed()
    def revise(self, step: int, sensitivities: Mapping[int, Tensor | None]) -> list[Revision]:
        """Take in what the loss depends on in the sparse phase, and if it is time, swap blocks.

        Args:
            step: optimizer steps already done.
            sensitivities: layer index -> ``[H, M, N]``, of kept and missing blocks, see
                :func:`sat.ops.block_sensitivity`; of all layers.

        Returns:
            The layers whose layouts change now; usually none.

        Raises:
            ValueError: a layer is missing or still dense, a shape does not fit, or there is no ``revise_interval``.
        """
        if self.revise_interval is None or not self.all_sparse:
            state = "revise_interval is None" if self.revise_interval is None else f"{self.dense_layers} are dense"
            raise ValueError(
                f"there is nothing to revise at step {step}: {state}; set revise_interval, and revise once all layers "
                f"are sparse"
            )
        if sorted(sensitivities) != [*range(self.num_layers)]:
            raise ValueError(
                f"a revision needs the sensitivities of all {self.num_layers} layers, got those of "
                f"{sorted(sensitivities)} at step {step}"
            )
        new = any(layer.nothing_learned for layer in self._layers)
        fit_fisher(self._layers, step, sensitivities, self._shape)
        latest = self._revised_at
        if latest is None:
            latest = max(at for at in self.transition_steps if at is not None)
        if step - latest < self.revise_interval:
            return []
        self._revised_at = step
        if new:  # revisions were switched on only now: a single observation is not enough
            return []
        settings = {name: self._selection[name] for name in _REVISED_BY} | {"share": self.revise_share}
        return change_layouts(self._layers, step, partial(revise_blocks, **settings), self.share_budget)

    @undisturbed()
    def add_blocks(self, step: int) -> list[Revision]:
        """Keep twice as many blocks, the new ones by what the masks have learned, as long as that is less than half.

        Args:
            step: optimizer steps already done.

        Returns:
            The layers whose layouts change now; none where it would be half of all blocks (that causality allows) or
            more, or where nothing has been learned.
        """
        kept = sum(layer.layout.nnz / layer.layout.num_heads for layer in self._layers if layer.layout is not None)
        allowed = torch.ones(self.grid).tril() if self.causal else torch.ones(self.grid)
        if 2 * kept >= self.num_layers * allowed.sum().item() / 2:
            return []
        settings = {name: self._selection[name] for name in ("causal", "share_budget")}
        return change_layouts(self._layers, step, partial(add_blocks, **settings), self.share_budget, self._by_offset)

    def give_up(self, step: int) -> None:
        """Go back to dense attention in every layer, for good.

        Args:
            step: optimizer steps already done.
        """
        self.gave_up_at = step
        for layer in self._layers:
            layer.layout = layer.transition_step = None

    def _checked(self, step: int, index: int, statistics: AttentionStatistics) -> Tensor | None:
        """The score matrix of statistics that are whole and finite, where there is a use for it."""
        matrix = statistics.score_matrix if self.needs_score_matrix else None
        if matrix is None and self.needs_score_matrix:
            raise ValueError(
                f"layer {index} at step {step}: the statistics have no score matrix, which the distance is measured "
                f"on; ask for it with attention_statistics(..., score_matrix=True)"
            )
        expected: dict[str, list[int]] = {"pooled": self._shape, "skewness": []}
        expected |= {} if matrix is None else {"score_matrix": list(self.lengths)}
        for name, shape in expected.items():
            value: Tensor = getattr(statistics, name)
            if list(value.shape) != shape:
                raise ValueError(f"layer {index} at step {step}: {name} must be {shape}, got {list(value.shape)}")
            if not value.isfinite().all():
                raise FloatingPointError(
                    f"layer {index} at step {step}: {name} contains NaN or infinite values, so the attention does; "
                    f"look for a diverged loss or an overflow of the training precision"
                )
        return matrix

    def _choose_blocks(self, pooled: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The blocks ``[G, M, N]`` to keep, of every layer that leaves now."""
        scores, masses = [], []
        for index, each in pooled.items():
            layer = self._layers[index]
            if layer.learner is None:
                return {index: self._spion_blocks(self._layers[index]) for index in pooled}
            scores.append(layer.learner.scores())
            mass = block_mass(each, self.block_size, *self.lengths)
            masses.append(mass if self.per_head else mass.mean(0, keepdim=True))
        scores = self._by_offset(scores)
        if self.share_budget:
            kept = select_blocks(torch.cat(scores), mass=torch.cat(masses), **self._selection)
            return dict(zip(pooled, kept.split(len(scores[0])), strict=True))
        selected = (select_blocks(s, mass=m, **self._selection) for s, m in zip(scores, masses, strict=True))
        return dict(zip(pooled, selected, strict=True))

    def _by_offset(self, scores: list[Tensor]) -> list[Tensor]:
        """The scores ``[G, M, N]`` of layers by offset, where that is wanted."""
        if not self.by_offset:
            return scores
        # A coverage is reached by what holds most: heads that had to take one side first would need far more.
        heads = 1 if self._selection["coverage"] is not None else self._num_layouts
        found = offset_scores(torch.cat(scores), num_heads=heads, causal=self.causal)
        return list(found.split(self._num_layouts))

    def _spion_blocks(self, layer: Layer) -> Tensor:
        assert layer.history.score_matrix is not None
        assert self.quantile is not None
        kept = spion_blocks(layer.history.score_matrix[None], self.block_size, self.quantile).cpu()
        first = self._selection["keep_first"]
        kept[:, :first] = kept[:, :, :first] = True
        return kept.tril() if self.causal else kept

    def _leave_dense(self, step: int, index: int, pooled: Tensor, kept: Tensor, forced: bool) -> Transition:
        layer = self._layers[index]
        layer.layout = layout = BlockLayout(kept, self.block_size)
        layer.transition_step = step
        if not self.keep_scores:
            layer.learner = None
        layer.history.drop_matrix()
        layer.choices = []
        return Transition(
            layer=index,
            layout=layout,
            step=step,
            forced=forced,
            missing=layer.verdict.missing,
            density=layout.density,
            captured_mass=captured_mass(pooled, kept, self.block_size, *self.lengths),
            best_mass=best_mass(pooled, kept, self.block_size, *self.lengths),
            empty_rows=int((~kept.any(2)).sum()),
            skewness=or_nan(layer.history.skewness),
            relative_change=or_nan(layer.history.relative_change),
        )

    # What is saved.

    def _structure(self) -> dict[str, Any]:
        """The settings that a saved state must share with the controller that loads it."""
        return {
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "grid": list(self.grid),
            "block_size": self.block_size,
            "lengths": list(self.lengths),
            "per_head": self.per_head,
            "mask": self.mask,
            "mask_rank": self.mask_rank,
        }

    def state_dict(self) -> dict[str, Any]:
        """All that later decisions depend on: tensors, numbers and strings, in dicts and lists.

        It loads with ``torch.load(weights_only=True)`` and does not change with further observations. As long as a
        layer is dense, it includes the layer's score matrix ``[L, S]``, on its device.
        """
        choices = self.criterion.agreement is not None
        steps = {"revised_at": self._revised_at, "gave_up_at": self.gave_up_at}
        happened = {name: step for name, step in steps.items() if step is not None}
        layers = [layer.state_dict(choices) for layer in self._layers]
        return {"structure": self._structure(), "layers": layers, **happened}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; from here on the decisions are those of the saved controller.

        Thresholds, bounds and budget stay as they were set here.

        Raises:
            ValueError: the state belongs to a controller of another structure (layers, heads, grid, mask).
        """
        for name, here in self._structure().items():
            saved = state["structure"].get(name)
            if saved != here:
                raise ValueError(
                    f"the saved sparsity state has {name} = {saved}, this controller {here}; load it with the "
                    f"settings it was saved with"
                )
        self._revised_at, self.gave_up_at, self.observed_at = state.get("revised_at"), state.get("gave_up_at"), None
        for layer, saved in zip(self._layers, state["layers"], strict=True):
            wanted = self.gave_up_at is None and ("layout" not in saved or self.keep_scores)
            learner = self._learner(torch.Generator("cpu")) if wanted else None
            layer.load_state_dict(saved, self.block_size, self.criterion.agreement_lag, learner)
