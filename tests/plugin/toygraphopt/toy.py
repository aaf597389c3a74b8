"""A target: ONNX Runtime that quantizes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from graphopt.backends.onnxruntime.target import OnnxRuntime


class Toy(OnnxRuntime):
    """ONNX Runtime, with floats only: a target derived from another one changes what it declares."""

    name: ClassVar[str] = "toy"
    summary: ClassVar[str] = "ONNX Runtime with floats only, as an example"
    schemes: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    weight_bits: ClassVar[Mapping[str, tuple[int, ...]]] = {}
