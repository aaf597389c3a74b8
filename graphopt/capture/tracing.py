"""Traces a module once with torch.export: arguments, dynamic axes, results, and errors that a user understands."""

from __future__ import annotations

import inspect
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.export.passes
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.capture.arguments import Call, call_of, several
from graphopt.capture.axes import Axis, DynamicAxes, distinct, dynamic_axes
from graphopt.capture.decode import after_prompt, axes_of, has_cache, has_past, step_of, to_trace
from graphopt.capture.entry import Entry
from graphopt.capture.failures import NotExported, named, trace_failure, user_line
from graphopt.capture.labels import without_labels
from graphopt.capture.precision import behind_half, captured_half, captured_wide, half_types, in_float32
from graphopt.dialects.fx.traced_layers import whole_layers
from graphopt.dialects.silence import quiet
from graphopt.errors import CaptureError
from graphopt.ir.graph import Feeds, shapes_text
from graphopt.ir.structure import Structure, flattened, structure_of

_LOUD = ("torch.export", "torch._dynamo", "torch.fx.experimental.symbolic_shapes")
"""Loggers that report what a trace runs into, which an error says."""


@dataclass(frozen=True)
class Traced:
    """A program, and what is known of the module that it was traced from."""

    program: torch.export.ExportedProgram
    examples: list[Feeds]
    """The example inputs by name, one for each shape."""
    call: Call
    """The first of them as a call of the module."""
    axes: DynamicAxes
    structure: Structure
    expected: list[Tensor]
    """What the module itself returns for the first example."""
    notes: list[str]


def trace(module: nn.Module, example_inputs: Any, dynamic_shapes: Any, cache: bool) -> Traced:
    """Run the module on its examples and export it, in eval mode. Raises CaptureError; the module stays as it was.

    example_inputs: as `call_of` takes them, or arguments of a decode step with its cache; a list holds several.
    dynamic_shapes: as `dynamic_axes` takes it. cache: the examples are prompts, and the step after them is meant.
    """
    _require_traceable(module)
    if cache and dynamic_shapes is not None:
        raise CaptureError("cache=True names the axes of the decode step itself: leave out dynamic_shapes")
    with _inference(module):
        calls, axes, given, notes = _calls(module, example_inputs, dynamic_shapes, cache)
        result = _run(module, calls[0])
        further = {}
        if _holds_cache(result) and _accepts(module, "use_cache"):
            further = {"use_cache": False}
            result = _run(module, calls[0], further)
            notes.append("captured with use_cache=False; for the decode step with its cache, pass cache=True")
        for call in calls[1:]:
            _run(module, call, further)
        traced, call, result = _wide(module, calls[0], result, further, notes)
        example = {name: _at_least_two(tensor, axes.get(name, {})) for name, tensor in _to_trace(calls[0]).items()}
        if any(example[name].shape != tensor.shape for name, tensor in calls[0].tensors.items()):
            notes.append("dynamic axes of size 1 in the example inputs were repeated to 2 for tracing")
        entry = Entry(traced, partial(call.run, **further), list(example))
        try:
            with quiet(*_LOUD), redirect_stderr(io.StringIO()), whole_layers():  # torch prints the graph of a failure
                program = entry.exported(example, axes)
        except CaptureError:
            raise
        except Exception as error:
            raise NotExported(trace_failure(module, error)) from error
        shapes = input_shapes(program, calls[0].tensors)
        fixed = _fixed(shapes, axes)
        _require_open(traced, replace(call, tensors=example), axes, given, fixed, further)
    notes += [f"the export fixed axis {axis} ({axes[name][axis]}) of {name} at {size}"
              for (name, axis), size in fixed.items()]  # fmt: skip
    program, moved = on_cpu(program)
    notes += moved
    returned = structure_of(result, entry.sizes)
    leaves = [leaf for _, leaf in flattened(result)[0]]
    expected = [torch.as_tensor(leaves[place]).cpu() for place in returned.places]
    examples: list[Feeds] = [{name: tensor.cpu() for name, tensor in call.tensors.items()} for call in calls]
    return Traced(program, examples, calls[0], distinct(shapes, axes, given), returned, expected, notes)


def _calls(
    module: nn.Module, example_inputs: Any, dynamic_shapes: Any, cache: bool
) -> tuple[list[Call], DynamicAxes, set[Axis], list[str]]:
    """The examples as calls on the module's device; its dynamic axes, and those that were named; and notes."""
    examples = several(example_inputs)
    if cache:
        examples = [after_prompt(module, example) for example in examples]
    steps = has_cache(examples[0])
    make = step_of if steps else call_of
    device, calls = _device(module), list[Call]()
    for example in examples:
        call = make(module, without_labels(module, example))
        calls.append(replace(call, tensors={name: tensor.to(device) for name, tensor in call.tensors.items()}))
        if (list(call.tensors), call.constants) != (list(calls[0].tensors), calls[0].constants):
            raise CaptureError(
                "example_inputs: all must have the same inputs and constants, and these differ: "
                f"{_described(calls[0])}; {_described(call)}"
            )
    if not calls[0].tensors:
        raise CaptureError(f"example_inputs hold no tensor: {_described(calls[0])}")
    notes = []
    if calls[0].constants:
        notes.append("fixed in the captured graph, as they are no tensors: "
                     + ", ".join(f"{name}={value!r}" for name, value in calls[0].constants.items()))  # fmt: skip
    axes, given = dynamic_axes(calls, dynamic_shapes, axes_of(calls[0].tensors) if steps else {})
    return calls, axes, given, notes


def _wide(
    module: nn.Module, call: Call, result: Any, further: Mapping[str, Any], notes: list[str]
) -> tuple[nn.Module, Call, Any]:
    """The module, its call and its result; of a module in 16 bits those of a copy in float32, if that runs."""
    narrow = half_types(module)
    if not narrow:
        return module, call, result
    try:
        wide = in_float32(module)
        made = behind_half(replace(call, run=call.of(wide).run), result)
        found = _run(wide, made, further)
    except Exception as error:  # whatever copying and running the module raises
        notes.append(captured_half(narrow, error))
        return module, call, result
    notes.append(captured_wide(narrow))
    return wide, made, found


def _described(call: Call) -> str:
    return ", ".join([*call.tensors, *(f"{name}={value!r}" for name, value in call.constants.items())])


def _to_trace(call: Call) -> Feeds:
    """The tensors to trace: copies, for torch takes one tensor that is given twice for one input."""
    tensors = to_trace(call.tensors) if has_past(call.tensors) else call.tensors
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _require_traceable(module: nn.Module) -> None:
    """Raise CaptureError for modules that torch.export does not take."""
    name = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise CaptureError(
            f"{name} is compiled by TorchScript, which torch.export does not trace: hand over the nn.Module that it is "
            "made of, or an ONNX file of it"
        )
    stored = [*module.named_parameters(), *module.named_buffers()]
    if empty := next((path for path, tensor in stored if tensor.is_meta), None):
        raise CaptureError(
            f"{empty} of {name} is on the meta device and has no numbers: load the weights first (module.to_empty and "
            "load_state_dict, or from_pretrained)"
        )


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


def _run(module: nn.Module, call: Call, further: Mapping[str, Any] | None = None) -> Any:
    """What the module returns, called with further arguments. Buffers and arguments that it writes to are restored."""
    copies = {name: tensor.clone() for name, tensor in call.tensors.items()}
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in module.buffers()]
    try:
        result = call.run(copies, **(further or {}))
        written = [(buffer, before) for buffer, version, before in buffers if buffer._version != version]
        if written:  # the module may return the buffer itself
            result = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, result)
        for buffer, before in written:
            buffer.copy_(before)
        return result
    except CaptureError:
        raise
    except Exception as error:
        given = [shapes_text(call.tensors), *(f"{name}={value!r}" for name, value in call.constants.items())]
        what = f"{type(module).__name__} fails on the example inputs ({', '.join(given)})"
        raise CaptureError(f"{what}: {named(error)}{user_line(error)}") from error


def _holds_cache(result: Any) -> bool:
    values = result.values() if isinstance(result, Mapping) else result if isinstance(result, tuple | list) else ()
    return any(type(value).__name__.endswith("Cache") for value in values)


def _accepts(module: nn.Module, argument: str) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    return any(p.name == argument or p.kind is p.VAR_KEYWORD for p in parameters)


def _at_least_two(tensor: Tensor, axes: Mapping[int, str]) -> Tensor:
    """torch.export specializes axes of size 1, so dynamic ones are repeated to 2."""
    for axis in axes:
        if tensor.shape[axis] == 1:
            tensor = tensor.repeat_interleave(2, axis)
    return tensor


def input_shapes(program: torch.export.ExportedProgram, names: Iterable[str]) -> dict[str, Sequence[Any]]:
    """The shapes of a program's inputs, which are called so in order."""
    placeholders = {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}
    values = [placeholders.get(str(name)) for name in program.graph_signature.user_inputs]
    tensors = [value for value in values if isinstance(value, Tensor)]
    return {name: tensor.shape for name, tensor in zip(names, tensors, strict=True)}


Fixed = Mapping[Axis, int]
"""Axes that were to be dynamic, by input and axis, with the one size that they have in a program."""


def _fixed(shapes: Mapping[str, Sequence[Any]], spec: Mapping[str, Mapping[int, str]]) -> Fixed:
    return {
        (name, axis): int(str(shapes[name][axis]))
        for name, axes in spec.items()
        for axis in axes
        if str(shapes[name][axis]).isdigit()  # also a symbol that stands for a number
    }


def _resized(traced: Feeds, spec: DynamicAxes, key: Axis) -> Feeds:
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
    module: nn.Module, call: Call, spec: DynamicAxes, given: set[Axis], fixed: Fixed, further: Mapping[str, Any]
) -> None:
    """Raise CaptureError where an axis that the user named has one size in the program. call: what was traced."""
    for (name, axis), size in fixed.items():
        if (name, axis) not in given:
            continue
        try:
            _run(module, replace(call, tensors=_resized(call.tensors, spec, (name, axis))), further)
            why = "the model runs at other sizes, and computes with this one as a number while it is traced"
        except CaptureError as error:
            why = f"at another one, {error}"
        raise CaptureError(
            f"dynamic_shapes names axis {axis} of {name} {spec[name][axis]!r}, and the export fixed it at {size}: "
            f"{why}. Leave the axis out of dynamic_shapes, or let the model take other sizes"
        )
