"""Floor 2: the phases of a model's attention modules, for whatever trains the model.

Between the controller, which decides, and the attention modules, which leave statistics and take layouts. What a
trainer's own callback adds is when things happen.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from sat.layout import BlockLayout
from sat.sparsity.controller import SparsityController
from sat.sparsity.events import Revision, Transition
from sat.sparsity.guard import Guard
from sat.sparsity.learning_rate import LearningRateFactor
from sat.sparsity.masks import MaskName
from sat.sparsity.pooled import PooledAttention
from sat.sparsity.processes import Observed, check_same_layouts, mean_over_processes, merged
from sat.sparsity.settings import check_length
from sat.sparsity.start import StartName
from sat.sparsity.watched import Attention, left_by

logger = logging.getLogger(__name__)

# Of what state_dict() gives. States without a version are older than the first release, and alike.
STATE_VERSION = 1


class SparsityPhases:
    """Watches attention modules in their dense phase and gives them their layouts when the controller says so.

    The base of the callbacks for Lightning and for Hugging Face's Trainer, which have these settings. A batch goes
    through ``before_batch`` and ``after_batch``; its state is that of ``state_dict``.

    Args:
        density: share of the blocks to keep, 0 to 1; of causal attention, of those in the lower triangle, where what is
            reported is a share of all. Exactly one of ``density`` and ``coverage`` is given.
        coverage: keep the fewest blocks that hold this share of the attention mass, 0 to 1.
        min_density: least share of blocks under ``coverage``.
        max_density: largest share of blocks under ``coverage``.
        mask: how block scores are learned: from how much attention a block holds by ``direct`` (one logit a block),
            ``bilinear``, or ``gram`` (the paper's); ``fisher``, from how much the loss depends on it; or ``spion``: not
            at all, patterns are traced in the scores themselves (SAT's forerunner), with the diagonal always and
            without ``min_blocks_per_row``.
        mask_rank: inner dimension of ``bilinear`` and ``gram``.
        quantile: of ``spion``, in place of a density: share of the blocks below the threshold, 0 to 1.
        per_head: one layout a head instead of one a layer.
        share_budget: count density or coverage over all layers and heads together, so that some keep more blocks than
            others; with by_offset from the first revision on, for until then all layers have the same scores.
        by_offset: choose blocks by their offset from the diagonal: by what those of one offset are worth in all layers
            together, beyond what their rows and columns are, instead of one by one; with per_head, heads look back and
            ahead by turns. For models trained from scratch: young attention tells no more.
        keep_diagonal: always keep the blocks on the diagonal.
        min_blocks_per_row: always keep so many blocks of each row.
        keep_first_tokens: always keep the blocks of the first so many tokens (1: CLS), as rows and as columns.
        theta: leave the dense phase at this skewness of the scores or above (with the next); null: at any.
        delta: ... and when the distance between successive score matrices changes by less, in percent.
        smoothing: weight of the past in an exponential mean of both, 0 (the paper's rule) to below 1.
        patience: successive observations at which the rule must hold.
        agreement: another rule in place of theta and delta: leave when, of the blocks that would be kept now, this
            share would have been kept some observations ago, too; 0 to 1, null: theta and delta are the rule.
        agreement_lag: how many observations ago.
        per_layer: every layer leaves on its own; otherwise all together.
        min_dense_steps: no transition before this step.
        max_dense_steps: transition at the first observation from this step on, even if the rule does not hold; null
            waits without end.
        interval: optimizer steps between observations.
        samples: sequences that an observation looks at: the first of the whole batch of an optimizer step, which is
            made of the batches of all processes, in the order of their ranks, once for each batch of an accumulation.
        lr_factor: factor of the learning rate once every layer is sparse, after a dense phase (the paper's: 0.5, for a
            switch that comes late).
        revise_interval: optimizer steps between revisions of the layouts once all layers are sparse, rounded up to
            whole intervals: the weakest kept blocks make place for missing ones that the loss depends on more; null:
            layouts stay. Needs mask fisher.
        revise_share: of the kept blocks, at most this share is swapped at a time, above 0 to 1, or one block where
            that is less.
        start: begin sparsely, without a dense phase, with blocks of a structure that make up the density: ``window``
            (near the diagonal), or ``bigbird`` (half of them near it, the first row and column, and random ones). All
            that is said of the dense phase has no effect then, and the learning rate keeps its full height. Needs
            revise_interval; null: a dense phase.
        guard: when the validation loss stays this much above the best of the dense phase (in nats for cross entropy),
            from overfitting too, twice as many blocks are kept, and where that would be half of all or more, training
            goes on densely at the learning rate of the schedule; null: never. Needs a dense phase.
        guard_patience: validations in a row.
        seed: of the masks' initial values.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        density: float | None = None,
        coverage: float | None = None,
        min_density: float = 0.0,
        max_density: float = 1.0,
        mask: MaskName | Literal["fisher", "spion"] = "fisher",
        mask_rank: int = 32,
        quantile: float | None = None,
        per_head: bool = True,
        share_budget: bool = False,
        by_offset: bool = True,
        keep_diagonal: bool = True,
        min_blocks_per_row: int = 1,
        keep_first_tokens: int = 0,
        theta: float | None = 1.7,
        delta: float = 1.3,
        smoothing: float = 0.0,
        patience: int = 1,
        agreement: float | None = None,
        agreement_lag: int = 10,
        per_layer: bool = False,
        min_dense_steps: int = 0,
        max_dense_steps: int | None = None,
        interval: int = 10,
        samples: int = 8,
        lr_factor: float = 1.0,
        revise_interval: int | None = None,
        revise_share: float = 0.3,
        start: StartName | None = None,
        guard: float | None = None,
        guard_patience: int = 2,
        seed: int = 0,
    ) -> None:
        if interval < 1:
            raise ValueError(f"interval must be at least 1 step, got {interval}")
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        if keep_first_tokens < 0:
            raise ValueError(f"keep_first_tokens must be at least 0, got {keep_first_tokens}; 1 keeps the CLS token")
        if not 0 < lr_factor <= 1:
            raise ValueError(f"lr_factor must be above 0 and at most 1, got {lr_factor}")
        if guard is not None and not 0 <= guard < math.inf:
            raise ValueError(f"guard is a margin of the validation loss and must be at least 0, got {guard}")
        if guard_patience < 1:
            raise ValueError(f"guard_patience must be at least 1 validation, got {guard_patience}")
        if start is not None and guard is not None:
            raise ValueError(_no_guard(guard, f"start={start!r}"))
        self.guard, self.guard_patience, self.start = guard, guard_patience, start
        self._guard = Guard(guard, guard_patience)
        self.interval, self.samples, self.lr_factor = interval, samples, lr_factor
        self.theta = theta if agreement is None else None
        self.delta = delta if agreement is None else None
        self.agreement = agreement
        self._make_controller: Callable[..., SparsityController] = partial(
            SparsityController,
            theta=theta,
            delta=delta,
            smoothing=smoothing,
            patience=patience,
            agreement=agreement,
            agreement_lag=agreement_lag,
            per_layer=per_layer,
            min_dense_steps=min_dense_steps,
            max_dense_steps=max_dense_steps,
            mask=mask,
            mask_rank=mask_rank,
            quantile=quantile,
            mask_steps=interval,  # as many fits as the paper, which fits at each step
            density=density,
            coverage=coverage,
            min_density=min_density,
            max_density=max_density,
            per_head=per_head,
            share_budget=share_budget,
            by_offset=by_offset,
            keep_diagonal=keep_diagonal,
            min_blocks_per_row=min_blocks_per_row,
            keep_first_tokens=keep_first_tokens,
            revise_interval=revise_interval,
            revise_share=revise_share,
            start=start,
            keep_scores=guard is not None,
            seed=seed,
        )
        # Refuses bad values now, not in the middle of a set-up. A single block, of which as many tokens are kept as may
        # be; whether a model has as many tokens and blocks is seen when it is known.
        least_tokens, least_blocks = min(keep_first_tokens, 1), min(min_blocks_per_row, 1)
        self._make_controller(1, 1, (1, 1), 1, (1, 1), keep_first_tokens=least_tokens, min_blocks_per_row=least_blocks)
        self.controller: SparsityController | None = None
        self.began = ""  # how, of a training without a dense phase, for people
        self._given: tuple[list[BlockLayout], str] | None = None  # layouts to begin with, and where they come from
        self.attentions: dict[str, Attention] = {}
        self.transitions: list[Transition] = []
        self.revisions: list[Revision] = []
        self.history: list[dict[str, Any]] = []
        self.pooled: dict[int, PooledAttention] = {}  # of the layers that switched with the latest batch
        self._steps = 0  # optimizer steps; trainer.global_step counts those of every optimizer
        self._rank, self._world_size = 0, 1
        self._passed = 0  # sequences of the whole batch that earlier batches of the accumulation had, in all processes
        self._observed: dict[int, Observed] = {}  # so far in this optimizer step
        self._factor = LearningRateFactor(lr_factor, self._scales_lr)

    @property
    def layouts(self) -> dict[str, BlockLayout]:
        """The layouts in use, by the name of the attention module."""
        return {name: layout for name, attention in self.attentions.items() if (layout := attention.layout) is not None}

    @property
    def all_sparse(self) -> bool:
        """Whether every layer has left the dense phase."""
        return self.controller is not None and self.controller.all_sparse

    def begin_with(self, layouts: Sequence[BlockLayout], origin: str) -> None:
        """Begin sparsely with layouts that were learned elsewhere, instead of in a dense phase or by ``start``.

        Call this before the training; one that goes on from a checkpoint has the layouts of that. They are taken as
        they are: what ``keep_diagonal``, ``min_blocks_per_row`` and ``keep_first_tokens`` always keep is kept in
        revisions as far as they have it.

        Args:
            layouts: one a layer, in the order of the attention modules; of 1 head, or with ``per_head`` of all.
            origin: where they come from, for people.

        Raises:
            ValueError: there is a ``guard``, or a training has begun already.
        """
        if self.controller is not None:
            raise ValueError("begin_with comes too late, for attention is taken charge of; call it before the training")
        if self.guard is not None:
            raise ValueError(_no_guard(self.guard, "a run that begins with layouts"))
        self._given = list(layouts), origin

    def attach(self, model: str, attentions: Mapping[str, Attention], *, rank: int = 0, world_size: int = 1) -> None:
        """Take charge of the attention modules of a model, by name; the same ones again go on where they are.

        Args:
            model: its name, for messages.
            attentions: by name.
            rank: of this process among those that share the batch of a step.
            world_size: how many these are; more than one make up torch.distributed's default process group.

        Raises:
            ValueError: there are none, they are not of one kind, or layouts to begin with do not fit them.
        """
        self._rank, self._world_size = rank, world_size
        if self.controller is not None and [*map(id, attentions.values())] == [*map(id, self.attentions.values())]:
            return
        if not attentions:
            raise ValueError(
                f"{type(self).__name__} found no sat.attention.AdaptiveAttention in {model}; build the model with it, "
                f"or leave the callback out"
            )
        grids: dict[tuple[int, int, int, bool], str] = {}
        for name, a in attentions.items():
            grids.setdefault((a.num_heads, a.seq_len, a.block_size, a.is_causal), name)
        if len(grids) > 1:
            raise ValueError(
                f"{type(self).__name__} needs attention modules of one kind, but heads, seq_len, block_size or "
                f"is_causal differ between {' and '.join(list(grids.values())[:2])}"
            )
        (heads, length, block_size, causal), *_ = grids
        blocks = -(-length // block_size)
        controller = self._make_controller(
            len(attentions), heads, (blocks, blocks), block_size, (length, length), causal=causal
        )
        began: str = self.start or ""
        if self._given is not None:
            layouts, began = self._given
            controller.begin(layouts)
        # Nothing is refused from here on: what was refused is so the next time, too.
        self.attentions, self.controller, self.began, self._steps = dict(attentions), controller, began, 0
        self._longest = 0  # of the sequences that were observed, in blocks
        self._guard.reset()
        self.transitions, self.revisions, self.history = [], [], []
        for attention, layout in zip(self.attentions.values(), self.controller.layouts, strict=True):
            attention.observe_score_matrix = self.controller.needs_score_matrix
            if layout is not None:
                attention.set_layout(layout)

    def check_phases(self) -> None:
        """Refuse layouts that this callback knows nothing of, such as weights loaded without the callback's state.

        And sequences that are too long for the rule that ends the dense phase, of a training that is in it.

        Raises:
            ValueError: a module is in another phase than its layer in the controller, or sequences are too long.
            LayoutsDiffer: another process has others.
        """
        assert self.controller is not None
        if self.controller.dense_layers and self.controller.gave_up_at is None:
            check_length(self.controller)
        for index, (name, attention) in enumerate(self.attentions.items()):
            if attention.is_sparse != (self.controller.phase(index) == "sparse"):
                state = "sparse" if attention.is_sparse else "dense"
                raise ValueError(
                    f"{name} is {state}, but the state of {type(self).__name__} says otherwise; resume from a "
                    f"checkpoint that was trained with this callback, or start densely with set_layout(None)"
                )
            layout, known = attention.layout, self.controller.layouts[index]
            if layout is not None and known is not None and not _equal(layout, known):
                raise ValueError(
                    f"{name} has another layout than the state of {type(self).__name__} knows, such as one that was "
                    f"loaded from a file after a training; resume from that checkpoint, or give the layouts to a new "
                    f"callback with begin_with"
                )
        self._check_processes()

    def _check_processes(self) -> None:
        if self._world_size > 1:
            check_same_layouts({name: attention.layout for name, attention in self.attentions.items()}, self._steps)

    # The learning rate.

    def attach_optimizers(self, optimizers: Iterable[Optimizer]) -> None:
        """Let the learning-rate factor act on optimizers, see :class:`LearningRateFactor`."""
        self._factor.attach(optimizers)

    def detach_optimizers(self) -> None:
        """Leave the optimizers as they were; a step that failed has not restored its learning rate."""
        self._factor.detach()

    def _scales_lr(self) -> bool:
        return self.controller is not None and self.controller.all_sparse and not self.controller.began_sparsely

    # What happens.

    def before_batch(self, sequences: int, begins_step: bool = True) -> None:
        """Ask for statistics, if this batch is part of an ``interval``-th optimizer step: the dense layers, or all.

        Args:
            sequences: in this batch; 1 will do where a single process takes a step with each batch.
            begins_step: whether it is the first batch of an accumulation.
        """
        assert self.controller is not None
        self.pooled = {}
        if begins_step and self._guard.alarmed:
            self._act_as_guard()
        if begins_step:
            self._passed, self._observed = 0, {}
        wanted = 0
        if (self._steps + 1) % self.interval == 0:
            wanted = max(0, self.samples - self._passed - self._rank * sequences)
        self._passed += self._world_size * sequences
        for index, attention in enumerate(self.attentions.values()):
            watched = wanted > 0 and self.controller.watches(index)
            attention.observe_samples = wanted if watched else 0
            attention.statistics = attention.block_gate = None
            if watched and self.controller.mask == "fisher":
                grid = attention.layout_mask
                attention.block_gate = torch.zeros(grid.shape, device=grid.device, requires_grad=True)

    def stop_observing(self) -> None:
        """Leave the layers as between two batches: for a training that was broken off within one."""
        for attention in self.attentions.values():
            attention.observe_samples, attention.statistics, attention.block_gate = 0, None, None

    def after_batch(self, ends_step: bool) -> dict[str, float] | None:
        """Collect the statistics; at the end of a step, hand them to the controller and put its layouts in place.

        Args:
            ends_step: whether an optimizer step ended with this batch.

        Returns:
            What was observed, by names for a logger; None where nothing was. New ``transitions`` and ``revisions`` are
            at the end of the lists of these names.

        Raises:
            LayoutsDiffer: the processes have come to different ones.
        """
        assert self.controller is not None
        attentions = list(self.attentions.values())
        for index, attention in enumerate(attentions):
            attention.observe_samples = 0
            if values := left_by(attention):
                part = Observed(attention.observed_samples, values)
                self._observed[index] = merged(self._observed.get(index), part)
            attention.statistics = attention.block_gate = None
        self._steps += ends_step
        # All processes know alike whether this is an observation, though not all may have looked at something.
        watching = any(map(self.controller.watches, range(len(attentions))))
        if not ends_step or self._steps % self.interval or not watching:
            return None
        observed, self._observed = self._observed, {}
        layers = self.controller.dense_layers or [*range(len(attentions))]
        if self._world_size > 1:
            observed = mean_over_processes(observed, layers, attentions[0].layout_mask.device)
        step = self._steps
        if self.controller.mask == "fisher":
            # A batch that training_step skips has no backward pass; nor has one whose loss does not depend on a layer.
            without = sorted(index for index, part in observed.items() if "sensitivity" not in part.values)
            if without and self._rank == 0:
                names = [[*self.attentions][index] for index in without]
                logger.warning(
                    "no observation at step %d: no gradient came back to %s; layers that the loss does not depend on, "
                    "such as those of a teacher, keep all others dense: hold them where modules() does not find them, "
                    "in a tuple say", step, " and ".join(names),
                )  # fmt: skip
            if without:
                return None
        absent = sorted(set(layers) - set(observed))
        if absent:  # layers that are skipped at random, say
            late = self.controller.max_dense_steps
            level = logging.INFO if late is None or step < late else logging.WARNING
            logger.log(level, "no observation at step %d: the layers %s took no part in this batch", step, absent)
            return None
        self._see_whether_causal()
        if self.all_sparse:
            return self._revise(step, {index: part.values.get("sensitivity") for index, part in observed.items()})
        statistics = {index: part.statistics for index, part in observed.items()}
        transitions = self.controller.observe(step, statistics)
        if self.controller.observed_at != step:
            return None
        self._longest = max([self._longest, *(_reached(each.pooled) for each in statistics.values())])
        if transitions:
            self._warn_of_a_long_grid()
        self.pooled = {t.layer: self._pooled(statistics[t.layer].pooled) for t in transitions}
        for transition in transitions:
            attentions[transition.layer].set_layout(transition.layout)
            if transition.forced and self._rank == 0:
                reason = transition.missing or "this layer was ready, but others were not"
                logger.warning("layer %d was made sparse at step %d by max_dense_steps; missing: %s",
                               transition.layer, step, reason)  # fmt: skip
        self._check_processes()
        self.transitions += transitions
        record: dict[str, Any] = {"step": step, "layers": [dict(layer) for layer in self.controller.latest]}
        self.history.append(record)
        return {
            f"layer{index}/{name}": value
            for index, layer in enumerate(record["layers"])
            for name, value in layer.items()
            if value == value  # nan: not defined yet
        }

    def _warn_of_a_long_grid(self) -> None:
        assert self.controller is not None
        blocks, size, length = self.controller.grid[1], self.controller.block_size, self.controller.lengths[1]
        if 4 * self._longest < 3 * blocks and self._rank == 0:
            logger.warning(
                "no sequence that was observed is longer than %d tokens, and layouts are made for %d: their density "
                "counts blocks that no token reaches, and of those that one reaches more are kept; set seq_len to the "
                "longest sequence there is", self._longest * size, length,
            )  # fmt: skip

    def after_validation(self, loss: float) -> None:
        """Compare the sparse phase with the dense one; the next step begins with what follows from it.

        Not at once: what is saved now, as the best model perhaps, is to compute what has been validated.

        Args:
            loss: of the validation data, the same in all processes.
        """
        if self.controller is None or self.controller.gave_up_at is not None:
            return
        if self.all_sparse:
            self._guard.in_sparse_phase(loss, says=self._rank == 0)
        elif not self.layouts:
            self._guard.in_dense_phase(loss)

    def _act_as_guard(self) -> None:
        """The sparse phase has been worse than the dense one for too long: keep more blocks, or all of them."""
        assert self.controller is not None
        self._guard.worse = 0
        self._see_whether_causal()
        revisions = self.controller.add_blocks(self._steps)
        self._take_over(revisions)
        if revisions:
            density = sum(layout.density for layout in self.layouts.values()) / len(self.layouts)
            action = f"keeps twice as many blocks from now on, {density:.3f} of all"
        else:
            self.controller.give_up(self._steps)
            for attention in self.attentions.values():
                attention.set_layout(None)
            action = "goes on densely"
        if self._rank == 0:
            logger.warning(
                "step %d: the validation loss, %.4f, stays more than %g above the best of the dense phase, %.4f; "
                "training %s", self._steps, self._guard.latest_loss, self.guard, self._guard.best_dense_loss, action,
            )  # fmt: skip

    def _see_whether_causal(self) -> None:
        """Let the layouts reach as far as the attention does: what its calls say may be known only when it is used."""
        assert self.controller is not None
        found = {attention.is_causal: name for name, attention in self.attentions.items()}
        if len(found) > 1:
            raise ValueError(
                f"{found[True]} is causal and {found[False]} is not; {type(self).__name__} needs attention of one kind"
            )
        (causal,) = found
        if self.start is not None and causal != self.controller.causal and self._rank == 0:
            kind = ("causal", "not causal") if causal else ("not causal", "causal")
            logger.warning(
                "the attention turns out to be %s; the %s that training began with is for one that is %s, which "
                "revisions make up for", kind[0], self.start, kind[1],
            )  # fmt: skip
        self.controller.causal = causal

    def _take_over(self, revisions: list[Revision]) -> None:
        """Put the layouts in place that the controller has changed."""
        assert self.controller is not None
        attentions = list(self.attentions.values())
        for revision in revisions:
            attentions[revision.layer].set_layout(self.controller.layouts[revision.layer])
        self._check_processes()
        self.revisions += revisions

    def _revise(self, step: int, sensitivities: Mapping[int, Tensor | None]) -> dict[str, float] | None:
        assert self.controller is not None
        revisions = self.controller.revise(step, sensitivities)
        self._take_over(revisions)
        return {f"layer{revision.layer}/new_blocks": revision.new_blocks for revision in revisions} or None

    def _pooled(self, pooled: Tensor) -> PooledAttention:
        assert self.controller is not None
        return PooledAttention(pooled.cpu(), self.controller.block_size, *self.controller.lengths, self._steps)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the controller, the transitions and the statistics so far."""
        if self.controller is None:
            return {}
        return {
            "version": STATE_VERSION,
            "controller": self.controller.state_dict(),
            "transitions": [{**t._asdict(), "layout": t.layout.mask} for t in self.transitions],
            "revisions": [r._asdict() for r in self.revisions],
            "history": list(self.history),
            "steps": self._steps,
            "began": self.began,
            "guard": self._guard.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ValueError: it is of a newer version, or of a training with other settings; or there is nothing yet that it
                could be the state of.
        """
        if not state_dict:
            return
        if self.controller is None:
            raise ValueError(
                f"load_state_dict of {type(self).__name__} comes before attach, which would begin anew; attach the "
                f"model's attention first"
            )
        if (version := state_dict.get("version", STATE_VERSION)) > STATE_VERSION:
            raise ValueError(
                f"the saved state of {type(self).__name__} has version {version}, this version of SAT reads up to "
                f"{STATE_VERSION}; upgrade SAT to go on with it"
            )
        self.controller.load_state_dict(state_dict["controller"])
        size = self.controller.block_size
        self.transitions = [
            Transition(**{**saved, "layout": BlockLayout(saved["layout"].cpu(), size)})
            for saved in state_dict["transitions"]
        ]
        self.revisions = [Revision(**saved) for saved in state_dict.get("revisions", [])]
        self.history = list(state_dict["history"])
        self._steps, self.began = state_dict["steps"], state_dict.get("began", "")
        self._guard.load_state_dict(state_dict.get("guard", {}))


def _reached(pooled: Tensor) -> int:
    """Up to which block keys have received attention."""
    received = pooled.sum((0, 1)).nonzero()
    return int(received[-1]) + 1 if len(received) else 0


def _equal(layout: BlockLayout, shared: BlockLayout) -> bool:
    mask = layout.mask.cpu()
    return torch.equal(mask, shared.mask.expand_as(mask))


def _no_guard(guard: float, what: str) -> str:
    return (
        f"guard={guard:g} compares with the loss of the dense phase, which {what} does without; leave guard away, or "
        f"begin densely"
    )
