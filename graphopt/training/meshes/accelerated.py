"""The processes of a Hugging Face Accelerator that the user has set up: DDP, and DeepSpeed's ZeRO.

What it says of precision, accumulated batches and the device becomes the options of the passes that train; wrapping the
module and summing gradients are its own.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from graphopt.errors import UsageError
from graphopt.pipeline.batches import Batch
from graphopt.training.meshes.mesh import Mesh, MeshSizes, world_of_torchrun
from graphopt.training.meshes.spread import Spread, Training, add_terms
from graphopt.training.settings import Settings

S = TypeVar("S", bound=Settings)

PRECISIONS = {"no": "off", "bf16": "bfloat16", "fp16": "float16"}
"""What `mixed_precision` of an Accelerator is as `amp` of a pass."""


def mesh_of(accelerator: Any, mesh: str | None, checkpoint: object = None) -> Mesh | None:
    """The processes of an accelerate.Accelerator; None where it is one process without an engine.

    mesh, checkpoint: what was asked for besides. Raises UsageError for what is no Accelerator, for one that does
    something else than it was asked to (FSDP on a CPU is DDP), and for one that graphopt cannot train with.
    """
    try:
        import accelerate
    except ImportError as error:
        raise UsageError("accelerator= needs accelerate: pip install 'graphopt[accelerate]'") from error
    if not isinstance(accelerator, accelerate.Accelerator):
        raise UsageError(f"accelerator is a {type(accelerator).__name__}; give an accelerate.Accelerator")
    if mesh is not None:
        raise UsageError(f"mesh={mesh!r} and accelerator= both say how the run is spread: give one of them")
    kind = str(accelerator.distributed_type.value)
    _require_what_was_asked_for(accelerator, kind)
    if kind == "DEEPSPEED" and checkpoint is not None:
        raise UsageError("checkpoint= keeps a training without pickles, and DeepSpeed's state is in pickles: leave it "
                         "out, or give mesh=\"fsdp=N\" instead of accelerator=")  # fmt: skip
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else world_of_torchrun()
    if world != accelerator.num_processes:
        way_out = (
            'give it kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")]' if kind == "DEEPSPEED"
            else "on a CPU give it cpu=True, or start the program by accelerate launch --cpu"
        )  # fmt: skip
        raise UsageError(
            f"there are {world} processes, and the accelerator counts {accelerator.num_processes}: {way_out}"
        )
    if world == 1 and kind != "DEEPSPEED":
        return None
    return Mesh(MeshSizes(dp=world), accelerator)


def _require_what_was_asked_for(accelerator: Any, kind: str) -> None:
    """Raise UsageError where an Accelerator does something else than it was asked to, or what graphopt cannot use."""
    if kind == "FSDP":
        raise UsageError(
            'the accelerator wraps modules in FSDP, which shards none of a graph\'s: give mesh="fsdp=N" instead of '
            "accelerator=, which shards its blocks"
        )
    for name, variable in (("FSDP", "ACCELERATE_USE_FSDP"), ("DEEPSPEED", "ACCELERATE_USE_DEEPSPEED")):
        if os.environ.get(variable, "").lower() == "true" and kind != name:
            instead = "DDP" if accelerator.num_processes > 1 else "a single process"
            raise UsageError(
                f"the accelerator was asked for {name}, and has made it {instead} in silence, as accelerate does on a "
                'CPU: ' + ('give mesh="fsdp=N" instead of accelerator=' if name == "FSDP" else
                           "leave cpu=True out, and start the program by torchrun")
            )  # fmt: skip
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED"):
        raise UsageError(f"the accelerator is of {kind}, and graphopt trains by DDP and DeepSpeed: give one of them")
    if accelerator.device.type not in ("cpu", "cuda"):
        raise UsageError(f"the accelerator is on {accelerator.device}, and graphopt trains on cpu and cuda")
    if accelerator.state.dynamo_plugin.backend.value != "NO":
        raise UsageError("the accelerator compiles modules (dynamo_backend), and graphopt's are changed as they are "
                         "trained: leave it out")  # fmt: skip
    if accelerator.scaler_handler is not None:
        raise UsageError("the accelerator has GradScalerKwargs, and graphopt scales float16's gradients as torch does: "
                         "leave them out")  # fmt: skip
    if getattr(accelerator, "parallelism_config", None) is not None:
        raise UsageError('the accelerator has a parallelism_config: give mesh= instead, such as "dp=2,tp=2"')
    if accelerator.mixed_precision not in PRECISIONS:
        raise UsageError(
            f"the accelerator has mixed_precision={accelerator.mixed_precision!r}; graphopt trains with no, bf16 or "
            "fp16"
        )
    if kind == "DEEPSPEED" and accelerator.mixed_precision != "no":
        raise UsageError(
            f"mixed_precision={accelerator.mixed_precision!r} makes DeepSpeed round the weights themselves, and what "
            "ships are weights in float32: give mixed_precision='no'"
        )


def require_whole(**batches: Any) -> None:
    """Raise UsageError for batches, by the names of their arguments, that accelerate has cut for several processes."""
    for name, one in batches.items():
        if getattr(one, "_is_accelerate_prepared", False):
            raise UsageError(
                f"{name}= was prepared by an Accelerator, which gives each process its share, and so does graphopt: "
                "pass the loader as it was before"
            )


def agreed(settings: S, accelerator: Any) -> S:
    """The options of a training, with what an Accelerator says in place of defaults.

    Raises UsageError, naming both, where each says something else.
    """
    plain = Settings()
    config = _config(accelerator)
    steps = accelerator.gradient_accumulation_steps
    known = config.get("gradient_accumulation_steps", "auto")
    clip = config.get("gradient_clipping", "auto")
    said = {
        "amp": (f"mixed_precision={accelerator.mixed_precision}", PRECISIONS[accelerator.mixed_precision]),
        "accumulate": ("gradient_accumulation_steps", known if steps == 1 and known != "auto" else steps),
        "device": (f"device {accelerator.device}", accelerator.device.type),
        "clip": ("gradient_clipping", plain.clip if clip == "auto" else clip or None),
    }
    changed: dict[str, Any] = {}
    for name, (what, value) in said.items():
        own, default = getattr(settings, name), getattr(plain, name)
        if value == default or own == value:
            continue
        if own != default:
            what = what if "=" in what or " " in what else f"{what}={value}"
            raise UsageError(
                f"{getattr(settings, 'name', 'training')} has {name}={own}, and the accelerator {what}: leave one of "
                "them out"
            )
        changed[name] = value
    found = replace(settings, **changed)
    if config and found.amp != "off":
        raise UsageError(f"amp={found.amp} is not for DeepSpeed, which switches it off: use amp=off")
    return found


def _config(accelerator: Any) -> dict[str, Any]:
    """Of DeepSpeed, as the user has given it; empty without it."""
    plugin = accelerator.state.deepspeed_plugin
    return {} if plugin is None else cast(dict[str, Any], plugin.deepspeed_config)


class Accelerated(Spread):
    """A whole module in each process, wrapped by an Accelerator in DDP, which sums gradients as they are computed."""

    def __init__(self, module: nn.Module, trained: Collection[str], mesh: Mesh) -> None:
        super().__init__(module, trained, mesh)
        self._accelerator = mesh.accelerator
        with unlisted(self._accelerator), _finding_unused(self._accelerator):
            self._wrapped = self._accelerator.prepare_model(module)

    def run(self, effective: Mapping[str, Tensor], feeds: Sequence[Tensor]) -> Any:
        return functional_call(self._wrapped, {f"module.{name}": one for name, one in effective.items()}, tuple(feeds))

    def gradients(self, training: Training, batches: Sequence[Batch]) -> dict[str, float]:
        own: dict[str, float] = {}
        rounds = list(training.rounds(batches))
        for place, (batch, weight) in enumerate(rounds):
            is_last = place == len(rounds) - 1
            with nullcontext() if is_last else self._accelerator.no_sync(self._wrapped):
                terms = training.backward(batch, weight)
            add_terms(own, terms, weight)
        return own

    def reduce(self, others: Sequence[nn.Parameter]) -> None:
        assert self.mesh is not None and self.mesh.data_group is not None
        for one in self.parameters.values():
            if one.grad is not None:
                one.grad.mul_(self.mesh.data_count)  # DDP gives the mean, and the weight of each batch says its share
        self._sum(others, self.mesh.data_group)
        self._average_statistics(self.mesh.data_group, self.mesh.data_count)

    def settle(self, module: nn.Module) -> None:
        """Take the module out of what the Accelerator has made of it."""
        self._accelerator.unwrap_model(self._wrapped, keep_fp32_wrapper=False)


@contextmanager
def unlisted(accelerator: Any) -> Iterator[None]:
    """What is prepared meanwhile does not stay in an Accelerator's lists: what graphopt trains is not the user's to
    save."""
    lists = accelerator._models, accelerator._optimizers
    kept = [list(one) for one in lists]
    try:
        yield
    finally:
        for one, before in zip(lists, kept, strict=True):
            one[:] = before


@contextmanager
def _finding_unused(accelerator: Any) -> Iterator[None]:
    """Let DDP find parameters without a gradient, unless the user has said how it is made: a graph may have some."""
    from accelerate.utils import DistributedDataParallelKwargs

    before = accelerator.ddp_handler
    if before is None:
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    try:
        yield
    finally:
        accelerator.ddp_handler = before
