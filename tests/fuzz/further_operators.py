"""More strategies of operators: what no pass knows, recurrent layers, subgraphs, quantization in every spelling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests.fuzz.onnx_graphs import MAKERS, Array, Draw, Drawn, Maker, numbers, one_of

_FLOATS_TO_ONE: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    **{name: {} for name in (
        "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Floor", "Round", "Sign", "Cosh", "Sinh", "Tan",
        "Reciprocal", "Log", "IsNaN", "Det", "GlobalMaxPool", "Not", "Size", "Shape", "NonZero",
        "MeanVarianceNormalization", "GlobalAveragePool", "Transpose", "Flatten", "Squeeze",
    )},
    "Celu": {"alpha": st.sampled_from([1.0, 0.5])}, "Shrink": {"lambd": st.just(0.25), "bias": st.sampled_from([0.0, 0.1])},
    "IsInf": {"detect_negative": st.integers(0, 1)}, "LpNormalization": {"axis": st.integers(-1, 1), "p": st.integers(1, 2)},
    "ArgMax": {"axis": st.integers(-2, 1), "keepdims": st.integers(0, 1)},
    "ArgMin": {"axis": st.integers(-2, 1), "select_last_index": st.integers(0, 1)},
    "Trilu": {"upper": st.integers(0, 1)}, "EyeLike": {"k": st.integers(-1, 1)},
    "DepthToSpace": {"blocksize": st.just(2), "mode": st.sampled_from(["DCR", "CRD"])},
    "SpaceToDepth": {"blocksize": st.just(2)}, "LRN": {"size": st.sampled_from([1, 3]), "alpha": st.just(0.1)},
    "ReduceLogSum": {"keepdims": st.integers(0, 1)}, "ReduceLogSumExp": {"keepdims": st.integers(0, 1)},
    "LpPool": {"kernel_shape": st.just([2, 2]), "p": st.integers(1, 2), "auto_pad": st.sampled_from(["VALID", "SAME_UPPER"])},
    "GlobalLpPool": {"p": st.integers(1, 2)}, "Elu": {"alpha": st.just(0.5)}, "Gelu": {"approximate": st.sampled_from(["none", "tanh"])},
    "Selu": {"alpha": st.just(1.5), "gamma": st.just(0.75)}, "LeakyRelu": {"alpha": st.just(0.2)},
    "HardSigmoid": {"alpha": st.just(0.3), "beta": st.just(0.4)}, "Cast": {"to": st.sampled_from([6, 7, 9, 10, 11])},
}  # fmt: skip
"""Operators of one input, with what their attributes may be."""

_OF_TWO = ("Div", "Pow", "Mod", "Equal", "Less", "LessOrEqual", "GreaterOrEqual", "PRelu", "MatMul")


def _of_one(draw: Draw, drawn: Drawn) -> list[str] | None:
    x = one_of(draw, list(drawn.flow)[::-1])
    if x is None:
        return None
    kind = draw(st.sampled_from(list(_FLOATS_TO_ONE)))
    attributes = {name: draw(one) for name, one in _FLOATS_TO_ONE[kind].items() if draw(st.integers(0, 2)) or name in _NEEDED}
    return drawn.add(kind, [x], **attributes)


_NEEDED = ("kernel_shape", "blocksize", "size", "to")


def _of_two(draw: Draw, drawn: Drawn) -> list[str] | None:
    a, b = one_of(draw, drawn.floats()), one_of(draw, drawn.floats())
    if a is None or b is None:
        return None
    kind = draw(st.sampled_from(_OF_TWO))
    if kind == "Mod":
        return drawn.add(kind, [a, b], fmod=1)
    if kind in ("Pow", "PRelu") or draw(st.booleans()):
        b = drawn.store(np.array(draw(st.sampled_from([2.0, 0.5, 1.0, 3.0])), np.float32))
    return drawn.add(kind, [a, b])


def _as_floats(draw: Draw, drawn: Drawn) -> list[str] | None:
    """What other operators made as integers and truths, as floats again; or floats through 16 or 64 bits."""
    x = one_of(draw, drawn.of("int64", "int32", "bool", "uint8", "int8", "float16", "float64"))
    if x is not None:
        return drawn.add("Cast", [x], to=TensorProto.FLOAT)
    x = one_of(draw, drawn.floats())
    cast = drawn.add("Cast", [x], to=draw(st.sampled_from([TensorProto.FLOAT16, TensorProto.DOUBLE]))) if x else None
    moved = cast and drawn.add(draw(st.sampled_from(["Identity", "Relu", "Neg"])), cast)
    return moved and drawn.add("Cast", moved, to=TensorProto.FLOAT)


def _index(draw: Draw, drawn: Drawn) -> list[str] | None:
    """Operators that gather, scatter, sort and choose."""
    x = one_of(draw, drawn.floats(2))
    if x is None:
        return None
    shape = drawn.flow[x].shape
    axis = draw(st.integers(1, len(shape) - 1))
    most = shape[axis] - 1
    match draw(st.sampled_from(["topk", "cumsum", "gather elements", "scatter", "compress", "one hot", "gather nd",
                                "scatter nd", "reverse", "range", "embedding", "max", "size"])):  # fmt: skip
        case "topk":
            count = drawn.integers(draw(st.integers(1, shape[axis])))
            return drawn.add("TopK", [x, count], 2, axis=axis, largest=draw(st.integers(0, 1)))
        case "cumsum":
            return drawn.add("CumSum", [x, drawn.store(np.array(axis, np.int64))], reverse=draw(st.integers(0, 1)),
                             exclusive=draw(st.integers(0, 1)))  # fmt: skip
        case "gather elements":
            indices = drawn.store(np.full((*shape[:axis], 1, *shape[axis + 1 :]), most, np.int64))
            return drawn.add("GatherElements", [x, indices], axis=axis)
        case "scatter":
            indices = drawn.store(np.zeros((*shape[:axis], 1, *shape[axis + 1 :]), np.int64))
            updates = drawn.store(numbers(draw, *shape[:axis], 1, *shape[axis + 1 :]))
            return drawn.add("ScatterElements", [x, indices, updates], axis=axis)
        case "compress":
            return drawn.add("Compress", [x, drawn.store(np.array([True] + [False] * most))], axis=axis)
        case "one hot":
            least = drawn.add("ArgMax", [x], axis=axis)
            values = drawn.store(np.array([0, 1], np.float32))
            return least and drawn.add("OneHot", [*least, drawn.integers(shape[axis]), values])
        case "gather nd":
            return drawn.add("GatherND", [x, drawn.store(np.array([[0, most if axis == 1 else 0]], np.int64))])
        case "scatter nd":
            row = drawn.store(numbers(draw, 1, *shape[1:]))
            return drawn.add("ScatterND", [x, drawn.store(np.array([[0]], np.int64)), row])
        case "reverse":
            lengths = drawn.store(np.full(shape[0], shape[1], np.int64))
            return drawn.add("ReverseSequence", [x, lengths], batch_axis=0, time_axis=1)
        case "range":
            counted = drawn.add("Shape", [x])
            size = counted and drawn.add("Gather", [*counted, drawn.store(np.array(axis, np.int64))])
            steps = size and drawn.add("Range", [drawn.store(np.array(0, np.int64)), *size,
                                                 drawn.store(np.array(1, np.int64))])  # fmt: skip
            return steps and drawn.add("Gather", [x, *steps], axis=axis)
        case "embedding":
            best = drawn.add("ArgMax", [x], axis=axis, keepdims=0)
            return best and drawn.add("Gather", [drawn.weight(draw, shape[axis], 4), *best])
        case "max":
            return drawn.add(draw(st.sampled_from(["Max", "Min", "Sum", "Mean"])), [x, x, drawn.weight(draw, shape[-1])])
        case _:
            counted = drawn.add("Shape", [x])
            return counted and drawn.add("ConstantOfShape", counted, value=numpy_helper.from_array(np.float32([0.5])))


def _image(draw: Draw, drawn: Drawn) -> list[str] | None:
    """Convolutions of all kinds, normalizations of channels, resizes."""
    x = one_of(draw, drawn.floats(3, 4))
    if x is None:
        return None
    shape = drawn.flow[x].shape
    channels, places = shape[1], len(shape) - 2
    match draw(st.sampled_from(["conv", "transposed", "instance", "group", "batch", "resize", "lrn", "depthwise"])):
        case "conv":
            kernel = draw(st.lists(st.integers(1, 3), min_size=places, max_size=places))
            weight = drawn.weight(draw, draw(st.integers(1, 4)), channels, *kernel)
            return drawn.add("Conv", [x, weight], pads=draw(st.sampled_from([[0], [1]])) * 2 * places,
                             dilations=[draw(st.integers(1, 2))] * places)  # fmt: skip
        case "depthwise":
            times = draw(st.integers(1, 2))
            weight = drawn.weight(draw, channels * times, 1, *[2] * places)
            made = drawn.add("Conv", [x, weight], group=channels, auto_pad=draw(st.sampled_from(["NOTSET", "SAME_LOWER"])))
            return made and drawn.add(draw(st.sampled_from(["Relu", "Sigmoid", "HardSwish"])), made)
        case "transposed":
            out = draw(st.integers(1, 3))
            weight = drawn.weight(draw, channels, out, *[draw(st.integers(2, 3))] * places)
            bias = [drawn.weight(draw, out)] if draw(st.booleans()) else []
            stride = draw(st.integers(1, 2))
            extra: dict[str, Any] = {"output_padding": [1] * places} if stride == 2 and draw(st.booleans()) else {}
            return drawn.add("ConvTranspose", [x, weight, *bias], strides=[stride] * places, **extra)
        case "instance":
            return drawn.add("InstanceNormalization", [x, drawn.weight(draw, channels), drawn.weight(draw, channels)])
        case "group":
            parameters = [drawn.weight(draw, channels) for _ in range(2)]
            return drawn.add("GroupNormalization", [x, *parameters], num_groups=1)
        case "batch":
            parameters = [drawn.weight(draw, channels) for _ in range(3)]
            variance = drawn.store(np.abs(numbers(draw, channels)) + 0.5)
            return drawn.add("BatchNormalization", [x, *parameters, variance], epsilon=0.01)
        case "resize":
            scales = drawn.store(np.array([1, 1] + [draw(st.sampled_from([2, 0.5]))] * places, np.float32))
            mode = draw(st.sampled_from(["nearest", "linear"]))
            how = draw(st.sampled_from(["asymmetric", "half_pixel", "align_corners"]))
            return drawn.add("Resize", [x, "", scales], mode=mode, coordinate_transformation_mode=how)
        case _:
            return drawn.add("LRN", [x], size=3, alpha=0.1, beta=0.5)


def _recurrent(draw: Draw, drawn: Drawn) -> list[str] | None:
    x = one_of(draw, drawn.floats(3, 3))
    if x is None:
        return None
    kind, gates = draw(st.sampled_from([("LSTM", 4), ("GRU", 3), ("RNN", 1)]))
    direction = draw(st.sampled_from(["forward", "reverse", "bidirectional"]))
    both, width, hidden = 1 + (direction == "bidirectional"), drawn.flow[x].shape[2], draw(st.integers(1, 3))
    weights = [drawn.weight(draw, both, gates * hidden, width), drawn.weight(draw, both, gates * hidden, hidden)]
    bias = [drawn.weight(draw, both, 2 * gates * hidden)] if draw(st.booleans()) else []
    attributes: dict[str, Any] = {"linear_before_reset": draw(st.integers(0, 1))} if kind == "GRU" else {}
    if drawn.opset >= 14 and draw(st.integers(0, 3)) == 0:
        attributes["layout"] = 0
    made = drawn.add(kind, [x, *weights, *bias], draw(st.integers(1, 2)), hidden_size=hidden, direction=direction,
                     **attributes)  # fmt: skip
    return made and drawn.add("Squeeze", made[:1])


def _attention(draw: Draw, drawn: Drawn) -> list[str] | None:
    """Products of two activations, with a softmax between, and their newer operators."""
    x = one_of(draw, drawn.floats(3, 3))
    if x is None:
        return None
    width = drawn.flow[x].shape[2]
    parts = [drawn.add("MatMul", [x, drawn.weight(draw, width, 4)]) for _ in range(3)]
    if any(part is None for part in parts):
        return None
    query, key, value = [part[0] for part in parts if part is not None]
    if drawn.opset >= 23 and draw(st.booleans()):
        return drawn.add("Attention", [query, key, value], q_num_heads=2, kv_num_heads=2, is_causal=draw(st.integers(0, 1)))
    turned = drawn.add("Transpose", [key], perm=[0, 2, 1])
    scores = turned and drawn.add("MatMul", [query, *turned])
    scaled = scores and drawn.add("Mul", [*scores, drawn.store(np.array(0.5, np.float32))])
    chances = scaled and drawn.add("Softmax", scaled, axis=2)
    return chances and drawn.add("MatMul", [*chances, value])


def _product(draw: Draw, drawn: Drawn) -> list[str] | None:
    """Linears as few exporters write them."""
    x = one_of(draw, drawn.floats(2))
    if x is None:
        return None
    shape, out = drawn.flow[x].shape, draw(st.integers(1, 4))
    match draw(st.sampled_from(["gemm", "einsum", "left", "ranks", "identity", "normed", "rms"])):
        case "gemm" if len(shape) == 2:
            first, a = draw(st.booleans()), x
            rows = shape[0] if first else shape[1]
            weight = drawn.weight(draw, rows, out)
            bias = drawn.weight(draw, *draw(st.sampled_from([(1, out), (1,), (), (out,)])))
            return drawn.add("Gemm", [a, weight, bias], transA=int(first), alpha=draw(st.sampled_from([1.0, 2.0])),
                             beta=draw(st.sampled_from([1.0, 0.5, 0.0])))  # fmt: skip
        case "einsum":
            letters = "abcdef"[: len(shape) - 1]
            return drawn.add("Einsum", [x, drawn.weight(draw, shape[-1], out)], equation=f"{letters}k,ko->{letters}o")
        case "left":
            return drawn.add("MatMul", [drawn.weight(draw, out, shape[-2]), x])
        case "ranks":
            return drawn.add("MatMul", [x, drawn.weight(draw, *[1] * draw(st.integers(1, 2)), shape[-1], out)])
        case "identity":
            stored = drawn.weight(draw, out, shape[-1])
            turned = drawn.add("Transpose", [stored], perm=[1, 0])
            same = turned and drawn.add("Identity", turned)
            return same and drawn.add("MatMul", [x, *same])
        case "rms" if drawn.opset >= 23:
            return drawn.add("RMSNormalization", [x, drawn.weight(draw, shape[-1])])
        case _:
            length = drawn.add("ReduceL2", [x], keepdims=1)
            return length and drawn.add("Div", [x, *length])


# --- quantization --------------------------------------------------------------------------------------------------


def _grid(draw: Draw, drawn: Drawn, dtype: str) -> list[str]:
    """A scale, and mostly a zero point of a dtype."""
    scale = drawn.store(np.array(draw(st.sampled_from([0.02, 0.05])), np.float32))
    if dtype == "uint8" and draw(st.integers(0, 3)) == 0:
        return [scale]
    zero = {"uint8": [0, 100, 128, 255], "int8": [0, 3, -128], "uint16": [32768], "int16": [0]}[dtype]
    return [scale, drawn.store(np.array(draw(st.sampled_from(zero)), dtype))]


def _pair(draw: Draw, drawn: Drawn) -> list[str] | None:
    """Quantize and dequantize, to 8 or 16 bits, with what moves integers between."""
    x = one_of(draw, drawn.floats())
    if x is None:
        return None
    wide = ["uint16", "int16"] if drawn.opset >= 21 else []
    grid = _grid(draw, drawn, draw(st.sampled_from(["uint8", "int8", *wide])))
    steps = drawn.add("QuantizeLinear", [x, *grid])
    if steps and draw(st.booleans()):
        moved = drawn.add(draw(st.sampled_from(["Identity", "Flatten", "Transpose", "Relu"])), steps)
        steps = moved or steps
    return steps and drawn.add("DequantizeLinear", [*steps, *grid])


def _stored_integers(draw: Draw, drawn: Drawn, shape: Sequence[int], axis: int) -> list[str] | None:
    """A dequantized weight: with one scale, one for each slice of an axis, or one for each block."""
    seed = np.random.default_rng(draw(st.integers(0, 99)))
    kind = draw(st.sampled_from(["int8", "uint8"]))
    steps = drawn.store(seed.integers(-120 if kind == "int8" else 5, 120 if kind == "int8" else 250, shape).astype(kind))
    how = draw(st.sampled_from(["one", "slices", "blocks"])) if drawn.opset >= 13 else "one"
    middle = 0 if kind == "int8" else 128
    if how == "one":
        zero = [drawn.store(np.array(middle, kind))] if middle or draw(st.booleans()) else []
        return drawn.add("DequantizeLinear", [steps, drawn.store(np.array(0.01, np.float32)), *zero])
    if how == "blocks" and drawn.opset >= 21 and shape[1 - axis] % 2 == 0 and len(shape) == 2:
        sizes = [shape[0], shape[1]]
        sizes[1 - axis] //= 2
        scale = drawn.store(np.linspace(0.005, 0.02, sizes[0] * sizes[1], dtype=np.float32).reshape(sizes))
        return drawn.add("DequantizeLinear", [steps, scale, drawn.store(np.full(sizes, middle, kind))], axis=1 - axis,
                         block_size=2)  # fmt: skip
    scale = drawn.store(np.linspace(0.005, 0.02, shape[axis], dtype=np.float32))
    return drawn.add("DequantizeLinear", [steps, scale, drawn.store(np.full(shape[axis], middle, kind))], axis=axis)


def _quantized_layer(draw: Draw, drawn: Drawn) -> list[str] | None:
    """A linear or conv on a pair and on stored integers, whose result may be quantized too."""
    x = one_of(draw, drawn.floats(2))
    if x is None:
        return None
    grid = _grid(draw, drawn, draw(st.sampled_from(["uint8", "int8"])))
    steps = drawn.add("QuantizeLinear", [x, *grid])
    floats = steps and drawn.add("DequantizeLinear", [*steps, *grid])
    if floats is None:
        return None
    shape, out = drawn.flow[x].shape, draw(st.integers(1, 4))
    if len(shape) == 4:
        weight = _stored_integers(draw, drawn, [out, shape[1], 2, 2], 0)
        bias = [drawn.weight(draw, out)] if draw(st.booleans()) else []
        made = weight and drawn.add("Conv", [*floats, *weight, *bias])
    elif len(shape) == 2 and draw(st.booleans()):
        weight = _stored_integers(draw, drawn, [out, shape[1]], 0)
        made = weight and drawn.add("Gemm", [*floats, *weight, drawn.weight(draw, out)], transB=1)
    else:
        weight = _stored_integers(draw, drawn, [shape[-1], out], 1)
        made = weight and drawn.add("MatMul", [*floats, *weight])
    if made and draw(st.booleans()):
        made = drawn.add("Relu", made) or made
    if made and draw(st.booleans()):
        grid = _grid(draw, drawn, draw(st.sampled_from(["uint8", "int8"])))
        steps = drawn.add("QuantizeLinear", [*made, *grid])
        return steps and drawn.add("DequantizeLinear", [*steps, *grid])
    return made


def _integer_operator(draw: Draw, drawn: Drawn) -> list[str] | None:
    """Operators of integers themselves: QLinearMatMul, MatMulInteger."""
    x = one_of(draw, drawn.floats(2))
    if x is None:
        return None
    width, out = drawn.flow[x].shape[-1], draw(st.integers(1, 4))
    weight = drawn.store(np.random.default_rng(draw(st.integers(0, 99))).integers(-99, 99, (width, out)).astype(np.int8))
    scale, zero = drawn.store(np.array(0.01, np.float32)), drawn.store(np.array(0, np.int8))
    if draw(st.booleans()):
        grid = [drawn.store(np.array(0.05, np.float32)), drawn.store(np.array(128, np.uint8))]
        steps = drawn.add("QuantizeLinear", [x, *grid])
        product = steps and drawn.add("QLinearMatMul", [*steps, *grid, weight, scale, zero, *grid])
        return product and drawn.add("DequantizeLinear", [*product, *grid])
    found = drawn.add("DynamicQuantizeLinear", [x], 3)
    if found is None:
        return None
    steps, step, middle = [found[0]], found[1], found[2]
    product = drawn.add("MatMulInteger", [*steps, weight, middle, zero])
    floats = product and drawn.add("Cast", product, to=TensorProto.FLOAT)
    factor = drawn.add("Mul", [step, scale])
    return floats and factor and drawn.add("Mul", [*floats, *factor])


# --- subgraphs -----------------------------------------------------------------------------------------------------


def _body(draw: Draw, x: str, weight: str, prefix: str, shape: Sequence[int]) -> list[onnx.NodeProto]:
    """Nodes from x to `{prefix}y` of the same shape."""
    last = [name for name in ("Relu", "Tanh", "Neg", "Sigmoid")]
    first = helper.make_node("MatMul", [x, weight], [f"{prefix}m"], name=f"{prefix}product")
    second = helper.make_node(draw(st.sampled_from(last)), [f"{prefix}m" if draw(st.booleans()) else x], [f"{prefix}y"])
    return [first, second] if f"{prefix}m" in second.input else [second]


def _subgraph(draw: Draw, drawn: Drawn) -> list[str] | None:
    x = one_of(draw, drawn.floats(2, 3))
    if x is None:
        return None
    shape = drawn.flow[x].shape
    weight, mark = drawn.weight(draw, shape[-1], shape[-1]), f"b{len(drawn.nodes)}"
    typed = [None] * len(shape) if draw(st.booleans()) else None

    def value(name: str, dtype: int = TensorProto.FLOAT, sizes: Any = typed) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, dtype, sizes)

    kind = draw(st.sampled_from(["if", "loop", "scan", "sequence"]))
    if kind == "if":
        top = drawn.add("ReduceMax", [x], keepdims=0)
        bound = drawn.store(np.array(draw(st.sampled_from([1.0, 9.0])), np.float32))
        truth = top and drawn.add("Greater", [*top, bound])
        if not truth:
            return None
        bodies = [_body(draw, x, weight, f"{mark}{side}", shape) for side in "te"]
        graphs = [helper.make_graph(nodes, side, [], [value(f"{mark}{side}y")])
                  for nodes, side in zip(bodies, "te", strict=True)]  # fmt: skip
        return drawn.add("If", truth, around=[x, weight], then_branch=graphs[0], else_branch=graphs[1])
    count, go_on = drawn.store(np.array(2, np.int64)), drawn.store(np.array(True))
    nodes = _body(draw, f"{mark}x", weight, mark, shape)
    if kind == "scan":
        rows = len(shape) - 1
        graph = helper.make_graph(nodes, "scan", [value(f"{mark}x", sizes=None if typed is None else [None] * rows)],
                                  [value(f"{mark}y", sizes=None)])  # fmt: skip
        return drawn.add("Scan", [x], around=[weight], body=graph, num_scan_inputs=1)
    ends = [value(f"{mark}i", TensorProto.INT64, []), value(f"{mark}c", TensorProto.BOOL, [])]
    kept = helper.make_node("Identity", [f"{mark}c"], [f"{mark}d"])
    told = value(f"{mark}d", TensorProto.BOOL, [])
    if kind == "loop":
        graph = helper.make_graph([*nodes, kept], "loop", [*ends, value(f"{mark}x")], [told, value(f"{mark}y")])
        return drawn.add("Loop", [count, go_on, x], around=[weight], body=graph)
    sequence = [helper.make_tensor_sequence_value_info(f"{mark}{end}", TensorProto.FLOAT, None) for end in "ab"]
    insert = helper.make_node("SequenceInsert", [f"{mark}a", f"{mark}y"], [f"{mark}b"])
    inner = [*_body(draw, x, weight, mark, shape), insert, kept]
    graph = helper.make_graph(inner, "loop", [*ends, sequence[0]], [told, sequence[1]])
    join = helper.make_node("ConcatFromSequence", [f"{mark}z"], [f"{mark}joined"], axis=0)
    loop = helper.make_node("Loop", [count, go_on, f"{mark}e"], [f"{mark}z"], body=graph)
    outer = helper.make_graph([helper.make_node("SequenceEmpty", [], [f"{mark}e"]), loop, join], "t", [],
                              [value(f"{mark}joined")])  # fmt: skip
    other = helper.make_graph([helper.make_node("Identity", [x], [f"{mark}same"])], "e", [], [value(f"{mark}same")])
    return drawn.add("If", [go_on], around=[x, weight, count], then_branch=outer, else_branch=other)


ALL: Sequence[Maker] = (
    *MAKERS, _of_one, _of_two, _as_floats, _index, _image, _recurrent, _attention, _product, _pair, _quantized_layer,
    _integer_operator, _subgraph,
)  # fmt: skip

__all__ = ["ALL", "Array"]
