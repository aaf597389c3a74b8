"""ONNX -> torch.fx: a captured ONNX graph as an fx graph, which passes can train; and, for users, as a module."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.capture.axes import DynamicAxes
from graphopt.capture.signature import Signature
from graphopt.capture.sources import Captured, capture
from graphopt.dialects.adapter import adapter
from graphopt.dialects.silence import quiet
from graphopt.errors import CaptureError, GraphError, GraphoptError, outer_door
from graphopt.ir import cost
from graphopt.ir.graph import Feeds, Graph, shapes_text
from graphopt.ir.structure import Structure
from graphopt.numerics import metrics

_LOUD = ("torch.export", "torch._dynamo", "torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")
"""Loggers that report what a trace runs into, which is an error of graphopt's own then."""

_RESPELLED = ("quantize", "dequantize")
"""Ops that are traced as one operator each, and then spelled as graphs of torch have them."""


def to_torch(model: Any, example_inputs: Any = None) -> fx.GraphModule:
    """An ONNX model as a torch.fx.GraphModule in eval mode, which computes the same, and trains.

    model: a path to .onnx, an onnx.ModelProto or an onnx_graphsurgeon.Graph. example_inputs: a tensor, a tuple or a
    dict of them (torch or numpy) that the model runs on; left out, they are made from the input types, with a batch of
    1 and 16 for other unknown sizes.

    forward takes the model's inputs, in order or by name (with an underscore for each character that Python does not
    allow), and returns a dict of its outputs by name. Stored floats that an operator reads as weight, bias or table are
    parameters, named by the module path of the node that reads them; batch norms and dropout follow train() and eval().
    Dynamic axes stay dynamic; a warning says which could not. The tensors are copies of the file's. A float linear,
    conv or norm is aten's; a model that came in quantized keeps its integers (`Optimized.module` says how they train).

    Raises CaptureError for what is no valid model, where operators have no form in torch (it names all of them, with
    their nodes), and where the module does not compute what the model does on the examples: a float may differ by
    1e-4 of the largest in its output (1e-2 in 16 bits).
    """
    what = model if isinstance(model, str) else f"the {type(model).__name__}"
    with outer_door(CaptureError, f"{what} cannot become a torch module"):
        if isinstance(model, nn.Module):
            raise CaptureError(f"{type(model).__name__} is a torch module already")
        captured = capture(model, "onnx", example_inputs=example_inputs)
        converted = to_fx(captured)
        for note in converted.notes[len(captured.notes) :]:
            warnings.warn(note, stacklevel=2)
        module = converted.graph.module(converted.signature.rebuild)
        assert isinstance(module, fx.GraphModule)  # as an fx graph makes it
        return module


def to_fx(captured: Captured) -> Captured:
    """A captured ONNX graph as an fx graph with the same inputs and outputs, dynamic axes and module paths.

    A node without a module path has its name for one. The signature and the feeds stay; notes say which axes the trace
    fixed. An fx graph is returned as it is. Raises CaptureError, as `to_torch` says.
    """
    if captured.graph.dialect == "fx":
        return captured
    from graphopt.dialects.onnx.graph import OnnxGraph
    from graphopt.dialects.onnx.interpreter.module import OnnxModule

    assert isinstance(captured.graph, OnnxGraph)  # there are two dialects
    if not captured.feeds:
        raise CaptureError(
            f"{captured.source} does not run on inputs that are made from its types, and a trace needs an example: "
            "pass example_inputs=<a batch that it runs on>"
        )
    try:
        module = OnnxModule(captured.graph).eval()
    except GraphError as error:
        raise CaptureError(f"{captured.source}: {error}") from error
    axes = _dynamic_axes(captured.graph)
    failed: list[GraphError] = []
    for dynamic in _attempts(captured.feeds[0], axes):
        try:
            graph, fixed = _converted(captured, module, axes, dynamic)
        except GraphError as error:
            failed.append(error)
            continue
        why = f" ({failed[0]})" if failed else ""
        notes = [f"axis {axis} ({axes[name][axis]}) of {name} is fixed at {size} in torch{why}"
                 for (name, axis), size in fixed.items()]  # fmt: skip
        if _is_large(captured.graph):
            notes.append("above 2 GB: the outputs of the torch module were not compared with the model's")
        graph.scaled = captured.graph.scaled
        return replace(captured, graph=graph, notes=captured.notes + notes)
    raise CaptureError(f"{captured.source}, traced on {shapes_text(captured.feeds[0])}: {failed[0]}") from failed[0]


# --- the trace -----------------------------------------------------------------------------------------------------


def _dynamic_axes(graph: Graph) -> DynamicAxes:
    """By input, the names of its dynamic axes; an axis without a name gets one of the input's."""
    return {
        value.name: {axis: f"{value.name}_{axis}" if size == "?" else str(size)
                     for axis, size in enumerate(value.shape or ()) if not isinstance(size, int)}
        for value in graph.inputs
    }  # fmt: skip


def _converted(
    captured: Captured, module: nn.Module, axes: DynamicAxes, dynamic: DynamicAxes
) -> tuple[Graph, dict[tuple[str, int], int]]:
    """The fx graph, checked, and the axes that have one size in it, by input and axis.

    dynamic: those of the axes that are to stay dynamic. Raises GraphError where fewer of them may help.
    """
    signature, feeds, dialect = captured.signature, captured.feeds[0], adapter("fx")
    examples = tuple(_example(feeds[name], dynamic.get(name, {})) for name in signature.inputs)
    shapes = tuple(dict.fromkeys(dynamic.get(name, {}), torch.export.Dim.AUTO) for name in signature.inputs)
    returned = Structure(signature.outputs, signature.rebuild, list(range(len(signature.outputs))))
    with outer_door(GraphError, "torch.export cannot trace it"), quiet(*_LOUD), torch.no_grad():
        program = torch.export.export(module, examples, dynamic_shapes={"inputs": shapes}, strict=False)
    fixed = _fixed(program, signature, axes)
    for (name, axis), size in fixed.items():
        if feeds[name].shape[axis] != size:
            raise GraphError(f"the model computes with the size of axis {axis} of {name}")
    graph = dialect.from_program(program, signature.inputs, axes, returned)
    dialect.raise_(graph)
    for node in graph.sites(*_RESPELLED):
        graph.replace(node, graph.emit(node, *node.operands, at=node))
    graph.sweep()
    graph.version = 0
    graph.verify()
    if not _is_large(captured.graph):
        as_fed = [example.shape for example in examples] == [feeds[name].shape for name in signature.inputs]
        _check(captured, graph, CaptureError if as_fed else GraphError)
    return graph, fixed


def _attempts(feeds: Feeds, axes: DynamicAxes) -> list[DynamicAxes]:
    """Which axes are to be dynamic: all; all that are no 1 in the example, for the model may need that 1; none."""
    larger = {name: {axis: label for axis, label in named.items() if feeds[name].shape[axis] != 1}
              for name, named in axes.items()}  # fmt: skip
    none: DynamicAxes = {name: {} for name in axes}
    return [axes, *([larger] if larger not in (axes, none) else []), *([none] if none != axes else [])]


def _example(feed: Tensor, dynamic: dict[int, str]) -> Tensor:
    """torch.export takes a size of 1 for a fixed one: such a dynamic axis is repeated to 2."""
    for axis in dynamic:
        if feed.shape[axis] == 1:
            feed = feed.repeat_interleave(2, axis)
    return feed


def _fixed(
    program: torch.export.ExportedProgram, signature: Signature, axes: DynamicAxes
) -> dict[tuple[str, int], int]:
    """The dynamic axes that are numbers in a program, by input and axis."""
    placeholders = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    given = [placeholders[name] for name in program.graph_signature.user_inputs]
    return {(name, axis): int(value.shape[axis]) for name, value in zip(signature.inputs, given, strict=True)
            for axis in axes[name] if str(value.shape[axis]).isdigit()}  # fmt: skip


# --- the check -----------------------------------------------------------------------------------------------------


def _is_large(graph: Graph) -> bool:
    return cost.Cost.of(graph).bytes > cost.LARGE


def _check(captured: Captured, graph: Graph, kind: type[GraphoptError]) -> None:
    """Raise GraphError where the fx graph does not run or has other shapes than the ONNX graph on the example feeds,
    and `kind` where it has other values."""
    rounds = bool(captured.graph.sites("quantize"))
    for feeds in captured.feeds:
        found: Sequence[Any] = graph.evaluate(feeds, graph.outputs)
        expected = captured.graph.evaluate(feeds, captured.graph.outputs)
        for name, a, b in zip(captured.signature.outputs, expected, found, strict=True):
            if a.shape != b.shape:
                raise GraphError(f"output {name!r} is {list(b.shape)} in torch, and {list(a.shape)} in ONNX Runtime")
            if metrics.within_tolerance(a, b, rtol=metrics.QUANTIZED_RTOL if rounds else None):
                continue
            if rounds and a.is_floating_point() and metrics.sqnr(a, b) >= metrics.QUANTIZED_SQNR:
                continue
            largest = float(torch.nan_to_num(a.double()).abs().max())
            raise kind(
                f"output {name!r} differs in torch by {metrics.max_error(a, b):.3g}, of at most {largest:.3g}. The "
                "inputs may be such that rounding grows: pass example_inputs=<a batch that the model is made for>; "
                "else hand over the nn.Module that the file was exported from"
            )
