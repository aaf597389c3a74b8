"""Traces a module once with torch.export: arguments, dynamic axes, results, and errors that a user understands."""

from __future__ import annotations

import inspect
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.export.passes
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.capture.decode import DecodeStep
from graphopt.capture.failures import trace_failure, user_line
from graphopt.capture.labels import without_labels
from graphopt.dialects.fx.traced_layers import whole_layers
from graphopt.dialects.silence import quiet
from graphopt.errors import CaptureError, first_line, nearest
from graphopt.ir.graph import Feeds
from graphopt.ir.structure import Structure, structure_of

DynamicAxes = dict[str, dict[int, str]]
"""By input, the names of its dynamic axes."""


@dataclass(frozen=True)
class Traced:
    """A program, and what is known of the module that it was traced from."""

    program: torch.export.ExportedProgram
    examples: list[Feeds]
    """The example inputs by argument name, one for each shape."""
    axes: DynamicAxes
    structure: Structure
    expected: list[Tensor]
    """What the module itself returns for the first example."""
    notes: list[str]


def trace(
    module: nn.Module, example_inputs: Any, dynamic_shapes: Mapping[str, Mapping[int, str]] | None, cache: bool
) -> Traced:
    """Run the module on its examples and export it, in eval mode. Raises CaptureError; the module stays as it was."""
    notes: list[str] = []
    with _inference(module):
        if cache:
            if dynamic_shapes is not None:
                raise CaptureError("cache=True names the axes of the decode step itself: leave out dynamic_shapes")
            module, example_inputs, dynamic_shapes = DecodeStep.around(module, example_inputs)
        device = _device(module)
        given = [_arguments(module, without_labels(module, example)) for example in several(example_inputs)]
        examples = [{key: value.to(device) for key, value in example.items()} for example in given]
        constants: dict[str, Any] = {}
        result = _run(module, examples[0])
        if _holds_cache(result) and _accepts(module, "use_cache"):
            constants = {"use_cache": False}
            result = _run(module, examples[0] | constants)
            notes.append("captured with use_cache=False; for the decode step with its cache, pass cache=True")
        for example in examples[1:]:
            _run(module, example | constants)
        axes = _dynamic_axes(examples[0], dynamic_shapes)
        traced = {key: _at_least_two(value, axes.get(key, {})) for key, value in examples[0].items()}
        if any(traced[key].shape != examples[0][key].shape for key in traced):
            notes.append("dynamic axes of size 1 in the example inputs were repeated to 2 for tracing")
        try:
            program = _export(module, traced, constants, axes)
        except Exception as error:
            raise CaptureError(trace_failure(module, error)) from error
        _require_open(module, traced | constants, dynamic_shapes or {}, axes, _fixed(program, axes))
        if isinstance(module, DecodeStep):
            examples = [module.of_one_token(example) for example in examples]
            result = _run(module, examples[0])
    notes += [f"the export fixed axis {axis} ({axes[name][axis]}) of {name} at {size}"
              for (name, axis), size in _fixed(program, axes).items()]  # fmt: skip
    program, moved = on_cpu(program)
    notes += moved
    examples = [{key: value.cpu() for key, value in example.items()} for example in examples]
    public = getattr(module, "public_names", {})
    named_feeds: list[Feeds] = [
        {public.get(name, name): tensor for name, tensor in example.items()} for example in examples
    ]
    axes = {public.get(name, name): named for name, named in axes.items()}
    expected = [leaf.cpu() for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    return Traced(program, named_feeds, axes, structure_of(result), expected, notes)


def _device(module: nn.Module) -> torch.device:
    """The device of a module: that of its first parameter or buffer."""
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def on_cpu(program: torch.export.ExportedProgram) -> tuple[torch.export.ExportedProgram, list[str]]:
    """A program with its weights on the CPU, where graphs are changed and checked; a note where they were copied."""
    stored = [*program.state_dict.values(), *program.constants.values()]
    devices = {str(tensor.device) for tensor in stored if isinstance(tensor, Tensor)} - {"cpu"}
    if not devices:
        return program, []
    moved = torch.export.passes.move_to_device_pass(program, "cpu")
    return moved, [f"the model is on {', '.join(sorted(devices))}; graphopt changes a copy on the CPU"]


@contextmanager
def _inference(module: nn.Module) -> Iterator[None]:
    """The module in eval mode, and each submodule's own mode restored afterwards."""
    modes = [(inner, inner.training) for inner in module.modules() if inner.training]
    try:
        for inner, _ in modes:
            inner.training = False
        with torch.no_grad():
            yield
    finally:
        for inner, mode in modes:
            inner.training = mode


def several(example_inputs: Any) -> list[Any]:
    if not isinstance(example_inputs, list):
        return [example_inputs]
    if not example_inputs:
        raise CaptureError("example_inputs is an empty list; give at least one batch")
    return example_inputs


def _arguments(module: nn.Module, example: Any) -> Feeds:
    """One example as tensors by the names of forward's arguments; those of *xs are xs_0, xs_1 and so on."""
    parameters = inspect.signature(module.forward).parameters
    if isinstance(example, Mapping):
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for key in example:
            if key in parameters and parameters[key].kind is inspect.Parameter.VAR_POSITIONAL:
                raise CaptureError(f"example_inputs: {key!r} takes any number of tensors; give a tuple, not a dict")
            if key not in parameters and not open_ended:
                known = list(parameters)
                raise CaptureError(
                    f"example_inputs: {type(module).__name__}.forward has no argument {key!r}{nearest(key, known)}"
                )
        first = [key for key, p in parameters.items() if p.kind is p.POSITIONAL_ONLY and key in example]
        order = (*first, *(key for key in example if key not in first))
        return {str(key): as_tensor(example[key], str(key)) for key in order}
    values = tuple(example) if isinstance(example, tuple) else (example,)
    named = [key for key, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named += [f"{starred}_{number}" for starred in _starred(parameters) for number in range(len(values) - len(named))]
    if len(values) > len(named):
        raise CaptureError(
            f"example_inputs has {len(values)} tensors, and {type(module).__name__}.forward takes {len(named)}"
        )
    return {key: as_tensor(value, key) for key, value in zip(named, values, strict=False)}


def _starred(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """The name of *xs, if there is one."""
    return [key for key, p in parameters.items() if p.kind is p.VAR_POSITIONAL]


def _call(module: nn.Module, named: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by position and by keyword. By position go those that allow nothing else, and all before *xs."""
    parameters = inspect.signature(module.forward).parameters
    rest = [key for key in named if key not in parameters]
    extra = [key for starred in _starred(parameters) for key in rest if re.fullmatch(rf"{starred}_\d+", key)]
    by_position = {inspect.Parameter.POSITIONAL_ONLY} | ({inspect.Parameter.POSITIONAL_OR_KEYWORD} if extra else set())
    first = [key for key, p in parameters.items() if p.kind in by_position and key in named] + extra
    return tuple(named[key] for key in first), {key: value for key, value in named.items() if key not in first}


def as_tensor(value: Any, name: str) -> Tensor:
    """A torch tensor of a tensor or a numpy array; CaptureError for anything else."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.ndarray):
        try:
            return torch.from_numpy(np.asarray(value, order="C"))
        except TypeError as error:
            raise CaptureError(f"input {name!r} is an array of {value.dtype}, which is no tensor") from error
    if isinstance(value, bool | int | float):
        return torch.tensor(value)
    raise CaptureError(f"input {name!r} is a {type(value).__name__}; give a torch tensor or a numpy array")


def _run(module: nn.Module, arguments: Mapping[str, Any]) -> Any:
    """What the module returns. Buffers and arguments that it writes to are restored."""
    copies = {key: value.clone() if isinstance(value, Tensor) else value for key, value in arguments.items()}
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in module.buffers()]
    try:
        args, kwargs = _call(module, copies)
        result = module(*args, **kwargs)
        written = [(buffer, before) for buffer, version, before in buffers if buffer._version != version]
        if written:  # the module may return the buffer itself
            result = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, result)
        for buffer, before in written:
            buffer.copy_(before)
        return result
    except Exception as error:
        tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
        shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in tensors.items())
        raise CaptureError(
            f"{type(module).__name__} fails on the example inputs ({shapes}): {type(error).__name__}: "
            f"{first_line(error)}{user_line(error)}"
        ) from error


def _holds_cache(result: Any) -> bool:
    values = result.values() if isinstance(result, Mapping) else result if isinstance(result, tuple | list) else ()
    return any(type(value).__name__.endswith("Cache") for value in values)


def _accepts(module: nn.Module, argument: str) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return any(p.name == argument or p.kind is p.VAR_KEYWORD for p in parameters)


def _dynamic_axes(
    example: Feeds, dynamic_shapes: Mapping[str, Mapping[int, str]] | None
) -> dict[str, dict[int, str]]:
    """By input, the names of its dynamic axes: the user's where given, the defaults elsewhere."""
    for name, axes in (dynamic_shapes or {}).items():
        if name not in example:
            raise CaptureError(f"dynamic_shapes: there is no input {name!r}{nearest(name, list(example))}")
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
    args, kwargs = _call(module, {**traced, **constants})
    # torch.export wants what is given through *args or **kwargs under the name of that parameter, in its order.
    plain = {name: shape for name, shape in shapes.items() if name in parameters}
    by_position = [name for name in shapes if name not in parameters and name not in kwargs]
    by_keyword = [name for name in shapes if name not in parameters and name in kwargs]
    if by_position:
        plain |= {starred: tuple(shapes[name] for name in by_position) for starred in _starred(parameters)}
    if by_keyword:
        plain |= {p.name: {name: shapes[name] for name in by_keyword}
                  for p in parameters.values() if p.kind is p.VAR_KEYWORD}  # fmt: skip
    silent = quiet("torch.export", "torch._dynamo", "torch.fx.experimental.symbolic_shapes")
    with silent, redirect_stderr(io.StringIO()), whole_layers():  # torch prints the graph of a failed trace to stderr
        return torch.export.export(module, args, kwargs, dynamic_shapes=plain, strict=False)


Fixed = Mapping[tuple[str, int], int]
"""Axes that were to be dynamic, by input and axis, with the one size that they have in a program."""


def _fixed(program: torch.export.ExportedProgram, spec: Mapping[str, Mapping[int, str]]) -> Fixed:
    placeholders = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    return {
        (name, axis): int(value.shape[axis])
        for name, axes in spec.items() if isinstance(value := placeholders.get(name), Tensor)
        for axis in axes if str(value.shape[axis]).isdigit()  # also a symbol that stands for a number
    }  # fmt: skip


def _resized(traced: Feeds, spec: DynamicAxes, key: tuple[str, int]) -> dict[str, Any]:
    """The inputs with one entry more along an axis, and along all that have its name."""
    label = spec[key[0]][key[1]]
    return {
        name: _longer(tensor, [axis for axis, named in spec.get(name, {}).items() if named == label])
        for name, tensor in traced.items()
    }


def _longer(tensor: Tensor, axes: Iterable[int]) -> Tensor:
    for axis in axes:
        tensor = torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
    return tensor


def _require_open(
    module: nn.Module,
    arguments: Mapping[str, Any],
    asked: Mapping[str, Mapping[int, str]],
    spec: DynamicAxes,
    fixed: Fixed,
) -> None:
    """Raise CaptureError where an axis that the user named has one size in the program."""
    for (name, axis), size in fixed.items():
        if axis not in [given % arguments[name].dim() for given in asked.get(name, ())]:
            continue
        tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
        rest = {key: value for key, value in arguments.items() if key not in tensors}
        try:
            _run(module, _resized(tensors, spec, (name, axis)) | rest)
            why = "the model runs at other sizes, and computes with this one as a number while it is traced"
        except CaptureError as error:
            why = f"at another one, {error}"
        raise CaptureError(
            f"dynamic_shapes names axis {axis} of {name} {spec[name][axis]!r}, and the export fixed it at {size}: "
            f"{why}. Leave the axis out of dynamic_shapes, or let the model take other sizes"
        )
