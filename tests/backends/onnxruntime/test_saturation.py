"""Int8 weights of 8 bits on CPUs whose products saturate: uint8 to onnxruntime, and the same numbers."""

from __future__ import annotations

import pytest
import torch

from graphopt.backends.onnxruntime import attention, conv_int8, linear_int8, saturation
from graphopt.backends.onnxruntime.target import OnnxRuntime
from graphopt.ir.graph import Graph, Node
from graphopt.ir.rewrite import Choice, rewrite
from graphopt.numerics.metrics import sqnr, within_tolerance
from tests.language import build

X = "S[]:values(0.02), Z[]:values(128):uint8"
WEIGHT = ":values(-127,127,127,120,-99,127,127):int8"
LINEAR = f"i = quantize(x[5,32], {X})\ny = linear_int8(i, S, Z, W[16,32]{WEIGHT}, V[16]:values(0.01,0.02), B[16])"
DYNAMIC = f"""
    s, z = choose_qparams(x[5,32])
    y = linear_int8(quantize(x, s, z), s, z, W[16,32]{WEIGHT}, V[16]:values(0.01,0.02), B[16])"""
SHARED = f"""
    s, z = choose_qparams(x[5,32])
    i = quantize(x, s, z)
    a = linear_int8(i, s, z, W[16,32]{WEIGHT}, V[16]:values(0.01,0.02), B[16])
    b = linear_int8(i, s, z, U[16,32]{WEIGHT}, V)
    y = add(a, b)"""
CLOSED = (
    f"{LINEAR.replace('y =', 'h =')}\nj = quantize(h, T[]:values(1.0), Z)\n"
    "y = linear_int8(j, T, Z, U[4,16]:int8:values(1,-2,3), P[4]:ones)"
)
CONV = (
    f"i = quantize(x[3,8,7,7], {X})\nc = conv_int8(i, S, Z, W[16,8,3,3]{WEIGHT}, V[16]:values(0.01,0.02), "
    "T[]:values(3.0), Z, B[16], stride=[1,1], padding=[1,1,1,1], dilation=[1,1], groups=1)\ny = dequantize(c, T, Z)"
)
ATTENTION = f"""
    i = quantize(x[2,6,32], {X})
    q = linear_int8(i, S, Z, Q[16,32]{WEIGHT}, V[16]:values(0.001), B[16])
    k = linear_int8(i, S, Z, K[16,32]{WEIGHT}, V, B)
    v = linear_int8(i, S, Z, W[16,32]{WEIGHT}, V, B)
    y = attention(q, k, v, heads=4, kv_heads=4)"""
CHAIN = """
    i = quantize(a[4,24], S[]:values(0.02), Z[]:values(128):uint8)
    j = quantize(b[24,6], S, Z)
    y = matmul(dequantize(i, S, Z), dequantize(j, S, Z))"""

closing = linear_int8.TO_INTEGERS
CASES: dict[str, tuple[str, Choice, str, str]] = {
    "MatMulIntegerToFloat": (LINEAR, linear_int8.STATIC, "MatMulIntegerToFloat",
                             "com.microsoft.MatMulIntegerToFloat"),
    "MatMulIntegerToFloat, at a computed scale": (SHARED, linear_int8.DYNAMIC, "MatMulIntegerToFloat",
                                                  "com.microsoft.MatMulIntegerToFloat"),
    "DynamicQuantizeMatMul": (DYNAMIC, linear_int8.DYNAMIC, "DynamicQuantizeMatMul",
                              "com.microsoft.DynamicQuantizeMatMul"),
    "QGemm": (CLOSED, closing, "QGemm", "com.microsoft.QGemm"),
    "QLinearConv": (CONV, conv_int8.SMALL, "QLinearConv", "onnx.QLinearConv"),
    "one tall image": (CONV, conv_int8.SMALL, "one tall image", "com.microsoft.QLinearConv"),
    "QAttention": (ATTENTION, attention.FORMS, "QAttention", "com.microsoft.QAttention"),
}  # fmt: skip


def extreme(graph: Graph) -> dict[str, torch.Tensor]:
    """Mostly at the ends of what the integers hold."""
    generator = torch.Generator().manual_seed(0)
    shapes = {value.name: [int(size) for size in value.shape or ()] for value in graph.inputs}
    return {name: 3 * torch.randn(shape, generator=generator).sign() + 0.1 for name, shape in shapes.items()}


def lowered(graph: Graph, choice: Choice, form: str, cpu: str) -> Graph:
    made = graph.clone()
    assert rewrite(made, [choice.only(form)])[choice.name].hits
    made.sweep()
    return OnnxRuntime(cpu=cpu).lower(made)[0]


def weights(node: Node) -> list[torch.dtype]:
    """The types of the integers that a node holds, zero points of one number left out."""
    held = [value for value in node.operands if value is not None and value.is_constant and value.rank]
    return [value.dtype for value in held if value.dtype in (torch.int8, torch.uint8)]


@pytest.mark.parametrize("case", CASES)
def test_weights_of_8_bits_are_multiplied_without_saturation(case: str) -> None:
    text, choice, form, kind = CASES[case]
    graph = build("onnx", text)
    feeds, low = extreme(graph), lowered(graph, choice, form, "avx2")
    assert set(weights(low.sites(kind)[0])) == {torch.uint8}
    expected, found = graph.evaluate(feeds, graph.outputs)[0], OnnxRuntime().compile(low)(feeds)[0]
    assert expected.std() > 0
    if case not in ("QGemm", "QLinearConv", "one tall image"):
        assert within_tolerance(expected, found)
    else:  # where the last bit of a float decides, rounding goes one step on
        assert sqnr(expected, found) > 35


@pytest.mark.parametrize(("cpu", "most"), [("avx512_vnni", 127), ("avx2", 64)])
@pytest.mark.parametrize("case", CASES)
def test_weights_stay_signed_where_nothing_saturates(case: str, cpu: str, most: int) -> None:
    text, choice, form, kind = CASES[case]
    text = text.replace("127", str(most)).replace("120", "60").replace("-99", "-9")
    assert set(weights(lowered(build("onnx", text), choice, form, cpu).sites(kind)[0])) == {torch.int8}


def test_a_zero_point_of_weights_moves_with_them() -> None:
    """As in files that others wrote: of 137 now, where it was 9."""
    operands = f"i, W[32,16]{WEIGHT}, S, V[16]:values(0.01,0.02), Z, N[16]:values(9):int8"
    graph = build("onnx", f"i = quantize(x[5,32], {X})\ny = com.microsoft.MatMulIntegerToFloat({operands})")
    feeds, low = extreme(graph), graph.clone()
    rewrite(low, saturation.RULES)
    (node,) = low.sites("com.microsoft.MatMulIntegerToFloat")
    stored = [low.constant(node.operands[place]) for place in (1, 5)]  # type: ignore[arg-type]
    assert all(one is not None and one.dtype is torch.uint8 for one in stored)
    before = graph.sites("com.microsoft.MatMulIntegerToFloat")[0].operands
    weight, scales = (graph.constant(before[place]) for place in (1, 3))  # type: ignore[arg-type]
    assert weight is not None and scales is not None
    steps = (feeds["x"] / 0.02).round().clamp(-128, 127)
    expected = (steps.double() @ (weight.double() - 9) * 0.02 * scales).float()
    assert within_tolerance(expected, OnnxRuntime().compile(low)(feeds)[0])


@pytest.mark.parametrize("cpu", ["avx2", "avx512_vnni"])
def test_the_right_side_of_a_product_of_activations(cpu: str) -> None:
    graph = build("onnx", CHAIN)
    low, _ = OnnxRuntime(cpu=cpu).lower(graph)
    (product,) = low.sites("com.microsoft.MatMulIntegerToFloat")
    right = product.operands[1]
    assert right is not None and right.dtype is (torch.uint8 if cpu == "avx2" else torch.int8)
    if cpu == "avx2":  # exact on every CPU
        feeds = extreme(graph)
        assert within_tolerance(graph.evaluate(feeds, graph.outputs)[0], OnnxRuntime().compile(low)(feeds)[0])
