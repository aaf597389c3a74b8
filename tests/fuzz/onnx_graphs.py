"""Random ONNX models that onnxruntime runs, as hypothesis strategies: they shrink to few nodes and small sizes.

A model grows node by node. Each node is run by itself, at the model's opset and without optimizations, on the tensors
that flow there: what the engine refuses is not drawn. So a strategy for an operator may be loose, and says no shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from hypothesis import assume
from hypothesis import strategies as st
from onnx import helper, numpy_helper

Draw = Callable[[st.SearchStrategy[Any]], Any]
Array = np.ndarray[Any, Any]

OPSETS = range(11, 24)
SIZES = {"n": 2, "s": 3}
"""The sizes of dynamic axes, at which a model is drawn."""


@dataclass
class Drawn:
    """A model as it grows: its nodes, what is stored, and what flows at one feed."""

    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    stored: dict[str, Array] = field(default_factory=dict)
    flow: dict[str, Array] = field(default_factory=dict)
    inputs: dict[str, Sequence[int | str]] = field(default_factory=dict)
    """By name, their shapes: sizes, and names of dynamic axes."""

    def store(self, array: Array) -> str:
        name = f"c{len(self.stored)}"
        self.stored[name] = array
        return name

    def weight(self, draw: Draw, *shape: int) -> str:
        """Normal numbers, which another node may read too."""
        alike = [name for name, array in self.stored.items() if array.shape == shape and array.dtype == np.float32]
        shared = alike and draw(st.integers(0, 3)) == 0
        return draw(st.sampled_from(alike)) if shared else self.store(numbers(draw, *shape))

    def integers(self, *values: int) -> str:
        return self.store(np.array(values, np.int64))

    def of(self, *kinds: str) -> list[str]:
        """What flows in some dtypes, the last first."""
        return [name for name, array in reversed(self.flow.items()) if array.dtype.name in kinds]

    def floats(self, least: int = 0, most: int = 9) -> list[str]:
        """The floats of some ranks, the last ones first, to which hypothesis shrinks."""
        return [name for name, array in reversed(self.flow.items())
                if array.dtype == np.float32 and least <= array.ndim <= most]  # fmt: skip

    def add(
        self, op_type: str, inputs: Sequence[str], outputs: int = 1, *, around: Sequence[str] = (), **attributes: Any
    ) -> list[str] | None:
        """The names of the results; None, and nothing is added, where the engine refuses the node.

        around: what its subgraphs read of the graph.
        """
        names = [f"v{len(self.flow) + index}" for index in range(outputs)]
        node = helper.make_node(op_type, inputs, names, name=f"n{len(self.nodes)}", **attributes)
        given = {name: self.flow.get(name, self.stored.get(name)) for name in (*inputs, *around) if name}
        found = _run_node(node, given, self.opset)
        if found is None or any(not _is_tame(array) for array in found):
            return None
        self.nodes.append(node)
        self.flow |= dict(zip(names, found, strict=True))
        return names

    def model(self, outputs: Sequence[str], ir_version: int = 8) -> onnx.ModelProto:
        """ir_version: below 4, what is stored is an input too."""
        inputs = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(self.flow[name].dtype), shape)
                  for name, shape in self.inputs.items()]  # fmt: skip
        results = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(self.flow[name].dtype), None)
                   for name in outputs]  # fmt: skip
        stored = [numpy_helper.from_array(array, name) for name, array in self.stored.items()]
        if ir_version < 4:
            inputs += [helper.make_tensor_value_info(one.name, one.data_type, one.dims) for one in stored]
        graph = helper.make_graph(self.nodes, "drawn", inputs, results, stored)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=ir_version)


def _is_tame(array: Array) -> bool:
    """Whether an array is small, and holds numbers that further nodes can compute with in float32."""
    if array.size == 0 or array.size > 4096:
        return False
    return array.dtype.kind != "f" or bool(np.isfinite(array).all() and np.abs(array).max() < 1e4)


def session(model: onnx.ModelProto, level: str = "DISABLE_ALL") -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_{level}")
    options.log_severity_level, options.intra_op_num_threads, options.inter_op_num_threads = 4, 1, 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _run_node(node: onnx.NodeProto, given: dict[str, Any], opset: int) -> list[Array] | None:
    inputs = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
              for name, array in given.items()]  # fmt: skip
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output]
    graph = helper.make_graph([node], "one", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    try:
        found: list[Array] = session(model).run(None, given)
    except Exception:  # the engine's exceptions have no base of their own
        return None
    return found if all(isinstance(array, np.ndarray) for array in found) else None


# --- operators -----------------------------------------------------------------------------------------------------

Maker = Callable[[Draw, Drawn], "list[str] | None"]

_UNARY = ("Relu", "Sigmoid", "Tanh", "Neg", "Abs", "Softplus", "Softsign", "Elu", "Selu", "Erf", "Sin", "Cos", "Exp",
          "Identity", "HardSigmoid", "LeakyRelu", "HardSwish", "Mish", "Gelu", "ThresholdedRelu", "Sqrt")  # fmt: skip
_BINARY = ("Add", "Sub", "Mul", "Max", "Min", "Mean", "Sum")
_REDUCE = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceProd")


def numbers(draw: Draw, *shape: int) -> Array:
    """Normal numbers; a seed is drawn and not each number, so that examples stay small."""
    return np.random.default_rng(draw(st.integers(0, 99))).standard_normal(shape).astype(np.float32)


def one_of(draw: Draw, names: Sequence[str]) -> str | None:
    return draw(st.sampled_from(names)) if names else None


def _unary(draw: Draw, drawn: Drawn) -> list[str] | None:
    x = one_of(draw, drawn.floats())
    return drawn.add(draw(st.sampled_from(_UNARY)), [x]) if x else None


def _binary(draw: Draw, drawn: Drawn) -> list[str] | None:
    a = one_of(draw, drawn.floats())
    if a is None:
        return None
    alike = [name for name in drawn.floats() if drawn.flow[name].shape == drawn.flow[a].shape]
    b = draw(st.sampled_from(alike)) if draw(st.booleans()) else drawn.store(numbers(draw, *drawn.flow[a].shape[-1:]))
    return drawn.add(draw(st.sampled_from(_BINARY)), [a, b] if draw(st.booleans()) else [b, a])


def _clip(draw: Draw, drawn: Drawn) -> list[str] | None:
    x = one_of(draw, drawn.floats())
    bounds = [drawn.store(np.array(bound, np.float32)) for bound in (-0.5, 0.75)]
    return drawn.add("Clip", [x, *bounds[: draw(st.integers(0, 2))]]) if x else None


def _softmax(draw: Draw, drawn: Drawn) -> list[str] | None:
    x = one_of(draw, drawn.floats(1))
    if x is None:
        return None
    axis = draw(st.sampled_from([None, *range(-drawn.flow[x].ndim, drawn.flow[x].ndim)]))
    kind = draw(st.sampled_from(["Softmax", "LogSoftmax", "Hardmax"]))
    return drawn.add(kind, [x], **({} if axis is None else {"axis": axis}))


def _reduce(draw: Draw, drawn: Drawn) -> list[str] | None:
    x = one_of(draw, drawn.floats(1))
    if x is None:
        return None
    kind, keepdims = draw(st.sampled_from(_REDUCE)), draw(st.integers(0, 1))
    axes = draw(st.lists(st.integers(0, drawn.flow[x].ndim - 1), unique=True, max_size=2))
    by_input = drawn.opset >= (13 if kind == "ReduceSum" else 18)
    if not axes:
        return drawn.add(kind, [x], keepdims=keepdims)
    if by_input:
        return drawn.add(kind, [x, drawn.store(np.array(axes, np.int64))], keepdims=keepdims)
    return drawn.add(kind, [x], axes=axes, keepdims=keepdims)


def _move(draw: Draw, drawn: Drawn) -> list[str] | None:
    x = one_of(draw, drawn.floats(2))
    if x is None:
        return None
    shape = drawn.flow[x].shape

    def integers(*numbers: int) -> str:
        return drawn.store(np.array(numbers, np.int64))

    match draw(st.sampled_from(["transpose", "flatten", "merge", "split axis", "slice", "pad", "unsqueeze", "squeeze",
                                "split", "tile", "gather", "expand"])):  # fmt: skip
        case "transpose":
            return drawn.add("Transpose", [x], perm=draw(st.permutations(range(len(shape)))))
        case "flatten":
            return drawn.add("Flatten", [x], axis=draw(st.integers(0, len(shape))))
        case "merge":
            return drawn.add("Reshape", [x, integers(0, -1)])
        case "split axis":
            return drawn.add("Reshape", [x, integers(-1, *shape[1:-1], 2, shape[-1] // 2)])
        case "slice":
            axis = draw(st.integers(1, len(shape) - 1))
            return drawn.add("Slice", [x, integers(1), integers(draw(st.sampled_from([2, 99, -1]))), integers(axis)])
        case "pad":
            mode = draw(st.sampled_from(["constant", "reflect", "edge"]))
            pads = [0] * (2 * len(shape))
            pads[draw(st.integers(1, len(shape) - 1))] = draw(st.integers(-1, 2))
            return drawn.add("Pad", [x, integers(*pads)], mode=mode)
        case "unsqueeze":
            axes = [draw(st.integers(0, len(shape)))]
            return drawn.add("Unsqueeze", [x, integers(*axes)]) if drawn.opset >= 13 else drawn.add(
                "Unsqueeze", [x], axes=axes)  # fmt: skip
        case "squeeze":
            return drawn.add("Squeeze", [x])
        case "split":
            axis, first = draw(st.integers(1, len(shape) - 1)), 1
            sizes = [first, shape[axis] - first]
            if drawn.opset >= 13:
                return drawn.add("Split", [x, integers(*sizes)], 2, axis=axis)
            return drawn.add("Split", [x], 2, axis=axis, split=sizes)
        case "tile":
            return drawn.add("Tile", [x, integers(*[1] * (len(shape) - 1), 2)])
        case "gather":
            axis = draw(st.integers(1, len(shape) - 1))
            return drawn.add("Gather", [x, integers(0, shape[axis] - 1)], axis=axis)
        case _:
            return drawn.add("Expand", [x, integers(1, *[1] * len(shape))])


def _concat(draw: Draw, drawn: Drawn) -> list[str] | None:
    a = one_of(draw, drawn.floats(2))
    return drawn.add("Concat", [a, draw(st.sampled_from(drawn.floats(2)))], axis=-1) if a else None


def _linear(draw: Draw, drawn: Drawn) -> list[str] | None:
    x = one_of(draw, drawn.floats(2))
    if x is None:
        return None
    width, out = drawn.flow[x].shape[-1], draw(st.integers(1, 5))
    if drawn.flow[x].ndim == 2 and draw(st.booleans()):
        transposed = draw(st.booleans())
        weight = drawn.weight(draw, *((out, width) if transposed else (width, out)))
        bias = [drawn.store(numbers(draw, out))] if draw(st.booleans()) else []
        alpha = draw(st.sampled_from([1.0, 0.5]))
        return drawn.add("Gemm", [x, weight, *bias], transB=int(transposed), alpha=alpha)
    product = drawn.add("MatMul", [x, drawn.weight(draw, width, out)])
    if product is None or draw(st.booleans()):
        return product
    return drawn.add("Add", [*product, drawn.store(numbers(draw, out))])


def _windows(draw: Draw, drawn: Drawn) -> dict[str, Any]:
    kernel = draw(st.lists(st.integers(1, 3), min_size=2, max_size=2))
    attributes = {"kernel_shape": kernel, "strides": draw(st.lists(st.integers(1, 3), min_size=2, max_size=2))}
    match draw(st.sampled_from(["none", "pads", "same", "valid"])):
        case "pads":
            return attributes | {"pads": draw(st.lists(st.integers(0, 1), min_size=4, max_size=4))}
        case "same":
            return attributes | {"auto_pad": draw(st.sampled_from(["SAME_UPPER", "SAME_LOWER"]))}
        case "valid":
            return attributes | {"auto_pad": "VALID"}
        case _:
            return attributes


def _conv(draw: Draw, drawn: Drawn) -> list[str] | None:
    x = one_of(draw, drawn.floats(4, 4))
    if x is None:
        return None
    attributes, out = _windows(draw, drawn), draw(st.integers(1, 4))
    weight = drawn.store(numbers(draw, out, drawn.flow[x].shape[1], *attributes["kernel_shape"]))
    bias = [drawn.store(numbers(draw, out))] if draw(st.booleans()) else []
    made = drawn.add("Conv", [x, weight, *bias], **attributes)
    if made is None or draw(st.booleans()):
        return made
    parameters = [drawn.store(numbers(draw, out)) for _ in range(3)]
    variance = drawn.store(np.abs(numbers(draw, out)) + 0.5)
    return drawn.add("BatchNormalization", [*made, *parameters, variance])


def _pool(draw: Draw, drawn: Drawn) -> list[str] | None:
    x = one_of(draw, drawn.floats(4, 4))
    if x is None:
        return None
    kind = draw(st.sampled_from(["MaxPool", "AveragePool", "GlobalAveragePool"]))
    if kind == "GlobalAveragePool":
        return drawn.add(kind, [x])
    if draw(st.booleans()):
        pads = [0, 0, *draw(st.lists(st.integers(0, 2), min_size=2, max_size=2)), 0, 0, 0, 0]
        padded = drawn.add("Pad", [x, drawn.store(np.array(pads, np.int64))])
        x = padded[0] if padded is not None else x
    attributes = _windows(draw, drawn) | {"ceil_mode": draw(st.integers(0, 1))}
    if kind == "AveragePool":
        attributes["count_include_pad"] = draw(st.integers(0, 1))
    return drawn.add(kind, [x], **attributes)


def _norm(draw: Draw, drawn: Drawn) -> list[str] | None:
    x = one_of(draw, drawn.floats(2))
    if x is None:
        return None
    scale, bias = (drawn.store(numbers(draw, drawn.flow[x].shape[-1])) for _ in range(2))
    if drawn.opset >= 17 and draw(st.booleans()):
        return drawn.add("LayerNormalization", [x, scale, bias], axis=-1)
    axes: dict[str, Any] = {"axes": [-1]} if drawn.opset < 18 else {}
    last = [] if axes else [drawn.store(np.array([-1], np.int64))]
    eps, two = drawn.store(np.array(1e-5, np.float32)), drawn.store(np.array(2, np.float32))
    mean = drawn.add("ReduceMean", [x, *last], **axes)
    centred = mean and drawn.add("Sub", [x, *mean])
    square = centred and drawn.add("Pow", [*centred, two])
    variance = square and drawn.add("ReduceMean", [*square, *last], **axes)
    shifted = variance and drawn.add("Add", [*variance, eps])
    deviation = shifted and drawn.add("Sqrt", shifted)
    normal = deviation and centred and drawn.add("Div", [*centred, *deviation])
    scaled = normal and drawn.add("Mul", [*normal, scale])
    return scaled and drawn.add("Add", [*scaled, bias])


def _quantized(draw: Draw, drawn: Drawn) -> list[str] | None:
    """Quantize and dequantize with one scale, signed or not."""
    x = one_of(draw, drawn.floats())
    if x is None:
        return None
    signed, scale = draw(st.booleans()), drawn.store(np.array(draw(st.sampled_from([0.02, 0.05])), np.float32))
    zero = drawn.store(np.array(draw(st.sampled_from([0, 3])), np.int8) if signed
                       else np.array(draw(st.sampled_from([0, 100, 128])), np.uint8))  # fmt: skip
    steps = drawn.add("QuantizeLinear", [x, scale, zero])
    return None if steps is None else drawn.add("DequantizeLinear", [*steps, scale, zero])


def _quantized_linear(draw: Draw, drawn: Drawn) -> list[str] | None:
    """A linear of a dequantized weight, with one scale or one for each output."""
    x = one_of(draw, drawn.floats(2))
    if x is None:
        return None
    width, out = drawn.flow[x].shape[-1], draw(st.integers(1, 5))
    seed = np.random.default_rng(draw(st.integers(0, 99)))
    weight = drawn.store(seed.integers(-127, 127, (width, out)).astype(np.int8))
    rows = drawn.opset >= 13 and draw(st.booleans())
    scale = drawn.store((np.full(out, 0.01) + np.arange(out) / 500 if rows else np.array(0.01)).astype(np.float32))
    floats = drawn.add("DequantizeLinear", [weight, scale], **({"axis": 1} if rows else {}))
    return None if floats is None else drawn.add("MatMul", [x, *floats])


def _chosen(draw: Draw, drawn: Drawn) -> list[str] | None:
    x = one_of(draw, drawn.floats())
    if x is None:
        return None
    more = drawn.add("Greater", [x, drawn.store(np.array(0.125, np.float32))])
    return None if more is None else drawn.add("Where", [*more, x, drawn.store(np.array(-1, np.float32))])


def _dropout(draw: Draw, drawn: Drawn) -> list[str] | None:
    x = one_of(draw, drawn.floats())
    return drawn.add("Dropout", [x], draw(st.integers(1, 2))) if x else None


def _sized(draw: Draw, drawn: Drawn) -> list[str] | None:
    """A reshape to sizes that the graph computes."""
    x = one_of(draw, drawn.floats(2))
    shape = drawn.add("Shape", [x]) if x else None
    first = shape and drawn.add("Slice", [*shape, *(drawn.store(np.array([n], np.int64)) for n in (0, 1, 0))])
    sizes = first and drawn.add("Concat", [*first, drawn.store(np.array([-1], np.int64))], axis=0)
    return drawn.add("Reshape", [x, *sizes]) if x and sizes else None


MAKERS: Sequence[Maker] = (
    _unary, _binary, _clip, _softmax, _reduce, _move, _concat, _linear, _conv, _pool, _norm, _quantized,
    _quantized_linear, _chosen, _dropout, _sized,
)  # fmt: skip

_SHAPES = (("n", 4), ("n", 3, 4), ("n", 2, 4, 5), ("n", 1, 4), ("n", "s", 4), (3, 4))
_VERSIONS = (8, 3, 4, 7, 10)


@st.composite
def models(
    draw: Draw, makers: Sequence[Maker] = MAKERS, opsets: Sequence[int] = OPSETS, nodes: int = 8
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model with one or two inputs and up to about `nodes` nodes, and feeds for it at SIZES.

    Rejects models that the engine does not load, as a false inference of its own may refuse what each node does.
    """
    drawn = Drawn(draw(st.sampled_from(opsets)))
    for index in range(draw(st.integers(1, 2))):
        name, shape = f"x{index}", draw(st.sampled_from(_SHAPES))
        drawn.inputs[name] = shape
        drawn.flow[name] = numbers(draw, *sizes(shape, SIZES))
    for maker in draw(st.lists(st.sampled_from(makers), min_size=2, max_size=nodes)):
        maker(draw, drawn)
    read = {name for node in drawn.nodes for name in read_by(node)}
    made = [name for node in drawn.nodes for name in node.output]
    outputs = [name for name in made if name not in read]
    if not outputs:
        outputs = (drawn.add("Identity", [next(iter(drawn.inputs))]) or [])[:1]
        read |= set(drawn.inputs)
    drawn.stored = {name: array for name, array in drawn.stored.items() if name in read}
    feeds = {name: drawn.flow[name] for name in drawn.inputs}
    model = drawn.model(outputs, draw(st.sampled_from(_VERSIONS)))
    assume(runs(model, feeds) is not None)
    return model, feeds


def sizes(shape: Sequence[int | str], named: Mapping[str, int]) -> list[int]:
    return [named[size] if isinstance(size, str) else size for size in shape]


def read_by(node: onnx.NodeProto) -> set[str]:
    """The names that a node reads, also within its subgraphs."""
    names = set(node.input)
    for attribute in node.attribute:
        names |= {name for inner in attribute.g.node for name in read_by(inner)}
        names |= {output.name for output in attribute.g.output}
    return names


def runs(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> list[Any] | None:
    """The outputs in the engine without optimizations; None where it refuses the model or the feeds."""
    try:
        found: list[Any] = session(model).run(None, dict(feeds))
    except Exception:  # the engine's exceptions have no base of their own
        return None
    return found
