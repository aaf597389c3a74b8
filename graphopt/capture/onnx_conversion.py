"""An FxGraph at any point of a pipeline -> the OnnxGraph that the same passes over the ONNX capture would have made.

It goes through torch's exporter as a program, as a module does at capture, and is raised. Ops that quantize pass the
exporter whole; what is stored for them is compared bit for bit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.dialects.adapter import adapter
from graphopt.dialects.fx import archive
from graphopt.dialects.fx.exporting import exportable
from graphopt.dialects.fx.graph import FxGraph
from graphopt.errors import GraphError, first_line
from graphopt.ir.graph import Feeds, Graph, Node
from graphopt.ir.structure import Structure
from graphopt.numerics import metrics


def to_onnx(graph: Graph, feeds: Sequence[Feeds] = ()) -> Graph:
    """The OnnxGraph that computes what an FxGraph does; the FxGraph stays as it is.

    Inputs, outputs, dynamic axes and module paths keep their names; quantize and dequantize have their operands and
    attributes, with integers packed as ONNX stores them. What a module's capture leaves for `simplify`, this does too.
    feeds: inputs on which both must compute the same, within `metrics.tolerance`. A graph that rounds activations is
    not run: where a float differs in its last bit another integer may come out, and how far that may move an output
    depends on the model (see `pipeline.instruments.Agree.moved`). Raises GraphError, naming the node, for what ONNX
    cannot hold, and where stored integers, scales or zero points, or the outputs, are not the same.
    """
    if not isinstance(graph, FxGraph):
        raise GraphError(f"to_onnx takes a graph of the fx dialect, and this one is of the {graph.dialect} dialect")
    exported = exportable(graph)
    try:
        converted = _exported(exported)
    except GraphError:
        raise
    except Exception as error:  # whatever the exporter raises
        raise _refusal(exported, error) from error
    adapter("onnx").raise_(converted)
    converted.verify()
    _require_equal_parameters(graph, converted)
    if not graph.sites("quantize"):
        _require_equal_outputs(graph, converted, feeds)
    return converted


def _exported(graph: FxGraph) -> Graph:
    """The program of a graph in ONNX, not raised. Raises whatever the exporter raises."""
    axes = {
        value.name: {axis: size for axis, size in enumerate(value.shape or ()) if isinstance(size, str)}
        for value in graph.inputs
    }
    returned = Structure(tuple(graph.output_names), tuple, list(range(len(graph.output_names))))
    return adapter("onnx").from_program(archive.to_program(graph), graph.input_names, axes, returned)


def _refusal(graph: FxGraph, error: BaseException) -> GraphError:
    """The error that names the node which the exporter refuses: the first that it refuses by itself too."""
    tried = set[str]()
    for node in sorted(graph.nodes, key=lambda node: node.op is not None):  # ops are seldom the cause
        if node.kind not in tried:
            tried.add(node.kind)
            reason = _refused_alone(graph, node)
            if reason is not None:
                return GraphError(f"{node.kind} has no form in ONNX: {reason} ({node.label})")
    return GraphError(f"the graph has no form in ONNX: {_root(error)}")


def _refused_alone(graph: FxGraph, node: Node) -> str | None:
    """Why the exporter refuses a graph of one node; None where it takes it, or the node cannot be cut out."""
    given = [value for value in dict.fromkeys(node.operands) if value is not None and not value.is_constant]
    try:
        _exported(graph.extract(given, node.results))
    except GraphError:
        return None
    except Exception as error:
        return _root(error)
    return None


def _root(error: BaseException) -> str:
    """The text of the exception that others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


# --- the same numbers ----------------------------------------------------------------------------------------------


def _require_equal_parameters(before: Graph, after: Graph) -> None:
    """Raise GraphError where integers, scales or zero points that a site stores, or how they are read, differ."""
    expected, found = _stored(before), _stored(after)
    for path in expected | found:
        ours, theirs = expected[path], found[path]
        if len(ours) != len(theirs) or not all(map(_is_equal, ours, theirs)):
            site = path or "a node that is in no module"
            raise GraphError(f"converted to ONNX, {site} is quantized otherwise than before; please report it")


_Stored = tuple[str, dict[str, object], list[Tensor | None]]
"""Of a node that quantizes: its op, its attributes, and the constants among its operands."""


def _stored(graph: Graph) -> defaultdict[str, list[_Stored]]:
    """What nodes that quantize store, by module path, in order.

    Left out are biases in int32, which are floats in ONNX, and zero points of 0, which may be spelled or not.
    """
    found = defaultdict[str, list[_Stored]](list)
    for node in graph.sites("quantize", "dequantize"):
        if node.input.dtype is torch.int32:
            continue
        operands = (*node.operands, None)[:3]
        x, scale, zero_point = (None if value is None else graph.constant(value) for value in operands)
        if zero_point is not None and not bool(zero_point.any()):
            zero_point = None
        if node.attributes["axis"] is None:  # one of each, which may be a vector
            scale, zero_point = (None if one is None else one.reshape(()) for one in (scale, zero_point))
        found[node.path].append((node.kind, dict(node.attributes), [x, scale, zero_point]))
    return found


def _is_equal(one: _Stored, other: _Stored) -> bool:
    if one[:2] != other[:2]:
        return False
    return all(
        a is b is None or (a is not None and b is not None and a.dtype is b.dtype and torch.equal(a, b))
        for a, b in zip(one[2], other[2], strict=True)
    )


def _require_equal_outputs(before: FxGraph, after: Graph, feeds: Sequence[Feeds]) -> None:
    """Raise GraphError where an output differs, and not only as it does from run to run."""
    computed = {tensor.dtype for _, tensor in before.constants()} | {value.dtype for value in before.outputs}
    rtol = max((metrics.tolerance(dtype)[0] for dtype in computed if dtype is not None), default=0.0)
    for feed in feeds:
        expected = before.evaluate(feed, before.outputs)
        try:
            found = after.evaluate(feed, after.outputs)
        except Exception as error:  # exceptions of engines have no class in common
            raise GraphError(f"converted to ONNX, the graph does not run: {first_line(error)}") from error
        again: list[Tensor] | None = None
        for place, (name, a, b) in enumerate(zip(before.output_names, expected, found, strict=True)):
            if metrics.within_tolerance(a, b, rtol=rtol):
                continue
            again = before.evaluate(feed, before.outputs) if again is None else again
            if metrics.within_tolerance(a, again[place], rtol=rtol):
                what = f"moves by {metrics.max_error(a, b):.3g}" if a.shape == b.shape else f"has shape {list(b.shape)}"
                raise GraphError(f"converted to ONNX, output {name!r} {what}; please report it")
