"""`Rounded`: quantize and dequantize as a module that trains, with fixed or with learned scales.

The values are those of the ops that are deployed, bit for bit; only the gradient is made up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.dialects.fx import custom_operators  # noqa: F401  (registers choose_qparams)
from graphopt.dialects.fx.spellings import quantized_decomposed
from graphopt.ir.graph import dtype_name

_LEAST = 2.0**-10
"""The share of its first value that a learned scale keeps at least, so that it neither vanishes nor changes its sign.
No range that is worth learning shrinks a thousandfold: it is a guard, not a bound that training should meet."""

_AT_END = 2.0**-10
"""How far beyond the last integer, in scales, x still counts as within the range: weights start on integers, the last
ones among them, up to the rounding of float32."""


class Rounded(nn.Module):
    """dequantize(quantize(x)), with a straight-through gradient (Bengio et al. 2013): that of the identity where x is
    within half a step of the range of the integers, and 0 elsewhere.

    A learned scale is a parameter with the gradient of LSQ (Esser et al. 2020, equation 3), summed over its elements
    and multiplied by 1 / sqrt(n * largest integer): n counts the weights that share the scale, or the elements of an
    activation in one sample. Its zero point stays. The floats are float32, under autocast too.
    """

    scale: Tensor | None
    zero_point: Tensor | None
    limit: Tensor | None

    def __init__(
        self, scale: Tensor | None, zero_point: Tensor | None, low: float, high: float, dtype: torch.dtype,
        axis: int | None = None, block: int = 0, *, weight: bool = False, rows: float | None = None,
        declared: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        """scale: float32, one number, or one for each index along `axis` (and for each `block` entries along axis 1);
        None chooses scale and zero point from each x, or, with `rows`, a scale for each row, at which its largest
        magnitude becomes `rows`; an nn.Parameter is learned. low and high: the least and the largest integer (or number
        of a float of 8 bits). weight: whether x is a weight, and so its axis 0 no batch. declared: the range that the
        dequantize names, where it is wider."""
        super().__init__()
        if zero_point is None and (rows is not None or scale is not None):
            plain = axis is None or dtype.is_floating_point
            zero_point = torch.zeros(() if scale is None else scale.shape, dtype=dtype if plain else torch.int64)
        if isinstance(scale, nn.Parameter):
            self.scale = scale
        else:
            self.register_buffer("scale", scale)
        self.register_buffer("limit", scale.detach() * _LEAST if isinstance(scale, nn.Parameter) else None)
        self.register_buffer("zero_point", zero_point)
        self.low, self.high, self.dtype, self.axis, self.block = low, high, dtype, axis, block
        self.is_weight, self.rows, self.declared = weight, rows, declared or (low, high)
        self.parts = 1
        """How many processes have a part of what shares a scale."""
        self.over: Callable[[Tensor], Tensor] | None = None
        """Gives the extremes over these processes, from which a dynamic range is chosen."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        scale, zero_point = self.parameters_for(x)
        differentiable = torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad)
        if torch.compiler.is_exporting() or not differentiable:
            return self._dequantized(self._quantized(x, scale, zero_point), scale, zero_point)
        y: Tensor = _StraightThrough.apply(x, scale, zero_point, self)  # type: ignore[no-untyped-call]
        return y

    @torch.no_grad()
    def integers(self, x: Tensor) -> Tensor:
        """The integers that x is rounded to."""
        return self._quantized(x.float(), *self.parameters_for(x.float()))

    def parameters_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and the zero point of x."""
        scale: Tensor
        if self.scale is not None and self.zero_point is not None:
            return self.step(), self.zero_point
        x = x.detach() if self.over is None else self.over(x.detach())
        if self.rows is not None and self.zero_point is not None:
            scale = torch.ops.graphopt.row_scale(x, largest=self.rows)
            return scale, self.zero_point
        scale, zero_point = torch.ops.graphopt.choose_qparams(x)
        return scale, zero_point

    def step(self) -> Tensor:
        """The scale in use (the step size of LSQ): a learned one is held at its limit, where the gradient still passes,
        so that it comes back."""
        scale, limit = self.scale, self.limit
        assert scale is not None  # where x chooses it there is none to ask for
        if limit is None:
            return scale
        held: Tensor = _held(scale, limit) if torch.compiler.is_exporting() else _Held.apply(scale, limit)  # type: ignore[no-untyped-call]
        return held

    def _quantized(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """The integers of x; with a float of 8 bits, the nearest of its numbers."""
        ops, limits = quantized_decomposed(), (self.low, self.high, self.dtype)
        integers: Tensor
        if self._custom:
            integers = torch.ops.graphopt.quantize(x, scale, zero_point, axis=self.axis)
            integers = integers if self.dtype.is_floating_point else integers.clamp(self.low, self.high)
        elif self.block:  # torch quantizes groups only to integers of less than 8 bits
            integers = (x / self.along(scale, x)).round() + self.along(zero_point, x)
            integers = integers.clamp(self.low, self.high).to(self.dtype)
        elif self.axis is not None:
            integers = ops.quantize_per_channel(x, scale, zero_point, self.axis, *limits)
        elif torch.compiler.is_exporting():
            integers = ops.quantize_per_tensor.tensor(x, scale, zero_point, *limits)
        else:  # the same, bit for bit; the operator makes Python numbers of its tensors, and waits for a GPU
            integers = (x * scale.double().reciprocal().float()).round() + zero_point
            integers = integers.clamp(self.low, self.high).to(self.dtype)
        return integers

    def _dequantized(self, integers: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        ops, given = quantized_decomposed(), (integers, scale, zero_point)
        limits = *self.declared, self.dtype
        y: Tensor
        if self._custom:
            y = torch.ops.graphopt.dequantize(*given, axis=self.axis)
        elif self.block:
            y = ops.dequantize_per_channel_group(*given, *limits, self.block, torch.float32)
        elif self.axis is not None:
            y = ops.dequantize_per_channel(*given, self.axis, *limits)
        elif torch.compiler.is_exporting():
            y = ops.dequantize_per_tensor.tensor(*given, *limits)
        else:
            y = (integers.float() - zero_point) * scale
        return y

    @property
    def _custom(self) -> bool:
        """Whether torch has no operators for this form."""
        return self.rows is not None or self.dtype.is_floating_point

    def along(self, parameter: Tensor, x: Tensor) -> Tensor:
        """A scale or zero point, shaped to broadcast to x."""
        if self.block:
            return parameter.reshape(len(x), -1).repeat_interleave(self.block, 1)
        return parameter if self.axis is None else parameter.reshape([-1, *[1] * (x.dim() - 1 - self.axis)])

    def summed(self, gradient: Tensor, scale: Tensor) -> Tensor:
        """The sum of a gradient with respect to `along(scale)`, by scale."""
        if self.block:
            return gradient.reshape(-1, self.block).sum(1).reshape(scale.shape)
        axes = [axis for axis in range(gradient.dim()) if axis != self.axis]
        return (gradient.sum(axes) if axes else gradient).reshape(scale.shape)

    def shares(self, x: Tensor) -> int:
        """How many elements of x share a scale, those of one sample where x is an activation."""
        scales = 1 if self.scale is None else self.scale.numel()
        batch = 1 if self.is_weight or not x.dim() else x.shape[0]
        return max(1, self.parts * x.numel() // max(1, scales * batch))

    def extra_repr(self) -> str:
        learned = ", scale learned" if self.limit is not None else ""
        return f"{dtype_name(self.dtype)} in [{self.low}, {self.high}]" + (
            "" if self.axis is None else f", axis={self.axis}"
        ) + learned  # fmt: skip


class _StraightThrough(torch.autograd.Function):
    """The values of a `Rounded`, with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, rounded: Rounded) -> Tensor:
        integers = rounded._quantized(x, scale, zero_point)
        ctx.rounded = rounded
        exact = x / rounded.along(scale, x) + rounded.along(zero_point, x).float()
        within = (exact >= rounded.low - 0.5) & (exact <= rounded.high + 0.5)
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(within, scale, zero_point, x, integers)
        else:
            ctx.save_for_backward(within)
        return rounded._dequantized(integers, scale, zero_point)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), rounded = gradients, ctx.rounded
        within, *others = ctx.saved_tensors
        of_x = gradient * within if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_x, None, None, None
        scale, zero_point, x, integers = others
        zero, exact = rounded.along(zero_point, x).float(), x / rounded.along(scale, x)
        inside = (exact + zero >= rounded.low - _AT_END) & (exact + zero <= rounded.high + _AT_END)
        by_scale = integers.float() - zero - exact * inside
        factor = 1 / math.sqrt(rounded.shares(x) * rounded.high)
        return of_x, rounded.summed(gradient * by_scale, scale) * factor, None, None


def _held(scale: Tensor, limit: Tensor) -> Tensor:
    """The scale, or the limit where that is farther from 0 or has the other sign."""
    return torch.where(limit > 0, torch.maximum(scale, limit), torch.minimum(scale, limit))


class _Held(torch.autograd.Function):
    """`_held` with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, limit: Tensor) -> Tensor:
        return _held(scale, limit)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None
