"""Two operators between layers that are cut over processes: Megatron's f and g (Shoeybi et al. 2019, section 3).

`graphopt::copy_to_parts` hands a value to all parts: the identity, whose gradient is the sum of those of the parts.
`graphopt::sum_parts` adds what the parts give: the sum over processes, whose gradient is the identity. `group` is the
name of a process group of torch.distributed. Importing this module registers them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _summed(x: Tensor, group: str) -> Tensor:
    found: Tensor = torch.ops._c10d_functional.wait_tensor(
        torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group)
    )
    return found


class _CopyToParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], ctx.group), None


class _SumParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _copy_to_parts(x: Tensor, group: str) -> Tensor:
    found: Tensor = _CopyToParts.apply(x, group)  # type: ignore[no-untyped-call]
    return found


def _sum_parts(x: Tensor, group: str) -> Tensor:
    found: Tensor = _SumParts.apply(x, group)  # type: ignore[no-untyped-call]
    return found


for _name, _function in (("copy_to_parts", _copy_to_parts), ("sum_parts", _sum_parts)):
    torch.library.define(f"graphopt::{_name}", "(Tensor x, str group) -> Tensor")
    torch.library.impl(f"graphopt::{_name}", "CompositeImplicitAutograd", _function)

COPY, SUM = "graphopt.copy_to_parts.default", "graphopt.sum_parts.default"
"""Their names, as `Graph.emit` takes them."""
