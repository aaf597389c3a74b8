"""What quantized integers stand for: the floats of stored integers, and the range that saturation clips to."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.ops import OPS

_HALF_STEP = 0.5 + 1e-3
"""With room for the rounding of float32."""


def stored(graph: Graph, value: Value | None) -> Tensor | None:
    """The tensor of a constant, or of a dequantize of constants in floats; None for a value that is computed."""
    maker = value.producer if value is not None else None
    if maker is None or maker.kind != "dequantize":
        return None if value is None else graph.constant(value)
    parts = [None if operand is None else graph.constant(operand) for operand in maker.operands]
    if any(operand is not None and part is None for operand, part in zip(maker.operands, parts, strict=True)):
        return None
    floats: Tensor = OPS["dequantize"].reference(*parts, **maker.attributes)
    return floats


def saturates(bounded: Node, scale: Tensor | float, zero_point: float) -> bool:
    """Whether uint8 of a scale (or of each of several) saturates within the bounds of a relu or clip, to half a step.

    Then the relu or clip changes nothing that quantization keeps.
    """
    low, high = (0.0, None) if bounded.kind == "relu" else (bounded.attributes["low"], bounded.attributes["high"])
    scale = torch.as_tensor(scale, dtype=torch.float64)
    below = low is None or bool((low / scale + zero_point <= _HALF_STEP).all())
    return below and (high is None or bool((high / scale + zero_point >= 255 - _HALF_STEP).all()))


LARGEST_BIAS = 2**30
"""In steps of the products, scale * weight_scale: sums start at the bias, and need the rest of int32 for themselves."""


def fits_integers(bias: Tensor, scale: Tensor, weight_scale: Tensor) -> bool:
    """Whether kernels that add up in int32 can start at a bias. Scales: one, and one for each output."""
    return bool(((bias.double() / (scale.double() * weight_scale.double())).abs() <= LARGEST_BIAS).all())
