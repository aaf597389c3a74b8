"""Blocks in different processes, one stage behind the other, over torch.distributed.pipelining.

The batches that one step accumulates are its microbatches, so that a step computes what one process computes: with as
many of them as stages, or more, in the 1F1B schedule, with fewer in GPipe's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.func import functional_call

from graphopt.errors import UsageError
from graphopt.pipeline.batches import Batch
from graphopt.training import streams
from graphopt.training.meshes.blocks import blocks, cut, returned
from graphopt.training.meshes.mesh import Mesh
from graphopt.training.meshes.skeleton import Divided, emptied, given_by, moved
from graphopt.training.meshes.spread import Training, add_terms
from graphopt.training.rules import FixedZeros, MovingPattern, WeightRule

Meta = list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]
"""Shape, stride and dtype of each value between two stages."""


class Stages(Divided):
    """Each process has some of the blocks; with dp, several such pipelines have their own batches."""

    def __init__(self, module: fx.GraphModule, trained: Collection[str], mesh: Mesh) -> None:
        """Raises UsageError where the blocks are no multiple of the stages."""
        self.mesh: Mesh = mesh
        self._count, self._index = mesh.sizes.pp, mesh.place["pp"]
        found = blocks(module)
        if not found or len(found) % self._count:
            listed = f"{len(found)} repeated blocks ({found[0]} to {found[-1]})" if found else "no repeated blocks"
            raise UsageError(
                f"mesh={mesh} cuts the model into {self._count} stages of equally many blocks, and it has {listed}: "
                "give pp a divisor of their number, or use fsdp"
            )
        running, self._skeleton = moved(module)
        parts = cut(running, self._count)
        self._returned, self._inputs = parts.returned, parts.inputs
        self._held = [set(_state(one.inner)) for one in parts.segments]
        self.segment = parts.segments[self._index]
        self.module = self.segment
        for other in (running, *(one.inner for one in parts.segments if one is not self.segment)):
            emptied(other)
        self.parameters = {name: one for name, one in self.segment.inner.named_parameters() if name in trained}
        holders = {name: sum(name in one for one in self._held) for name in self._skeleton.shapes}
        self._shared = {name: holders[name] for name in trained if holders[name] > 1}
        self._schedules: dict[Any, Any] = {}
        self._run: _Stage | None = None

    # --- tensors

    @property
    def tensors(self) -> dict[str, Tensor]:
        return _state(self.segment.inner)

    def part(self, name: str, whole: Tensor) -> Tensor | None:
        return None if self._is_elsewhere(name) else whole

    def blank(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        return None if self._is_elsewhere(name) else torch.empty(shape, dtype=dtype)

    def _is_elsewhere(self, name: str) -> bool:
        return any(name in held for held in self._held) and name not in self._held[self._index]

    def wholes(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        group, found = self.mesh.group("pp"), {}
        told: list[Any] = [None] * self._count
        dist.all_gather_object(told, [(name, one.shape, one.dtype) for name, one in parts.items()], group=group)
        for stage, several in enumerate(told):
            for name, shape, dtype in several:
                if name in found:
                    continue
                found[name] = given_by(stage, parts.get(name), shape, dtype, group, self.mesh.device)
        return found

    def rules(self, rules: Mapping[str, WeightRule]) -> dict[str, WeightRule]:
        for name, rule in rules.items():
            if not isinstance(rule, FixedZeros | MovingPattern):
                raise UsageError(
                    f"what is removed of {name} (criterion=movement) is decided over layers, and pp has them in "
                    "several processes: use dp"
                )
        return {name: rule for name, rule in rules.items() if name in self._held[self._index]}

    def copies(self, name: str) -> int:
        return self.mesh.world // self._count * self._shared.get(name, 1)

    # --- a step

    @property
    def has_loss(self) -> bool:
        return self._index == self._count - 1

    def gradients(self, training: Training, batches: Sequence[Batch]) -> dict[str, float]:
        if self._run is None:
            self._run = _Stage(self, training)
        own: dict[str, float] = {}
        for _, several in groupby(training.rounds(batches), key=lambda one: _shapes(one[0])):
            chosen = list(several)
            self._run.batches, self._run.terms = chosen, []
            schedule = self._schedule(self._run, len(chosen))
            places = torch.arange(len(chosen))
            if self._index == 0:
                schedule.step(places, return_outputs=False)
            elif self._index < self._count - 1:
                schedule.step(place=places, return_outputs=False)
            else:
                schedule.step(place=places, target=places, return_outputs=False)
            for terms, (_, weight) in zip(self._run.terms, chosen, strict=False):
                add_terms(own, terms, weight)
        return own

    def reduce(self, others: Sequence[nn.Parameter]) -> None:
        for name in self._shared:
            one = self.parameters.get(name)
            if one is not None and one.grad is None:
                one.grad = torch.zeros_like(one)
            shape = self._skeleton.shapes[name]
            total = torch.zeros(shape, dtype=self._dtype, device=self.mesh.device) if one is None else one.grad
            dist.all_reduce(total, group=self.mesh.group("pp"))
        super().reduce(others)

    @property
    def _dtype(self) -> torch.dtype:
        return next(iter(self.parameters.values())).dtype

    def _schedule(self, run: _Stage, count: int) -> Any:
        """The schedule for microbatches of these shapes; the shapes between stages are found by a run of one."""
        key = count, _shapes(run.batches[0][0])
        if key not in self._schedules:
            given, left = self._boundaries(run)
            stage = PipelineStage(
                run, self._index, self._count, self.mesh.device, group=self.mesh.group("pp"),
                input_args=tuple(map(_like, given)) if self._index else (torch.zeros(1, dtype=torch.int64),),
                output_args=tuple(map(_like, left)),
            )  # fmt: skip
            kind = Schedule1F1B if count >= self._count else ScheduleGPipe
            loss = _itself if self._index == self._count - 1 else None
            self._schedules[key] = kind(stage, count, loss_fn=loss or _itself, scale_grads=False)
        return self._schedules[key]

    def _boundaries(self, run: _Stage) -> tuple[Meta, Meta]:
        """What this stage is handed, and what it hands on, for the first of the batches."""
        given: Meta = []
        left: Meta = [((), (), torch.get_default_dtype())]
        modes = {module: module.training for module in self.segment.modules()}
        self.segment.eval()
        told: list[Any] = [None] * self._count
        with torch.no_grad(), streams.restored():
            for stage in range(self._count):
                own: Meta = []
                if stage == self._index and stage < self._count - 1:
                    zeros = [torch.zeros(shape, dtype=dtype, device=self.mesh.device) for shape, _, dtype in given]
                    results = run.computed(zeros, 0)
                    own = left = [(tuple(one.shape), one.stride(), one.dtype) for one in results]
                dist.all_gather_object(told, own, group=self.mesh.group("pp"))
                if stage + 1 == self._index:
                    given = told[stage]
        for module, training in modes.items():  # frozen norms stay as they were
            module.training = training
        if self._index == self._count - 1:
            left = [((), (), run.dtype_of_loss(given))]
        return given, left


class _Stage(nn.Module):
    """What torch.distributed.pipelining runs: the segment on the batch of a place; the last stage returns its loss."""

    def __init__(self, spread: Stages, training: Training) -> None:
        super().__init__()
        self.segment = spread.segment
        self._spread, self._training = [spread], [training]  # in lists, since they are no submodules
        self.batches: list[tuple[Batch, float]] = []
        self.terms: list[dict[str, float]] = []

    def forward(self, *values: Tensor, place: Tensor | None = None) -> Any:
        if place is None:
            (place,), values = values, ()
        number, spread, training = int(place), self._spread[0], self._training[0]
        results = self.computed(values, number)
        if spread._index < spread._count - 1:
            return results
        batch, weight = self.batches[number]
        known = dict(zip(self.segment.outputs, results, strict=True))
        known |= dict(zip(spread._inputs, self._feeds(number), strict=True))
        loss, terms = training.judged(returned(spread._returned, known), batch, weight)
        self.terms.append(terms)
        return loss

    def computed(self, values: Sequence[Tensor], number: int) -> tuple[Tensor, ...]:
        """The segment on what the stage before it hands over, and the inputs of a batch."""
        training = self._training[0]
        with training.amp.autocast():
            given = (*values, *self._feeds(number))
            found: tuple[Tensor, ...] = functional_call(self.segment.inner, training.effective(), given)
        return found

    def dtype_of_loss(self, given: Meta) -> torch.dtype:
        """Losses are in at least float32."""
        return torch.float64 if any(dtype == torch.float64 for *_, dtype in given) else torch.float32

    def _feeds(self, number: int) -> list[Tensor]:
        return self._training[0].feeds(self.batches[number][0])


def _itself(output: Tensor, target: Tensor) -> Tensor:
    """The loss, which the last stage returns."""
    return output


def _like(meta: tuple[tuple[int, ...], tuple[int, ...], torch.dtype]) -> Tensor:
    shape, stride, dtype = meta
    return torch.empty_strided(shape, stride, dtype=dtype).requires_grad_(dtype.is_floating_point)


def _shapes(batch: Batch) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(one.shape) for one in batch.feeds.values())


def _state(module: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = module.state_dict()
    return found
