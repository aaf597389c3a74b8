"""Ops in torch: by their reference, or by the function that a graph of torch reads as the op again."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.dialects.fx.custom_operators import NAMES
from graphopt.dialects.onnx.interpreter.call import Call, Form, Numbers
from graphopt.dialects.onnx.interpreter.movement import part, squeeze
from graphopt.ir.ops import OPS
from graphopt.ir.ops.recurrent import RECURRENT


def _reference(op: str) -> Form:
    def apply(call: Call) -> Tensor:
        result: Tensor = OPS[op].reference(*map(call.optional, range(len(call.given))), **call.attributes)
        return result

    return Form(apply, weights=_weights(op))


def _weights(op: str) -> dict[int, str]:
    names = OPS[op].operands
    return {names.index(name): _PARAMETERS[name] for name in names if name in _PARAMETERS}


_PARAMETERS = {"weight": "weight", "recurrent": "recurrent", "bias": "bias", "table": "weight"}
"""What a parameter is called, by the operand that it is."""


def _custom(call: Call) -> Tensor | tuple[Tensor, ...]:
    """The op as one operator, which an fx graph spells in its own way when it is emitted again."""
    function = getattr(torch.ops.graphopt, call.kind)
    result: Tensor | tuple[Tensor, ...] = function(*map(call.optional, range(len(call.given))), **call.attributes)
    return result


def _recurrent(call: Call) -> Tensor | tuple[Tensor, ...]:
    """A loop over a length that is traced would be unrolled."""
    if call.optional(4) is not None:
        raise call.refused("torch has no lengths of sequences in it")
    if not call.attributes.get("reset_after", True):
        raise call.refused("torch resets after the product (linear_before_reset=1)")
    if call.kind == "lstm" and call.optional(7) is not None:
        raise call.refused("torch has no peepholes")
    return _custom(call)


# --- arithmetic ----------------------------------------------------------------------------------------------------


def _operand(call: Call, index: int) -> Tensor | float | int:
    """An input; a stored number of rank 0 as a number, so that no tensor is made of it."""
    value = call.given[index]
    if isinstance(value, Numbers) and value.array.ndim == 0 and value.is_plain:
        number: float = value.array.item()
        return number
    known = call.stored[index]
    other = call.given[1 - index]
    if known is not None and known.array.ndim == 0 and isinstance(other, Tensor) and other.dtype == known.dtype:
        number = known.array.item()
        return number
    return call[index]


def _operands(call: Call) -> tuple[Tensor | float | int, Tensor | float | int]:
    a, b = _operand(call, 0), _operand(call, 1)
    return (a, b) if isinstance(a, Tensor) or isinstance(b, Tensor) else (call[0], b)


def _arithmetic(function: Callable[[Any, Any], Any]) -> Form:
    return Form(lambda call: torch.as_tensor(function(*_operands(call))))


def _div(call: Call) -> Tensor:
    """ONNX divides integers towards zero."""
    if not call[0].is_floating_point():
        return torch.div(call[0], call[1], rounding_mode="trunc")
    a, b = _operands(call)
    return torch.as_tensor(a / b)


def _pow(call: Call) -> Tensor:
    a, b = _operands(call)
    return torch.pow(a, b).to(call[0].dtype)  # type: ignore[arg-type]  # one of them is a tensor


# --- movement ------------------------------------------------------------------------------------------------------


def _reshape(call: Call) -> Tensor:
    return call[0].reshape(call.required_numbers(1))


def _slice(call: Call) -> Tensor:
    return part(call[0], *(call.attributes[name] for name in ("axis", "start", "end")))


def _identity(call: Call) -> Tensor:
    """Dropout keeps its rate, for a module that trains."""
    rate = call.attributes.get("dropout")
    return call[0] if rate is None else F.dropout(call[0], rate, training=False)


# --- windows and attention -----------------------------------------------------------------------------------------


def _is_symmetric(padding: tuple[int, ...]) -> bool:
    """Whether both ends of each axis are padded by the same, which is what torch's functions do."""
    rank = len(padding) // 2
    return padding[:rank] == padding[rank:] and all(side >= 0 for side in padding)


def _conv(call: Call) -> Tensor:
    padding = call.attributes["padding"]
    x, weight, bias = call[0], call[1], call.optional(2)
    if not _is_symmetric(padding):
        result: Tensor = OPS["conv"].reference(x, weight, bias, **call.attributes)
        return result
    rank = weight.dim() - 2
    function = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    stride, dilation = call.attributes["stride"] or (1,) * rank, call.attributes["dilation"] or (1,) * rank
    return function(x, weight, bias, stride, padding[:rank] or (0,) * rank, dilation, call.attributes["groups"])


def _fits_torch(call: Call) -> bool:
    """Whether torch's pools pad as this one does: both ends alike, by half the kernel at most."""
    padding, kernel = call.attributes["padding"], call.attributes["kernel"]
    return _is_symmetric(padding) and all(2 * pad <= size for pad, size in zip(padding, kernel, strict=False))


def _max_pool(call: Call) -> Tensor:
    a, rank = call.attributes, len(call.attributes["kernel"])
    if not _fits_torch(call):
        result: Tensor = OPS["max_pool"].reference(call[0], **a)
        return result
    function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
    padding, dilation = a["padding"][:rank] or (0,) * rank, a["dilation"] or (1,) * rank
    return function(call[0], a["kernel"], a["stride"] or (1,) * rank, padding, dilation, a["ceil"])


def _average_pool(call: Call) -> Tensor:
    a, rank = call.attributes, len(call.attributes["kernel"])
    if not _fits_torch(call):
        result: Tensor = OPS["average_pool"].reference(call[0], **a)
        return result
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
    padding = a["padding"][:rank] or (0,) * rank
    return function(call[0], a["kernel"], a["stride"] or (1,) * rank, padding, a["ceil"], a["include_pad"])


def _attention(call: Call) -> Tensor:
    a = call.attributes
    query, key, value, mask = call[0], call[1], call[2], call.optional(3)
    heads, kv_heads = a["heads"], a["kv_heads"] or a["heads"]
    if heads:
        query, key, value = _split(query, heads), _split(key, kv_heads), _split(value, kv_heads)
    grouped = query.shape[1] != key.shape[1]
    y = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=a["causal"], scale=a["scale"], enable_gqa=grouped
    )
    return y.transpose(1, 2).flatten(2) if heads else y


def _split(x: Tensor, heads: int) -> Tensor:
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)


FORMS: dict[str, Form] = {name: _reference(name) for name in OPS} | {name: Form(_custom) for name in NAMES} | {
    "add": _arithmetic(operator.add),
    "sub": _arithmetic(operator.sub),
    "mul": _arithmetic(operator.mul),
    "div": Form(_div),
    "pow": Form(_pow),
    "reshape": Form(_reshape),
    "slice": Form(_slice),
    "squeeze": Form(squeeze),
    "identity": Form(_identity),
    "conv": Form(_conv, weights=_weights("conv")),
    **{name: Form(_recurrent, weights=_weights(name)) for name in RECURRENT},
    "max_pool": Form(_max_pool),
    "average_pool": Form(_average_pool),
    "attention": Form(_attention),
}
