"""Batch norm folded into a weight, against torch's own batch norm."""

import pytest
import torch
from torch import Tensor

from graphopt.numerics.fold import fold_batch_norm


def seeded_norm(channels: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    gamma, beta, mean = (torch.randn(channels, generator=draw, dtype=dtype) for _ in range(3))
    return gamma, beta, mean, torch.rand(channels, generator=draw, dtype=dtype)


@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_conv_then_batch_norm(with_bias: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 8, generator=draw, dtype=torch.float64)
    weight = torch.randn(5, 3, 3, 3, generator=draw, dtype=torch.float64)
    bias = torch.randn(5, generator=draw, dtype=torch.float64) if with_bias else None
    gamma, beta, mean, var = seeded_norm(5)
    y = torch.nn.functional.conv2d(x, weight, bias)
    expected = torch.nn.functional.batch_norm(y, mean, var, gamma, beta, eps=1e-3)
    folded = fold_batch_norm(weight, bias, gamma, beta, mean, var, 1e-3)
    torch.testing.assert_close(torch.nn.functional.conv2d(x, *folded), expected, rtol=1e-12, atol=1e-12)


def test_float32_is_rounded_once() -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    gamma, beta, mean, var = seeded_norm(5, torch.float32)
    folded, shifted = fold_batch_norm(weight, None, gamma, beta, mean, var, 1e-5)
    exact, exact_shift = fold_batch_norm(
        weight.double(), None, gamma.double(), beta.double(), mean.double(), var.double(), 1e-5
    )
    assert folded.dtype == torch.float32 and torch.equal(folded, exact.float())
    assert torch.equal(shifted, exact_shift.float())


def test_a_vector_of_another_length() -> None:
    gamma, beta, mean, var = seeded_norm(5)
    with pytest.raises(ValueError, match=r"beta has shape \[4\], but the weight \[5, 2\] needs \[5\]"):
        fold_batch_norm(torch.ones(5, 2), None, gamma, beta[:4], mean, var, 1e-5)
