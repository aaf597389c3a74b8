"""Which part of a training this process has, and how its gradients become those of the whole training."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from graphopt.pipeline.batches import Batch
from graphopt.training.meshes.mesh import Mesh
from graphopt.training.precision import Amp
from graphopt.training.rules import WeightRule
from graphopt.training.settings import Settings


@dataclass(frozen=True)
class Told:
    """What the ranks agree on before a step."""

    batches: int
    """That the step trains on, over all parts of the data."""
    rounds: int
    """The most batches that one rank has: each runs as many, so that none waits for what another does not do."""
    interrupted: bool
    seconds: float
    """Spent so far, as rank 0 counts them."""
    is_due: bool
    """Whether a checkpoint is due, as rank 0 finds."""


class Training(Protocol):
    """What a spread asks of the loop (`training.loop.Trainer`)."""

    def rounds(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, float]]:
        """The batches of a step, with what each counts; as many on every rank."""

    @property
    def amp(self) -> Amp:
        """The precision of products."""

    def effective(self) -> dict[str, Tensor]:
        """The weights that the forward pass reads in place of those that are stored, by name."""

    def feeds(self, batch: Batch) -> list[Tensor]:
        """The inputs of the graph in order, on the device."""

    def judged(self, result: Any, batch: Batch, weight: float) -> tuple[Tensor, dict[str, float]]:
        """The loss of what the module returned for a batch, times a weight, to differentiate; and its terms."""

    def backward(self, batch: Batch, weight: float) -> dict[str, float]:
        """Add the gradient of the loss on one batch, times a weight; the terms of the loss, times the weight."""


def add_terms(own: dict[str, float], terms: Mapping[str, float], weight: float) -> None:
    """Add the terms of the loss on a batch to those of a step; a batch without weight has none."""
    for name, term in terms.items():
        own[name] = own.get(name, 0.0) + (term if weight else 0.0)


class Spread:
    """A whole module in each process: one process, or data parallel, where each has its own batches.

    Tensors are known by their names in the whole module. `tensors` are all that its state_dict holds, `parameters`
    those that are trained, as this process has them: plain tensors that the optimizer changes in place.
    """

    def __init__(self, module: nn.Module, trained: Collection[str], mesh: Mesh | None = None) -> None:
        """module: of the graph, on its device. trained: the names of its parameters that the optimizer changes."""
        self.module, self.mesh = module, mesh
        known = dict(module.named_parameters())
        self.parameters: dict[str, nn.Parameter] = {name: known[name] for name in trained}

    # --- tensors -----------------------------------------------------------------------------------------------------

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that the state_dict of the whole module holds, as this process has it; absent where it has nothing."""
        found: dict[str, Tensor] = self.module.state_dict()
        return found

    def part(self, name: str, whole: Tensor) -> Tensor | None:
        """Of a tensor that is like a parameter or buffer of the whole module, the part that this process has."""
        return whole

    def wholes(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The wholes of what each rank has a part of, by the names of parameters and buffers that they are like, and
        of what is no part under any other name; every rank must call it."""
        return dict(parts)

    def stored(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """These parts as torch.distributed.checkpoint takes them; every rank must call it. What several ranks give
        under one name is the same."""
        return dict(parts)

    def blank(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """An empty tensor to read the part of a stored one into, of that shape as a whole; None where this process has
        nothing of it."""
        return torch.empty(shape, dtype=dtype)

    def loaded(self, name: str, blank: Tensor) -> Tensor | None:
        """The part that was read into a blank tensor."""
        return blank

    @contextmanager
    def filled(self, module: nn.Module) -> Iterator[None]:
        """The whole module that this was made of holds the tensors of all ranks; every rank must enter it."""
        yield

    def settle(self, module: nn.Module) -> None:
        """The training is over: the whole module holds the tensors of all ranks, and keeps them."""

    def rules(self, rules: Mapping[str, WeightRule]) -> dict[str, WeightRule]:
        """What the weights keep to, for the parts that this process has."""
        return dict(rules)

    def copies(self, name: str) -> int:
        """How many ranks have the part of a parameter that this one has."""
        return 1 if self.mesh is None else self.mesh.world

    # --- a step ------------------------------------------------------------------------------------------------------

    def prepare(
        self, optimizer: torch.optim.Optimizer, others: Sequence[nn.Parameter], settings: Settings
    ) -> None:
        """Take over the optimizer of `parameters` and of what is trained besides (others); `parameters` are to be read
        again."""

    @property
    def has_loss(self) -> bool:
        """Whether this process computes the loss, and trains what the objective learns besides the module."""
        return True

    def run(self, effective: Mapping[str, Tensor], feeds: Sequence[Tensor]) -> Any:
        """The module, with other weights in place of some."""
        return functional_call(self.module, dict(effective), tuple(feeds))

    def gradients(self, training: Training, batches: Sequence[Batch]) -> dict[str, float]:
        """Add the gradients of this rank's batches of a step; its share of the terms of the loss."""
        own: dict[str, float] = {}
        for batch, weight in training.rounds(batches):
            add_terms(own, training.backward(batch, weight), weight)
        return own

    def reduce(self, others: Sequence[nn.Parameter]) -> None:
        """Sum gradients over the parts of the data. others: what is trained besides, in every process."""
        if self.mesh is not None and self.mesh.data_group is not None:
            self._sum([*self.parameters.values(), *others], self.mesh.data_group)
            self._average_statistics(self.mesh.data_group, self.mesh.data_count)

    def _sum(self, parameters: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        """One sum over a group for all gradients of a dtype; those that no rank has stay None."""
        if not parameters:
            return
        device = parameters[0].device
        there = torch.tensor([one.grad is not None for one in parameters], dtype=torch.int32, device=device)
        dist.all_reduce(there, dist.ReduceOp.MAX, group=group)
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter, is_there in zip(parameters, there.tolist(), strict=True):
            if is_there:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in by_dtype.values():
            for bucket in _buckets(gradients):
                flat = torch.cat([one.reshape(-1) for one in bucket])
                dist.all_reduce(flat, group=group)
                parts = torch.split(flat, [one.numel() for one in bucket])
                for one, summed in zip(bucket, parts, strict=True):
                    one.copy_(summed.view_as(one))

    def _average_statistics(self, group: dist.ProcessGroup, count: int) -> None:
        """Give every rank the mean of the running statistics of batch norms that are trained."""
        for norm in self.module.modules():
            if isinstance(norm, _BatchNorm) and norm.training:
                for statistic in (norm.running_mean, norm.running_var):
                    if statistic is not None:
                        dist.all_reduce(statistic, group=group)
                        statistic.div_(count)

    def unused(self) -> list[str]:
        """The parameters that no batch has given a gradient."""
        return [name for name, one in self.parameters.items() if one.grad is None]

    def update(
        self, optimizer: torch.optim.Optimizer, amp: Amp, limit: float | None, others: Sequence[nn.Parameter]
    ) -> None:
        """Let the optimizer take its step on the gradients, whose norm is clipped to a limit."""
        amp.scaler.unscale_(optimizer)
        if limit is not None:
            self.clip(limit, others)
        amp.scaler.step(optimizer)
        amp.scaler.update()

    def clip(self, limit: float, others: Sequence[nn.Parameter]) -> None:
        """Scale all gradients so that their norm over the whole training is at most a limit, as torch does."""
        trained = [one for one in [*self.parameters.values(), *others] if one.grad is not None]
        if self.mesh is None:
            nn.utils.clip_grad_norm_(trained, limit)
            return
        squares = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for name, one in self.parameters.items():
            if one.grad is not None:
                squares += one.grad.double().square().sum() / self.copies(name)
        for one in others:
            if one.grad is not None:
                squares += one.grad.double().square().sum() / self.copies("")
        dist.all_reduce(squares)
        factor = min(1.0, limit / (math.sqrt(float(squares)) + 1e-6))
        for one in trained:
            assert one.grad is not None
            one.grad.mul_(factor)

    # --- what ranks agree on -----------------------------------------------------------------------------------------

    def agreed(self, batches: int, *, interrupted: bool, seconds: float, is_due: bool) -> Told:
        """What all ranks know before a step; every rank must call it, one without further batches too."""
        if self.mesh is None:
            return Told(batches, batches, interrupted, seconds, is_due)
        told = self.mesh.gather((batches, interrupted, seconds, is_due, self.mesh.data_index))
        by_part = {place: count for count, *_, place in told}
        return Told(
            sum(by_part.values()), max(by_part.values()), any(one[1] for one in told), told[0][2], told[0][3]
        )

    def terms(self, own: Mapping[str, float]) -> dict[str, float]:
        """The sums of the terms of the loss over all parts of the data."""
        if self.mesh is None:
            return dict(own)
        by_part: dict[int, Mapping[str, float]] = {}
        for place, given in self.mesh.gather((self.mesh.data_index, dict(own))):
            if given:
                by_part.setdefault(place, given)
        total: dict[str, float] = {}
        for _, several in sorted(by_part.items()):
            for name, value in several.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def most(self, count: int) -> int:
        """The largest of a number over ranks."""
        return count if self.mesh is None else max(self.mesh.gather(count))

    def gathered(self, names: list[str]) -> list[str]:
        """The names that all ranks give, rank by rank."""
        return names if self.mesh is None else [name for one in self.mesh.gather(names) for name in one]


BUCKET = 2**23
"""Elements of gradients that are summed at once, for all but larger ones: it bounds the memory of a copy."""


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
