"""Int8 weights as uint8 on onnxruntime, for CPUs whose sums of uint8 x int8 products saturate at 16 bits.

Those are x86 with AVX2 or AVX-512 and without VNNI: they add two products in 16 bits, and two of 8 bits may be as large
as 2 * 255 * 127. Products of uint8 and uint8 are added in 32 bits there, and take as long (1024x384x1536 on AVX2:
16.4 ms, with int8 16.8). With VNNI nothing saturates, and int8 is faster.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from graphopt.ir.graph import Value
from graphopt.ir.rewrite import Builder, Match, Pattern, Recorder, Rule
from graphopt.lowering.saturation import SAFE, max_abs

_OFFSET = 128


def _linear(op: Recorder, x: str, weight: str, scale: str, weight_scale: str, zero_point: str,
            weight_zero: str | None = None, bias: str | None = None) -> Pattern:  # fmt: skip
    operands = x, weight, scale, weight_scale, zero_point, weight_zero, bias
    return Pattern("com.microsoft.MatMulIntegerToFloat", operands, {})


def _dynamic_linear(op: Recorder, x: str, weight: str, weight_scale: str, weight_zero: str | None = None,
                    bias: str | None = None) -> Pattern:  # fmt: skip
    return Pattern("com.microsoft.DynamicQuantizeMatMul", (x, weight, weight_scale, weight_zero, bias), {})


def _gemm(op: Recorder, x: str, scale: str, zero_point: str, weight: str, weight_scale: str, weight_zero: str,
          bias: str | None = None, y_scale: str | None = None, y_zero_point: str | None = None) -> Pattern:  # fmt: skip
    operands = x, scale, zero_point, weight, weight_scale, weight_zero, bias, y_scale, y_zero_point
    return Pattern("com.microsoft.QGemm", operands, {})


def _conv(kind: str) -> Callable[..., Pattern]:
    def pattern(op: Recorder, x: str, scale: str, zero_point: str, weight: str, weight_scale: str, weight_zero: str,
                y_scale: str, y_zero_point: str, bias: str | None = None) -> Pattern:  # fmt: skip
        operands = x, scale, zero_point, weight, weight_scale, weight_zero, y_scale, y_zero_point, bias
        return Pattern(kind, operands, {})

    return pattern


def _attention(op: Recorder, x: str, weight: str, bias: str, scale: str, weight_scale: str, mask: str | None = None,
               zero_point: str | None = None, weight_zero: str | None = None) -> Pattern:  # fmt: skip
    operands = x, weight, bias, scale, weight_scale, mask, zero_point, weight_zero
    return Pattern("com.microsoft.QAttention", operands, {})


def _may_saturate(m: Match) -> bool:
    """Whether its int8 weights are stored, and may saturate."""
    if not all(value is None or value.is_constant for value in (m.weight, m.weight_zero)):
        return False
    weight = m.root.graph.constant(m.weight)
    return weight is not None and weight.dtype is torch.int8 and max_abs(weight) > SAFE


def _unsigned(op: Builder, m: Match) -> Value:
    """Weight and zero point are both 128 higher, so that the products stay the same."""
    weight, scales = op.graph.constant(m.weight), op.graph.constant(m.weight_scale)
    zero = op.graph.constant(m.weight_zero) if m.weight_zero is not None else None
    assert weight is not None and scales is not None  # stored, as in all forms
    zero = torch.zeros_like(scales, dtype=torch.int8) if zero is None else zero
    zero_index = _ZERO_POINTS[m.root.kind]
    operands = list(m.root.operands) + [None] * (zero_index + 1 - len(m.root.operands))
    for index, tensor in ((operands.index(m.weight), weight), (zero_index, zero)):
        operands[index] = op.constant((tensor.short() + _OFFSET).to(torch.uint8))
    return op.graph.emit(m.root, *operands, at=op.at)


_ZERO_POINTS = {
    "com.microsoft.DynamicQuantizeMatMul": 3, "com.microsoft.MatMulIntegerToFloat": 5, "com.microsoft.QGemm": 5,
    "onnx.QLinearConv": 5, "com.microsoft.QLinearConv": 5, "com.microsoft.QAttention": 7,
}  # fmt: skip
"""By operator, the index of the weight's zero point among the operands."""

_PATTERNS: dict[str, Callable[..., Pattern]] = {
    "unsigned-linear": _linear,
    "unsigned-dynamic-linear": _dynamic_linear,
    "unsigned-gemm": _gemm,
    "unsigned-conv": _conv("onnx.QLinearConv"),
    "unsigned-channels-last-conv": _conv("com.microsoft.QLinearConv"),
    "unsigned-attention": _attention,
}
RULES = tuple(Rule(name, pattern, _unsigned, check=_may_saturate) for name, pattern in _PATTERNS.items())
"""The last stage: these rules match what all others have emitted."""
