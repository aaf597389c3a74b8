"""Whatever the user has -> a Graph in the dialect that the target deploys, and how to call it the user's way.

A module is traced once, by torch.export; both dialects start from that ExportedProgram. An ONNX model is lifted to the
opset at which the vocabulary is whole, when the lifted model runs and computes the same.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.constants import fold_constants
from graphopt.graph import Graph, GraphError, Value
from graphopt.numerics import metrics

UNKNOWN_BATCH, UNKNOWN_SIZE = 1, 16
"""Sizes of dynamic axes in feeds that are made from input types."""

Feeds = dict[str, Tensor]


class CaptureError(ValueError):
    """What was handed in cannot become a graph; says what, where, and the way out."""


@dataclass(frozen=True)
class Signature:
    """How the model is called: input names in order, output names, and the structure it returns."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    rebuild: Callable[[list[Any]], Any]
    """From the graph's outputs to what the model returned."""

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Feeds, bool]:
        """Arguments as feeds, and whether they were numpy (then so is the result). Raises CaptureError on misuse."""
        if len(args) == 1 and isinstance(args[0], Mapping):
            kwargs, args = {**args[0], **kwargs}, ()
        if len(args) > len(self.inputs):
            raise CaptureError(f"the model takes {len(self.inputs)} inputs ({', '.join(self.inputs)}), not {len(args)}")
        named = dict(zip(self.inputs, args, strict=False)) | dict(kwargs)
        for name in named:
            if name not in self.inputs:
                raise CaptureError(f"the model has no input {name!r}{_nearest(name, self.inputs)}")
        missing = [name for name in self.inputs if name not in named]
        if missing:
            raise CaptureError(f"missing inputs: {', '.join(missing)}")
        numpy = all(isinstance(value, np.ndarray) for value in named.values())
        return {name: as_tensor(named[name], name) for name in self.inputs}, numpy


@dataclass
class Captured:
    """A graph, how to call it, example feeds (one mapping for each shape), and what the user should know."""

    graph: Graph
    signature: Signature
    feeds: list[Feeds]
    source: str
    notes: list[str] = field(default_factory=list)


def capture(
    model: Any,
    dialect: str,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None = None,
    cache: bool = False,
) -> Captured:
    """Capture nn.Module, ExportedProgram, fx.GraphModule, onnx.ModelProto, onnx_graphsurgeon.Graph or a path to .onnx.

    dialect: "onnx" or "fx". example_inputs: a tensor, a tuple or a dict of them (torch or numpy), or a list of these
    for several shapes; needed for modules. dynamic_shapes: by input name, the names of its dynamic axes; left out,
    axis 0 of every input and axis 1 of integer inputs. cache: capture the decode step of a language model.
    The model is not changed. Raises CaptureError.
    """
    kind = type(model)
    if isinstance(model, str | Path):
        return _capture_file(Path(model), dialect, example_inputs)
    if isinstance(model, nn.Module):
        return _capture_module(model, dialect, example_inputs, dynamic_shapes, cache)
    if isinstance(model, torch.export.ExportedProgram):
        return _capture_program(model, dialect, example_inputs)
    if kind.__module__.startswith("onnx_graphsurgeon") and kind.__name__ == "Graph":
        import onnx_graphsurgeon

        return _capture_onnx(onnx_graphsurgeon.export_onnx(model), dialect, example_inputs, "onnx_graphsurgeon.Graph")
    if kind.__name__ == "ModelProto":
        return _capture_onnx(model, dialect, example_inputs, "onnx.ModelProto")
    raise CaptureError(
        f"cannot capture a {kind.__module__}.{kind.__qualname__}; hand over an nn.Module, ExportedProgram, "
        "fx.GraphModule, onnx.ModelProto, onnx_graphsurgeon.Graph, or a path to an .onnx file"
    )


# --- modules -------------------------------------------------------------------------------------------------------


def _capture_module(
    module: nn.Module,
    dialect: str,
    example_inputs: Any,
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None,
    cache: bool,
) -> Captured:
    name = type(module).__name__
    if example_inputs is None:
        raise CaptureError(f"{name} is a module: pass example_inputs=<a batch it can run on>, so that it can be traced")
    notes: list[str] = []
    with _inference(module):
        if cache:
            from graphopt.decode import DecodeStep

            try:
                module, example_inputs, dynamic_shapes = DecodeStep.around(module, example_inputs)
            except ValueError as error:
                raise CaptureError(str(error)) from error
        examples = [_arguments(module, one) for one in _several(example_inputs)]
        constants: dict[str, Any] = {}
        result = _run(module, examples[0])
        if _holds_cache(result) and _accepts(module, "use_cache"):
            constants = {"use_cache": False}
            result = _run(module, examples[0] | constants)
            notes.append("captured with use_cache=False; for the decode step with its cache, pass cache=True")
        names, rebuild, picked = _structure(result)
        spec = _dynamic_axes(examples[0], dynamic_shapes)
        traced = {key: _at_least_two(value, spec.get(key, {})) for key, value in examples[0].items()}
        if any(traced[key].shape != examples[0][key].shape for key in traced):
            notes.append("dynamic axes of size 1 in the example inputs were repeated to 2 for tracing")
        try:
            program = _export(module, traced, constants, spec)
        except Exception as error:
            raise CaptureError(_trace_failure(module, error)) from error
    notes += _specialized(program, spec)
    signature = Signature(tuple(examples[0]), names, rebuild)
    graph = _graph_of(program, dialect, signature, spec, picked)
    return Captured(graph, signature, examples, f"{type(module).__module__}.{name}", notes)


@contextmanager
def _inference(module: nn.Module) -> Iterator[None]:
    """The module in eval mode, and each submodule's own mode put back afterwards."""
    modes = [(inner, inner.training) for inner in module.modules() if inner.training]
    try:
        for inner, _ in modes:
            inner.training = False
        with torch.no_grad():
            yield
    finally:
        for inner, mode in modes:
            inner.training = mode


def _several(example_inputs: Any) -> list[Any]:
    if not isinstance(example_inputs, list):
        return [example_inputs]
    if not example_inputs:
        raise CaptureError("example_inputs is an empty list; give at least one batch")
    return example_inputs


def _arguments(module: nn.Module, example: Any) -> Feeds:
    """One example as keyword arguments of forward, all tensors."""
    parameters = inspect.signature(module.forward).parameters
    if isinstance(example, Mapping):
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for key in example:
            if key not in parameters and not open_ended:
                known = list(parameters)
                raise CaptureError(
                    f"example_inputs: {type(module).__name__}.forward has no argument {key!r}{_nearest(key, known)}"
                )
        return {str(key): as_tensor(value, str(key)) for key, value in example.items()}
    values = tuple(example) if isinstance(example, tuple) else (example,)
    named = [key for key, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(values) > len(named):
        raise CaptureError(
            f"example_inputs has {len(values)} tensors, and {type(module).__name__}.forward takes {len(named)}"
        )
    return {key: as_tensor(value, key) for key, value in zip(named, values, strict=False)}


def as_tensor(value: Any, name: str) -> Tensor:
    """A torch tensor of a tensor or a numpy array; CaptureError for anything else."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, bool | int | float):
        return torch.tensor(value)
    raise CaptureError(f"input {name!r} is a {type(value).__name__}; give a torch tensor or a numpy array")


def _run(module: nn.Module, arguments: Mapping[str, Any]) -> Any:
    try:
        return module(**arguments)
    except Exception as error:
        tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
        shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in tensors.items())
        raise CaptureError(
            f"{type(module).__name__} fails on the example inputs ({shapes}): {type(error).__name__}: "
            f"{_first_line(error)}{_user_line(module, error)}"
        ) from error


def _holds_cache(result: Any) -> bool:
    values = result.values() if isinstance(result, Mapping) else result if isinstance(result, tuple | list) else ()
    return any(type(value).__name__.endswith("Cache") for value in values)


def _accepts(module: nn.Module, argument: str) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return any(p.name == argument or p.kind is p.VAR_KEYWORD for p in parameters)


def _structure(result: Any) -> tuple[tuple[str, ...], Callable[[list[Any]], Any], list[int]]:
    """Names of the tensors in a result, how to build it again from them, and their places among its leaves."""
    leaves, tree = pytree.tree_flatten_with_path(result)
    picked = [index for index, (_, leaf) in enumerate(leaves) if isinstance(leaf, Tensor)]
    if not picked:
        raise CaptureError(f"the model returns a {type(result).__name__} without a tensor in it")
    names = [_leaf_name(path) for path, _ in leaves]
    fixed = [None if isinstance(leaf, Tensor) else leaf for _, leaf in leaves]

    def rebuild(outputs: list[Any]) -> Any:
        filled = list(fixed)
        for index, output in zip(picked, outputs, strict=True):
            filled[index] = output
        return pytree.tree_unflatten(filled, tree)

    return tuple(names[index] for index in picked), rebuild, picked


def _leaf_name(path: tuple[Any, ...]) -> str:
    keys = [getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in path]
    if not keys:
        return "output"
    return ".".join(str(key) for key in keys) if isinstance(keys[0], str) else "output_" + "_".join(map(str, keys))


def _dynamic_axes(
    example: Feeds, dynamic_shapes: Mapping[str, Mapping[int, str]] | None
) -> dict[str, dict[int, str]]:
    """By input, the names of its dynamic axes: the user's where given, the defaults elsewhere."""
    for name, axes in (dynamic_shapes or {}).items():
        if name not in example:
            raise CaptureError(f"dynamic_shapes: there is no input {name!r}{_nearest(name, list(example))}")
        for axis in axes:
            if not -example[name].dim() <= axis < example[name].dim():
                raise CaptureError(f"dynamic_shapes: {name} has {example[name].dim()} axes, and no axis {axis}")
    spec: dict[str, dict[int, str]] = {}
    for name, tensor in example.items():
        given = (dynamic_shapes or {}).get(name)
        if given is None:
            integer = not tensor.is_floating_point() and tensor.dim() > 1
            given = ({0: "batch"} if tensor.dim() else {}) | ({1: "seq"} if integer else {})
        spec[name] = {axis % tensor.dim(): str(label) for axis, label in given.items()}
    return spec


def _at_least_two(tensor: Tensor, axes: Mapping[int, str]) -> Tensor:
    """torch.export specializes axes of size 1, so dynamic ones are repeated to 2."""
    for axis in axes:
        if tensor.shape[axis] == 1:
            tensor = tensor.repeat_interleave(2, axis)
    return tensor


def _export(
    module: nn.Module, traced: Feeds, constants: Mapping[str, Any], spec: Mapping[str, Mapping[int, str]]
) -> torch.export.ExportedProgram:
    shapes: dict[str, Any] = {
        name: {axis: torch.export.Dim.AUTO for axis in axes} or None for name, axes in spec.items()
    } | dict.fromkeys(constants)
    parameters = inspect.signature(module.forward).parameters
    extra = {name for name in shapes if name not in parameters}
    if extra:  # they arrive through **kwargs, and torch.export wants their spec under its name
        keyword = next(p.name for p in parameters.values() if p.kind is p.VAR_KEYWORD)
        shapes = {name: shapes[name] for name in shapes if name not in extra} | {
            keyword: {name: shapes[name] for name in extra}
        }
    with warnings.catch_warnings(), _quiet("torch.export", "torch._dynamo", "torch.fx.experimental.symbolic_shapes"):
        warnings.simplefilter("ignore")
        return torch.export.export(module, (), {**traced, **constants}, dynamic_shapes=shapes, strict=False)


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _specialized(program: torch.export.ExportedProgram, spec: Mapping[str, Mapping[int, str]]) -> list[str]:
    """What should have been dynamic and is not."""
    placeholders = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    notes = []
    for name, axes in spec.items():
        value = placeholders.get(name)
        for axis, label in axes.items():
            if isinstance(value, Tensor) and not isinstance(value.shape[axis], torch.SymInt):
                notes.append(f"the export fixed axis {axis} ({label}) of {name} at {value.shape[axis]}")
    return notes


def _trace_failure(module: nn.Module, error: BaseException) -> str:
    return (
        f"torch.export cannot trace {type(module).__name__}{_user_line(module, error)}: {_first_line(error)}. "
        "Control flow that depends on values must go through torch.cond or torch.where"
    )


def _user_line(module: nn.Module, error: BaseException) -> str:
    """' at file:line (code)' of the innermost frame outside torch."""
    root = str(Path(torch.__file__).parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__)
              if not f.filename.startswith((root, "<")) and Path(f.filename) != Path(__file__)]  # fmt: skip
    if not frames:  # the exporter quotes user code in its message
        found = re.search(rf'File "(?!{re.escape(root)})([^"]+)", line (\d+), in \w+\n\s*(.+)', str(error))
        return f" at {Path(found[1]).name}:{found[2]} ({found[3].strip()})" if found else ""
    return f" at {frames[-1].filename}:{frames[-1].lineno} ({(frames[-1].line or '').strip()})"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# --- programs ------------------------------------------------------------------------------------------------------


def _capture_program(program: torch.export.ExportedProgram, dialect: str, example_inputs: Any) -> Captured:
    specs = program.graph_signature.user_inputs
    placeholders = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    names = [str(name) for name in specs if isinstance(placeholders.get(str(name)), Tensor)]
    feeds = [_program_feeds(names, one) for one in _several(example_inputs)] if example_inputs is not None else []
    if not feeds and program.example_inputs:
        args, kwargs = program.example_inputs
        flat = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        feeds = [dict(zip(names, flat, strict=True))]
    spec: dict[str, dict[int, str]] = {
        name: {axis: ("batch", "seq")[axis] if axis < 2 else f"{name}_{axis}"
               for axis, size in enumerate(placeholders[name].shape) if isinstance(size, torch.SymInt)}
        for name in names
    }  # fmt: skip
    tree = program.call_spec.out_spec
    count = len(program.graph_signature.user_outputs)
    names_out, rebuild, picked = _structure(
        pytree.tree_unflatten([torch.empty(0)] * count, tree) if tree is not None else tuple([torch.empty(0)] * count)
    )
    signature = Signature(tuple(names), names_out, rebuild)
    graph = _graph_of(program, dialect, signature, spec, picked)
    return Captured(graph, signature, feeds, "torch.export.ExportedProgram")


def _program_feeds(names: Sequence[str], example: Any) -> Feeds:
    if isinstance(example, Mapping):
        return {name: as_tensor(example[name], name) for name in names}
    values = example if isinstance(example, tuple) else (example,)
    return {name: as_tensor(value, name) for name, value in zip(names, values, strict=True)}


def _graph_of(
    program: torch.export.ExportedProgram,
    dialect: str,
    signature: Signature,
    spec: Mapping[str, Mapping[int, str]],
    picked: Sequence[int],
) -> Graph:
    from graphopt.raising import raise_words

    if dialect == "fx":
        from graphopt.dialects.fx import FxGraph

        graph: Graph = FxGraph.from_program(program, input_names=signature.inputs, output_names=signature.outputs)
    else:
        from graphopt.dialects.onnx_capture import from_program

        graph = from_program(program, signature.inputs, signature.outputs, spec, picked)
        fold_constants(graph)  # the exporter computes axes and scales that the forms to be raised are told by
    raise_words(graph)
    graph.sweep()
    return graph


# --- ONNX ----------------------------------------------------------------------------------------------------------


def _capture_file(path: Path, dialect: str, example_inputs: Any) -> Captured:
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
        raise CaptureError(f"{path} may hold a pickle, which is never loaded; load the module and hand that over")
    if path.suffix == ".pt2":
        return capture(torch.export.load(path), dialect, example_inputs=example_inputs)
    from graphopt.dialects.onnx_load import read_model

    return _capture_onnx(read_model(path), dialect, example_inputs, str(path))


def _capture_onnx(model: Any, dialect: str, example_inputs: Any, source: str) -> Captured:
    if dialect != "onnx":
        raise CaptureError(
            "an ONNX model cannot go to a target of the fx dialect; use target=onnxruntime, or hand over the nn.Module"
        )
    from graphopt.dialects import onnx_capture

    graph: Graph = onnx_capture.from_model(model)
    opset = onnx_capture.opset_of(graph)
    names = tuple(value.name for value in graph.inputs)
    outputs = tuple(value.name for value in graph.outputs)
    signature = Signature(names, outputs, lambda results: dict(zip(outputs, results, strict=True)))
    notes: list[str] = []
    if example_inputs is None:
        feeds = [_made_feeds(graph.inputs, notes)] if all(v.dtype is not None for v in graph.inputs) else []
    else:
        feeds = [signature.bind(one if isinstance(one, tuple) else (one,), {})[0] for one in _several(example_inputs)]
    expected = _reference(graph, feeds, notes)
    lifted = onnx_capture.lift(model, graph, notes)
    if lifted is not None:
        found = _reference(lifted, feeds, [])
        if expected is not None and found is not None and _all_equal(expected, found):
            graph = lifted
        else:
            notes.append(f"stays at opset {opset}: the lifted model does not compute the same")
    graph = onnx_capture.refined(_raise_checked(graph, feeds, expected, notes))
    return Captured(graph, signature, feeds if expected is not None else [], source, notes)


def _raise_checked(graph: Graph, feeds: Sequence[Feeds], expected: Any, notes: list[str]) -> Graph:
    """The graph with decomposed forms raised to words, if it still computes the same."""
    from graphopt.raising import raise_words

    raised = graph.clone()
    fold_constants(raised)  # exporters compute axes and scales that the forms to be raised are told by
    hits = raise_words(raised)
    if not hits:
        return graph
    raised.sweep()
    found = _reference(raised, feeds, []) if expected is not None else None
    if expected is not None and (found is None or not _all_equal(expected, found)):
        notes.append(f"decomposed forms were left as they are: raised ({', '.join(hits)}) they do not compute the same")
        return graph
    return raised


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
        notes.append(f"outputs cannot be compared: the model does not run on the example inputs ({_first_line(error)})")
        return None


def _all_equal(expected: Sequence[Sequence[Any]], found: Sequence[Sequence[Any]]) -> bool:
    return all(
        metrics.within_tolerance(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else repr(a) == repr(b)
        for one, other in zip(expected, found, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(names)}"


__all__ = ["CaptureError", "Captured", "GraphError", "Signature", "as_tensor", "capture"]
