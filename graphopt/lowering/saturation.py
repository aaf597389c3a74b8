"""How large int8 weights may be on CPUs whose sums of uint8 and int8 products saturate."""

from __future__ import annotations

from torch import Tensor

CPUS = {
    "avx2": "avx2",
    "avx512": "avx2 avx512f",
    "avx512_vnni": "avx2 avx512f avx512_vnni",
    "avx512_amx": "avx2 avx512f avx512_vnni avx512_bf16 amx_int8 amx_bf16",
}
"""CPUs that graphs can be lowered for without measuring, and their flags as Linux spells them."""

SAFE = 64
"""Largest magnitude of int8 weights at which two products with uint8 fit in 16 bits: 2 * 255 * 64 is 32640."""


def max_abs(weight: Tensor) -> int:
    """The largest magnitude in an int8 weight. 128 where it holds -128, whose magnitude int8 cannot hold."""
    return int(weight.short().abs().max())
