"""A text language for graphs: the same text builds a graph in either dialect, so a test holds before and after.

    y = linear(x[batch,8], W[8,8]:rank2, b[8])
    s, z = choose_qparams(y)
    q = quantize(y, s, z)
    return q, s

A lower-case name with a shape is an input (`ids[2,4]:int64`: its dtype, float32 by default), an upper-case name with
a shape a constant, whose suffixes say its dtype and content: `:seed3` (normal; by default the seed is made of the
name), `:rank2`, `:zeros`, `:ones`, `:values(1,2)` repeated to fill the shape. Later uses are the bare name. `-` leaves
an operand out, `key=value` is an attribute, calls nest. Without a return, the last line's names are returned.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node, Value
from graphopt.measure.machine import cpu_saturates, environment
from graphopt.numerics.metrics import within_tolerance
from graphopt.pipeline.calibration import Calibration
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass
from graphopt.pipeline.runner import run_pass
from graphopt.pipeline.target import AnyTarget, Placement, Target

BITS: Literal[8, 7] = 7 if cpu_saturates(environment()["flags"]) else 8
"""Of weights whose products with uint8 this machine cuts nothing off of: 8, or 7 on x86 without VNNI."""

_TOKEN = re.compile(r"\s*([A-Za-z_][\w.]*(?:\[[^\]]*\])?(?::\w+(?:\([^)]*\))?)*|-?\d[\d.e+-]*|[-=(),\[\]])")
_LEAF = re.compile(r"([A-Za-z_]\w*)(?:\[([^\]]*)\])?((?::\w+(?:\([^)]*\))?)*)$")


def build(dialect: str, text: str) -> Graph:
    """The graph that `text` describes, in dialect "fx" or "onnx". Raises SyntaxError where it cannot be read."""
    graph: Graph = _Reader(dialect, text).graph
    return graph


class _Reader:
    def __init__(self, dialect: str, text: str) -> None:
        inputs = {
            match[1]: (_sizes(match[2]), getattr(torch, match[3] or "float32"))
            for match in re.finditer(r"\b([a-z]\w*)\[([^\]]*)\](?::(\w+))?(?=[\s,)])", text)
        }
        self.graph: Any = _empty(dialect, inputs)
        self.named: dict[str, Value] = {value.name: value for value in self.graph.inputs}
        returned: list[str] = []
        for line in filter(None, (line.split("#")[0].strip() for line in text.splitlines())):
            if line.startswith("return "):
                returned = [name.strip() for name in line.removeprefix("return ").split(",")]
                break
            left, _, right = line.partition(" = ")
            returned = [name.strip() for name in left.split(",")]
            self.tokens = [*_TOKEN.findall(right), "end"]
            if "".join(self.tokens[:-1]) != re.sub(r"\s", "", right):
                raise SyntaxError(f"cannot read {right!r}")
            self.named |= zip(returned, self.call(self.take()), strict=True)
        self.graph.set_outputs({name: self.named[name] for name in returned})

    def take(self, *expected: str) -> str:
        token: str = self.tokens.pop(0)
        if expected and token not in expected:
            raise SyntaxError(f"expected {' or '.join(expected)}, not {token!r} before {' '.join(self.tokens)}")
        return token

    def call(self, kind: str) -> tuple[Value, ...]:
        operands: list[Value | None] = []
        attributes: dict[str, Any] = {}
        self.take("(")
        while self.tokens[0] != ")":
            token = self.take()
            if self.tokens[0] == "=":
                self.take("=")
                attributes[token] = self.attribute()
            else:
                operands.append(self.operand(token))
            if self.tokens[0] != ")":
                self.take(",")
        self.take(")")
        results: tuple[Value, ...] = self.graph.emit_all(kind, *operands, **attributes)
        return results

    def operand(self, token: str) -> Value | None:
        if token == "-":
            return None
        if self.tokens[0] == "(":
            return self.call(token)[0]
        leaf = _LEAF.match(token)
        if leaf is None:
            raise SyntaxError(f"{token!r} is no operand")
        name, shape, suffixes = leaf.groups()
        if name not in self.named:
            if shape is None or name[0].islower():
                raise SyntaxError(f"{name!r} is not known yet")
            tensor = _content(name, _sizes(shape), re.findall(r":(\w+(?:\([^)]*\))?)", suffixes))
            self.named[name] = self.graph.add_constant(tensor, name)
        return self.named[name]

    def attribute(self) -> Any:
        token = self.take()
        if token == "[":
            items = []
            while self.tokens[0] != "]":
                items.append(self.attribute())
                if self.tokens[0] == ",":
                    self.take(",")
            self.take("]")
            return tuple(items)
        if token in ("True", "False"):
            return token == "True"
        if token[0].isalpha():
            found = getattr(torch, token, None)
            return found if isinstance(found, torch.dtype) else token
        return float(token) if set(token) & set(".e") else int(token)


def _empty(dialect: str, inputs: Mapping[str, Any]) -> Any:
    if dialect == "fx":
        from graphopt.dialects.fx.graph import FxGraph

        return FxGraph.empty(inputs)
    from graphopt.dialects.onnx.graph import OnnxGraph

    return OnnxGraph.empty(inputs)


def _sizes(text: str) -> tuple[Any, ...]:
    return tuple(int(size) if size.strip().isdigit() else size.strip() for size in text.split(",") if size.strip())


def _content(name: str, shape: tuple[int, ...], suffixes: Sequence[str]) -> Tensor:
    tensor = _normal(zlib.crc32(name.encode()), shape)
    dtype = torch.float32
    for suffix in suffixes:
        op, number, listed = re.fullmatch(r"([a-z]+)(\d*)(?:\((.*)\))?", suffix).groups()  # type: ignore[union-attr]
        match op:
            case "seed":
                tensor = _normal(int(number), shape)
            case "rank":
                tensor = _normal(1, (shape[0], int(number))) @ _normal(2, (int(number), shape[1]))
            case "zeros" | "ones":
                tensor = getattr(torch, op)(shape)
            case "values":
                numbers = torch.tensor([float(item) for item in listed.split(",")], dtype=torch.float64)
                count = int(torch.Size(shape).numel())
                tensor = numbers.repeat(-(-count // len(numbers)))[:count].reshape(shape)
            case _:
                dtype = getattr(torch, suffix)
    return tensor.to(dtype)


def _normal(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- running -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FakeTarget(AnyTarget):
    """A target by what a pass asks of it: what each op has a kernel for, and what zeros bring."""

    name: str = "toy"
    schemes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    zeros: str = "zeros are numbers"
    sparse: tuple[str, ...] = ()
    weight_bits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    round_to: Mapping[str, int] = field(default_factory=dict)
    runs: bool = True
    types: tuple[str, ...] = ("int8",)
    floats: tuple[str, ...] = ()
    placement: Placement | None = None
    granularities: tuple[str, ...] = ("tensor", "row")
    quantizes: tuple[str, ...] = ()
    bits: int = 8
    refused: Mapping[str, str] = field(default_factory=dict)
    """By label, why a site must stay float."""

    def product_bits(self) -> int:
        return self.bits

    def why_float(self, site: Node, scheme: str, dtype: str) -> Decline | None:
        reason = self.refused.get(site.label)
        return None if reason is None else Decline(reason)


def feeds(graph: Graph, seed: int = 0, **sizes: int) -> dict[str, Tensor]:
    """Seeded inputs: normal floats, integers 0 to 3; `sizes` gives numbers for named axes (3 by default)."""
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for value in graph.inputs:
        assert value.shape is not None and value.dtype is not None
        shape = [size if isinstance(size, int) else sizes.get(size, 3) for size in value.shape]
        is_float = value.dtype.is_floating_point
        made[value.name] = (
            torch.randn(shape, generator=draw) if is_float else torch.randint(0, 4, shape, generator=draw)
        ).to(value.dtype)
    return made


def run(pass_: Pass, graph: Graph, *, target: Target | None = None, calibration: Any = None) -> Context:
    """Run one pass as a pipeline does, and verify the graph; calibration: batches of feeds."""
    if isinstance(calibration, list):
        calibration = Calibration(calibration, graph.inputs)
    context = Context(target=target or AnyTarget(), calibration=calibration)
    run_pass(pass_, graph, context)
    graph.verify()
    return context


def declined(context: Context) -> list[str]:
    """The codes of what the last pass declined, in the order of its sites."""
    return [reason.code for reason in context.record.declined.values()]


def declines(context: Context) -> list[Decline]:
    """What the last pass declined, with the values that make the case, in the order of its sites."""
    return [Decline(reason.code, **reason.values) for reason in context.record.declined.values()]


def listing(graph: Graph) -> list[str]:
    """The graph's text by lines, without paths, so that a test can write it as a list."""
    return [line.split("  #")[0] for line in graph.text().splitlines()]


def output_names(graph: Graph) -> list[str]:
    """The names by which the graph returns its outputs: kept beside an fx graph, those of the values in ONNX."""
    return list(getattr(graph, "output_names", None) or (value.name for value in graph.outputs))


def producer(value: Value | None) -> Node:
    """The node that computes a value, which must have one."""
    assert value is not None and value.producer is not None, value
    return value.producer


def stored(node: Node, name: str) -> Tensor:
    """The constant that the operand `name` of a node must be."""
    tensor = node.graph.constant(node.required(name))
    assert tensor is not None, f"{name} of {node.label} is computed"
    return tensor


def weight_of(site: Node) -> Tensor:
    """The weight of a site, (out, in, ...), which must be a constant."""
    assert site.weight is not None, f"the weight of {site.label} is computed"
    return site.weight


def outputs(graph: Graph, inputs: Mapping[str, Tensor] | None = None) -> list[Tensor]:
    """What the graph returns, on seeded inputs by default."""
    return graph.evaluate(feeds(graph) if inputs is None else inputs, graph.outputs)


def assert_outputs_equal(
    graph: Graph, original: Graph, *, rtol: float | None = None, atol: float | None = None
) -> None:
    """Equal names and values of outputs on seeded inputs, by the project's tolerance unless another is given."""
    assert output_names(graph) == output_names(original)
    for found, expected in zip(outputs(graph), outputs(original), strict=True):
        assert within_tolerance(expected, found, rtol=rtol, atol=atol), (found - expected).abs().max()


def assert_unchanged(pass_: Pass, graph: Graph, **surroundings: Any) -> None:
    """A further run of the pass finds nothing to do."""
    version, text = graph.version, graph.text()
    run(pass_, graph, **surroundings)
    assert graph.version == version and graph.text() == text
