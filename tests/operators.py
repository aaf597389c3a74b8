"""ONNX operators in text, run in torch and, without optimizations, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import torch
from torch import Tensor

from graphopt.capture import Captured, capture
from graphopt.capture.fx_conversion import to_fx
from graphopt.numerics.metrics import within_tolerance
from tests.models import model, plain_run

X = "float[n,4,6] x"
"""The input of most tests."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def feeds(*shape: int, **others: Tensor) -> list[dict[str, Tensor]]:
    """x of two batch sizes."""
    return [{"x": normal(batch, *shape, seed=batch), **others} for batch in (2, 3)]


def built(
    inputs: str, body: str, tensors: Mapping[str, Tensor] | None = None, *, opset: int = 23, outputs: str = "",
    further: str = "",
) -> onnx.ModelProto:  # fmt: skip
    """A model that returns what each line of `body` defines first (or `outputs`), and `further`, all of them floats or
    of the types that inference finds."""
    lines = [line.strip() for line in body.splitlines() if line.strip()]
    names = outputs or ", ".join(line.split("=")[0].split(",")[0].strip() for line in lines)
    names += f", {further}" if further else ""
    used = {name: tensor for name, tensor in (tensors or {}).items() if name in body}
    domains = ("com.microsoft",) if "com.microsoft" in body else ()
    proto = model(f"g ({inputs}) => ({names}) {{ {' '.join(lines)} }}", used, opset=opset, domains=domains)
    proto = onnx.shape_inference.infer_shapes(proto)
    for output in proto.graph.output:
        if not output.type.tensor_type.elem_type:
            output.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return proto


def assert_equal(proto: onnx.ModelProto, *several: Mapping[str, Tensor]) -> Captured:
    """Converted on the first feeds, the model computes the same on all of them."""
    converted = to_fx(capture(proto, "onnx", example_inputs=dict(several[0])))
    names = [output.name for output in proto.graph.output]
    assert list(converted.signature.outputs) == names
    for inputs in several:
        found = converted.graph.evaluate(inputs, converted.graph.outputs)
        for name, a, b in zip(names, plain_run(proto, inputs), found, strict=True):
            assert a.dtype == b.dtype and within_tolerance(a, b), (name, a, b)
    return converted
