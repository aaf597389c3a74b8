"""Every weight, its gradient and its state of the optimizer cut over ranks: FSDP2 on each block."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from graphopt.errors import UsageError
from graphopt.training.meshes.blocks import Chain, Segment, cut
from graphopt.training.meshes.mesh import Mesh
from graphopt.training.meshes.skeleton import Divided, emptied, moved
from graphopt.training.rules import FixedZeros, WeightRule


def shard(module: fx.GraphModule, mesh: Mesh) -> nn.Module:
    """The same module in segments, each of which has its shard of every weight until it runs (FSDP2); the module itself
    is empty then."""
    chain = Chain(cut(module))
    emptied(module)
    require_own(chain)
    names = [name for name in ("dp", "fsdp") if mesh.sizes.axes[name] > 1]
    devices = mesh.devices[tuple(names)] if names != list(mesh.devices.mesh_dim_names or ()) else mesh.devices
    whole = {one for one in chain.parameters() if one.dim() == 0}  # FSDP2 cuts axis 0, and scalars have none
    for one in [*chain.segments, chain]:
        if any(parameter not in whole for parameter in one.parameters()):
            fully_shard(one, mesh=devices, ignored_params=whole)
    return chain


def require_own(chain: Chain) -> None:
    """Raise UsageError where blocks share a module with weights, since each block is sharded by itself."""
    seen: dict[int, int] = {}
    for number, segment in enumerate(chain.segments):
        for name, parameter in segment.named_parameters():
            if seen.setdefault(id(parameter), number) != number:
                raise UsageError(
                    f"each block is sharded by itself, and {name.removeprefix('inner.')} is of a module that several "
                    "blocks call: use dp"
                )


def require_fixed(rules: Mapping[str, WeightRule], kind: str) -> dict[str, FixedZeros]:
    """The rules, of zeros that stay. Raises UsageError for others, which need whole weights; kind: what cuts them."""
    found: dict[str, FixedZeros] = {}
    for name, rule in rules.items():
        if not isinstance(rule, FixedZeros):
            raise UsageError(
                f"{name} has zeros that move as it is trained (sr_ste, or criterion=movement), which needs the whole "
                f"weight, and {kind} cuts it: use dp, or zeros that stay"
            )
        found[name] = rule
    return found


def local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter, as a plain tensor on the same memory."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class Sharded(Divided):
    """Each process has a shard of every tensor, and its own batches; with dp, groups of processes are copies."""

    def __init__(self, module: fx.GraphModule, trained: Collection[str], mesh: Mesh) -> None:
        """Raises UsageError where blocks share a module with weights."""
        running, self._skeleton = moved(module)
        self.mesh: Mesh = mesh
        self._places = self._skeleton.shapes
        chain = shard(running, mesh)
        self._chain = chain
        self.module = chain
        self._sharded = {name: one for name, one in named(chain) if isinstance(one, nn.Parameter)}
        self._buffers = {name: one for name, one in named(chain) if not isinstance(one, nn.Parameter)}
        self._count, self._index = mesh.sizes.fsdp, mesh.place["fsdp"]
        self.parameters = {}
        for name in trained:
            part = local(self._sharded[name].detach())
            known = self._sharded[name]
            self.parameters[name] = nn.Parameter(part) if isinstance(known, DTensor) else known

    # --- tensors

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: local(one.detach()) for name, one in self._sharded.items()} | self._buffers

    def stored(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: self._distributed(part, (self._places[name][0], *part.shape[1:]))
            if part.dim() and self._is_cut(name) else part
            for name, part in parts.items()
        }  # fmt: skip

    def blank(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if not shape or not self._is_cut(name):
            return torch.empty(shape, dtype=dtype)
        part = self.part(name, torch.empty(shape, dtype=dtype, device="meta"))
        return self._distributed(torch.empty_like(part, device=self.mesh.device), shape)

    def loaded(self, name: str, blank: Tensor) -> Tensor:
        return local(blank)

    def _distributed(self, part: Tensor, shape: Sequence[int]) -> Tensor:
        devices = self.mesh.devices["fsdp"] if len(self.mesh.devices.shape) > 1 else self.mesh.devices
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            part.contiguous(), devices, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
        )

    def part(self, name: str, whole: Tensor) -> Tensor:
        if not whole.dim() or not self._is_cut(name):
            return whole
        parts = _chunks(whole, self._count)
        return parts[self._index] if self._index < len(parts) else whole[:0]

    def wholes(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, part in parts.items():
            found[name] = self._gathered(name, part) if part.dim() and self._is_cut(name) else part
        return found

    def _is_cut(self, name: str) -> bool:
        return isinstance(self._sharded.get(name), DTensor)

    def _gathered(self, name: str, part: Tensor) -> Tensor:
        size = self._places[name][0]
        largest = -(-size // self._count)
        padded = part.new_zeros(largest, *part.shape[1:])
        padded[: len(part)] = part
        several = [torch.empty_like(padded) for _ in range(self._count)]
        dist.all_gather(several, padded, group=self.mesh.group("fsdp"))
        return torch.cat(several)[:size]

    def rules(self, rules: Mapping[str, WeightRule]) -> dict[str, WeightRule]:
        return {name: FixedZeros(self.part(name, rule.mask)) for name, rule in require_fixed(rules, "fsdp").items()}

    def copies(self, name: str) -> int:
        return self.mesh.world // (self._count if self._is_cut(name) else 1)

    # --- a step

    def run(self, effective: Mapping[str, Tensor], feeds: Sequence[Tensor]) -> Any:
        return self.module(*feeds)  # zeros that stay are zeros of the weight itself

    def reduce(self, others: Sequence[nn.Parameter]) -> None:
        group, whole = self.mesh.data_group, list(others)
        assert group is not None
        for name, own in self.parameters.items():
            gradient = self._sharded[name].grad
            if not self._is_cut(name):
                whole.append(own)
            elif gradient is not None:
                # FSDP2 gives the mean over ranks, and the weight of each batch says what it counts
                own.grad, self._sharded[name].grad = local(gradient).mul_(self.mesh.data_count), None
        self._sum(whole, group)
        self._average_statistics(group, self.mesh.data_count)


def _chunks(whole: Tensor, count: int) -> tuple[Tensor, ...]:
    """How FSDP2 cuts axis 0: equal parts, rounded up, and what is left for the last."""
    return whole.chunk(count)


def named(chain: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a state_dict of the whole module would hold, by the names there: parameters, and buffers that persist."""
    assert isinstance(chain, Chain)
    for segment in chain.segments:
        inner = cast(Segment, segment).inner
        yield from inner.named_parameters()
        persistent = inner.state_dict(keep_vars=True)
        yield from ((name, one) for name, one in inner.named_buffers() if name in persistent)
    yield from zip(chain.names, chain.shared, strict=True)
