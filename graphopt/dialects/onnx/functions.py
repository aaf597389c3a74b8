"""Function bodies of the ops that ONNX has no operator for.

An op has one body per variant: `linear__bias_kn` is linear with a bias and a weight that is stored as (in, out).
Variants are needed because a function cannot leave out an operand, and because a Transpose of the weight would copy it
at each run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import onnx
import onnx_ir as ir

from graphopt.dialects.onnx.spellings import DOMAIN, STANDARD, Spelled
from graphopt.dialects.onnx.versions import misfit
from graphopt.errors import GraphError

_CONV = "strides = @strides, pads = @pads, dilations = @dilations, group = @group"
_LINEAR_INT8 = {
    # DequantizeLinear + MatMul is what engines fold when scales are known; MatMulInteger when they are not.
    "static": "xf = DequantizeLinear(x, scale, zero_point) {floats} {t} m = MatMul(xf, {w})",
    "dynamic": "{t} {product} xf = Cast<to=1>(xi) s = Mul(scale, weight_scale) m = Mul(xf, s)",
    # One product after the other: of both scales together, ONNX Runtime reads the first row's for all rows.
    "rows": "{t} {product} xf = Cast<to=1>(xi) r = Mul(xf, weight_scale) m = Mul(r, scale)",
}
_PRODUCT = "xi = MatMulInteger(x, {w}, zero_point)"
_IN_HALVES = (
    "two = Constant<value = int32 {{2}}>() wi = Cast<to=6>({w}) half = Div(wi, two) rest = Sub(wi, half) "
    "w1 = Cast<to=3>(half) w2 = Cast<to=3>(rest) x1 = MatMulInteger(x, w1, zero_point) "
    "x2 = MatMulInteger(x, w2, zero_point) xi = Add(x1, x2)"
)
"""The same product as the sum of two, each with about half of every weight: pairs of products then fit in 16 bits."""


def _linear_body(bias: bool, kn: bool) -> tuple[str, str]:
    transposed = "" if kn else "wt = Transpose<perm=[1,0]>(weight)"
    product = "m = MatMul(x, weight)" if kn else "m = MatMul(x, wt)"
    finish = "y = Add(m, bias)" if bias else "y = Identity(m)"
    return f"(x, weight{', bias' if bias else ''}) => (y)", f"{transposed} {product} {finish}"


def _linear_int8_body(bias: bool, kn: bool, form: str, opset: int, in_halves: bool) -> tuple[str, str]:
    source = "wf" if form == "static" else "weight"
    transposed = "" if kn else f"wt = Transpose<perm=[1,0]>({source})"
    floats = f"wf = DequantizeLinear<axis={1 if kn else 0}>(weight, weight_scale)"
    if opset < 13:
        columns = "wx = Cast<to = 1>(weight) wf = Mul(wx, weight_scale)"
        floats = columns if kn else _rows("weight", "weight_scale", "wf", 2)
    weight = source if kn else "wt"
    product = (_IN_HALVES if in_halves else _PRODUCT).format(w=weight)
    body = _LINEAR_INT8[form].format(floats=floats, t=transposed, product=product, w=weight)
    finish = "y = Add(m, bias)" if bias else "y = Identity(m)"
    inputs = f"(x, scale, zero_point, weight, weight_scale{', bias' if bias else ''}) => (y)"
    return inputs, f"{body} {finish}"


def _rows(x: str, scale: str, y: str, rank: int, zero_point: str | None = None) -> str:
    """Integers dequantized by one scale for each slice along an axis: DequantizeLinear has one for all before opset 13.

    The texts name values of the body. rank: the number of axes of x from that one on.
    """
    column = f"Unsqueeze<axes = {list(range(1, rank))}>" if rank > 1 else "Identity"
    shift = "d = Identity(f)"
    if zero_point is not None:
        shift = f"z = Cast<to = 1>({zero_point}) zr = {column}(z) d = Sub(f, zr)"
    return f"f = Cast<to = 1>({x}) s = {column}({scale}) {shift} {y} = Mul(d, s)"


def why_not_spelled(spelled: Spelled, opset: int, inputs: Sequence[ir.Value | None]) -> str | None:
    """Why a node that is to be made cannot be written at an opset; None where it can.

    inputs: of the node. Of a function, all that its body calls is looked at.
    """
    if spelled.domain == DOMAIN:
        return _body_misfit(spelled.op_type, opset)
    if spelled.domain not in STANDARD:
        return None
    left_out = [place for place, one in enumerate(inputs) if one is None]
    dtypes = [None if one is None else one.dtype for one in inputs]
    return misfit(spelled.op_type, opset, spelled.attributes, dtypes, left_out)


@cache
def _body_misfit(op_type: str, opset: int) -> str | None:
    found = (misfit(node.op_type, opset, node.attributes, [None] * len(node.inputs))
             for node in function(op_type, opset))  # fmt: skip
    reason = next((one for one in found if one is not None), None)
    return None if reason is None else f"{op_type.partition('__')[0]} cannot be written: {reason}"


def function(op_type: str, opset: int, in_halves: bool = False) -> ir.Function:
    """The function that a node of domain graphopt calls, at an opset. Raises GraphError for an unknown op.

    in_halves: whether products of integers are the sum of two, each with half of every weight. They are exact then on
    a CPU that adds two products in 16 bits, and take twice as long.
    """
    name, _, suffix = op_type.partition("__")
    variant = suffix.split("_")
    bias, kn = "bias" in variant, "kn" in variant
    rank = next((int(part) for part in variant if part.isdigit()), 0)
    attributes = ""
    if name == "linear":
        signature, body = _linear_body(bias, kn)
    elif name == "linear_int8":
        form = next((one for one in _LINEAR_INT8 if one in variant), "dynamic")
        signature, body = _linear_int8_body(bias, kn, form, opset, in_halves)
    elif name == "conv_int8":
        attributes = "<strides, pads, dilations, group>"
        given = "x, scale, zero_point, weight, weight_scale, y_scale, y_zero_point" + (", bias" if bias else "")
        signature = f"({given}) => (y)"
        floats = "wf = DequantizeLinear<axis=0>(weight, weight_scale)"
        body = (
            f"xf = DequantizeLinear(x, scale, zero_point) "
            f"{floats if opset >= 13 else _rows('weight', 'weight_scale', 'wf', rank)} "
            f"c = Conv<{_CONV}>(xf, wf{', bias' if bias else ''}) y = QuantizeLinear(c, y_scale, y_zero_point)"
        )
    elif "row" in variant:
        signature, body = _row_body(name, "shifted" in variant)
    elif name == "dequantize":
        attributes, given = "<axis, block_size, bits>", "x, scale" + (", zero_point" if "shifted" in variant else "")
        block = ", block_size = @block_size" if opset >= 21 else ""
        signature, body = f"({given}) => (y)", f"y = DequantizeLinear<axis = @axis{block}>({given})"
        if "rows" in variant:
            body = _rows("x", "scale", "y", rank, "zero_point" if "shifted" in variant else None)
        if "blocks" in variant:
            body = _BLOCKS + ("zf = Cast<to=1>(z) d = Sub(xf, zf)" if "shifted" in variant else "d = Identity(xf)")
            body = body.replace("{z}", "z = Unsqueeze(zero_point, last)" if "shifted" in variant else "") + _JOINED
    elif name == "row_scale":
        attributes, (signature, body) = "<largest>", _ROW_SCALE
        body = body.replace("{most}", "ReduceMax(a, last)" if opset >= 18 else "ReduceMax<axes = [-1]>(a)")
    elif name == "attention":
        attributes = "<scale, causal, heads, kv_heads>"
        signature, body = _ATTENTION_OVER_QUERIES
    elif name == "rotary":
        attributes = "<interleaved, heads, turned>"
        signature, body = _ROTARY_OVER_BATCH
    elif name in _FIXED:
        signature, body = _FIXED[name]
    else:
        raise GraphError(f"there is no ONNX function for {op_type!r}")
    text = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]> {op_type} {attributes} {signature} {{ {body} }}'
    return ir.serde.deserialize_function(_parse(text))


def _row_body(name: str, shifted: bool) -> tuple[str, str]:
    """quantize or dequantize with a scale for each row: by a scale of 1, and a division or product beside it."""
    one = "one = Constant<value_float = 1.0>()"
    zero = "" if shifted else "n = Constant<value_float = 0.0>() zero_point = Cast<to = 3>(n)"  # int8
    signature = f"(x, scale{', zero_point' if shifted else ''}) => (y)"
    if name == "quantize":
        return signature, f"{one} {zero} s = Div(x, scale) y = QuantizeLinear(s, one, zero_point)"
    return signature, f"{one} {zero} s = DequantizeLinear(x, one, zero_point) y = Mul(s, scale)"


_BLOCKS = (
    "last = Constant<value_ints = [2]>() first = Constant<value_ints = [0]>() all = Constant<value_ints = [0, -1]>() "
    "size = Constant<value_int = @block_size>() sizes = Unsqueeze(size, first) cut = Concat<axis = 0>(all, sizes) "
    "xb = Reshape(x, cut) xf = Cast<to=1>(xb) s = Unsqueeze(scale, last) {z} "
)
_JOINED = " m = Mul(d, s) shape = Shape(x) y = Reshape(m, shape)"
"""The rows of a matrix, cut into blocks, and joined again after the product."""

_ROW_SCALE = (
    "(x) => (scale)",
    "a = Abs(x) last = Constant<value_ints = [-1]>() m = {most} n = Constant<value_float = @largest>() s = Div(m, n) "
    "none = Constant<value_float = 0.0>() one = Constant<value_float = 1.0>() zero = Equal(s, none) "
    "scale = Where(zero, one, s)",
)

_ATTENTION_OVER_QUERIES = (
    "(query, key, value, mask) => (y)",
    "n = Shape<start = -2, end = -1>(query) one = Constant<value_ints = [1]>() rows = Concat<axis = 0>(n, one) "
    "all = Expand(mask, rows) y = Attention<scale = @scale, is_causal = @causal, q_num_heads = @heads, "
    "kv_num_heads = @kv_heads>(query, key, value, all)",
)

_ROTARY_OVER_BATCH = (
    "(x, cos, sin) => (y)",
    "n = Shape<start = 0, end = 1>(x) rest = Shape<start = 1>(cos) sizes = Concat<axis = 0>(n, rest) "
    "c = Expand(cos, sizes) s = Expand(sin, sizes) "
    "y = RotaryEmbedding<interleaved = @interleaved, num_heads = @heads, rotary_embedding_dim = @turned>(x, c, s)",
)

_FIXED = {
    "silu": ("(x) => (y)", "s = Sigmoid(x) y = Mul(x, s)"),
    "hard_swish": ("(x) => (y)", "s = HardSigmoid<alpha = 0.16666667, beta = 0.5>(x) y = Mul(x, s)"),
    "rsqrt": ("(x) => (y)", "s = Sqrt(x) y = Reciprocal(s)"),
    "choose_qparams": ("(x) => (scale, zero_point)", "q, scale, zero_point = DynamicQuantizeLinear(x)"),
    "add_int8": (
        "(a, a_scale, a_zero_point, b, b_scale, b_zero_point, y_scale, y_zero_point) => (y)",
        "af = DequantizeLinear(a, a_scale, a_zero_point) bf = DequantizeLinear(b, b_scale, b_zero_point) "
        "s = Add(af, bf) y = QuantizeLinear(s, y_scale, y_zero_point)",
    ),
}


_REFERENCES = {
    "strides": "ints", "pads": "ints", "dilations": "ints", "group": "int", "scale": "float", "causal": "int",
    "heads": "int", "kv_heads": "int", "interleaved": "int", "turned": "int",
    "axis": "int", "block_size": "int", "largest": "float",
}  # fmt: skip


def _parse(text: str) -> onnx.FunctionProto:
    # The parser takes the type of a referenced attribute from its annotation.
    typed = re.sub(r" = @(\w+)", lambda found: f": {_REFERENCES[found[1]]} = @{found[1]}", text)
    return onnx.parser.parse_function(typed)
