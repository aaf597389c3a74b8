"""Forms that make onnxruntime crash when it loads a file, and the equal forms that are written in their place.

Version 1.31.1 fuses a Transpose that moves the first axis behind the batch into the MatMul that reads it, also through
a Cast, and then dies of signal 11 in its layout optimizer (NchwcTransformer). It inserts such a Cast itself before
each product in 16 bits, as its CPU kernels compute in 32.

It also aborts where a branch or loop body reads what a DequantizeLinear and nodes behind it that only move numbers have
made: it moves the DequantizeLinear behind them, and looks for its reader among the inputs of the If or Loop. A body
reads a Sum of one value instead, which no optimization knows.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
import torch

from graphopt.dialects.onnx import files as onnx_files
from graphopt.dialects.onnx.spellings import STANDARD
from graphopt.errors import GraphError
from graphopt.ir.graph import Node, Value
from graphopt.ir.rewrite import Builder, Match, Pattern, Recorder, Rule

_SHORT = (torch.float16, torch.bfloat16)
_SHORT_NATIVE = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, None)
"""Of values whose type nothing states, the worst is assumed."""
_PRODUCTS = ("linear", "matmul")
_LOADS = "import sys, onnxruntime as ort; ort.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])"
_SECONDS = 300


def _cast_of_transposed(op: Recorder, x: str) -> Pattern:
    return op.cast(op.transpose(x, bind="moved"))


def _is_cast_for_product(m: Match) -> bool:
    return m.root.attributes["dtype"] not in _SHORT and _is_fused(m.moved, m.root.result)


def _cast_first(op: Builder, m: Match) -> Value:
    return op.transpose(op.cast(m.x, dtype=m.root.attributes["dtype"]), perm=m.moved.attributes["perm"])


def _transposed(op: Recorder, x: str) -> Pattern:
    return op.transpose(x)


def _is_short_for_product(m: Match) -> bool:
    return m.x.dtype in _SHORT and _is_fused(m.root, m.root.result)


def _in_float32(op: Builder, m: Match) -> Value:
    wide = op.transpose(op.cast(m.x, dtype=torch.float32), perm=m.root.attributes["perm"])
    return op.cast(wide, dtype=m.x.dtype)


def _is_fused(transpose: Node, read: Value) -> bool:
    return _moves_first(transpose.attributes["perm"]) and any(user.kind in _PRODUCTS for user in read.users)


def _moves_first(perm: Sequence[int]) -> bool:
    """Whether a transpose moves the first axis to one of the last two places, and keeps the order of the others."""
    rest = [axis for axis in perm if axis != 0]
    return len(perm) > 2 and rest == sorted(rest) and list(perm).index(0) >= len(perm) - 2


def let_bodies_read_sums(model: ir.Model) -> None:
    """Put a Sum between each dequantized value, moved or not, and the branches and loop bodies around which it is."""
    for native in list(model.graph.all_nodes()):
        if not native.outputs or native.graph is None or not _is_dequantized(native):
            continue
        value = native.outputs[0]
        within = [(user, place) for user, place in value.uses() if user.graph is not native.graph]
        if not within:
            continue
        alone = ir.Node("", "Sum", [value], name=f"{native.name}/Sum", metadata_props=dict(native.metadata_props))
        alone.outputs[0].name, alone.outputs[0].type = f"{value.name}.sum", value.type
        alone.outputs[0].shape = value.shape
        native.graph.insert_after(native, alone)
        for user, place in within:
            user.replace_input_with(place, alone.outputs[0])


def _is_dequantized(native: ir.Node) -> bool:
    maker: ir.Node | None = native
    while maker is not None and maker.op_type in _MOVES and maker.domain in STANDARD:
        source = maker.inputs[0]
        maker = source.producer() if source is not None else None
    return maker is not None and maker.op_type == "DequantizeLinear" and maker.domain in STANDARD


_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Flatten", "MaxPool", "Expand", "Gather", "Pad",
          "Identity")  # fmt: skip


RULES = (
    Rule("cast-before-transpose", _cast_of_transposed, _cast_first, shared=True, check=_is_cast_for_product),
    Rule("transpose-in-float32", _transposed, _in_float32, check=_is_short_for_product),
)


# --- what no rule reaches ------------------------------------------------------------------------------------------


def require_loads(model: ir.Model) -> None:
    """Load a model that holds such a form (in a branch, a loop or a function) in another process, before this one does.

    Raises GraphError, naming the node, where that process dies.
    """
    suspect = _suspect(model)
    if suspect is None:
        return
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        path = Path(folder) / "model.onnx"
        onnx_files.save(model, path, external_data=True)
        child = subprocess.run([sys.executable, "-c", _LOADS, str(path)], capture_output=True, timeout=_SECONDS)
    if child.returncode < 0:
        raise GraphError(
            f"onnxruntime dies of signal {-child.returncode} when it loads this model: {suspect.op_type} "
            f"({suspect.name}) reads a Transpose of other numbers than float32; compute that part in float32"
        )


def _suspect(model: ir.Model) -> ir.Node | None:
    """A product that reads a transpose through a cast, or in 16 bits."""
    nodes = [
        *model.graph.all_nodes(),
        *(node for function in model.functions.values() for node in function.all_nodes()),
    ]
    for node in nodes:
        if node.op_type in ("MatMul", "FusedMatMul") and any(map(_reads_moved, node.inputs)):
            return node
    return None


def _reads_moved(value: ir.Value | None) -> bool:
    """Whether a value is a transpose that is cast, but not to 16 bits, or one that is in 16 bits itself."""
    maker = value.producer() if value is not None else None
    if maker is None or value is None:
        return False
    crosses = value.dtype in _SHORT_NATIVE
    if maker.op_type == "Cast":
        source, crosses = maker.inputs[0], not crosses
        maker = source.producer() if source is not None else None
    if maker is None or maker.op_type != "Transpose" or maker.domain not in STANDARD or not crosses:
        return False
    perm = maker.attributes.get("perm")
    return perm is not None and _moves_first(perm.as_ints())
