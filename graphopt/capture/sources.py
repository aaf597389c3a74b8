"""Whatever the user has -> a Graph in the dialect of the target, and how the user calls it.

A module is traced once, by torch.export; both dialects start from that ExportedProgram. An ONNX model is lifted to the
opset that has all canonical ops, if the lifted model runs and computes the same. The stages of raising run once on what
is captured, and one run on the example inputs checks their result. What is particular to a dialect, its `Adapter` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import ConstantArgument, OutputKind
from torch.utils import _pytree as pytree

from graphopt.capture import differences
from graphopt.capture.arguments import several
from graphopt.capture.axes import DynamicAxes, distinct
from graphopt.capture.failures import NotExported, export_failure, refused_operator
from graphopt.capture.folders import opened
from graphopt.capture.implementations import exported_with
from graphopt.capture.onnx_conversion import to_onnx
from graphopt.capture.signature import Signature
from graphopt.capture.tracing import Traced, on_cpu, trace
from graphopt.dialects.adapter import Adapter, adapter
from graphopt.dialects.silence import quiet
from graphopt.errors import CaptureError, GraphError, first_line, outer_door
from graphopt.ir import cost
from graphopt.ir.graph import Feeds, Graph, Shape, Value, shapes_text
from graphopt.ir.structure import structure_of
from graphopt.numerics import metrics

Outputs = Sequence[Sequence[Any]]
"""What a model returns on each of several feeds: tensors, or what else an engine returns (sequences, maps)."""

UNKNOWN_BATCH, UNKNOWN_SIZE = 1, 16
"""Sizes of dynamic axes in feeds that are made from input types."""


@dataclass(frozen=True)
class Declared:
    """An input as a model declares it."""

    name: str
    shape: Shape | None
    dtype: torch.dtype | None


@dataclass
class Captured:
    """A graph, how it is called, example feeds (one mapping for each shape), and what the user should know."""

    graph: Graph
    signature: Signature
    feeds: list[Feeds]
    source: str
    notes: list[str] = field(default_factory=list)
    untouched: Callable[[], Graph] | None = None
    """Makes the graph that the result is timed against: of an ONNX model as it was handed in; of what an earlier call
    optimized for the same engine, its lowered graph. None where that is the captured graph: of modules and programs."""
    torch_form: Callable[[], Captured] | None = None
    """Captures the same model as a graph of torch.fx, to be trained; None where `graph` is one."""
    rounds: bool = False
    """Whether the model's own operators round activations, which forms of a target may then do too."""
    state: Mapping[str, Tensor] = field(default_factory=dict)
    """The tensors of a module that was handed in, by their names in its state_dict."""
    made_up: bool = False
    """Whether the feeds were made from the input types, as there were no example inputs."""
    unknown: Sequence[str] = ()
    """The custom operators that the engine does not know, so that the model is not run."""


def capture(
    model: Any,
    dialect: str,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    cache: bool = False,
    run: bool | None = None,
    check: bool = True,
) -> Captured:
    """Capture nn.Module, ExportedProgram, fx.GraphModule, onnx.ModelProto, onnx_graphsurgeon.Graph, or a path to .onnx,
    to .pt2 (a torch.export archive without pickles) or to a Hugging Face folder. The model is not changed.

    dialect: "onnx" or "fx". example_inputs: a tensor, a tuple or a dict of them (torch or numpy), or a list of these
    for several shapes; needed for modules. dynamic_shapes: by input name, the names of its dynamic axes, or as
    torch.export takes them; left out, axis 0 of every input and axis 1 of integer inputs. cache: capture the decode
    step of a language model.
    Both are for modules, which are traced; anything else has its axes already. run: whether an ONNX model is run, to
    check that the captured graph computes the same; None runs models of up to `cost.LARGE` bytes. check: whether it is
    an error where the graph of a module computes something else than the module (and is not random), or a note. Raises
    CaptureError, and nothing but a GraphoptError.
    """
    what = model if isinstance(model, str | Path) else f"the {type(model).__name__}"
    with outer_door(CaptureError, f"{what} cannot be captured"):
        return _capture(model, dialect, example_inputs, dynamic_shapes, cache, run, check)


def _capture(
    model: Any,
    dialect: str,
    example_inputs: Any,
    dynamic_shapes: Any,
    cache: bool,
    run: bool | None,
    check: bool,
) -> Captured:
    model = opened(model)
    kind = type(model)
    if isinstance(model, str | Path):
        _refuse_options("a file", dynamic_shapes, cache)
        return _capture_file(Path(model), adapter(dialect), example_inputs, run)
    if isinstance(model, nn.Module):
        if example_inputs is None:
            name = type(model).__name__
            raise CaptureError(
                f"{name} is a module, and is traced with a batch that it runs on: pass example_inputs= or calibration= "
                "(--inputs or --calibration on the command line)"
            )
        return exported_with(
            model,
            lambda: _capture_module(
                model, adapter(dialect), trace(model, example_inputs, dynamic_shapes, cache), check
            ),
            lambda captured, note: captured.notes.append(note),
        )
    _refuse_options(f"a {kind.__name__}", dynamic_shapes, cache)
    if isinstance(model, torch.export.ExportedProgram):
        return _capture_program(model, adapter(dialect), example_inputs)
    proto, source = _proto(model)
    with quiet("onnx_ir", "onnxscript"):
        return _capture_model(proto, adapter(dialect), example_inputs, source, run)


def declared_inputs(model: Any) -> Sequence[Declared]:
    """The inputs of anything but a module, which declares none: a file, a program, an ONNX model.

    Raises CaptureError for what `capture` does not take.
    """
    if isinstance(model, str | Path):
        model = _read(Path(model))
    elif not isinstance(model, torch.export.ExportedProgram):
        model, _ = _proto(model)
    if isinstance(model, torch.export.ExportedProgram):
        tensors = _user_inputs(model)
        return [Declared(name, _open_shape(tensor), tensor.dtype) for name, tensor in tensors.items()]
    try:
        graph = adapter("onnx").from_model(model)
    except GraphError as error:
        raise CaptureError(str(error)) from error
    return [Declared(value.name, value.shape, value.dtype) for value in graph.inputs]


def _proto(model: Any) -> tuple[Any, str]:
    """The ModelProto of a model in memory, and what the model is called. Raises CaptureError for anything else."""
    kind = type(model)
    if kind.__module__.startswith("onnx_graphsurgeon") and kind.__name__ == "Graph":
        import onnx_graphsurgeon

        return onnx_graphsurgeon.export_onnx(model), "onnx_graphsurgeon.Graph"
    if kind.__name__ == "ModelProto":
        return model, "onnx.ModelProto"
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


def _capture_module(module: nn.Module, dialect: Adapter, traced: Traced, check: bool = True) -> Captured:
    returned = traced.structure
    signature = Signature(
        tuple(traced.examples[0]), returned.names, returned.rebuild, traced.call.arguments, traced.call.constants
    )
    notes = list(traced.notes)
    try:
        graph = dialect.from_program(traced.program, signature.inputs, traced.axes, returned)
    except GraphError as error:
        raise CaptureError(f"{type(module).__name__}: {error}") from error
    except Exception as error:  # whatever torch's exporter raises
        refused = refused_operator(error)
        found = None if dialect.graph.dialect == "fx" else _with_parameters_computed(traced, refused)
        if found is None:
            raise NotExported(f"{type(module).__name__}: {export_failure(traced.program, error)}") from error
        graph = found
        notes.append(f"{refused} has no form in ONNX: what it makes of parameters was computed once")
    if dialect.is_liftable(graph):
        notes.append(f"captured at {dialect.version(graph)}, the newest in which the engine has all of its operators")
    for example in traced.examples:
        _require_shapes(graph, example)
    source = f"{type(module).__module__}.{type(module).__name__}"

    def judge(unraised: Graph) -> None:
        difference = differences.found(unraised, traced.examples[0], traced.expected, traced.structure.names)
        if difference is None:
            return
        if difference.is_error and check:
            what = f"the {unraised.dialect} graph of {source} computes something else"
            raise CaptureError(f"{what}: {difference}; agree=False goes on with a note")
        notes.append(f"the captured graph does not compute what the module does: {difference}")

    graph = _raised(dialect, graph, traced.examples[:1], [traced.expected], notes, judge)
    torch_form = None if graph.dialect == "fx" else partial(_capture_module, module, adapter("fx"), traced, check)
    return Captured(
        graph, signature, traced.examples, source, notes, torch_form=torch_form, state=traced.program.state_dict
    )


def _with_parameters_computed(traced: Traced, operator: str | None) -> Graph | None:
    """The ONNX graph of a program in which an operator reads parameters alone, as the parametrization of an orthogonal
    weight does: torch computes it, once. None where the operator reads more, or others have no form in ONNX."""
    fx, structure = adapter("fx"), traced.structure
    try:
        graph = fx.from_program(traced.program, tuple(traced.examples[0]), traced.axes, structure)
        fx.raise_(graph)
        refused = operator is None or any(node.kind == operator for node in graph.nodes)
        return None if refused else to_onnx(graph)
    except GraphError:
        return None


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
    program: torch.export.ExportedProgram, dialect: Adapter, example_inputs: Any, *, make_feeds: bool = False
) -> Captured:
    """make_feeds: whether to make feeds from the input types where there are no examples."""
    program, notes = on_cpu(program)
    inputs = _user_inputs(program)
    axes: DynamicAxes = {
        name: {axis: ("batch", "seq")[axis] if axis < 2 else f"{name}_{axis}"
               for axis, size in enumerate(tensor.shape) if isinstance(size, torch.SymInt)}
        for name, tensor in inputs.items()
    }  # fmt: skip
    axes = distinct({name: tensor.shape for name, tensor in inputs.items()}, axes)
    tree = program.call_spec.out_spec
    results = [spec.arg for spec in program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    leaves = [result.value if isinstance(result, ConstantArgument) else torch.empty(0) for result in results]
    returned = structure_of(pytree.tree_unflatten(leaves, tree) if tree is not None else tuple(leaves))
    signature = Signature(tuple(inputs), returned.names, returned.rebuild)
    examples = several(example_inputs) if example_inputs is not None else []
    if not examples and program.example_inputs:
        examples = [tuple(leaf for leaf in pytree.tree_leaves(program.example_inputs) if isinstance(leaf, Tensor))]
    feeds = [_on_cpu_feeds(signature, example) for example in examples]
    graph = dialect.from_program(program, signature.inputs, axes, returned)
    made_up = make_feeds and not feeds
    if made_up:
        feeds = [_made_feeds(graph.inputs, notes)]
    graph = _raised(dialect, graph, feeds, _reference(graph, feeds, notes) if feeds else None, notes)
    torch_form = None if graph.dialect == "fx" else partial(_capture_program, program, adapter("fx"), example_inputs)
    return Captured(
        graph, signature, feeds, "torch.export.ExportedProgram", notes, torch_form=torch_form,
        state=program.state_dict, made_up=made_up,
    )  # fmt: skip


def _user_inputs(program: torch.export.ExportedProgram) -> dict[str, Tensor]:
    """The inputs that are tensors, by name, as the export saw them."""
    placeholders = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    values = {str(name): placeholders.get(str(name)) for name in program.graph_signature.user_inputs}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _open_shape(tensor: Tensor) -> Shape:
    return tuple(str(size) if isinstance(size, torch.SymInt) else size for size in tensor.shape)


def _on_cpu_feeds(signature: Signature, example: Any) -> Feeds:
    feeds, _ = signature.bind(example if isinstance(example, tuple) else (example,), {})
    return {name: tensor.cpu() for name, tensor in feeds.items()}


# --- files and ONNX models -----------------------------------------------------------------------------------------


def _capture_file(path: Path, dialect: Adapter, example_inputs: Any, run: bool | None) -> Captured:
    model = _read(path)
    if isinstance(model, torch.export.ExportedProgram):
        try:
            return replace(_capture_program(model, dialect, example_inputs, make_feeds=True), source=str(path))
        except GraphError as error:
            raise CaptureError(str(error)) from error
    try:
        with quiet("onnx_ir", "onnxscript"):  # which print what a damaged file makes them doubt
            return _capture_model(model, dialect, example_inputs, str(path), run)
    except CaptureError as error:
        if str(path) in str(error):
            raise
        raise CaptureError(f"{path}: {error}") from error


def _read(path: Path) -> Any:
    """The ExportedProgram or the ONNX model in a file. Raises CaptureError where it cannot be read, or is not safe."""
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
        raise CaptureError(f"{path} may hold a pickle, which is never loaded; load the module and hand that over")
    try:
        return adapter("fx" if path.suffix == ".pt2" else "onnx").read(path)
    except GraphError as error:
        raise CaptureError(str(error)) from error


def _capture_model(model: Any, dialect: Adapter, example_inputs: Any, source: str, run: bool | None) -> Captured:
    try:
        graph = dialect.from_model(model)
        graph.verify()
    except GraphError as error:
        raise CaptureError(str(error)) from error
    except Exception as error:  # a damaged model fails anywhere in the libraries that read it
        raise CaptureError(f"{source} is not a valid ONNX model: {first_line(error)}") from error
    names = tuple(value.name for value in graph.inputs)
    outputs = tuple(value.name for value in graph.outputs)
    signature = Signature(
        names, outputs, lambda results: dict(zip(outputs, results, strict=True)), optional=dialect.optional(graph),
        untouched=tuple(value.name for value in graph.inputs if value.dtype is None),
    )
    notes = dialect.notes(model, graph)
    if example_inputs is None:
        unmade = next((value for value in graph.inputs if not _can_be_made(value)), None)
        feeds = [_made_feeds(graph.inputs, notes)] if unmade is None else []
        if unmade is not None:
            notes.append(f"no example inputs, and none are made for {unmade.name!r}, which is of unknown rank, no "
                         "tensor, or too large: outputs are not compared")  # fmt: skip
    else:
        calls = [example if isinstance(example, tuple) else (example,) for example in several(example_inputs)]
        feeds = [signature.bind(call, {})[0] for call in calls]
    size = cost.Cost.of(graph).bytes
    if not (size <= cost.LARGE if run is None else run):
        stays = f", and stays at {dialect.version(graph)}" if dialect.is_liftable(graph) else ""
        notes.append(f"{size / 2**30:.1f} GiB of weights: the model is not run{stays} (agree=True runs it)")
        graph = _raised(dialect, graph, [], None, notes)
        dialect.refine(graph)
        return Captured(graph, signature, feeds, source, notes, rounds=dialect.rounds(model))
    expected = _reference(graph, feeds, notes)
    if expected is None and (unknown := dialect.unknown(graph)):
        return _not_run(dialect, graph, signature, source, unknown, dialect.notes(model, graph))
    if expected is None and example_inputs is not None:
        raise CaptureError(f"{source} does not run on the example inputs: {notes[-1]}")
    lifted = _lifted(dialect, model, graph, feeds, expected, notes) if dialect.is_liftable(graph) else None
    graph = lifted or _raised(dialect, graph, feeds, expected, notes)
    dialect.refine(graph)
    untouched = partial(dialect.untouched, model)
    feeds, made_up = feeds if expected is not None else [], example_inputs is None
    return Captured(
        graph, signature, feeds, source, notes, untouched, rounds=dialect.rounds(model), made_up=made_up
    )


def _not_run(
    dialect: Adapter, graph: Graph, signature: Signature, source: str, unknown: Sequence[str], notes: list[str]
) -> Captured:
    """A model with operators that the engine does not know: it stays at its version, and nothing of it is run."""
    notes.append(f"the engine does not know {', '.join(unknown)}, so nothing is run: only the shapes of outputs are "
                 "checked, and forms have a fixed order (custom_ops=[the library] runs it)")  # fmt: skip
    graph = _raised(dialect, graph, [], None, notes)
    dialect.refine(graph)
    return Captured(graph, signature, [], source, notes, unknown=unknown)


def _lifted(
    dialect: Adapter, model: Any, graph: Graph, feeds: Sequence[Feeds], expected: Outputs | None, notes: list[str]
) -> Graph | None:
    """The raised graph of the lifted model. None where the model stays at the version of `graph`; a note says why."""
    version = dialect.version(graph)
    if expected is None:
        notes.append(f"stays at {version}: it cannot be checked that the lifted model computes the same")
        return None
    try:
        lifted = dialect.lift(model)
        raised, left = _raise_checked(dialect, lifted, feeds, expected)
    except GraphError as error:
        notes.append(f"stays at {version}: {error}")
        return None
    if raised is None:
        notes.append(f"stays at {version}: the lifted model does not compute the same")
        return None
    notes += [f"lifted from {version} to {dialect.version(lifted).split()[-1]}", *left]
    return raised


# --- raising, and the check of it ----------------------------------------------------------------------------------


def _raised(
    dialect: Adapter,
    graph: Graph,
    feeds: Sequence[Feeds],
    expected: Outputs | None,
    notes: list[str],
    judge: Callable[[Graph], None] | None = None,
) -> Graph:
    """The raised graph; the unraised one, which goes to `judge` (or a note says it), where the outputs of either differ
    from the expected ones."""
    try:
        raised, left = _raise_checked(dialect, graph, feeds, expected)
    except GraphError as error:
        raise CaptureError(str(error)) from error
    if raised is None:
        if judge is not None:
            judge(graph)
        else:
            notes.append("the captured graph does not compute what the model does on the example inputs")
        return graph
    notes += left
    return raised


def _raise_checked(
    dialect: Adapter, graph: Graph, feeds: Sequence[Feeds], expected: Outputs | None
) -> tuple[Graph | None, list[str]]:
    """Returns the raised graph; the unraised graph if raising changed the outputs; None if the unraised graph differs
    from the model too. Notes come with it.

    expected: what the model returns on each of the feeds; None where nothing can be checked. Raises GraphError where
    constants cannot be computed.
    """
    raised = graph.clone()
    hits = dialect.raise_(raised)
    if expected is None or _computes(raised, feeds, expected):
        return raised, []
    if not _computes(graph, feeds, expected):
        return None, []
    left = f"decomposed forms were left as they are: raised ({', '.join(hits)}) they do not compute the same"
    return graph, [left] if hits else []


def _computes(graph: Graph, feeds: Sequence[Feeds], expected: Outputs) -> bool:
    """Whether a graph has the expected outputs; those that differ from run to run, being random, may be others."""
    found = _reference(graph, feeds, [])
    if found is None:
        return False
    moved = _moved(expected, found)
    for _ in range(differences.RANDOM_RUNS if moved else 0):
        again = _reference(graph, feeds, [])
        moved -= set() if again is None else _moved(found, again)
    return not moved


def _made_feeds(inputs: Sequence[Value], notes: list[str]) -> Feeds:
    """Seeded feeds of the inputs' types: standard normal floats, integers and booleans of 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    feeds: dict[str, Tensor] = {}
    for value in inputs:
        sizes, dtype = _made_sizes(value), value.dtype
        assert dtype is not None
        if dtype.is_floating_point:
            feeds[value.name] = torch.randn(sizes, generator=generator).to(dtype)
        else:
            feeds[value.name] = torch.randint(0, 2, sizes, generator=generator).to(dtype)
    notes.append(f"no example inputs: feeds were made from the input types ({shapes_text(feeds)})")
    return feeds


def _can_be_made(value: Value) -> bool:
    """Whether a feed can be made for an input: an engine may end the process where its rank is guessed wrongly."""
    known = value.dtype is not None and value.shape is not None
    return known and math.prod(_made_sizes(value)) * 8 <= cost.LARGE


def _made_sizes(value: Value) -> list[int]:
    return [size if isinstance(size, int) else UNKNOWN_BATCH if axis == 0 else UNKNOWN_SIZE
            for axis, size in enumerate(value.shape or ())]  # fmt: skip


def _reference(graph: Graph, feeds: Sequence[Feeds], notes: list[str]) -> Outputs | None:
    """The outputs on the feeds, or None (and a note) where the engine cannot run them."""
    try:
        return [graph.evaluate(feed, graph.outputs) for feed in feeds]
    except Exception as error:
        notes.append(f"outputs cannot be compared: the model does not run on the example inputs ({first_line(error)})")
        return None


def _moved(expected: Outputs, found: Outputs) -> set[tuple[int, int]]:
    """The outputs that differ, each as the place of its feeds and its own."""
    return {
        (number, place)
        for number, (outputs, others) in enumerate(zip(expected, found, strict=True))
        for place, (a, b) in enumerate(zip(outputs, others, strict=True))
        if not (metrics.within_tolerance(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor)
                else repr(a) == repr(b))
    }  # fmt: skip


__all__ = ["CaptureError", "Captured", "Signature", "capture"]
