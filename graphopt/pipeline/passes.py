"""What a pass is, and the stages of a pipeline."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from graphopt.errors import UsageError
from graphopt.ir.graph import Graph
from graphopt.pipeline.options import check_options
from graphopt.pipeline.presets import PRESETS
from graphopt.pipeline.spelling import value_text

if TYPE_CHECKING:
    from graphopt.pipeline.context import Context


class Stage(enum.IntEnum):
    """Where in a pipeline a pass may stand. SIMPLIFY and RECOVER (training) go anywhere before LOWER; the rest never
    goes backwards."""

    SIMPLIFY = 0
    PRUNE = 1
    FACTORIZE = 2
    RECOVER = 3
    QUANTIZE = 4
    LOWER = 5


@dataclass(frozen=True)
class Pass:
    """A transformation of a graph. Subclasses are frozen dataclasses, whose fields are the options.

    The type of a field says which values the option takes (`graphopt.pipeline.options`), the docstring under it is its
    help, and `contradiction` says which options exclude each other. `run` changes the graph only through the graph's
    own methods, keeps no state on self, and changes every site, or declines it with a reason.
    Raises UsageError where an option has a value that it does not take, and where two options contradict each other.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    lossless: ClassVar[bool] = False
    """Whether outputs must stay equal, up to rounding."""
    dialects: ClassVar[tuple[str, ...]] = ("fx", "onnx")
    changes_weights: ClassVar[bool] = False
    """Whether it makes weights smaller or fewer: then each op with weights is changed, or declined by name
    (`graphopt.pipeline.remaining`)."""
    trains: ClassVar[bool] = False
    """Whether it trains weights."""
    without_calibration: ClassVar[str] = ""
    """Options with which the pass needs no calibration data, as text; empty where there are none."""
    whole_model_options: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Options that set a budget for the whole model, and have no meaning for one site: each with options to give to a
    pass that runs at one site alone, as text."""
    former_options: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Options by the names that they had before: the text form still takes these, and warns."""

    def __init_subclass__(cls) -> None:
        """Raise UsageError for the name of a preset."""
        if cls.__dict__.get("name") in PRESETS:
            raise UsageError(f"{cls.__qualname__}: {cls.name!r} is a preset, and no pass has its name: choose another")

    def __post_init__(self) -> None:
        check_options(self.name, self)
        if reason := self.contradiction():
            raise UsageError(f"{self.name}: {reason}")

    @property
    def needs_torch(self) -> bool:
        """Whether it needs gradients: then the pipeline up to it runs on torch.fx, whatever the target."""
        return self.trains

    def contradiction(self) -> str | None:
        """Which options exclude each other though each is valid by itself, and what to give instead; None where none
        do. Called when every option has been checked against its type."""
        return None

    @property
    def measures(self) -> bool:
        """Whether it asks the target how fast graphs are (`Target.ratios`): what it leaves is made for that engine."""
        return False

    @property
    def marks(self) -> bool:
        """Whether it changes nothing, and only marks what the training behind it learns to remove (`Context.marks`)."""
        return False

    def given(self) -> dict[str, Any]:
        """The options that differ from their defaults, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    def alone(self) -> Self:
        """The pass as it runs at one site alone, as `sensitivity` does: without what it does to other nodes besides."""
        return self

    def within(self) -> Pass | None:
        """The pass as it runs in the bodies of conditions and loops (`Graph.bodies`), where no feeds are known and no
        calibration is; None where it does not enter them, and what has weights there is declined."""
        return None

    def run(self, graph: Graph, context: Context) -> None:
        raise NotImplementedError

    def require_effect(self, context: Context) -> None:
        """Raise UsageError where the pass, which has run in the graph and in its bodies, changed nothing because of its
        options."""

    def __str__(self) -> str:
        """The text form: the name, and the options that differ from their defaults."""
        options = " ".join(f"{name}={value_text(value)}" for name, value in self.given().items())
        return f"{self.name}{{{options}}}" if options else self.name
