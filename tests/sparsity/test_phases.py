"""The phases by themselves, without a trainer."""

import pytest
import torch

from sat.attention import AdaptiveAttention
from sat.layout import BlockLayout
from sat.sparsity import SparsityPhases
from sat.sparsity.learning_rate import LearningRateFactor


def attentions(seq_len=64):
    return {name: AdaptiveAttention(2, seq_len, 8) for name in ("first", "second")}


def train(phases, modules, steps=1):
    for _ in range(steps):
        phases.before_batch(2)
        loss = sum(module(*torch.randn(3, 2, 2, 64, 8).requires_grad_()).square().sum() for module in modules.values())
        loss.backward()
        phases.after_batch(ends_step=True)


def test_what_was_refused_is_refused_again():
    """As when the cell of a notebook is run a second time."""
    phases, modules = SparsityPhases(density=0.3), attentions()
    phases.begin_with([BlockLayout(torch.ones(4, 4, dtype=torch.bool), 8)] * 2, "run A")
    for _ in range(2):
        with pytest.raises(ValueError, match="layout to begin with in layer 0 has 4 x 4 blocks"):
            phases.attach("M", modules)
    assert phases.controller is None
    assert phases.began == ""


def test_a_refused_model_leaves_the_one_before():
    phases, modules = SparsityPhases(density=0.3), attentions()
    phases.attach("M", modules)
    with pytest.raises(ValueError, match="attention modules of one kind"):
        phases.attach("other", {"a": AdaptiveAttention(2, 64, 8), "b": AdaptiveAttention(2, 32, 8)})
    assert phases.attentions == modules
    phases.check_phases()


def test_a_state_is_not_dropped_where_there_is_nothing_yet_to_take_it():
    phases, modules = SparsityPhases(density=0.3, interval=1), attentions()
    phases.attach("M", modules)
    train(phases, modules)
    with pytest.raises(ValueError, match="comes before attach"):
        SparsityPhases(density=0.3, interval=1).load_state_dict(phases.state_dict())


def test_a_state_does_not_change_with_further_steps():
    phases, modules = SparsityPhases(density=0.3, interval=1, agreement=0.9), attentions()
    phases.attach("M", modules)
    train(phases, modules)
    state = phases.state_dict()
    train(phases, modules)
    assert (state["steps"], len(state["history"])) == (1, 1)


def test_a_step_without_a_gradient_is_no_observation():
    phases, modules = SparsityPhases(density=0.3, interval=1, max_dense_steps=1), attentions()
    phases.attach("M", modules)
    phases.before_batch(2)
    for module in modules.values():
        (0 * module(*torch.randn(3, 2, 2, 64, 8).requires_grad_()).sum()).backward()
    assert phases.after_batch(ends_step=True) is None
    assert phases.history == []
    assert not phases.all_sparse
    train(phases, modules)
    assert phases.all_sparse
    assert [record["step"] for record in phases.history] == [2]


def test_layouts_of_few_blocks_are_revised_too():
    """At most a share of three tenths, which of three blocks is none."""
    phases = SparsityPhases(density=0.75, start="window", revise_interval=1, interval=1)
    modules = {"only": AdaptiveAttention(2, 16, 8)}
    phases.attach("M", modules)
    assert phases.controller is not None
    kept = modules["only"].layout.mask
    for step in range(1, 5):
        phases.controller.revise(step, {0: 1.0 - kept.float()})
    assert (phases.controller.layouts[0].mask != kept).any()


class Inherited(torch.optim.SGD):
    """As many are: PyTorch wraps the step of each class with the hooks, and so runs them twice."""

    def step(self, closure=None):
        return super().step(closure)


def test_a_step_that_calls_its_parents_is_scaled_once():
    parameter = torch.nn.Parameter(torch.zeros(()))
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    optimizer = Inherited([parameter], lr=1.0)
    factor = LearningRateFactor(0.5, lambda: True)
    factor.attach([optimizer])
    for moved in (0.5, 1.0, 1.5):
        parameter.grad = -torch.ones(())
        optimizer.step()
        assert parameter.item() == moved
        assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_step_that_failed_is_made_up_for_by_the_next():
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    factor = LearningRateFactor(0.5, lambda: True)
    factor.attach([optimizer])

    def fail():
        raise RuntimeError("the closure")

    with pytest.raises(RuntimeError, match="the closure"):
        optimizer.step(fail)
    parameter.grad = -torch.ones(())
    optimizer.step()
    assert parameter.item() == 0.5
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_scheduler_between_a_step_that_failed_and_the_next():
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    factor = LearningRateFactor(0.5, lambda: True)
    factor.attach([optimizer])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    def fail():
        raise RuntimeError("the closure")

    with pytest.raises(RuntimeError, match="the closure"):
        optimizer.step(fail)
    scheduler.step()  # sets the learning rate that it means
    parameter.grad = -torch.ones(())
    optimizer.step()
    assert parameter.item() == 0.5
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_gradients_that_never_come_are_said_with_advice(caplog):
    phases, modules = SparsityPhases(density=0.3, interval=1, max_dense_steps=2), attentions()
    phases.attach("M", modules)
    for _ in range(2):
        phases.before_batch(2)
        for module in modules.values():
            (0 * module(*torch.randn(3, 2, 2, 64, 8).requires_grad_()).sum()).backward()
        phases.after_batch(ends_step=True)
    assert "no layouts at step 2, though max_dense_steps is over" in caplog.text
    assert phases.controller is not None
    assert all("use mask='direct'" in missing for missing in phases.controller.missing)
