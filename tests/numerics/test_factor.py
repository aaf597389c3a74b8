"""Truncation, against numpy's singular values and the theorem of Eckart and Young."""

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
    u, v = factor.truncate(weight, rank=r)
    assert u.shape == (matrix.shape[0], r) and v.shape == (r, matrix.shape[1])
    tail = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[r:]
    smallest = float(np.finfo(np.float32).tiny)  # factors of subnormal entries have few bits left
    assert error(weight, u, v) <= math.sqrt((tail**2).sum()) + 1e-6 * np.linalg.norm(matrix) + smallest


@pytest.mark.parametrize("shape", [(48, 192), (192, 48), (64, 64)])
@pytest.mark.parametrize("decay", [0.0, 0.05, 0.4])
def test_error_is_the_tail_of_numpys_singular_values(shape: tuple[int, int], decay: float) -> None:
    full = min(shape)
    values = np.exp(-decay * np.arange(full))
    left, right = (np.linalg.qr(seeded(n, full, seed=n).double().numpy())[0] for n in shape)
    weight = torch.from_numpy((left * values) @ right.T)
    for r in (1, full // 3, full - 1):
        tail = math.sqrt((values[r:] ** 2).sum())
        u, v = factor.truncate(weight, rank=r)
        assert error(weight, u, v) == pytest.approx(tail, rel=1e-5, abs=2e-8 * float(np.linalg.norm(values)))
        spectrum = np.linalg.svd((u @ v).numpy(), compute_uv=False)[:r]
        np.testing.assert_allclose(spectrum, values[:r], rtol=1e-5, atol=2e-8)


def test_sides_share_the_singular_values_evenly() -> None:
    weight = seeded(20, 30)
    u, v = factor.truncate(weight, rank=7)
    values = torch.linalg.svdvals(weight.double())[:7]
    torch.testing.assert_close(u.double().T @ u.double(), torch.diag(values), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(v.double() @ v.double().T, torch.diag(values), rtol=1e-5, atol=1e-5)


@given(MATRICES.filter(lambda m: np.linalg.norm(m) > 1e-3), st.floats(0.01, 1.0))
@settings(max_examples=100, deadline=None)
def test_energy_keeps_the_smallest_rank_that_holds_it(matrix: Array, energy: float) -> None:
    _, v = factor.truncate(torch.from_numpy(matrix), energy=energy)
    squares = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    shares = np.cumsum(squares) / squares.sum()
    r = v.shape[0]
    assert shares[r - 1] >= energy - 1e-12
    assert r == 1 or shares[r - 2] < energy + 1e-12


def test_energy_on_known_singular_values() -> None:
    weight = torch.diag(torch.tensor([1.0, 7.0, 5.0, 0.0]))  # squares 49, 25, 1, 0 of 75
    for energy, r in {0.5: 1, 49 / 75: 1, 0.66: 2, 0.98: 2, 0.99: 3, 1.0: 3}.items():
        assert factor.truncate(weight, energy=energy)[0].shape == (4, r)


@pytest.mark.parametrize(
    ("rank", "expected"), [(1, 1), (3, 3), (30, 30), (99, 30), (0.1, 3), (0.101, 4), (1.0, 30), (0.001, 1)]
)
def test_rank_as_count_and_as_share(rank: float, expected: int) -> None:
    u, v = factor.truncate(seeded(30, 40), rank=rank)
    assert u.shape == (30, expected) and v.shape == (expected, 40)


def test_zeros_give_rank_one_of_zeros() -> None:
    u, v = factor.truncate(torch.zeros(3, 4), energy=0.5)
    assert u.tolist() == [[0], [0], [0]] and v.tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_equal_weights_give_equal_bits_and_signs_are_fixed(shape: tuple[int, int]) -> None:
    weight = seeded(*shape)
    u, v = factor.truncate(weight, rank=9)
    again_u, again_v = factor.truncate(weight.T.contiguous().T, rank=9)
    assert torch.equal(u, again_u) and torch.equal(v, again_v)
    assert u.is_contiguous() and v.is_contiguous()
    assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())
    minus_u, minus_v = factor.truncate(-weight, rank=9)
    torch.testing.assert_close((minus_u, minus_v), (u, -v), rtol=1e-6, atol=1e-6)


def test_blocks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = seeded(50, 12)
    whole = factor.truncate(weight, rank=5)
    monkeypatch.setattr(factor, "_BLOCK", 12 * 7)
    torch.testing.assert_close(factor.truncate(weight, rank=5), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_the_weights(dtype: torch.dtype) -> None:
    u, v = factor.truncate(seeded(6, 5).to(dtype), rank=2)
    assert u.dtype == v.dtype == dtype


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({}, "exactly one of rank and energy"),
        ({"rank": 2, "energy": 0.5}, "exactly one of rank and energy"),
        ({"rank": 0}, "at least 1"),
        ({"rank": 1.5}, r"share must be in \(0, 1\]"),
        ({"rank": 0.0}, r"share must be in \(0, 1\]"),
        ({"energy": 0.0}, r"energy must be in \(0, 1\]"),
        ({"energy": 1.1}, r"energy must be in \(0, 1\]"),
    ],
)
def test_refuses_a_choice(choice: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factor.truncate(seeded(3, 3), **choice)


def test_refuses_a_weight() -> None:
    with pytest.raises(ValueError, match=r"non-empty matrix, got shape \[2, 3, 4\]"):
        factor.truncate(seeded(2, 3, 4), rank=1)
    with pytest.raises(ValueError, match=r"first at \(0, 1\)"):
        factor.truncate(torch.tensor([[0.0, float("inf")]]), rank=1)
