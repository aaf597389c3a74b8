"""How much the units of a group (neurons, heads, channels) matter: one number per unit, to rank those that go."""

from collections.abc import Iterable

import torch
from torch import Tensor

from graphopt.numerics.finite import require_finite

Slices = tuple[Tensor, int, Tensor]
"""A tensor (float, any shape), an axis of it, and the unit of each position there ((size,) int64, -1 for none)."""


def per_unit(parts: Iterable[Slices], size: int) -> Tensor:
    """The sum of everything that belongs to each of `size` units, over all parts: float64 (size,).

    Raises ValueError on NaN or infinity, and where units and axis differ in length.
    """
    total = torch.zeros(size + 1, dtype=torch.float64)
    for values, axis, units in parts:
        require_finite(values, "a tensor of the group")
        if len(units) != values.shape[axis]:
            raise ValueError(f"{len(units)} units for axis {axis} of shape {list(values.shape)}")
        rows = values.detach().double().movedim(axis, 0).reshape(len(units), -1)
        total.index_add_(0, torch.where(units < 0, size, units), rows.sum(1))
    return total[:size]


def norms(parts: Iterable[Slices], size: int, *, order: int) -> Tensor:
    """The L1 (order 1) or L2 (order 2) norm of all weights of each unit: float64 (size,).

    Source: Li et al. 2017, section 3.1, over all tensors of the group as in Fang et al. 2023, section 3.3.
    """
    powers = ((tensor.detach().double().abs() ** order, axis, units) for tensor, axis, units in parts)
    return per_unit(powers, size) ** (1 / order)


def output_energy(weight: Tensor, squares: Tensor) -> Tensor:
    """What each input of a layer adds to its outputs by itself: (‖x_j‖ · ‖W_:j‖)², the square of WANDA's criterion.

    weight: float, (out, in, *kernel); squares: the mean of x² for each input of an output, (in * kernel sizes,).
    Returns float64 (in,), in squared units of the output, summed over the kernel: what the mean of ‖y‖² would lose
    without this input, were the inputs uncorrelated. Source: Sun et al. 2024, section 3, with the norm over outputs.
    """
    columns = weight.detach().contiguous().double().flatten(1).square().sum(0)
    if columns.shape != squares.shape:
        raise ValueError(f"{list(squares.shape)} squares for a weight of shape {list(weight.shape)}")
    return (columns * squares).reshape(weight.shape[1], -1).sum(1)


def taylor(parts: Iterable[tuple[Tensor, Tensor, int, Tensor]], size: int) -> Tensor:
    """|sum of w · dL/dw| over all weights of each unit: the change of the loss without it, to first order.

    parts: weight, its gradient (same shape), an axis, and the unit of each position there. Returns float64 (size,), in
    units of the loss. Source: Molchanov et al. 2017, section 2.2, over the weights of a unit as in their paper of 2019.
    """
    products = ((weight.detach().double() * slope.double(), axis, units) for weight, slope, axis, units in parts)
    return per_unit(products, size).abs()
