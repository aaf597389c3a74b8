"""Attention of a decode step on onnxruntime: the kernel itself puts the new keys and values behind the cached ones.

    keys = concat(past_key, key), values = concat(past_value, value), y = attention(query, keys, values, mask)
    ->  y, keys, values = GroupQueryAttention(query, key, value, past_key, past_value, lengths, mask)

The model's inputs and outputs stay what they are. With GroupQueryAttention a file can also be run on a cache of fixed
size: where the buffer of a past input is that of its present output, the kernel writes the new entries into it and
copies nothing (`graphopt.backends.onnxruntime.cache`). How much of the buffer is filled is then told by the attention
mask, which covers the past and the new positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from graphopt.backends.onnxruntime.attention import float_mask, splits_heads
from graphopt.backends.onnxruntime.causal import implies_causal
from graphopt.backends.onnxruntime.rows import with_shape
from graphopt.capture.decode import IDS, MASK, PAST
from graphopt.dialects.onnx.graph import OnnxGraph, OnnxNode
from graphopt.ir.decline import Declined
from graphopt.ir.graph import Node, Value
from graphopt.ir.rewrite import Builder, Choice, Match, Pattern, Recorder

IN_PLACE = "graphopt.cache_in_place"
"""The key, in a file's metadata, that says that it takes a cache of fixed size."""
_KERNEL = "com.microsoft.GroupQueryAttention"
_MULTIPLE = 8
"""What the size of a head must be divided by: the kernel refuses others when it runs."""


def _cached(op: Recorder, query: str, past_key: str, key: str, past_value: str, value: str,
            mask: str | None = None) -> Pattern:  # fmt: skip
    keys, values = op.concat(past_key, key, bind="keys"), op.concat(past_value, value, bind="values")
    return op.attention(query, keys, values, mask, heads=0, causal=False)


def _is_cache(m: Match) -> bool:
    """Whether keys and values are joined along the length, and read by this attention alone, inside the graph."""
    joins = m.keys, m.values
    along_length = all(join.attributes["axis"] in (-2, 2) and join.result.rank == 4 for join in joins)
    return along_length and all(set(join.result.users) == {m.root} for join in joins)


# --- forms -----------------------------------------------------------------------------------------------------------


def _group_query_attention(op: Builder, m: Match) -> Mapping[Value, Value]:
    """The contrib kernel, which masks later positions by itself, and works in place where the buffers are the same.

    For 16 heads of 64 over 4 of keys, one thread (us): 35 in place, 40 by Attention, 52 out of place, after 128
    positions; 275, 350 and 460 after 1024. It takes no batch of several new tokens behind a past: then Attention runs.
    """
    graph, past = op.graph, m.past_key.shape
    assert isinstance(graph, OnnxGraph)
    mask = _whole_mask(op, m)
    if mask is None or past is None or not implies_causal(m.mask, past[2]):
        raise Declined("mask_not_causal")
    if m.query.dtype is not torch.float32:
        raise Declined("activations_not_float32", dtype=str(m.query.dtype))
    heads, kv_heads, size = _sizes(m)
    if size % _MULTIPLE:
        raise Declined("head_size_not_divided", size=size, multiple=_MULTIPLE)
    operands = [_flat(op, value) for value in (m.query, m.key, m.value)]
    last, total, filled, fits = _lengths(op, m.past_key, operands[1])

    def grouped() -> Sequence[Value]:
        results = graph.emit_all(
            _KERNEL, *operands, m.past_key, m.past_value, last, total, None, None, None,
            mask, at=op.at, _outputs=3, num_heads=heads, kv_num_heads=kv_heads, **_scale(m),
        )  # fmt: skip
        return _stated(m, results, operands[0])

    def plain() -> Sequence[Value]:
        pasts = [op("onnx.Slice", one, op.constant(torch.tensor([0])), filled, op.constant(torch.tensor([2])))
                 for one in (m.past_key, m.past_value)]  # fmt: skip
        for one, whole in zip(pasts, (m.past_key, m.past_value), strict=True):
            with_shape(one, whole.shape)
        return _attention_op(op, m, operands, mask, pasts)

    results = grouped() if past[0] == 1 else graph.emit_if(fits, grouped, plain, op.at)
    return _replaced(op, m, results)


def _attention(op: Builder, m: Match) -> Mapping[Value, Value]:
    """ONNX's own operator, for any batch, length and mask."""
    operands = [_flat(op, value) for value in (m.query, m.key, m.value)]
    results = _attention_op(op, m, operands, _whole_mask(op, m), [m.past_key, m.past_value])
    return _replaced(op, m, results)


def _attention_op(
    op: Builder, m: Match, operands: Sequence[Value], mask: Value | None, pasts: Sequence[Value]
) -> Sequence[Value]:
    heads, kv_heads, _ = _sizes(m)
    results = op.graph.emit_all(
        "onnx.Attention", *operands, mask, *pasts, at=op.at, _outputs=3, q_num_heads=heads, kv_num_heads=kv_heads,
        **_scale(m),
    )  # fmt: skip
    return _stated(m, results, operands[0])


def _stated(m: Match, results: Sequence[Value], query: Value) -> Sequence[Value]:
    """The results, stated to have the shapes that the graph had for them."""
    for result, shape in zip(results, (query.shape, m.keys.result.shape, m.values.result.shape), strict=True):
        with_shape(result, shape, query.dtype)
    return results


def _replaced(op: Builder, m: Match, results: Sequence[Value]) -> Mapping[Value, Value]:
    """What stands for the attention, for the joined cache, and for the reshape that joins the heads behind it."""
    y, keys, values = results
    found = {m.keys.result: keys, m.values.result: values}
    joined = _joined_heads(m.root)
    if joined is not None:
        found[joined.result] = y
    heads, _, size = _sizes(m)
    split = op("onnx.Reshape", y, op.constant(torch.tensor([0, 0, heads, size])))
    return {m.root.result: op.transpose(split, perm=(0, 2, 1, 3)), **found}


def _joined_heads(attention: Node) -> Node | None:
    """The reshape to (batch, length, heads · size) that alone reads an attention, through a transpose."""
    transpose = attention.result.only_user
    if transpose is None or transpose.kind != "transpose" or transpose.attributes["perm"] != (0, 2, 1, 3):
        return None
    reshape = transpose.result.only_user
    if reshape is None or reshape.kind not in ("reshape", "onnx.Reshape") or reshape.operands[0] != transpose.result:
        return None
    return reshape if splits_heads(attention.result.shape, reshape.result.shape) else None


def _flat(op: Builder, value: Value) -> Value:
    """(batch, heads, length, size) as (batch, length, heads · size): before the heads are split, where it is there."""
    transpose = value.producer
    if transpose is not None and transpose.kind == "transpose" and transpose.attributes["perm"] == (0, 2, 1, 3):
        reshape = transpose.input.producer
        source = reshape.operands[0] if reshape is not None and reshape.kind in ("reshape", "onnx.Reshape") else None
        if source is not None and splits_heads(value.shape, source.shape):
            return source
    assert value.shape is not None
    batch, heads, length, size = value.shape
    assert isinstance(heads, int) and isinstance(size, int)  # as `_sizes` says
    flat = op("onnx.Reshape", op.transpose(value, perm=(0, 2, 1, 3)), op.constant(torch.tensor([0, 0, heads * size])))
    return with_shape(flat, (batch, length, heads * size))


def _sizes(m: Match) -> tuple[int, int, int]:
    """Heads of queries, of keys, and the size of one. Raises Declined where they are not known, or differ."""
    shapes = [value.shape for value in (m.query, m.key, m.value, m.past_key, m.past_value)]
    if any(shape is None or not isinstance(shape[1], int) or not isinstance(shape[3], int) for shape in shapes):
        raise Declined("heads_unknown")
    (_, heads, _, size), *others = shapes
    if len({shape[1] for shape in others if shape}) != 1 or any(shape and shape[3] != size for shape in others):
        raise Declined("heads_unknown")
    return int(heads), int(m.key.shape[1]), int(size)


def _scale(m: Match) -> dict[str, float]:
    given = m.root.attributes["scale"]
    return {} if given is None else {"scale": float(given)}


def _whole_mask(op: Builder, m: Match) -> Value | None:
    """The mask in floats, with an entry of its own for each query: kernels do not broadcast it."""
    if m.mask is None:
        return None
    lengths = m.query.shape[2], m.keys.result.shape[2]
    if "?" in lengths:
        raise Declined("lengths_unnamed")
    if m.mask.dtype not in (torch.bool, m.query.dtype) or m.mask.rank != 4 or m.mask.shape[2:] != lengths:
        raise Declined("mask_unsupported", expected="(batch, heads, length, length) of booleans or floats")
    return float_mask(op, m.mask, m.query.dtype)


def _lengths(op: Builder, past_key: Value, key: Value) -> tuple[Value, Value, Value, Value]:
    """What the kernel is told of the cache, made once for all layers.

    The last position (batch,) and the number of positions (1,), of int32; the size of the past (1,), of int64; and
    whether the kernel takes the step, as it has one row, one new token, or no past.
    """
    assert past_key.shape is not None and key.shape is not None
    sizes = past_key.shape[2], key.shape[1]
    one, zero = (op.constant(torch.tensor([number])) for number in (1, 0))

    def once(name: str, emit: Callable[[], Value]) -> Value:
        return op.once(("cache", name, *sizes), emit)

    batch, new = (once(f"size {axis}", partial(op, "onnx.Shape", key, start=axis, end=axis + 1)) for axis in (0, 1))
    past = once("past", lambda: op("onnx.Shape", past_key, start=2, end=3))
    total = once("total", lambda: op.add(past, new))
    last = once("last", lambda: op("onnx.Expand", op.cast(op.sub(total, one), dtype=torch.int32), batch))
    rest = once("rest", lambda: op.mul(op.mul(op.sub(batch, one), op.sub(new, one)), past))
    fits = once("fits", lambda: op.squeeze(op("onnx.Equal", rest, zero), axes=(0,)))
    return last, once("int32 total", lambda: op.cast(total, dtype=torch.int32)), past, fits


FORMS = Choice(
    "cached-attention",
    _cached,
    {"GroupQueryAttention": _group_query_attention, "Attention": _attention},
    check=_is_cache,
    shared=True,
    timed=False,
)
"""The order is fixed, as a decoder binds its cache: a timing here would pass the buffers of past and present apart."""


# --- a cache of fixed size -------------------------------------------------------------------------------------------


def fill_in_place(graph: OnnxGraph) -> None:
    """Let a step also run on buffers that are longer than the past: how much is filled, the mask then tells. [changes]

    The length of the past is the size of a past input, or what the attention mask covers beyond the new tokens where
    that is less. On other inputs the two are the same, or the mask is longer, which the model allows. The graph stays
    as it is where anything but GroupQueryAttention reads an entry of the cache.
    """
    inputs = {value.name: value for value in graph.inputs}
    pasts = [value for name, value in inputs.items() if name.startswith(f"{PAST}.")]
    ids, mask = inputs.get(IDS), inputs.get(MASK)
    if ids is None or mask is None or ids.rank != 2 or mask.rank != 2 or not mask.users:
        return
    if len({past.shape and past.shape[2:3] for past in pasts}) != 1 or not all(map(_is_buffer, pasts)):
        return
    lengths = [node for past in pasts for node in past.users if _is_length(node)]
    if not lengths:
        return
    first = next(node for node in graph.nodes if node in lengths)
    whole = graph.emit("onnx.Shape", lengths[0].operands[0], at=first, start=2, end=3)
    sizes = [graph.emit("onnx.Shape", value, at=first, start=1, end=2) for value in (mask, ids)]
    filled = graph.emit("onnx.Min", whole, graph.emit("sub", *sizes, at=first), at=first)
    for node in lengths:
        graph.replace(node, filled)
    graph.sweep()
    graph.model.metadata_props[IN_PLACE] = "true"


def _is_length(node: Node) -> bool:
    return node.kind == "onnx.Shape" and (node.attributes.get("start"), node.attributes.get("end")) == (2, 3)


def _is_batch(node: Node) -> bool:
    return node.kind == "onnx.Shape" and (node.attributes.get("start", 0), node.attributes.get("end")) == (0, 1)


def _holds_kernel(node: Node) -> bool:
    """Whether a node is what `_group_query_attention` emits: a branch with the kernel, and one that cuts the buffer."""
    assert isinstance(node, OnnxNode)
    branch = node.native.attributes.get("then_branch")
    return branch is not None and [inner.op_type for inner in branch.as_graph()] == ["GroupQueryAttention"]


def _is_buffer(past: Value) -> bool:
    """Whether only the kernel reads the entries of a past input, and else only its sizes are."""
    return all(
        _is_length(node) or _is_batch(node) or node.kind == _KERNEL or _holds_kernel(node) for node in past.users
    )
