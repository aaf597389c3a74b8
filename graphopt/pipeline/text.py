"""The text form: `sparsify{amount=0.5},low-rank{energy=0.95},quantize{scheme=static}`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields
from typing import Any

from graphopt.errors import UsageError, nearest
from graphopt.pipeline.passes import Pass
from graphopt.pipeline.runner import Pipeline, Repeat
from graphopt.pipeline.selectors import PerSite, Selector

# --- the text form -------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"""\s*(?:(?P<string>"(?:[^"\\]|\\.)*")|(?P<op>[^\s{}()\[\],="]+)|(?P<mark>[{}()\[\],=]))""")


def parse(text: str, registry: Mapping[str, Any]) -> Pipeline:
    """The pipeline that `text` describes; `registry` gives the class of each pass by name.

    Raises UsageError on a syntax error (with its position), an unknown pass or option (with the nearest name), and a
    value that the pass refuses. `str(pipeline)` is the inverse.
    """
    return _Parser(text, registry).pipeline()


class _Parser:
    def __init__(self, text: str, registry: Mapping[str, Any]) -> None:
        self.text, self.registry, self.tokens = text, registry, list[tuple[str, str, int]]()
        position = 0
        while text[position:].strip():
            match = _TOKEN.match(text, position)
            if match is None:
                raise self.error(position)
            self.tokens.append((str(match.lastgroup), match[str(match.lastgroup)], match.start(str(match.lastgroup))))
            position = match.end()
        self.tokens.append(("end", "", len(text)))

    def error(self, position: int) -> UsageError:
        return UsageError(
            f"pipeline text, at character {position + 1}: cannot read {self.text[position : position + 20]!r} "
            f"in {self.text!r}; the form is name{{option=value ...}},name..."
        )

    def take(self, expected: str) -> str:
        """The next token, which must be of this kind (op, end) or this mark."""
        kind, token, position = self.tokens[0]
        if expected != (token if kind == "mark" else kind):
            raise self.error(position)
        return self.tokens.pop(0)[1]

    def pipeline(self) -> Pipeline:
        passes = self.passes()
        self.take("end")
        return Pipeline(passes)

    def passes(self) -> list[Pass]:
        if self.tokens[0][1] in ("", ")"):
            return []
        passes = [self.one()]
        while self.tokens[0][1] == ",":
            self.take(",")
            passes.append(self.one())
        return passes

    def one(self) -> Pass:
        if self.tokens[0][1] == "(":
            return Pipeline(self.group())
        name = self.take("op")
        options = self.options() if self.tokens[0][1] == "{" else {}
        if name == "repeat":
            return _construct(Repeat, options | {"passes": tuple(self.group())})
        if name not in self.registry:
            raise UsageError(f"there is no pass {name!r}{nearest(name, [*self.registry, 'repeat'])}")
        return _construct(self.registry[name], options)

    def group(self) -> list[Pass]:
        self.take("(")
        passes = self.passes()
        self.take(")")
        return passes

    def options(self, quoted: bool = False) -> dict[str, Any]:
        """What stands in braces; quoted: names may be strings, as the terms of a value by site are."""
        options: dict[str, Any] = {}
        self.take("{")
        while self.tokens[0][1] != "}":
            kind, _, position = self.tokens[0]
            name = str(self.value()) if quoted and kind == "string" else self.take("op")
            if name in options:
                raise UsageError(f"pipeline text, at character {position + 1}: {name} is given twice in {self.text!r}")
            self.take("=")
            options[name] = self.value()
            if self.tokens[0][1] == ",":
                self.take(",")
        self.take("}")
        return options

    def value(self) -> Any:
        """A string, a _Bare op, a tuple of values, or values by term."""
        kind, token, position = self.tokens[0]
        if token == "{":
            return self.options(quoted=True)
        self.tokens.pop(0)
        if token == "[":
            items = []
            while self.tokens[0][1] != "]":
                items.append(self.value())
                if self.tokens[0][1] == ",":
                    self.take(",")
            self.take("]")
            return tuple(items)
        if kind == "string":
            with suppress(ValueError):
                return json.loads(token)
        if kind != "op":
            raise self.error(position)
        return _Bare(token)


class _Bare(str):
    """A value without quotes: a number or a constant where the option isn't a selector (a module may be called 0)."""

    def literal(self) -> Any:
        if self in ("true", "false", "none"):
            return {"true": True, "false": False, "none": None}[self]
        for number in (int, float):
            with suppress(ValueError):
                return number(self)
        return str(self)


def _literal(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_literal(item) for item in value)
    if isinstance(value, dict):
        return PerSite({term: _literal(item) for term, item in value.items()})
    return value.literal() if isinstance(value, _Bare) else value


def _selector(cls: type[Pass], name: str, value: Any) -> Selector:
    terms = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(term, str) for term in terms):
        kind = "a value by site" if isinstance(value, dict) else "a list of lists"
        raise UsageError(f"{cls.name}: {name} is {kind}; give ops, module paths or patterns")
    return Selector(*(str(term) for term in terms))


def _construct(cls: type[Pass], options: Mapping[str, Any]) -> Pass:
    known = {f.name: f for f in fields(cls)}
    chosen = {}
    for name, value in options.items():
        if name not in known:
            raise UsageError(f"{cls.name} has no option {name!r}{nearest(name, list(known))}")
        default = known[name].default
        chosen[name] = _selector(cls, name, value) if isinstance(default, Selector) else _literal(value)
    missing = [f.name for f in known.values() if f.default is MISSING and f.name not in chosen and f.init]
    if missing and cls is not Repeat:
        raise UsageError(f"{cls.name} needs {', '.join(missing)}")
    try:
        return cls(**chosen)
    except TypeError as error:
        raise UsageError(f"{cls.name}: {error}") from error
