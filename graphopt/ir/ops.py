"""The vocabulary: what passes match and emit, whatever the dialect.

An op is declared by a function: its positional parameters are the operands (optional ones default to None), its
keyword-only parameters are the attributes with their defaults, and its body is the reference meaning in torch. An op
with *values for its operands is variadic: it takes one or more.
The first group is what passes rewrite; the second is named so that decomposed forms of the first can be recognized.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Reference = TypeVar("Reference", bound=Callable[..., Any])

_OPS: dict[str, Op] = {}
OPS: Mapping[str, Op] = MappingProxyType(_OPS)
"""Every op by its name."""


@dataclass(frozen=True)
class Op:
    """One operator of the canonical ops."""

    name: str
    operands: tuple[str, ...]
    optional: frozenset[str]
    attributes: Mapping[str, Any]
    results: tuple[str, ...]
    reference: Callable[..., Any]
    commutative: bool = False
    variadic: bool = False

    def __repr__(self) -> str:
        return self.name

    def names(self, count: int) -> tuple[str, ...]:
        """What each operand is called, where `count` are given: a variadic op repeats its one name, at least once."""
        return self.operands * max(count, 1) if self.variadic else self.operands


def _declare(
    reference: Callable[..., Any], results: tuple[str, ...], commutative: bool
) -> None:
    parameters = inspect.signature(reference).parameters.values()
    operands = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    name = reference.__name__.rstrip("_")
    _OPS[name] = Op(
        name=name,
        operands=tuple(p.name for p in operands),
        optional=frozenset(p.name for p in operands if p.default is None),
        attributes=MappingProxyType({p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}),
        results=results,
        reference=reference,
        commutative=commutative,
        variadic=any(p.kind is p.VAR_POSITIONAL for p in operands),
    )


def op(*, results: tuple[str, ...] = ("y",), commutative: bool = False) -> Callable[[Reference], Reference]:
    """Declare the decorated function as an op (see the module's docstring)."""

    def declare(reference: Reference) -> Reference:
        _declare(reference, results, commutative)
        return reference

    return declare


# --- what passes rewrite -------------------------------------------------------------------------------------------


@op()
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in), weight (out, in), bias (out,) -> (..., out)."""
    return F.linear(x, weight, bias)


@op()
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, ...] = (),
    padding: tuple[int, ...] = (),
    dilation: tuple[int, ...] = (),
    groups: int = 1,
) -> Tensor:
    """x (N, C, *space), weight (out, C/groups, *kernel); padding is (begin of each axis ..., end of each axis ...)."""
    rank = weight.dim() - 2
    function = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    return function(_padded(x, padding), weight, bias, stride or (1,) * rank, 0, dilation or (1,) * rank, groups)


@op()
def max_pool(
    x: Tensor,
    *,
    kernel: tuple[int, ...] = (),
    stride: tuple[int, ...] = (),
    padding: tuple[int, ...] = (),
    dilation: tuple[int, ...] = (),
    ceil: bool = False,
) -> Tensor:
    """The largest entry of each window of x (N, C, *space), which padding never is.

    stride, padding and dilation are as in conv. ceil keeps a last window that hangs over the end, if it starts before
    the end's padding.
    """
    lowest = -torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    stride, dilation = stride or (1,) * len(kernel), dilation or (1,) * len(kernel)
    x = F.pad(_padded(x, padding, lowest), _overhang(x, kernel, stride, padding, dilation, ceil), value=lowest)
    return (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1](x, kernel, stride, 0, dilation)


@op()
def average_pool(
    x: Tensor,
    *,
    kernel: tuple[int, ...] = (),
    stride: tuple[int, ...] = (),
    padding: tuple[int, ...] = (),
    ceil: bool = False,
    include_pad: bool = False,
) -> Tensor:
    """The mean of each window of x (N, C, *space), zeros of the padding included or not.

    stride and padding are as in conv, ceil as in max_pool; what hangs over the end never counts.
    """
    stride = stride or (1,) * len(kernel)
    over = _overhang(x, kernel, stride, padding, (1,) * len(kernel), ceil)
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    counted = _padded(torch.ones_like(x), padding, float(include_pad))
    return function(F.pad(_padded(x, padding), over), kernel, stride) / function(F.pad(counted, over), kernel, stride)


def _padded(x: Tensor, padding: tuple[int, ...], value: float = 0.0) -> Tensor:
    """x with its trailing axes padded by (begin of each axis ..., end of each axis ...); negative sizes crop."""
    rank = len(padding) // 2
    sides = [side for axis in reversed(range(rank)) for side in (padding[axis], padding[rank + axis])]
    return F.pad(x, sides, value=value)


def _overhang(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    ceil: bool,
) -> list[int]:
    """How far the last window reaches behind the padding, in the form that F.pad takes; negative where it ends before.

    The number of windows is that of torch, and of ONNX since opset 22.
    """
    rank = len(kernel)
    over: list[int] = []
    for axis in reversed(range(rank if ceil else 0)):
        size = x.shape[x.dim() - rank + axis] + (padding[axis] if padding else 0)
        width, step = dilation[axis] * (kernel[axis] - 1) + 1, stride[axis]
        whole = size + (padding[rank + axis] if padding else 0)
        start = -((width - whole) // step) * step  # of the last window
        over += [0, (start if start < size else start - step) + width - whole]
    return over


@op()
def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product of two values; with a constant 2-D right operand it is a linear."""
    return torch.matmul(a, b)


@op()
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    heads: int = 0,
    kv_heads: int = 0,
) -> Tensor:
    """softmax(query keyᵀ · scale + mask) value.

    4-D (batch, heads, length, head size) when heads is 0, else 3-D (batch, length, heads · head size). A boolean mask
    is True where attention is allowed, a float mask is added. Fewer kv_heads than heads are repeated (grouped query).
    """
    if heads:
        query = query.reshape(*query.shape[:2], heads, -1).transpose(1, 2)
        key, value = (t.reshape(*t.shape[:2], kv_heads or heads, -1).transpose(1, 2) for t in (key, value))
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    y = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale)
    return y.transpose(1, 2).flatten(2) if heads else y


@op()
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Normalize over the trailing axes that weight spans."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


@op()
def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the trailing axes that weight spans (Zhang & Sennrich, 2019)."""
    return F.rms_norm(x, weight.shape, weight, eps)


@op()
def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Inference form, over axis 1, with the running mean and variance."""
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)


@op()
def embedding(table: Tensor, ids: Tensor) -> Tensor:
    """Rows of table (entries, width) picked by integer ids of any shape."""
    return F.embedding(ids.long(), table)


@op()
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """approximate is "none" (erf) or "tanh" (Hendrycks & Gimpel, 2016)."""
    return F.gelu(x, approximate=approximate)


@op()
def silu(x: Tensor) -> Tensor:
    """x · sigmoid(x)."""
    return F.silu(x)


@op()
def relu(x: Tensor) -> Tensor:
    """max(x, 0)."""
    return F.relu(x)


@op()
def clip(x: Tensor, *, low: float | None = None, high: float | None = None) -> Tensor:
    """min(max(x, low), high), None being no bound (ReLU6, hardtanh)."""
    return x if low is None and high is None else x.clamp(_as_type(low, x.dtype), _as_type(high, x.dtype))


def _as_type(bound: float | None, dtype: torch.dtype) -> float | None:
    """A bound as a number that leaves integers integers."""
    return bound if bound is None or dtype.is_floating_point else int(bound)


@op()
def leaky_relu(x: Tensor, *, slope: float = 0.01) -> Tensor:
    """x where it is positive, else slope · x."""
    return F.leaky_relu(x, slope)


@op()
def hard_sigmoid(x: Tensor) -> Tensor:
    """min(max(x + 3, 0), 6) / 6 (torch's; Howard et al., 2019)."""
    return F.hardsigmoid(x)


@op()
def hard_swish(x: Tensor) -> Tensor:
    """x · hard_sigmoid(x) (Howard et al., 2019)."""
    return F.hardswish(x)


@op(commutative=True)
def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b with broadcasting."""
    return a + b


@op(commutative=True)
def mul(a: Tensor, b: Tensor) -> Tensor:
    """a · b with broadcasting."""
    return a * b


@op()
def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """exp(x) normalized to sum 1 along axis."""
    return F.softmax(x, axis)


@op(results=("scale", "zero_point"))
def choose_qparams(x: Tensor) -> tuple[Tensor, Tensor]:
    """The scale (float32 scalar) and zero point (uint8 scalar) that cover x at run time (ONNX
    DynamicQuantizeLinear)."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, (-low / scale).round().clamp(0, 255).to(torch.uint8)


@op()
def row_scale(x: Tensor, *, largest: float = 127.0) -> Tensor:
    """The scale (float32, (..., 1)) at which the largest magnitude of each row of x, at run time, is `largest`.

    A row lies along the last axis; one of zeros gets scale 1.
    """
    scale = x.float().abs().amax(-1, keepdim=True) / largest
    return torch.where(scale == 0, torch.ones_like(scale), scale)


@op()
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, axis: int | None = None) -> Tensor:
    """round(x / scale) + zero_point, saturated to the zero point's type (int8 without one).

    scale: one, a vector along axis, or one for each row (..., 1). A zero point of float8 is 0, and gives that type: the
    nearest of its numbers, saturated too (ONNX QuantizeLinear).
    """
    dtype = torch.int8 if zero_point is None else zero_point.dtype
    if dtype.is_floating_point:
        most = torch.finfo(dtype).max
        return (x / _along(scale, x, axis)).clamp(-most, most).to(dtype)
    info = torch.iinfo(dtype)
    steps = (x / _along(scale, x, axis)).round()
    if zero_point is not None:
        steps = steps + _along(zero_point, x, axis)
    return steps.clamp(info.min, info.max).to(dtype)


@op()
def dequantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int | None = None,
    block: int = 0,
    bits: int = 8,
) -> Tensor:
    """(x - zero_point) · scale in float32; per slice of axis when scale is a vector, per row when it is (..., 1).

    With a block, scale and zero_point have the rank of x and one entry for so many of x along axis. bits: of x (int8 or
    uint8) only so many are used, so that it may be stored in them; it changes no number.
    """
    steps = x.float()
    if zero_point is not None:
        steps = steps - _along(zero_point, x, axis, block).float()
    return steps * _along(scale, x, axis, block)


@op()
def linear_int8(
    x: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """linear of uint8 x (with scalar scale and zero point) and int8 weight (out, in), a scale per row; float32 out."""
    y = F.linear(x.float() - zero_point.float(), weight.float()) * (scale * weight_scale)
    return y if bias is None else y + bias


@op()
def conv_int8(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, ...] = (),
    padding: tuple[int, ...] = (),
    dilation: tuple[int, ...] = (),
    groups: int = 1,
) -> Tensor:
    """conv of uint8 x and int8 weight, a scale per output channel, quantized to uint8 by y_scale and y_zero_point."""
    y = conv(
        dequantize(x, scale, zero_point), dequantize(weight, weight_scale, axis=0), bias,
        stride=stride, padding=padding, dilation=dilation, groups=groups,
    )  # fmt: skip
    return quantize(y, y_scale, y_zero_point)


@op()
def add_int8(
    a: Tensor, a_scale: Tensor, a_zero_point: Tensor, b: Tensor, b_scale: Tensor, b_zero_point: Tensor,
    y_scale: Tensor, y_zero_point: Tensor,
) -> Tensor:  # fmt: skip
    """add of two uint8 values, quantized to uint8 by y_scale and y_zero_point."""
    return quantize(dequantize(a, a_scale, a_zero_point) + dequantize(b, b_scale, b_zero_point), y_scale, y_zero_point)


def _along(parameter: Tensor, x: Tensor, axis: int | None, block: int = 0) -> Tensor:
    if axis is None or parameter.dim() == 0:
        return parameter
    if block:
        return parameter.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])  # the last may be cut short
    return parameter.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])


# --- data movement -------------------------------------------------------------------------------------------------


@op()
def identity(x: Tensor) -> Tensor:
    """x itself (ONNX Identity; aten clone, detach, dropout at inference)."""
    return x


@op()
def reshape(x: Tensor, shape: Tensor) -> Tensor:
    """x in another shape; shape follows ONNX with allowzero=1 (an axis of -1 is inferred)."""
    return x.reshape([int(n) for n in shape])


@op()
def transpose(x: Tensor, *, perm: tuple[int, ...] = ()) -> Tensor:
    """Axes in the order perm."""
    return x.permute(perm)


@op()
def cast(x: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """x as another dtype."""
    return x.to(dtype)


@op()
def slice_(x: Tensor, *, axis: int = 0, start: int = 0, end: int = 0) -> Tensor:
    """The entries start <= i < end along axis."""
    return x.narrow(axis, start, end - start)


@op()
def concat(*values: Tensor, axis: int = 0) -> Tensor:
    """One or more values of one dtype, joined along axis; their other axes are equal."""
    return torch.cat(values, axis)


@op()
def pad(x: Tensor, *, padding: tuple[int, ...] = (), value: float = 0.0) -> Tensor:
    """x with `value` around it; padding is (begin of each axis ..., end of each axis ...), negative where it crops."""
    return _padded(x, padding, value)


@op()
def squeeze(x: Tensor, *, axes: tuple[int, ...] = ()) -> Tensor:
    """x without these axes, each of size 1."""
    return x.squeeze(axes)


@op()
def unsqueeze(x: Tensor, *, axes: tuple[int, ...] = ()) -> Tensor:
    """x with axes of size 1, which have these numbers in the result."""
    for axis in sorted(axis % (x.dim() + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


# --- elementary operators, named so that decomposed forms are recognized --------------------------------------------


def _elementary(name: str, reference: Callable[..., Any], commutative: bool = False) -> None:
    binary = len(inspect.signature(reference).parameters) == 2
    _OPS[name] = Op(
        name, ("a", "b") if binary else ("x",), frozenset(), MappingProxyType({}), ("y",), reference, commutative
    )


_elementary("sub", lambda a, b: a - b)
_elementary("div", lambda a, b: a / b)
_elementary("pow", lambda a, b: a**b)
_elementary("sqrt", lambda x: torch.sqrt(x))
_elementary("rsqrt", lambda x: torch.rsqrt(x))
_elementary("reciprocal", lambda x: 1 / x)
_elementary("exp", lambda x: torch.exp(x))
_elementary("erf", lambda x: torch.erf(x))
_elementary("tanh", lambda x: torch.tanh(x))
_elementary("sigmoid", lambda x: torch.sigmoid(x))
_elementary("isnan", lambda x: torch.isnan(x))


@op()
def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a where condition holds, else b."""
    return torch.where(condition, a, b)


@op()
def mean(x: Tensor, *, axes: tuple[int, ...] = (), keepdim: bool = True) -> Tensor:
    """Mean over axes."""
    return x.mean(axes, keepdim)
