"""What the passes that train have in common: which parameters stay, and the record of a training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torch import Tensor, nn

from graphopt.errors import UsageError
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node
from graphopt.passes.recover.rules import Rules
from graphopt.pipeline.batches import Batch
from graphopt.pipeline.context import Context
from graphopt.pipeline.options import Range
from graphopt.pipeline.passes import Pass, Stage
from graphopt.training.checkpoints import Checkpoints
from graphopt.training.loop import Trainer, require_batches, trainable
from graphopt.training.meshes import Mesh
from graphopt.training.objective import HardLoss, Objective
from graphopt.training.settings import Settings


@dataclass(frozen=True)
class Recover(Settings, Pass):
    """Trains the weights of a graph as it stands: float, with zeros that stay, in low-rank pairs, or rounded."""

    stage = Stage.RECOVER
    dialects = ("fx",)
    trains = True

    label_smoothing: Annotated[float, Range(0, 1, open_high=True)] = 0.0
    """Of the built-in cross-entropy: share of each label that is spread over all classes (Szegedy et al., 2016)."""

    class_weights: tuple[float, ...] = ()
    """Of the built-in cross-entropy: the weight of each class."""

    def train(self, graph: Graph, context: Context, objective: Objective) -> None:
        """Train the graph, and record what became of it."""
        self._require_evaluate(context)
        batches = context.training_batches()
        require_batches(batches, graph, self.name)
        module = trainable(graph, objective, self)
        sites = [node for node in graph.nodes if parameters_of(graph, module, node)]
        frozen = [node for node in context.sites(graph, self.freeze) if node in sites] if self.freeze.terms else []
        if self.freeze.terms and not frozen:
            raise UsageError(f"{self.name}: freeze={self.freeze} selects no node with weights")
        context.record.eligible.clear()  # `sites` recorded those of `freeze` alone
        context.consider(sites)
        for node in frozen:
            context.decline(node, Decline("frozen"))
        names = {name for node in frozen for name in parameters_of(graph, module, node)}
        rules = Rules(graph, module, context, frozen=names, sr_ste=self.sr_ste)
        trainer = Trainer(
            graph, objective, batches, self, frozen=sorted(names), rules=rules.by_parameter,
            module=module, evaluate=context.evaluate, checkpoints=self._checkpoints(graph, context),
            watchers=context.instruments, name=self.name, mesh=mesh_of(context),
        )  # fmt: skip
        outcome = trainer.run()
        rules.finish()
        context.record.training = outcome.lines
        for note in outcome.notes:
            context.note(note)
        kept = "" if outcome.metric is None else f", metric {outcome.metric:.6g}"
        context.note(f"{outcome.steps} steps{kept}")
        if batches.note:
            context.note(batches.note)
        context.trained.append(str(self))

    def hard(self, context: Context) -> HardLoss:
        """The hard loss, as distillation calls the one to labels: the user's, or cross-entropy."""
        options = {"label_smoothing": self.label_smoothing} if self.label_smoothing else {}
        weights = {"class_weights": torch.tensor(self.class_weights)} if self.class_weights else {}
        if context.loss is None:
            raise UsageError(f"{self.name}: there is no loss; pass loss=<function of (outputs, batch)>")
        return partial(_of_list, partial(context.loss, **options, **weights))

    def _require_evaluate(self, context: Context) -> None:
        """Raise UsageError where an option is about evaluations, and there are none."""
        for option in ("patience", "evaluate_every"):
            if getattr(self, option) is not None and context.evaluate is None:
                raise UsageError(
                    f"{self.name}: {option} is about evaluations, and there are none: pass evaluate=<function of a "
                    f"model, more is better> (on the command line: --evaluate), or leave {option} out"
                )

    def _checkpoints(self, graph: Graph, context: Context) -> Checkpoints | None:
        if context.checkpoint is None:
            return None
        file = context.checkpoint / f"{len(context.trained)}-{self.name}.safetensors"
        return Checkpoints(file, graph, self.checkpoint_minutes)


def mesh_of(context: Context) -> Mesh | None:
    """The mesh that the run is spread over."""
    assert context.ranks is None or isinstance(context.ranks, Mesh)
    return context.ranks


def parameters_of(graph: Graph, module: nn.Module, node: Node) -> list[str]:
    """The names of a module's parameters that a node reads."""
    found = (graph.parameter(module, value) for value in node.operands if value is not None)
    return [name for name in found if name is not None]


def _of_list(loss: Callable[..., Tensor], outputs: Sequence[Tensor], batch: Batch) -> Tensor:
    """A loss on the outputs as a list, from which `Context.loss` makes what the model returns."""
    return loss(list(outputs), batch)
