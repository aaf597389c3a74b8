"""A decline: a site or a match that stays as it is, and why. `graphopt.report.declines` has the sentences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, init=False)
class Decline:
    """Why something stays as it is: a code, and the values that make the case."""

    code: str
    """Such as not_smaller: what tests and programs compare."""
    values: Mapping[str, Any]
    """By name, what the sentence of the code is filled with."""

    def __init__(self, code: str, /, **values: Any) -> None:
        object.__setattr__(self, "code", code)
        object.__setattr__(self, "values", values)

    def __hash__(self) -> int:
        return hash((self.code, repr(self.values)))


class Declined(Exception):
    """Raised by a rule's replacement to leave a match as it is."""

    def __init__(self, code: str | Decline, /, **values: Any) -> None:
        self.decline = code if isinstance(code, Decline) else Decline(code, **values)
        super().__init__(self.decline)
