"""Rounding to integers, against numpy, ONNX's reference evaluator and the bounds that rounding promises."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from graphopt.numerics import quantize
from tests.models import quantize_weight

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
    grid = quantize.fit(torch.from_numpy(weight), bits=bits, axis=axis)
    q, scale = grid.round(torch.from_numpy(weight)), grid.scale
    limit = 2 ** (bits - 1) - 1
    assert q.dtype == torch.int8 and scale.dtype == torch.float32 and q.shape == weight.shape
    assert scale.shape == (() if axis is None else (weight.shape[axis],))
    assert int(q.abs().max()) <= limit and bool((scale > 0).all())
    back = grid.values(q)
    along = [-1 if axis is not None and d == axis % weight.ndim else 1 for d in range(weight.ndim)]
    assert bool(((back - torch.from_numpy(weight)).abs() <= HALF_STEP * scale.reshape(along)).all())
    assert bool((back[torch.from_numpy(weight) == 0] == 0).all())


@given(WEIGHTS)
@settings(max_examples=50, deadline=None)
def test_weight_equals_its_definition_in_numpy(weight: Array) -> None:
    q, scale = quantize_weight(torch.from_numpy(weight))
    largest = np.abs(weight).reshape(weight.shape[0], -1).max(1)
    expected = (largest / np.float32(127)).astype(np.float32)
    expected[expected < np.finfo(np.float32).tiny] = 1
    assert np.array_equal(scale.numpy(), expected)
    steps = np.rint(weight / expected.reshape([-1] + [1] * (weight.ndim - 1)))
    assert np.array_equal(q.numpy(), np.clip(steps, -127, 127))


def test_halves_of_a_weight_go_to_even() -> None:
    q, scale = quantize_weight(torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5]), axis=None)
    assert scale.item() == 1 and q.tolist() == [127, 0, 2, 2, 0, -2]


def test_zero_and_subnormal_slices_get_scale_one() -> None:
    q, scale = quantize_weight(torch.tensor([[0.0, 0.0], [1e-40, -1e-43], [127.0, 1.0]]))
    assert scale.tolist() == [1, 1, 1] and q.tolist() == [[0, 0], [0, 0], [127, 1]]


@pytest.mark.parametrize("axis", [0, 1, None])
def test_layout_does_not_change_a_bit(axis: int | None) -> None:
    weight = seeded(33, 17)
    strided = weight.T.contiguous().T
    assert not strided.is_contiguous()
    for a, b in zip(quantize_weight(weight, axis=axis), quantize_weight(strided, axis=axis), strict=True):
        assert torch.equal(a, b) and b.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes_are_read_in_float32(dtype: torch.dtype) -> None:
    weight = seeded(4, 8).to(dtype)
    q, scale = quantize_weight(weight)
    expected_q, expected_scale = quantize_weight(weight.float())
    assert torch.equal(q, expected_q) and torch.equal(scale, expected_scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weight_names_the_first_value_that_is_not_finite(bad: float) -> None:
    weight = torch.zeros(2, 3)
    weight[1, 0] = weight[1, 2] = bad
    with pytest.raises(ValueError, match=r"weight has 2 of 6 values NaN or infinite, the first at \(1, 0\)"):
        quantize_weight(weight)


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ValueError, match="bits must be from 2 to 8"):
        quantize_weight(torch.ones(2), bits=bits)


@given(FLOATS, FLOATS, st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_activation_within_its_range_is_within_half_a_step(one: float, other: float, share: float) -> None:
    low, high = sorted((one, other))
    scale, zero_point = quantize.activation_parameters(low, high)
    assert scale > 0 and 0 <= zero_point <= 255
    x = np.array([low, high, low + share * (high - low), 0.0], np.float32)
    parameters: dict[str, Array] = {"scale": np.array(scale, np.float32), "zero": np.array(zero_point, np.uint8)}
    (q,) = evaluate("QuantizeLinear", {"x": x, **parameters}, {"y": TensorProto.UINT8})
    (back,) = evaluate("DequantizeLinear", {"x": q, **parameters}, {"y": TensorProto.FLOAT})
    assert bool((np.abs(back - x) <= HALF_STEP * scale).all())
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


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-127.0, 3.0, 1.0), (-3.0, 127.0, 1.0), (31.75, 63.5, 0.5), (0.0, 0.0, 1.0), (-1e-40, 1e-40, 1.0)],
)
def test_symmetric_scale(low: float, high: float, expected: float) -> None:
    assert quantize.symmetric_scale(low, high) == expected


@given(st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32))
def test_a_symmetric_scale_reaches_both_ends_within_half_a_step(one: float, other: float) -> None:
    low, high = sorted((one, other))
    scale = quantize.symmetric_scale(low, high)
    x = np.array([low, high, 0.0], np.float32)
    q = np.clip(np.rint(x / np.float32(scale)), -127, 127)
    assert bool((np.abs(q * np.float32(scale) - x) <= HALF_STEP * scale).all()) and q[2] == 0


def test_a_symmetric_scale_wants_a_finite_range() -> None:
    for low, high in ((1.0, 0.0), (0.0, float("inf")), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="range"):
            quantize.symmetric_scale(low, high)


@given(WEIGHTS.filter(lambda x: np.ptp(np.append(x, 0)) > 1e-30))
@settings(max_examples=60, deadline=None)
def test_activation_parameters_of_extremes_equal_onnx_dynamic_quantize_linear(x: Array) -> None:
    outputs = {"y": TensorProto.UINT8, "scale": TensorProto.FLOAT, "zero": TensorProto.UINT8}
    _, scale, zero = evaluate("DynamicQuantizeLinear", {"x": x}, outputs)
    assert quantize.activation_parameters(float(x.min()), float(x.max())) == (float(scale), int(zero))


FITS = [
    {"axis": 0},
    {"axis": 1},
    {"axis": None},
    {"block": 16},
    {"axis": 0, "symmetric": False},
    {"axis": None, "symmetric": False},
    {"block": 32, "symmetric": False},
]


def slices(weight: Tensor, axis: int | None = 0, block: int | None = None, symmetric: bool = True) -> list[Array]:
    """Which weights share a scale, in the order of the scales."""
    w = weight.numpy()
    if block is not None:
        return [row[start : start + block] for row in w for start in range(0, len(row), block)]
    return [w] if axis is None else list(np.moveaxis(w, axis, 0))


def nearest(weights: Array, scale: float, zero_point: int, low: int, high: int) -> Array:
    """What each weight becomes, found by trying every integer."""
    values = (np.arange(low, high + 1) - zero_point) * np.float64(scale)
    return np.asarray(values[np.abs(weights.reshape(-1, 1) - values).argmin(1)])


@pytest.mark.parametrize("options", FITS, ids=str)
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grid_rounds_to_the_nearest_of_its_values(options: dict[str, Any], search: bool, bits: int) -> None:
    weight = seeded(6, 64) * torch.arange(1.0, 7)[:, None]
    grid = quantize.fit(weight, bits=bits, search=search, **options)
    integers = grid.round(weight)
    symmetric = options.get("symmetric", True)
    assert integers.dtype == (torch.int8 if symmetric else torch.uint8) and integers.shape == weight.shape
    parts, back = slices(weight, **options), slices(grid.values(integers), **options)
    scales = grid.scale.flatten().tolist()
    zeros = [0] * len(scales) if grid.zero_point is None else grid.zero_point.flatten().tolist()
    assert len(scales) == len(parts) and all(0 <= zero < 2**bits for zero in zeros)
    lowest = -(2 ** (bits - 1)) + (0 if "block" in options else 1)
    assert (grid.low, grid.high) == ((lowest, 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1))
    for part, found, scale, zero in zip(parts, back, scales, zeros, strict=True):
        expected = nearest(part, scale, zero, grid.low, grid.high)
        np.testing.assert_allclose(found.flatten(), expected, atol=1e-5 * abs(scale))
        if not search:
            asymmetric_end = 1.0 if "block" in options and symmetric else 0.5  # the upper end has a step less
            assert np.abs(found - part).max() <= asymmetric_end * (1 + 1e-5) * abs(scale)
    scale, zero_point = grid.expanded(weight)
    torch.testing.assert_close((integers - zero_point) * scale, grid.values(integers))


@pytest.mark.parametrize("options", FITS, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_search_misses_what_the_best_of_36_shares_does(options: dict[str, Any], bits: int) -> None:
    weight = seeded(64, 64, seed=1) ** 3
    missed = best = 0.0
    whole, searched = (quantize.fit(weight, bits=bits, search=search, **options) for search in (False, True))
    zeros = torch.zeros_like(whole.scale) if whole.zero_point is None else whole.zero_point
    rows = zip(slices(weight, **options), whole.scale.flatten(), searched.scale.flatten(), zeros.flatten(), strict=True)
    for part, before, after, zero in rows:
        errors = []
        for shrink in np.arange(1, 0.29, -0.02):
            kept = nearest(part, float(before) * shrink, int(zero), whole.low, whole.high)
            errors.append(np.square(kept - part.flatten()).sum())
        found = nearest(part, float(after), int(zero), whole.low, whole.high)
        missed, best = missed + np.square(found - part.flatten()).sum(), best + min(errors)
        assert 0.29 <= float(after / before) <= 1
    assert missed <= (1.01 if bits == 8 else 1.002) * best


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("options", FITS, ids=str)
def test_search_is_the_same_for_weights_of_any_size(options: dict[str, Any], size: float) -> None:
    weight = seeded(4, 64, seed=1) ** 3
    plain, sized = (quantize.fit(weight * one, bits=4, search=True, **options) for one in (1.0, size))
    torch.testing.assert_close(sized.scale / size, plain.scale, rtol=1e-3, atol=0)


@pytest.mark.parametrize("options", FITS, ids=str)
def test_search_counts_errors_by_importance(options: dict[str, Any]) -> None:
    weight, importance = seeded(64, 64, seed=1) ** 3, seeded(64, 64, seed=2) ** 4
    whole, plain = (quantize.fit(weight, bits=3, search=search, **options) for search in (False, True))
    searched = quantize.fit(weight, bits=3, search=True, importance=importance, **options)
    zeros = torch.zeros_like(whole.scale) if whole.zero_point is None else whole.zero_point
    scales = zip(*(grid.scale.flatten().tolist() for grid in (whole, plain, searched)), strict=True)
    missed = best = unaware = 0.0
    for part, counts, zero, (before, unweighted, after) in zip(
        slices(weight, **options), slices(importance, **options), zeros.flatten(), scales, strict=True
    ):

        def error(scale: float, part: Array = part, counts: Array = counts, zero: Tensor = zero) -> float:
            missed = nearest(part, scale, int(zero), whole.low, whole.high) - part.flatten()
            return float(counts.flatten() @ np.square(missed))

        best += min(error(before * shrink) for shrink in np.arange(1, 0.29, -0.02))
        missed, unaware = missed + error(after), unaware + error(unweighted)
    assert missed <= 1.002 * best and missed < unaware


def test_a_block_puts_its_largest_weight_at_the_lower_end() -> None:
    weight = torch.zeros(2, 16)
    weight[0, 3], weight[0, 4], weight[1, 5], weight[1, 6] = 4.0, -1.0, -4.0, 3.6
    grid = quantize.fit(weight, bits=4, block=16)
    integers = grid.round(weight)
    assert grid.scale.tolist() == [[-0.5], [0.5]]
    assert integers[0, 3:5].tolist() == [-8, 2] and integers[1, 5:7].tolist() == [-8, 7]


def test_seven_bits_do_not_saturate_in_sixteen() -> None:
    integers, _ = quantize_weight(seeded(4, 64), bits=7)
    assert int(integers.abs().max()) == 63 and 2 * 255 * 63 < 2**15


@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [True, False])
def test_zeros_and_subnormals_stay_zero_and_zero_is_exact(block: int | None, symmetric: bool, search: bool) -> None:
    weight = seeded(4, 32)
    weight[0], weight[1] = 0, 1e-40
    weight[:, ::3] = 0
    grid = quantize.fit(weight, bits=4, block=block, symmetric=symmetric, search=search)
    values = grid.values(grid.round(weight))
    assert bool((values[:2] == 0).all()) and bool((values[:, ::3] == 0).all())
    assert bool((grid.scale[:2] == 1).all())


@pytest.mark.parametrize("sign", [1, -1])
def test_one_sided_weights_use_all_unsigned_integers(sign: int) -> None:
    weight = sign * torch.linspace(0.5, 15, 64).reshape(2, 32)
    grid = quantize.fit(weight, bits=4, axis=None, symmetric=False)
    assert grid.scale == 1 and grid.zero_point == (0 if sign > 0 else 15)


def test_blocks_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"block 32 does not divide 48 inputs \(weight \[2, 48\]\)"):
        quantize.fit(torch.ones(2, 48), block=32)
    with pytest.raises(ValueError, match="block must be one of 16, 32, 64, 128, 256, got 8"):
        quantize.fit(torch.ones(2, 48), block=8)
    with pytest.raises(ValueError, match=r"blocks need a matrix, got shape \[2, 16, 1\]"):
        quantize.fit(torch.ones(2, 16, 1), block=16)


@given(st.sampled_from([2, 4, 8]), st.integers(1, 9), st.data())
@settings(max_examples=60, deadline=None)
def test_packed_numbers_lie_low_bits_first(bits: int, count: int, data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))
    packed = quantize.pack(torch.tensor([numbers], dtype=torch.uint8), bits)
    whole = int.from_bytes(bytes(packed[0].tolist()), "little")
    assert whole == sum(number << (bits * place) for place, number in enumerate(numbers))
    assert packed.shape[1] == -(-count * bits // 8)
    assert quantize.unpack(packed, bits, count).tolist() == [numbers]
    signed = (torch.tensor([numbers]) - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(quantize.pack(signed, bits), packed)


def test_three_bits_have_no_packed_form() -> None:
    with pytest.raises(ValueError, match="bits must be 2, 4 or 8 to be packed, got 3"):
        quantize.pack(torch.zeros(1, 8, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="bits must be 2, 4 or 8 to be packed, got 3"):
        quantize.unpack(torch.zeros(1, 8, dtype=torch.uint8), 3, 8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 32])
def test_packed_blocks_are_what_onnxruntime_multiplies(bits: int, symmetric: bool, block: int) -> None:
    n, k = 5, 96  # an odd number of blocks of 32: zero points of 4 bits need a filled byte
    weight, x = seeded(n, k), seeded(3, k, seed=1)
    grid = quantize.fit(weight, bits=bits, block=block, symmetric=symmetric)
    integers = grid.round(weight)
    constants = {
        "B": quantize.pack(integers.reshape(n, -1, block), bits).numpy(),
        "scales": grid.scale.numpy(),
    }
    if grid.zero_point is not None:
        constants["zero_points"] = quantize.pack(grid.zero_point, bits).numpy()
    node = helper.make_node(
        "MatMulNBits", ["A", *constants], ["Y"], domain="com.microsoft", K=k, N=n, bits=bits, block_size=block
    )
    graph = helper.make_graph(
        [node],
        "blocks",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, [3, k])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [3, n])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"A": x.numpy()})
    np.testing.assert_allclose(found, x.numpy() @ grid.values(integers).numpy().T, rtol=1e-4, atol=1e-4)


def test_float8_weights_reach_the_largest_number_and_miss_by_half_a_step() -> None:
    weight = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    steps, scale = quantize.float8_weight(weight)
    assert steps.dtype == torch.float8_e4m3fn and scale.shape == (5,) and scale[3] == 1
    largest = steps.float().abs().amax(1)
    assert largest.tolist() == [448, 448, 448, 0, 448]
    missed = (weight.double() - steps.double() * scale.double()[:, None]).abs()
    allowed = torch.maximum(weight.double().abs() * 2**-4, scale.double()[:, None] * 2**-10)
    assert bool((missed <= allowed * (1 + 1e-6)).all())
    with pytest.raises(ValueError, match=r"weight .*\(1, 2\)|weight.*\[1, 2\]|weight"):
        quantize.float8_weight(torch.tensor([[0.0, 1, 2], [0, 1, torch.nan]]))


def test_a_scale_about_zero_reaches_the_largest_number_of_a_type() -> None:
    for dtype, largest in ((torch.int8, 127.0), (torch.float8_e4m3fn, 448.0)):
        assert quantize.largest(dtype) == largest
        assert quantize.symmetric_scale(-2.0, 1.0, largest) == pytest.approx(2 / largest)
