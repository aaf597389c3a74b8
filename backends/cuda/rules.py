"""Linears in 8 bits and in 2:4: which ones have a kernel, and the forms that each may take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.backends.cuda import kernels
from graphopt.backends.cuda.kernels import MULTIPLE, SPARSE
from graphopt.ir.decline import Decline, Declined
from graphopt.ir.graph import Node, Value
from graphopt.ir.qdq.regions import has_row_scale
from graphopt.ir.rewrite import Builder, Choice, Match, Pattern, Recorder, Rule

OWN = "graphopt_cuda."
"""What the names of this target's operators begin with."""

FLOAT_OPERATORS = (f"{OWN}linear_sparse.default",)
"""Those of them that compute in floats of 16 bits."""

MAX_PADDING = 1.25
"""Most times that a weight may grow when zeros fill it up to a multiple: int8 gains about 2 where compute limits."""


# --- which linears have a kernel -----------------------------------------------------------------------------------


def why_no_kernel(site: Node) -> Decline | None:
    """Why no kernel reads the weight of a linear in 8 bits; None where one does."""
    weight, x = _dequantize_of(site.required("weight")), _dequantize_of(site.input)
    if weight is None or not all(value is None or value.is_constant for value in weight.operands):
        return Decline("weight_not_8_bit")
    stored, attributes = weight.required("x"), weight.attributes
    if stored.dtype not in MULTIPLE or weight.operand("zero_point") is not None:
        return Decline("weight_has_zero_point", dtype=str(stored.dtype))
    if attributes["axis"] != 0 or attributes["block"] or weight.required("scale").rank != 1:
        return Decline("weight_not_per_channel")
    if x is None:
        return Decline("float8_weight_only") if stored.dtype != torch.int8 else None
    if x.attributes["bits"] < 8:
        return Decline("activation_bits", bits=x.attributes["bits"])
    if x.required("x").dtype != stored.dtype or not _is_symmetric(x):
        return Decline("activation_not_symmetric", dtype=str(x.required("x").dtype), kernel=str(stored.dtype))
    if x.required("scale").rank != 0 and not has_row_scale(x):
        return Decline("activation_scale_shape")
    assert stored.shape is not None
    return why_too_much_padding(int(stored.shape[0]), int(stored.shape[1]), MULTIPLE[stored.dtype])


def why_too_much_padding(outputs: int, inputs: int, multiple: int) -> Decline | None:
    """Why a weight (outputs, inputs) is not filled up to multiples; None where it grows by at most MAX_PADDING."""
    filled = (outputs + -outputs % multiple) * (inputs + -inputs % multiple)
    growth = filled / (outputs * inputs)
    if growth <= MAX_PADDING:
        return None
    return Decline("too_much_padding", multiple=multiple, outputs=outputs, inputs=inputs, growth=growth)


def _why_dense(weight: Tensor | None) -> Decline | None:
    """Why the kernels for 2:4 do not take a weight; None where they do."""
    if weight is None or weight.dtype not in SPARSE:
        return Decline("weight_not_16_or_8_bit")
    outputs, inputs = SPARSE[weight.dtype]
    if weight.shape[0] % outputs or weight.shape[1] % inputs:
        return Decline("not_a_multiple_for_2_4", outputs=outputs, inputs=inputs, shape=list(weight.shape))
    return None if kernels.is_sparse(weight) else Decline("not_2_4")


def _dequantize_of(value: Value) -> Node | None:
    """The dequantize that makes a value, also through the cast of a site in 16 bits."""
    producer = value.producer
    if producer is not None and producer.kind == "cast":
        producer = producer.input.producer
    return producer if producer is not None and producer.kind == "dequantize" else None


def _is_symmetric(dequantize: Node) -> bool:
    """Whether its zero point is left out, or a constant of zeros."""
    zero_point = dequantize.operand("zero_point")
    tensor = None if zero_point is None else dequantize.graph.constant(zero_point)
    return zero_point is None or (tensor is not None and not bool(tensor.float().any()))


# --- patterns ------------------------------------------------------------------------------------------------------


def _linear(op: Recorder, x: str, weight: str, bias: str | None = None) -> Pattern:
    return op.linear(x, weight, bias)


def _is_product(m: Match) -> bool:
    return why_no_kernel(m.root) is None and _dequantize_of(m.x) is not None


def _is_weight_only(m: Match) -> bool:
    return why_no_kernel(m.root) is None and _dequantize_of(m.x) is None


def _is_sparse_product(m: Match) -> bool:
    dequantize = _dequantize_of(m.weight)
    stored = None if dequantize is None else m.root.graph.constant(dequantize.required("x"))
    return _is_product(m) and _why_dense(stored) is None


def _is_sparse_float(m: Match) -> bool:
    weight = m.root.weight
    return weight is not None and weight.dtype.itemsize == 2 and kernels.is_sparse(weight)


def _around(m: Match) -> list[Node]:
    """A product, what quantizes its input, and what dequantizes its operands: all that one kernel replaces."""
    wanted = {m.root}
    for value in (m.x, m.weight):
        while value.producer is not None and value.producer.kind in ("cast", "dequantize", "quantize", "row_scale"):
            node = value.producer
            wanted.add(node)
            producers = [operand.producer for operand in node.operands[1:] if operand is not None]
            wanted.update(one for one in producers if one is not None and one.kind == "row_scale")
            value = node.input
    return [node for node in m.root.graph.nodes if node in wanted]


# --- forms ---------------------------------------------------------------------------------------------------------


def _quantized_operands(op: Builder, m: Match) -> tuple[Value, Value, Tensor, Value]:
    """Of a product: its input in 8 bits and the scale of that, its weight in 8 bits and the scales of that."""
    x, weight = _dequantize_of(m.x), _dequantize_of(m.weight)
    assert x is not None and weight is not None
    stored = op.graph.constant(weight.required("x"))
    assert stored is not None
    return x.required("x"), x.required("scale"), stored, weight.required("scale")


def _dense(op: Builder, m: Match) -> Value:
    """cuBLAS, or Inductor's own kernel where that is faster; scales and bias are fused after the product."""
    x, scale, weight, weight_scale = _quantized_operands(op, m)
    kernel = "linear_int8" if weight.dtype == torch.int8 else "linear_float8"
    operands = x, scale, op.constant(_filled(weight)), weight_scale, m.bias
    return op(f"{OWN}{kernel}.default", *operands, dtype=m.root.result.dtype)


def _fused(op: Builder, m: Match) -> Value:
    """One Triton kernel that gives floats; it has no least number of rows, which helps when decoding."""
    x, scale, weight, weight_scale = _quantized_operands(op, m)
    if weight.dtype != torch.int8:
        raise Declined("triton_is_for_int8")
    if not kernels.has_triton():
        raise Declined("triton_missing")
    operands = x, scale, op.constant(_filled(weight)), weight_scale, m.bias
    return op(f"{OWN}linear_int8_fused.default", *operands, dtype=m.root.result.dtype)


def _sparse(op: Builder, m: Match) -> Value:
    """Tensor cores that skip the zeros, by CUTLASS or cuSPARSELt."""
    x, scale, weight, weight_scale = _quantized_operands(op, m)
    packed = map(op.constant, kernels.compress(weight))
    attributes: dict[str, Any] = {"outputs": weight.shape[0], "dtype": m.root.result.dtype}
    return op(f"{OWN}linear_int8_sparse.default", x, scale, *packed, weight_scale, m.bias, **attributes)


def _sparse_float(op: Builder, m: Match) -> Value:
    weight = m.root.weight
    if (reason := _why_dense(weight)) is not None:
        raise Declined(reason)
    assert weight is not None
    packed = map(op.constant, kernels.compress(weight))
    return op(f"{OWN}linear_sparse.default", m.x, *packed, m.bias, outputs=weight.shape[0])


def _weight_only(op: Builder, m: Match) -> Value:
    """Scaled after the product: the compiled kernel reads int8 weights, half the bytes, and bytes limit decoding."""
    dequantize = _dequantize_of(m.weight)
    assert dequantize is not None
    operands = m.x, dequantize.required("x"), dequantize.required("scale"), m.bias
    return op(f"{OWN}linear_weight_int8.default", *operands)


def _filled(weight: Tensor) -> Tensor:
    """A weight with zeros up to the multiples that kernels take; operators know its own size from its scales."""
    multiple = MULTIPLE[weight.dtype]
    outputs, inputs = (size + -size % multiple for size in weight.shape)
    filled = weight.new_zeros((outputs, inputs))
    filled[: weight.shape[0], : weight.shape[1]] = weight
    return filled


PRODUCT_24 = Choice(
    "8-bit-linear-2:4", _linear, {"2:4": _sparse, "dense": _dense, "triton": _fused},
    check=_is_sparse_product, around=_around,
)  # fmt: skip
PRODUCT = Choice("8-bit-linear", _linear, {"dense": _dense, "triton": _fused}, check=_is_product, around=_around)
FLOATS_24 = Choice("linear-2:4", _linear, {"2:4": _sparse_float, "dense": None}, check=_is_sparse_float)
WEIGHT_ONLY = Rule("int8-weight", _linear, _weight_only, check=_is_weight_only)
