"""The text form: `sparsify{amount=0.5},low-rank{energy=0.95},quantize{scheme=static}`."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields
from typing import Any

from graphopt.errors import UsageError, nearest
from graphopt.pipeline import aliases
from graphopt.pipeline.options import takes_none, takes_sites, takes_text
from graphopt.pipeline.passes import Pass
from graphopt.pipeline.presets import PRESETS, RESERVED
from graphopt.pipeline.registry import Registry
from graphopt.pipeline.runner import Pipeline, Repeat

_TOKEN = re.compile(r"""\s*(?:(?P<string>"(?:[^"\\]|\\.)*")|(?P<word>[^\s{}()\[\],="]+)|(?P<mark>[{}()\[\],=]))""")


def parse(text: str, registry: Mapping[str, Any]) -> Pipeline:
    """The pipeline that `text` describes; `registry` gives the class of each pass by name.

    Raises UsageError on a syntax error (with its position), an unknown pass or option (with what was probably meant),
    and a value that the pass refuses. `str(pipeline)` is the inverse; it spells presets out.
    """
    return _Parser(text, registry).pipeline()


def parse_options(text: str, what: str) -> dict[str, Any]:
    """The options in `{option=value ...}`, with lists as tuples. what: where they stand, for messages.

    Raises UsageError on a syntax error.
    """
    parser = _Parser(text, {}, what, "{option=value ...}")
    options = parser.options()
    parser.take("end")
    return {name: _literal(value) for name, value in options.items()}


class _Parser:
    def __init__(
        self,
        text: str,
        registry: Mapping[str, Any],
        what: str = "pipeline text",
        form: str = "name{option=value ...},name...",
    ) -> None:
        """what, form: what messages call the text, and how it should be written."""
        self.text, self.registry, self.tokens = text, registry, list[tuple[str, str, int]]()
        self.what, self.form = what, form
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
            f"{self.what}, at character {position + 1}: cannot read {self.text[position : position + 20]!r} "
            f"in {self.text!r}; the form is {self.form}"
        )

    def take(self, expected: str) -> str:
        """The next token, which must be of this kind (word, end) or be this mark."""
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
        passes = self.step()
        while self.tokens[0][1] == ",":
            self.take(",")
            passes += self.step()
        return passes

    def step(self) -> list[Pass]:
        """One pass, or those of a preset."""
        if self.tokens[0][1] == "(":
            return [Pipeline(self.group())]
        name = self.take("word")
        options = self.options() if self.tokens[0][1] == "{" else {}
        if name == "repeat":
            return [_construct(Repeat, options | {"passes": tuple(self.group())})]
        if name in PRESETS:
            if isinstance(self.registry, Registry) and (unused := self.registry.why_unused(name)):
                warnings.warn(f"pass {name!r} is a preset of graphopt; {unused}", stacklevel=2)
            if options:
                raise UsageError(f"{name} is a preset without options: write {PRESETS[name].text}, with yours")
            return list(parse(PRESETS[name].text, self.registry).passes)
        if name not in self.registry:
            raise UsageError(f"there is no pass {name!r}{nearest(name, [*self.registry, *RESERVED], aliases.PASSES)}")
        return [_construct(self.registry[name], options)]

    def group(self) -> list[Pass]:
        self.take("(")
        passes = self.passes()
        self.take(")")
        return passes

    def options(self, quoted: bool = False) -> dict[str, Any]:
        """What stands in braces, by name. quoted: a name may be a string, as the terms of values by site may."""
        options: dict[str, Any] = {}
        self.take("{")
        while self.tokens[0][1] != "}":
            kind, _, position = self.tokens[0]
            name = str(self.value()) if quoted and kind == "string" else self.take("word")
            if name in options:
                raise UsageError(f"{self.what}, at character {position + 1}: {name} is given twice in {self.text!r}")
            self.take("=")
            options[name] = self.value()
            if self.tokens[0][1] == ",":
                self.take(",")
        self.take("}")
        return options

    def value(self) -> Any:
        """A string, a bare word (_Bare), a tuple of values, or a dict of values by term."""
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
        if kind != "word":
            raise self.error(position)
        return _Bare(token)


class _Bare(str):
    """A value without quotes. A selector and a text are strings (a module may be called 0); other options read numbers,
    true, false and none as what they spell, and none is None wherever an option may be that."""

    def literal(self) -> Any:
        if self in ("true", "false", "none"):
            return {"true": True, "false": False, "none": None}[self]
        for number in (int, float):
            with suppress(ValueError):
                return number(self)
        return str(self)


def _literal(value: Any) -> Any:
    """The value with every bare word read, at any depth."""
    if isinstance(value, tuple):
        return tuple(map(_literal, value))
    if isinstance(value, dict):
        return {term: _literal(item) for term, item in value.items()}
    return value.literal() if isinstance(value, _Bare) else value


def _strings(value: Any) -> Any:
    """The value with every bare word as a string: the terms of a selector, and texts."""
    if isinstance(value, dict):
        return {term: _strings(item) for term, item in value.items()}
    return tuple(map(_strings, value)) if isinstance(value, tuple) else str(value) if isinstance(value, str) else value


def _construct(cls: type[Pass], options: Mapping[str, Any]) -> Pass:
    """A pass with these options, as they were written."""
    known = [field.name for field in fields(cls)]
    for former, name in cls.former_options.items():
        if former in options and name not in options:
            warnings.warn(f"{cls.name}: {former} is called {name} now", FutureWarning, stacklevel=2)
            options = {name if option == former else option: value for option, value in options.items()}
    for name in options:
        if name not in known:
            raise UsageError(f"{cls.name} has no option {name!r}{nearest(name, known, aliases.OPTIONS)}")
    if missing := [field.name for field in fields(cls) if field.default is MISSING and field.name not in options]:
        raise UsageError(f"{cls.name} needs {', '.join(missing)}")

    def read(name: str, value: Any) -> Any:
        nothing = value == "none" and takes_none(cls, name)
        words = takes_sites(cls, name) or (takes_text(cls, name) and not nothing)
        return _strings(value) if words else _literal(value)

    return cls(**{name: read(name, value) for name, value in options.items()})
