"""Products in 8 bits, and of weights with zeros in 2:4, as operators `graphopt_cuda::*` within the kernels' rules.

Most are compositions of aten: torch.compile sees through them and fuses what stands around the product. They compute
the same on the CPU, where tests hold them to a reference; rows, and columns of 8 bits, are filled up with zeros where a
kernel wants a multiple. Two are opaque: the product with a weight in 2:4, and an int8 linear that is one Triton kernel.

Python's indexing and `.contiguous()` are not used: on fake tensors they fail where the machine lacks the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

ROWS = 17
"""Fewest rows that `_int_mm` takes on a GPU; its meta kernel does not check that."""

MULTIPLE = {torch.int8: 8, torch.float8_e4m3fn: 16}
"""What inputs and outputs of a product in 8 bits are multiples of, by `_int_mm` and `_scaled_mm`."""

SPARSE = {
    torch.float16: (32, 64),
    torch.bfloat16: (32, 64),
    torch.int8: (32, 128),
    torch.float8_e4m3fn: (32, 128),
}
"""What outputs and inputs of a weight in 2:4 are multiples of: what both CUTLASS and cuSPARSELt take."""

SPARSE_ROWS = 16
"""What the rows that such a weight is multiplied with are a multiple of, in either library and any type."""


# --- compositions of aten ------------------------------------------------------------------------------------------


def linear_int8(
    x: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, *, dtype: torch.dtype
) -> Tensor:
    """x (..., in) and weight (out, in) in int8 about zero -> (..., out) in dtype, computed in float32 from the sums.

    scale: float32, one or one for each row (..., 1); weight_scale: float32 (out,); bias: float (out,).
    """
    rows = _padded_columns(x.reshape(-1, x.shape[-1]), weight.shape[1])
    missing = torch.sym_max(0, ROWS - rows.shape[0])  # type: ignore[no-untyped-call]
    sums = torch._int_mm(_padded_rows(rows, missing), weight.t())
    return _scaled(sums.narrow(0, 0, rows.shape[0]), x, scale, weight_scale, bias, dtype)


def linear_float8(
    x: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, *, dtype: torch.dtype
) -> Tensor:
    """As `linear_int8`, in float8 (e4m3). The product leaves the kernel in bfloat16, which all of its forms can give.

    Scales go in by rows and by columns on both sides, as one for all beside one for each is no form of `_scaled_mm`.
    """
    rows = _padded_columns(x.reshape(-1, x.shape[-1]), weight.shape[1])
    by_row = scale.new_ones((rows.shape[0], 1)) * (scale if scale.dim() == 0 else scale.reshape(-1, 1))
    by_output = F.pad(weight_scale, (0, weight.shape[0] - weight_scale.shape[0]), value=1.0).reshape(1, -1)
    if x.device.type == "cpu":  # whose kernel takes one scale for all, up to torch 2.12
        y = (rows.float() @ weight.float().t() * by_row * by_output).to(torch.bfloat16)
    else:
        y = torch._scaled_mm(rows, weight.t(), by_row, by_output, out_dtype=torch.bfloat16, use_fast_accum=True)
    return _finished(y.float(), x, weight_scale.shape[0], bias, dtype)


def linear_weight_int8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) in floats and weight (out, in) in int8 -> (..., out): scaled after the product, so that a compiler
    reads the integers inside it; such sums overflow float16, which scales the weight before the product."""
    scale = weight_scale.to(x.dtype)
    if x.dtype is torch.float16:
        return F.linear(x, weight.to(x.dtype) * scale.unsqueeze(1), bias)
    y = F.linear(x, weight.to(x.dtype)) * scale
    return y if bias is None else y + bias


def linear_sparse(x: Tensor, packed: Tensor, meta: Tensor | None, bias: Tensor | None, *, outputs: int) -> Tensor:
    """x (..., in) and a weight (outputs, in) in 2:4, both in 16 bits -> (..., outputs)."""
    y = _product_sparse(x, packed, meta, outputs)
    return _finished(y, x, outputs, bias, x.dtype)


def linear_int8_sparse(
    x: Tensor, scale: Tensor, packed: Tensor, meta: Tensor | None, weight_scale: Tensor, bias: Tensor | None, *,
    outputs: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """As `linear_int8` and `linear_float8` by the type of x, of a weight in 2:4."""
    return _scaled(_product_sparse(x, packed, meta, outputs), x, scale, weight_scale, bias, dtype)


def _product_sparse(x: Tensor, packed: Tensor, meta: Tensor | None, outputs: int) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    filled = _padded_rows(rows, -rows.shape[0] % SPARSE_ROWS)
    y: Tensor = torch.ops.graphopt_cuda.product_sparse(packed, meta, filled, outputs=outputs)
    return y.t().narrow(0, 0, rows.shape[0])


def _padded_columns(rows: Tensor, inputs: int) -> Tensor:
    """Rows, each filled up with zeros to the inputs of the stored weight."""
    return rows.contiguous() if rows.shape[1] == inputs else _padded(rows, (0, inputs - rows.shape[1]))


def _padded_rows(rows: Tensor, missing: int | torch.SymInt) -> Tensor:
    """Rows, and so many rows of zeros below."""
    return rows.contiguous() if isinstance(missing, int) and not missing else _padded(rows, (0, 0, 0, missing))


def _padded(rows: Tensor, sides: Sequence[int | torch.SymInt]) -> Tensor:
    raw = rows.view(torch.int8) if rows.dtype.itemsize == 1 else rows  # float8 cannot be padded on every device
    return F.pad(raw, list(sides)).view(rows.dtype)  # type: ignore[arg-type]


def _scaled(
    sums: Tensor, x: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    by_row = scale if scale.dim() == 0 else scale.reshape(-1, 1)
    outputs = weight_scale.shape[0]
    return _finished(sums.narrow(1, 0, outputs).float() * by_row * weight_scale, x, outputs, bias, dtype)


def _finished(y: Tensor, x: Tensor, outputs: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The bias added, in a dtype, with the leading axes of x and without the outputs that fill up a multiple."""
    y = y.narrow(1, 0, outputs)
    y = (y if bias is None else y + bias).to(dtype)
    dense: Tensor = torch.ops.aten.contiguous.default(y)
    return dense.reshape(*x.shape[:-1], outputs)


# --- the product with a weight in 2:4 ------------------------------------------------------------------------------


def is_sparse(weight: Tensor) -> bool:
    """Whether at most two of each four neighbours in a row of a matrix are not zero."""
    if weight.dim() != 2 or weight.shape[1] % 4 or not weight.numel():
        return False
    return int((weight.float() != 0).reshape(-1, 4).sum(1).max()) <= 2


def compress(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (out, in) in 2:4 as CUTLASS keeps it: what is not zero (out, in / 2), and where that stood.

    Its sizes are multiples of those in SPARSE. Bits are kept, but for the sign of zeros.
    """
    raw = torch.where(weight.float() == 0, 0, weight.view(torch.int8)) if weight.dtype.itemsize == 1 else weight
    packed, meta = sparse_semi_structured_from_dense_cutlass(raw.contiguous())  # type: ignore[no-untyped-call]
    return packed.view(weight.dtype), meta


def decompress(packed: Tensor, meta: Tensor) -> Tensor:
    """The weight (out, in) that `compress` was given."""
    raw = packed.view(torch.int8) if packed.dtype.itemsize == 1 else packed
    dense: Tensor = sparse_semi_structured_to_dense_cutlass(raw, meta)  # type: ignore[no-untyped-call]
    return dense.view(packed.dtype)


def pack_cusparselt(packed: Tensor, meta: Tensor) -> Tensor:
    """What `compress` made, on a GPU, as cuSPARSELt keeps it: one tensor, whose place for `meta` stays empty."""
    return torch._cslt_compress(decompress(packed, meta))


def _product_on_cpu(packed: Tensor, meta: Tensor | None, x: Tensor, *, outputs: int) -> Tensor:
    assert meta is not None  # cuSPARSELt's form is made on a GPU
    weight = decompress(packed, meta)
    if weight.dtype == torch.int8:
        return torch._int_mm(weight, x.t())
    return (weight.float() @ x.float().t()).to(_sum_type(x))


def _product_on_gpu(packed: Tensor, meta: Tensor | None, x: Tensor, *, outputs: int) -> Tensor:
    if meta is not None and x.dtype != torch.float8_e4m3fn and torch.cuda.get_device_capability(x.device)[0] == 8:
        sum_type = torch.int32 if x.dtype == torch.int8 else None
        return torch._sparse_semi_structured_mm(packed, meta, x.t(), out_dtype=sum_type)
    if meta is not None:  # at each call; CudaRunner packs beforehand
        packed = pack_cusparselt(packed, meta)
    sum_type = _sum_type(x) if x.dtype.itemsize == 1 else None
    return torch._cslt_sparse_mm(packed, x.t(), out_dtype=sum_type)


def _sum_type(x: Tensor) -> torch.dtype:
    """What a product leaves its kernel in."""
    return {torch.int8: torch.int32, torch.float8_e4m3fn: torch.bfloat16}.get(x.dtype, x.dtype)


# --- an int8 linear as one Triton kernel ---------------------------------------------------------------------------


def has_triton() -> bool:
    return find_spec("triton") is not None


def _fused_on_gpu(
    x: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, *, dtype: torch.dtype
) -> Tensor:
    """Integers are scaled in the registers that sum them up; rows need no multiple."""
    from graphopt.backends.cuda.triton_linear import launch

    rows = _padded_columns(x.reshape(-1, x.shape[-1]), weight.shape[1])
    by_row = scale.expand(*x.shape[:-1], 1).reshape(-1).contiguous()
    y = launch(rows, by_row, weight, weight_scale, bias, dtype)
    return y.reshape(*x.shape[:-1], weight_scale.shape[0])


def _like_linear(
    x: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, *, dtype: torch.dtype
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]), dtype=dtype)


def _like_product(packed: Tensor, meta: Tensor | None, x: Tensor, *, outputs: int) -> Tensor:
    return x.new_empty((outputs, x.shape[0]), dtype=_sum_type(x))


_INT8 = "Tensor x, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias, *, ScalarType dtype"
_PACKED = "Tensor packed, Tensor? meta"


@cache
def _declare() -> None:
    """Declare the operators, once."""
    composed: dict[str, tuple[str, Callable[..., Any]]] = {
        "linear_int8": (_INT8, linear_int8),
        "linear_float8": (_INT8, linear_float8),
        "linear_weight_int8": ("Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias", linear_weight_int8),
        "linear_sparse": (f"Tensor x, {_PACKED}, Tensor? bias, *, SymInt outputs", linear_sparse),
        "linear_int8_sparse": (
            f"Tensor x, Tensor scale, {_PACKED}, Tensor weight_scale, Tensor? bias, *, SymInt outputs, "
            "ScalarType dtype",
            linear_int8_sparse,
        ),
    }  # fmt: skip
    for name, (operands, kernel) in composed.items():
        torch.library.define(f"graphopt_cuda::{name}", f"({operands}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(f"graphopt_cuda::{name}", "CompositeImplicitAutograd", kernel)
    opaque: dict[str, tuple[str, Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
        "product_sparse": (f"{_PACKED}, Tensor x, *, SymInt outputs", _product_on_cpu, _product_on_gpu, _like_product),
        "linear_int8_fused": (_INT8, linear_int8, _fused_on_gpu, _like_linear),
    }
    for name, (operands, on_cpu, on_gpu, like) in opaque.items():
        torch.library.define(f"graphopt_cuda::{name}", f"({operands}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(f"graphopt_cuda::{name}", "CPU", on_cpu)
        torch.library.impl(f"graphopt_cuda::{name}", "CUDA", on_gpu)
        torch.library.register_fake(f"graphopt_cuda::{name}", like)


_declare()
