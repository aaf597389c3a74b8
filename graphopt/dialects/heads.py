"""Attention on heads that views split off and join -> attention on queries, keys and values that hold all heads.

`nn.MultiheadAttention` packs three projections into one, puts time first, and makes one axis of the batch and heads.
All of that is views: nodes that reorder, regroup or pick axes. Each is followed, from what projects the operands to the
attention, and from there to what joins the heads. Where axes come out as (batch, length, heads · size), one attention
with `heads` stands for them all: the projections are linears of their own, with the batch first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from graphopt.dialects.raising import Stage, peel_mask, peel_scale
from graphopt.errors import SpellingError
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node, Shape, Value
from graphopt.ir.rewrite import Builder, Match, Pattern, Recorder, Rule, RuleLog, rewrite

_SWAP = (1, 0, 2)
"""Between (batch, length, width) and (length, batch, width)."""
_SPLIT = (0, 2, 1, 3)
"""Between (batch, length, heads, size) and (batch, heads, length, size)."""
_NORMS = ("layer_norm", "rms_norm")
_RESHAPES = (
    "reshape", "squeeze", "unsqueeze", "onnx.Reshape", "onnx.Flatten", "aten.flatten.using_ints", "aten.unflatten.int",
)  # fmt: skip


# --- views -----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Factor:
    """An axis or a factor of one. `halves`: the outer and the inner factor that a reshape split it into."""

    size: int | str
    halves: tuple[_Factor, ...] = ()

    @property
    def leaves(self) -> list[_Factor]:
        return [leaf for half in self.halves for leaf in half.leaves] if self.halves else [self]


_Axis = list[_Factor]
"""The factors of an axis, outermost first; none where its size is 1."""


@dataclass
class _View:
    """How a value is a view of a source: the axes of both, as lists of the same factors."""

    axes: list[_Axis]
    """Those of the source."""
    now: list[_Axis]
    """Those of the value."""
    picked: dict[_Factor, int] = field(default_factory=dict)
    """Factors of the source of which one entry is left."""

    def follow(self, node: Node, result: Value) -> bool:
        """Go on to a result of a node that reads the value; whether that is a view."""
        if node.kind in _RESHAPES:
            return self._regroup(result.shape)
        if node.kind == "transpose":
            self.now = [self.now[axis] for axis in node.attributes["perm"]]
            return True
        if node.kind == "identity":
            return True
        index, axis = _picked(node, result), _axis(node) % len(self.now)
        if index is None:
            return False
        leaves = _leaves(self.now[axis])
        if len(leaves) != 1 or not isinstance(leaves[0].size, int):
            return False
        self.picked[leaves[0]] = index % leaves[0].size
        if result.rank == len(self.now):
            self.now[axis] = []
        else:
            del self.now[axis]
        return True

    def _regroup(self, shape: Shape | None) -> bool:
        if shape is None:
            return False
        left = [leaf for axis in self.now for leaf in _leaves(axis)]
        renamed: list[str] = []
        groups = [_take(left, size, renamed) for size in shape]
        found = [group for group in groups if group is not None]
        if len(found) < len(groups) or left:
            return False
        self.now = found
        return True


def _view(shape: Shape | None) -> _View | None:
    """A source as a view of itself; None where a size is not known."""
    if shape is None or "?" in shape or 0 in shape:
        return None
    axes = [[] if size == 1 else [_Factor(size)] for size in shape]
    return _View(axes, list(axes))


def _leaves(axis: _Axis) -> list[_Factor]:
    return [leaf for factor in axis for leaf in factor.leaves]


def _take(left: list[_Factor], size: int | str, renamed: list[str]) -> _Axis | None:
    """The first factors, whose product is `size`, taken from the list; one that holds more is split.

    renamed: gets the name of a factor that `size` calls otherwise. There may be one in a reshape: where all other sizes
    are equal, the two names are of one size.
    """
    if left and left[0].size == size:
        return [left.pop(0)]
    number, names = _product(size)
    found: _Axis = []
    while number != 1 or names:
        if not left:
            return None
        factor = left.pop(0)
        if isinstance(factor.size, str):
            if factor.size not in names:
                if renamed or len(names) != 1 or not factor.size.isidentifier():
                    return None
                renamed.append(factor.size)
                names = [factor.size]
            names.remove(factor.size)
        elif number and number % factor.size == 0:
            number //= factor.size
        elif number > 1 and factor.size % number == 0:
            factor.halves = _Factor(number), _Factor(factor.size // number)
            left.insert(0, factor.halves[1])
            factor, number = factor.halves[0], 1
        else:
            return None
        found.append(factor)
    return found


def _product(size: int | str) -> tuple[int, list[str]]:
    """A size as a number times names: 4*batch as 4 and [batch]. What is no such product is one name."""
    if isinstance(size, int):
        return size, []
    parts = size.replace(" ", "").split("*")
    if not all(part.isidentifier() or part.isdigit() for part in parts):
        return 1, [size]
    return math.prod(int(part) for part in parts if part.isdigit()), [part for part in parts if not part.isdigit()]


def _picked(node: Node, result: Value) -> int | None:
    """The index of the one entry of an axis that a result is; None of other nodes."""
    if node.kind == "aten.select.int":
        return int(node.attributes["index"])
    if node.kind == "onnx.Gather":
        index = node.operands[1]
        tensor = node.graph.constant(index) if index is not None and index.rank == 0 else None
        return None if tensor is None else int(tensor)
    if node.kind == "slice":
        start, end = node.attributes["start"], node.attributes["end"]
        return int(start) if end - start == 1 else None
    if node.kind in ("aten.unbind.int", "onnx.Split"):
        x = node.operands[0]
        whole = None if x is None or x.shape is None else x.shape[_axis(node)]
        return node.results.index(result) if whole == len(node.results) else None
    return None


def _axis(node: Node) -> int:
    return int(node.attributes.get("axis", node.attributes.get("dim", 0)))


_VIEWS = (
    *_RESHAPES, "transpose", "identity", "slice", "aten.select.int", "onnx.Gather", "aten.unbind.int", "onnx.Split",
)  # fmt: skip


# --- operands of attention -------------------------------------------------------------------------------------------


@dataclass
class _Columns:
    """Entries `start` to `start + width` along the last axis of a 3-D source, whose time may come first."""

    source: Value
    time_first: bool
    start: int
    width: int
    views: int = 0
    """How many views lead from the source to what is read."""

    @property
    def is_whole(self) -> bool:
        return self.source.shape is not None and self.source.shape[-1] == self.width


@dataclass
class _Operand:
    """A query, key or value (batch, heads, length, size), or with batch and heads as one axis."""

    columns: _Columns
    batch: list[int | str]
    """The sizes whose product is the batch."""
    length: list[int | str]
    heads: int
    size: int

    @property
    def is_plain(self) -> bool:
        """Whether one reshape and one transpose split the heads."""
        return self.columns.is_whole and not self.columns.time_first and self.columns.views == 2


def _traced(value: Value) -> tuple[Value, _View, int] | None:
    """The source that a value is a view of, and how many views lead there; None where sizes are not known."""
    source, chain = value, list[tuple[Node, Value]]()
    while (node := source.producer) is not None and node.kind in _VIEWS and node.operands[0] is not None:
        chain.append((node, source))
        source = node.operands[0]
    view, views = _view(source.shape), 0
    for node, result in reversed(chain):
        if view is None or not view.follow(node, result):
            source, view, views = result, _view(result.shape), 0
        else:
            views += node.kind != "identity"
    return None if view is None else (source, view, views)


def _operand(value: Value) -> _Operand | None:
    """An operand of attention as part of a 3-D value; None where it is not."""
    traced = _traced(value) if value.rank in (3, 4) else None
    if traced is None or len(traced[1].axes) != 3:
        return None
    source, view, views = traced
    first, second, last = map(_leaves, view.axes)
    *outer, length, size = map(_leaves, view.now)
    both = [leaf for axis in outer for leaf in axis]
    for batch, other, time_first in ((first, second, False), (second, first, True)):
        heads = both[len(batch) :]
        start = _start(last, [*heads, *size], view.picked)
        if other == length and both == batch + heads and outer[0] in (batch, both) and start is not None:
            count, width = (math.prod(int(leaf.size) for leaf in part) for part in (heads, size))
            columns = _Columns(source, time_first, start, count * width, views)
            return _Operand(columns, [leaf.size for leaf in batch], [leaf.size for leaf in length], count, width)
    return None


def _part(value: Value) -> _Columns | None:
    """A 3-D value as columns of one with the same two axes before; None where it is none, or all of it."""
    traced = _traced(value) if value.rank == 3 else None
    if traced is None or traced[0] == value or len(traced[1].axes) != 3:
        return None
    source, view, views = traced
    *before, last = map(_leaves, view.axes)
    *still, kept = map(_leaves, view.now)
    start = _start(last, kept, view.picked)
    if before != still or start is None:
        return None
    return _Columns(source, False, start, math.prod(int(leaf.size) for leaf in kept), views)


def _start(axis: _Axis, kept: _Axis, picked: Mapping[_Factor, int]) -> int | None:
    """The first entry of the block that is left of an axis: its last factors are `kept`, and of each factor before
    them one entry is picked. None where that is not so, or where sizes are not fixed."""
    packed = axis[: len(axis) - len(kept)]
    if axis[len(packed) :] != kept or {*packed} != {*picked} or not all(isinstance(leaf.size, int) for leaf in axis):
        return None
    number = 0
    for factor in packed:
        number = number * int(factor.size) + picked[factor]
    return number * math.prod(int(leaf.size) for leaf in kept)


@dataclass
class _Attention:
    """An attention as the graph spells it: on four axes by the op, or on three by products and a softmax."""

    node: Node
    operands: Sequence[Value]
    mask: Value | None
    scale: float | None
    causal: bool


def _found(graph: Graph) -> Iterator[_Attention]:
    for node in graph.nodes:
        if node.kind == "attention" and not node.attributes["heads"]:
            query, key, value = (node.required(name) for name in ("query", "key", "value"))
            scale, causal = node.attributes["scale"], node.attributes["causal"]
            yield _Attention(node, (query, key, value), node.operand("mask"), scale, causal)
        elif node.kind == "matmul" and (found := _spelled(graph, node)) is not None:
            yield found


def _spelled(graph: Graph, node: Node) -> _Attention | None:
    """softmax(q kᵀ · scale + mask) v on three axes, by its last product."""
    weights, value = node.required("a"), node.required("b")
    softmax = weights.producer
    if softmax is None or softmax.kind != "softmax" or weights.only_user is None or weights.rank != 3:
        return None
    if softmax.attributes["axis"] not in (-1, 2):
        return None
    scores, mask = peel_mask(softmax.input)
    if scores.shape is None or scores.shape != softmax.input.shape or (mask is not None and mask.rank not in (2, 3)):
        return None
    scores, scale = peel_scale(graph, scores)
    product = scores.producer
    if product is None or product.kind != "matmul":
        return None
    query, query_scale = peel_scale(graph, product.required("a"))
    transposed, key_scale = peel_scale(graph, product.required("b"))
    swap = transposed.producer
    if swap is None or swap.kind != "transpose" or tuple(swap.attributes["perm"]) != (0, 2, 1):
        return None
    return _Attention(node, (query, swap.input, value), mask, scale * query_scale * key_scale, False)


# --- the stage -------------------------------------------------------------------------------------------------------


def raise_heads(graph: Graph) -> dict[str, RuleLog]:
    """Put attention on 3-D operands in place of attention on heads that views split off and join.

    The graph stays as it is where one reshape and one transpose split and join the heads, where the views are not
    known, and where somebody else reads what is between.
    """
    log, swaps = RuleLog(), set[Value]()
    for attention in _found(graph):
        log.tries += 1
        try:
            log.hits += _raise(graph, attention, swaps)
        except SpellingError as error:  # of an opset without attention on three axes
            log.declined[attention.node.label] = Decline("not_spelled", reason=str(error))
    if not log.hits:
        return {}
    return {"heads": log, **rewrite(graph, _downwards(graph, swaps))}


def _raise(graph: Graph, attention: _Attention, swaps: set[Value]) -> bool:
    """Replace one attention; what swaps its result back to time first is added to `swaps`."""
    operands = [part for value in attention.operands if (part := _operand(value)) is not None]
    if len(operands) < 3:
        return False
    query, key, value = operands
    joined = _joined(attention, query, value.size)
    if joined is None or key.heads != value.heads or query.heads % key.heads or query.size != key.size:
        return False
    # Where batch and heads are one axis, attention cannot share keys among several heads.
    if attention.node.result.rank == 3 and query.heads != key.heads:
        return False
    if not (_equal(query.batch, key.batch) and _equal(key.batch, value.batch) and _equal(key.length, value.length)):
        return False
    end, time_first, views = joined
    plain = attention.node.kind == "attention" and all(part.is_plain for part in operands)
    if plain and not time_first and views == 2:
        return False
    op = Builder(graph, attention.node, {})
    mask = attention.mask
    if mask is not None:
        mask = _mask(op, mask, attention, query.heads)
        if mask is None:
            return False
    y = op.attention(
        *(_projected(op, part.columns) for part in operands), mask, scale=attention.scale, causal=attention.causal,
        heads=query.heads, kv_heads=key.heads,
    )  # fmt: skip
    if time_first:
        y = op.transpose(y, perm=_SWAP)
        swaps.add(y)
    graph.replace(end, y)
    return True


def _equal(sizes: list[int | str], others: list[int | str]) -> bool:
    """Whether products of sizes are equal; two with names are taken as equal, as attention does not repeat a batch."""
    if not all(isinstance(size, int) for size in (*sizes, *others)):
        return bool(sizes) == bool(others)
    return math.prod(map(int, sizes)) == math.prod(map(int, others))


def _joined(attention: _Attention, query: _Operand, size: int) -> tuple[Node, bool, int] | None:
    """The node that joins the heads to (batch, length, heads · size), whether it puts time first, and how many views
    lead there."""
    batch, length = ([_Factor(size) for size in sizes] for sizes in (query.batch, query.length))
    heads, inner = ([] if number == 1 else [_Factor(number)] for number in (query.heads, size))
    value, steps = attention.node.result, 0
    view = _View([], [[*batch, *heads], length, inner] if value.rank == 3 else [batch, heads, length, inner])
    while (node := value.only_user) is not None and node.kind in _VIEWS and view.follow(node, node.result):
        value, steps = node.result, steps + (node.kind != "identity")
        if value.rank == 3 and _leaves(view.now[2]) == [*heads, *inner]:
            first, second = _leaves(view.now[0]), _leaves(view.now[1])
            if (first, second) in ((batch, length), (length, batch)):
                return node, first != batch, steps
    return None


def _projected(op: Builder, part: _Columns) -> Value:
    """Columns (batch, length, width): by the rows of a stored weight that make them, where a linear does."""
    source, end = part.source, part.start + part.width
    if part.is_whole and not part.time_first:
        return source
    whole = _part(source)
    if whole is not None:
        return _projected(op, _Columns(whole.source, part.time_first, whole.start + part.start, part.width))
    node = source.producer
    if node is not None and node.kind == "concat" and node.attributes["axis"] % 3 == int(not part.time_first):
        values = [_Columns(one, part.time_first, part.start, part.width) for one in node.operands if one is not None]
        return op.concat(*(_projected(op, one) for one in values), axis=1)
    if node is None or node.kind != "linear" or node.weight is None or source.only_user is None:
        value = source if part.is_whole else op.slice(source, axis=2, start=part.start, end=end)
        return _swapped(op, value) if part.time_first else value
    weight, bias = node.required("weight"), node.bias
    if not part.is_whole:
        weight = op.graph.add_constant(node.weight[part.start : end], weight.name)
        tensor = None if bias is None else op.graph.constant(bias)
        if bias is not None:
            rows = slice(part.start, end)
            bias = op.slice(bias, axis=0, start=part.start, end=end) if tensor is None else op.constant(tensor[rows])
    if part.time_first:
        return op.linear(_swapped(op, node.input), weight, bias)
    return op.graph.emit("linear", node.input, weight, bias, at=node)  # under its module path


def _swapped(op: Builder, value: Value, at: Node | None = None) -> Value:
    """A 3-D value with its first two axes swapped, once for all who read it at a node; behind a norm, before it.

    at: where to emit it, in place of the builder's node.
    """
    node = value.producer
    if node is not None and _is_swap(node):
        return node.input
    if node is not None and _is_norm_of_width(node) and value.only_user is not None:
        x, *given = node.operands
        assert x is not None
        return op.once(("swapped", value), lambda: op.graph.emit(node, _swapped(op, x, node), *given, at=node))
    place = op.at if at is None else at
    return op.once(("swapped", value), lambda: op.graph.emit("transpose", value, at=place, perm=_SWAP))


# --- masks -----------------------------------------------------------------------------------------------------------


def _mask(op: Builder, mask: Value, attention: _Attention, heads: int) -> Value | None:
    """A mask over (batch, heads, queries, keys) that repeats nothing; None where batch and heads stay one axis."""
    if mask.rank == 3 and attention.node.kind != "attention":
        return _apart(op, mask, heads)
    node = _maker(mask)
    merged = node.operands[0] if node is not None and node.kind in _RESHAPES else None
    if merged is None or merged.rank != 3 or mask.rank != 4:
        return _unrepeated(mask)
    apart = _apart(op, merged, heads)
    return _unrepeated(mask) if apart is None else apart


def _maker(value: Value) -> Node | None:
    """The node that makes a value, behind those that only copy it."""
    node = value.producer
    while node is not None and node.kind == "identity":
        node = node.input.producer
    return node


def _apart(op: Builder, mask: Value, heads: int) -> Value | None:
    """A mask over (batch · heads, queries, keys) on four axes, by what it was made of; None where that is not known, or
    is no (batch, heads, queries, keys)."""
    node, shape = _maker(mask), mask.shape
    if shape is None or len(shape) != 3:
        return None
    if shape[0] == 1:
        return op.unsqueeze(mask, axes=(0,))
    if node is None:
        return None
    if node.kind == "add":
        a, b = (_apart(op, node.required(name), heads) for name in ("a", "b"))
        return None if a is None or b is None else op.add(a, b)
    whole = node.operands[0] if node.kind in _RESHAPES else None
    if whole is None or whole.shape is None or whole.shape[1:] != (heads, *shape[1:]):
        return None
    return _unrepeated(whole)


def _unrepeated(mask: Value) -> Value:
    """A mask before it is repeated for each head."""
    node = _maker(mask)
    x = node.operands[0] if node is not None and node.kind in ("onnx.Expand", "aten.expand.default") else None
    if x is None or x.shape is None or mask.shape is None or len(x.shape) != 4 or len(mask.shape) != 4:
        return mask
    same = [a == b != "?" for a, b in zip(x.shape, mask.shape, strict=True)]
    return x if same[0] and same[2] and same[3] and x.shape[1] == 1 else mask


# --- swaps of batch and length go down, until they meet another ------------------------------------------------------


def _downwards(graph: Graph, swaps: set[Value]) -> list[Rule]:
    """Rules that move the swaps behind what reads them: modules that put time first then do so once, at the end.

    swaps: the results of those to move; what the rules make of them is added.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    others: dict[Value, Node] = {}
    for node in graph.nodes:
        if _is_swap(node):
            others.setdefault(node.input, node)

    def swap(op: Builder, value: Value) -> Value:
        result = op.transpose(value, perm=_SWAP)
        swaps.add(result)
        return result

    def after(kind: str, parameters: int = 0) -> Rule:
        """op(swap(x), ...)  ->  swap(op(x, ...)), of an op that computes each position by itself."""

        def pattern(op: Recorder, x: str, weight: str | None = None, bias: str | None = None) -> Pattern:
            swapped = op.transpose(x, perm=_SWAP, bind="swap")
            return Pattern(kind, (swapped, *("weight", "bias")[:parameters]), {})

        def replace(op: Builder, m: Match) -> Value:
            _, *given = m.root.operands
            return swap(op, op.graph.emit(m.root, m.x, *given, at=m.root))

        return Rule(f"swap-after-{kind.replace('_', '-')}", pattern, replace, shared=True, check=is_by_position)

    def is_ours(m: Match) -> bool:
        return m.swap.result in swaps

    def is_by_position(m: Match) -> bool:
        return is_ours(m) and (m.root.kind not in _NORMS or _is_norm_of_width(m.root))

    def add_swapped(op: Builder, m: Match) -> Value | None:
        """x + y, where the graph has swapped y before."""
        node = m.y.producer
        if node is not None and _is_swap(node):
            return swap(op, op.add(m.x, node.input))
        other = others.get(m.y)
        if other is None or order[other] > order.get(m.root, -1):
            return None
        return swap(op, op.add(m.x, other.result))

    return [
        Rule("swap-twice", _twice, lambda op, m: m.x, shared=True, check=is_ours),
        after("linear", 2),
        after("layer_norm", 2),
        after("rms_norm", 1),
        *(after(kind) for kind in ("identity", "relu", "gelu", "silu", "tanh", "sigmoid")),
        Rule("swap-after-sum", _sum, add_swapped, shared=True, check=is_ours),
    ]


def _is_norm_of_width(node: Node) -> bool:
    """Whether a norm is over the last axis alone."""
    return node.kind in _NORMS and node.required("weight").rank == 1


def _is_swap(node: Node) -> bool:
    return node.kind == "transpose" and tuple(node.attributes["perm"]) == _SWAP


def _twice(op: Recorder, x: str) -> Pattern:
    return op.transpose(op.transpose(x, perm=_SWAP, bind="swap"), perm=_SWAP)


def _sum(op: Recorder, x: str, y: str) -> Pattern:
    return op.add(op.transpose(x, perm=_SWAP, bind="swap"), y)


STAGE = Stage("heads", raise_heads)
"""To be run after attention is raised, and linears read 3-D values."""
