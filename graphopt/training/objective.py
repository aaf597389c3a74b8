"""What is minimized: the loss to labels, and the distance to a teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from graphopt.analysis.masks import padding_mask
from graphopt.errors import UsageError
from graphopt.ir.graph import Value
from graphopt.pipeline.batches import Batch
from graphopt.pipeline.loss import wide
from graphopt.training import losses
from graphopt.training.features import Pair, projections, tokens_by_width
from graphopt.training.teacher import Teacher

Terms = dict[str, Tensor]
"""The terms of a loss by name, weighted: their sum is minimized."""

HardLoss = Callable[[Sequence[Tensor], Batch], Tensor]
"""(the graph's outputs in order, the batch) -> one number."""

Form = Literal["logits", "probabilities", "embedding", "positions"]
"""Positions: one logit for each token, such as those of the start of an answer."""


@dataclass(frozen=True)
class Compared:
    """An output that student and teacher both return: its name, its place in each, and what it holds."""

    name: str
    place: int
    their_place: int
    form: Form


class Objective(nn.Module):
    """The loss of one batch. Its parameters, where it has any, are trained along and dropped."""

    also: Sequence[Value] = ()
    """Values inside the student that it reads."""

    @property
    def key(self) -> str:
        """Of what it compares the student with: a checkpoint is of this too."""
        return ""

    def forward(self, outputs: Sequence[Tensor], also: Sequence[Tensor], batch: Batch) -> Terms:
        raise NotImplementedError


class Labels(Objective):
    """The loss to labels alone."""

    def __init__(self, loss: HardLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Sequence[Tensor], also: Sequence[Tensor], batch: Batch) -> Terms:
        return {"hard": self.loss(outputs, batch)}


@dataclass(frozen=True)
class Weights:
    """What each term of distillation counts, as the options of `Distill` say; one with weight 0 is not computed."""

    alpha: float = 0.0
    """Of the loss to labels; the terms below share 1 - alpha."""
    temperature: float = 1.0
    """By which logits are divided; no weight, but of the soft term too."""
    cosine: float = 1.0
    similarity: float = 1.0
    hidden: float = 0.0
    relations: float = 0.0


class Distillation(Objective):
    """alpha · hard + (1 - alpha) · (soft + hidden + relations)."""

    def __init__(
        self,
        teacher: Teacher,
        outputs: Sequence[Compared],
        weights: Weights,
        hard: HardLoss | None = None,
        hidden: Sequence[Pair] = (),
        relations: Sequence[Pair] = (),
        seed: int = 0,
    ) -> None:
        """teacher: runs on `also` of the pairs: hidden first, then relations. seed: of the projections. Raises
        UsageError where the features of a pair cannot be projected, and where alpha is above 0 without a loss to
        labels."""
        if weights.alpha and hard is None:
            raise UsageError("alpha is the weight of a loss to labels, and there is none")
        super().__init__()
        self.teacher, self.outputs, self.weights, self.hard = teacher, outputs, weights, hard
        self.hidden, self.relations = list(hidden), list(relations)
        self.also = [pair.student for pair in (*hidden, *relations)]
        self.projections = projections(hidden, seed)

    @property
    def key(self) -> str:
        return self.teacher.key

    def forward(self, outputs: Sequence[Tensor], also: Sequence[Tensor], batch: Batch) -> Terms:
        alpha = self.weights.alpha
        terms: Terms = {} if self.hard is None else {"hard": alpha * self.hard(outputs, batch)}
        theirs, theirs_also = self.teacher(batch.feeds)
        real = padding_mask(batch.feeds)
        real = None if real is None else real.to(outputs[0].device)
        terms["soft"] = (1 - alpha) * self._soft(outputs, theirs, real)
        pairs = list(zip(also, theirs_also, strict=True))
        if self.hidden:
            terms["hidden"] = (1 - alpha) * self.weights.hidden * self._hidden(pairs[: len(self.hidden)], real)
        if self.relations:
            terms["relations"] = (1 - alpha) * self.weights.relations * self._relations(pairs[len(self.hidden) :], real)
        return terms

    def _soft(self, ours: Sequence[Tensor], theirs: Sequence[Tensor], real: Tensor | None) -> Tensor:
        """The mean over the compared outputs."""
        found = []
        for output in self.outputs:
            name, form = output.name, output.form
            x, y = ours[output.place], theirs[output.their_place]
            if x.shape != y.shape:
                raise UsageError(
                    f"the student's output {name} is {list(x.shape)}, and the teacher's is {list(y.shape)}: name the "
                    "outputs to compare (outputs=), or give a teacher with the same outputs"
                )
            positions = real if real is not None and x.shape[:2] == real.shape and x.dim() > 2 else None
            if form == "embedding":
                found.append(self._embedding(x, y, positions))
            else:
                if form == "probabilities":
                    x, y = (wide(p).clamp(min=1e-9).log() for p in (x, y))
                if form == "positions" and real is not None and x.shape == real.shape:
                    x, y = (scores.masked_fill(~real, -1e4) for scores in (x, y))
                found.append(losses.soft_targets(x, y, self.weights.temperature, positions))
        return torch.stack(found).mean()

    def _embedding(self, x: Tensor, y: Tensor, real: Tensor | None) -> Tensor:
        total = losses.mean_square(x, y, real)
        if x.dim() < 2:
            return total
        ours, theirs = losses.pooled(x, real), losses.pooled(y, real)
        if self.weights.cosine:
            total = total + self.weights.cosine * losses.cosine_distance(ours, theirs)
        if self.weights.similarity and len(ours) > 1:
            total = total + self.weights.similarity * losses.similarity_distance(ours, theirs)
        return total

    def _hidden(self, pairs: Sequence[tuple[Tensor, Tensor]], real: Tensor | None) -> Tensor:
        found = []
        for place, (x, y) in enumerate(pairs):
            if str(place) in self.projections:
                x = self.projections[str(place)](x)
            if x.shape != y.shape:
                raise UsageError(
                    f"the student's {self.hidden[place].name} is {list(x.shape)}, and the teacher's is "
                    f"{list(y.shape)}: match modules whose results have the same sizes, but for the width"
                )
            positions = real if real is not None and x.dim() == 3 and x.shape[:2] == real.shape else None
            found.append(losses.mean_square(x, y, positions))
        return torch.stack(found).mean()

    def _relations(self, pairs: Sequence[tuple[Tensor, Tensor]], real: Tensor | None) -> Tensor:
        found = []
        for pair, (x, y) in zip(self.relations, pairs, strict=True):
            x, y = (tokens_by_width(one, one.dim()) for one in (x, y))
            if x.shape[:2] != y.shape[:2]:
                raise UsageError(f"{pair.name} has {list(x.shape)}, and the teacher's {list(y.shape)}: lengths differ")
            positions = real if real is not None and x.shape[:2] == real.shape else None
            heads = _shared_heads(x.shape[-1], y.shape[-1])
            found.append(losses.relation_distance(x, y, heads, positions))
        return torch.stack(found).mean()


RELATION_HEADS = 12
"""Most parts that queries, keys and values are cut into, where both widths have them."""


def _shared_heads(ours: int, theirs: int) -> int:
    return next(heads for heads in range(RELATION_HEADS, 0, -1) if ours % heads == 0 and theirs % heads == 0)


def compared_outputs(
    student: Mapping[str, Value], teacher: Mapping[str, Value], names: Sequence[str] = (), form: Form | None = None
) -> list[Compared]:
    """The float outputs that both graphs return, by name, or by place where the teacher has other names.

    student, teacher: outputs by the names that the user knows, in order. names: those to compare; all without it.
    form: what they hold; None decides for each by its name and its producer.
    Raises UsageError where a name is no output, where nothing can be compared, and where sizes differ.
    """
    ours, theirs = list(student), list(teacher)
    if unknown := [name for name in names if name not in ours]:
        raise UsageError(f"outputs: the student returns {', '.join(ours)}, and not {', '.join(unknown)}")
    chosen = [name for name in ours if (name in names or not names) and _is_float(student[name])]
    if any(name in theirs for name in chosen):
        pairs = [(name, name) for name in chosen if name in theirs]
    else:
        pairs = [(name, theirs[ours.index(name)]) for name in chosen if ours.index(name) < len(theirs)]
    pairs = [(name, their_name) for name, their_name in pairs if _is_float(teacher[their_name])]
    if not pairs:
        raise UsageError(f"the student returns {', '.join(ours)}, and the teacher {', '.join(theirs)}: none in floats "
                         "can be compared")  # fmt: skip
    for name, their_name in pairs:
        _require_shapes(name, student[name], their_name, teacher[their_name])
    return [
        Compared(name, ours.index(name), theirs.index(their_name), form or _form(name, student[name]))
        for name, their_name in pairs
    ]


def _is_float(value: Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point


def _require_shapes(name: str, ours: Value, their_name: str, theirs: Value) -> None:
    if ours.shape is None or theirs.shape is None:
        return
    fixed = zip(ours.shape, theirs.shape, strict=False)
    if len(ours.shape) != len(theirs.shape) or any(
        isinstance(a, int) and isinstance(b, int) and a != b for a, b in fixed
    ):
        raise UsageError(
            f"the student's output {name} is {list(ours.shape)}, and the teacher's {their_name} is "
            f"{list(theirs.shape)}: name the outputs to compare (outputs=), or give a teacher with the same outputs"
        )


def _form(name: str, value: Value) -> Form:
    """What an output holds: by its name, else probabilities after a softmax, and logits after a linear or a product,
    with a bias or without; all else is an embedding."""
    if any(part in name.lower() for part in ("start_logits", "end_logits")):
        return "positions"
    if "logits" in name.lower():
        return "logits"
    if any(part in name.lower() for part in ("hidden", "embed", "pool")):
        return "embedding"
    producer = value.producer
    if producer is not None and producer.kind == "softmax":
        return "probabilities"
    products = ("linear", "matmul")
    if producer is not None and producer.kind == "add":  # of a bias, which is stored; not a residual sum
        sides = [one for one in producer.operands if one is not None and not one.is_constant]
        producer = sides[0].producer if len(sides) == 1 else None
    return "logits" if producer is not None and producer.kind in products else "embedding"
