"""Rules: pattern -> replacement, as plain functions over one builder, and the greedy driver that applies them."""

from __future__ import annotations

import inspect
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graphopt.errors import GraphError
from graphopt.ir.decline import Decline, Declined
from graphopt.ir.graph import Graph, Node, Shape, Value

ROUNDS = 16
"""Most rounds over a graph; rules that still find something then undo each other, which is an error."""


@dataclass(frozen=True)
class Pattern:
    """An operation to match: its operands are patterns, variables (str), numbers (a scalar constant), or None."""

    kind: str
    operands: tuple[Any, ...]
    attributes: dict[str, Any]
    bind: str | None = None


class Recorder:
    """Stands for `op` in a pattern function: op.add(x, y) records what to match, `bind` names the node in the match."""

    def __getattr__(self, kind: str) -> Callable[..., Pattern]:
        def record(*operands: Any, bind: str | None = None, **attributes: Any) -> Pattern:
            return Pattern(kind, operands, attributes, bind)

        return record


class Builder:
    """Stands for `op` in a replacement: op.linear(x, w) emits at the matched node."""

    def __init__(self, graph: Graph, at: Node) -> None:
        self.graph, self.at = graph, at

    def __getattr__(self, kind: str) -> Callable[..., Value]:
        return lambda *operands, **attributes: self.graph.emit(kind, *operands, at=self.at, **attributes)

    def __call__(self, kind: str, *operands: Value | None, **attributes: Any) -> Value:
        """Emit an operation whose name is not an identifier."""
        return self.graph.emit(kind, *operands, at=self.at, **attributes)

    def constant(self, tensor: Any) -> Value:
        return self.graph.add_constant(tensor)


@dataclass
class Match:
    """What a pattern bound: values under the pattern's variable names, nodes under their `bind` names."""

    root: Node
    bound: dict[str, Any] = field(default_factory=dict)
    interior: list[Node] = field(default_factory=list)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All that the pattern covers, in topological order."""
        return *reversed(self.interior), self.root

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["bound"][name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True)
class Rule:
    """pattern(op, variables...) matches from its result backwards; replace(op, match) emits or raises Declined.

    A pattern variable with a default of None stands for an operand that may be left out. Values inside the pattern
    must have no other user, unless `shared`. `check` says what a pattern cannot: where it is false, nothing matched.
    """

    name: str
    pattern: Callable[..., Pattern]
    replace: Callable[[Builder, Match], Value]
    shared: bool = False
    check: Callable[[Match], bool] | None = None

    def recorded(self) -> tuple[Pattern, frozenset[str]]:
        """The pattern as data, and the variables that may be left out."""
        parameters = list(inspect.signature(self.pattern).parameters.values())[1:]
        pattern = self.pattern(Recorder(), *(p.name for p in parameters))
        return pattern, frozenset(p.name for p in parameters if p.default is None)


@dataclass
class RuleLog:
    """What became of a rule: nodes tried, sites rewritten, matches declined with reasons, seconds."""

    tries: int = 0
    hits: int = 0
    seconds: float = 0.0
    declined: dict[str, Decline] = field(default_factory=dict)


Replace = Callable[[Builder, Match], Value]


@dataclass(frozen=True)
class Choice:
    """A pattern that has several legal forms; which one runs is the target's to say, by measuring or by their order."""

    name: str
    pattern: Callable[..., Pattern]
    forms: Mapping[str, Replace | None]
    """By name, in the order that they are taken where nothing is measured. None: the ops stay as they are."""
    check: Callable[[Match], bool] | None = None
    around: Callable[[Match], Sequence[Node]] = lambda match: match.nodes
    """The nodes that are measured together, in topological order: all whose cost the form decides."""
    shared: bool = False
    """Whether values inside the pattern may have other users, as in a rule."""

    def rule(self, form: Callable[[Match], str] | None = None) -> Rule:
        """The rule that takes the form which `form` names for a match; without it, or where that declines, the first.

        Every later one follows in order; the reason of the first to decline is kept where none is legal.
        """
        first = next(iter(self.forms))

        def takes(match: Match) -> bool:
            fits = self.check is None or self.check(match)
            return fits and self.forms[form(match) if form else first] is not None

        def replace(op: Builder, match: Match) -> Value:
            chosen = form(match) if form else first
            reasons: list[Decline] = []
            for name in dict.fromkeys([chosen, *self.forms]):
                made = self.forms[name]
                if made is None:
                    raise Declined(reasons[0])
                try:
                    return made(op, match)
                except Declined as reason:
                    reasons.append(reason.decline)
            raise Declined(reasons[0])

        return Rule(self.name, self.pattern, replace, shared=self.shared, check=takes)

    def only(self, form: str) -> Rule:
        """The rule of one form, which declines where that is not legal."""
        made = self.forms[form]

        def replace(op: Builder, match: Match) -> Value:
            assert made is not None  # where ops stay, nothing is tried
            return made(op, match)

        check = self.check if made is not None else lambda m: False
        return Rule(self.name, self.pattern, replace, shared=self.shared, check=check)

    def matches(self, graph: Graph) -> list[Match]:
        """Where the pattern fits, in topological order."""
        pattern, optional = self.rule().recorded()
        nodes = [node for node in graph.nodes if node.kind == pattern.kind]
        found = [match_node(pattern, node, optional, self.shared) for node in nodes]
        return [match for match in found if match is not None and (self.check is None or self.check(match))]


def rewrite(graph: Graph, rules: Iterable[Rule]) -> dict[str, RuleLog]:
    """Apply rules greedily, earlier rules first, until none matches. Linear in the graph for each round."""
    rules = list(rules)
    logs = {rule.name: RuleLog() for rule in rules}
    by_root: dict[str, list[tuple[Rule, Pattern, frozenset[str]]]] = defaultdict(list)
    for rule in rules:
        pattern, optional = rule.recorded()
        by_root[pattern.kind].append((rule, pattern, optional))
    for _ in range(ROUNDS):
        before = graph.version
        erased: set[Node] = set()
        for node in graph.nodes:
            for rule, pattern, optional in by_root.get(node.kind, ()) if node not in erased else ():
                if _try(graph, rule, pattern, optional, node, logs[rule.name], erased):
                    break
        if graph.version == before:
            return logs
    raise GraphError(f"rules still change the graph after {ROUNDS} rounds: {', '.join(r.name for r in rules)}")


def _try(
    graph: Graph, rule: Rule, pattern: Pattern, optional: frozenset[str], node: Node, log: RuleLog, erased: set[Node]
) -> bool:
    start = time.perf_counter()
    log.tries += 1
    try:
        match = match_node(pattern, node, optional, shared=rule.shared)
        if match is None or (rule.check is not None and not rule.check(match)):
            return False
        new = rule.replace(Builder(graph, node), match)
        if _differ(node.result.shape, new.shape):  # such as a factor of 1 that adds an axis
            raise Declined(f"the shape would go from {node.result.shape} to {new.shape}")
        graph.replace(node, new)
        erased.add(node)
        for inner in match.interior:  # recorded from the root downwards, so users go first
            if not any(result.users or result.is_output for result in inner.results):
                graph.erase(inner)
                erased.add(inner)
        log.hits += 1
        log.declined.pop(node.label, None)
        return True
    except Declined as reason:
        log.declined[node.label] = reason.decline
        return False
    finally:
        log.seconds += time.perf_counter() - start


def _differ(shape: Shape | None, other: Shape | None) -> bool:
    """Whether two shapes surely differ: in rank, or in an axis of fixed size."""
    if shape is None or other is None:
        return False
    sizes = zip(shape, other, strict=False)
    return len(shape) != len(other) or any(a != b for a, b in sizes if isinstance(a, int) and isinstance(b, int))


def match_node(
    pattern: Pattern, node: Node, optional: frozenset[str] = frozenset(), shared: bool = False
) -> Match | None:
    """Match one node and what it reads; None where the pattern does not fit."""
    match = Match(node)
    return match if _fits(pattern, node, match, optional, shared) else None


def _fits(pattern: Pattern, node: Node, match: Match, optional: frozenset[str], shared: bool) -> bool:
    if node.kind != pattern.kind:
        return False
    attributes = node.attributes
    if any(attributes.get(key) != value for key, value in pattern.attributes.items()):
        return False
    operands = node.operands
    if len(operands) > len(pattern.operands) and any(value is not None for value in operands[len(pattern.operands) :]):
        return False
    padded = operands[: len(pattern.operands)] + (None,) * (len(pattern.operands) - len(operands))
    orders = [padded]
    if node.op is not None and node.op.commutative and len(padded) == 2:
        orders.append((padded[1], padded[0]))
    for order in orders:
        saved = dict(match.bound), list(match.interior)
        if all(_binds(p, v, match, optional, shared) for p, v in zip(pattern.operands, order, strict=True)):
            if pattern.bind:
                match.bound[pattern.bind] = node
            return True
        match.bound, match.interior = saved
    return False


def _binds(pattern: Any, value: Value | None, match: Match, optional: frozenset[str], shared: bool) -> bool:
    if isinstance(pattern, str):
        if value is None and pattern not in optional:
            return False
        if pattern in match.bound:
            bound = match.bound[pattern]
            return value in bound.results if isinstance(bound, Node) else bool(bound == value)
        match.bound[pattern] = value
        return True
    if value is None or pattern is None:
        return value is None and pattern is None
    if isinstance(pattern, int | float):
        return is_scalar(match.root.graph, value, pattern)
    producer = value.producer
    if producer is None or (not shared and value.only_user is None):
        return False
    match.interior.append(producer)
    return _fits(pattern, producer, match, optional, shared)


def is_scalar(graph: Graph, value: Value, expected: float) -> bool:
    """Whether a value is a constant of one element that equals `expected` to float32's precision."""
    found = scalar(graph, value)
    return found is not None and abs(found - expected) <= 1e-6 * max(1.0, abs(expected))


def scalar(graph: Graph, value: Value | None) -> float | None:
    """The number in a constant of one element, else None."""
    if value is None or not value.is_constant:
        return None
    tensor = graph.constant(value)
    return float(tensor.item()) if tensor is not None and tensor.numel() == 1 else None
