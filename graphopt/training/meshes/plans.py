"""What a mesh costs: memory and communication of each process, from the shapes of a model alone.

The model may be on the meta device, so that one of any size is planned on any machine.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.errors import UsageError, described
from graphopt.training.features import block_of
from graphopt.training.meshes.mesh import MeshSizes

STATES = {"adamw": 2, "sgd": 1}
"""How many numbers an optimizer keeps for each that it trains."""


@dataclass(frozen=True)
class Plan:
    """The memory of one process in bytes, and what it sends in one step; of the process that has most.

    What the computation keeps until the backward pass is in `activations`, and so are the volumes of tp and pp, which
    carry activations, where example inputs were given; otherwise they are 0.
    """

    mesh: str
    weights: int
    gradients: int
    optimizer: int
    best: int
    """The best weights so far."""
    graph: int
    """The graph that is trained, whole in every process: its weights as they were, in host memory."""
    teacher: int
    """The weights of a teacher, which is the graph as it was: sharded by fsdp."""
    gathered: int
    """Of fsdp: the whole weights and gradients of what runs now and of what is fetched for it."""
    activations: int
    sent: Mapping[str, int]
    """By axis of the mesh, the bytes that a process sends in one step of one batch."""

    @property
    def total(self) -> int:
        """All of the memory, in bytes."""
        return (
            self.weights + self.gradients + self.optimizer + self.best + self.graph + self.teacher + self.gathered
            + self.activations
        )  # fmt: skip

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "best", "graph", "teacher", "gathered", "activations")
        held = ", ".join(f"{name} {_text(getattr(self, name))}" for name in parts if getattr(self, name))
        sent = ", ".join(f"{axis} {_text(size)}" for axis, size in self.sent.items() if size) or "nothing"
        return f"mesh={self.mesh}: {_text(self.total)} a process ({held}); sent a step: {sent}"


@dataclass(frozen=True)
class _Shapes:
    """The sizes of a model: bytes of the weights of each block, and of all that is in none."""

    blocks: dict[str, int]
    cut: dict[str, int]
    """Of these, what tp cuts: matrices and kernels."""
    rest: int
    activations: int = 0
    handed: int = 0
    """Bytes that one block hands to the next."""


def plan(
    model: nn.Module,
    mesh: str = "dp=1",
    *,
    example_inputs: Any = None,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    teacher: bool = False,
) -> Plan:
    """What training a model on a mesh costs each process, from the shapes of its tensors.

    model: on any device, `torch.device("meta")` too. mesh: as `optimize` takes it; of any size. example_inputs: one
    batch of a process (a tensor, tuple or dict, whose values are not read), without which activations count nothing.
    teacher: whether it distils from the model as it was. Figures are for weights as they are stored, without amp.
    Raises UsageError where the mesh is wrong, where pp does not divide the blocks, and where the model does not run on
    the meta device with these inputs.
    """
    sizes = MeshSizes.parse(mesh)
    if optimizer not in STATES:
        raise UsageError(f"optimizer is {optimizer!r}; give adamw or sgd")
    return _planned(_shapes(model, example_inputs), sizes, optimizer, teacher)


def _planned(shapes: _Shapes, sizes: MeshSizes, optimizer: str, teacher: bool) -> Plan:
    blocks, count = list(shapes.blocks), len(shapes.blocks)
    if count % sizes.pp:
        raise UsageError(f"mesh={sizes}: pp={sizes.pp} does not divide the {count} blocks of the model")
    whole = sum(shapes.blocks.values()) + shapes.rest
    held = max(
        sum(shapes.blocks[one] - shapes.cut[one] * (sizes.tp - 1) // sizes.tp for one in stage)
        for stage in _stages(blocks, sizes.pp)
    )
    held += shapes.rest if sizes.pp == 1 else math.ceil(shapes.rest / 2)  # both ends of a pipeline have some
    part = math.ceil(held / sizes.fsdp)
    largest = sorted([*shapes.blocks.values(), shapes.rest], reverse=True)[:2]
    gathered = 0 if sizes.fsdp == 1 else sum(largest) + largest[0]  # two blocks' weights, one block's gradients
    return Plan(
        str(sizes), weights=part, gradients=part, optimizer=STATES[optimizer] * part, best=part, graph=whole,
        teacher=(part if sizes.fsdp > 1 else whole) if teacher else 0, gathered=gathered,
        activations=_divided(shapes.activations, sizes), sent=_sent(shapes, sizes, held),
    )  # fmt: skip


def _divided(activations: int, sizes: MeshSizes) -> int:
    """The activations of one batch: of a stage its blocks', of tp about half (what lies between f and g is cut)."""
    of_stage = activations / sizes.pp
    return math.ceil(of_stage * (1 + 1 / sizes.tp) / 2)


def _stages(blocks: Sequence[str], count: int) -> list[Sequence[str]]:
    each = len(blocks) // count
    return [blocks[place * each : (place + 1) * each] for place in range(count)] if each else [blocks]


def _sent(shapes: _Shapes, sizes: MeshSizes, held: int) -> dict[str, int]:
    """Ring collectives: each of n processes sends (n - 1) / n of what is gathered or scattered, and twice that of what
    is reduced for all."""

    def ring(size: float, count: int) -> int:
        return math.ceil(size * (count - 1) / count)

    blocks = len(shapes.blocks) // sizes.pp
    return {
        "dp": ring(2 * held / sizes.fsdp, sizes.dp),
        "fsdp": ring(3 * held, sizes.fsdp),  # weights forward and backward, and gradients
        "tp": ring(2 * 4 * blocks * shapes.handed, sizes.tp),  # f and g around attention and around the MLP
        "pp": 2 * shapes.handed if sizes.pp > 1 else 0,
    }


def _shapes(model: nn.Module, example_inputs: Any) -> _Shapes:
    found: dict[str, int] = {}
    cut: dict[str, int] = {}
    rest = 0
    for name, parameter in model.named_parameters():
        path, size = block_of(name), parameter.numel() * parameter.element_size()
        if path is None:
            rest += size
            continue
        found[path] = found.get(path, 0) + size
        cut[path] = cut.get(path, 0) + (size if parameter.dim() >= 2 else 0)
    if example_inputs is None:
        return _Shapes(found, cut, rest)
    return _Shapes(found, cut, rest, *_run(model, example_inputs, list(found)))


def _run(model: nn.Module, example_inputs: Any, blocks: Sequence[str]) -> tuple[int, int]:
    """The bytes that a forward pass keeps for the backward pass, and those that one block hands to the next."""
    inputs = pytree.tree_map_only(Tensor, lambda one: one.to("meta"), example_inputs)
    arguments, named = (), {}
    if isinstance(inputs, Mapping):
        named = dict(inputs)
    else:
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    handed: list[int] = []

    def note(module: nn.Module, given: Any, result: Any) -> None:
        first = next((one for one in pytree.tree_leaves(result) if isinstance(one, Tensor)), None)
        handed.append(0 if first is None else first.numel() * first.element_size())

    with _on_meta(model) as shadow:
        modules = dict(shadow.named_modules())
        hooks = [modules[path].register_forward_hook(note) for path in blocks if path in modules]
        kept: dict[int, int] = {}
        own = {one.untyped_storage()._cdata for one in shadow.parameters()}
        alive: list[Tensor] = []

        def keep(saved: Tensor) -> Tensor:
            storage = saved.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
                alive.append(saved)
            return saved

        try:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved), _Ones():  # type: ignore[no-untyped-call]
                result = shadow(*arguments, **named)
        except Exception as error:
            raise UsageError(
                f"the model does not run on the meta device with these inputs ({described(error)}): leave "
                "example_inputs out, and activations count nothing"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        del result
    return sum(kept.values()), max(handed, default=0)


class _Ones(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Where a forward pass asks for the value of a tensor that has none, such as whether a mask is full, it is 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _on_meta(model: nn.Module) -> Iterator[nn.Module]:
    """The model with tensors that have shapes alone; it is not changed."""
    memo: dict[int, Any] = {}
    for one in (*model.parameters(), *model.buffers()):
        empty = one.detach().to("meta")
        memo[id(one)] = nn.Parameter(empty, one.requires_grad) if isinstance(one, nn.Parameter) else empty
    yield copy.deepcopy(model, memo)


def chosen(model: nn.Module, world: int, memory: int) -> MeshSizes:
    """The mesh that `mesh="auto"` stands for: the one that sends least among those whose plan fits into the memory of
    each process, with half of it left for activations; where none fits, fsdp over all.

    memory: bytes for each process. In the order of what is sent for most models: dp, dp with fsdp in ever larger
    groups, fsdp over all.
    """
    shapes = _shapes(model, None)
    for shards in (size for size in range(1, world + 1) if world % size == 0):
        sizes = MeshSizes(dp=world // shards, fsdp=shards)
        if _planned(shapes, sizes, "adamw", True).total <= memory // 2:
            return sizes
    return MeshSizes(fsdp=world)


def _text(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"
