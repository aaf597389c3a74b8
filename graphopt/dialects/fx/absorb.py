"""From the module of a graph back to the graph: what was trained becomes the graph's constants."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, fx, nn

from graphopt.dialects.fx.native import is_constant, source
from graphopt.dialects.fx.rounded import Rounded
from graphopt.dialects.fx.views import raw_of
from graphopt.errors import GraphError
from graphopt.ir.graph import Value

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


def absorb(graph: FxGraph, module: nn.Module) -> None:
    """Replace the constants of a graph by what a module of it has learned. [changes]

    Clones share tensors with the graph, so that none is written to. Raises GraphError, and changes nothing, where the
    module is of another graph, or has parameters that are not finite.
    """
    changed = {}
    with torch.no_grad():
        for name, where, tensor in _learned(_origins(module), module):
            stored = graph.native.stored.get(name)
            if not isinstance(stored, Tensor) or stored.shape != tensor.shape:
                shape = f"of shape {list(stored.shape)}" if isinstance(stored, Tensor) else "none"
                raise GraphError(
                    f"{where} has shape {list(tensor.shape)}, and the graph's constant {name} is {shape}: absorb a "
                    "module into the graph that made it, or into a clone, before other passes change the constants"
                )
            if not bool(tensor.isfinite().all()) and bool(stored.isfinite().all()):
                raise GraphError(
                    f"{where} is not finite after training: train with a smaller learning rate, and absorb the module "
                    "as it was before"
                )
            fresh = torch.empty_like(stored).copy_(tensor)
            if not torch.equal(fresh, stored):
                parameter = isinstance(stored, nn.Parameter)
                changed[name] = nn.Parameter(fresh, stored.requires_grad) if parameter else fresh
    graph.native.stored.update(changed)
    graph.version += 1


def _learned(origins: Origins, module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """The constants of the graph as the module has them: name in the graph, name in the module, tensor."""
    for name, path in origins.floats.items():
        yield name, path, _tensor(module, path)
    for name, weight in origins.weights.items():
        floats = _tensor(module, weight.parameter)
        if not bool(floats.isfinite().all()):  # rounding would hide it
            yield name, weight.parameter, floats
        integers = _rounded(module, weight.rounded).integers(floats.permute(weight.permutation))
        yield name, weight.parameter, integers.permute(inverse(weight.permutation))
    for name, path in origins.scales.items():
        yield name, f"{path}.scale", _rounded(module, path).step()


def parameter(module: nn.Module, value: Value) -> str | None:
    """The name of the parameter of a module that stands for a value of its graph, or None."""
    origins, node = _origins(module), raw_of(value)
    if not isinstance(node, fx.Node):
        return None
    if str(node.target).startswith("quantized_decomposed.dequantize") and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if not is_constant(node):
        return None
    while node.op != "get_attr":
        node = source(node)
    name = str(node.target)
    if name in origins.weights:
        path: str | None = origins.weights[name].parameter
    elif name in origins.scales:
        path = f"{origins.scales[name]}.scale"
    else:
        path = origins.floats.get(name)
    found = None if path is None else _tensor(module, path)
    return next((known for known, one in module.named_parameters() if one is found), None)


def inverse(permutation: Sequence[int]) -> list[int]:
    """The permutation that undoes another."""
    return sorted(range(len(permutation)), key=permutation.__getitem__)


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
