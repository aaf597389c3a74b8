"""How each site may be quantized on a target, and why one may not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from graphopt.errors import UsageError
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Node, Value, dtype_name
from graphopt.ir.ops.recurrent import RECURRENT
from graphopt.pipeline.context import Context
from graphopt.pipeline.weights import why_fixed

TYPES = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
"""What weights and activations are stored in, by name."""


OPS = ("linear", "conv", "matmul", "softmax", "embedding", "conv_transpose", *RECURRENT)
"""What may be selected; other ops are quantized where they stand between these. A softmax is asked for by name,
and is quantized only after a static matmul."""

WRONG = (
    "bits_unsupported", "activation_bits_static", "activation_bits_unread", "block_not_dividing",
    "granularity_unsupported", "rows_of_linears",
)  # fmt: skip
"""Codes of declines that other options would avoid."""

_BLOCKS = (32, 16)
"""Blocks that are taken, the first that divides, where none is asked for."""
WHOLE = 128
"""Weights that may share one scale in 4 or 2 bits, where no block divides a row of them."""


def legal(op: str, context: Context) -> tuple[str, ...]:
    """The schemes that have a fast kernel on the target; all of them where no target is given."""
    return context.target.schemes.get(op, ())


def scheme_of(op: str, asked: str, context: Context) -> str:
    """The scheme of a site: auto is static where calibration is given and the target has it, else the best of the
    target's others, or dynamic where it has none. A table has no activations, and so weights alone.
    """
    if op == "embedding":
        return "weight-only"
    if asked != "auto":
        return asked
    known = legal(op, context)
    if context.calibration is not None and "static" in known:
        return "static"
    return next((scheme for scheme in known if scheme != "static"), "dynamic")


def require_type(dtype: str, context: Context) -> None:
    """Raise UsageError where the target has no kernels in one of TYPES."""
    known = context.target.types
    if dtype not in known:
        raise UsageError(f"quantize: {context.target.name} has no kernels in {dtype}; there is {', '.join(known)}")


def bits_of(op: str, scheme: str, asked: int | None, context: Context) -> int:
    """Bits of a weight: as asked; else 8, or 7 where products of 8 saturate on the target."""
    if op == "embedding" and asked == 7:  # which is about products
        return 8
    if asked is not None or scheme == "weight-only":
        return asked or 8
    return context.target.product_bits()


def weights_of(kind: str) -> tuple[str, ...]:
    """The operands of an op that are weights, and become integers together."""
    return ("table",) if kind == "embedding" else ("weight", "recurrent") if kind in RECURRENT else ("weight",)


def rows_of(kind: str) -> int:
    """The axis of the outputs of an op's weights, along which each has a scale."""
    return 1 if kind in ("conv_transpose", *RECURRENT) else 0


def block_of(site: Node, scheme: str, bits: int, asked: int | None) -> int | None:
    """How many weights of a site share one scale; None: all of an output (or row). See `why_no_block`.

    A row that no block divides has one scale where it is no longer than WHOLE: kernels fill up the last block.
    """
    if scheme != "weight-only" or site.kind not in ("linear", "embedding"):  # blocks are of matrices
        return None
    width = _width(site)
    if asked is not None or bits == 8:
        return asked
    dividing = next((block for block in _BLOCKS if width % block == 0), None)
    return dividing if dividing is not None or width <= WHOLE else _BLOCKS[0]


def why_not(site: Node) -> Decline | None:
    """Why a site stays float on any target."""
    if site.kind not in OPS:
        return Decline("no_integer_form", op=site.kind)
    if site.kind == "matmul":
        return _why_not_product(site)
    if site.kind == "softmax":
        return _why_not_float32(site.input)
    if site.kind == "embedding":
        return _why_not_table(site)
    weight = site.weight
    if weight is not None and weight.is_floating_point() and weight.dtype != torch.float32:
        return not_float32("weight", weight.dtype)
    others = (site.required(name) for name in weights_of(site.kind)[1:])
    return why_fixed(site) or (None if all(value.is_constant for value in others) else Decline("weight_computed"))


def not_float32(name: str, dtype: torch.dtype | None) -> Decline:
    """That a value, a weight or a table is of another type."""
    return Decline("not_float32", name=name, dtype=dtype_name(dtype))


def _why_not_product(site: Node) -> Decline | None:
    sides = site.required("a"), site.required("b")
    if any(side.is_constant for side in sides):
        return Decline("matmul_side_stored")
    return next((why for side in sides if (why := _why_not_float32(side))), None)


def _why_not_float32(value: Value) -> Decline | None:
    return None if value.dtype is torch.float32 else not_float32(value.name, value.dtype)


def _why_not_table(site: Node) -> Decline | None:
    table = site.required("table")
    if not table.is_constant:
        dequantized = table.producer is not None and table.producer.kind == "dequantize"
        return Decline("table_quantized" if dequantized else "table_computed")
    return None if table.dtype == torch.float32 else not_float32("table", table.dtype)


def why_no_kernel(site: Node, scheme: str, dtype: str, context: Context) -> Decline | None:
    """Why the target has no kernel for this site in this scheme and dtype."""
    known = legal(site.kind, context)
    if scheme in known:
        if dtype != "int8" and scheme == "weight-only":
            return Decline("dtype_weight_only", dtype=dtype)
        return context.target.why_float(site, scheme, dtype)
    uncalibrated = "static" in known and context.calibration is None
    code = "no_kernel_uncalibrated" if uncalibrated else "no_kernel"
    return Decline(code, target=context.target.name, scheme=scheme, op=site.kind)


def granularity_of(asked: str, context: Context) -> str:
    """What shares a scale in dynamic quantization: as asked, or what the target prefers."""
    return context.target.granularities[0] if asked == "auto" else asked


def why_wrong_granularity(op: str, scheme: str, asked: str, context: Context) -> Decline | None:
    """Why the activations of this op cannot have scales of this granularity in this scheme."""
    if scheme != "dynamic":
        return None
    known, granularity = context.target.granularities, granularity_of(asked, context)
    if granularity not in known:
        return Decline("granularity_unsupported", target=context.target.name, known=" or ".join(known), asked=asked)
    return Decline("rows_of_linears", op=op) if granularity == "row" and op != "linear" else None


def why_wrong_bits(op: str, scheme: str, bits: int, context: Context) -> Decline | None:
    """Why the weight of this op cannot have this number of bits in this scheme."""
    known: tuple[int, ...] = (8, 7)
    if scheme == "weight-only":
        known = context.target.weight_bits.get(op, ())
    elif scheme == "static" and context.target.placement is None:  # others read Q/DQ, of 8 bits alone
        known = (8, 7, 4, 2)
    if bits in known:
        return None
    return Decline("bits_unsupported", scheme=scheme, op=op, known=" or ".join(map(str, known)), bits=bits)


def why_wrong_activation_bits(scheme: str, bits: int, dtype: str, context: Context) -> Decline | None:
    """Why activations cannot have this number of bits in this scheme."""
    if bits == 8 or scheme == "weight-only":
        return None
    if scheme != "static" or dtype != "int8":
        return Decline("activation_bits_static", bits=bits)
    if context.target.placement is not None:
        return Decline("activation_bits_unread", target=context.target.name, bits=bits)
    return None


def why_no_block(site: Node, block: int | None) -> Decline | None:
    """Why this block size does not fit."""
    if block is None or _width(site) % block == 0:
        return None
    return Decline("block_not_dividing", block=block, inputs=_width(site))


def _width(site: Node) -> int:
    shape = site.required("table" if site.kind == "embedding" else "weight").shape
    assert shape is not None
    return int(shape[-1])


def without_kernel(labels: Sequence[str], context: Context) -> str:
    """A note for the user: which sites have activations that no kernel multiplies."""
    where = f"on {context.target.name}" if context.target.runs else "on any target"
    return (
        f"no kernel for 4-bit activations {where}: linears multiply them as 8-bit integers, convs as floats between "
        f"quantize and dequantize ({', '.join(labels)})"
    )


def safety(bits: Iterable[int]) -> str:
    """A note for the user: on which CPUs int8 weights of these bits cannot saturate."""
    if max(bits) < 8:
        return "weights of 7 bits or fewer: sums of products cannot saturate, with VNNI or without"
    return (
        "weights of 8 bits: safe on x86 with VNNI or AMX, and on ARM; with AVX2 or AVX-512 alone sums of two products "
        "may saturate in 16 bits, and bits=7 is safe"
    )
