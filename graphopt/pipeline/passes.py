"""What a pass is, and the stages of a pipeline."""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Self

from graphopt.errors import UsageError
from graphopt.ir.graph import Graph
from graphopt.pipeline.options import checked
from graphopt.pipeline.spelling import value_text

if TYPE_CHECKING:
    from graphopt.pipeline.context import Context


class Stage(enum.IntEnum):
    """Where in a pipeline a pass may stand. SIMPLIFY goes anywhere before LOWER; the rest never goes backwards."""

    SIMPLIFY = 0
    PRUNE = 1
    FACTORIZE = 2
    RECOVER = 3
    QUANTIZE = 4
    LOWER = 5


@dataclass(frozen=True)
class Pass:
    """A rewrite. Subclasses are frozen dataclasses: class-level facts, and fields that are the options.

    The type of a field says what the option may be (`graphopt.pipeline.options`), the docstring under it is its help,
    and `contradiction` says which do not go together. `run` changes the graph by the graph's own methods only,
    keeps no state on self, and accounts for every site: changed, or declined with a reason.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    lossless: ClassVar[bool] = False
    """Whether outputs must stay equal, up to rounding."""
    dialects: ClassVar[tuple[str, ...]] = ("fx", "onnx")

    def __post_init__(self) -> None:
        checked(self.name, self)
        if wrong := self.contradiction():
            raise UsageError(f"{self.name}: {wrong}")

    def contradiction(self) -> str | None:
        """What is wrong with options that are fine by themselves and do not go together, and the way out."""
        return None

    def alone(self) -> Self:
        """The pass as it runs at one site alone, as `sensitivity` does: without what it does to other nodes besides."""
        return self

    def run(self, graph: Graph, context: Context) -> None:
        raise NotImplementedError

    def __str__(self) -> str:
        """The text form: the name and the options that differ from their defaults."""
        options = [
            f"{f.name}={value_text(getattr(self, f.name))}" for f in fields(self) if getattr(self, f.name) != f.default
        ]
        return self.name + ("{" + " ".join(options) + "}" if options else "")
