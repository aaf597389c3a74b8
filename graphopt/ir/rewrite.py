"""Rules: pattern -> replacement, as plain functions over one builder, and the greedy driver that applies them."""

from __future__ import annotations

import inspect
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from graphopt.errors import GraphError, SpellingError
from graphopt.ir.decline import Decline, Declined
from graphopt.ir.graph import Graph, Node, Shape, Value, unique_labels

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

    def __init__(self, graph: Graph, at: Node, emitted: dict[Hashable, Value] | None = None) -> None:
        self.graph, self.at = graph, at
        self._emitted = {} if emitted is None else emitted

    def __getattr__(self, kind: str) -> Callable[..., Value]:
        return lambda *operands, **attributes: self.graph.emit(kind, *operands, at=self.at, **attributes)

    def __call__(self, kind: str, *operands: Value | None, **attributes: Any) -> Value:
        """Emit an operation whose name is not an identifier."""
        return self.graph.emit(kind, *operands, at=self.at, **attributes)

    def constant(self, tensor: Any) -> Value:
        return self.graph.add_constant(tensor)

    def once(self, key: Hashable, emit: Callable[[], Value]) -> Value:
        """The value that an earlier replacement in this round of the driver emitted for a key, else that of `emit`.

        key: all that the value depends on.
        """
        if key not in self._emitted:
            self._emitted[key] = emit()
        return self._emitted[key]


@dataclass
class Match:
    """What a pattern bound: values under the pattern's variable names, nodes under their `bind` names."""

    root: Node
    bound: dict[str, Any] = field(default_factory=dict)
    interior: list[Node] = field(default_factory=list)
    siblings: tuple[Match, ...] = ()
    """Of a rule with `group_by`: later matches of the group, which are rewritten with this one."""

    @property
    def group(self) -> tuple[Match, ...]:
        """All matches that are rewritten together, in topological order of their roots: this one is the first."""
        return self, *self.siblings

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All that the pattern covers, in the whole group, in topological order."""
        return tuple(dict.fromkeys(node for one in self.group for node in (*reversed(one.interior), one.root)))

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["bound"][name]
        except KeyError:
            raise AttributeError(name) from None


Replacement = Value | Mapping[Value, Value] | None
"""What a rule puts in place of a match: a value for the root's result; or, for a rule that replaces several nodes, a
value for each of their results; or None, to leave the match to the rules that follow."""

Replace = Callable[[Builder, Match], Replacement]


@dataclass(frozen=True)
class Rule:
    """pattern(op, variables...) matches from its result backwards; replace(op, match) emits or raises Declined.

    A replacement that the graph's opset cannot spell is declined too.

    A pattern variable with a default of None stands for an operand that may be left out. Values inside the pattern
    must have no other user, unless `shared`. `check` says what a pattern cannot: a match for which it is
    False does not count.
    """

    name: str
    pattern: Callable[..., Pattern]
    replace: Replace
    shared: bool = False
    check: Callable[[Match], bool] | None = None
    group_by: Callable[[Match], Hashable | None] | None = None
    """Where given, matches with equal keys are rewritten together, such as linears that read one input.

    `replace` gets the first of them, whose `group` holds all, and emits at the first root: what it reads must stand
    before that. A match whose key is None, or that is alone with its key, is left as it is.
    """

    def recorded(self) -> tuple[Pattern, frozenset[str]]:
        """The pattern as data, and the variables that may be left out."""
        parameters = list(inspect.signature(self.pattern).parameters.values())[1:]
        pattern = self.pattern(Recorder(), *(p.name for p in parameters))
        return pattern, frozenset(p.name for p in parameters if p.default is None)

    def matches(self, graph: Graph) -> list[Match]:
        """Where the rule fits, in topological order; of a group, the first match."""
        matcher = _Matcher(self)
        matcher.group(graph.nodes)
        found = [matcher.match(node) for node in graph.nodes]
        return [match for match in found if match is not None]


@dataclass
class RuleLog:
    """What became of a rule: nodes tried, sites rewritten, matches declined with reasons, seconds."""

    tries: int = 0
    hits: int = 0
    seconds: float = 0.0
    declined: dict[str, Decline] = field(default_factory=dict)
    """By the label of the match's root, with the node's name where several roots of the kind share it."""

    def then(self, later: RuleLog) -> RuleLog:
        """Of two runs of the rule over one graph: the sums, and what the later run declined."""
        return RuleLog(
            self.tries + later.tries, self.hits + later.hits, self.seconds + later.seconds, dict(later.declined)
        )


@dataclass(frozen=True)
class Choice:
    """A pattern that has several legal forms; the target decides which one runs, by measuring or by their order."""

    name: str
    pattern: Callable[..., Pattern]
    forms: Mapping[str, Replace | None]
    """By name, in the order that they are taken where nothing is measured. None: the ops stay as they are."""
    check: Callable[[Match], bool] | None = None
    around: Callable[[Match], Sequence[Node]] = lambda match: match.nodes
    """The nodes that are measured together, in topological order: all whose cost the form decides."""
    shared: bool = False
    """Whether values inside the pattern may have other users, as in a rule."""
    group_by: Callable[[Match], Hashable | None] | None = None
    """Which matches are rewritten together, as in a rule: one form is taken for the whole group."""
    lossy: frozenset[str] = frozenset()
    """Forms that round what the others keep: left out unless a lossy pass was asked for."""
    timed: bool = True
    """Whether the target may time the forms; else the first legal one is taken, as what it gains shows only in use."""

    def exact(self) -> Choice:
        """The choice among the forms that compute the same, but for the order of sums."""
        return replace(self, forms={name: form for name, form in self.forms.items() if name not in self.lossy})

    def rule(self, form: Callable[[Match], str] | None = None) -> Rule:
        """A rule that tries the form named by `form` (if it is offered), then all in order, and takes the first legal.

        A form is illegal that declines, or that the graph's opset cannot spell. If none is legal, the first decline is
        reported.
        """

        def replace(op: Builder, match: Match) -> Replacement:
            order = [form(match), *self.forms] if form else self.forms
            declines: list[Decline] = []
            for name in dict.fromkeys(name for name in order if name in self.forms):
                emit = self.forms[name]
                try:
                    if emit is not None:
                        return emit(op, match)
                except (Declined, SpellingError) as reason:
                    declines.append(_decline(reason))
                else:
                    break  # the ops stay as they are
            if declines:
                raise Declined(declines[0])
            return None

        return self._rule(replace)

    def only(self, form: str) -> Rule:
        """The rule of one form, which declines where that is not legal."""
        return self._rule(self.forms[form] or (lambda op, match: None))

    def matches(self, graph: Graph) -> list[Match]:
        """Where the pattern fits, in topological order; of a group, the first match."""
        return self.rule().matches(graph)

    def _rule(self, replace: Replace) -> Rule:
        return Rule(self.name, self.pattern, replace, self.shared, self.check, self.group_by)


def rewrite(graph: Graph, rules: Iterable[Rule]) -> dict[str, RuleLog]:
    """Apply rules greedily, earlier rules first, until none matches. Linear in the graph for each round.

    Only the driver changes the graph: a replacement emits, and returns what stands for the old values.
    """
    matchers = [_Matcher(rule) for rule in rules]
    logs = {matcher.rule.name: RuleLog() for matcher in matchers}
    by_root: dict[str, list[_Matcher]] = defaultdict(list)
    for matcher in matchers:
        by_root[matcher.pattern.kind].append(matcher)
    labels: dict[Node, str] = {}
    for _ in range(ROUNDS):
        before, nodes = graph.version, graph.nodes
        emitted: dict[Hashable, Value] = {}  # in one round, in which later sites come after earlier ones in the graph
        erased: set[Node] = set()
        for matcher in matchers:
            matcher.group(nodes)
        by_kind = {kind: [node for node in nodes if node.kind == kind] for kind in by_root}
        for alike in by_kind.values():
            labels = unique_labels(alike) | labels  # a node keeps its label when others of that label are gone
        for node in nodes:
            for matcher in by_root.get(node.kind, ()) if node not in erased else ():
                if _try(matcher, Builder(graph, node, emitted), logs[matcher.rule.name], erased, labels):
                    break
        if graph.version == before:
            return logs
    names = ", ".join(matcher.rule.name for matcher in matchers)
    raise GraphError(f"rules still change the graph after {ROUNDS} rounds: {names}")


class _Matcher:
    """A rule with its pattern as data, and the groups of one round."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.pattern, self.optional = rule.recorded()
        self._groups: dict[Node, list[Node]] = {}
        """By root, the roots with its key, itself among them, in topological order."""

    def group(self, nodes: Iterable[Node]) -> None:
        """Note which nodes have equal keys. nodes: all of a graph, in topological order."""
        by_key: dict[Hashable, list[Node]] = defaultdict(list)
        for node in nodes if self.rule.group_by is not None else ():
            found = self._fit(node)
            if found is not None and (key := self._key(found)) is not None:
                by_key[key].append(node)
        self._groups = {node: group for group in by_key.values() for node in group}

    def match(self, node: Node, erased: Collection[Node] = ()) -> Match | None:
        """The match at a node; of a rule that groups, with its siblings, and only at the first root of a group."""
        found = self._fit(node)
        if found is None or self.rule.group_by is None:
            return found
        key = self._key(found)
        fits = [self._fit(root) for root in self._groups.get(node, ()) if root not in erased]
        group = [one for one in fits if one is not None and self._key(one) == key]  # others may have been rewritten
        if len(group) < 2 or group[0].root != node:
            return None
        found.siblings = tuple(group[1:])
        return found

    def _fit(self, node: Node) -> Match | None:
        found = match_node(self.pattern, node, self.optional, self.rule.shared)
        fits = found is not None and (self.rule.check is None or self.rule.check(found))
        return found if fits else None

    def _key(self, match: Match) -> Hashable | None:
        return None if self.rule.group_by is None else self.rule.group_by(match)


def _try(
    matcher: _Matcher, op: Builder, log: RuleLog, erased: set[Node], labels: Mapping[Node, str]
) -> bool:
    """Rewrite at the builder's node where a rule matches; whether it did. labels: how the log names roots."""
    start = time.perf_counter()
    log.tries += 1
    match = None
    try:
        match = matcher.match(op.at, erased)
        replacement = None if match is None else matcher.rule.replace(op, match)
        if match is None or replacement is None:
            return False
        erased |= _substitute(op.graph, match, replacement, matcher.rule.name)
        log.hits += len(match.group)
        for one in match.group:
            log.declined.pop(labels[one.root], None)
        return True
    except (Declined, SpellingError) as reason:
        roots = [op.at] if match is None else [one.root for one in match.group]
        log.declined |= {labels[root]: _decline(reason) for root in roots}
        return False
    finally:
        log.seconds += time.perf_counter() - start


def _decline(reason: Declined | SpellingError) -> Decline:
    return reason.decline if isinstance(reason, Declined) else Decline("not_spelled", reason=str(reason))


def _substitute(graph: Graph, match: Match, replacement: Value | Mapping[Value, Value], rule: str) -> set[Node]:
    """Put a replacement in the place of a match; the nodes that are gone.

    Raises Declined where a shape differs, and GraphError where the rule replaces some results of a node and not all.
    """
    values = {match.root.result: replacement} if isinstance(replacement, Value) else replacement
    for old, new in values.items():
        if _differ(old.shape, new.shape):  # such as a factor of 1 that adds an axis
            raise Declined("shape_changes", before=old.shape, after=new.shape)
    replaced = dict.fromkeys(old.producer for old in values)
    gone: set[Node] = set()
    for node in replaced:
        assert node is not None  # values of inputs and constants are not replaced
        if missing := [result.name for result in node.results if result not in values]:
            raise GraphError(f"rule {rule} gives nothing for {', '.join(missing)} of {node.kind} ({node.label})")
        graph.replace(node, *(values[result] for result in node.results))
        gone.add(node)
    for inner in (inner for one in match.group for inner in one.interior):  # from the root downwards: users go first
        if inner not in gone and not any(result.users or result.is_output for result in inner.results):
            graph.erase(inner)
            gone.add(inner)
    return gone


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
