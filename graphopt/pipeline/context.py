"""What a pass may ask of its surroundings while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from graphopt.errors import UsageError, nearest
from graphopt.ir.cost import Cost, sizes
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node, Value, every_node
from graphopt.pipeline.passes import Pass
from graphopt.pipeline.selectors import PerSite, Selector
from graphopt.pipeline.target import AnyTarget, Target
from graphopt.pipeline.zeros import KeptZeros, Marks
from graphopt.report.records import PassRecord, Report

if TYPE_CHECKING:
    from graphopt.pipeline.batches import Batch, Batches
    from graphopt.pipeline.calibration import Calibration, S
    from graphopt.pipeline.instruments import Instrument
    from graphopt.pipeline.ranks import Ranks


@dataclass(frozen=True)
class TeacherGraph:
    """A model to learn from: a graph of either dialect, and the names of its outputs in order."""

    graph: Graph
    outputs: tuple[str, ...]


@dataclass
class Context:
    """What a pass may ask of its surroundings while it runs."""

    target: Target = field(default_factory=AnyTarget)
    """What the graph is to run on."""
    threads: int | None = None
    """Of the engine, where a pass measures; None for its default."""
    report: Report = field(default_factory=Report)
    """Where the records of all passes go."""
    feeds: Sequence[Mapping[str, Tensor]] = ()
    """The example inputs, by input name, one mapping for each shape."""
    made_up: bool = False
    """Whether these were made from the input types, as the user gave none."""
    calibration: Calibration | None = None
    """The calibration batches, where the user gave any."""
    loss: Callable[..., Tensor] | None = None
    """(the graph's outputs in order, the batch) -> one number; for criteria that follow gradients, and for training.
    Without a loss of the user's it takes label_smoothing and class_weights too (`loss.cross_entropy`)."""
    evaluate: Callable[[Graph], float] | None = None
    """A graph -> its metric, more is better; for goals in the user's own metric."""
    training: Batches | None = None
    """The batches to train on, where the user gave any."""
    outputs: Sequence[str] = ()
    """The names of the model's outputs, in order."""
    original: Graph | None = None
    """The model before anything was lost, which is what a student is compared with: as captured, or after the last
    `finetune` in front of the first lossy pass."""
    teacher: TeacherGraph | None = None
    """Another model to learn from, where the user gave one."""
    checkpoint: Path | None = None
    """The folder where training passes keep what they need to go on after a crash."""
    ranks: Ranks | None = None
    """The processes that run this together; None of one alone."""
    is_lossy: bool = False
    """Whether a pass has lost something so far, other than by training."""
    sparse: dict[str, KeptZeros] = field(default_factory=dict)
    """By label, the sites whose zeros must stay."""
    marks: Marks = field(default_factory=Marks)
    """What the next training is to remove, which takes and clears it."""
    round: tuple[int, int] = (1, 1)
    """Which round of how many runs, inside `repeat`."""
    trained: list[str] = field(default_factory=list)
    """The training passes that have run, as text, first to last; their number tells checkpoints apart."""
    instruments: Sequence[Instrument] = ()
    """What is called around every pass."""
    reverted: Mapping[str, Decline] = field(default_factory=dict)
    """By label, sites that lossy passes must decline, and why: changing them made the model slower."""
    current: Pass | None = None
    """The pass that runs now."""
    record: PassRecord = field(default_factory=lambda: PassRecord("", ""))
    """The record of the pass that runs now."""
    considered: set[Node] = field(default_factory=set)
    """The nodes that the pass that runs now has looked at as sites, or declined."""
    labels: dict[Node, str] = field(default_factory=dict)
    """How the record names sites: by label, with the node's name where several share one (a module called twice)."""

    def begin(self, pass_: Pass, record: PassRecord) -> None:
        """A pass starts, and this is its record."""
        self.current, self.record, self.labels, self.considered = pass_, record, {}, set()

    def sites(
        self,
        graph: Graph,
        targets: Selector,
        ignore: Selector = Selector(),
        where: Callable[[Node], bool] | None = None,
    ) -> list[Node]:
        """The nodes that `targets` selects and `ignore` does not, recorded as eligible; without those that
        `reverts` declines.

        where: which of them the pass concerns at all; the others are not eligible.

        Raises UsageError where a term that the user wrote selects nothing, naming the nearest path.
        """
        nodes, known = graph.nodes, every_node(graph)
        given = list(self.current.given().values()) if self.current and graph.whole is graph else []
        for term in (term for selector in (targets, ignore) if selector in given for term in selector.terms):
            if not any(node in Selector(term) for node in known):
                names = sorted({node.label for node in known} | {node.kind for node in known if node.op})
                raise UsageError(f"{term!r} selects no site of the model{nearest(term, names)}")
        chosen = [node for node in nodes if node in targets and node not in ignore]
        chosen = [node for node in chosen if where is None or where(node)]
        self.consider(chosen)
        return [node for node in chosen if not self.reverts(self.labels[node])]

    def consider(self, sites: Sequence[Node | str]) -> None:
        """Record sites as eligible: nodes by their labels (`labels`), what is no node (a group of axes) by its name."""
        names = [site if isinstance(site, str) else site.label for site in sites]
        often = Counter([*self.record.eligible, *names])
        for site, name in zip(sites, names, strict=True):
            if not isinstance(site, str):
                self.considered.add(site)
                name = self.labels[site] = name if often[name] == 1 else f"{name} ({site.name})"
            self.record.eligible.append(name)

    def reverts(self, label: str) -> bool:
        """Whether the current pass must leave a site as it is (`reverted`); the site is then declined."""
        if label not in self.reverted or self.current is None or self.current.lossless:
            return False
        self.record.decline(label, self.reverted[label])
        return True

    def per_site(self, graph: Graph, option: str, values: PerSite, targets: Selector) -> dict[Node, Any]:
        """The value of each site that `targets` selects and a term of `values` matches.

        Raises UsageError where a term gives its value to none of them, naming the nearest path or the terms before it.
        """
        selected = [node for node in every_node(graph) if node in targets]
        terms = {node: term for node in selected if (term := values.term_of(node)) is not None}
        for term in values if graph.whole is graph else ():
            if term in terms.values():
                continue
            if any(node in Selector(term) for node in selected):
                raise UsageError(f"{option}: {term!r} is never reached, as earlier terms match all of its sites")
            names = sorted({node.label for node in selected} | {node.kind for node in selected if node.op})
            raise UsageError(f"{option}: {term!r} selects none of the sites in {targets}{nearest(term, names)}")
        return {node: values[term] for node, term in terms.items()}

    def decline(self, site: Node, why: Decline | str) -> None:
        """Record that a site stays as it is, and why."""
        self.considered.add(site)
        self.record.decline(self.labels.get(site, site.label), why)

    def note(self, text: str) -> None:
        """Record something that the user should know about this pass, once."""
        if text not in self.record.notes:
            self.record.notes.append(text)

    def statistics(self, graph: Graph, wanted: Iterable[tuple[Value, S]]) -> Iterator[S]:
        """Fill a fresh statistic of each value over the calibration batches, and yield them in order.

        The graph must not change until the last (`Calibration.observe`). Raises UsageError without calibration.
        """
        return self.batches().observe(graph, wanted)

    def gradients(self, graph: Graph, values: Sequence[Value]) -> Iterator[list[Tensor]]:
        """The gradients of the loss with respect to values, one list for each calibration batch.

        Raises UsageError without calibration or a loss, and where the dialect has no gradients.
        """
        if graph.dialect != "fx":
            raise UsageError(
                f"{self.record.name} follows gradients, and an {graph.dialect} graph has none: use a target that runs "
                "PyTorch graphs (graphopt targets), or a criterion without gradients"
            )
        if self.loss is None:
            raise UsageError(
                f"{self.record.name} follows gradients, and has no loss: pass loss=<function of (outputs, batch)>, or "
                "batches with labels"
            )
        loss = self.loss
        for batch in self.batches().with_batches():
            yield graph.gradients(batch.feeds, partial(_on_batch, loss, batch), values)

    def batches(self) -> Calibration:
        """The calibration batches. Raises UsageError where there are none."""
        if self.calibration is None:
            options = self.current.without_calibration if self.current else ""
            raise UsageError(
                f"{self.record.name} needs calibration data: pass calibration=<batches of inputs> "
                f"(on the command line: --calibration file.npz){', or use ' + options if options else ''}"
            )
        return self.calibration

    def training_batches(self) -> Batches:
        """The batches to train on. Raises UsageError where there are none."""
        if self.training is None:
            raise UsageError(
                f"{self.record.name} needs training data: pass training=<batches of inputs, and labels where the loss "
                "needs them> (on the command line: --training)"
            )
        return self.training

    def cost(self, graph: Graph) -> Cost:
        """The cost of a graph at the sizes of the first example."""
        return Cost.of(graph, sizes(graph, self.feeds[0]) if self.feeds else {})


def _on_batch(loss: Callable[[list[Tensor], Batch], Tensor], batch: Batch, outputs: list[Tensor]) -> Tensor:
    return loss(outputs, batch)
