"""Whatever the user has -> a Graph in the dialect that the target deploys, and how to call it the user's way.

A module is traced once, by torch.export; both dialects start from that ExportedProgram. An ONNX model is lifted to the
opset at which the canonical ops is whole, when the lifted model runs and computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import ConstantArgument, OutputKind
from torch.utils import _pytree as pytree

from graphopt.capture.signature import Signature
from graphopt.capture.trace import DynamicAxes, Feeds, Traced, as_tensor, on_cpu, several, trace
from graphopt.dialects.raising import raise_ops
from graphopt.errors import CaptureError, GraphError, first_line, outer_door
from graphopt.ir import cost
from graphopt.ir.constants import fold_constants
from graphopt.ir.graph import Graph, Value
from graphopt.ir.structure import plain_structure, structure
from graphopt.numerics import metrics

UNKNOWN_BATCH, UNKNOWN_SIZE = 1, 16
"""Sizes of dynamic axes in feeds that are made from input types."""


@dataclass
class Captured:
    """A graph, how to call it, example feeds (one mapping for each shape), and what the user should know."""

    graph: Graph
    signature: Signature
    feeds: list[Feeds]
    source: str
    notes: list[str] = field(default_factory=list)
    untouched: Callable[[], Graph] | None = None
    """An ONNX model as it was handed in, for timing; None of a module, whose input is the captured graph."""


def capture(
    model: Any,
    dialect: str,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None = None,
    cache: bool = False,
    run: bool | None = None,
) -> Captured:
    """Capture nn.Module, ExportedProgram, fx.GraphModule, onnx.ModelProto, onnx_graphsurgeon.Graph, or a path to .onnx
    or .pt2 (a torch.export archive without pickles).

    dialect: "onnx" or "fx". example_inputs: a tensor, a tuple or a dict of them (torch or numpy), or a list of these
    for several shapes; needed for modules. dynamic_shapes: by input name, the names of its dynamic axes; left out,
    axis 0 of every input and axis 1 of integer inputs. cache: capture the decode step of a language model.
    Both are for modules, which are traced; anything else has its axes already. run: whether an ONNX model is run, to
    see that what is made of it computes the same; None does so up to `cost.LARGE`. The model is not changed.
    Raises CaptureError, and nothing but a GraphoptError.
    """
    what = model if isinstance(model, str | Path) else f"the {type(model).__name__}"
    with outer_door(CaptureError, f"{what} cannot be captured"):
        return _capture(model, dialect, example_inputs, dynamic_shapes, cache, run)


def _capture(
    model: Any,
    dialect: str,
    example_inputs: Any,
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None,
    cache: bool,
    run: bool | None,
) -> Captured:
    kind = type(model)
    if isinstance(model, str | Path):
        _refuse_options("a file", dynamic_shapes, cache)
        return _capture_file(Path(model), dialect, example_inputs, run)
    if isinstance(model, nn.Module):
        if example_inputs is None:
            name = type(model).__name__
            raise CaptureError(f"{name} is a module: pass example_inputs=<a batch it runs on>, to trace it with")
        return _capture_module(model, dialect, trace(model, example_inputs, dynamic_shapes, cache))
    _refuse_options(f"a {kind.__name__}", dynamic_shapes, cache)
    if isinstance(model, torch.export.ExportedProgram):
        return _capture_program(model, dialect, example_inputs)
    if kind.__module__.startswith("onnx_graphsurgeon") and kind.__name__ == "Graph":
        import onnx_graphsurgeon

        proto = onnx_graphsurgeon.export_onnx(model)
        return _capture_onnx(proto, dialect, example_inputs, "onnx_graphsurgeon.Graph", run)
    if kind.__name__ == "ModelProto":
        return _capture_onnx(model, dialect, example_inputs, "onnx.ModelProto", run)
    raise CaptureError(
        f"cannot capture a {kind.__module__}.{kind.__qualname__}; hand over an nn.Module, ExportedProgram, "
        "fx.GraphModule, onnx.ModelProto, onnx_graphsurgeon.Graph, or a path to an .onnx or .pt2 file"
    )


def _refuse_options(what: str, dynamic_shapes: Any, cache: bool) -> None:
    """Raise CaptureError where an option of the trace is given for what is not traced."""
    for option, given in (("dynamic_shapes", dynamic_shapes is not None), ("cache", cache)):
        if given:
            raise CaptureError(
                f"{option} says how a module is traced, and {what} is traced already: leave it out, or hand over the "
                "nn.Module"
            )


# --- modules and programs ------------------------------------------------------------------------------------------


def _capture_module(module: nn.Module, dialect: str, traced: Traced) -> Captured:
    structure = traced.structure
    signature = Signature(tuple(traced.examples[0]), structure.names, structure.rebuild)
    graph = _graph_of(traced.program, dialect, signature, traced.axes, structure.places)
    notes = list(traced.notes)
    for example in traced.examples:
        _require_shapes(graph, example)
    graph = _raise_checked(graph, traced.examples[:1], [traced.expected], notes)
    return Captured(graph, signature, traced.examples, f"{type(module).__module__}.{type(module).__name__}", notes)


def _require_shapes(graph: Graph, example: Feeds) -> None:
    """Raise CaptureError where an example has other sizes than the export fixed."""
    for value in graph.inputs:
        shape = value.shape or ()
        given = example[value.name].shape if value.name in example else ()
        if any(isinstance(size, int) and size != number for size, number in zip(shape, given, strict=False)):
            takes = ", ".join(map(str, shape))
            raise CaptureError(f"example_inputs: {value.name} is {list(given)}, and the export takes [{takes}]: name "
                               f"the axes that differ in dynamic_shapes")  # fmt: skip


def _capture_program(
    program: torch.export.ExportedProgram, dialect: str, example_inputs: Any, *, made: bool = False
) -> Captured:
    """made: whether feeds are made from the input types where there are none."""
    program, notes = on_cpu(program)
    placeholders = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    names = [str(n) for n in program.graph_signature.user_inputs if isinstance(placeholders.get(str(n)), Tensor)]
    feeds = [_program_feeds(names, one) for one in several(example_inputs)] if example_inputs is not None else []
    if not feeds and program.example_inputs:
        flat = [leaf for leaf in pytree.tree_leaves(program.example_inputs) if isinstance(leaf, Tensor)]
        feeds = [dict(zip(names, flat, strict=True))]
    axes: DynamicAxes = {
        name: {axis: ("batch", "seq")[axis] if axis < 2 else f"{name}_{axis}"
               for axis, size in enumerate(placeholders[name].shape) if isinstance(size, torch.SymInt)}
        for name in names
    }  # fmt: skip
    tree = program.call_spec.out_spec
    results = [spec.arg for spec in program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    leaves = [result.value if isinstance(result, ConstantArgument) else torch.empty(0) for result in results]
    returned = structure(pytree.tree_unflatten(leaves, tree) if tree is not None else tuple(leaves))
    signature = Signature(tuple(names), returned.names, returned.rebuild)
    graph = _graph_of(program, dialect, signature, axes, returned.places)
    if made and not feeds:
        feeds = [_made_feeds(graph.inputs, notes)]
    graph = _raise_checked(graph, feeds, _reference(graph, feeds, notes) if feeds else None, notes)
    return Captured(graph, signature, feeds, "torch.export.ExportedProgram", notes)


def _program_feeds(names: Sequence[str], example: Any) -> Feeds:
    if isinstance(example, Mapping):
        return {name: as_tensor(example[name], name).cpu() for name in names}
    values = example if isinstance(example, tuple) else (example,)
    return {name: as_tensor(value, name).cpu() for name, value in zip(names, values, strict=True)}


def _graph_of(
    program: torch.export.ExportedProgram,
    dialect: str,
    signature: Signature,
    axes: DynamicAxes,
    places: Sequence[int],
) -> Graph:
    if dialect == "fx":
        from graphopt.dialects.fx.graph import FxGraph

        graph = FxGraph.from_program(
            program, input_names=signature.inputs, output_names=signature.outputs, axis_names=axes
        )
        graph.returns = plain_structure(signature.rebuild, len(signature.outputs))
        return graph
    from graphopt.dialects.onnx.capture import from_program

    return from_program(program, signature.inputs, signature.outputs, axes, places)


# --- ONNX ----------------------------------------------------------------------------------------------------------


def _capture_file(path: Path, dialect: str, example_inputs: Any, run: bool | None) -> Captured:
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
        raise CaptureError(f"{path} may hold a pickle, which is never loaded; load the module and hand that over")
    if path.suffix == ".pt2":
        from graphopt.dialects.fx.save import read_program

        try:
            captured = _capture_program(read_program(path), dialect, example_inputs, made=True)
        except GraphError as error:
            raise CaptureError(str(error)) from error
        return replace(captured, source=str(path))
    from graphopt.dialects.onnx.load import read_model

    try:
        model = read_model(path)
    except GraphError as error:
        raise CaptureError(str(error)) from error
    return _capture_onnx(model, dialect, example_inputs, str(path), run)


def _capture_onnx(model: Any, dialect: str, example_inputs: Any, source: str, run: bool | None) -> Captured:
    if dialect != "onnx":
        raise CaptureError(
            "an ONNX model cannot go to a target of the fx dialect; use target=onnxruntime, or hand over the nn.Module"
        )
    from graphopt.dialects.onnx import capture as onnx_capture

    try:
        graph: Graph = onnx_capture.from_model(model)
        graph.verify()
    except GraphError as error:
        raise CaptureError(str(error)) from error
    except Exception as error:  # a damaged model fails anywhere in the libraries that read it
        raise CaptureError(f"{source} is not a valid ONNX model: {first_line(error)}") from error
    opset = onnx_capture.opset_of(graph)
    names = tuple(value.name for value in graph.inputs)
    outputs = tuple(value.name for value in graph.outputs)
    signature = Signature(names, outputs, lambda results: dict(zip(outputs, results, strict=True)))
    quantized = onnx_capture.quantized_note(model, graph)
    notes = [quantized] if quantized is not None else []
    if example_inputs is None:
        feeds = [_made_feeds(graph.inputs, notes)] if all(v.dtype is not None for v in graph.inputs) else []
    else:
        feeds = [signature.bind(one if isinstance(one, tuple) else (one,), {})[0] for one in several(example_inputs)]
    size = cost.Cost.of(graph).bytes
    if not (size <= cost.LARGE if run is None else run):
        stays = f", and stays at opset {opset}" if onnx_capture.liftable(graph) else ""
        notes.append(f"{size / 2**30:.1f} GiB of weights: the model is not run{stays} (agree=True runs it)")
        return Captured(onnx_capture.refined(_raise_checked(graph, [], None, notes)), signature, feeds, source, notes)
    untouched = partial(onnx_capture.untouched, model)
    expected = _reference(graph, feeds, notes)
    if expected is None and example_inputs is not None:
        raise CaptureError(f"{source} does not run on the example inputs: {notes[-1]}")
    lifted = onnx_capture.lift(model, graph, notes)
    if lifted is not None:
        if expected is None:
            notes.append(f"stays at opset {opset}: it cannot be checked that the lifted model computes the same")
        elif _computes(lifted, feeds, expected):
            graph = lifted
        else:
            notes.append(f"stays at opset {opset}: the lifted model does not compute the same")
    graph = onnx_capture.refined(_raise_checked(graph, feeds, expected, notes))
    return Captured(graph, signature, feeds if expected is not None else [], source, notes, untouched)


def _raise_checked(
    graph: Graph, feeds: Sequence[Feeds], expected: Sequence[Sequence[Any]] | None, notes: list[str]
) -> Graph:
    """The graph with decomposed forms raised to ops, if it then computes what is expected on the feeds."""
    raised = graph.clone()
    try:
        fold_constants(raised)  # exporters compute axes and scales that the forms to be raised are told by
    except Exception as error:  # whatever the engine raises
        raise CaptureError(f"what the model computes of its constants cannot be run: {first_line(error)}") from error
    raised.raise_own()
    hits = raise_ops(raised)
    raised.sweep()
    if expected is None or _computes(raised, feeds, expected):
        return raised
    if not _computes(graph, feeds, expected):
        notes.append("the captured graph does not compute what the model does on the example inputs; is it random?")
    elif hits:
        notes.append(f"decomposed forms were left as they are: raised ({', '.join(hits)}) they do not compute the same")
    return graph


def _computes(graph: Graph, feeds: Sequence[Feeds], expected: Sequence[Sequence[Any]]) -> bool:
    found = _reference(graph, feeds, [])
    return found is not None and _all_equal(expected, found)


def _made_feeds(inputs: Sequence[Value], notes: list[str]) -> Feeds:
    """Seeded feeds of the inputs' types: standard normal floats, integers and booleans of 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    feeds: Feeds = {}
    for value in inputs:
        sizes = [
            size if isinstance(size, int) else UNKNOWN_BATCH if axis == 0 else UNKNOWN_SIZE
            for axis, size in enumerate(value.shape or ())
        ]
        dtype = value.dtype
        assert dtype is not None
        if dtype.is_floating_point:
            feeds[value.name] = torch.randn(sizes, generator=generator).to(dtype)
        else:
            feeds[value.name] = torch.randint(0, 2, sizes, generator=generator).to(dtype)
    made = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in feeds.items())
    notes.append(f"no example inputs: feeds were made from the input types ({made})")
    return feeds


def _reference(graph: Graph, feeds: Sequence[Feeds], notes: list[str]) -> list[list[Tensor]] | None:
    """The outputs on the feeds, or None (and a note) where the engine cannot run them."""
    try:
        return [graph.evaluate(feed, graph.outputs) for feed in feeds]
    except Exception as error:
        notes.append(f"outputs cannot be compared: the model does not run on the example inputs ({first_line(error)})")
        return None


def _all_equal(expected: Sequence[Sequence[Any]], found: Sequence[Sequence[Any]]) -> bool:
    return all(
        metrics.within_tolerance(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else repr(a) == repr(b)
        for one, other in zip(expected, found, strict=True)
        for a, b in zip(one, other, strict=True)
    )


__all__ = ["CaptureError", "Captured", "Feeds", "Signature", "capture"]
