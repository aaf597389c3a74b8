"""A target: ONNX Runtime with integers in linears alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from graphopt.backends.onnxruntime.target import OnnxRuntime


class FloatConvs(OnnxRuntime):
    """ONNX Runtime, with all convs in float: a target derived from another one changes what it declares."""

    name: ClassVar[str] = "float-convs"
    summary: ClassVar[str] = "ONNX Runtime with integers in linears alone"
    schemes: ClassVar[Mapping[str, tuple[str, ...]]] = {"linear": ("dynamic",)}
    weight_bits: ClassVar[Mapping[str, tuple[int, ...]]] = {}
