"""An FxGraph for an exporter to another framework: ops that aten does not have stand whole in it.

`quantized_decomposed` spells quantization in eight operators, with ranges and casts of zero points; of these, as of
graphopt's own operators, an exporter sees `graphopt_whole::<op>`, with the operands and attributes of the op.
"""

from __future__ import annotations

import torch
from torch import fx

from graphopt.dialects.fx.custom_operators import NAMES
from graphopt.dialects.fx.graph import FxGraph
from graphopt.dialects.fx.native import has_effect, meta, target_name
from graphopt.dialects.fx.spellings import Literal, arguments
from graphopt.dialects.fx.views import FxNode, FxValue
from graphopt.errors import GraphError
from graphopt.ir.graph import Value, dtype_name
from graphopt.ir.structure import Output

_FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2}


def exportable(graph: FxGraph) -> FxGraph:
    """A clone that computes the same and returns its outputs as one tuple.

    Ops of `custom_operators` are calls of `graphopt_whole` in it. Raises GraphError, naming the node, for what only
    torch holds: writes to stored tensors, float8, and quantization that is no op (to a part of an
    integer's range, or of other floats than float32).
    """
    clone = graph.clone()
    clone.returns = tuple(map(Output, range(len(clone.output_names))))
    for node in clone.nodes:
        assert isinstance(node, FxNode)
        _require_exportable(node)
        if node.kind in NAMES:
            operands = list(node.operands)
            if node.kind in ("quantize", "dequantize"):
                operands[2:] = [_zero_point(node)]
            kind = f"graphopt_whole.{node.kind}.default"
            clone.replace(node, *clone.emit_all(kind, *operands, at=node, **node.attributes))
    clone.sweep()
    return clone


def _require_exportable(node: FxNode) -> None:
    native = node.native
    float8 = _FLOAT8.intersection(value.dtype for value in (*node.operands, *node.results) if value is not None)
    if has_effect(native):
        reason = "it writes to a tensor that the module keeps, or to an input"
    elif float8:
        reason = f"it has values in {dtype_name(min(float8, key=str))}"
    elif node.op is None and target_name(native).startswith("quantized_decomposed."):
        reason = "it uses a part of the range of its integers, or other floats than float32"
    else:
        return
    raise GraphError(f"{node.kind} has no form outside the fx dialect: {reason} ({node.label})")


def _zero_point(node: FxNode) -> Value | None:
    """The zero point that was given to the op. A reader leaves out one of 0; who else reads it may look for it."""
    given = arguments(node.native)
    raw = given["zero_point"] if "zero_point" in given else given["zero_points"]
    if isinstance(raw, fx.Node) and str(raw.target) == "aten._to_copy.default":  # as `spellings` widens it
        raw = raw.args[0]
    dtype = meta(node.native if node.kind == "quantize" else node.native.all_input_nodes[0]).dtype
    read = node.operand("zero_point")
    added = node.attributes["axis"] is None and node.required("x").is_constant  # by `spellings`, where there was none
    if read is not None or raw is None or added:
        return read
    if isinstance(raw, fx.Node):
        return FxValue(node.owner, raw) if meta(raw).dtype == dtype else None
    return FxValue(node.owner, Literal(raw, dtype))
