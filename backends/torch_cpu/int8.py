"""Rules for int8 ops on the engines of torch: what is fused into a linear, which linears are merged, who runs them.

An `Engine` has one function for each int8 op, and says what it fuses into a linear: an activation that follows, an
added residual, a quantize of the result. The forms of a pattern are, for each engine, fused and apart; the fastest is
taken where forms are measured, else the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from graphopt.dialects.fx.graph import FxNode
from graphopt.dialects.fx.native import ORIGIN
from graphopt.ir.decline import Declined
from graphopt.ir.graph import Graph, Node, Value
from graphopt.ir.ops import OPS
from graphopt.ir.rewrite import Builder, Choice, Match, Pattern, Recorder, Replace, Rule, scalar
from graphopt.lowering import row_scales
from graphopt.lowering.merging import has_stored_bias, merge, merge_key
from graphopt.lowering.saturation import max_abs

POSTS = ("relu", "gelu", "silu", "hard_swish", "tanh")
"""Activations that an engine may fuse into a linear."""


@dataclass(frozen=True)
class Linear:
    """A linear_int8 op's operands."""

    node: Node
    x: Value
    scale: Value
    zero_point: Value
    weight: Value
    weight_scale: Value
    bias: Value | None

    @classmethod
    def of(cls, node: Node) -> Linear:
        """Of a linear_int8 node."""
        x, scale, zero_point, weight, weight_scale = map(node.required, OPS["linear_int8"].operands[:5])
        return cls(node, x, scale, zero_point, weight, weight_scale, node.bias)

    def require_stored(self) -> Linear:
        """This linear. Raises Declined where no int8 kernel takes it."""
        if not (self.weight.is_constant and self.weight_scale.is_constant and self.weight_scale.rank == 1):
            raise Declined("weight_not_stored_per_channel")
        if self.bias is not None and not self.bias.is_constant:
            raise Declined("linear_bias_computed")
        if self.x.dtype != torch.uint8:
            raise Declined("input_integers_unsupported", dtype=str(self.x.dtype))
        return self

    @property
    def is_static(self) -> bool:
        return self.scale.is_constant and self.zero_point.is_constant

    def float_input(self, op: Builder) -> Value:
        """The float value that its quantize reads; a dequantize of the integers where another one made them."""
        quantize = self.x.producer
        if quantize is not None and quantize.kind == "quantize" and self._has_the_parameters_of(quantize, op.graph):
            return quantize.input
        return op.dequantize(self.x, self.scale, self.zero_point)

    @property
    def is_dynamic(self) -> bool:
        """Whether choose_qparams of the very value that is quantized computes its scale and zero point."""
        quantize, chooser = self.x.producer, self.scale.producer
        if quantize is None or chooser is None or (quantize.kind, chooser.kind) != ("quantize", "choose_qparams"):
            return False
        return chooser.input == quantize.input and chooser.results == (self.scale, self.zero_point)

    def _has_the_parameters_of(self, quantize: Node, graph: Graph) -> bool:
        written = quantize.required("scale"), quantize.operand("zero_point")
        pairs = zip(written, (self.scale, self.zero_point), strict=True)
        return all(one is not None and _same(graph, one, other) for one, other in pairs)


def _same(graph: Graph, a: Value, b: Value) -> bool:
    """Whether two values are one, or constants of one number."""
    number = scalar(graph, a)
    return a == b or (number is not None and number == scalar(graph, b))


@dataclass(frozen=True)
class Tail:
    """What follows a linear: an activation or an add, then a quantize; each may be missing."""

    post: Node | None = None
    residual: Value | None = None
    y: tuple[Value, Value] | None = None
    """Scale and zero point of the quantize."""

    def apart(self, op: Builder, y: Value) -> Value:
        """The same as ops of their own, on the result of the linear."""
        if self.post is not None:
            y = op.graph.emit(self.post, y, *self.post.operands[1:], at=op.at)
        if self.residual is not None:
            y = op.add(y, self.residual)
        return y if self.y is None else op.quantize(y, *self.y)


@dataclass(frozen=True)
class Engine:
    """An engine's forms of the int8 ops. Each raises Declined for what it does not take."""

    name: str
    linear: Callable[[Builder, Linear, Tail], Value]
    conv: Callable[[Builder, Match], Value]
    add: Callable[[Builder, Match], Value]
    fuses: Callable[[str], bool]
    """Whether it fuses this into a linear: an op of POSTS, "residual", or "quantize"."""
    max_weight: int = 128
    """Largest magnitude of int8 weights: with larger ones, sums saturate on the CPU that the graph is lowered for."""

    def require_no_saturation(self, weight: Value, graph: Graph) -> None:
        """Raise Declined where a stored weight is larger than max_weight."""
        tensor = graph.constant(weight) if self.name != FLOAT else None
        if tensor is not None and (largest := max_abs(tensor)) > self.max_weight:
            raise Declined("saturates", max_abs=largest, safe=self.max_weight)


FLOAT = "float"


def float_engine() -> Engine:
    """The form without integers: linears, convs and adds on dequantized weights and inputs."""
    return Engine(FLOAT, _float_linear, _float_conv, _float_add, lambda what: False)


def _floats(op: Builder, weight: Value, scale: Value) -> Value:
    integers, scales = op.graph.constant(weight), op.graph.constant(scale)
    if integers is None or scales is None:
        return op.dequantize(weight, scale, axis=0)
    return op.constant(integers.float() * scales.reshape(-1, *[1] * (integers.dim() - 1)))


def _float_linear(op: Builder, linear: Linear, tail: Tail) -> Value:
    # A static range clips, so the integers are read; a dynamic one covers every value, so the float input will do.
    fixed = op.dequantize(linear.x, linear.scale, linear.zero_point) if linear.is_static else None
    return op.linear(fixed or linear.float_input(op), _floats(op, linear.weight, linear.weight_scale), linear.bias)


def _float_conv(op: Builder, m: Match) -> Value:
    x = op.dequantize(m.x, m.scale, m.zero_point)
    y = op.conv(x, _floats(op, m.weight, m.weight_scale), m.bias, **m.root.attributes)
    return op.quantize(y, m.y_scale, m.y_zero_point)


def _float_add(op: Builder, m: Match) -> Value:
    y = op.add(op.dequantize(m.a, m.a_scale, m.a_zero_point), op.dequantize(m.b, m.b_scale, m.b_zero_point))
    return op.quantize(y, m.y_scale, m.y_zero_point)


# --- patterns ------------------------------------------------------------------------------------------------------


def _linear(op: Recorder, x: str, scale: str, zero_point: str, weight: str, weight_scale: str,
            bias: str | None = None) -> Pattern:  # fmt: skip
    return op.linear_int8(x, scale, zero_point, weight, weight_scale, bias, bind="linear")


def _behind(*kinds: str) -> Callable[..., Pattern]:
    """A pattern of a linear and ops that follow it, one after the other."""

    def pattern(op: Recorder, x: str, scale: str, zero_point: str, weight: str, weight_scale: str,
                y_scale: str, y_zero_point: str, residual: str, bias: str | None = None) -> Pattern:  # fmt: skip
        made = _linear(op, x, scale, zero_point, weight, weight_scale, bias)
        for kind in kinds:
            rest = {"quantize": (y_scale, y_zero_point), "add": (residual,)}.get(kind, ())
            bind = {"quantize": "quantize", "add": "add"}.get(kind, "post")
            whole = {"bits": 8} if kind == "quantize" else {}
            made = getattr(op, kind)(made, *rest, bind=bind, **whole)
        return made

    return pattern


def _tail(m: Match) -> Tail:
    bound = m.bound
    y = (m.y_scale, m.y_zero_point) if "quantize" in bound else None
    return Tail(bound.get("post"), m.residual if "add" in bound else None, y)


def _fits(m: Match) -> bool:
    """Whether kernels can fuse the tail: an add of equal shape and dtype, a quantize to uint8 by stored scalars."""
    tail, y = _tail(m), m.linear.result
    if tail.residual is not None and (tail.residual.shape != y.shape or tail.residual.dtype != y.dtype):
        return False
    return tail.y is None or (
        m.root.result.dtype is torch.uint8 and all(one.is_constant and one.rank == 0 for one in tail.y)
    )


def _conv(op: Recorder, x: str, scale: str, zero_point: str, weight: str, weight_scale: str, y_scale: str,
          y_zero_point: str, bias: str | None = None) -> Pattern:  # fmt: skip
    return op.conv_int8(x, scale, zero_point, weight, weight_scale, y_scale, y_zero_point, bias)


def _add(op: Recorder, a: str, a_scale: str, a_zero_point: str, b: str, b_scale: str, b_zero_point: str,
         y_scale: str, y_zero_point: str) -> Pattern:  # fmt: skip
    return op.add_int8(a, a_scale, a_zero_point, b, b_scale, b_zero_point, y_scale, y_zero_point)


def convolution(op: Builder, m: Match) -> tuple[Value, dict[str, list[int]], int]:
    """Input, settings (one number per axis) and groups of a conv_int8. Kernels pad both ends of an axis alike; where
    the padding differs, a pad op comes first. Raises Declined where an operand is computed."""
    x, given = m.x, m.root.attributes
    if x.dtype != torch.uint8 or not all(
        one is None or one.is_constant
        for one in (m.scale, m.zero_point, m.weight, m.weight_scale, m.y_scale, m.y_zero_point, m.bias)
    ):
        raise Declined("conv_not_constant")
    shape = m.weight.shape
    rank = len(shape) - 2
    ones, zeros = (1,) * rank, (0,) * rank
    begin, end = given["padding"][:rank] or zeros, given["padding"][rank:] or zeros
    if begin != end:
        x = op.pad(x, padding=(0, 0, *begin, 0, 0, *end), value=scalar(op.graph, m.zero_point))
        begin = zeros
    settings = {"stride": given["stride"] or ones, "padding": begin, "dilation": given["dilation"] or ones}
    return x, {name: list(numbers) for name, numbers in settings.items()}, given["groups"]


# --- forms ---------------------------------------------------------------------------------------------------------


def stages(engines: Sequence[Engine]) -> Sequence[Sequence[Rule | Choice]]:
    """For one graph: linears are merged, scales of rows taken out of them, then they are lowered together with their
    tails, then all that is left is lowered."""
    alone = {engine.name: partial(_alone, engine) for engine in engines}
    return (
        (MERGED,),
        (row_scales.QUANTIZE, row_scales.LINEAR_INT8),
        _behind_linears(engines, *((post, "quantize") for post in POSTS), ("quantize",)),
        _behind_linears(engines, *((post,) for post in POSTS), ("add",)),
        (
            _one_of("linear", _linear, alone, _around),
            _one_of("conv", _conv, {engine.name: partial(_conv_by, engine) for engine in engines}),
            _one_of("add", _add, {engine.name: engine.add for engine in engines}),
        ),
        () if any(engine.name == FLOAT for engine in engines) else _left_over(),
    )


def _behind_linears(engines: Sequence[Engine], *tails: Sequence[str]) -> Sequence[Choice]:
    """Choices for the tails that some engine fuses. A longer tail stands in an earlier stage than a part of it."""
    found = []
    for ops in tails:
        names = ["residual" if op == "add" else op for op in ops]
        if any(all(map(engine.fuses, names)) for engine in engines):
            name = "-".join(["linear", *ops])
            found.append(Choice(name, _behind(*ops), _forms(engines, names), check=_fits, around=_around))
    return found


def _left_over() -> Sequence[Rule]:
    """What every engine declined runs in floats; the logs of the engines' rules say why."""
    floats = float_engine()
    return (
        Rule("linear-in-float", _linear, partial(_alone, floats)),
        Rule("conv-in-float", _conv, floats.conv),
        Rule("add-in-float", _add, floats.add),
    )


def _one_of(
    name: str,
    pattern: Callable[..., Pattern],
    forms: Mapping[str, Replace | None],
    around: Callable[[Match], Sequence[Node]] = lambda match: match.nodes,
) -> Rule | Choice:
    """A choice of several forms, or a rule where there is one."""
    choice = Choice(name, pattern, forms, around=around)
    return choice if len(forms) > 1 else choice.rule()


def _forms(engines: Sequence[Engine], names: Sequence[str]) -> dict[str, Replace | None]:
    forms: dict[str, Replace | None] = {}
    for engine in engines:
        if all(map(engine.fuses, names)):
            forms[engine.name] = partial(_fused, engine)
        forms[f"{engine.name}, apart"] = partial(_apart, engine)
    return forms


def _linear_by(engine: Engine, op: Builder, m: Match, tail: Tail) -> Value:
    linear = Linear.of(m.linear)
    engine.require_no_saturation(linear.weight, op.graph)
    return engine.linear(op, linear if engine.name == FLOAT else linear.require_stored(), tail)


def _conv_by(engine: Engine, op: Builder, m: Match) -> Value:
    engine.require_no_saturation(m.weight, op.graph)
    return engine.conv(op, m)


def _alone(engine: Engine, op: Builder, m: Match) -> Value:
    return _linear_by(engine, op, m, Tail())


def _fused(engine: Engine, op: Builder, m: Match) -> Value:
    return _named(_linear_by(engine, op, m, _tail(m)), m.linear)


def _apart(engine: Engine, op: Builder, m: Match) -> Value:
    linear = _named(_linear_by(engine, op, m, Tail()), m.linear)
    return _tail(m).apart(op, linear)


def _named(value: Value, site: Node) -> Value:
    """The value, whose node gets the module path of the linear: profiles are summed by path."""
    node = value.producer
    assert isinstance(node, FxNode) and isinstance(site, FxNode)
    node.native.meta |= {key: site.native.meta[key] for key in ORIGIN if key in site.native.meta}
    return value


def _around(m: Match) -> list[Node]:
    """The match, what quantizes its input, and all other readers of those integers."""
    linear: Node = m.linear
    producers = [value.producer for value in (linear.required("scale"), linear.input)]
    before = [node for node in producers if node is not None and node.kind in ("choose_qparams", "quantize")]
    inside = {*before, *m.nodes, *(linear.input.users if before else ())}
    return [node for node in linear.graph.nodes if node in inside]


# --- merging -------------------------------------------------------------------------------------------------------


MERGED = Choice(
    "merge-linears",
    _linear,
    {"merged": lambda op, m: merge([one.root for one in m.group]), "apart": None},
    check=lambda m: has_stored_bias(m.root),
    around=_around,
    group_by=lambda m: merge_key(m.root),
)
"""linear(x, V), linear(x, W) -> slices of linear(x, [V; W])."""
