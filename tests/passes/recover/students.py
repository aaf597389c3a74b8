"""Small students and teachers, captured once, and one training pass on a student without the rest of `optimize`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.capture.sources import Captured, capture
from graphopt.ir.graph import Graph
from graphopt.passes import Distill
from graphopt.pipeline import context as surroundings
from graphopt.pipeline.batches import Batches
from graphopt.pipeline.context import Context
from graphopt.pipeline.loss import cross_entropy
from graphopt.pipeline.runner import run_pass
from tests.models import Encoder, padding, tokens
from tests.training.networks import samples

X, Y = samples(8)
FEEDS = {"ids": tokens(3), "mask": padding(3)}


class Mlp(nn.Module):
    """x (batch, 6) -> {"logits": (batch, 4)}, in two blocks of some width."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, width), nn.ReLU()), nn.Linear(width, width)])
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(x)}


class Teacher(nn.Module):
    """As `Mlp`, with other names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.last = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.last(self.first(x))}


class Bare(Teacher):
    """As `Teacher`; it returns the logits themselves."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        y: Tensor = self.last(self.first(x))
        return y


class Small(Encoder):
    """One layer."""

    def __init__(self) -> None:
        super().__init__(1)


class Span(nn.Module):
    """ids, mask (batch, seq) -> the logits of where an answer starts and ends."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(1), nn.Linear(32, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        start, end = self.head(self.encoder(ids, mask)).unbind(-1)
        return {"start_logits": start, "end_logits": end}


class Classifier(nn.Module):
    """ids, mask (batch, 7) -> logits (batch, 7): as many classes as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(1), nn.Linear(32, 7)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.encoder(ids, mask)[:, 0])}


def bert() -> nn.Module:
    """Without dropout, so that the first step of a training computes what the module does."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    module: nn.Module = transformers.BertModel(config)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module


def made(kind: Callable[..., nn.Module], seed: int, *args: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(*args).eval()


@cache
def captured(kind: Callable[..., nn.Module], seed: int, *args: Any) -> Captured:
    example: Any = X if kind in (Mlp, Teacher) else FEEDS
    if kind is bert:
        example = {"input_ids": FEEDS["ids"], "attention_mask": FEEDS["mask"]}
    return capture(made(kind, seed, *args), "fx", example_inputs=example)


@dataclass
class Distilled:
    graph: Graph
    lines: list[dict[str, Any]]
    notes: list[str]

    def same(self, other: Distilled) -> bool:
        ours, theirs = (dict(one.graph.constants()) for one in (self, other))
        return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def distilled(student: Captured, teacher: Captured, data: Any, **options: Any) -> Distilled:
    """A clone of the student after `distill` with these options."""
    graph, rebuild = student.graph.clone(), student.signature.rebuild
    context = Context(
        training=Batches(data, graph.inputs, name="training"),
        outputs=student.signature.outputs,
        original=student.graph,
        teacher=surroundings.TeacherGraph(teacher.graph, tuple(teacher.signature.outputs)),
        loss=lambda outputs, batch, **more: cross_entropy(rebuild(outputs), batch, **more),
    )
    run_pass(Distill(**options), graph, context)
    return Distilled(graph, context.record.training, context.record.notes)
