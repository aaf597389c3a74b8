"""Options of passes: the type of a field says which values the option takes.

    rounding: Literal["auto", "nearest", "gptq"] = "auto"
    amount: Annotated[float, Range(0, 1, open_high=True)] | Mapping[str, float] | None = None
    kinds: tuple[Literal["neurons", "channels"], ...] = ("neurons",)
    targets: Selector = Selector("linear")

Three types take more than one spelling: a Selector may be given as a string or a list of them, a `Mapping` becomes a
PerSite, and a tuple may be given as a list or as its only element. A bool is never taken for a number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from math import isnan
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from graphopt.errors import UsageError, near
from graphopt.pipeline import aliases
from graphopt.pipeline.selectors import PerSite, Selector
from graphopt.pipeline.spelling import value_text


@dataclass(frozen=True)
class Range:
    """The numbers between two bounds, for use in Annotated. None is no bound; an open bound is itself left out."""

    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, number: float) -> bool:
        above = self.low is None or number > self.low or (number == self.low and not self.open_low)
        below = self.high is None or number < self.high or (number == self.high and not self.open_high)
        return above and below

    def __str__(self) -> str:
        """Such as `of at least 0 and below 1`."""
        low = None if self.low is None else f"{'above' if self.open_low else 'of at least'} {self.low:g}"
        high = None if self.high is None else f"{'below' if self.open_high else 'at most'} {self.high:g}"
        return " and ".join(filter(None, (low, high)))


def check_options(name: str, options: Any) -> None:
    """Check every field of a frozen dataclass against its type, and store Selector, PerSite and tuple in place of what
    was given for them.

    name: of the pass. Raises UsageError with the pass, the option, the value, and what the option takes.
    """
    cls: type = type(options)
    for option, kind in _types(cls).items():
        value = getattr(options, option)
        try:
            accepted = _accept(kind, value)
        except _Refused as refused:
            choices = list(dict.fromkeys(_choices(refused.kind)))
            meant = near(refused.value, choices, aliases.VALUES) if isinstance(refused.value, str) else None
            perhaps = f"; did you mean {meant!r}?" if meant else ""
            raise UsageError(f"{name}: {option} is {refused.value!r}; give {_either(choices)}{perhaps}") from None
        object.__setattr__(options, option, accepted)


def allowed(cls: type, option: str) -> str:
    """What an option takes: `a number of at least 0 and below 1`."""
    return _either(list(dict.fromkeys(_choices(_types(cls)[option]))))


def takes_sites(cls: type, option: str) -> bool:
    """Whether an option is a Selector, or may be one."""
    kind = _types(cls)[option]
    return Selector in (kind, *get_args(kind))


def takes_text(cls: type, option: str) -> bool:
    """Whether an option holds texts and nothing else but None: one, several, one for each site, or one of some."""
    return _texts(_types(cls)[option])


def takes_none(cls: type, option: str) -> bool:
    """Whether an option may be None."""
    return NoneType in get_args(_types(cls)[option])


def _texts(kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return all(isinstance(choice, str) for choice in get_args(kind))
    parts = [part for part in get_args(kind) if part not in (NoneType, ...)]
    return all(map(_texts, parts)) if parts else kind is str


@cache
def _types(cls: type) -> dict[str, Any]:
    """The types of the options of a dataclass."""
    hints = get_type_hints(cls, include_extras=True)
    return {option.name: hints[option.name] for option in fields(cls)}


# --- which values a type takes -------------------------------------------------------------------------------------


class _Refused(Exception):
    def __init__(self, kind: Any, value: Any) -> None:
        """A type, and the value that it does not take: the option's, or a part of it."""
        self.kind, self.value = kind, value


def _accept(kind: Any, value: Any) -> Any:
    """The value as an option of this type stores it. Raises _Refused where the type does not take it."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _accept_one_of(kind, value)
    if origin is tuple:
        elements = value if isinstance(value, list | tuple) else (value,)
        return tuple(_accept(arguments[0], element) for element in elements)
    if origin is Mapping and isinstance(value, Mapping):
        return PerSite({term: _accept(arguments[1], element) for term, element in value.items()})
    if kind is Selector and _are_terms(value):
        return Selector(value)
    if not _holds(kind, value):
        raise _Refused(kind, value)
    return value


def _accept_one_of(union: Any, value: Any) -> Any:
    """By the first type that takes the value. Where none does, and one refuses only a part of it, that is to blame."""
    blamed = _Refused(union, value)
    for kind in get_args(union):
        try:
            return _accept(kind, value)
        except _Refused as refused:
            blamed = blamed if refused.value is value else refused
    raise blamed


def _holds(kind: Any, value: Any) -> bool:
    """Whether a value is of a plain type, a Literal, or one of them within the Range of an Annotated."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        limits = [limit for limit in arguments[1:] if isinstance(limit, Range)]
        return _holds(arguments[0], value) and all(value in limit for limit in limits)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if kind is float:  # an int is one, NaN is no number
        return isinstance(value, int | float) and not isinstance(value, bool) and not isnan(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def _are_terms(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list | tuple) and all(isinstance(one, str) for one in value))


# --- what to give instead ------------------------------------------------------------------------------------------

_NAMES = {
    NoneType: ("none",),
    bool: ("true", "false"),
    int: ("a whole number",),
    float: ("a number",),
    str: ("a text",),
    Selector: ("ops, module paths or patterns",),
}


def _choices(kind: Any) -> Iterator[str]:
    """What a type takes, in words: each choice of a Literal, `a number of at least 0 and below 1`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for argument in arguments:
            yield from _choices(argument)
    elif origin is Annotated:
        limits = "".join(f" {limit}".rstrip() for limit in arguments[1:] if isinstance(limit, Range))
        yield from (choice + limits for choice in _choices(arguments[0]))
    elif origin is Literal:
        yield from map(value_text, arguments)
    elif origin is tuple:
        yield from _choices(arguments[0])
    elif origin is Mapping:
        yield "a value for each site"
    else:
        yield from _NAMES.get(kind, (getattr(kind, "__name__", str(kind)),))


def _either(choices: Sequence[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    *others, last = choices
    return f"{', '.join(others)} or {last}" if others else last
