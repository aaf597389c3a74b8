"""Pairs of matrices, against numpy: the theorem of Eckart and Young, and reduced-rank regression on the inputs."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from graphopt.numerics import factor

Array = np.ndarray[Any, Any]
MATRICES = arrays(
    np.float32, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.floats(-100, 100, width=32)
)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(weight: Tensor, u: Tensor, v: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.double() - u.double() @ v.double()))


@given(MATRICES, st.data())
@settings(max_examples=100, deadline=None)
def test_no_pair_of_that_rank_is_closer(matrix: Array, data: st.DataObject) -> None:
    r = data.draw(st.integers(1, min(matrix.shape)))
    weight = torch.from_numpy(matrix)
    u, v = factor.decompose(weight).cut(r)
    assert u.shape == (matrix.shape[0], r) and v.shape == (r, matrix.shape[1])
    exact = matrix.astype(np.float64)  # squares of small entries vanish in float32
    tail = np.linalg.svd(exact, compute_uv=False)[r:]
    smallest = float(np.finfo(np.float32).tiny)  # factors of subnormal entries have few bits left
    assert error(weight, u, v) <= math.sqrt((tail**2).sum()) + 1e-6 * np.linalg.norm(exact) + smallest


@pytest.mark.parametrize("shape", [(48, 192), (192, 48), (64, 64)])
@pytest.mark.parametrize("decay", [0.0, 0.05, 0.4])
def test_error_is_the_tail_of_numpys_singular_values(shape: tuple[int, int], decay: float) -> None:
    full = min(shape)
    values = np.exp(-decay * np.arange(full))
    left, right = (np.linalg.qr(seeded(n, full, seed=n).double().numpy())[0] for n in shape)
    weight = torch.from_numpy((left * values) @ right.T)
    for r in (1, full // 3, full - 1):
        tail = math.sqrt((values[r:] ** 2).sum())
        u, v = factor.decompose(weight).cut(r)
        assert error(weight, u, v) == pytest.approx(tail, rel=1e-5, abs=2e-8 * float(np.linalg.norm(values)))
        spectrum = np.linalg.svd((u @ v).numpy(), compute_uv=False)[:r]
        np.testing.assert_allclose(spectrum, values[:r], rtol=1e-5, atol=2e-8)


def test_sides_share_the_singular_values_evenly() -> None:
    weight = seeded(20, 30)
    u, v = factor.decompose(weight).cut(7)
    values = torch.linalg.svdvals(weight.double())[:7]
    torch.testing.assert_close(u.double().T @ u.double(), torch.diag(values), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(v.double() @ v.double().T, torch.diag(values), rtol=1e-5, atol=1e-5)


@given(MATRICES.filter(lambda m: np.linalg.norm(m) > 1e-3), st.floats(0.01, 1.0))
@settings(max_examples=100, deadline=None)
def test_energy_keeps_the_smallest_rank_that_holds_it(matrix: Array, energy: float) -> None:
    r = factor.decompose(torch.from_numpy(matrix)).rank_for_energy(energy)
    squares = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    shares = np.cumsum(squares) / squares.sum()
    assert shares[r - 1] >= energy - 1e-12
    assert r == 1 or shares[r - 2] < energy + 1e-12


def test_energy_on_known_singular_values() -> None:
    weight = torch.diag(torch.tensor([1.0, 7.0, 5.0, 0.0]))  # squares 49, 25, 1, 0 of 75
    for energy, r in {0.5: 1, 49 / 75: 1, 0.66: 2, 0.98: 2, 0.99: 3, 1.0: 3}.items():
        assert factor.decompose(weight).rank_for_energy(energy) == r


@pytest.mark.parametrize(("share", "expected"), [(0.1, 3), (0.101, 4), (1.0, 30), (0.001, 1)])
def test_rank_as_a_share(share: float, expected: int) -> None:
    assert factor.decompose(seeded(30, 40)).rank_for_share(share) == expected


def test_rank_for_an_error() -> None:
    spectrum = factor.decompose(torch.diag(torch.tensor([4.0, 3.0, 0.0])))  # an error of 3/5 at rank 1, none at 2
    assert spectrum.errors().tolist() == [1.0, 9 / 25, 0.0, 0.0]
    assert [spectrum.rank_for_error(error) for error in (0.99, 0.61, 0.59, 0.0)] == [1, 1, 2, 2]


def test_zeros_give_rank_one_of_zeros() -> None:
    spectrum = factor.decompose(torch.zeros(3, 4))
    u, v = spectrum.cut(spectrum.rank_for_energy(0.5))
    assert u.tolist() == [[0], [0], [0]] and v.tolist() == [[0, 0, 0, 0]]
    assert spectrum.errors().tolist() == [0, 0, 0, 0]


# --- what the matrix computes --------------------------------------------------------------------------------------


def inputs(features: int, rows: int, seed: int = 5) -> Tensor:
    """(rows, features), whose directions differ by a factor of 100, and mix the features."""
    scales = torch.logspace(0, -2, features).unsqueeze(0)
    mixed = torch.linalg.qr(seeded(features, features, seed=seed))[0]
    x: Tensor = (seeded(rows, features, seed=seed + 1) * scales) @ mixed
    return x


def regression(weight: Array, x: Array, rank: int) -> Array:
    """The minimizer of |W x - W' x| of a rank, from the inputs themselves: Izenman 1975, by numpy's SVD of W x."""
    left = np.linalg.svd(weight @ x.T, full_matrices=False)[0][:, :rank]
    return np.asarray(left @ left.T @ weight)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (24, 24)])
@pytest.mark.parametrize("rank", [1, 5, 15])
def test_moments_give_the_minimizer_of_the_output_error(shape: tuple[int, int], rank: int) -> None:
    weight, x = seeded(*shape), inputs(shape[1], 200)
    spectrum = factor.decompose(weight, x.double().T @ x.double() / len(x))
    u, v = spectrum.cut(rank)
    best = regression(weight.double().numpy(), x.double().numpy(), rank)
    np.testing.assert_allclose((u.double() @ v.double()).numpy(), best, atol=1e-4)
    whole = np.linalg.norm(weight.double().numpy() @ x.double().numpy().T)
    left = np.linalg.norm((weight.double() - u.double() @ v.double()).numpy() @ x.double().numpy().T)
    assert float(spectrum.errors()[rank].sqrt()) == pytest.approx(left / whole, rel=1e-4)
    assert not spectrum.damped


@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 1000), st.data())
@settings(max_examples=60, deadline=None)
def test_no_perturbed_pair_has_a_smaller_output_error(rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    weight, x = seeded(rows, columns, seed=seed).double(), inputs(columns, 40, seed).double()
    u, v = factor.decompose(weight, x.T @ x / 40).cut(rank)
    best = float(((weight - u @ v) @ x.T).norm())
    for trial in range(5):
        other = (u + 0.01 * seeded(*u.shape, seed=trial)) @ (v + 0.01 * seeded(*v.shape, seed=trial + 9))
        assert best <= float(((weight - other) @ x.T).norm()) + 1e-9


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_white_inputs_give_the_plain_pair(shape: tuple[int, int]) -> None:
    weight = seeded(*shape)
    plain, aware = factor.decompose(weight), factor.decompose(weight, torch.eye(shape[1]) * 4)
    torch.testing.assert_close(aware.squares, plain.squares * 4)
    for ours, theirs in zip(aware.cut(3), plain.cut(3), strict=True):
        torch.testing.assert_close(ours.abs() / ours.norm(), theirs.abs() / theirs.norm(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(12, 16), (20, 16)])
def test_singular_moments_are_damped_and_unseen_directions_count_last(shape: tuple[int, int]) -> None:
    weight, x = seeded(*shape), inputs(16, 3)  # three rows: three directions of sixteen
    spectrum = factor.decompose(weight, x.double().T @ x.double() / 3)
    assert spectrum.damped
    seen = weight.double() @ x.double().T
    u, v = (half.double() for half in spectrum.cut(3))
    assert float((seen - u @ v @ x.double().T).norm() / seen.norm()) < 0.05
    u, v = (half.double() for half in spectrum.cut(min(shape)))
    assert float((weight - u @ v).norm() / weight.norm()) < 1e-5


def test_inputs_of_zeros_give_the_plain_pair() -> None:
    weight = seeded(6, 5)
    plain, blind = factor.decompose(weight), factor.decompose(weight, torch.zeros(5, 5))
    assert blind.damped
    torch.testing.assert_close(blind.u @ blind.v, plain.u @ plain.v)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("aware", [False, True])
def test_equal_weights_give_equal_bits_and_signs_are_fixed(shape: tuple[int, int], aware: bool) -> None:
    weight, moments = seeded(*shape), torch.cov(inputs(shape[1], 99).T) if aware else None
    u, v = factor.decompose(weight, moments).cut(9)
    again_u, again_v = factor.decompose(weight.T.contiguous().T, moments, most=12).cut(9)
    assert torch.equal(u, again_u) and torch.equal(v, again_v)
    assert u.is_contiguous() and v.is_contiguous()
    assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())
    minus_u, minus_v = factor.decompose(-weight, moments).cut(9)
    torch.testing.assert_close((minus_u, minus_v), (u, -v), rtol=1e-4, atol=1e-5)


def test_blocks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = seeded(50, 12)
    whole = factor.decompose(weight).cut(5)
    monkeypatch.setattr(factor, "_BLOCK", 12 * 7)
    torch.testing.assert_close(factor.decompose(weight).cut(5), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_the_weights(dtype: torch.dtype) -> None:
    u, v = factor.decompose(seeded(6, 5).to(dtype), torch.eye(5)).cut(2)
    assert u.dtype == v.dtype == dtype


def test_no_more_than_most_is_kept() -> None:
    spectrum = factor.decompose(seeded(6, 5), most=2)
    assert spectrum.u.shape == (6, 2) and spectrum.v.shape == (2, 5) and len(spectrum.squares) == 5
    for rank in (0, 3):
        with pytest.raises(ValueError, match=f"rank must be within 1 and 2, got {rank}"):
            spectrum.cut(rank)


def test_refuses_choices_out_of_range() -> None:
    spectrum = factor.decompose(seeded(3, 3))
    for choose, values, message in (
        (spectrum.rank_for_energy, (0.0, 1.1), r"energy must be in \(0, 1\]"),
        (spectrum.rank_for_share, (0.0, 1.5), r"share must be in \(0, 1\]"),
        (spectrum.rank_for_error, (-0.1, 1.0), r"error must be in \[0, 1\)"),
    ):
        for value in values:
            with pytest.raises(ValueError, match=f"{message}, got {value}"):
                choose(value)


def test_refuses_a_weight() -> None:
    with pytest.raises(ValueError, match=r"non-empty matrix, got shape \[2, 3, 4\]"):
        factor.decompose(seeded(2, 3, 4))
    with pytest.raises(ValueError, match=r"weight has .*first at \(0, 1\)"):
        factor.decompose(torch.tensor([[0.0, float("inf")]]))


def test_refuses_moments() -> None:
    with pytest.raises(ValueError, match=r"moments must have shape \[3, 3\], got \[2, 2\]"):
        factor.decompose(seeded(2, 3), torch.eye(2))
    with pytest.raises(ValueError, match=r"moments has .*first at \(0, 0\)"):
        factor.decompose(seeded(2, 1), torch.tensor([[float("nan")]]))
