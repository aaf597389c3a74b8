"""Ops that no aten operator can spell, as custom operators `graphopt::<op>` whose kernel is the op's reference.

Pools are among them for attributes that aten lacks, quantize and dequantize for scales of rows and for float8. With
them, a folded int8 graph runs, traces, exports and saves wherever torch does. They are not fast: a backend replaces
them by its own kernels. Each has a twin `graphopt_whole::<op>` that no compiler decomposes, which exporters to other
frameworks translate. Importing this module registers them.
"""

from __future__ import annotations

import torch

from graphopt.ir.ops import OPS, Op

NAMES = (
    "choose_qparams", "row_scale", "quantize", "dequantize", "linear_int8", "conv_int8", "add_int8", "max_pool",
    "average_pool",
)  # fmt: skip
_OPEN = ("max_pool", "average_pool", "row_scale", "quantize", "dequantize")
"""Operators that compilers decompose into the calls of their reference, to differentiate and to fuse them."""


def _schema(op: Op) -> str:
    """The operator's schema: operands are tensors; attributes are numbers, booleans or lists of integers."""
    operands = [f"Tensor? {name}=None" if name in op.optional else f"Tensor {name}" for name in op.operands]
    attributes = [
        f"int[] {name}=[]" if isinstance(default, tuple)
        else f"int? {name}=None" if default is None  # an axis
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
        torch.library.register_fake(name, op.reference)


for _name in NAMES:
    _register(f"graphopt::{_name}", OPS[_name], decomposes=_name in _OPEN)
    _register(f"graphopt_whole::{_name}", OPS[_name], decomposes=False)
