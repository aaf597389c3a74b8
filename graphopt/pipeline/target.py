"""What a pass may ask of a target. `graphopt.lowering.backend.Backend` answers for an engine, `AnyTarget` for none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from graphopt.errors import UsageError
from graphopt.ir.decline import Decline
from graphopt.ir.graph import Graph, Node
from graphopt.ir.qdq.regions import JOINED, STORED
from graphopt.measure.timing import Ratio

SCHEMES = ("static", "dynamic", "weight-only")
"""Activations: quantized with calibrated ranges; quantized with the range of each run; in float."""


@dataclass(frozen=True)
class Placement:
    """For targets that quantize activations only where int8 ops read them: in which form."""

    signed: bool = False
    """True is int8 and symmetric; False is uint8 with a zero point."""
    fuses_sum: bool = False
    """Whether the kernel fuses the add into the conv: the conv's result stays float, the other operand is quantized."""


class Target(Protocol):
    """What passes read: what runs fast there, and how fast two graphs are."""

    @property
    def name(self) -> str: ...

    @property
    def schemes(self) -> Mapping[str, tuple[str, ...]]:
        """By op, the quantization schemes that have a fast kernel, best first; no entry: the op stays float."""

    @property
    def weight_bits(self) -> Mapping[str, tuple[int, ...]]:
        """By op, the bits that weights may have in weight-only quantization, best first."""

    @property
    def placement(self) -> Placement | None:
        """Where integers are wanted; None: in closed quantized regions, whose results are integers too."""

    @property
    def quantizes(self) -> tuple[str, ...]:
        """Ops whose results a kernel quantizes as it computes them: nothing should stand between these and a
        quantize."""

    @property
    def granularities(self) -> tuple[str, ...]:
        """What may share a scale in dynamic quantization, best first: all of an activation (tensor), or each row of it
        along its last axis (row)."""

    @property
    def types(self) -> tuple[str, ...]:
        """What it multiplies in 8 bits (int8, float8), best first."""

    @property
    def floats(self) -> tuple[str, ...]:
        """The floats of 16 bits that it computes in."""

    @property
    def round_to(self) -> Mapping[str, int]:
        """Sizes that kernels run fast are multiples of these: by kind of axis (neurons, channels, width, rank)."""

    @property
    def runs(self) -> bool:
        """Whether its engine runs here, so that something can be timed."""

    @property
    def zeros(self) -> str:
        """What sparsity gains on this target, as a sentence for the user; empty where nothing is known."""

    @property
    def sparse(self) -> tuple[str, ...]:
        """The patterns of zeros that kernels skip, as `sparsify` spells them (2:4)."""

    def product_bits(self) -> int:
        """Bits of int8 weights whose products with uint8 never saturate: 8, or 7."""

    def why_float(self, site: Node, scheme: str, dtype: str) -> Decline | None:
        """Why a site has no kernel in 8 bits, because of its sizes or of this machine; None where it has one."""

    def ratios(
        self,
        graph: Graph,
        baseline: Graph,
        feeds: Sequence[Mapping[str, Tensor]],
        *,
        threads: int | None = None,
        rounds: int = 15,
    ) -> list[Ratio]:
        """How many times faster than `baseline` a graph runs once lowered: one Ratio for each feeds."""


class TimedBy:
    """A target whose timings come from somebody who is told how to take them."""

    def __init__(self, target: Target, answer: Callable[[Callable[[], list[Ratio]]], list[Ratio]]) -> None:
        self._target, self._answer = target, answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def ratios(
        self,
        graph: Graph,
        baseline: Graph,
        feeds: Sequence[Mapping[str, Tensor]],
        *,
        threads: int | None = None,
        rounds: int = 15,
    ) -> list[Ratio]:
        """As `Target.ratios`."""
        return self._answer(lambda: self._target.ratios(graph, baseline, feeds, threads=threads, rounds=rounds))


class AnyTarget:
    """No target in particular: every form is legal, no size is preferred, and nothing can be timed."""

    name = "no target in particular"
    schemes: Mapping[str, tuple[str, ...]] = {
        **dict.fromkeys(JOINED, ("static",)), "linear": SCHEMES, "conv": SCHEMES[:2], "matmul": SCHEMES[:2],
        "embedding": ("weight-only",), "lstm": SCHEMES[1:], **dict.fromkeys(STORED[1:], ("weight-only",)),
    }  # fmt: skip
    weight_bits: Mapping[str, tuple[int, ...]] = {"linear": (8, 4, 2), "conv": (8, 4, 2), "embedding": (8, 4, 2),
                                              **dict.fromkeys(STORED, (8,))}  # fmt: skip
    placement: Placement | None = None
    quantizes: tuple[str, ...] = ()
    granularities: tuple[str, ...] = ("tensor", "row")
    types: tuple[str, ...] = ("int8",)
    floats: tuple[str, ...] = ("float16", "bfloat16")
    round_to: Mapping[str, int] = {}
    runs = False
    zeros = ""
    sparse: tuple[str, ...] = ()

    def product_bits(self) -> int:
        return 8

    def why_float(self, site: Node, scheme: str, dtype: str) -> Decline | None:
        return None

    def ratios(
        self,
        graph: Graph,
        baseline: Graph,
        feeds: Sequence[Mapping[str, Tensor]],
        *,
        threads: int | None = None,
        rounds: int = 15,
    ) -> list[Ratio]:
        raise UsageError("there is no target to time on: give one")
