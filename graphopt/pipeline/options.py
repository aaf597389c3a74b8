"""Options of passes: what the type of a field allows, checked in one place.

    rounding: Literal["auto", "nearest", "gptq"] = "auto"
    amount: Annotated[float, Range(0, 1, open_end=True)] | Mapping[str, float] | None = None
    targets: Selector = Selector("linear")

A string or a sequence of them becomes a Selector, a mapping a PerSite, and one value a tuple where the field says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from graphopt.errors import UsageError
from graphopt.pipeline.selectors import PerSite, Selector
from graphopt.pipeline.spelling import value_text


@dataclass(frozen=True)
class Range:
    """The numbers from low to high that an option may be; None is no bound, and an open end is left out."""

    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False

    def holds(self, number: float) -> bool:
        """Whether a number lies inside; NaN never does."""
        above = self.low is None or (number > self.low if self.open_low else number >= self.low)
        below = self.high is None or (number < self.high if self.open_high else number <= self.high)
        return number == number and above and below

    def __str__(self) -> str:
        low = None if self.low is None else f"{'above' if self.open_low else 'of at least'} {self.low:g}"
        high = None if self.high is None else f"{'below' if self.open_high else 'of at most'} {self.high:g}"
        return " and ".join(filter(None, (low, high)))


def checked(pass_name: str, options: Any) -> None:
    """Check the fields of a frozen dataclass, and put Selector, PerSite and tuples in place of what stands for them.

    Raises UsageError naming the pass, the option, the value, and what it may be.
    """
    cls: type = type(options)
    types = _types(cls)
    for option in fields(options):
        given = getattr(options, option.name)
        try:
            taken = _taken(types[option.name], given)
        except _Refused as refused:
            shown = repr(given if refused.value is _WHOLE else refused.value)
            allowed = _either([*dict.fromkeys(_allowed(types[option.name]))])
            raise UsageError(f"{pass_name}: {option.name} is {shown}; give {allowed}") from None
        if taken is not given:
            object.__setattr__(options, option.name, taken)


def is_selector(option: Field[Any], cls: type) -> bool:
    """Whether an option selects sites."""
    return _types(cls)[option.name] is Selector


class _Refused(Exception):
    def __init__(self, value: Any) -> None:
        self.value = value


_WHOLE = object()
"""Stands for the value of the option, where no part of it is to blame."""


@cache
def _types(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _taken(kind: Any, value: Any) -> Any:
    """The value as the field holds it. Raises _Refused with the part of it that the type does not allow."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _one_of(arguments, value)
    if origin is Annotated:
        taken = _taken(arguments[0], value)
        for limit in arguments[1:]:
            if isinstance(limit, Range) and not limit.holds(taken):
                raise _Refused(value)
        return taken
    if origin is Literal:
        if not any(type(one) is type(value) and one == value for one in arguments):
            raise _Refused(value)
        return value
    if kind is Selector:
        return _selector(value)
    if origin in (Mapping, dict) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return _by_site(arguments[1], value)
    if origin is tuple:
        several = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
        return tuple(_taken(arguments[0], one) for one in several)
    return _plain(kind, value)


def _one_of(kinds: Sequence[Any], value: Any) -> Any:
    """By the first type that takes the value; where none does, the part that one of them refuses is to blame."""
    blamed: Any = _WHOLE
    for kind in kinds:
        try:
            return _taken(kind, value)
        except _Refused as refused:
            if refused.value is not _WHOLE and refused.value is not value:
                blamed = refused.value
    raise _Refused(blamed)


def _selector(value: Any) -> Selector:
    if isinstance(value, Selector):
        return value
    terms = [value] if isinstance(value, str) else value
    if not isinstance(terms, list | tuple) or not all(isinstance(term, str) for term in terms):
        raise _Refused(_WHOLE)
    return Selector(*terms)


def _by_site(kind: Any, value: Any) -> PerSite:
    if not isinstance(value, Mapping):
        raise _Refused(_WHOLE)
    return PerSite({term: _taken(kind, one) for term, one in value.items()})


def _plain(kind: Any, value: Any) -> Any:
    """None, bool, int, float (which an int is, and a bool is not) or str."""
    fits: Callable[[], bool] = {
        NoneType: lambda: value is None,
        bool: lambda: isinstance(value, bool),
        int: lambda: isinstance(value, int) and not isinstance(value, bool),
        float: lambda: isinstance(value, int | float) and not isinstance(value, bool),
        str: lambda: isinstance(value, str),
    }.get(kind, lambda: isinstance(value, kind))
    if not fits():
        raise _Refused(_WHOLE)
    return value


# --- saying what may be given ---------------------------------------------------------------------------------------


def _allowed(kind: Any) -> Iterator[str]:
    """What a type allows, in parts: words of a choice, `a number of at least 0 and below 1`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for one in arguments:
            yield from _allowed(one)
    elif origin is Annotated:
        limits = " ".join(str(one) for one in arguments[1:] if isinstance(one, Range))
        yield from (f"{text} {limits}".rstrip() for text in _allowed(arguments[0]))
    elif origin is Literal:
        yield from map(value_text, arguments)
    elif kind is Selector:
        yield "ops, module paths or patterns"
    elif origin is tuple:
        yield from _allowed(arguments[0])
    elif origin is not None and issubclass(origin, Mapping):
        yield "a value for each site"
    else:
        yield {NoneType: "none", bool: "true", int: "a whole number", float: "a number", str: "a text"}.get(
            kind, getattr(kind, "__name__", str(kind))
        )
        if kind is bool:
            yield "false"


def _either(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"
