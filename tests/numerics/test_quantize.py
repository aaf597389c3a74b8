"""Rounding to integers, against numpy, ONNX's reference evaluator and the bounds that rounding promises."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from graphopt.numerics import quantize

Array = np.ndarray[Any, Any]
FLOATS = st.floats(-1e6, 1e6, width=32)
WEIGHTS = arrays(np.float32, array_shapes(min_dims=1, max_dims=4, max_side=6), elements=FLOATS)
HALF_STEP = 0.5 * (1 + 1e-5)
"""Half a step, and float32's rounding of up to 255 steps."""


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def evaluate(op: str, feeds: Mapping[str, Array], outputs: Mapping[str, int]) -> list[Array]:
    """Run one ONNX op of opset 21 in the reference evaluator."""
    types = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.uint8): TensorProto.UINT8}
    inputs = [helper.make_tensor_value_info(n, types[v.dtype], v.shape) for n, v in feeds.items()]
    results = [helper.make_tensor_value_info(n, t, None) for n, t in outputs.items()]
    graph = helper.make_graph([helper.make_node(op, list(feeds), list(outputs))], op, inputs, results)
    evaluator = ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    found = evaluator.run(None, dict(feeds))
    assert isinstance(found, list)
    return found


@given(WEIGHTS, st.integers(2, 8), st.data())
@settings(max_examples=100, deadline=None)
def test_weight_is_within_half_a_step(weight: Array, bits: int, data: st.DataObject) -> None:
    axis = data.draw(st.none() | st.integers(-weight.ndim, weight.ndim - 1))
    q, scale = quantize.quantize_weight(torch.from_numpy(weight), bits=bits, axis=axis)
    limit = 2 ** (bits - 1) - 1
    assert q.dtype == torch.int8 and scale.dtype == torch.float32 and q.shape == weight.shape
    assert scale.shape == (() if axis is None else (weight.shape[axis],))
    assert int(q.abs().max()) <= limit and bool((scale > 0).all())
    back = quantize.dequantize_weight(q, scale, axis)
    along = [-1 if axis is not None and d == axis % weight.ndim else 1 for d in range(weight.ndim)]
    assert bool(((back - torch.from_numpy(weight)).abs() <= HALF_STEP * scale.reshape(along)).all())
    assert bool((back[torch.from_numpy(weight) == 0] == 0).all())


@given(WEIGHTS)
@settings(max_examples=50, deadline=None)
def test_weight_equals_its_definition_in_numpy(weight: Array) -> None:
    q, scale = quantize.quantize_weight(torch.from_numpy(weight))
    largest = np.abs(weight).reshape(weight.shape[0], -1).max(1)
    expected = (largest / np.float32(127)).astype(np.float32)
    expected[expected < np.finfo(np.float32).tiny] = 1
    assert np.array_equal(scale.numpy(), expected)
    steps = np.rint(weight / expected.reshape([-1] + [1] * (weight.ndim - 1)))
    assert np.array_equal(q.numpy(), np.clip(steps, -127, 127))


def test_halves_of_a_weight_go_to_even() -> None:
    q, scale = quantize.quantize_weight(torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5]), axis=None)
    assert scale.item() == 1 and q.tolist() == [127, 0, 2, 2, 0, -2]


def test_zero_and_subnormal_slices_get_scale_one() -> None:
    q, scale = quantize.quantize_weight(torch.tensor([[0.0, 0.0], [1e-40, -1e-43], [127.0, 1.0]]))
    assert scale.tolist() == [1, 1, 1] and q.tolist() == [[0, 0], [0, 0], [127, 1]]


@pytest.mark.parametrize("axis", [0, 1, None])
def test_layout_does_not_change_a_bit(axis: int | None) -> None:
    weight = seeded(33, 17)
    strided = weight.T.contiguous().T
    assert not strided.is_contiguous()
    for a, b in zip(
        quantize.quantize_weight(weight, axis=axis), quantize.quantize_weight(strided, axis=axis), strict=True
    ):
        assert torch.equal(a, b) and b.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes_are_read_in_float32(dtype: torch.dtype) -> None:
    weight = seeded(4, 8).to(dtype)
    q, scale = quantize.quantize_weight(weight)
    expected_q, expected_scale = quantize.quantize_weight(weight.float())
    assert torch.equal(q, expected_q) and torch.equal(scale, expected_scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weight_names_the_first_value_that_is_not_finite(bad: float) -> None:
    weight = torch.zeros(2, 3)
    weight[1, 0] = weight[1, 2] = bad
    with pytest.raises(ValueError, match=r"weight has 2 of 6 values NaN or infinite, the first at \(1, 0\)"):
        quantize.quantize_weight(weight)


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ValueError, match="bits must be from 2 to 8"):
        quantize.quantize_weight(torch.ones(2), bits=bits)


@given(FLOATS, FLOATS, st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_activation_within_its_range_is_within_half_a_step(one: float, other: float, share: float) -> None:
    low, high = sorted((one, other))
    scale, zero_point = quantize.activation_parameters(low, high)
    assert scale > 0 and 0 <= zero_point <= 255
    x = torch.tensor([low, high, low + share * (high - low), 0.0])
    back = quantize.dequantize_activation(quantize.quantize_activation(x, scale, zero_point), scale, zero_point)
    assert bool(((back - x).abs() <= HALF_STEP * scale).all())
    assert back[3] == 0


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 255.0, (1.0, 0)),
        (-255.0, 0.0, (1.0, 255)),
        (-128.0, 127.0, (1.0, 128)),
        (51.0, 255.0, (1.0, 0)),  # widened to hold 0
        (-255.0, -51.0, (1.0, 255)),
        (-0.5, 254.5, (1.0, 0)),  # halves go to even
        (-1.5, 253.5, (1.0, 2)),
        (0.0, 0.0, (1.0, 0)),
        (0.0, 1e-40, (1.0, 0)),
    ],
)
def test_activation_parameters(low: float, high: float, expected: tuple[float, int]) -> None:
    assert quantize.activation_parameters(low, high) == expected
    assert quantize.activation_parameters(torch.tensor(low), torch.tensor(high)) == expected


@pytest.mark.parametrize(
    ("low", "high"),
    [(float("nan"), 1.0), (0.0, float("nan")), (0.0, float("inf")), (float("-inf"), 0.0), (1e39, 1e39), (-3e38, 3e38)],
)
def test_a_range_that_is_not_finite(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="not finite in float32"):
        quantize.activation_parameters(low, high)


def test_a_range_upside_down() -> None:
    with pytest.raises(ValueError, match=r"\[2.0, 1.0\] has low above high"):
        quantize.activation_parameters(2.0, 1.0)


@given(WEIGHTS, st.floats(2**-10, 1e3, width=32), st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_activation_equals_onnx_quantize_linear(x: Array, scale: float, zero_point: int) -> None:
    # the evaluator rounds through int32: |x / scale| stays below 2**31
    feeds = {"x": x, "scale": np.array(scale, np.float32), "zero": np.array(zero_point, np.uint8)}
    (expected,) = evaluate("QuantizeLinear", feeds, {"y": TensorProto.UINT8})
    q = quantize.quantize_activation(torch.from_numpy(x), scale, zero_point)
    assert q.dtype == torch.uint8 and np.array_equal(q.numpy(), expected)
    feeds = {"x": expected, "scale": feeds["scale"], "zero": feeds["zero"]}
    (expected,) = evaluate("DequantizeLinear", feeds, {"y": TensorProto.FLOAT})
    assert np.array_equal(quantize.dequantize_activation(q, scale, zero_point).numpy(), expected)


@given(WEIGHTS.filter(lambda x: np.ptp(np.append(x, 0)) > 1e-30))
@settings(max_examples=60, deadline=None)
def test_dynamic_equals_onnx_dynamic_quantize_linear(x: Array) -> None:
    outputs = {"y": TensorProto.UINT8, "scale": TensorProto.FLOAT, "zero": TensorProto.UINT8}
    y, expected_scale, expected_zero = evaluate("DynamicQuantizeLinear", {"x": x}, outputs)
    scale, zero_point = quantize.dynamic_parameters(torch.from_numpy(x))
    assert (scale, zero_point) == (float(expected_scale), int(expected_zero))
    assert np.array_equal(quantize.quantize_activation(torch.from_numpy(x), scale, zero_point).numpy(), y)


def test_dynamic_of_zeros_of_nothing_and_of_nan() -> None:
    assert quantize.dynamic_parameters(torch.zeros(3)) == (1.0, 0)
    with pytest.raises(ValueError, match="no elements"):
        quantize.dynamic_parameters(torch.zeros(0, 3))
    with pytest.raises(ValueError, match=r"first at \(1,\)"):
        quantize.dynamic_parameters(torch.tensor([0.0, float("nan")]))
