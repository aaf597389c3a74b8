"""How torch's exporter takes ops that aten does not have: calls of `graphopt_whole::<op>`.

The exporter writes a call as a stand-in: a node of domain `graphopt` without a function body, whose inputs are the op's
operands and whose attributes have the op's names. `respelled` puts in its place what a pass would emit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir
import torch

from graphopt.dialects.fx.custom_operators import NAMES
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.dialects.onnx.reading import in_order
from graphopt.dialects.onnx.spellings import DOMAIN
from graphopt.ir.ops import OPS, Op


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The translations of these operators to stand-ins, for torch.onnx.export."""
    return {getattr(torch.ops.graphopt_whole, name).default: _translation(OPS[name]) for name in NAMES}


def respelled(model: ir.Model) -> ir.Model:
    """A model in which ops are spelled in place of stand-ins; the same model where there are none.

    Raises GraphError, naming the node, where ONNX has no such op.
    """
    if not any(node.domain == DOMAIN for node in model.graph):
        return model
    graph = OnnxGraph(in_order(model))
    for node in graph.nodes:
        if node.native.domain == DOMAIN:  # type: ignore[attr-defined]
            graph.replace(node, *graph.emit_all(node.kind, *node.operands, at=node, **node.attributes))
    graph.sweep()
    return graph.model


def _translation(op: Op) -> Callable[..., Any]:
    import onnxscript  # takes half a second

    call = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), op.name, _schema(op))

    def translate(*operands: Any, **attributes: Any) -> Any:
        return call(*operands, **{name: value for name, value in attributes.items() if value not in (None, [])})

    return translate


def _schema(op: Op) -> onnx.defs.OpSchema:
    """The op as an operator of ONNX, each of whose operands and results may have any type."""
    parameter, attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
    option = onnx.defs.OpSchema.FormalParameterOption
    return onnx.defs.OpSchema(
        op.name,
        DOMAIN,
        1,
        inputs=[
            parameter(name, f"type of {name}", param_option=option.Optional if name in op.optional else option.Single)
            for name in op.operands
        ],
        outputs=[parameter(name, f"type of {name}") for name in op.results],
        type_constraints=[(f"type of {name}", _TYPES, "") for name in (*op.operands, *op.results)],
        attributes=[attribute(name, _KINDS[type(value)], required=False) for name, value in op.attributes.items()],
    )


_TYPES = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)", "tensor(int8)", "tensor(uint8)",
          "tensor(int16)", "tensor(int32)", "tensor(int64)"]  # fmt: skip
_KINDS = {
    int: onnx.defs.OpSchema.AttrType.INT,
    bool: onnx.defs.OpSchema.AttrType.INT,
    float: onnx.defs.OpSchema.AttrType.FLOAT,
    str: onnx.defs.OpSchema.AttrType.STRING,
    tuple: onnx.defs.OpSchema.AttrType.INTS,
    type(None): onnx.defs.OpSchema.AttrType.INT,  # an axis
}
"""The kind of an attribute in ONNX, by the type of its default."""
