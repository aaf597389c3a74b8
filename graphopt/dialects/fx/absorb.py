"""From the module of a graph back to the graph: what was trained becomes the graph's constants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, fx, nn

from graphopt.dialects.fx.native import is_constant
from graphopt.dialects.fx.pairs import Form, inverse, layout
from graphopt.dialects.fx.rounded import Rounded
from graphopt.dialects.fx.views import raw_of
from graphopt.errors import GraphError
from graphopt.ir.graph import Value, dtype_name

if TYPE_CHECKING:
    from graphopt.dialects.fx.graph import FxGraph

ORIGINS = "graphopt.origins"
"""The key of a module's meta that holds its `Origins`."""


@dataclass(frozen=True)
class RoundedWeight:
    """A parameter that stands for stored integers."""

    parameter: str
    """Its name in the module; it has the layout of the stored integers."""
    rounded: str
    """The name of the `Rounded` that reads it."""
    permutation: tuple[int, ...]
    """How the parameter is permuted before it is rounded."""


@dataclass(frozen=True)
class Origins:
    """Which constants of the graph the tensors of its module stand for: names in the module by names in the graph.

    Names only, so that a copy of the module has them too.
    """

    floats: dict[str, str]
    """Parameters, and the statistics of batch norms."""
    weights: dict[str, RoundedWeight]
    scales: dict[str, str]
    """Learned scales: the `Rounded` that has each."""
    numbers: dict[str, str]
    """Of nodes that have a learned scale as a number in their arguments: the `Rounded` that has it."""


def absorb(graph: FxGraph, module: nn.Module) -> None:
    """Replace the constants of a graph by what a module of it has learned. [changes]

    Clones share tensors with the graph, so that none is written to. Raises GraphError, and changes nothing, where the
    module is of another graph, or has parameters that are not finite.
    """
    changed = {}
    with torch.no_grad():
        for name, where, tensor in _learned(graph, _origins(module), module):
            stored = graph.native.stored.get(name)
            if not isinstance(stored, Tensor) or _form(stored) != _form(tensor):
                raise GraphError(
                    f"{where} is {_form(tensor)}, and the graph's constant {name} is {_form(stored)}: absorb a module "
                    "into the graph that made it, or into a clone, before passes change the constants"
                )
            fresh = torch.empty_like(stored).copy_(tensor)
            if not torch.equal(fresh, stored):
                parameter = isinstance(stored, nn.Parameter)
                changed[name] = nn.Parameter(fresh, stored.requires_grad) if parameter else fresh
        numbers = {
            name: _finite(_rounded(module, path).step(), f"{path}.scale").item()
            for name, path in _origins(module).numbers.items()
        }
    graph.native.stored.update(changed)
    for node in graph.native.graph.nodes if numbers else ():
        if node.name in numbers:
            node.args = (node.args[0], numbers[node.name], *node.args[2:])
    graph.version += 1


def _learned(graph: FxGraph, origins: Origins, module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """The constants of the graph as the module has them: name in the graph, name in the module, tensor."""
    for name, path in origins.floats.items():
        tensor, stored = _tensor(module, path), graph.native.stored.get(name)
        masks = isinstance(stored, Tensor) and not bool(stored.isfinite().all())  # such as -inf before a softmax
        yield name, path, tensor if masks else _finite(tensor, path)
    for name, weight in origins.weights.items():
        floats = _finite(_tensor(module, weight.parameter), weight.parameter)
        integers = _rounded(module, weight.rounded).integers(floats.permute(weight.permutation))
        yield name, weight.parameter, integers.permute(inverse(weight.permutation))
    for name, path in origins.scales.items():
        yield name, f"{path}.scale", _finite(_rounded(module, path).step(), f"{path}.scale")


def _finite(tensor: Tensor, where: str) -> Tensor:
    if not bool(tensor.isfinite().all()):
        raise GraphError(
            f"{where} is not finite after training: train with a smaller learning rate, and absorb the module as it "
            "was before"
        )
    return tensor


def _form(thing: object) -> str:
    """The shape of a stored tensor, and whether it holds floats (of any dtype, as training may change it)."""
    if not isinstance(thing, Tensor):
        return "no tensor"
    return f"{'float' if thing.is_floating_point() else dtype_name(thing.dtype)} {list(thing.shape)}"


def parameter(module: nn.Module, value: Value) -> str | None:
    """The name of the parameter of a module that stands for a value of its graph, or None."""
    origins, node = _origins(module), raw_of(value)
    if not isinstance(node, fx.Node):
        return None
    form = Form.of(node, "dequantize")
    node = node if form is None else form.x
    if not is_constant(node):
        return None
    name, _ = layout(node)
    if name in origins.weights:
        path: str | None = origins.weights[name].parameter
    elif name in origins.scales:
        path = f"{origins.scales[name]}.scale"
    else:
        path = origins.floats.get(name)
    found = None if path is None else _tensor(module, path)
    return next((known for known, one in module.named_parameters() if one is found), None)


def float_of(module: nn.Module, name: str) -> Tensor | None:
    """The parameter or statistic of a module that stands for a constant of its graph; None for stored integers."""
    path = _origins(module).floats.get(name)
    return None if path is None else _tensor(module, path)


def _origins(module: nn.Module) -> Origins:
    origins = getattr(module, "meta", {}).get(ORIGINS)
    if not isinstance(origins, Origins):
        raise GraphError(f"{type(module).__name__} was not made by Graph.module: hand over the module itself, not one "
                         "that wraps it")  # fmt: skip
    return origins


def _tensor(module: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    return cast(Tensor, getattr(module.get_submodule(owner), name))


def _rounded(module: nn.Module, path: str) -> Rounded:
    return cast(Rounded, module.get_submodule(path))
