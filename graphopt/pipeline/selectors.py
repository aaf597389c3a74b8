"""Which sites a pass may change, and values that differ by site."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from graphopt.errors import UsageError
from graphopt.ir.graph import Node
from graphopt.ir.ops import OPS
from graphopt.pipeline.spelling import value_text


@dataclass(frozen=True, init=False, eq=False)
class Selector:
    """Which sites: ops (linear), module paths or globs (encoder.layer.*.output), regular expressions (re:...), or
    single nodes by their unique name (node:..., see `of`). Equal where the terms are, in any order."""

    terms: tuple[str, ...]

    def __init__(self, *terms: str | Iterable[str]) -> None:
        flat = [t for term in terms for t in ([term] if isinstance(term, str) else term)]
        object.__setattr__(self, "terms", tuple(flat))

    @classmethod
    def of(cls, *nodes: Node) -> Selector:
        """These nodes and no other: a name may be that of an op, and modules called twice share their path."""
        return cls(f"node:{node.name}" for node in nodes)

    def matches(self, node: Node, term: str) -> bool:
        if term in OPS:
            return node.kind == term
        if term.startswith("node:"):
            return node.name == term.removeprefix("node:")
        if term.startswith("re:"):
            return re.search(term[3:], node.label) is not None
        return any(fnmatch.fnmatchcase(name, pattern) for name in (node.path, node.name) if name
                   for pattern in (term, term + ".*"))  # fmt: skip

    def __eq__(self, other: object) -> bool:
        return set(self.terms) == set(other.terms) if isinstance(other, Selector) else NotImplemented

    def __hash__(self) -> int:
        return hash(frozenset(self.terms))

    def __contains__(self, node: Node) -> bool:
        return any(self.matches(node, term) for term in self.terms)

    def __str__(self) -> str:
        return value_text(self.terms[0] if len(self.terms) == 1 else list(self.terms))


@dataclass(frozen=True, init=False)
class PerSite(Mapping[str, Any]):
    """A value for each term of a selector: a site takes that of the first term that matches it."""

    pairs: tuple[tuple[str, Any], ...]

    def __init__(self, values: Mapping[str, Any]) -> None:
        """Raises UsageError where a term is no text."""
        if wrong := [term for term in values if not isinstance(term, str)]:
            raise UsageError(f"{wrong[0]!r} selects no site; give an op, a module path or a pattern")
        object.__setattr__(self, "pairs", tuple(values.items()))

    def __getitem__(self, term: str) -> Any:
        return dict(self.pairs)[term]

    def __iter__(self) -> Iterator[str]:
        return (term for term, _ in self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def term_of(self, node: Node) -> str | None:
        """The term whose value a node takes, or None where no term matches it."""
        return next((term for term in self if node in Selector(term)), None)
