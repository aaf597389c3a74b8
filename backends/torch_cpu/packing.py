"""Makes a lowered fx graph ready to run: weights packed once, scales and zero points as Python numbers.

The operators of a target (`graphopt_onednn::*`, ...) take integers and scales as they are stored. Here each becomes a
call of its engine's own kernel, on weights that are packed beforehand. Quantize and dequantize become torch's quantized
tensors, which share the memory of their integers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.backends.torch_cpu import bindings
from graphopt.dialects.fx.graph import FxGraph
from graphopt.dialects.fx.native import ORIGIN, copied, meta
from graphopt.dialects.fx.spellings import arguments
from graphopt.errors import LoweringError

Pack = Callable[["Packing", fx.Node, dict[str, Any]], fx.Node]
"""(packing, node, its arguments by name) -> the node that replaces it: calls of an engine, put before it."""


class Packing:
    """A copy of a graph's nodes in which operators are replaced, and the attributes that those nodes will read."""

    def __init__(self, graph: FxGraph, operators: Mapping[str, Pack]) -> None:
        self.program, self._tensor = copied(graph.native.graph), graph.native.tensor
        self.stored: dict[str, Any] = {}
        self._operators = _QDQ_OPERATORS | dict(operators)
        self._numbers: set[fx.Node] = set()
        self._kept: set[fx.Node] = set()
        self._quantized: dict[fx.Node, tuple[fx.Node, Any, Any]] = {}
        for node in list(self.program.nodes):
            pack = self._operators.get(str(node.target)) if node.op == "call_function" else None
            if pack is not None:
                self._replace(node, pack(self, node, arguments(node)))
        self._drop_unused()

    def _replace(self, node: fx.Node, packed: fx.Node) -> None:
        if packed is not node:
            packed.meta.setdefault("val", meta(node))
            node.replace_all_uses_with(packed)
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

    def keep(self, at: fx.Node, attribute: Any) -> fx.Node:
        """An attribute that holds a packed weight or a tensor."""
        name = f"packed_{len(self.stored)}"
        self.stored[name] = attribute
        with self.program.inserting_before(at):
            node = self.program.create_node("get_attr", name)
        self._kept.add(node)
        return node

    def tensor(self, node: Any) -> Tensor | None:
        """The tensor of a constant operand; None where it is left out or computed."""
        return self._tensor(node) if isinstance(node, fx.Node) else None

    def constant(self, node: fx.Node) -> Tensor:
        """The tensor of an operand that has to be constant. Raises LoweringError where it is computed."""
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
        """Note that the results of a node are Python numbers, not tensors."""
        self._numbers.update(choose.users)

    def reads_numbers(self, node: fx.Node) -> bool:
        """Whether a node takes scales and zero points as Python numbers: an engine's does, but for 16-bit floats."""
        inputs = [meta(value) for value in node.all_input_nodes if value.op != "get_attr"]
        halves = [value for value in inputs if isinstance(value, Tensor) and value.dtype in _HALVES]
        return str(node.target) in self._operators and not halves

    def quantized(self, at: fx.Node, integers: fx.Node, scale: Any, zero_point: Any) -> fx.Node:
        """uint8 integers as one of torch's quantized tensors; where they came from one of equal scale, that one."""
        if (known := self._quantized.get(integers)) is not None and known[1:] == (scale, zero_point):
            return known[0]
        return self.call(at, from_integers, integers, scale, zero_point)

    def integers(self, at: fx.Node, quantized: fx.Node, scale: Any, zero_point: Any) -> fx.Node:
        """The integers of one of torch's quantized tensors, in its own memory."""
        node = self.call(at, integers, quantized)
        self._quantized[node] = quantized, scale, zero_point
        return node

    def module(self, graph: FxGraph) -> fx.GraphModule:
        """The program as a module. Its tensors are plain attributes, which are read ten times faster than buffers."""
        for node in self.program.find_nodes(op="get_attr"):
            if node not in self._kept:
                attribute, name = graph.native.stored[str(node.target)], node.name
                while name in self.stored:
                    name += "_"
                self.stored[name], node.target = attribute, name
        bindings.bind(self.program)
        module = fx.GraphModule(self.stored, self.program)
        for name, attribute in self.stored.items():
            if isinstance(attribute, Tensor):
                module._parameters.pop(name, None)
                module._buffers.pop(name, None)
                module.__dict__[name] = attribute.detach()
        return module


def _has_effect(node: fx.Node) -> bool:
    return node.op == "call_function" and node.is_impure()


# --- quantize and dequantize ---------------------------------------------------------------------------------------


with warnings.catch_warnings():  # torch says once that it deprecates quantized tensors, and has no other fast quantize
    warnings.simplefilter("ignore")
    torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)

_HALVES = torch.bfloat16, torch.float16
_QUANTIZED_DTYPES = {torch.uint8: torch.quint8, torch.int8: torch.qint8}


def integers(quantized: Tensor) -> Tensor:
    """The integers of a quantized tensor, without a copy."""
    dtype = torch.uint8 if quantized.dtype is torch.quint8 else torch.int8
    result = torch.empty(0, dtype=dtype)
    return result.set_(quantized.untyped_storage(), quantized.storage_offset(), quantized.shape, quantized.stride())


def from_integers(integers: Tensor, scale: float, zero_point: int) -> Tensor:
    """A quantized tensor in the memory of its integers."""
    dtype = _QUANTIZED_DTYPES[integers.dtype]
    result = torch._empty_affine_quantized([0], scale=scale, zero_point=zero_point, dtype=dtype)
    return result.set_(integers.untyped_storage(), integers.storage_offset(), integers.shape, integers.stride())


def dynamic_qparams(x: Tensor) -> tuple[float, int]:
    """Scale and zero point that cover x, as the op choose_qparams has them; a scale of NaN where x is not finite."""
    if x.numel() == 0:
        return 1.0, 0
    smallest, largest = torch.aminmax(x)
    low, high = min(smallest.item(), 0.0), max(largest.item(), 0.0)
    scale = (high - low) / 255 or 1.0
    return (scale, max(0, min(255, round(-low / scale)))) if math.isfinite(scale) else (math.nan, 0)


def quantized(x: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    """torch's quantized tensor. With a scale of NaN the integers do not matter: all that follows from them is NaN."""
    return torch.quantize_per_tensor(x, scale if scale == scale else 1.0, zero_point, dtype)


def _pack_choose(packing: Packing, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    readers = {reader for result in node.users for reader in result.users}
    if meta(given["x"]).dtype is not torch.float32 or not all(map(packing.reads_numbers, readers)):
        return node
    numbers = packing.call(node, dynamic_qparams, given["x"])
    for result in list(node.users):
        result.replace_input_with(node, numbers)
    packing.take_numbers(numbers)
    node.replace_all_uses_with(numbers)
    return numbers


def _pack_quantize(packing: Packing, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    dtype, x = given["dtype"], given["input"]
    full_range = dtype in _QUANTIZED_DTYPES and (given["quant_min"], given["quant_max"]) == _limits(dtype)
    if not full_range or meta(x).dtype is not torch.float32:
        return node
    scale, zero_point = (packing.number(node, given[name]) for name in ("scale", "zero_point"))
    is_dynamic = isinstance(scale, fx.Node)  # and NaN where x is not finite
    function = quantized if is_dynamic else torch.quantize_per_tensor
    call = packing.call(node, function, x, scale, zero_point, _QUANTIZED_DTYPES[dtype])
    return packing.integers(node, call, scale, zero_point)


def _pack_dequantize(packing: Packing, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    if given["dtype"] not in _QUANTIZED_DTYPES or meta(node).dtype is not torch.float32:
        return node
    if packing.tensor(given["input"]) is not None:  # a stored weight, which has no kernel here
        return node
    scale, zero_point = (packing.number(node, given[name]) for name in ("scale", "zero_point"))
    return packing.call(node, Tensor.dequantize, packing.quantized(node, given["input"], scale, zero_point))


def pack_numbers(packing: Packing, node: fx.Node, given: Mapping[str, Any], prefix: str = "") -> list[Any]:
    """A scale and a zero point among a node's arguments, as Python numbers where they are constants."""
    return [packing.number(node, given[f"{prefix}{name}"]) for name in ("scale", "zero_point")]


def _limits(dtype: torch.dtype) -> tuple[int, int]:
    info = torch.iinfo(dtype)
    return info.min, info.max


_QDQ_OPERATORS: dict[str, Pack] = {
    "graphopt.choose_qparams.default": _pack_choose,
    "quantized_decomposed.quantize_per_tensor.tensor": _pack_quantize,
    "quantized_decomposed.dequantize_per_tensor.tensor": _pack_dequantize,
}
