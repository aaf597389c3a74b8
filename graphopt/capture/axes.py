"""Which axes of a module's inputs are dynamic, and what they are called: the user's words, torch's forms, defaults."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.export import Dim

from graphopt.analysis.masks import labels
from graphopt.capture.arguments import Call
from graphopt.errors import CaptureError, nearest
from graphopt.ir.graph import Feeds

DynamicAxes = dict[str, dict[int, str]]
"""By input, the names of its dynamic axes."""

Axis = tuple[str, int]
"""An axis of an input."""

_HINT = type(Dim.AUTO)


def dynamic_axes(calls: Sequence[Call], spec: Any, known: DynamicAxes) -> tuple[DynamicAxes, set[Axis]]:
    """By input, the names of its dynamic axes; and the axes whose names were given: those of one name have one size.

    spec: by input name, {axis: name}; or as torch.export.export takes it: a tuple by position or a dict by argument, as
    nested as the arguments, of None or of an entry for each dynamic axis: a Dim, Dim.AUTO, Dim.DYNAMIC or a name (None,
    Dim.STATIC and numbers are fixed). known: names of axes where the user gives none; elsewhere axis 0, and axis 1 of
    integers, get the names batch and seq.

    Raises CaptureError for inputs and axes that are not there, and where axes of one name have several sizes.
    """
    first = calls[0].tensors
    given = dict(_by_input(calls[0], spec))
    axes, own = DynamicAxes(), set[Axis]()
    for name, tensor in first.items():
        if name not in given:
            axes[name] = dict(known[name]) if name in known else _default(tensor)
            own |= {(name, axis) for axis in known.get(name, ())}
            continue
        axes[name] = {}
        for axis, entry in _entries(name, tensor, given[name]):
            if entry is None:
                axes[name][axis] = ("batch", "seq")[axis] if axis < 2 else f"{name}_{axis}"
            else:
                axes[name][axis] = entry if isinstance(entry, str) else entry.__name__
                own.add((name, axis))
    for call in calls:
        _require_one_size(call.tensors, axes, own)
    return axes, own


def _default(tensor: Tensor) -> dict[int, str]:
    integer = not tensor.is_floating_point() and tensor.dim() > 1
    return ({0: "batch"} if tensor.dim() else {}) | ({1: "seq"} if integer else {})


def _by_input(call: Call, spec: Any) -> Iterator[tuple[str, Any]]:
    """What a spec says of each input that it speaks of."""
    if isinstance(spec, tuple | list):
        if len(spec) > len(call.arguments):
            raise CaptureError(
                f"dynamic_shapes has {len(spec)} entries, and the example inputs are {', '.join(call.arguments)}"
            )
        spec = dict(zip(call.arguments, spec, strict=False))
    if not isinstance(spec, Mapping | None):
        raise CaptureError(f"dynamic_shapes is a {type(spec).__name__}; give {{input: {{axis: name}}}}")
    for name, entry in (spec or {}).items():
        starred = entry if isinstance(entry, Mapping) else {}
        if isinstance(entry, tuple | list):
            starred = {f"{name}_{number}": one for number, one in enumerate(entry)}
        if name not in call.arguments and starred and all(one in call.arguments for one in starred):
            for one, inner in starred.items():  # what torch.export has under the name of *xs or **kwargs
                yield from _within(str(one), inner, call)
        else:
            yield from _within(str(name), entry, call)


def _within(name: str, entry: Any, call: Call) -> Iterator[tuple[str, Any]]:
    """What an entry says of each input within an argument, which may be a structure."""
    inputs = [one for one in call.tensors if one.startswith(f"{name}.")]
    if name in call.tensors:
        yield name, entry
    elif entry is None or name in call.constants:
        yield from ((one, None) for one in inputs)
    elif not inputs or not isinstance(entry, Mapping | tuple | list):
        raise CaptureError(f"dynamic_shapes: there is no input {name!r}{nearest(name, list(call.tensors))}")
    else:
        for key, inner in entry.items() if isinstance(entry, Mapping) else enumerate(entry):
            yield from _within(f"{name}.{key}", inner, call)


def _entries(name: str, tensor: Tensor, entry: Any) -> Iterator[tuple[int, str | Dim | None]]:
    """The axes of an input that are dynamic, with a name, a Dim, or None where torch finds out."""
    if isinstance(entry, tuple | list) and len(entry) != tensor.dim():
        raise CaptureError(f"dynamic_shapes: {name} has {tensor.dim()} axes, and {len(entry)} entries")
    if not isinstance(entry, Mapping | tuple | list | None):
        raise CaptureError(f"dynamic_shapes: {name} has {entry!r}; give {{axis: name}}")
    for axis, one in entry.items() if isinstance(entry, Mapping) else enumerate(entry or ()):
        if not isinstance(axis, int) or not -tensor.dim() <= axis < tensor.dim():
            raise CaptureError(f"dynamic_shapes: {name} has {tensor.dim()} axes, and no axis {axis}")
        if one is None or isinstance(one, int) or one is Dim.STATIC:
            continue
        if not isinstance(one, str | Dim | _HINT):
            raise CaptureError(f"dynamic_shapes: axis {axis} of {name} is {one!r}; give a name or a torch.export.Dim")
        yield axis % tensor.dim(), one if isinstance(one, str | Dim) else None


def _require_one_size(tensors: Feeds, axes: DynamicAxes, given: Collection[Axis]) -> None:
    """Raise CaptureError where axes that were given one name have several sizes in an example."""
    found: dict[str, tuple[int, str]] = {}
    for name, axis in ((name, axis) for name, named in axes.items() for axis in named if (name, axis) in given):
        label, size = axes[name][axis], tensors[name].shape[axis]
        before, first = found.setdefault(label, (size, f"axis {axis} of {name}"))
        if size != before:
            raise CaptureError(
                f"dynamic_shapes: {first} is {before}, and axis {axis} of {name} is {size}, and both are called "
                f"{label!r}: axes of one name have one size; name them apart"
            )


def distinct(shapes: Mapping[str, Sequence[Any]], axes: DynamicAxes, given: Collection[Axis] = ()) -> DynamicAxes:
    """The names that dynamic axes get, now that a trace has found which of them have one size.

    shapes: of the inputs, as the trace has them. given: the axes whose names the user gave, which stay. Any other name
    stands for the first size that claims it, and a later one gets its input before it: docs_batch.
    """
    symbols = {
        (name, axis): str(shapes[name][axis])
        for name, named in axes.items() for axis in named if not isinstance(shapes[name][axis], int)
    }  # fmt: skip
    known: dict[str, str] = {}
    for (name, axis), symbol in symbols.items():
        if (name, axis) in given:
            known.setdefault(symbol, axes[name][axis])
    found = labels(((symbol, axes[name][axis], name) for (name, axis), symbol in symbols.items()), known)
    return {
        name: {axis: found.get(symbols.get((name, axis), ""), label) for axis, label in named.items()}
        for name, named in axes.items()
    }
