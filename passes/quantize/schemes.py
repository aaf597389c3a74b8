"""How each site may be quantized on a target, and why one may not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from graphopt.errors import UsageError
from graphopt.ir.graph import Node, Value
from graphopt.pipeline.context import Context
from graphopt.pipeline.selectors import PerSite
from graphopt.pipeline.weights import why_fixed

TYPES = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
"""What weights and activations are stored in, by name."""

OPS = ("linear", "conv", "matmul", "softmax", "embedding")
"""What may be asked for; other ops become integers where they stand between these. A softmax is asked for by name,
and becomes integers behind a static matmul only."""

_BLOCKS = (32, 16)
"""Blocks that are taken, the first that divides, where none is asked for."""


def legal(op: str, context: Context) -> tuple[str, ...]:
    """The schemes that have a fast kernel; every one where no target is given."""
    return context.target.schemes.get(op, ())


def scheme_of(op: str, asked: str, context: Context) -> str:
    """The scheme of a site: auto is static where calibration is given and the target has it, else dynamic.

    It is weight-only where the target has nothing else. A table has no activations, and so weights alone.
    """
    if op == "embedding":
        return "weight-only"
    if asked != "auto":
        return asked
    known = legal(op, context)
    if context.calibration is not None and "static" in known:
        return "static"
    return "weight-only" if "weight-only" in known and "dynamic" not in known else "dynamic"


def require_type(dtype: str, context: Context) -> None:
    """Raise UsageError where the target has no kernels in one of TYPES."""
    known = context.target.types
    if dtype not in known:
        raise UsageError(f"quantize: {context.target.name} has no kernels in {dtype}; there is {', '.join(known)}")


def names_nodes(*terms: object) -> bool:
    """Whether options name single nodes (node:...), as measures of sensitivity do; terms: of selectors, or by site."""
    several = [one for one in terms if isinstance(one, tuple | PerSite)]
    return any(term.startswith("node:") for one in several for term in one)


def static(sites: Iterable[Node], asked: str | Mapping[str, str], context: Context) -> list[Node]:
    """Of linears and convs, those that are to be static, but for what was reverted."""
    found = []
    for site in sites:
        term = asked.term_of(site) if isinstance(asked, PerSite) else None
        scheme = asked if isinstance(asked, str) else asked[term] if term else ""
        if scheme_of(site.kind, scheme, context) == "static" and site.label not in context.reverted:
            found.append(site)
    return found


def bits_of(op: str, scheme: str, asked: int | None, context: Context) -> int:
    """Bits of a weight: as asked; else 8, or 7 where products of 8 saturate on the target."""
    if op == "embedding" and asked == 7:  # which is about products
        return 8
    if asked is not None or scheme == "weight-only":
        return asked or 8
    return context.target.product_bits()


def block_of(site: Node, scheme: str, bits: int, asked: int | None) -> int | None:
    """Weights of a site that share a scale, None for all of an output (or row); see `why_no_block`."""
    if scheme != "weight-only" or asked is not None or bits == 8:
        return asked if scheme == "weight-only" else None
    return next((block for block in _BLOCKS if _width(site) % block == 0), _BLOCKS[0])


def why_not(site: Node) -> str | None:
    """Why a site stays float on any target."""
    if site.kind not in OPS:
        return f"{site.kind} has no form in integers of its own"
    if site.kind == "matmul":
        return _why_not_product(site)
    if site.kind == "softmax":
        return _why_not_float32(site.input)
    if site.kind == "embedding":
        return _why_not_table(site)
    weight = site.weight
    if weight is not None and weight.is_floating_point() and weight.dtype != torch.float32:
        return f"weight is {str(weight.dtype).removeprefix('torch.')}, not float32"
    return why_fixed(site)


def _why_not_product(site: Node) -> str | None:
    sides = site.required("a"), site.required("b")
    if any(side.is_constant for side in sides):
        return "matmul has a form in integers for two activations, and one side is stored"
    return next((reason for side in sides if (reason := _why_not_float32(side))), None)


def _why_not_float32(value: Value) -> str | None:
    if value.dtype is torch.float32:
        return None
    dtype = "of unknown type" if value.dtype is None else str(value.dtype).removeprefix("torch.")
    return f"{value.name} is {dtype}, not float32"


def _why_not_table(site: Node) -> str | None:
    table = site.required("table")
    if not table.is_constant:
        dequantized = table.producer is not None and table.producer.kind == "dequantize"
        return "already quantized" if dequantized else "table is computed by the graph"
    return None if table.dtype == torch.float32 else f"table is {str(table.dtype).removeprefix('torch.')}, not float32"


def why_no_kernel(site: Node, scheme: str, dtype: str, context: Context) -> str | None:
    """Why the target does not run a site so."""
    op, known = site.kind, legal(site.kind, context)
    if scheme in known:
        if dtype != "int8" and scheme == "weight-only":
            return f"{dtype} is for products of two sides: give scheme=static, dynamic or auto"
        return context.target.why_float(site, scheme, dtype)
    name = context.target.name
    more = "; static needs calibration" if "static" in known and context.calibration is None else ""
    return f"{name} has no fast {scheme} {op}{more}"


def why_wrong_bits(op: str, scheme: str, bits: int, context: Context) -> str | None:
    """Why a weight cannot have so many bits."""
    if scheme != "weight-only":
        known: tuple[int, ...] = (8, 7)
    else:
        known = context.target.weight_bits.get(op, ())
    if bits in known:
        return None
    numbers = " or ".join(map(str, known))
    return f"a {scheme} {op} has weights of {numbers} bits here, not {bits}"


def why_no_block(site: Node, block: int | None) -> str | None:
    """Why scales cannot be shared so."""
    if block is None or _width(site) % block == 0:
        return None
    return f"block {block} does not divide {_width(site)} inputs"


def _width(site: Node) -> int:
    shape = site.required("table" if site.kind == "embedding" else "weight").shape
    assert shape is not None
    return int(shape[-1])


def safety(bits: Iterable[int]) -> str:
    """For which CPUs int8 weights of so many bits are safe, for the user."""
    if max(bits) < 8:
        return "weights of 7 bits: sums of products cannot saturate, with VNNI or without"
    return (
        "weights of 8 bits: safe on x86 with VNNI or AMX, and on ARM; with AVX2 or AVX-512 alone sums of two products "
        "may saturate in 16 bits, and bits=7 is safe"
    )
