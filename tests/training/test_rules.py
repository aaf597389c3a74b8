"""Rules of training: each against its equation, in numpy or by hand, and how the loop waits for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.ir.graph import Graph
from graphopt.numerics.sparsity import Pattern, as_matrix, cubic
from graphopt.pipeline.batches import Batch, Batches
from graphopt.training.checkpoints import Checkpoints
from graphopt.training.loop import Trainer
from graphopt.training.objective import Labels
from graphopt.training.rules import (
    FixedZeros,
    Movement,
    MovingPattern,
    Together,
    UnitMovement,
    UnitScores,
    WeightRule,
)
from graphopt.training.settings import Settings
from tests.language import build, weight_of


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(rule: WeightRule, weight: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """The effective weight, and dL/dW for a loss whose gradient with respect to the effective weight is `slope`."""
    leaf = weight.clone().requires_grad_()
    effective = rule.effective(leaf)
    torch.autograd.backward((effective * slope).sum())
    assert leaf.grad is not None
    return effective.detach(), leaf.grad


def zeros_per_group(weight: Tensor, size: int) -> set[int]:
    return set((as_matrix(weight).reshape(-1, size) == 0).sum(1).tolist())


# --- fixed zeros, SR-STE -------------------------------------------------------------------------------------------


def test_fixed_zeros_stay_and_the_rest_trains() -> None:
    weight = drawn(4, 6)
    mask = weight > 0
    rule = FixedZeros(mask)
    stepped = weight.clone()
    rule.after_step(stepped)
    assert torch.equal(stepped, torch.where(mask, weight, 0)) and torch.equal(rule.kept(weight), mask)
    assert torch.equal(rule.effective(weight), weight) and not list(rule.parameters()) and not rule.state_dict()


@pytest.mark.parametrize(("shape", "transposed"), [((6, 8), False), ((8, 6), True), ((5, 8, 3, 3), False)])
def test_one_step_of_sr_ste_is_equation_9(shape: tuple[int, ...], transposed: bool) -> None:
    """W - rate (g(W̃) + decay (Ē ⊙ W)), with W̃ the two largest of each four along the input, and Ē the others."""
    weight, target, rate, decay = drawn(*shape), drawn(*shape, seed=1), 0.1, 0.3
    parameter = torch.nn.Parameter(weight.clone())
    effective = MovingPattern(Pattern.parse("2:4"), decay, transposed).effective(parameter)
    torch.autograd.backward((effective - target).square().sum() / 2)
    torch.optim.SGD([parameter], lr=rate).step()
    w, axis = weight.double().numpy(), 0 if transposed else 1
    moved = np.moveaxis(w, axis, -1)
    groups = np.abs(moved).reshape(-1, 4)
    left_out = np.zeros_like(groups)
    np.put_along_axis(left_out, groups.argsort(1)[:, :2], 1, axis=1)
    left_out = np.moveaxis(left_out.reshape(moved.shape), -1, axis)
    sparse = w * (1 - left_out)
    expected = w - rate * ((sparse - target.double().numpy()) + decay * left_out * w)
    np.testing.assert_allclose(effective.detach().numpy(), sparse, rtol=1e-6)
    np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-5, atol=1e-7)


# --- movement ------------------------------------------------------------------------------------------------------


def test_gradients_of_movement_are_those_of_the_paper() -> None:
    """dL/dS = dL/dW' · W for all weights, dL/dW = dL/dW' where a weight takes part (equations 2 and 3)."""
    x, weight, y = drawn(7, 5), drawn(3, 5, seed=1), drawn(7, 3, seed=2)
    rule = Movement(weight.shape, Pattern(), 0.4)
    with torch.no_grad():
        rule.scores.copy_(drawn(3, 5, seed=3))
    rule.progress(1.0)
    leaf = weight.clone().requires_grad_()
    torch.autograd.backward((F.linear(x, rule.effective(leaf)) - y).square().sum() / 2)
    mask = np.ones((3, 5))
    mask.flat[np.argsort(rule.scores.detach().numpy(), axis=None)[:6]] = 0
    w, inputs = weight.numpy(), x.numpy()
    slope = (inputs @ (w * mask).T - y.numpy()).T @ inputs
    assert leaf.grad is not None and rule.scores.grad is not None
    np.testing.assert_allclose(rule.scores.grad.numpy(), slope * w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(leaf.grad.numpy(), slope * mask, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 6), columns=st.integers(1, 6), amount=st.floats(0.01, 0.99), done=st.floats(0, 1),
    seed=st.integers(0, 99), transposed=st.booleans(), fixed=st.floats(0, 0.9),
)  # fmt: skip
def test_the_lowest_scores_go_as_many_as_the_schedule_says(
    rows: int, columns: int, amount: float, done: float, seed: int, transposed: bool, fixed: float
) -> None:
    shape = (columns, rows) if transposed else (rows, columns)
    stays = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= fixed
    rule = Movement(shape, Pattern(), amount, transposed=transposed, stays=stays)
    with torch.no_grad():
        rule.scores.copy_(drawn(*shape, seed=seed) * 10.0 ** (seed % 9 - 6))
    rule.progress(done)
    mask = rule.kept(torch.ones(shape))
    count = round(amount * cubic(done, start=0.1, end=0.7) * rows * columns)
    assert int((~mask).sum()) == count and rule.is_settled == (done >= 0.7)
    if count <= int((~stays).sum()):
        assert not (~mask & stays).any()
    else:  # all zeros that were there, and of the others those with the lowest scores
        assert not mask[~stays].any()
        kept, gone = (rule.scores.detach()[chosen & stays] for chosen in (mask, ~mask))
        assert not len(kept) or not len(gone) or float(kept.min()) >= float(gone.max())


@pytest.mark.parametrize(("shape", "transposed"), [((6, 8), False), ((8, 6), True), ((4, 8, 3, 3), False)])
def test_n_of_m_stay_in_the_end(shape: tuple[int, ...], transposed: bool) -> None:
    rule = Movement(shape, Pattern.parse("2:4"), 0.5, transposed=transposed)
    with torch.no_grad():
        rule.scores.copy_(drawn(*shape))
    counts = []
    for done in (0.0, 0.25, 1.0):
        rule.progress(done)
        effective = rule.effective(torch.ones(shape)).detach()
        counts.append(zeros_per_group(effective.T if transposed else effective, 4))
    assert counts == [{0}, {1}, {2}]
    kept = rule.scores.detach().T if transposed else rule.scores.detach()
    best = as_matrix(kept).reshape(-1, 4).sort(1).values[:, 2]
    view = effective.T if transposed else effective
    assert torch.equal(as_matrix(view).reshape(-1, 4) > 0, as_matrix(kept).reshape(-1, 4) >= best[:, None])


def test_blocks_go_whole() -> None:
    rule = Movement((8, 6), Pattern.parse("4x1"), 0.5)
    with torch.no_grad():
        rule.scores.copy_(drawn(8, 6))
    rule.progress(1.0)
    mask = rule.kept(torch.ones(8, 6)).reshape(2, 4, 6)
    sums = rule.scores.detach().reshape(2, 4, 6).sum(1)
    assert torch.equal(mask.all(1), mask.any(1)) and torch.equal(mask.all(1), sums > sums.flatten().sort().values[5])


def test_zeros_that_were_there_neither_train_nor_come_back() -> None:
    stays = torch.tensor([[True, True, False, True]])
    rule = Movement((1, 4), Pattern(), 0.5, stays=stays)
    with torch.no_grad():
        rule.scores.copy_(torch.tensor([[1.0, -1.0, 9.0, 2.0]]))
    rule.progress(1.0)
    weight = torch.ones(1, 4)
    rule.after_step(weight)
    assert weight.tolist() == [[1, 1, 0, 1]] and rule.effective(weight).tolist() == [[1, 0, 0, 1]]


# --- units ---------------------------------------------------------------------------------------------------------


def test_a_unit_has_the_gradients_of_all_that_reads_it() -> None:
    linear, conv = drawn(3, 6), drawn(2, 2, 3, 3, seed=1)
    scores = UnitScores(2, 1)
    with torch.no_grad():
        scores.scores.copy_(torch.tensor([0.5, -0.5]))
    by_linear = UnitMovement(scores, 1, torch.tensor([0, 0, 1, 1, -1, -1]))
    by_conv = UnitMovement(scores, 1, torch.tensor([1, 0]))
    for rule in (by_linear, by_conv):
        rule.progress(1.0)
    slopes = drawn(3, 6, seed=2), drawn(2, 2, 3, 3, seed=3)
    (first, first_grad), (second, second_grad) = (
        gradients(rule, weight, slope)
        for rule, weight, slope in zip((by_linear, by_conv), (linear, conv), slopes, strict=True)
    )
    assert torch.equal(first, linear * torch.tensor([1, 1, 0, 0, 1, 1])) and scores.units().tolist() == [0]
    assert torch.equal(second, conv * torch.tensor([0, 1]).reshape(1, 2, 1, 1))
    assert torch.equal(first_grad, slopes[0] * torch.tensor([1, 1, 0, 0, 1, 1]))
    assert torch.equal(second_grad, slopes[1] * torch.tensor([0, 1]).reshape(1, 2, 1, 1))
    of_linear, of_conv = (linear * slopes[0]).sum(0), (conv * slopes[1]).sum((0, 2, 3))
    expected = torch.stack([of_linear[:2].sum() + of_conv[1], of_linear[2:4].sum() + of_conv[0]])
    torch.testing.assert_close(scores.scores.grad, expected)


def test_units_of_a_matrix_that_is_stored_the_other_way_round() -> None:
    scores = UnitScores(3, 2)
    with torch.no_grad():
        scores.scores.copy_(torch.tensor([1.0, -1.0, 0.0]))
    rule = UnitMovement(scores, 0, torch.tensor([0, 1, 2]))
    rule.progress(1.0)
    assert rule.effective(torch.ones(3, 2)).tolist() == [[1, 1], [0, 0], [1, 1]]


def test_rules_together_act_one_after_the_other() -> None:
    scores, stays = UnitScores(2, 1), torch.tensor([[True, False], [True, True]])
    movement = UnitMovement(scores, 1, torch.tensor([0, 1]))
    rule = Together([FixedZeros(stays), movement])
    with torch.no_grad():
        scores.scores.copy_(torch.tensor([-1.0, 1.0]))
    assert not rule.is_settled
    rule.progress(1.0)
    weight = torch.ones(2, 2)
    rule.after_step(weight)
    assert rule.is_settled and rule.effective(weight).tolist() == [[0, 0], [0, 1]]
    fresh = Together([FixedZeros(stays), UnitMovement(UnitScores(2, 1), 1, torch.tensor([0, 1]))])
    fresh.load_state_dict(rule.state_dict())
    assert torch.equal(fresh.effective(weight), rule.effective(weight))


# --- in the loop ---------------------------------------------------------------------------------------------------


def squared(outputs: Any, batch: Batch) -> Tensor:
    return F.mse_loss(outputs[0], batch.labels)


def trained(
    steps: int, evaluate: Callable[[Graph], float] | None = None, *, checkpoints: Path | None = None, **options: Any
) -> tuple[Trainer, Graph, Movement]:
    """A linear of 8 inputs, trained under movement to half its weights; it has run."""
    graph = build("fx", "y = linear(x[batch,8], W[4,8])")
    batches = [(x, x[:, :4]) for x in (drawn(16, 8, seed=seed) for seed in range(4))]
    module = graph.module(tuple)
    name = graph.parameter(module, graph.nodes[0].required("weight"))
    assert name is not None
    rule = Movement((4, 8), Pattern(), 0.5)
    trainer = Trainer(
        graph, Labels(squared), Batches(batches, graph.inputs, name="training"),
        replace(Settings(steps=steps, lr=0.05, evaluate_every=2, device="cpu"), **options),
        rules={name: rule}, module=module, evaluate=evaluate, name="finetune",
        checkpoints=None if checkpoints is None else Checkpoints(checkpoints, graph, minutes=0),
    )  # fmt: skip
    trainer.run()
    return trainer, graph, rule


def worse_and_worse() -> Callable[[Graph], float]:
    metrics = iter(range(1000, 0, -1))
    return lambda graph: float(next(metrics))


def zeros(graph: Graph) -> int:
    return int((weight_of(graph.nodes[0]) == 0).sum())


def test_the_best_weights_have_all_zeros_that_were_asked_for() -> None:
    trainer, graph, rule = trained(20, worse_and_worse())
    assert zeros(graph) == 16 and trainer.best.step == 16  # the first evaluation after 0.7 of 20 steps
    assert torch.equal(weight_of(graph.nodes[0]) != 0, rule.kept(weight_of(graph.nodes[0])))
    assert trainer.outcome.metric == [line["metric"] for line in trainer.outcome.lines if "metric" in line][8]
    assert not trainer.outcome.notes


def test_patience_counts_from_then_on() -> None:
    trainer, graph, _ = trained(40, worse_and_worse(), patience=2)
    assert zeros(graph) == 16 and trainer.best.step == 30 and trainer.step == 34


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_short_training_removes_the_rest_at_its_end(steps: int) -> None:
    trainer, graph, _ = trained(steps, worse_and_worse())
    assert zeros(graph) == 16 and trainer.best.step == steps
    assert trainer.outcome.notes == [f"training ended early, at step {steps}: what was left to remove went at once"]


def test_without_evaluate_the_last_weights_are_kept() -> None:
    trainer, graph, _ = trained(20)
    assert zeros(graph) == 16 and trainer.best.step == 20


def test_timing_precisions_leaves_the_rules_as_they_are() -> None:
    trainer, graph, _ = trained(20, amp="auto")
    assert zeros(graph) == 16 and trainer.best.step == 20


def test_divergence_before_the_zeros_leaves_nothing_to_keep() -> None:
    with pytest.raises(UsageError, match=r"finetune: the loss is .* at step .*, before any weights were kept; give a"):
        trained(40, worse_and_worse(), lr=1e30, optimizer="sgd", clip=None, warmup=0.0)


def test_a_later_session_goes_on_with_the_same_scores(tmp_path: Path) -> None:
    whole, _, expected = trained(20)
    file = tmp_path / "0-finetune.safetensors"

    class Stopped(Exception):
        pass

    counted = iter(range(100))

    def stopping(graph: Graph) -> float:
        if next(counted) == 9:
            raise Stopped
        return 0.0

    with pytest.raises(Stopped):
        trained(20, stopping, checkpoints=file)
    resumed, graph, rule = trained(20, checkpoints=file)
    assert resumed.outcome.notes == ["went on from step 17, at 0-finetune.safetensors"]
    assert torch.equal(rule.scores, expected.scores) and zeros(graph) == 16 and resumed.step == whole.step
    again, graph, rule = trained(20, checkpoints=file)  # one that is over
    assert again.step == 20 and torch.equal(rule.scores, expected.scores) and zeros(graph) == 16
