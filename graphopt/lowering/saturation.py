"""CPUs on which sums of uint8 and int8 products saturate, and how large int8 weights may be there.

x86 with AVX2 or AVX-512 and without VNNI multiplies uint8 by int8 with vpmaddubsw, which adds two products in 16 bits:
2 * 255 * 127 is 64770, above 32767. VNNI and AMX add in 32 bits.
"""

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


def cpu_saturates(flags: str) -> bool:
    """Whether a CPU adds two products of uint8 and int8 in 16 bits: x86 with AVX2 or AVX-512, and without VNNI.

    flags: as Linux spells them, separated by spaces; of a CPU without any it is taken that it does not.
    """
    known = set(flags.split())
    return bool({"avx2", "avx512f"} & known) and not {"avx_vnni", "avx512_vnni", "amx_int8"} & known


def max_abs(weight: Tensor) -> int:
    """The largest magnitude in an int8 weight. 128 where it holds -128, whose magnitude int8 cannot hold."""
    return int(weight.short().abs().max())
