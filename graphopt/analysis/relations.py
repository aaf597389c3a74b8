"""How the axes of an operation's operands and results relate: one line an operation, in RELATIONS at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from graphopt.analysis.facts import Facts, Fold, Numbers, Op, Unclear
from graphopt.ir.graph import Graph, Node, Shape, Value


def relate(graph: Graph) -> Facts:
    """What the relations say of a whole graph. Linear in the number of positions that its axes have."""
    facts = Facts(fed=set(graph.inputs))
    for value in graph.inputs:
        facts.lock(value, f"is the model's input '{value.name}'")
    for value in graph.outputs:
        facts.lock(value, f"is the model's output '{value.name}'")
    nodes = graph.nodes
    known = {*graph.inputs, *(result for node in nodes for result in node.results)}
    holders = [node for node in nodes if node.signature is None]
    for node in nodes:
        if not facts.fed.isdisjoint(node.operands):
            facts.fed.update(node.results)
        op = Op(facts, node)
        relation = RELATIONS.get(op.kind, _not_known)
        try:
            if not all(value.is_constant or value in known or value.rank == 1 for value in op.given):
                raise Unclear("which reads a view of another value")
            relation(op)
        except Unclear as reason:
            for value in (*op.given, *op.results):
                facts.lock(value, f"reaches {op.where}, {reason}")
            continue
        op.lock_rest()
    for node in holders:
        _lock_captured(facts, node, known)
    return facts


def _lock_captured(facts: Facts, node: Node, known: Iterable[Value]) -> None:
    """Lock what the subgraphs of a node read from around it, which are no operands."""
    operands = set(node.operands)
    for value in known:
        if value not in operands and node in value.users:
            facts.lock(value, f"is read inside {node.kind} ({node.label})")


Relation = Callable[[Op], None]


def _not_known(op: Op) -> None:
    raise Unclear("which is not known")


# --- where nothing moves -------------------------------------------------------------------------------------------


def elementwise(op: Op) -> None:
    for y in op.results:
        op.free(y)
        for value in op.given:
            op.aligned(value, y)


def free(op: Op) -> None:
    """Reads a size or a range, whatever the positions are."""
    op.free(*op.given, *op.results)


def softmax(op: Op) -> None:
    op.aligned(op.x, op.y)
    op.lock(op.x, op.axis("axis", "dim", default=-1), "is normalized by")


def along(op: Op) -> None:
    """Softmax as it was before opset 13: over an axis and all behind it."""
    op.aligned(op.x, op.y)
    for axis in range(op.axis("axis", "dim", default=1), op.rank(op.x)):
        op.lock(op.x, axis, "is mixed by")


def cumulative(op: Op) -> None:
    """Sums along one axis, which is an attribute in aten and an operand in ONNX."""
    axis = [op.attributes["dim"]] if "dim" in op.attributes else op.constant(1)
    if axis is None:
        raise Unclear("along an axis that is computed")
    op.free(*op.given[1:])
    op.aligned(op.x, op.y)
    op.lock(op.x, axis[0], "is summed up along by")


def quantized(op: Op) -> None:
    if op.attributes.get("block"):
        raise Unclear("in blocks")
    op.aligned(op.x, op.y)
    for parameter in op.given[1:]:
        if op.rank(parameter) == 1 and op.attributes["axis"] is not None:
            op.same(parameter, 0, op.y, op.attributes["axis"])


# --- products ------------------------------------------------------------------------------------------------------


def _site(op: Op, weight: Value, out: int, into: int | None) -> None:
    """The node is a site with a weight whose output and input axes are these; by a computed one, a plain product."""
    if weight in op.facts.fed:
        if into is not None:
            _reduces(op, weight, into)
        return
    rows = op.at(weight, out)
    if rows is not None:
        op.facts.producers.append((op.node, rows))
    columns = op.at(weight, into) if into is not None else None
    if columns is not None:
        op.facts.consumers.append((op.node, columns))


def linear(op: Op) -> None:
    x, weight, y = op.given[0], op.given[1], op.y
    op.same(x, -1, weight, 1)
    op.same(weight, 0, y, -1)
    for bias in op.given[2:]:
        op.same(bias, -1, y, -1)
    op.aligned(x, y, skip=[op.rank(y) - 1])
    _site(op, weight, 0, 1)


def embedding(op: Op) -> None:
    table, ids = op.given
    op.same(table, 1, op.y, -1)
    op.lock(table, 0, "is looked up by index in")
    for axis in range(op.rank(ids)):
        op.same(ids, axis, op.y, axis)
    _site(op, table, 1, None)


def conv(op: Op, transposed: bool = False) -> None:
    """Weight (out, in / groups, ...), transposed (in, out / groups, ...)."""
    x, weight, y = op.given[0], op.given[1], op.y
    groups = int(op.attributes.get("groups", op.attributes.get("group", 1)))
    out, into = (1, 0) if transposed else (0, 1)
    if op.rank(x) != op.rank(weight) or op.attributes.get("transposed", transposed) != transposed:
        raise Unclear("in a form that is not known")
    rows, columns, before, after = op.at(weight, out), op.at(weight, into), op.at(x, 1), op.at(y, 1)
    if rows is None or columns is None or before is None or after is None:
        raise Unclear("where the number of channels is not known")
    op.same(x, 0, y, 0)
    for value in (x, weight, y):
        for axis in range(2, op.rank(value)):
            op.lock(value, axis, "is a space axis of")
    if groups == 1:
        op.link(before, columns)
        op.link(after, rows)
    else:
        if transposed:
            raise Unclear("in groups")
        op.link(after, rows)
        first = after.reshape(groups, -1)[:, :1]  # a group goes whole, with the channels that it reads
        op.link(*np.broadcast_arrays(first, after.reshape(groups, -1)))
        op.link(*np.broadcast_arrays(first, before.reshape(groups, -1)))
        if len(columns) > 1:
            op.lock(weight, into, "is inside a group of")
    for bias in op.given[2:]:
        op.same(bias, 0, y, 1)
    _site(op, weight, out, into if groups == 1 else None)


def conv_transpose(op: Op) -> None:
    conv(op, transposed=True)


def matmul(op: Op) -> None:
    _product(op, op.given[0], op.given[1], (-2, -1), (-2, -1))


def gemm(op: Op) -> None:
    """ONNX's, with either factor transposed, and a third operand that is added."""
    a, b, *added = op.given
    left = (-1, -2) if op.attributes.get("transA", 0) else (-2, -1)
    _product(op, a, b, left, (-1, -2) if op.attributes.get("transB", 0) else (-2, -1))
    for value in added:
        op.aligned(value, op.y)


def addmm(op: Op) -> None:
    """aten's, which is given what is added first."""
    _product(op, op.given[1], op.given[2], (-2, -1), (-2, -1))
    op.aligned(op.given[0], op.y)


def _product(op: Op, a: Value, b: Value, left: tuple[int, int], right: tuple[int, int]) -> None:
    """(m, k) of a by (k, n) of b, their axes from the end; those before are broadcast.

    Where both are computed, no weight can be zeroed for what goes of k: a sum over fewer is another sum.
    """
    y, rank = op.y, op.rank(op.y)
    if op.rank(a) < 2 or op.rank(b) < 2:
        raise Unclear("of a vector")
    if op.facts.fed.issuperset((a, b)):
        _reduces(op, a, left[1])
    op.same(a, left[1], b, right[0])
    op.same(a, left[0], y, -2)
    op.same(b, right[1], y, -1)
    for value in (a, b):
        op.aligned(value, y, skip=[rank - 2, rank - 1])


def attention(op: Op) -> None:
    query, key, value, *mask = op.given
    heads = int(op.attributes["heads"])
    axis = -1 if heads else 1  # of the heads: 3-D (batch, length, heads · size), or 4-D
    parts = [op.at(part, axis) for part in (query, key, value, op.y)]
    found = [part for part in parts if part is not None]
    if len(found) < 4:
        raise Unclear("where the number of heads is not known")
    groups = int(op.attributes["kv_heads"] or heads) if heads else len(found[1])
    units = [part.reshape(groups, -1) for part in found]  # with grouped queries a key head goes with its queries
    for numbers in units:
        op.link(*np.broadcast_arrays(units[0][:, :1], numbers))
    op.facts.heads += found
    for part in (query, key, value, op.y):
        op.same(part, 0, op.y, 0)
        for inner in range(1, op.rank(part)):
            if inner != axis % op.rank(part):
                op.lock(part, inner, "is a length or the size of a head of")
    for part in mask:
        _attention_mask(op, part, heads or len(found[0]), units[0])


def _attention_mask(op: Op, mask: Value, heads: int, units: Numbers) -> None:
    op.free(mask)
    rank = op.rank(mask)
    for axis in range(rank):
        numbers = op.at(mask, axis)
        if axis == rank - 4:
            op.same(mask, axis, op.y, 0)
        elif axis == rank - 3 and numbers is not None and len(numbers) == heads > 1:
            op.link(*np.broadcast_arrays(units[:, :1], numbers.reshape(len(units), -1)))
        else:
            op.lock(mask, axis, "is a length of the mask of")


# --- norms and reductions ------------------------------------------------------------------------------------------


def norm(op: Op) -> None:
    """Over the trailing axes that the weight spans."""
    elementwise(op)
    for axis in range(1, op.rank(op.given[1]) + 1):
        _reduces(op, op.x, -axis)


def plain_norm(op: Op) -> None:
    """aten's layer norm without a weight, over as many trailing axes as it is told sizes of."""
    elementwise(op)
    for axis in range(1, len(op.attributes["normalized_shape"]) + 1):
        _reduces(op, op.x, -axis)


def _reduces(op: Op, value: Value, axis: int) -> None:
    numbers = op.at(value, axis)
    if numbers is not None:
        op.facts.reduced.append((op.node, numbers))


def per_channel(op: Op) -> None:
    """x (N, C, ...) with parameters (C,): batch and instance norm, aten's prelu."""
    op.aligned(op.x, op.y)
    for parameter in op.given[1:]:
        op.same(parameter, -1, op.y, 1)


def group_norm(op: Op) -> None:
    """A group goes whole; parameters are (C,), or (groups,) before opset 21."""
    op.aligned(op.x, op.y)
    channels = op.at(op.y, 1)
    if channels is None:
        raise Unclear("where the number of channels is not known")
    groups = channels.reshape(int(op.attributes["num_groups"]), -1)
    op.link(*np.broadcast_arrays(groups[:, :1], groups))
    for parameter in op.given[1:]:
        numbers = op.at(parameter, 0)
        if numbers is not None:
            op.link(numbers, channels if len(numbers) == len(channels) else groups[:, 0])


def reduce(op: Op) -> None:
    """Mean, sum, maximum, ... over axes. What is left of an axis is still a mean, of fewer entries."""
    axes = _reduced_axes(op)
    keep = bool(op.attributes.get("keepdim", op.attributes.get("keepdims", op.node.kind.startswith("onnx."))))
    kept = 0
    for axis in range(op.rank(op.x)):
        if axis in axes:
            _reduces(op, op.x, axis)
            if keep:
                op.at(op.y, kept)
        else:
            op.same(op.x, axis, op.y, kept)
        kept += keep or axis not in axes
    for value in op.given[1:]:
        op.free(value)


def _reduced_axes(op: Op) -> set[int]:
    found = next((op.attributes[name] for name in ("axes", "dim") if name in op.attributes), None)
    if found is None and len(op.given) > 1:
        found = op.constant(1)
        if found is None:
            raise Unclear("over axes that are computed")
    rank = op.rank(op.x)
    if not found and found != 0:
        return set() if op.attributes.get("noop_with_empty_axes") else set(range(rank))
    return {axis % rank for axis in ([found] if isinstance(found, int) else found)}


def pool(op: Op) -> None:
    """Over space: (N, C) stay apart."""
    for y in op.results:
        for axis in range(min(2, op.rank(y))):
            op.same(op.x, axis, y, axis)
    for value in (op.x, *op.results):
        for axis in range(2, op.rank(value)):
            op.lock(value, axis, "is a space axis of")


def resize(op: Op) -> None:
    pool(op)
    for value in op.given[1:]:
        op.free(value)


# --- moving positions ----------------------------------------------------------------------------------------------


def transpose(op: Op) -> None:
    for axis, source in enumerate(op.attributes["perm"]):
        op.same(op.x, source, op.y, axis)


def _taken(op: Op, y: Value, axis: int, numbers: Numbers | None) -> None:
    """y is x with these of its positions along an axis."""
    op.at(op.x, axis)
    found = op.at(y, axis)
    if numbers is not None and found is not None and len(numbers) == len(found):
        op.link(numbers, found)
    else:
        op.lock(op.x, axis, "is taken in part by")
        op.lock(y, axis, "is taken in part by")
    op.aligned(op.x, y, skip=[axis])


def take_slice(op: Op) -> None:
    axis = op.axis("axis")
    numbers = op.at(op.x, axis)
    _taken(op, op.y, axis, None if numbers is None else numbers[op.attributes["start"] : op.attributes["end"]])


def onnx_slice(op: Op) -> None:
    """Along several axes. One with steps, or with bounds that are computed, stays."""
    bounds = slice_bounds(op)
    for axis in range(op.rank(op.x)):
        numbers = op.at(op.x, axis)
        if axis not in bounds:
            op.same(op.x, axis, op.y, axis)
        elif numbers is not None and bounds[axis].step in (None, 1):
            found = op.at(op.y, axis)
            if found is None:
                raise Unclear("whose size is not known")
            op.link(numbers[bounds[axis]], found)
        else:
            op.lock(op.x, axis, "is taken in steps by")
            op.lock(op.y, axis, "is taken in steps by")
    op.free(*op.given[1:])


def slice_bounds(op: Op) -> dict[int, slice]:
    """The slice along each axis that an ONNX Slice names. Raises Unclear where they are computed."""
    if "starts" in op.attributes:  # before opset 10
        starts, ends = op.attributes["starts"], op.attributes["ends"]
        axes, steps = op.attributes.get("axes"), None
    else:
        starts, ends, axes, steps = (op.constant(index) for index in range(1, 5))
        absent = [op.operand(index) is None for index in (3, 4)]
        if starts is None or ends is None or (axes is None and not absent[0]) or (steps is None and not absent[1]):
            raise Unclear("whose bounds are computed")
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    rank = op.rank(op.x)
    return {axis % rank: slice(*bounds) for axis, *bounds in zip(axes, starts, ends, steps, strict=True)}


def aten_slice(op: Op) -> None:
    """What is no op: steps, or bounds that are computed. Other axes pass."""
    axis = op.axis("dim")
    op.lock(op.x, axis, "is taken in steps by")
    op.lock(op.y, axis, "is taken in steps by")
    op.aligned(op.x, op.y, skip=[axis])


def split(op: Op) -> None:
    axis = op.axis("axis", "dim")
    numbers, start = op.at(op.x, axis), 0
    for y in op.results:
        size = op.shape(y)[axis]
        if not isinstance(size, int):
            raise Unclear("into parts whose size is not known")
        _taken(op, y, axis, None if numbers is None else numbers[start : start + size])
        start += size
    op.free(*op.given[1:])


def to_sequence(op: Op) -> None:
    """ONNX's SplitToSequence: what reads an item relates it to x."""
    op.free(*op.given, *op.results)
    if any(user.kind != "onnx.SequenceAt" for user in op.y.users):
        raise Unclear("whose parts are not read one by one")


def sequence_item(op: Op) -> None:
    source = op.x.producer
    whole = None if source is None else Op(op.facts, source)
    part = None if whole is None else sequence_slice(op, whole)
    if whole is None or part is None:
        raise Unclear("which reads a sequence that is not split in a known way")
    op.free(*op.given)
    numbers, found = op.at(whole.x, part[0]), op.at(op.y, part[0])
    if numbers is None or found is None:
        raise Unclear("whose size is not known")
    op.link(numbers[part[1]], found)
    op.aligned(whole.x, op.y, skip=[part[0]])


def sequence_slice(op: Op, whole: Op) -> tuple[int, slice] | None:
    """The axis and the slice along it that an item of a SplitToSequence is; None where that is not known."""
    index = op.constant(1)
    if whole.kind != "onnx.SplitToSequence" or index is None or whole.attributes.get("keepdims", 1) != 1:
        return None
    axis = whole.axis("axis")
    size, parts = whole.shape(whole.x)[axis], whole.constant(1)
    if not isinstance(size, int) or parts is None:
        return None
    if len(parts) == 1:
        parts = [min(parts[0], size - start) for start in range(0, size, parts[0])]
    start = sum(parts[: index[0] % len(parts)])
    return axis, slice(start, start + parts[index[0] % len(parts)])


def concat(op: Op) -> None:
    axis = op.axis("axis", "dim")
    whole, start = op.at(op.y, axis), 0
    for value in op.given:
        op.aligned(value, op.y, skip=[axis])
        numbers = op.at(value, axis)
        if numbers is None or whole is None:
            op.lock(value, axis, "is joined to an axis of unknown size by")
            op.lock(op.y, axis, "is joined to an axis of unknown size by")
            whole = None
        else:
            op.link(numbers, whole[start : start + len(numbers)])
            start += len(numbers)


def gather(op: Op) -> None:
    """By a constant index the positions are followed; by any other the axis stays."""
    axis = op.axis("axis", "dim")
    index, indices = gather_index(op)
    picked = int(isinstance(index, list))
    numbers = op.at(op.x, axis)
    if isinstance(index, int) and numbers is not None:
        op.facts.locks.append((numbers[[index]], f"is picked by index by {op.where}"))
    elif isinstance(index, list) and numbers is not None and op.at(op.y, axis) is not None:
        op.link(numbers[index], np.asarray(op.at(op.y, axis)))
    else:
        op.lock(op.x, axis, "is looked up by index in")
        picked = op.rank(op.y) - op.rank(op.x) + 1
    for before in range(axis):
        op.same(op.x, before, op.y, before)
    for after in range(axis + 1, op.rank(op.x)):
        op.same(op.x, after, op.y, after - 1 + picked)
    if indices is not None and index is None:
        for inner in range(picked):
            op.same(indices, inner, op.y, axis + inner)
    elif indices is not None:
        op.free(indices)


def gather_index(op: Op) -> tuple[int | list[int] | None, Value | None]:
    """A constant index, a number or a list, else None; and the operand that it is, where it is one."""
    if "index" in op.attributes:  # aten.select.int
        return int(op.attributes["index"]), None
    indices = op.operand(1)
    found = op.constant(1) if indices is not None and op.rank(indices) < 2 else None
    if found is None or indices is None:
        return None, indices
    return found if op.rank(indices) == 1 else found[0], indices


def unbind(op: Op) -> None:
    axis = op.axis("axis", "dim")
    op.lock(op.x, axis, "is taken apart by")
    for y in op.results:
        for other in range(op.rank(y)):
            op.same(op.x, other + (other >= axis), y, other)


def stack(op: Op) -> None:
    axis = int(op.attributes.get("dim", 0)) % op.rank(op.y)
    for value in op.given:
        for other in range(op.rank(value)):
            op.same(value, other, op.y, other + (other >= axis))
    op.lock(op.y, axis, "is made by")


def pad(op: Op) -> None:
    sides, mode = padding(op), op.attributes.get("mode", "constant")
    op.free(*op.given[1:])
    for axis in range(op.rank(op.x)):
        begin, end = sides.get(axis, (0, 0))
        numbers, found = op.at(op.x, axis), op.at(op.y, axis)
        if begin == end == 0:
            op.same(op.x, axis, op.y, axis)
        elif numbers is None or found is None or min(begin, end) < 0 or mode != "constant":
            op.lock(op.x, axis, "is padded by")
            op.lock(op.y, axis, "is padded by")
        else:
            op.link(numbers, found[begin : begin + len(numbers)])


def padding(op: Op) -> dict[int, tuple[int, int]]:
    """How much goes before and behind each axis that is padded. Raises Unclear where it is computed."""
    rank = op.rank(op.x)
    if "pad" in op.attributes:  # aten: from the last axis
        flat = list(op.attributes["pad"])
        return {rank - 1 - i: (int(flat[2 * i]), int(flat[2 * i + 1])) for i in range(len(flat) // 2)}
    flat = op.attributes.get("padding", op.attributes.get("pads", op.constant(1)))
    axes = op.constant(3) if op.operand(3) is not None else None
    if flat is None or (op.operand(3) is not None and axes is None):
        raise Unclear("by an amount that is computed")
    count = len(flat) // 2
    axes = [axis % rank for axis in axes] if axes is not None else list(range(rank - count, rank))
    return {axis: (int(flat[i]), int(flat[i + count])) for i, axis in enumerate(axes)}


def expand(op: Op) -> None:
    """An axis of 1 becomes any, and relates to nothing."""
    op.free(op.y, *op.given[1:])
    op.aligned(op.x, op.y)


def repeat(op: Op) -> None:
    """ONNX's Tile, aten's repeat: axes that are repeated stay."""
    op.free(*op.given[1:])
    offset = op.rank(op.y) - op.rank(op.x)
    for axis in range(op.rank(op.y)):
        old = op.shape(op.x)[axis - offset] if axis >= offset else 1
        if axis >= offset and old == op.shape(op.y)[axis]:
            op.same(op.x, axis - offset, op.y, axis)
        else:
            op.lock(op.y, axis, "is repeated by")
            if axis >= offset:
                op.lock(op.x, axis - offset, "is repeated by")


def interleave(op: Op) -> None:
    """aten's repeat_interleave: each position `repeats` times in a row. Key heads are, for queries in groups."""
    axis, repeats = op.attributes.get("dim"), int(op.attributes["repeats"])
    if axis is None or op.attributes.get("output_size") is not None:
        raise Unclear("in a form that is not known")
    numbers, found = op.at(op.x, axis), op.at(op.y, axis)
    if numbers is not None and found is not None:
        op.link(numbers.repeat(repeats), found)
    else:
        op.lock(op.x, axis, "is repeated by")
    op.aligned(op.x, op.y, skip=[axis % op.rank(op.y)])


def glu(op: Op) -> None:
    """The first half of an axis, gated by the second."""
    axis = op.axis("dim", default=-1)
    numbers, found = op.at(op.x, axis), op.at(op.y, axis)
    if numbers is None or found is None:
        raise Unclear("where the size of the halves is not known")
    op.link(*np.broadcast_arrays(numbers.reshape(2, -1), found))
    op.aligned(op.x, op.y, skip=[axis])


def roll(op: Op) -> None:
    op.aligned(op.x, op.y)
    for axis in op.attributes.get("dims", range(op.rank(op.x))):
        op.lock(op.x, axis, "is rolled by")


def depth_to_space(op: Op) -> None:
    """Channels (C, r²), or (r², C) in ONNX's default mode, become C."""
    _depth(op, op.x, op.y, op.attributes.get("mode", "DCR") == "DCR" and op.kind.startswith("onnx."))


def space_to_depth(op: Op) -> None:
    _depth(op, op.y, op.x, op.kind.startswith("onnx."))


def _depth(op: Op, deep: Value, wide: Value, blocks_first: bool) -> None:
    many, few = op.at(deep, 1), op.at(wide, 1)
    if many is None or few is None:
        raise Unclear("where the number of channels is not known")
    numbers = many.reshape(-1, len(few)).T if blocks_first else many.reshape(len(few), -1)
    op.link(*np.broadcast_arrays(few[:, None], numbers))
    op.same(deep, 0, wide, 0)
    for value in (deep, wide):
        for axis in range(2, op.rank(value)):
            op.lock(value, axis, "is a space axis of")


# --- reshapes ------------------------------------------------------------------------------------------------------


def reshape(op: Op) -> None:
    """Axes that stay, and blocks of axes that are split or merged, whatever operation does it."""
    x, y = op.x, op.y
    op.free(*op.given, y)
    for left, right in blocks(op.shape(x), op.shape(y)):
        if len(left) == len(right) == 1:
            op.same(x, left[0], y, right[0])
            continue
        sides = [[op.at(value, axis) for axis in part] for value, part in ((x, left), (y, right))]
        found = [[numbers for numbers in side if numbers is not None] for side in sides]
        reason = f"is split or merged by {op.where}"
        if all(sides) and [*map(len, sides)] == [*map(len, found)]:
            op.facts.folds.append(Fold(found[0], found[1], reason))
        else:
            op.facts.locks += [(numbers, reason) for side in found for numbers in side]


def blocks(left: Shape, right: Shape) -> Iterator[tuple[list[int], list[int]]]:
    """The axes of two shapes of one size that hold the same entries in the same order, as small as can be told.

    First from the end, as far as sizes are numbers, then from the front, where equal names are equal sizes; what is
    between them is one block.
    """
    i, j = len(left), len(right)
    while block := _block(left[:i][::-1], right[:j][::-1]):
        yield list(range(i - block[0], i)), list(range(j - block[1], j))
        i, j = i - block[0], j - block[1]
    a = b = 0
    while block := _block(left[a:i], right[b:j]) or _equal_names(left[a:i], right[b:j]):
        yield list(range(a, a + block[0])), list(range(b, b + block[1]))
        a, b = a + block[0], b + block[1]
    if a < i or b < j:
        yield list(range(a, i)), list(range(b, j))


def _block(left: Shape, right: Shape) -> tuple[int, int] | None:
    """How many leading axes of either have the same product, the fewest; None without any that are numbers."""
    counts, products = [0, 0], [1, 1]
    while 0 in counts or products[0] != products[1]:
        side = counts.index(0) if 0 in counts else int(products[1] < products[0])
        shape = (left, right)[side]
        size = shape[counts[side]] if counts[side] < len(shape) else None
        if not isinstance(size, int):
            return None
        products[side] *= size
        counts[side] += 1
    return counts[0], counts[1]


def _equal_names(left: Shape, right: Shape) -> tuple[int, int] | None:
    """(1, 1) where both begin with the same dynamic axis: by its name, or as the only one of unknown size."""
    if not left or not right or isinstance(left[0], int) or isinstance(right[0], int):
        return None
    if left[0] == right[0] != "?":
        return 1, 1
    products = [math.prod(size for size in shape if isinstance(size, int)) for shape in (left, right)]
    dynamic = [sum(not isinstance(size, int) for size in shape) for shape in (left, right)]
    return (1, 1) if dynamic == [1, 1] and products[0] == products[1] else None


# --- the table -----------------------------------------------------------------------------------------------------


def _named(relation: Relation, kinds: str, prefix: str = "") -> dict[str, Relation]:
    return {prefix + kind: relation for kind in kinds.split()}


_OPS = (
    _named(elementwise, "gelu silu relu add mul sub div pow sqrt rsqrt reciprocal exp erf tanh sigmoid isnan where")
    | _named(elementwise, "identity cast clip leaky_relu hard_sigmoid hard_swish")
    | _named(norm, "layer_norm rms_norm")
    | _named(quantized, "quantize dequantize")
    | _named(pool, "max_pool average_pool")
    | _named(reshape, "reshape squeeze unsqueeze")
    | {
        "linear": linear, "conv": conv, "matmul": matmul, "attention": attention, "embedding": embedding,
        "batch_norm": per_channel, "softmax": softmax, "mean": reduce, "choose_qparams": free, "row_scale": free,
        "transpose": transpose, "slice": take_slice, "concat": concat, "pad": pad,
    }
)  # fmt: skip

_ONNX = (
    _named(elementwise, "Abs Neg Sign Floor Ceil Round Log Sin Cos Tan Atan Not Softplus Softsign Elu Selu Celu Mish")
    | _named(elementwise, "Clip LeakyRelu PRelu HardSigmoid HardSwish ThresholdedRelu Gelu Dropout Max Min Sum Mean")
    | _named(elementwise, "And Or Xor Mod Equal Greater Less GreaterOrEqual LessOrEqual Swish Sigmoid Relu Identity")
    | _named(reduce, "ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceSumSquare ReduceProd")
    | _named(pool, "MaxPool AveragePool LpPool GlobalMaxPool GlobalAveragePool")
    | _named(along, "Softmax LogSoftmax Hardmax")
    | _named(reshape, "Reshape Flatten Squeeze Unsqueeze")
    | _named(free, "Shape Size")
    | {
        "Conv": conv, "ConvTranspose": conv_transpose, "Gemm": gemm, "BatchNormalization": per_channel,
        "InstanceNormalization": per_channel, "GroupNormalization": group_norm, "Resize": resize, "Upsample": resize,
        "Slice": onnx_slice, "Split": split, "SplitToSequence": to_sequence, "SequenceAt": sequence_item,
        "Concat": concat, "Gather": gather, "Pad": pad, "Expand": expand, "Tile": repeat,
        "DepthToSpace": depth_to_space, "SpaceToDepth": space_to_depth, "CumSum": cumulative,
    }
)  # fmt: skip

_ATEN = (
    _named(elementwise, "abs neg sign floor ceil round log log1p expm1 sin cos tan atan logical_not bitwise_not elu")
    | _named(elementwise, "clamp clamp_min clamp_max hardtanh hardswish hardsigmoid leaky_relu relu6 softplus mish")
    | _named(elementwise, "maximum minimum logical_and logical_or zeros_like ones_like full_like native_dropout")
    | _named(reduce, "amax amin any")
    | _named(pool, "max_pool2d avg_pool2d max_pool2d_with_indices adaptive_avg_pool1d adaptive_avg_pool2d")
    | _named(pool, "_adaptive_avg_pool2d avg_pool1d max_pool1d adaptive_max_pool2d")
    | _named(reshape, "view _unsafe_view reshape unsqueeze squeeze")
    | {"cat": concat, "stack": stack, "index_select": gather, "constant_pad_nd": pad, "expand": expand, "bmm": matmul,
       "repeat": repeat, "addmm": addmm, "baddbmm": addmm, "convolution": conv_transpose, "group_norm": group_norm,
       "instance_norm": per_channel, "pixel_shuffle": depth_to_space, "pixel_unshuffle": space_to_depth,
       "prelu": per_channel, "_prelu_kernel": elementwise, "roll": roll, "split_with_sizes": split,
       "cumsum": cumulative, "glu": glu, "pad": pad, "layer_norm": plain_norm, "linalg_vector_norm": reduce}
)  # fmt: skip

_ATEN_OVERLOADS = (
    _named(elementwise, "masked_fill.Scalar masked_fill.Tensor remainder.Tensor remainder.Scalar floor_divide.default")
    | {f"{name}.{kind}": elementwise for name in ("eq", "ne", "lt", "le", "gt", "ge") for kind in ("Tensor", "Scalar")}
    | {f"__{name}__.Tensor": elementwise for name in ("and", "or", "xor")}
    | _named(reduce, "sum.dim_IntList var.correction std.correction mean.dim any.dim var.dim std.dim")
    | _named(reshape, "flatten.using_ints unflatten.int squeeze.dim squeeze.dims")
    | _named(pool, "upsample_nearest2d.vec upsample_bilinear2d.vec upsample_bicubic2d.vec")
    | _named(split, "split.Tensor chunk.default unsafe_split.Tensor")
    | {"sym_size.int": free, "select.int": gather, "slice.Tensor": aten_slice, "unbind.int": unbind,
       "_log_softmax.default": softmax, "log_softmax.int": softmax, "conv_transpose2d.input": conv_transpose,
       "conv_transpose1d.default": conv_transpose, "repeat_interleave.self_int": interleave}
)  # fmt: skip

RELATIONS: dict[str, Relation] = {
    **_OPS,
    **{f"onnx.{kind}": relation for kind, relation in _ONNX.items()},
    **{f"aten.{kind}.default": relation for kind, relation in _ATEN.items()},
    **{f"aten.{kind}": relation for kind, relation in _ATEN_OVERLOADS.items()},
}
"""What is not here is not known, and locks what reaches it."""
