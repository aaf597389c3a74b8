"""Ops that no aten operator can spell, as custom operators `graphopt::<op>` whose kernel is the op's reference.

Pools are among them for attributes that aten lacks, quantize and dequantize for scales of rows and for float8, and
recurrent layers, of which aten runs several in one call. With them, a folded int8 graph runs, traces, exports and saves
wherever torch does. Those on integers are not fast: a backend replaces them by its own kernels. Each has a twin
`graphopt_whole::<op>` that no compiler decomposes, which exporters to other frameworks translate. Importing this module
registers them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphopt.ir.ops import OPS, Op
from graphopt.ir.ops.recurrent import RECURRENT

NAMES = (
    "choose_qparams", "row_scale", "quantize", "dequantize", "linear_int8", "conv_int8", "add_int8", "max_pool",
    "average_pool", "rotary", *RECURRENT,
)  # fmt: skip
_OPEN = ("max_pool", "average_pool", "rotary", "row_scale", "quantize", "dequantize")
"""Operators that compilers decompose into the calls of their reference, to differentiate and to fuse them."""
"""Operators over a length that a trace leaves open: a decomposed one is a loop over it, which fixes it."""


def _schema(op: Op) -> str:
    """The operator's schema: operands are tensors; attributes are numbers, text or lists of integers."""
    operands = [f"Tensor? {name}=None" if name in op.optional else f"Tensor {name}" for name in op.operands]
    attributes = [
        f"int[] {name}=[]" if isinstance(default, tuple)
        else f"int? {name}=None" if default is None  # an axis
        else f'str {name}="{default}"' if isinstance(default, str)
        else f"{type(default).__name__} {name}={default}"
        for name, default in op.attributes.items()
    ]
    parameters = ", ".join(operands + (["*", *attributes] if attributes else []))
    return f"({parameters}) -> ({', '.join(['Tensor'] * len(op.results))})"


def _register(name: str, op: Op, *, decomposes: bool) -> None:
    torch.library.define(name, _schema(op), tags=(torch.Tag.pt2_compliant_tag,))
    if decomposes:
        torch.library.impl(name, "CompositeImplicitAutograd", op.reference)
    else:
        torch.library.impl(name, "CompositeExplicitAutograd", op.reference)
        torch.library.register_fake(name, _recurrent_shapes(op) if op.name in RECURRENT else op.reference)
    if op.name in RECURRENT:
        torch.library.register_autograd(name, _gradients(op), setup_context=_keep_inputs)


def _recurrent_shapes(op: Op) -> Callable[..., tuple[Tensor, ...]]:
    def results(x: Tensor, weight: Tensor, recurrent: Tensor, *others: Any, **attributes: Any) -> tuple[Tensor, ...]:
        directions, _, hidden = recurrent.shape
        last = [x.new_empty(directions, x.shape[1], hidden) for _ in op.results[1:]]
        return x.new_empty(x.shape[0], directions, x.shape[1], hidden), *last

    return results


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.attributes, ctx.given = keyword_only_inputs, [value is not None for value in inputs]
    ctx.save_for_backward(*(value for value in inputs if value is not None))


def _gradients(op: Op) -> Callable[..., tuple[Tensor | None, ...]]:
    """The derivatives of the reference, which is computed again."""

    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved).detach() if given else None for given in ctx.given]
        learned = [value.requires_grad_() for value in inputs if value is not None and value.is_floating_point()]
        with torch.enable_grad():
            outputs = op.reference(*inputs, **ctx.attributes)
        found = iter(torch.autograd.grad(outputs, learned, gradients, allow_unused=True))
        return tuple(next(found) if value is not None and value.is_floating_point() else None for value in inputs)

    return backward


for _name in NAMES:
    _register(f"graphopt::{_name}", OPS[_name], decomposes=_name in _OPEN)
    _register(f"graphopt_whole::{_name}", OPS[_name], decomposes=False)
