"""What a weight must keep to while it is trained: zeros that stay, an N:M pattern, a share that grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.numerics.sparsity import Pattern, as_matrix, as_weight, cubic

RISE = (0.1, 0.7)
"""The shares of the training between which movement pruning removes more and more; after that the rest settles."""


class WeightRule(nn.Module):
    """Holds the weight of one parameter to a form. Its parameters are trained along, without weight decay; they and its
    persistent buffers are kept with the best weights, and in checkpoints."""

    @property
    def is_settled(self) -> bool:
        """Whether the weight has the form that was asked for: what is evaluated before that is not what ships."""
        return True

    def effective(self, weight: Tensor) -> Tensor:
        """The weight that the forward pass reads, with gradients to the stored one."""
        return weight

    def progress(self, done: float) -> None:
        """Called before each step with the share of the training that is done, and with 1 where it ends early."""

    def after_step(self, weight: Tensor) -> None:
        """Called on the stored weight after each step; changes it in place."""


class ZeroRule(WeightRule):
    """Holds single elements at zero."""

    def kept(self, weight: Tensor) -> Tensor:
        """Which elements of the stored weight take part: boolean, of its shape."""
        raise NotImplementedError


class FixedZeros(ZeroRule):
    """Zeros stay where they are."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        """mask: boolean, of the weight's shape, False at zeros."""
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def kept(self, weight: Tensor) -> Tensor:
        return self.mask

    def after_step(self, weight: Tensor) -> None:
        weight.mul_(self.mask)


class MovingPattern(ZeroRule):
    """Of M weights along the input the N largest take part in each forward pass (SR-STE, Zhou et al. 2021).

    The gradient goes to all of them, straight through, and those that were left out decay (equation 9 there).
    """

    def __init__(self, pattern: Pattern, decay: float, transposed: bool = False) -> None:
        """pattern: N:M. decay: what is added to the gradient of a weight that was left out, as a share of it.
        transposed: whether a matrix is stored as (in, out)."""
        super().__init__()
        self.pattern, self.decay, self.transposed = pattern, decay, transposed

    def effective(self, weight: Tensor) -> Tensor:
        found: Tensor = _Straight.apply(weight, self.kept(weight), self.decay)  # type: ignore[no-untyped-call]
        return found

    def kept(self, weight: Tensor) -> Tensor:
        return _mask(weight.detach().abs(), self.pattern, self.pattern.amount or 0.0, self.transposed)


class Movement(ZeroRule):
    """The weights with the lowest scores are left out, a share that grows (movement pruning, Sanh et al. 2020).

    A score has the gradient of what it lets through, dL/dW' · W for the effective weight W', whether its weight takes
    part or not: it grows where training moves the weight away from 0 (equations 3 and 5 there). A weight that is left
    out has no gradient. With N:M the number that stays of each M falls from M to N.
    """

    stays: Tensor | None
    reached: Tensor

    def __init__(
        self, shape: Sequence[int], pattern: Pattern, amount: float, *, transposed: bool = False,
        stays: Tensor | None = None,
    ) -> None:  # fmt: skip
        """shape: of the weight as it is stored. amount: the share of zeros in the end, which N:M says by itself.
        transposed: whether a matrix is stored as (in, out). stays: boolean, False at zeros that are there already:
        they remain, and count."""
        super().__init__()
        self.pattern, self.amount, self.transposed = pattern, amount, transposed
        self.scores = nn.Parameter(torch.zeros(tuple(shape)))
        self.register_buffer("stays", stays, persistent=False)
        self.register_buffer("reached", torch.zeros((), dtype=torch.float64))

    @property
    def is_settled(self) -> bool:
        return bool(self.reached == 1)

    def effective(self, weight: Tensor) -> Tensor:
        return weight * _straight(self.kept(weight), self.scores).to(weight.dtype)

    def kept(self, weight: Tensor) -> Tensor:
        reached, pattern = float(self.reached), self.pattern
        if pattern.keep:
            keep = pattern.columns - round((pattern.columns - pattern.keep) * reached)
            pattern = replace(pattern, keep=keep)
            reached = float(keep < pattern.columns)
        if reached == 0:
            return torch.ones_like(weight, dtype=torch.bool)
        # Ranks are above 0, since patterns go by magnitudes; zeros that are there already go first.
        scores = self.scores.detach().nan_to_num()
        low, high = scores.aminmax()
        ranks = scores - low + torch.where(high > low, (high - low) / 1024, 1)
        ranks = ranks if self.stays is None else ranks * self.stays
        return _mask(ranks, pattern, self.amount * reached, self.transposed)

    def progress(self, done: float) -> None:
        self.reached.fill_(cubic(done, start=RISE[0], end=RISE[1]))

    def after_step(self, weight: Tensor) -> None:
        if self.stays is not None:
            weight.mul_(self.stays)


class UnitScores(nn.Module):
    """A score for each unit (neuron, head, channel) of a group, which all weights that read the units share."""

    reached: Tensor

    def __init__(self, size: int, stay: int) -> None:
        """size: how many units there are. stay: how many are left in the end."""
        super().__init__()
        self.size, self.stay = size, stay
        self.scores = nn.Parameter(torch.zeros(size))
        self.register_buffer("reached", torch.zeros((), dtype=torch.float64))

    def units(self) -> Tensor:
        """Those that take part now: sorted int64."""
        gone = round((self.size - self.stay) * float(self.reached))
        return self.scores.detach().nan_to_num().argsort(stable=True)[gone:].sort().values

    def factors(self) -> Tensor:
        """1 for units that take part and 0 for others, with gradients to all scores, and a 1 for what is in no unit."""
        kept = torch.zeros_like(self.scores, dtype=torch.bool)
        kept[self.units()] = True
        return torch.cat([_straight(kept, self.scores), self.scores.new_ones(1)])


class UnitMovement(WeightRule):
    """The inputs that belong to units with the lowest scores are left out, ever more of them, as in `Movement`.

    In front of a product that is what removing the units does. The score of a unit has the sum of the gradients of all
    weights that read it.
    """

    units: Tensor

    def __init__(self, scores: UnitScores, axis: int, units: Tensor) -> None:
        """axis: of the stored weight, along which it reads units. units: that of each position there, -1 for none:
        int64 (size of the axis,)."""
        super().__init__()
        self.shared, self.axis = scores, axis
        self.register_buffer("units", units, persistent=False)

    @property
    def is_settled(self) -> bool:
        return bool(self.shared.reached == 1)

    def effective(self, weight: Tensor) -> Tensor:
        along = [-1 if axis == self.axis else 1 for axis in range(weight.dim())]
        return weight * self.shared.factors()[self.units].reshape(along).to(weight.dtype)

    def progress(self, done: float) -> None:
        self.shared.reached.fill_(cubic(done, start=RISE[0], end=RISE[1]))


class Together(WeightRule):
    """Several rules on one weight: each reads what the one before it makes of it."""

    def __init__(self, rules: Sequence[WeightRule]) -> None:
        super().__init__()
        self.rules = nn.ModuleList(rules)

    @property
    def _each(self) -> list[WeightRule]:
        return [rule for rule in self.rules if isinstance(rule, WeightRule)]

    @property
    def is_settled(self) -> bool:
        return all(rule.is_settled for rule in self._each)

    def effective(self, weight: Tensor) -> Tensor:
        for rule in self._each:
            weight = rule.effective(weight)
        return weight

    def progress(self, done: float) -> None:
        for rule in self._each:
            rule.progress(done)

    def after_step(self, weight: Tensor) -> None:
        for rule in self._each:
            rule.after_step(weight)


def _mask(scores: Tensor, pattern: Pattern, amount: float, transposed: bool) -> Tensor:
    """Which elements a pattern keeps, of a weight as it is stored: those of the largest magnitude of scores."""
    scores = (scores.T if transposed else scores).nan_to_num()
    (mask,) = pattern.masks([as_matrix(scores)], amount)
    shaped = as_weight(mask, scores.shape)
    return shaped.T if transposed else shaped


def _straight(mask: Tensor, scores: Tensor) -> Tensor:
    """The mask as numbers, with its gradient given to the scores."""
    return mask + (scores - scores.detach())


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
