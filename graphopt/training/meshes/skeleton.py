"""The whole module of a training that is spread: it holds no tensors while each process trains its part of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from graphopt.training.meshes.spread import Spread


class Skeleton:
    """A module whose parameters are taken out, and put back to read what was trained."""

    def __init__(self, module: nn.Module) -> None:
        """From now on the parameters of the module hold nothing (they are on the meta device)."""
        self.module = module
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        """Where each parameter is, by its first name: tied ones are in several places."""
        names: dict[int, str] = {}
        for owner_name, owner in module.named_modules():
            for name, parameter in owner.named_parameters(recurse=False):
                known = names.setdefault(id(parameter), f"{owner_name}.{name}".lstrip("."))
                self._places.setdefault(known, []).append((owner, name))
        self.shapes = {name: one.shape for name, one in module.named_parameters()}
        self._empty()

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Put in whole tensors, of buffers too, by their names in the state_dict."""
        for name, places in self._places.items():
            whole = nn.Parameter(tensors[name], requires_grad=False)
            for owner, own in places:
                setattr(owner, own, whole)
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                if name in tensors:
                    buffer.copy_(tensors[name])

    @contextmanager
    def filled(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Put whole tensors in for a while."""
        self.fill(tensors)
        try:
            yield
        finally:
            self._empty()

    def _empty(self) -> None:
        for places in self._places.values():
            first, name = places[0]
            nothing = nn.Parameter(getattr(first, name).detach().to("meta"), requires_grad=False)
            for owner, own in places:
                setattr(owner, own, nothing)


class Divided(Spread):
    """No process has the whole module: a skeleton holds its place, and is filled where what was trained is read."""

    _skeleton: Skeleton

    @contextmanager
    def filled(self, module: nn.Module) -> Iterator[None]:
        with self._skeleton.filled(self.wholes(self.tensors)):
            yield

    def settle(self, module: nn.Module) -> None:
        self._skeleton.fill(self.wholes(self.tensors))


def given_by(
    sender: int, one: Tensor | None, shape: Sequence[int], dtype: torch.dtype, group: dist.ProcessGroup,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """A tensor that one rank of a group has, on all of them; every rank of the group must call it.

    sender: its place in the group. one: the tensor there, of this shape and dtype; not read elsewhere.
    """
    is_here = dist.get_rank(group) == sender
    assert one is not None or not is_here
    found = one.contiguous() if is_here and one is not None else torch.empty(shape, dtype=dtype, device=device)
    dist.broadcast(found, dist.get_global_rank(group, sender), group=group)
    return found


def emptied(module: nn.Module) -> None:
    """Drop the parameters of a GraphModule whose parts have them now: it is garbage, which is collected much later.

    Modules that it calls are those of its parts, and keep theirs.
    """
    for owner in module.modules():
        if type(owner) is nn.Module or isinstance(owner, fx.GraphModule):
            for name, parameter in list(owner.named_parameters(recurse=False)):
                setattr(owner, name, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))


def moved(module: fx.GraphModule) -> tuple[fx.GraphModule, Skeleton]:
    """A module of the same structure that takes over the parameters and has buffers of its own, and the skeleton of
    the module that is left."""
    memo = {id(one): one for one in module.parameters()}
    taken: fx.GraphModule = copy.deepcopy(module, memo)
    return taken, Skeleton(module)
