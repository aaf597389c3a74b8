"""The ops that aten has no spelling for (pools: no spelling for all their attributes), as custom operators
`graphopt::<op>` whose kernel is the reference.

quantize and dequantize are among them for scales of rows and for float8. They make a folded int8 graph run, trace,
export and save anywhere torch does. They are not fast: a backend replaces them by its own kernels. Importing this
module declares them.
"""

from __future__ import annotations

import torch

from graphopt.ir.ops import OPS, Op

NAMES = (
    "choose_qparams", "row_scale", "quantize", "dequantize", "linear_int8", "conv_int8", "add_int8", "max_pool",
    "average_pool",
)  # fmt: skip
_OPEN = ("max_pool", "average_pool", "row_scale", "quantize", "dequantize")
"""Compilers see what their reference calls: gradients go through it, and kernels are fused with it."""


def _schema(op: Op) -> str:
    """The operator's schema: operands are tensors, attributes numbers, booleans, or lists of integers."""
    operands = [f"Tensor? {name}=None" if name in op.optional else f"Tensor {name}" for name in op.operands]
    attributes = [
        f"int[] {name}=[]" if isinstance(default, tuple)
        else f"int? {name}=None" if default is None  # an axis
        else f"{type(default).__name__} {name}={default}"
        for name, default in op.attributes.items()
    ]
    parameters = ", ".join(operands + (["*", *attributes] if attributes else []))
    return f"({parameters}) -> ({', '.join(['Tensor'] * len(op.results))})"


for _name in NAMES:
    _op = OPS[_name]
    torch.library.define(f"graphopt::{_name}", _schema(_op), tags=(torch.Tag.pt2_compliant_tag,))
    if _name in _OPEN:
        torch.library.impl(f"graphopt::{_name}", "CompositeImplicitAutograd", _op.reference)
    else:
        torch.library.impl(f"graphopt::{_name}", "CompositeExplicitAutograd", _op.reference)
        torch.library.register_fake(f"graphopt::{_name}", _op.reference)
