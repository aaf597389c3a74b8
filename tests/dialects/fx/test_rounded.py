"""`Rounded`: the values of the deployed ops, straight-through gradients, and scales that are learned as in LSQ."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.dialects.fx.rounded import Rounded
from graphopt.dialects.fx.spellings import quantized_decomposed
from graphopt.ir.ops import OPS

SIGNED = {8: (-128, 127), 7: (-63, 63), 4: (-8, 7), 2: (-2, 1)}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def learned(scale: Tensor, zero_point: Tensor | None, *rest: Any, **options: Any) -> Rounded:
    return Rounded(nn.Parameter(scale), zero_point, *rest, **options)


# --- values --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-20, 1e6), st.integers(0, 255))
def test_an_activation_is_rounded_as_the_operators_round_it(seed: int, scale: float, zero: int) -> None:
    ops, limits = quantized_decomposed(), (0, 255, torch.uint8)
    step, zero_point = torch.tensor(scale), torch.tensor(zero, dtype=torch.uint8)
    x = normal(500, seed=seed) * step * 150
    integers = ops.quantize_per_tensor.tensor(x, step, zero_point, *limits)
    expected = ops.dequantize_per_tensor.tensor(integers, step, zero_point, *limits)
    for rounded in (Rounded(step, zero_point, *limits), learned(step, zero_point, *limits)):
        assert torch.equal(rounded(x), expected) and torch.equal(rounded.integers(x), integers)
        assert torch.equal(rounded(x.clone().requires_grad_()), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_rows_and_floats_of_8_bits_are_rounded_as_the_ops_round_them(dtype: torch.dtype) -> None:
    x, largest = normal(5, 16) * 3, 448.0 if dtype.is_floating_point else 127.0
    scale = OPS["row_scale"].reference(x, largest=largest)
    zero_point = torch.zeros((), dtype=dtype)
    integers = OPS["quantize"].reference(x, scale, zero_point)
    rounded = Rounded(None, None, -largest, largest, dtype, rows=largest)
    x.requires_grad_()
    y = rounded(x)
    assert torch.equal(y, OPS["dequantize"].reference(integers, scale))
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones(5, 16))
    fixed = Rounded(torch.tensor(0.01), None, -448, 448, torch.float8_e4m3fn)
    wide = normal(64).mul(8).requires_grad_()
    fixed(wide).sum().backward()
    assert wide.grad is not None and torch.equal(wide.grad, (wide.detach().abs() / 0.01 <= 448.5).float())


def test_activations_in_16_bits_are_rounded_in_float32() -> None:
    rounded = learned(torch.tensor(0.05), torch.tensor(100, dtype=torch.uint8), 0, 255, torch.uint8)
    x = normal(4, 64).to(torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = rounded(x)
    y.sum().backward()
    assert y.dtype == torch.float32 and torch.equal(y, rounded(x.float()))
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert rounded.scale is not None and rounded.scale.grad is not None and rounded.scale.grad.dtype == torch.float32


# --- straight-through gradients ------------------------------------------------------------------------------------


def test_rounding_passes_the_gradient_within_the_range() -> None:
    rounded = Rounded(torch.tensor(0.5), torch.tensor(128, dtype=torch.uint8), 0, 255, torch.uint8)
    x = torch.tensor([-100.0, -64.0, -0.3, 0.2, 63.4, 64.0], requires_grad=True)
    y = rounded(x)
    assert torch.equal(y.detach(), torch.tensor([-64.0, -64.0, -0.5, 0.0, 63.5, 63.5]))
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 1, 0]


def test_rounding_by_channel_and_by_block_is_that_of_the_formula() -> None:
    w = normal(6, 8).requires_grad_()
    scale = torch.rand(6, generator=torch.Generator().manual_seed(1)) * 0.01 + 0.02
    y = Rounded(scale, None, -128, 127, torch.int8, axis=0)(w)
    expected = (w / scale[:, None]).round().clamp(-128, 127) * scale[:, None]
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    scales, zeros = torch.full((6, 2), 0.25), torch.full((6, 2), 3, dtype=torch.int64)
    y = Rounded(scales, zeros, -8, 7, torch.int8, axis=1, block=4)(w)
    expected = ((w / 0.25).round() + 3).clamp(-8, 7).sub(3) * 0.25
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    y.sum().backward()
    inside = (w.detach() > -11.5 * 0.25) & (w.detach() < 4.5 * 0.25)
    assert w.grad is not None and torch.equal(w.grad != 0, inside)


def test_a_scale_below_zero_passes_gradients_too() -> None:
    w = torch.tensor([[0.9, -0.4, 0.1, -1.2]], requires_grad=True)  # blocks of 4 bits reach -8 and 7
    y = Rounded(torch.tensor([[-0.1]]), None, -8, 7, torch.int8, axis=1, block=4)(w)
    torch.testing.assert_close(y.detach(), torch.tensor([[0.8, -0.4, 0.1, -0.7]]))
    y.sum().backward()
    assert w.grad is not None and w.grad.tolist() == [[0, 1, 1, 0]]


def test_a_range_chosen_at_run_time_has_no_gradient_of_its_own() -> None:
    x = torch.linspace(-1, 2, 7, requires_grad=True)
    y = Rounded(None, None, 0, 255, torch.uint8)(x)
    assert (y - x).abs().max() <= 0.5 * 3 / 255 + 1e-6
    F.mse_loss(y, torch.zeros(7), reduction="sum").backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(x.grad, 2 * y.detach())


# --- learned scales ------------------------------------------------------------------------------------------------


def lsq(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, upstream: Tensor) -> tuple[Any, Any]:
    """Equation 3 of Esser et al. 2020 by element, with zero points as in LSQ+ (Bhalgat et al. 2020), in float64: what
    each element adds to the gradient of its scale, before it is summed and scaled; and where equation 5 passes."""
    v, s, z, up = (one.double().numpy() for one in (x, scale, zero, upstream))
    steps, least, most = v / s, low - z, high - z
    slope = np.where(steps <= least, least, np.where(steps >= most, most, np.round(steps) - steps))
    return up * slope, (steps > least) & (steps < most)


CASES = [
    pytest.param((torch.tensor(0.02), torch.tensor(120, dtype=torch.uint8), 0, 255, torch.uint8), {}, id="activation"),
    pytest.param((torch.tensor(0.3), torch.tensor(4, dtype=torch.uint8), 0, 15, torch.uint8), {}, id="activation-4"),
    *(
        pytest.param(
            (torch.linspace(0.6, 1.4, 6) / high, None, low, high, torch.int8), {"axis": 0, "weight": True},
            id=f"channels-{bits}",
        )
        for bits, (low, high) in SIGNED.items()
    ),
    *(
        pytest.param(
            (normal(6, 4, seed=3) / high, None, low, high, torch.int8), {"axis": 1, "block": 8, "weight": True},
            id=f"blocks-{bits}",
        )
        for bits, (low, high) in SIGNED.items()
    ),
    pytest.param(
        (torch.full((6, 4), 0.2), torch.arange(24).reshape(6, 4) % 16, 0, 15, torch.uint8),
        {"axis": 1, "block": 8, "weight": True}, id="blocks-zero-points",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "options"), CASES)
def test_a_learned_scale_has_the_gradient_of_the_paper(arguments: Any, options: Any) -> None:
    scale, zero_point, low, high, _ = arguments
    rounded = learned(*arguments, **options)
    x, upstream = normal(6, 32, seed=1).requires_grad_(), normal(6, 32, seed=2)
    (rounded(x) * upstream).sum().backward()
    zero = torch.zeros(scale.shape) if zero_point is None else zero_point
    scales, zeros = (one.reshape(-1, 1) if options.get("axis") == 0 else
                     one.repeat_interleave(8, 1) if options.get("block") else one for one in (scale, zero))  # fmt: skip
    slopes, passes = lsq(x.detach(), scales, zeros, low, high, upstream)
    if options.get("block"):
        count, summed = 8, slopes.reshape(6, 4, 8).sum(2)
    else:  # an activation counts the elements of a sample, a weight those of a channel
        count, summed = 32, slopes.sum(1) if options else slopes.sum()
    assert rounded.scale is not None and rounded.scale.grad is not None
    np.testing.assert_allclose(rounded.scale.grad.numpy(), summed / np.sqrt(count * high), rtol=1e-4, atol=1e-5)
    assert x.grad is not None
    beyond = (x.grad != 0).numpy() & ~passes  # at most half a step beyond the range, where integers stay the same
    steps = (x.detach() / scales).numpy() + zeros.numpy()
    assert ((steps[beyond] > low - 0.501) & (steps[beyond] < high + 0.501)).all()
    np.testing.assert_allclose(x.grad.numpy()[passes], upstream.numpy()[passes], rtol=1e-6)


def test_beyond_the_range_the_gradient_is_the_difference_quotient() -> None:
    limits = -8, 7, torch.int8
    x, scale, h = torch.tensor([[1.0, 2.0, 0.75, 5.0], [-2.0, -1.0, -3.0, -0.85]]), torch.tensor([0.1, 0.1]), 1e-3
    rounded = learned(scale, None, *limits, axis=0, weight=True)
    rounded(x).sum().backward()
    above, below = (Rounded(scale + step, None, *limits, axis=0)(x).double().sum(1) for step in (h, -h))
    expected = (above - below) / (2 * h) / (4 * 7) ** 0.5
    assert rounded.scale is not None and rounded.scale.grad is not None
    torch.testing.assert_close(rounded.scale.grad.double(), expected, rtol=1e-3, atol=1e-4)


def test_weights_on_their_integers_do_not_pull_the_scale() -> None:
    integers = torch.tensor([[-7, -3, 0, 7], [7, 7, -7, 1]])
    scale = torch.tensor([0.013, 0.7])
    rounded = learned(scale, None, -7, 7, torch.int8, axis=0, weight=True)
    x = (integers * scale[:, None]).requires_grad_()
    assert torch.equal(rounded.integers(x), integers.to(torch.int8))
    rounded(x).sum().backward()
    assert rounded.scale is not None and rounded.scale.grad is not None
    torch.testing.assert_close(rounded.scale.grad, torch.zeros(2), rtol=0, atol=1e-4)
    assert x.grad is not None and torch.equal(x.grad, torch.ones(2, 4))


def test_no_step_makes_a_scale_vanish_or_change_its_sign() -> None:
    start = torch.tensor([[0.1, -0.1]])
    rounded = learned(start.clone(), None, -8, 7, torch.int8, axis=1, block=4, weight=True)
    optimizer = torch.optim.SGD(rounded.parameters(), 100.0)
    x = normal(1, 8) * 3
    for sign in (1.0, -1.0, 1.0):
        optimizer.zero_grad()
        (sign * rounded(x)).square().sum().mul(sign).backward()
        optimizer.step()
        assert bool((rounded.step() / start >= 2.0**-10).all()) and bool(rounded(x).isfinite().all())
    assert rounded.scale is not None
    with torch.no_grad():
        rounded.scale.copy_(-start)
    rounded(x).pow(2).sum().backward()
    assert rounded.scale.grad is not None and bool(rounded.scale.grad.ne(0).all())  # it comes back


def test_copies_and_states_hold_the_scale() -> None:
    rounded = learned(torch.tensor(0.1), None, -8, 7, torch.int8)
    other = learned(torch.tensor(0.5), None, -8, 7, torch.int8)
    other.load_state_dict(rounded.state_dict())
    for one in (copy.deepcopy(rounded), other):
        assert torch.equal(one(normal(9)), rounded(normal(9))) and len(list(one.parameters())) == 1
    assert "scale learned" in repr(rounded) and "int8 in [-8, 7]" in repr(rounded)
