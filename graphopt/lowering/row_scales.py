"""Activations with a scale for each row -> activations with the scale 1, and a product with the scales after a linear:

    quantize(x, s, z)                     ->  quantize(x / s, 1, z)
    linear_int8(q, s, z, W, v, b)         ->  linear_int8(q, 1, z, W, v) * s + b
    linear(dequantize(q, s, z), W, b)     ->  linear(dequantize(q, 1, z), W) * s + b

Kernels multiply integers of one scale: this is how targets without kernels for rows compute with them. The integers
stay the same, and each row is computed by itself, so that its result does not depend on the others.
"""

from __future__ import annotations

import torch

from graphopt.ir.graph import Value
from graphopt.ir.qdq.regions import has_row_scale
from graphopt.ir.rewrite import Builder, Match, Pattern, Recorder, Rule


def quantize(op: Recorder, x: str, scale: str, zero_point: str) -> Pattern:
    return op.quantize(x, scale, zero_point, bits=8)


def linear_int8(op: Recorder, x: str, scale: str, zero_point: str, weight: str, weight_scale: str,
                bias: str | None = None) -> Pattern:  # fmt: skip
    return op.linear_int8(x, scale, zero_point, weight, weight_scale, bias)


def _linear(op: Recorder, x: str, scale: str, zero_point: str, weight: str, bias: str | None = None) -> Pattern:
    return op.linear(op.dequantize(x, scale, zero_point, bits=8, bind="activation"), weight, bias)


def one(op: Builder) -> Value:
    """The scale 1, a constant that all rewrites of a round share."""
    return op.once("scale of divided rows", lambda: op.constant(torch.ones(())))


def rescaled(op: Builder, product: Value, scale: Value, bias: Value | None) -> Value:
    """A product of integers times the scales of its rows, and the bias."""
    y = op.mul(product, scale)
    return y if bias is None else op.add(y, bias)


def divided(op: Builder, m: Match) -> Value:
    """A quantize of x / scale with the scale 1, in place of one with a scale for each row."""
    return op.quantize(op.div(m.x, m.scale), one(op), m.zero_point)


def _integer_product(op: Builder, m: Match) -> Value:
    product = op.linear_int8(m.x, one(op), m.zero_point, m.weight, m.weight_scale)
    return rescaled(op, product, m.scale, m.bias)


def _product(op: Builder, m: Match) -> Value:
    steps = op.dequantize(m.x, one(op), m.zero_point)
    return rescaled(op, op.linear(steps, m.weight), m.scale, m.bias)


QUANTIZE = Rule("quantize-rows", quantize, divided, check=lambda m: has_row_scale(m.root))
LINEAR_INT8 = Rule("linear-int8-of-rows", linear_int8, _integer_product, check=lambda m: m.scale.rank != 0)
LINEAR = Rule("linear-of-rows", _linear, _product, check=lambda m: has_row_scale(m.activation))
