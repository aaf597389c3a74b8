"""Second order pruning, against closed forms in numpy: OBD, OBS, and the least squares of what stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graphopt.numerics.obs import Solved, sparse_gpt
from graphopt.numerics.sparsity import Pattern

UNSTRUCTURED = Pattern()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(rows: int, width: int, seed: int = 1) -> Tensor:
    """Inputs (rows, width) whose neighbours go together and whose scales differ."""
    x = drawn(rows, width, seed=seed)
    for column in range(1, width):
        x[:, column] += 0.8 * x[:, column - 1]
    return x * torch.linspace(0.3, 2, width, dtype=torch.float64)


def solve(weight: Tensor, covariance: Tensor, **options: Any) -> Solved:
    chosen: dict[str, Any] = {"pattern": UNSTRUCTURED, "amount": 0.5, "damping": 1e-9} | options
    return sparse_gpt(weight.unsqueeze(0), covariance.unsqueeze(0), **chosen)


def error(weight: Tensor, found: Tensor, x: Tensor) -> float:
    """The squared error of the layer's output."""
    return float((x @ (weight - found).T).square().sum())


@pytest.mark.parametrize("text", ["unstructured", "2:4", "4:8"])
def test_with_a_diagonal_hessian_it_is_optimal_brain_damage(text: str) -> None:
    """LeCun et al. 1990: the saliency is h_jj w_j² / 2, and nothing else moves."""
    pattern, weight = Pattern.parse(text), drawn(6, 32)
    diagonal = drawn(32, seed=1).square() + 0.01
    solved = solve(weight, torch.diag(diagonal), pattern=pattern, damping=0.0)
    expected = pattern.masks([weight.square() * diagonal], 0.5)[0]
    assert torch.equal(solved.mask[0], expected)
    torch.testing.assert_close(solved.weight[0], torch.where(expected, weight, 0), rtol=1e-12, atol=0)


def test_with_equal_inputs_it_is_magnitude() -> None:
    weight = drawn(6, 200)
    solved = solve(weight[:, :128], torch.eye(128, dtype=torch.float64), amount=0.3)
    assert torch.equal(solved.mask[0], UNSTRUCTURED.masks([weight[:, :128]], 0.3)[0])


def test_removing_one_weight_is_optimal_brain_surgeon() -> None:
    """Hassibi & Stork 1993, equation 5: δw = - w_q / [H⁻¹]_qq · H⁻¹ e_q. Exact where the first column goes."""
    x = correlated(200, 8)
    covariance = x.T @ x / 200
    weight = drawn(1, 8, seed=2)
    weight[0, 0] = 1e-3  # so that it is the one that goes
    solved = solve(weight, covariance, amount=1 / 8, damping=0.0)
    inverse = np.linalg.inv(covariance.numpy())
    expected = weight[0].numpy() - weight[0, 0].item() / inverse[0, 0] * inverse[:, 0]
    assert solved.mask[0].sum() == 7 and not solved.mask[0, 0, 0]
    np.testing.assert_allclose(solved.weight[0, 0].numpy()[1:], expected[1:], rtol=1e-9)
    assert solved.weight[0, 0, 0] == 0


def test_only_columns_to_the_right_make_up_for_one_that_goes() -> None:
    """Frantar & Alistarh 2023, section 3.2: the least squares solution over them, the columns before it fixed."""
    x, weight = correlated(100, 6), drawn(1, 6, seed=2)
    weight[0, 2] = 1e-3
    solved = solve(weight, x.T @ x / 100, amount=1 / 6, damping=0.0)
    missing = weight[0, 2].item() * x[:, 2].numpy()
    change = np.linalg.lstsq(x[:, 3:].numpy(), missing, rcond=None)[0]
    assert torch.equal(solved.weight[0, 0, :2], weight[0, :2])
    np.testing.assert_allclose(solved.weight[0, 0, 3:].numpy(), weight[0, 3:].numpy() + change, rtol=1e-9)


@pytest.mark.parametrize("text", ["unstructured", "2:4", "1:3"])
@pytest.mark.parametrize("width", [24, 300])
def test_the_output_misses_less_than_by_magnitude(text: str, width: int) -> None:
    pattern, x, weight = Pattern.parse(text), correlated(2 * width, width), drawn(16, width, seed=3)
    covariance = x.T @ x / len(x)
    solved = solve(weight, covariance, pattern=pattern, damping=0.01)
    by_magnitude = torch.where(pattern.masks([weight], 0.5)[0], weight, 0)
    assert error(weight, solved.weight[0], x) < 0.6 * error(weight, by_magnitude, x)
    assert (solved.weight[~solved.mask] == 0).all()
    if pattern.keep:
        kept = solved.mask.reshape(-1, pattern.columns).sum(1)
        assert (kept == pattern.keep).all()
    else:
        assert int((~solved.mask).sum()) == round(0.5 * weight.numel())


@pytest.mark.parametrize("amount", [0.0, 0.13, 0.999])
def test_counts_are_exact_over_blocks(amount: float) -> None:
    weight = drawn(3, 333)
    solved = solve(weight, torch.eye(333, dtype=torch.float64), amount=amount)
    assert int((~solved.mask).sum()) == round(amount * weight.numel())
    if amount == 0:
        torch.testing.assert_close(solved.weight[0], weight, rtol=0, atol=0)


def test_groups_are_solved_by_their_own_inputs_and_share_the_amount() -> None:
    xs, weight = [correlated(50, 8, seed=seed) for seed in (1, 2)], drawn(2, 4, 8)
    weight[1] *= 10
    covariance = torch.stack([x.T @ x / 50 for x in xs])
    solved = sparse_gpt(weight, covariance, pattern=UNSTRUCTURED, amount=0.5, damping=0.01)
    assert int((~solved.mask).sum()) == 32 and (~solved.mask[0]).sum() > (~solved.mask[1]).sum()
    pattern = Pattern.parse("2:4")
    both = sparse_gpt(weight, covariance, pattern=pattern, amount=0, damping=0.01)
    for group in range(2):
        alone = solve(weight[group], covariance[group], pattern=pattern, amount=0, damping=0.01)
        torch.testing.assert_close(both.weight[group], alone.weight[0], rtol=1e-12, atol=1e-15)


def test_a_second_run_changes_nothing() -> None:
    x, weight = correlated(300, 150), drawn(8, 150)
    for text in ("unstructured", "3:5"):
        pattern = Pattern.parse(text)
        first = solve(weight, x.T @ x / 300, pattern=pattern, damping=0.01)
        again = solve(first.weight[0], x.T @ x / 300, pattern=pattern, damping=0.01)
        assert torch.equal(again.weight, first.weight)


def test_says_what_the_covariance_lacks() -> None:
    x = drawn(64, 8)
    regular = solve(drawn(4, 8), x.T @ x / 64, damping=0.01)
    assert (regular.dead, regular.singular, regular.damping) == (0, False, 0.01)
    x[:, 3] = 0
    dead = solve(drawn(4, 8), x.T @ x / 64, damping=0.01)
    assert (dead.dead, dead.singular) == (1, False)
    assert not dead.mask[0, :, 3].any()
    x[:, 3] = x[:, 1] - 2 * x[:, 2]
    combined = solve(drawn(4, 8), x.T @ x / 64, damping=0.01)
    assert (combined.dead, combined.singular) == (0, True) and torch.isfinite(combined.weight).all()
    undamped = solve(drawn(4, 8), torch.ones(8, 8, dtype=torch.float64), damping=0.0)
    assert undamped.singular and undamped.damping > 0 and torch.isfinite(undamped.weight).all()


def test_without_any_input_it_is_magnitude() -> None:
    weight = drawn(4, 8)
    solved = solve(weight, torch.zeros(8, 8, dtype=torch.float64), damping=0.01)
    assert solved.dead == 8 and torch.equal(solved.mask[0], UNSTRUCTURED.masks([weight], 0.5)[0])


def test_refuses() -> None:
    eye = torch.eye(8, dtype=torch.float64)
    with pytest.raises(ValueError, match="single weights and N:M, no blocks"):
        solve(drawn(4, 8), eye, pattern=Pattern.parse("4x1"))
    with pytest.raises(ValueError, match=r"amount must be in \[0, 1\), got 1.0"):
        solve(drawn(4, 8), eye, amount=1.0)
    for weight, covariance, name in ((drawn(4, 8) / 0, eye, "weight"), (drawn(4, 8), eye / 0, "covariance")):
        with pytest.raises(ValueError, match=f"{name} has .* values NaN or infinite"):
            solve(weight, covariance)

