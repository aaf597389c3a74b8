"""DeepSpeed's ZeRO, as a user's Accelerator prepares it: states, gradients and, in stage 3, weights cut over processes.

Stages 0 to 2 keep the whole weights in each process. Stage 3 shards each block, as FSDP does here: a graph calls no
submodule, so that DeepSpeed fetches the weights of a segment at once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.func import functional_call

from graphopt.errors import UsageError
from graphopt.pipeline.batches import Batch
from graphopt.training.meshes.accelerated import unlisted
from graphopt.training.meshes.blocks import Chain, Segment, cut
from graphopt.training.meshes.mesh import Mesh
from graphopt.training.meshes.sharded import named, require_fixed, require_own
from graphopt.training.meshes.skeleton import Divided, emptied, moved
from graphopt.training.meshes.spread import Spread, Training, add_terms
from graphopt.training.precision import Amp
from graphopt.training.rules import FixedZeros, WeightRule
from graphopt.training.settings import Settings


class Zero(Spread):
    """Stages 0 to 2: the whole weights in each process, which has its own batches."""

    mesh: Mesh

    def __init__(self, module: nn.Module, trained: Collection[str], mesh: Mesh) -> None:
        super().__init__(module, trained, mesh)
        self._accelerator = mesh.accelerator

    def prepare(
        self, optimizer: torch.optim.Optimizer, others: Sequence[nn.Parameter], settings: Settings
    ) -> None:
        if others:
            raise UsageError(
                "DeepSpeed trains the weights of one module, and projections of hidden states, or scores of "
                "criterion=movement, would be trained besides: use mesh="
            )
        accelerator = self._accelerator
        with unlisted(accelerator), _config_of(accelerator, settings):
            self._engine, _ = accelerator.prepare(self.module, optimizer)

    # --- a step

    def run(self, effective: Mapping[str, Tensor], feeds: Sequence[Tensor]) -> Any:
        return functional_call(self._engine, {f"module.{name}": one for name, one in effective.items()}, tuple(feeds))

    def gradients(self, training: Training, batches: Sequence[Batch]) -> dict[str, float]:
        own: dict[str, float] = {}
        rounds = list(training.rounds(batches))
        for place, (batch, weight) in enumerate(rounds):
            self._engine.set_gradient_accumulation_boundary(place == len(rounds) - 1)
            loss, terms = training.judged(self.run(training.effective(), training.feeds(batch)), batch, weight)
            # DeepSpeed gives the mean over processes, and the weight of each batch says its share
            self._engine.backward(loss * self.mesh.data_count, scale_wrt_gas=False)
            add_terms(own, terms, weight)
        return own

    def reduce(self, others: Sequence[nn.Parameter]) -> None:
        if self.mesh.data_group is not None:
            self._average_statistics(self.mesh.data_group, self.mesh.data_count)

    def unused(self) -> list[str]:
        return []  # DeepSpeed has taken the gradients

    def update(
        self, optimizer: torch.optim.Optimizer, amp: Amp, limit: float | None, others: Sequence[nn.Parameter]
    ) -> None:
        self._engine.step()  # which clips

    def settle(self, module: nn.Module) -> None:
        self._engine.destroy()


class Zero3(Zero, Divided):
    """Stage 3: each process has a share of every weight until the block that reads it runs."""

    def __init__(self, module: fx.GraphModule, trained: Collection[str], mesh: Mesh) -> None:
        """Raises UsageError where blocks share a module with weights."""
        from deepspeed.utils import set_z3_leaf_modules

        running, self._skeleton = moved(module)
        self._shapes = self._skeleton.shapes
        chain = Chain(cut(running))
        emptied(running)
        require_own(chain)
        set_z3_leaf_modules(chain, [Segment])
        self.module, self.mesh, self._accelerator = chain, mesh, mesh.accelerator
        self._whole = {name: one for name, one in named(chain) if isinstance(one, nn.Parameter)}
        self._buffers = {name: one for name, one in named(chain) if not isinstance(one, nn.Parameter)}
        self._trained = list(trained)
        self.parameters = {name: self._whole[name] for name in trained}

    def prepare(
        self, optimizer: torch.optim.Optimizer, others: Sequence[nn.Parameter], settings: Settings
    ) -> None:
        from deepspeed.runtime.zero import register_external_parameter

        super().prepare(optimizer, others, settings)
        assert isinstance(self.module, Chain)
        for one in self.module.shared:
            register_external_parameter(self.module, one)
        known = self.tensors
        self.parameters = {name: nn.Parameter(known[name], requires_grad=False) for name in self._trained}

    # --- tensors

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: self._own(name, one) for name, one in self._whole.items()} | self._buffers

    def _own(self, name: str, one: Any) -> Tensor:
        """This process's elements of a parameter, as a plain tensor on the same memory, without what fills it up."""
        begin, end = self._range(name)
        found: Tensor = one.ds_tensor.detach()[: end - begin]
        return found

    def _range(self, name: str) -> tuple[int, int]:
        """Which elements of a parameter, flat, this process has."""
        count, size = math.prod(self._shapes[name]), self._size(name)
        index = self.mesh.data_index
        return min(index * size, count), min((index + 1) * size, count)

    def _size(self, name: str) -> int:
        return -(-math.prod(self._shapes[name]) // self.mesh.data_count)

    def part(self, name: str, whole: Tensor) -> Tensor:
        if name not in self._whole:
            return whole
        begin, end = self._range(name)
        return whole.reshape(-1)[begin:end]

    def wholes(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._gathered(name, part) if name in self._whole else part for name, part in parts.items()}

    def _gathered(self, name: str, part: Tensor) -> Tensor:
        filled = part.new_zeros(self._size(name))
        filled[: len(part)] = part
        several = [torch.empty_like(filled) for _ in range(self.mesh.data_count)]
        dist.all_gather(several, filled, group=self.mesh.data_group)
        shape = self._shapes[name]
        return torch.cat(several)[: math.prod(shape)].view(shape)

    def rules(self, rules: Mapping[str, WeightRule]) -> dict[str, WeightRule]:
        return {name: FixedZeros(self.part(name, rule.mask)) for name, rule in require_fixed(rules, "ZeRO 3").items()}

    # --- a step

    def run(self, effective: Mapping[str, Tensor], feeds: Sequence[Tensor]) -> Any:
        return self._engine(*feeds)  # zeros that stay are zeros of the weight itself

    def settle(self, module: nn.Module) -> None:
        Divided.settle(self, module)
        super().settle(module)


@contextmanager
def _config_of(accelerator: Any, settings: Settings) -> Iterator[None]:
    """What DeepSpeed is told of this training besides what the user has said, who keeps it as it was."""
    plugin, engine = accelerator.state.deepspeed_plugin, accelerator.deepspeed_engine_wrapped
    steps, accelerator.gradient_accumulation_steps = accelerator.gradient_accumulation_steps, settings.accumulate
    before = plugin.hf_ds_config
    plugin.hf_ds_config = copy.deepcopy(before)
    config = plugin.deepspeed_config = plugin.hf_ds_config.config
    config.pop("train_batch_size", None)
    if config.get("train_micro_batch_size_per_gpu", "auto") == "auto":
        config["train_micro_batch_size_per_gpu"] = 1  # it scales nothing, and is for DeepSpeed's own figures
    config["gradient_accumulation_steps"] = settings.accumulate
    config["gradient_clipping"] = settings.clip or 0.0
    # "auto" follows a model's `config`, and a graph has none; a weight that stays whole between steps would not see
    # what is changed of its parts
    sizes = {name: one for name, one in config["zero_optimization"].items() if one != "auto"}
    config["zero_optimization"] = sizes | {"stage3_param_persistence_threshold": 0}
    try:
        yield
    finally:
        plugin.hf_ds_config, plugin.deepspeed_config = before, before.config
        accelerator.deepspeed_engine_wrapped, accelerator.gradient_accumulation_steps = engine, steps
