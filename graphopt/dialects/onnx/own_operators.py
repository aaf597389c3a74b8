"""Programs that call the operators `graphopt::<op>` of `dialects.fx.custom_operators`: how torch's exporter takes them.

The exporter writes each call as a stand-in: a node of domain `graphopt` that has no function body, with the op's
operands in order and its attributes under their own names. `respell_stand_ins` then puts the spelling of the op there
that a pass over the ONNX graph would have emitted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch

from graphopt.dialects.fx import custom_operators
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.dialects.onnx.spellings import DOMAIN
from graphopt.errors import GraphError
from graphopt.ir.ops import OPS, Op


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The `custom_translation_table` of torch.onnx.export for these operators."""
    return {
        getattr(torch.ops.graphopt, name).default: _stand_in(OPS[name]) for name in custom_operators.NAMES
    }  # fmt: skip


def _stand_in(op: Op) -> Callable[..., Any]:
    import onnxscript  # takes a second

    schema = _schema(op)
    call = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), op.name, schema)

    def translate(*operands: Any, **attributes: Any) -> Any:
        return call(*operands, **{name: value for name, value in attributes.items() if value not in (None, [])})

    return translate


def _schema(op: Op) -> onnx.defs.OpSchema:
    """The op as an operator of ONNX whose operands may have any types."""
    option, parameter = onnx.defs.OpSchema.FormalParameterOption, onnx.defs.OpSchema.FormalParameter
    names = [*op.operands, *op.results]
    inputs = [
        parameter(name, f"T_{name}", param_option=option.Optional if name in op.optional else option.Single)
        for name in op.operands
    ]
    return onnx.defs.OpSchema(
        op.name,
        DOMAIN,
        1,
        inputs=inputs,
        outputs=[parameter(name, f"T_{name}") for name in op.results],
        type_constraints=[(f"T_{name}", _ANY, "") for name in names],
        attributes=[
            onnx.defs.OpSchema.Attribute(name, _TYPES[type(default)], required=False)
            for name, default in op.attributes.items()
        ],
    )


_ANY = [f"tensor({dtype})" for dtype in ("float", "float16", "bfloat16", "double", "int8", "uint8", "int16", "int32")]
_ATTRIBUTE = onnx.defs.OpSchema.AttrType
_TYPES = {int: _ATTRIBUTE.INT, bool: _ATTRIBUTE.INT, float: _ATTRIBUTE.FLOAT, tuple: _ATTRIBUTE.INTS,
          type(None): _ATTRIBUTE.INT}  # fmt: skip
"""By the type of an attribute's default; None is that of an axis."""


def respell_stand_ins(graph: OnnxGraph) -> None:
    """Put the spelling of its op in place of each stand-in. Raises GraphError, naming the node, where ONNX has none."""
    for node in graph.nodes:
        native = node.native  # type: ignore[attr-defined]
        if native.domain != DOMAIN or (DOMAIN, native.op_type, "") in graph.model.functions:
            continue
        try:
            values = graph.emit_all(node.kind, *node.operands, at=node, **node.attributes)
        except GraphError as error:
            raise GraphError(f"{error} ({node.label})") from error
        graph.replace(node, *values)
    graph.sweep()
