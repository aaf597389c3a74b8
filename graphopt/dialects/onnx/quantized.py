"""Models that came in quantized: an operator on integers becomes dequantize, a float op and quantize.

These are read: QOperator (QLinearConv and the like, QGemm), integer products followed by products with their scales
(MatMulInteger, ConvInteger), DynamicQuantizeLinear, and ONNX Runtime's contrib operators (DynamicQuantizeMatMul,
MatMulIntegerToFloat, MatMulNBits, GatherBlockQuantized). QAttention, which computes more than one op, stays opaque.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from graphopt.dialects.onnx.graph import OnnxGraph, OnnxNode, OnnxValue
from graphopt.dialects.onnx.spellings import PRODUCT_KINDS, STANDARD, spatial, window
from graphopt.errors import SpellingError
from graphopt.ir.graph import Node, Value
from graphopt.ir.ops import OPS
from graphopt.ir.qdq.regions import STORED
from graphopt.numerics import quantize

CONTRIB = "com.microsoft"
_INTEGERS = (torch.int8, torch.uint8)

Read = Callable[["_Site"], "Value | None"]


def raise_quantized(graph: OnnxGraph) -> None:
    """Replace operators on integers by ops; put quantize and dequantize in the form that rules look for. [changes]"""
    for native in list(graph.model.graph):
        if native.graph is not graph.model.graph:  # erased with the chain of an earlier one
            continue
        node = OnnxNode(graph, native)
        if native.domain in (*STANDARD, CONTRIB) and (reader := _READERS.get(native.op_type)) is not None:
            site = _Site(graph, node)
            try:
                value = reader(site)
            except SpellingError:  # the operator stays, as the file's opset has no ops for what it means
                continue
            if value is not None:
                graph.replace(site.end, value)
                site.erase_behind()
        elif node.kind in ("quantize", "dequantize"):
            _normalize(graph, node)


class _Site:
    """One operator on integers: access to its inputs by index, and to emitting ops at its place."""

    def __init__(self, graph: OnnxGraph, node: OnnxNode) -> None:
        self.graph, self.node = graph, node
        self.end = node
        """The node whose result the ops replace: the last one of a chain, such as the Mul after MatMulInteger."""
        self.chain: list[OnnxNode] = []
        self.attributes: Mapping[str, Any] = {a.name: a.value for a in node.native.attributes.values()}
        self._inputs = graph.values(node.native.inputs)

    def input(self, index: int) -> OnnxValue | None:
        return self._inputs[index] if index < len(self._inputs) else None

    def required(self, index: int) -> OnnxValue:
        value = self.input(index)
        assert value is not None  # required by the operator's schema
        return value

    @property
    def count(self) -> int:
        return len(self._inputs)

    def emit(self, kind: str, *operands: Value | None, **attributes: Any) -> OnnxValue:
        return self.graph.emit(kind, *operands, at=self.node, **attributes)

    def erase_behind(self) -> None:
        """Erase the nodes of the chain from its end, except those that others read."""
        for node in self.chain:
            if not any(result.users or result.is_output for result in node.results):
                self.graph.erase(node)

    def activation(self, index: int) -> OnnxValue:
        """Input `index`, dequantized with the scale and zero point that are the next two inputs."""
        return self.dequantized(self.required(index), self.required(index + 1), self.input(index + 2))

    def dequantized(self, x: Value, scale: Value, zero_point: Value | None) -> OnnxValue:
        return self.emit("dequantize", x, single(self.graph, scale), zero_point and single(self.graph, zero_point))

    def quantized(self, value: Value, scale: int) -> OnnxValue | None:
        """A value, quantized with input `scale` and the zero point after it; None without a zero point of 8 bits."""
        zero_point = self.input(scale + 1)
        if zero_point is None or zero_point.dtype not in _INTEGERS:
            return None
        return self.emit("quantize", value, single(self.graph, self.required(scale)), single(self.graph, zero_point))

    def weight(self, index: int, scale: Value | None, zero_point: Value | None, kn: bool = False) -> OnnxValue | None:
        """Input `index`, a stored weight (out, in, ...), dequantized with one scale or one per output.

        kn: whether it is stored as (in, out). None for a computed weight, and for scales along another axis.
        """
        graph = self.graph
        integers = _constant(graph, self.input(index))
        scales, zeros = _constant(graph, scale), _constant(graph, zero_point)
        if integers is None or scales is None or (zero_point is not None and zeros is None):
            return None
        integers = integers.t().contiguous() if kn else integers
        out = integers.shape[0]
        if integers.dtype not in _INTEGERS or scales.numel() not in (1, out) or scales.dtype is not torch.float32:
            return None
        zeros = None if zeros is None or not bool(zeros.any()) else zeros
        if zeros is None and integers.dtype is torch.uint8:
            zeros = torch.zeros((), dtype=torch.uint8)
        if zeros is not None and zeros.numel() not in (1, out):
            return None
        wide = max(scales.numel(), 1 if zeros is None else zeros.numel()) > 1
        shape = (out,) if wide else ()
        operands = [None if one is None else _spread(one, shape) for one in (scales, zeros)]
        stored = [None if one is None else graph.add_constant(one) for one in (integers, *operands)]
        return self.emit("dequantize", *stored, axis=0 if wide else None)

    def bias(self, index: int, scale: Value, weight_scale: Value) -> Value | None:
        """Input `index`, int32 in units of scale · weight_scale, as floats; None where the input is left out.

        Raises _Computed where one of the three is computed by the graph.
        """
        steps = self.input(index)
        if steps is None:
            return None
        tensors = [_constant(self.graph, value) for value in (steps, scale, weight_scale)]
        if any(tensor is None for tensor in tensors):
            raise _Computed
        integers, one, other = (tensor for tensor in tensors if tensor is not None)
        return self.graph.add_constant((integers.double() * one.double() * other.double()).float().reshape(-1))


class _Computed(Exception):
    """A bias, or its scale, is not stored but computed by the graph."""


def _constant(graph: OnnxGraph, value: Value | None) -> Tensor | None:
    """A stored tensor, also behind a transpose, which some exporters put in front of each product."""
    if value is None:
        return None
    maker = value.producer
    if maker is None or maker.kind != "transpose" or not maker.input.is_constant:
        return graph.constant(value)
    stored = graph.constant(maker.input)
    return None if stored is None else stored.permute(maker.attributes["perm"]).contiguous()


def _spread(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor.reshape(-1).expand(shape).contiguous() if shape else tensor.reshape(())


def single(graph: OnnxGraph, value: Value) -> Value:
    """A stored parameter of shape (1,), which some files have, as a scalar; any other as it is."""
    tensor = graph.constant(value) if value.shape == (1,) else None
    return value if tensor is None else graph.add_constant(tensor.reshape(()), value.name)


def _normalize(graph: OnnxGraph, node: OnnxNode) -> None:
    """Parameters of one element as scalars (but of a weight with one output), weights without a zero point of 0, and
    int32 biases in floats."""
    if node.result.is_output:
        return
    tensors = [_constant(graph, value) for value in node.operands]
    x, *parameters = node.operands
    stored = all(tensor is not None for value, tensor in zip(node.operands, tensors, strict=True) if value is not None)
    if node.kind == "dequantize" and stored and x is not None and x.dtype is torch.int32:
        value = OPS["dequantize"].reference(*tensors, **node.attributes)
        graph.replace(node, graph.add_constant(value, node.name))
        return
    axis = node.attributes["axis"]
    per_slice = stored and axis is not None and x is not None and (x.shape or ())[axis] == 1
    normal = [value if value is None or per_slice else single(graph, value) for value in parameters]
    if node.kind == "dequantize" and stored and x is not None and x.dtype is torch.int8 and len(tensors) == 3:
        normal[1] = None if tensors[2] is not None and not bool(tensors[2].any()) else normal[1]
    if normal != list(parameters):
        attributes = dict(node.attributes) | ({"axis": None} if normal[0] is not None and normal[0].rank == 0 else {})
        graph.replace(node, graph.emit(node.kind, x, *normal, at=node, **attributes))


def dequantized_weight(graph: OnnxGraph, value: OnnxValue | None, kn: bool, at: OnnxNode) -> OnnxValue | None:
    """A stored matrix that is read through a DequantizeLinear, and possibly Transposes, as (out, in); None for others.

    kn: whether the reader takes it as (in, out); then its integers are stored again, transposed.
    """
    maker = value.native.producer() if value is not None else None
    while maker is not None and maker.op_type == "Transpose" and maker.domain in STANDARD:
        source = maker.inputs[0]
        if source is None or len(source.shape or ()) != 2:
            return None
        kn, value, maker = not kn, OnnxValue(graph, source), source.producer()
    node = OnnxNode(graph, maker) if maker is not None else None
    if value is None or node is None or node.kind != "dequantize" or value.rank != 2:
        return None
    tensors = [_constant(graph, operand) for operand in node.operands]
    if any(tensor is None and operand is not None for tensor, operand in zip(tensors, node.operands, strict=True)):
        return None
    if not kn:
        return value
    axis = node.attributes["axis"]
    parts = [None if t is None else graph.add_constant(t.t().contiguous() if t.dim() == 2 else t) for t in tensors]
    return graph.emit(node, *parts, at=at, axis=None if axis is None else 1 - axis)


# --- products ------------------------------------------------------------------------------------------------------


def _read_conv(site: _Site) -> Value | None:
    found = spatial(site.node.native, site.required(3))
    weight = site.weight(3, site.input(4), site.input(5)) if found is not None else None
    if weight is None or found is None:
        return None
    try:
        bias = site.bias(8, site.required(1), site.required(4))
    except _Computed:
        return None
    if not site.attributes.get("channels_last", 0):
        return site.quantized(site.emit("conv", site.activation(0), weight, bias, **found), 6)
    rank = len(found["stride"]) + 2
    x = site.emit("transpose", site.activation(0), perm=(0, rank - 1, *range(1, rank - 1)))
    y = site.quantized(site.emit("conv", x, weight, bias, **found), 6)
    return y and site.emit("transpose", y, perm=(0, *range(2, rank), 1))


def _read_matmul(site: _Site) -> Value | None:
    weight = site.weight(3, site.input(4), site.input(5), kn=True) if site.required(3).rank == 2 else None
    if weight is not None:
        return site.quantized(site.emit("linear", site.activation(0), weight), 6)
    if not _is_one(site.required(4)):
        return None
    return site.quantized(site.emit("matmul", site.activation(0), site.activation(3)), 6)


def _is_one(scale: OnnxValue) -> bool:
    return scale.rank in (0, None) or scale.shape == (1,)


def _read_gemm(site: _Site) -> Value | None:
    if site.attributes.get("transA", 0) or site.attributes.get("alpha", 1.0) != 1.0:
        return None
    weight = site.weight(3, site.input(4), site.input(5), kn=not site.attributes.get("transB", 0))
    try:
        bias = site.bias(6, site.required(1), site.required(4))
    except _Computed:
        return None
    if weight is None or (bias is not None and bias.shape != (weight.shape or ())[:1]):
        return None
    y = site.emit("linear", site.activation(0), weight, bias)
    return y if site.input(7) is None else site.quantized(y, 7)


def _read_integer_to_float(site: _Site) -> Value | None:
    right, scale = site.required(1), site.required(3)
    weight = site.weight(1, scale, site.input(5), kn=True) if right.rank == 2 else None
    if weight is None and (right.is_constant or site.input(6) is not None or not _is_one(scale)):
        return None
    x = site.dequantized(site.required(0), site.required(2), site.input(4))
    if weight is None:
        return site.emit("matmul", x, site.dequantized(right, scale, site.input(5)))
    return site.emit("linear", x, weight, site.input(6))


def _read_dynamic_matmul(site: _Site) -> Value | None:
    weight = site.weight(1, site.input(2), site.input(3), kn=True)
    if weight is None:
        return None
    x = site.required(0)
    scale, zero_point = site.graph.emit_all("choose_qparams", x, at=site.node)
    steps = site.emit("quantize", x, scale, zero_point)
    return site.emit("linear", site.dequantized(steps, scale, zero_point), weight, site.input(4))


def _read_integer_product(site: _Site) -> Value | None:
    """x · w in int32, cast to float, and multiplied by scale · weight_scale."""
    conv = site.node.native.op_type == "ConvInteger"
    cast = _only_reader(site.node, "Cast")
    scaled = _only_reader(cast, "Mul") if cast is not None and cast.result.dtype is torch.float32 else None
    if cast is None or scaled is None:
        return None
    factor = next(value for value in site.graph.values(scaled.native.inputs) if value != cast.result)
    scales = _factors(site.graph, factor)
    found = spatial(site.node.native, site.required(1)) if conv else {}
    if scales is None or found is None:
        return None
    scale, weight_scale = scales
    weight = site.weight(1, weight_scale, site.input(3), kn=not conv)
    if weight is None or (weight_scale.rank or 0) > (0 if conv and weight_scale.shape != (1,) else 1):
        return None
    site.node, site.end, site.chain = scaled, scaled, [cast, site.node]
    x = site.dequantized(site.required(0), scale, site.input(2))
    return site.emit("conv" if conv else "linear", x, weight, **found)


def _factors(graph: OnnxGraph, factor: OnnxValue | None) -> tuple[OnnxValue, OnnxValue] | None:
    """The two factors of scale · weight_scale: the scale of activations, and the stored scale of the weight."""
    maker = factor.native.producer() if factor is not None else None
    if maker is None or maker.op_type != "Mul":
        return None
    a, b = graph.values(maker.inputs)
    if a is None or b is None:
        return None
    a, b = (b, a) if a.is_constant and not b.is_constant else (a, b)
    return (a, b) if b.is_constant and (a.rank == 0 or a.shape == (1,)) else None


def _only_reader(node: OnnxNode, op_type: str) -> OnnxNode | None:
    user = node.result.only_user
    if not isinstance(user, OnnxNode) or user.native.op_type != op_type or user.native.domain not in STANDARD:
        return None
    return user


# --- activations ---------------------------------------------------------------------------------------------------


def _read_dynamic_quantize(site: _Site) -> Value | None:
    """It has three results: quantize computes the first one, choose_qparams the scale and the zero point."""
    x = site.required(0)
    scale, zero_point = site.graph.emit_all("choose_qparams", x, at=site.node)
    steps = site.emit("quantize", x, scale, zero_point)
    site.graph.replace(site.node, steps, scale, zero_point)
    return None


def _read_binary(op: str) -> Read:
    return lambda site: site.quantized(site.emit(op, site.activation(0), site.activation(3)), 6)


def _read_unary(op: str, **attributes: str) -> Read:
    """(x, scale, zero point, scale and zero point of the result); attributes: of the op, by the operator's names."""

    def read_one(site: _Site) -> Value | None:
        if site.input(4) is None:
            return None
        given = {key: site.attributes[name] for key, name in attributes.items() if name in site.attributes}
        return site.quantized(site.emit(op, site.activation(0), **given), 3)

    return read_one


def _read_softmax(site: _Site) -> Value | None:
    """Before opset 13 it was over all axes from `axis` on; that is the op only where `axis` is the last one."""
    rank, axis = site.required(0).rank, site.attributes.get("axis", -1)
    if site.attributes["opset"] < 13 and axis != -1 and (rank is None or axis != rank - 1):
        return None
    return _read_unary("softmax", axis="axis")(site)


def _read_concat(site: _Site) -> Value | None:
    parts = [site.activation(index) for index in range(2, site.count, 3)]
    return site.quantized(site.emit("concat", *parts, axis=site.attributes["axis"]), 0)


def _read_average_pool(site: _Site) -> Value | None:
    found = window(site.node.native)
    if found is None or site.attributes.get("channels_last", 0):
        return None
    include = bool(site.attributes.get("count_include_pad", 0))
    return site.quantized(site.emit("average_pool", site.activation(0), **found, include_pad=include), 3)


def _read_global_average_pool(site: _Site) -> Value | None:
    rank = site.required(0).rank
    if rank is None or rank < 3 or site.attributes.get("channels_last", 0):
        return None
    axes = tuple(range(2, rank))
    return site.quantized(site.emit("mean", site.activation(0), axes=axes, keepdim=True), 3)


# --- weights alone -------------------------------------------------------------------------------------------------


def _read_nbits(site: _Site) -> Value | None:
    bits, block = site.attributes["bits"], site.attributes["block_size"]
    out, into = site.attributes["N"], site.attributes["K"]
    if site.input(4) is not None or bits not in (2, 4, 8):  # g_idx: columns in another order
        return None
    blocks = -(-into // block)
    packed = _constant(site.graph, site.required(1))
    if packed is None or packed.dtype is not torch.uint8:
        return None
    integers = quantize.unpack(packed.reshape(out, blocks, -1), bits, block).reshape(out, -1)[:, :into]
    weight = _blocks(site, integers, blocks, site.required(2), site.input(3), bits, block)
    return None if weight is None else site.emit("linear", site.required(0), weight, site.input(5))


def _read_gather_blocks(site: _Site) -> Value | None:
    table = site.required(0)
    integers, axis = _constant(site.graph, table), site.attributes.get("quantize_axis", 1)
    if integers is None or integers.dim() != 2 or axis not in (1, -1) or site.attributes.get("gather_axis", 0):
        return None
    bits, block = site.attributes.get("bits", 4), site.attributes.get("block_size", 128)
    if table.native.dtype != ir.DataType.UINT8:  # integers of 4 bits, whose zero point is 0 where none is given
        return None
    integers = quantize.unpack(integers, bits, integers.shape[1] * 8 // bits)
    blocks = -(-integers.shape[1] // block)
    rows = _blocks(site, integers, blocks, site.required(2), site.input(3), bits, block)
    return None if rows is None else site.emit("embedding", rows, site.required(1))


def _blocks(
    site: _Site, integers: Tensor, blocks: int, scale: Value, zero_point: Value | None, bits: int, block: int
) -> OnnxValue | None:
    """Unsigned integers (rows, columns), dequantized in blocks; without packed zero points they are half the range."""
    graph, rows = site.graph, integers.shape[0]
    scales, zeros = _constant(graph, scale), _constant(graph, zero_point)
    if scales is None or scales.dtype is not torch.float32:
        return None
    if zero_point is None:
        integers, unpacked = (integers.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8), None
    elif zeros is None or zeros.dtype is not torch.uint8:
        return None
    else:
        unpacked = graph.add_constant(quantize.unpack(zeros.reshape(rows, -1), bits, blocks).contiguous())
    held = graph.add_constant(integers.contiguous()), graph.add_constant(scales.reshape(rows, blocks).contiguous())
    return site.emit("dequantize", *held, unpacked, axis=1, block=block, bits=bits)


def _read_stored(site: _Site) -> Value | None:
    """Integers that are cast, shifted and scaled, as weights are stored where no operator reads integers."""
    for place in (0, 1):
        maker, scale = site.required(place).producer, _constant(site.graph, site.required(1 - place))
        shift: Tensor | None = torch.zeros(())
        if maker is not None and maker.kind == "sub":
            shift, maker = _constant(site.graph, maker.operands[1]), maker.required("a").producer
        if maker is None or maker.kind != "cast" or scale is None or shift is None:
            continue
        integers = _constant(site.graph, maker.input)
        if integers is None or integers.dtype not in _INTEGERS or scale.dtype is not torch.float32:
            continue
        zero_point = shift.to(integers.dtype)
        if not torch.equal(zero_point.float(), shift) or not _is_weight(site.node.result):
            continue
        axes = [_axes(one, integers) for one in (scale, zero_point)]
        if axes[0] is None or axes[1] is None or len({*axes[0], *axes[1]}) > 1:
            continue
        axis = next(iter((*axes[0], *axes[1])), None)
        shape = () if axis is None else (integers.shape[axis],)
        needed = integers.dtype is torch.uint8 or bool(zero_point.any())
        parameters = [_spread(scale, shape), _spread(zero_point, shape) if needed else None]
        stored = [None if one is None else site.graph.add_constant(one) for one in parameters]
        return site.emit("dequantize", maker.input, *stored, axis=axis)
    return None


def _axes(parameter: Tensor, integers: Tensor) -> list[int] | None:
    """The axes along which a scale or zero point differs; None where it is no such parameter of the integers."""
    along = [axis for axis, size in enumerate(parameter.shape) if size > 1]
    if not along:
        return [] if parameter.dim() <= integers.dim() else None
    fits = parameter.dim() == integers.dim() and all(parameter.shape[axis] == integers.shape[axis] for axis in along)
    return along if fits else None


def _is_weight(value: Value) -> bool:
    """Whether a value is read as a stored weight alone: by layers that store it so, and as the matrix of linears."""
    if value.is_output or not value.users:
        return False
    return all(user.kind in STORED or _is_matrix(value, user) for user in value.users)


def _is_matrix(value: Value, user: Node) -> bool:
    """Whether a linear reads a value as its matrix, through transposes or not."""
    if value.rank != 2:
        return False
    if user.kind == "transpose":
        result = user.result
        return bool(result.users) and not result.is_output and all(_is_matrix(result, one) for one in result.users)
    reads = [place for place, operand in enumerate(user.operands) if operand == value]
    x = user.operands[0]
    return user.kind in PRODUCT_KINDS and reads == [1] and x is not None and not x.is_constant


_READERS: dict[str, Read] = {
    "Mul": _read_stored,
    "QLinearConv": _read_conv,
    "QLinearMatMul": _read_matmul,
    "QGemm": _read_gemm,
    "MatMulIntegerToFloat": _read_integer_to_float,
    "DynamicQuantizeMatMul": _read_dynamic_matmul,
    "MatMulInteger": _read_integer_product,
    "ConvInteger": _read_integer_product,
    "DynamicQuantizeLinear": _read_dynamic_quantize,
    "QLinearAdd": _read_binary("add"),
    "QLinearMul": _read_binary("mul"),
    "QLinearSigmoid": _read_unary("sigmoid"),
    "QLinearLeakyRelu": _read_unary("leaky_relu", slope="alpha"),
    "QLinearSoftmax": _read_softmax,
    "QLinearConcat": _read_concat,
    "QLinearAveragePool": _read_average_pool,
    "QLinearGlobalAveragePool": _read_global_average_pool,
    "MatMulNBits": _read_nbits,
    "GatherBlockQuantized": _read_gather_blocks,
}


_FORMS = {
    "QDQ": {"QuantizeLinear"},
    "QOperator": {name for name in _READERS if name.startswith("Q")} | {"MatMulIntegerToFloat", "QAttention"},
    "scales chosen at run time": {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "ConvInteger", "MatMulInteger"},
    "weights alone": {"MatMulNBits", "GatherBlockQuantized"},
}
"""How a file was quantized, and the operators that show it."""


def note(model: ir.Model | onnx.ModelProto, graph: OnnxGraph) -> str | None:
    """What a report says of a model that came in quantized: how, and which ops read integers. None for other models."""
    native = model.graph.node if isinstance(model, onnx.ModelProto) else model.graph
    types = {node.op_type for node in native if node.domain in (*STANDARD, CONTRIB)}
    forms = [form for form, members in _FORMS.items() if types & members]
    ops = Counter(node.kind for node in graph.nodes if node.op is not None and _reads_integers(node))
    if not forms and (ops or "DequantizeLinear" in types):
        forms = ["weights alone"]
    if not forms:
        return None
    opaque = Counter(node.native.op_type for node in graph.nodes if isinstance(node, OnnxNode) and _is_opaque(node))
    found = ", ".join(f"{count} {kind}" for kind, count in sorted(ops.items())) or "no op"
    left = f"; left as they are: {', '.join(f'{n} {kind}' for kind, n in sorted(opaque.items()))}" if opaque else ""
    return f"this file is quantized already ({', '.join(forms)}): {found}{left}"


def rounds_activations(model: ir.Model | onnx.ModelProto) -> bool:
    """Whether a model has MatMulNBits that round activations to int8 by block (accuracy_level 4)."""
    if isinstance(model, ir.Model):
        given = [node.attributes.get("accuracy_level") for node in model.graph if node.op_type == "MatMulNBits"]
        return any(level is not None and level.as_int() == 4 for level in given)
    nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    return any(one.name == "accuracy_level" and one.i == 4 for node in nodes for one in node.attribute)


def _reads_integers(node: Node) -> bool:
    made = [value.producer for value in node.operands if value is not None]
    return node.kind not in ("quantize", "dequantize") and any(m is not None and m.kind == "dequantize" for m in made)


def _is_opaque(node: OnnxNode) -> bool:
    """Whether a node is an operator on integers that is not read as an op."""
    known = {*_READERS, *set().union(*_FORMS.values()), "DequantizeLinear"}
    return node.op is None and node.native.op_type in known
