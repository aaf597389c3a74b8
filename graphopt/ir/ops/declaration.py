"""How an op declares itself: what it means, what it costs and how its axes relate, in one place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from graphopt.ir.axes import Relation
from graphopt.ir.cutting import Cut, EmitCut

Reference = TypeVar("Reference", bound=Callable[..., Any])

Flops = Callable[..., int]
"""FLOPs (2 a multiply-add) from shapes in numbers. A parameter is called like the operand or result it describes."""

_OPS: dict[str, Op] = {}
OPS: Mapping[str, Op] = MappingProxyType(_OPS)
"""Every op by its name."""


@dataclass(frozen=True)
class Op:
    """A canonical op: an operation that passes match and emit, whatever the dialect."""

    name: str
    family: str
    """The file of graphopt/ir/ops that declares it, such as "linear"."""
    operands: tuple[str, ...]
    optional: frozenset[str]
    """The operands that may be left out."""
    attributes: Mapping[str, Any]
    """Defaults by name."""
    results: tuple[str, ...]
    reference: Callable[..., Any]
    """What it means: torch tensors in, torch tensors out."""
    flops: Flops | Literal[0]
    axes: Relation
    cut: EmitCut
    """How it is emitted again when axes have shrunk."""
    commutative: bool
    variadic: bool

    def __repr__(self) -> str:
        return self.name

    def names(self, count: int) -> tuple[str, ...]:
        """What each operand is called, where `count` are given: a variadic op repeats its one name, at least once."""
        return self.operands * max(count, 1) if self.variadic else self.operands


def op(
    *,
    flops: Flops | Literal[0],
    axes: Relation,
    cut: EmitCut = Cut.same,
    results: tuple[str, ...] = ("y",),
    commutative: bool = False,
) -> Callable[[Reference], Reference]:
    """Declare the decorated function, the op's reference in torch, as an op of its name.

    The reference's positional parameters are the operands (optional ones default to None), its keyword-only parameters
    the attributes with their defaults; with *values for its operands the op takes one or more. A name that Python has
    taken ends with an underscore, which the op's does not.
    flops: from the shapes of the operands and results that its parameters are called like, or 0 for what is not counted
    (only products are). axes: how the axes of operands and results relate; `locked` where none may shrink. cut: how a
    node is emitted when axes shrink, where an attribute tells sizes. Raises TypeError where flops reads what is no
    operand and no result.
    """

    def declare(reference: Reference) -> Reference:
        parameters = inspect.signature(reference).parameters.values()
        operands = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
        declared = Op(
            name=reference.__name__.rstrip("_"),
            family=reference.__module__.rpartition(".")[2],
            operands=tuple(p.name for p in operands),
            optional=frozenset(p.name for p in operands if p.default is None),
            attributes=MappingProxyType({p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}),
            results=results,
            reference=reference,
            flops=flops,
            axes=axes,
            cut=cut,
            commutative=commutative,
            variadic=any(p.kind is p.VAR_POSITIONAL for p in operands),
        )
        unknown = set(shapes_read(flops)) - {*declared.operands, *results} if callable(flops) else set()
        if unknown:
            raise TypeError(f"the FLOPs of {declared.name} read {', '.join(sorted(unknown))}: no operand and no result")
        _OPS[declared.name] = declared
        return reference

    return declare


@cache
def shapes_read(flops: Flops) -> tuple[str, ...]:
    """The operands and results whose shapes these FLOPs are computed from."""
    return tuple(inspect.signature(flops).parameters)
