"""add_int8 by aten's own kernel, `quantized::add`, on every engine of torch.

oneDNN's own (onednn.qadd) is wrong: in torch 2.13 it reads uint8 above 127 as negative (1.0 · 200 + 1.0 · 0 at a scale
of 2 gives 0).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graphopt.backends.torch_cpu.packing import Pack, Packing, from_integers, integers, pack_numbers
from graphopt.backends.torch_cpu.schemas import Y
from graphopt.ir.decline import Declined
from graphopt.ir.graph import Value
from graphopt.ir.rewrite import Builder, Match

KERNEL = torch.ops.quantized.add.default


def add(op: Builder, m: Match) -> Value:
    """The form of an add_int8 op."""
    if m.a.shape != m.b.shape:
        raise Declined("add_shapes_differ", a=list(m.a.shape), b=list(m.b.shape))
    return op("graphopt_aten.add.default", m.a, m.a_scale, m.a_zero_point, m.b, m.b_scale, m.b_zero_point, m.y_scale,
              m.y_zero_point)  # fmt: skip


def _run(
    a: Tensor, a_scale: Tensor, a_zero_point: Tensor, b: Tensor, b_scale: Tensor, b_zero_point: Tensor,
    y_scale: Tensor, y_zero_point: Tensor,
) -> Tensor:  # fmt: skip
    x = from_integers(a, a_scale.item(), int(a_zero_point.item()))
    y = from_integers(b, b_scale.item(), int(b_zero_point.item()))
    return integers(KERNEL(x, y, y_scale.item(), int(y_zero_point.item())))


def _pack(packing: Packing, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    a, b = (packing.quantized(node, given[side], *pack_numbers(packing, node, given, f"{side}_")) for side in "ab")
    numbers = pack_numbers(packing, node, given, "y_")
    return packing.integers(node, packing.call(node, KERNEL, a, b, *numbers), *numbers)


_SIDES = ", ".join(f"Tensor {side}, Tensor {side}_scale, Tensor {side}_zero_point" for side in "ab")
torch.library.define("graphopt_aten::add", f"({_SIDES}, {Y}) -> Tensor")
torch.library.impl("graphopt_aten::add", "CPU", _run)
torch.library.register_fake("graphopt_aten::add", lambda a, *_: torch.empty_like(a))

OPERATORS: dict[str, Pack] = {"graphopt_aten.add.default": _pack}
