"""An example of what a module is called with -> its tensors by name, and how they make up a call."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graphopt.errors import CaptureError, nearest
from graphopt.ir.graph import Feeds
from graphopt.ir.structure import flattened

Constant = None | bool | int | float | str
"""What an argument may be besides tensors; a trace fixes it."""


@dataclass(frozen=True)
class Call:
    """One call of a module: tensors, which may be others at the next call, and constants, which may not."""

    tensors: Feeds
    """By name: the argument's, and the path within it where it is a list, a tuple or a dict: past.0.1."""
    constants: dict[str, Constant]
    arguments: tuple[str, ...]
    """The names of the arguments, as they follow by position."""
    run: Callable[..., Any]
    """Calls the module with a mapping of such tensors, and with further arguments by keyword."""
    of: Callable[[nn.Module], Call]
    """The same call of another module."""


def call_of(module: nn.Module, example: Any) -> Call:
    """The call that an example stands for: a tensor, a tuple by position, or a dict by the names of arguments.

    Arguments are tensors (torch or numpy), None, numbers, booleans and texts, and lists, tuples and dicts of these;
    those of *xs are called xs_0, xs_1 and so on. Raises CaptureError for anything else, and for arguments that forward
    does not have.
    """
    given = _by_name(module, example)
    tensors, constants = dict[str, Tensor](), dict[str, Constant]()
    makers: dict[str, tuple[list[str], Callable[[Sequence[Any]], Any]]] = {}
    for argument, value in given.items():
        leaves, rebuild = leaves_of(argument, value), flattened(value)[1]
        makers[argument] = list(leaves), rebuild
        for name, leaf in leaves.items():
            if isinstance(leaf, Constant) and not isinstance(leaf, np.generic):
                constants[name] = leaf
            else:
                tensors[name] = as_tensor(leaf, name)

    def run(tensors: Mapping[str, Tensor], **further: Any) -> Any:
        filled = {**constants, **tensors}
        named = {argument: make([filled[name] for name in names]) for argument, (names, make) in makers.items()}
        args, kwargs = _parted(module, named | further)
        return module(*args, **kwargs)

    return Call(tensors, constants, tuple(given), run, lambda other: call_of(other, example))


def leaves_of(name: str, value: Any) -> dict[str, Any]:
    """The leaves of an argument by name, as `Call.tensors` has them; the argument itself where it is no structure."""
    return {".".join(map(str, (name, *path))): leaf for path, leaf in flattened(value)[0]}


def is_structure(value: Any) -> bool:
    """Whether a value is made of arrays, and is none itself: a list of numbers is one."""
    leaves, _ = flattened(value)
    return any(path and isinstance(leaf, Tensor | np.ndarray) for path, leaf in leaves)


def as_tensor(value: Any, name: str) -> Tensor:
    """A torch tensor of a tensor or a numpy array; CaptureError for anything else."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.ndarray | np.generic):
        try:
            return torch.from_numpy(np.asarray(value, order="C"))
        except TypeError as error:
            raise CaptureError(f"input {name!r} is an array of {value.dtype}, which is no tensor") from error
    if isinstance(value, bool | int | float):
        return torch.tensor(value)
    raise CaptureError(f"input {name!r} is a {type(value).__name__}; give a torch tensor or a numpy array")


def several(example_inputs: Any) -> list[Any]:
    """The examples, of which a list holds one for each shape."""
    if not isinstance(example_inputs, list):
        return [example_inputs]
    if not example_inputs:
        raise CaptureError("example_inputs is an empty list; give at least one batch")
    return example_inputs


def _by_name(module: nn.Module, example: Any) -> dict[str, Any]:
    """Values by the names of forward's arguments."""
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
        return {str(key): example[key] for key in order}
    values = tuple(example) if isinstance(example, tuple) else (example,)
    named = [key for key, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named += [f"{starred}_{number}" for starred in _starred(parameters) for number in range(len(values) - len(named))]
    if len(values) > len(named):
        raise CaptureError(
            f"example_inputs has {len(values)} tensors, and {type(module).__name__}.forward takes {len(named)}"
        )
    return dict(zip(named, values, strict=False))


def _starred(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """The name of *xs, if there is one."""
    return [key for key, p in parameters.items() if p.kind is p.VAR_POSITIONAL]


def _parted(module: nn.Module, named: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by position and by keyword. By position go those that allow nothing else, and all before *xs."""
    parameters = inspect.signature(module.forward).parameters
    rest = [key for key in named if key not in parameters]
    extra = [key for starred in _starred(parameters) for key in rest if re.fullmatch(rf"{starred}_\d+", key)]
    by_position = {inspect.Parameter.POSITIONAL_ONLY} | ({inspect.Parameter.POSITIONAL_OR_KEYWORD} if extra else set())
    first = [key for key, p in parameters.items() if p.kind in by_position and key in named] + extra
    return tuple(named[key] for key in first), {key: value for key, value in named.items() if key not in first}
