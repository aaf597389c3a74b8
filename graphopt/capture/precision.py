"""A module in 16 bits -> a copy in float32 behind the same inputs and results, since passes work on float32."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.capture.arguments import Call
from graphopt.errors import first_line
from graphopt.ir.structure import flattened

HALF = (torch.float16, torch.bfloat16)


def half_types(module: nn.Module) -> list[str]:
    """The types in 16 bits that the parameters of a module have."""
    types = {parameter.dtype for parameter in module.parameters()}
    return [str(dtype).removeprefix("torch.") for dtype in HALF if dtype in types]


def in_float32(module: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers in 16 bits are in float32. Raises whatever copying the module raises."""
    wide = copy.deepcopy(module)
    for tensor in (*wide.parameters(), *wide.buffers()):
        if tensor.dtype in HALF:
            tensor.data = tensor.data.float()
    return wide


def behind_half(wide: Call, result: Any) -> Call:
    """A call of a copy in float32 that takes and returns what the module itself does. result: what that returned."""
    dtypes = [leaf.dtype if isinstance(leaf, Tensor) else None for _, leaf in flattened(result)[0]]

    def run(tensors: Mapping[str, Tensor], **further: Any) -> Any:
        given = {name: one.float() if one.dtype in HALF else one for name, one in tensors.items()}
        leaves, rebuild = flattened(wide.run(given, **further))
        return rebuild([
            leaf.to(dtype) if isinstance(leaf, Tensor) and dtype in HALF else leaf
            for (_, leaf), dtype in zip(leaves, dtypes, strict=True)
        ])  # fmt: skip

    return replace(wide, run=run)


def captured_wide(names: list[str]) -> str:
    """The note on a module that was captured in float32."""
    return (
        f"the module is in {' and '.join(names)}, and was captured in float32, in which passes work; its inputs and "
        "results are in its own type"
    )


def captured_half(names: list[str], error: BaseException) -> str:
    """The note on a module that was captured as it is."""
    return (
        f"the module is in {' and '.join(names)}, and most passes need float32, in which its copy does not run "
        f"({first_line(error)}): call .float() and make it run, and hand that over"
    )
