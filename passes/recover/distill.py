"""Weights that were cut, factored or rounded are trained to say what the original says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from graphopt.errors import UsageError
from graphopt.ir.graph import Graph
from graphopt.passes.recover.recover import Recover, mesh_of
from graphopt.pipeline.context import Context, TeacherGraph
from graphopt.pipeline.options import Range
from graphopt.training.features import hidden_states, relations
from graphopt.training.objective import Distillation, Weights, compared_outputs
from graphopt.training.precision import device_of
from graphopt.training.settings import Positive
from graphopt.training.teacher import Teacher

Weight = Annotated[float, Range(0)]


@dataclass(frozen=True)
class Distill(Recover):
    """Train on what a teacher says: alpha · hard + (1 - alpha) · soft (Hinton et al., 2015).

    The teacher is the model before the first lossy pass, or `teacher=`. Soft is T² · KL at the temperature for logits;
    for embeddings it is the squared error of tokens, as a share of the teacher's mean square, plus weighted 1 - cosine
    of the sentences (means over real tokens) and the squared error of the batch's similarities. Blocks, such as
    encoder.layer.0, are compared by module path, which a student that was made from its teacher shares with it.
    """

    name = "distill"

    alpha: Annotated[float, Range(0, 1)] = 0.0
    """Weight of the loss to labels; 1 - alpha is that of the teacher."""

    temperature: Positive = 1.0
    """By which logits are divided."""

    cosine: Weight = 1.0
    """Of embeddings: weight of 1 - cosine, relative to the squared error."""

    similarity: Weight = 1.0
    """Of embeddings: weight of the squared error of the similarities between all samples of a batch."""

    hidden: Weight = 0.0
    """Weight of the squared error of the results of blocks, each as a share of the teacher's mean square."""

    relations: Weight = 0.0
    """Weight of the relations among queries, among keys and among values of the last attention (MiniLMv2, Wang et al.,
    2021)."""

    match: Mapping[str, str] | None = None
    """For a student of its own architecture: from module paths of the student to those of the teacher."""

    outputs: tuple[str, ...] = ()
    """Names of the outputs to compare; none: all in floats."""

    form: Literal["auto", "logits", "probabilities", "embedding"] = "auto"
    """What the outputs hold; auto: by their names, and by what computes them."""

    cache: str | None = None
    """A folder that keeps what the teacher says of each batch, by the batch's content: for data in a fixed order."""

    def contradiction(self) -> str | None:
        if self.alpha == 1:
            return "alpha=1 leaves nothing to the teacher: use finetune"
        if self.match and not (self.hidden or self.relations):
            return "match says which modules are compared: give hidden or relations a weight"
        if (self.label_smoothing or self.class_weights) and not self.alpha:
            return "label_smoothing and class_weights are of the loss to labels: give it a weight, alpha"
        return None

    def run(self, graph: Graph, context: Context) -> None:
        teacher = self._teacher(context)
        match = dict(self.match or {})
        hidden = hidden_states(graph, teacher.graph, match) if self.hidden else []
        related = relations(graph, teacher.graph, match) if self.relations else []
        ours = dict(zip(context.outputs, graph.outputs, strict=True))
        theirs = dict(zip(teacher.outputs, teacher.graph.outputs, strict=True))
        runner = Teacher(
            teacher.graph, [pair.teacher for pair in (*hidden, *related)], device=device_of(self.device),
            inputs=[value.name for value in graph.inputs], folder=self.cache, mesh=mesh_of(context),
        )  # fmt: skip
        weights = Weights(
            alpha=self.alpha, temperature=self.temperature, cosine=self.cosine, similarity=self.similarity,
            hidden=self.hidden, relations=self.relations,
        )  # fmt: skip
        outputs = compared_outputs(ours, theirs, self.outputs, None if self.form == "auto" else self.form)
        objective = Distillation(
            runner,
            outputs,
            weights,
            self.hard(context) if self.alpha else None,
            hidden,
            related,
            self.seed,
        )
        self.train(graph, context, objective)
        context.note(f"compared with the teacher: {', '.join(f'{one.name} as {one.form}' for one in outputs)}")

    def _teacher(self, context: Context) -> TeacherGraph:
        """The teacher that was handed in, else the model before anything was lost."""
        if context.teacher is not None:
            return context.teacher
        if context.original is None:
            raise UsageError("distill has no teacher: pass teacher=<a module or an ONNX file>")
        if not (context.is_lossy or context.marks or context.trained):
            context.note("nothing was cut before it: the student is its own teacher, and learns nothing new")
        return TeacherGraph(context.original, tuple(context.outputs))
