"""What a weight must keep to while it is trained: zeros that stay, an N:M pattern, a share that grows."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from graphopt.numerics.sparsity import Pattern, as_matrix, as_weight


class WeightRule(Protocol):
    """Holds the weight of one parameter to a form. `parameters` are trained along."""

    def parameters(self) -> list[torch.nn.Parameter]:
        """What it learns besides the weight."""

    def effective(self, weight: Tensor) -> Tensor:
        """The weight that the forward pass reads, with gradients to the stored one."""

    def progress(self, done: float) -> None:
        """Called before each step with the share of the training that is done, 0 to 1."""

    def after_step(self, weight: Tensor) -> None:
        """Called on the stored weight after each step; changes it in place."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""

    def load_state(self, state: dict[str, Tensor]) -> None: ...


class FixedZeros:
    """Zeros stay where they are."""

    def __init__(self, mask: Tensor) -> None:
        """mask: boolean, of the weight's shape, False at zeros."""
        self.mask = mask

    def parameters(self) -> list[torch.nn.Parameter]:
        return []

    def effective(self, weight: Tensor) -> Tensor:
        return weight

    def progress(self, done: float) -> None:
        pass

    def after_step(self, weight: Tensor) -> None:
        weight.mul_(self.mask)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass


class MovingPattern:
    """Of M weights along the input the N largest take part in each forward pass (SR-STE, Zhou et al. 2021).

    The gradient goes to all of them, straight through, and those that were left out decay (equation 9 there).
    """

    def __init__(self, pattern: Pattern, decay: float, transposed: bool = False) -> None:
        """pattern: N:M. decay: what is added to the gradient of a weight that was left out, as a share of it.
        transposed: whether a matrix is stored as (in, out)."""
        self.pattern, self.decay, self.transposed = pattern, decay, transposed

    def parameters(self) -> list[torch.nn.Parameter]:
        return []

    def effective(self, weight: Tensor) -> Tensor:
        found: Tensor = _Straight.apply(weight, self.mask(weight), self.decay)  # type: ignore[no-untyped-call]
        return found

    def mask(self, weight: Tensor) -> Tensor:
        """True at the weights that take part."""
        scores = weight.detach().abs()
        scores = scores.T if self.transposed else scores
        (mask,) = self.pattern.masks([as_matrix(scores)], self.pattern.amount or 0.0)
        shaped = as_weight(mask, scores.shape)
        return shaped.T if self.transposed else shaped

    def progress(self, done: float) -> None:
        pass

    def after_step(self, weight: Tensor) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass


class _Straight(torch.autograd.Function):
    """weight · mask, whose gradient reaches the whole weight, with decay where the mask is False."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, mask = ctx.saved_tensors
        return gradient + ctx.decay * ~mask * weight, None, None
