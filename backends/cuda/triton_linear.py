"""linear of int8 rows and an int8 weight as one Triton kernel: the sums never leave the registers as integers.

Imported only where a GPU runs it. Loads are masked, so sizes need not be multiples of a tile's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILES = (
    # rows, outputs, inputs of a tile; warps; stages
    (16, 64, 256, 4, 4),  # decoding, a few rows
    (16, 128, 128, 4, 4),
    (64, 128, 128, 4, 4),
    (128, 128, 128, 8, 3),
    (128, 256, 128, 8, 3),
    (256, 128, 128, 8, 3),
)

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.autotune(  # type: ignore[untyped-decorator]
    [
        triton.Config({"ROWS": rows, "OUTPUTS": outputs, "INPUTS": inputs}, num_warps=warps, num_stages=stages)
        for rows, outputs, inputs, warps, stages in _TILES
    ],
    key=["rows", "outputs", "inputs"],
)
@triton.jit  # type: ignore[untyped-decorator]
def _linear(  # type: ignore[no-untyped-def]
    x, scale, weight, weight_scale, bias, y, rows, outputs, inputs,
    HAS_BIAS: tl.constexpr, TYPE: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    # Tiles of 8 rows of tiles follow each other down a column, so that they share weights in the cache.
    across, down = tl.cdiv(outputs, OUTPUTS), tl.cdiv(rows, ROWS)
    group = tl.program_id(0) // (8 * across)
    height = tl.minimum(down - group * 8, 8)
    row_tile = group * 8 + tl.program_id(0) % (8 * across) % height
    output_tile = tl.program_id(0) % (8 * across) // height
    row = row_tile * ROWS + tl.arange(0, ROWS)
    output = output_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.arange(0, INPUTS)
    row_is_in, output_is_in = row[:, None] < rows, output[None, :] < outputs
    x_tile = x + row[:, None].to(tl.int64) * inputs + column[None, :]
    weight_tile = weight + output[None, :].to(tl.int64) * inputs + column[:, None]
    sums = tl.zeros((ROWS, OUTPUTS), dtype=tl.int32)
    for start in range(0, inputs, INPUTS):
        is_in = column < inputs - start
        a = tl.load(x_tile + start, mask=row_is_in & is_in[None, :], other=0)
        b = tl.load(weight_tile + start, mask=output_is_in & is_in[:, None], other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
    result = sums.to(tl.float32) * tl.load(scale + row, mask=row < rows, other=0.0)[:, None]
    result *= tl.load(weight_scale + output, mask=output < outputs, other=0.0)[None, :]
    if HAS_BIAS:
        result += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    place = y + row[:, None].to(tl.int64) * outputs + output[None, :]
    tl.store(place, result.to(TYPE), mask=row_is_in & output_is_in)


def launch(
    x: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x int8 (rows, in) and weight int8 (out or more, in), both contiguous; scale float32 (rows,); weight_scale float32
    (out,); bias float (out,) -> (rows, out) in dtype."""
    rows, outputs, inputs = x.shape[0], weight_scale.shape[0], x.shape[1]
    y = torch.empty((rows, outputs), dtype=dtype, device=x.device)

    def grid(tile: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(outputs, tile["OUTPUTS"]),)

    _linear[grid](
        x, scale, weight, weight_scale, bias if bias is not None else weight_scale, y, rows, outputs, inputs,
        HAS_BIAS=bias is not None, TYPE=_TYPES[dtype],
    )  # fmt: skip
    return y
