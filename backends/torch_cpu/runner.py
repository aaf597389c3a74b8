"""Runs a lowered fx graph eagerly: weights packed once, and as little Python as possible between the kernels.

Three things make that fast: the operations of a target become calls of its engine on weights packed beforehand; scales
and zero points are Python numbers, not tensors; and aten's operators are called by the bindings that torch's own
functions use (`fx_bindings`), which take 4 microseconds less a call than an OpOverload.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.backends.torch_cpu import bindings as fx_bindings
from graphopt.dialects.fx.graph import FxGraph, FxNode
from graphopt.dialects.fx.native import ORIGIN, copied, meta
from graphopt.dialects.fx.spellings import arguments
from graphopt.errors import LoweringError
from graphopt.lowering.backend import Runner

PROFILED = 7
"""Runs that a profile takes the median of, after one to warm up."""

FLOATS = ("graphopt_onednn.linear_float.default",)
"""Operations of targets that compute in floats."""

INT8_WORDS = ("linear_int8", "conv_int8", "add_int8")

Pack = Callable[["Packing", fx.Node, dict[str, Any]], fx.Node]
"""Puts the calls of an engine in front of an operation, given its arguments by name: what replaces it."""


class Packing:
    """A program in the making: a copy of a graph's nodes, and what they will find as attributes."""

    def __init__(self, graph: FxGraph, kernels: Mapping[str, Pack]) -> None:
        self.program, self._tensor = copied(graph.native.graph), graph.native.tensor
        self.stored: dict[str, Any] = {}
        self._kernels = dict(_KERNELS) | dict(kernels)
        self._numbers: set[fx.Node] = set()
        self._kept: set[fx.Node] = set()
        self._quantized: dict[fx.Node, tuple[fx.Node, Any, Any]] = {}
        for node in list(self.program.nodes):
            pack = self._kernels.get(str(node.target)) if node.op == "call_function" else None
            if pack is not None:
                self._put(node, pack(self, node, arguments(node)))
        self._drop_unused()

    def _put(self, node: fx.Node, made: fx.Node) -> None:
        if made is not node:
            made.meta.setdefault("val", meta(node))
            node.replace_all_uses_with(made)
            self.program.erase_node(node)

    def _drop_unused(self) -> None:
        for node in list(reversed(self.program.nodes)):
            if node.op in ("call_function", "call_method", "get_attr") and not node.users and not _has_effect(node):
                self.program.erase_node(node)

    def call(self, at: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
        """A call just before `at`, under its module path."""
        with self.program.inserting_before(at):
            node = self.program.call_function(target, args)
        node.meta = {key: at.meta[key] for key in ORIGIN if key in at.meta}
        return node

    def keep(self, at: fx.Node, thing: Any) -> fx.Node:
        """An attribute that holds a packed weight or a tensor."""
        name = f"packed_{len(self.stored)}"
        self.stored[name] = thing
        with self.program.inserting_before(at):
            node = self.program.create_node("get_attr", name)
        self._kept.add(node)
        return node

    def tensor(self, node: Any) -> Tensor | None:
        """The tensor of a constant; None of what is left out, or computed."""
        return self._tensor(node) if isinstance(node, fx.Node) else None

    def constant(self, node: fx.Node) -> Tensor:
        """The tensor of an operand that lowering holds to be constant."""
        tensor = self.tensor(node)
        if tensor is None:
            raise LoweringError(f"{node} is computed, and its kernel packs it beforehand")
        return tensor

    def number(self, at: fx.Node, node: fx.Node) -> Any:
        """A scale or zero point as a Python number, or the node that computes one."""
        tensor = self.tensor(node)
        if tensor is not None:
            return tensor.item()
        return node if node in self._numbers else self.call(at, Tensor.item, node)

    def take_numbers(self, choose: fx.Node) -> None:
        """Let the results of a node be Python numbers."""
        self._numbers.update(choose.users)

    def reads_numbers(self, node: fx.Node) -> bool:
        """Whether an operation takes scales and zero points as numbers: what is packed does, but of 16-bit floats."""
        read = [one for one in node.all_input_nodes if one.op != "get_attr" and isinstance(meta(one), Tensor)]
        return str(node.target) in self._kernels and not any(meta(one).dtype in _NARROW for one in read)

    def quantized(self, at: fx.Node, steps: fx.Node, scale: Any, zero_point: Any) -> fx.Node:
        """uint8 as torch's quantized tensor: the one that it is the memory of where there is one."""
        if (known := self._quantized.get(steps)) is not None and known[1:] == (scale, zero_point):
            return known[0]
        return self.call(at, from_integers, steps, scale, zero_point)

    def steps(self, at: fx.Node, quantized: fx.Node, scale: Any, zero_point: Any) -> fx.Node:
        """The integers of one of torch's quantized tensors, in its own memory."""
        steps = self.call(at, integers, quantized)
        self._quantized[steps] = quantized, scale, zero_point
        return steps

    def module(self, graph: FxGraph) -> fx.GraphModule:
        """The program as a module whose tensors are plain attributes: those are found ten times faster."""
        for node in self.program.find_nodes(op="get_attr"):
            if node not in self._kept:
                thing, name = graph.native.stored[str(node.target)], node.name
                while name in self.stored:
                    name += "_"
                self.stored[name], node.target = thing, name
        fx_bindings.bind(self.program)
        module = fx.GraphModule(self.stored, self.program)
        for name, thing in self.stored.items():
            if isinstance(thing, Tensor):
                module._parameters.pop(name, None)
                module._buffers.pop(name, None)
                module.__dict__[name] = thing.detach()
        return module


def _has_effect(node: fx.Node) -> bool:
    return node.op == "call_function" and node.is_impure()


# --- quantize and dequantize ---------------------------------------------------------------------------------------


with warnings.catch_warnings():  # torch says once that it deprecates quantized tensors, and has no other fast quantize
    warnings.simplefilter("ignore")
    torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)

_NARROW = torch.bfloat16, torch.float16
_QUANTIZED = {torch.uint8: torch.quint8, torch.int8: torch.qint8}


def integers(quantized: Tensor) -> Tensor:
    """The integers of a quantized tensor, without a copy."""
    dtype = torch.uint8 if quantized.dtype is torch.quint8 else torch.int8
    whole = torch.empty(0, dtype=dtype)
    return whole.set_(quantized.untyped_storage(), quantized.storage_offset(), quantized.shape, quantized.stride())


def from_integers(steps: Tensor, scale: float, zero_point: int) -> Tensor:
    """A quantized tensor in the memory of its integers."""
    dtype = _QUANTIZED[steps.dtype]
    whole = torch._empty_affine_quantized([0], scale=scale, zero_point=zero_point, dtype=dtype)
    return whole.set_(steps.untyped_storage(), steps.storage_offset(), steps.shape, steps.stride())


def quantized_at_run_time(x: Tensor) -> tuple[float, int]:
    """Scale and zero point that cover x, as the op choose_qparams has them; a scale of NaN where x is not finite."""
    if x.numel() == 0:
        return 1.0, 0
    least, most = torch.aminmax(x)
    low, high = min(least.item(), 0.0), max(most.item(), 0.0)
    scale = (high - low) / 255 or 1.0
    return (scale, max(0, min(255, round(-low / scale)))) if math.isfinite(scale) else (math.nan, 0)


def quantized(x: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    """torch's quantized tensor. A scale of NaN makes what is computed from the integers NaN: they are any."""
    return torch.quantize_per_tensor(x, scale if scale == scale else 1.0, zero_point, dtype)


def _pack_choose(packing: Packing, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    readers = {reader for result in node.users for reader in result.users}
    if meta(given["x"]).dtype is not torch.float32 or not all(map(packing.reads_numbers, readers)):
        return node
    made = packing.call(node, quantized_at_run_time, given["x"])
    for result in list(node.users):
        result.replace_input_with(node, made)
    packing.take_numbers(made)
    node.replace_all_uses_with(made)
    return made


def _pack_quantize(packing: Packing, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    dtype, x = given["dtype"], given["input"]
    full = dtype in _QUANTIZED and (given["quant_min"], given["quant_max"]) == _limits(dtype)
    if not full or meta(x).dtype is not torch.float32:
        return node
    scale, zero_point = (packing.number(node, given[name]) for name in ("scale", "zero_point"))
    chosen = isinstance(scale, fx.Node)  # at run time, from what may not be finite
    function = quantized if chosen else torch.quantize_per_tensor
    made = packing.call(node, function, x, scale, zero_point, _QUANTIZED[dtype])
    return packing.steps(node, made, scale, zero_point)


def _pack_dequantize(packing: Packing, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    if given["dtype"] not in _QUANTIZED or meta(node).dtype is not torch.float32:
        return node
    if packing.tensor(given["input"]) is not None:  # a stored weight, which has no kernel here
        return node
    scale, zero_point = (packing.number(node, given[name]) for name in ("scale", "zero_point"))
    return packing.call(node, Tensor.dequantize, packing.quantized(node, given["input"], scale, zero_point))


def pack_numbers(packing: Packing, node: fx.Node, given: Mapping[str, Any], prefix: str = "") -> list[Any]:
    """A scale and a zero point among an operation's arguments."""
    return [packing.number(node, given[f"{prefix}{name}"]) for name in ("scale", "zero_point")]


def _limits(dtype: torch.dtype) -> tuple[int, int]:
    info = torch.iinfo(dtype)
    return info.min, info.max


_KERNELS: dict[str, Pack] = {
    "graphopt.choose_qparams.default": _pack_choose,
    "quantized_decomposed.quantize_per_tensor.tensor": _pack_quantize,
    "quantized_decomposed.dequantize_per_tensor.tensor": _pack_dequantize,
}


# --- running -------------------------------------------------------------------------------------------------------


class FxRunner(Runner):
    """A graph whose kernels are packed, run by torch's generated code."""

    def __init__(self, graph: FxGraph, kernels: Mapping[str, Pack], threads: int | None) -> None:
        graph = graph.clone()
        _drop_identities(graph)
        nodes = graph.nodes
        self.promised = [node.label for node in nodes if node.kind in kernels and node.kind not in FLOATS]
        """The int8 operations of the target, by label."""
        self.unlowered = [node.label for node in nodes if node.kind in INT8_WORDS]
        """Int8 ops that no rule took: the reference runs them, slowly."""
        self._names, self._threads = graph.input_names, threads
        self._sizes = [_example(meta(node)) for node in graph.native.graph.find_nodes(op="placeholder")]
        self._module = Packing(graph, kernels).module(graph)
        self._labels = {node.name: _label(FxNode(graph, node)) for node in self._module.graph.nodes}
        self._run = self._module.forward

    def __call__(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        with _threads(self._threads), torch.inference_mode():
            return list(self._run(*[feeds[name] for name in self._names]))

    def kernels(self) -> dict[str, int]:
        """The operators of torch that one run calls, most frequent first, on zeros of the shapes that were traced.

        Composite ones are opened: a float linear counts as aten.addmm, attention as the form that torch chose.
        """
        shapes = zip(self._names, self._sizes, strict=True)
        feeds = {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in shapes}
        with torch.no_grad(), _Calls() as calls:
            self._run(*feeds.values())
        return dict(calls.counts.most_common())

    def profile(self, feeds: Mapping[str, Tensor]) -> Mapping[str, float]:
        """The median of PROFILED runs, node by node; names are module paths, and the node's own behind them."""
        seconds: dict[str, list[float]] = defaultdict(list)
        given = [feeds[name] for name in self._names]
        with _threads(self._threads), torch.inference_mode():
            for _ in range(PROFILED + 1):
                clock = _Clock(self._module, self._labels)
                clock.run(*given)
                for name, taken in clock.seconds.items():
                    seconds[name].append(taken)
        return {name: median(several[1:]) for name, several in seconds.items()}


class _Clock(fx.Interpreter):
    """Seconds of each call of one run."""

    def __init__(self, module: fx.GraphModule, labels: Mapping[str, str]) -> None:
        super().__init__(module)
        self.seconds: dict[str, float] = {}
        self._labels = labels

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in ("call_function", "call_method"):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        function = n.target if n.op == "call_function" else getattr(type(args[0]), str(n.target))
        start = time.perf_counter()
        result = cast(Callable[..., Any], function)(*args, **kwargs)
        self.seconds[self._labels[n.name]] = time.perf_counter() - start
        return result


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that torch dispatches to a kernel."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def _drop_identities(graph: FxGraph) -> None:
    """Copies and views that mean nothing cost a call each; those of what is written to later do mean something."""
    for node in graph.sites("identity"):
        if not node.result.is_output and all(user.signature is not None for user in node.input.users):
            graph.replace(node, node.input)
    graph.sweep()


def _label(node: FxNode) -> str:
    """The node's name behind its module path."""
    return f"{node.path}/{node.name}" if node.path else node.name


def _example(value: Tensor) -> tuple[list[int], torch.dtype]:
    """A shape that the graph takes, dynamic axes as they were traced, and the dtype."""
    return [size if isinstance(size, int) else int(size.node.hint) for size in value.shape], value.dtype


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number is None or number == before:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
