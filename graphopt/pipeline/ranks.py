"""What a pipeline may ask of the processes that run it together, where there are several.

Every process (rank) runs the same pipeline on the same graph. `graphopt.training.meshes` answers over
torch.distributed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from graphopt.ir.graph import Graph, digest
from graphopt.pipeline.context import Context
from graphopt.pipeline.instruments import Instrument
from graphopt.pipeline.passes import Pass

T = TypeVar("T")


class Ranks(Protocol):
    """The processes of one run."""

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which alone measures, lowers and writes."""

    @property
    def data_index(self) -> int:
        """Which part of the batches this rank reads, from 0."""

    @property
    def data_count(self) -> int:
        """How many parts of the batches there are."""

    def gather(self, one: T) -> list[T]:
        """What each rank gives, by rank; every rank must call it."""

    def gather_data(self, one: T) -> list[T]:
        """As `gather`, of the ranks that differ from this one by their part of the batches alone."""

    def first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes; every rank must call it. Raises its error on every rank."""

    def require_same(self, what: str, own: object, way_out: str) -> None:
        """Raise RankError on every rank, naming the first that differs, where the ranks give different things."""


class SameGraphs(Instrument):
    """After every pass, requires that all ranks have the same graph."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def after(self, pass_: Pass, graph: Graph, context: Context) -> None:
        """Raises RankError where a rank has another graph; the passes before this one left the same on all."""
        self.ranks.require_same(
            f"the graph after {pass_}", digest(graph),
            "a pass must depend on nothing but the graph, its options, the batches and the seed",
        )  # fmt: skip
