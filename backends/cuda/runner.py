"""Runs a lowered graph on the GPU: torch.compile and CUDA graphs around the operators of `kernels`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.backends.cuda import kernels
from graphopt.backends.cuda.device import Device
from graphopt.dialects.fx.graph import FxGraph
from graphopt.dialects.fx.native import copied
from graphopt.dialects.fx.spellings import arguments
from graphopt.errors import LoweringError
from graphopt.lowering.backend import Runner

SHAPES = 8
"""Input shapes that get a program of their own; what comes after them shares one with dynamic axes."""

OPTIONS = {"max_autotune": True, "coordinate_descent_tuning": True, "triton.cudagraphs": True}
"""Of Inductor: what torch.compile's mode max-autotune means."""


class CudaRunner(Runner):
    """A graph on the GPU under torch.compile and CUDA graphs; without a GPU, eagerly on the CPU."""

    def __init__(self, graph: FxGraph, device: Device | None) -> None:
        self._graph, self._names, self._device = graph, graph.input_names, device
        self._programs: dict[Any, Callable[..., Any]] = {}
        if device is None:
            self._module = on_device(graph, "cpu", pack=lambda dtype: None)
            return
        weights = sum(tensor.nbytes for _, tensor in graph.constants())
        if weights > device.memory:
            raise LoweringError(
                f"out of memory: weights of {weights / 1e9:.3g} GB do not fit the {device.memory / 1e9:.3g} GB that "
                f"are free on {device}; quantize or prune more, the model is as it was"
            )
        with self._memory("while its weights were moved there"):
            self._module = on_device(graph, "cuda", pack=_pack_for(device))

    def __call__(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """Results are on the device of the first input."""
        given = [feeds[name] for name in self._names]
        if self._device is None:
            with torch.no_grad():
                return list(self._module(*given))
        device = given[0].device if given else torch.device("cuda")
        with self._memory(f"at inputs of {[list(one.shape) for one in given]}"), torch.no_grad():
            placed = [one.to("cuda", non_blocking=True) for one in given]
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            results = self._program(placed)(*placed)
            # CUDA graphs write each run's results to the same memory.
            return [one.clone() if device.type == "cuda" else one.to(device) for one in results]

    def kernels(self) -> dict[str, int]:
        """The operators of the program: torch.compile does not tell which kernels it makes of them."""
        return dict(Counter(node.kind for node in self._graph.nodes).most_common())

    def _program(self, given: Sequence[Tensor]) -> Callable[..., Any]:
        shapes: Any = tuple((tuple(one.shape), one.dtype) for one in given)
        if shapes not in self._programs:
            dynamic = len(self._programs) >= SHAPES
            shapes = "any" if dynamic else shapes
            if shapes not in self._programs:
                module = fx.GraphModule(self._module, copied(self._module.graph))
                self._programs[shapes] = torch.compile(module, dynamic=dynamic, fullgraph=True, options=dict(OPTIONS))
        return self._programs[shapes]

    @contextmanager
    def _memory(self, when: str) -> Iterator[None]:
        """Raise LoweringError where the GPU runs out of memory, and free what this program holds there."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            self._programs.clear()
            torch.cuda.empty_cache()
            raise LoweringError(
                f"out of memory on {self._device} {when}: give smaller example inputs, or quantize or prune more; the "
                f"model is as it was"
            ) from error


_SPARSE = tuple(f"graphopt_cuda.{name}.default" for name in ("linear_sparse", "linear_int8_sparse"))
"""The operators that read a weight in 2:4."""

Pack = Callable[[Tensor, Tensor], Tensor]
"""From a weight in 2:4 as `compress` gives it to cuSPARSELt's form."""


def _pack_for(device: Device) -> Callable[[torch.dtype], Pack | None]:
    """CUTLASS has kernels for compute capability 8.x alone, and none for float8."""

    def pack(dtype: torch.dtype) -> Pack | None:
        return None if device.capability[0] == 8 and dtype != torch.float8_e4m3fn else kernels.pack_cusparselt

    return pack


def on_device(graph: FxGraph, device: str, pack: Callable[[torch.dtype], Pack | None]) -> fx.GraphModule:
    """A graph as a module on a device: weights moved, devices that nodes name replaced, weights in 2:4 packed.

    pack: for a dtype, what packs a weight in 2:4; None where it stays as `compress` gives it.
    """
    program, stored = copied(graph.native.graph), dict[str, Any]()
    for node in program.nodes:
        if node.op == "get_attr":
            attribute = graph.native.stored[str(node.target)]
            is_tensor = isinstance(attribute, Tensor)
            stored[str(node.target)] = _placed(attribute, device) if is_tensor else attribute
        elif node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, lambda one: _on_device(one, device))
            node.kwargs = fx.node.map_aggregate(node.kwargs, lambda one: _on_device(one, device))
    for node in program.nodes:
        if str(node.target) in _SPARSE:
            given = arguments(node)
            packed, meta = stored[str(given["packed"].target)], stored[str(given["meta"].target)]
            if (make := pack(packed.dtype)) is not None:
                stored[str(given["packed"].target)] = make(packed, meta)
                node.args = tuple(None if one is given["meta"] else one for one in node.args)
    program.eliminate_dead_code()
    return fx.GraphModule({name: held for name, held in stored.items() if _is_read(program, name)}, program)


def _placed(tensor: Tensor, device: str) -> Tensor:
    """As `.to(device)`, which fails on fake tensors where the machine lacks the device."""
    copied: Tensor = torch.ops.aten._to_copy.default(tensor.detach(), device=torch.device(device))
    return copied


def _on_device(argument: Any, device: str) -> Any:
    return torch.device(device) if isinstance(argument, torch.device) else argument


def _is_read(program: fx.Graph, name: str) -> bool:
    return any(str(node.target) == name for node in program.find_nodes(op="get_attr"))
