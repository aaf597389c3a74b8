"""What `target=` names: one engine, several, or `fastest`; each with its options in braces."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.backends import target as target_of
from graphopt.errors import UsageError, near
from graphopt.lowering.backend import PRECISIONS, Backend
from graphopt.pipeline import aliases
from graphopt.pipeline.text import parse_options

FASTEST = "fastest"

ENGINES = ("onnxruntime", "openvino", "torch-cpu")
"""What `fastest` races, where it is installed; also the fixed order where nothing is measured."""


@dataclass(frozen=True)
class Engines:
    """The targets that were asked for."""

    backends: tuple[Backend, ...]
    """In the fixed order."""
    precisions: dict[str, str]
    """By target, `auto` or one of PRECISIONS."""
    absent: dict[str, str]
    """Of `fastest`, the engines that are not here, or do not take the model, and why."""
    is_several: bool
    """Whether several engines were asked for, though only one may be here."""


def engines(target: object, cpu: str | None, precision: str, model: Any = None, example_inputs: Any = None) -> Engines:
    """The targets that are named as one, as a list, or as text with commas between them.

    precision: of those that name none in braces. Raises UsageError for what is no target, for one that is not installed
    or does not take the model, and for several with `cpu`, which is no machine to race on.
    """
    terms = _terms(target)
    names = [name for name, _ in terms]
    is_fastest = names == [FASTEST]
    if is_fastest:
        terms = [(name, terms[0][1]) for name in ENGINES]
    elif FASTEST in names:
        raise UsageError(f"{FASTEST} races all engines that are here ({', '.join(ENGINES)}): give it alone")
    if twice := [name for place, name in enumerate(names) if name in names[:place]]:
        raise UsageError(f"target: {twice[0]} is listed twice")
    is_several = is_fastest or not isinstance(target, str) or len(terms) > 1
    if is_several and cpu is not None:
        raise UsageError(
            f"cpu={cpu} is another machine, and engines can only be raced on this one: give one target, or leave cpu= "
            "out"
        )
    backends, absent = [], {}
    for name, _ in terms:
        try:
            backend = target_of(name, cpu)
            backend.accept(model, example_inputs)
            if is_several:
                backend.require_runs()
        except UsageError as error:
            if not is_fastest:
                raise
            absent[name] = str(error)
        else:
            backends.append(backend)
    if not backends:
        raise UsageError(f"no engine is here: {'; '.join(absent.values())}")
    return Engines(tuple(backends), {name: given or precision for name, given in terms}, absent, is_several)


def _terms(target: object) -> list[tuple[str, str]]:
    """The name of each target, and its precision; empty where it has none."""
    if isinstance(target, str):
        texts = [text.strip() for text in re.split(r",(?![^{]*})", target)]
    elif isinstance(target, Sequence) and all(isinstance(one, str) for one in target):
        texts = [str(one).strip() for one in target]
    else:
        raise UsageError(f"target is {target!r}; give the name of one, or a list of names (graphopt targets)")
    if not all(texts):
        raise UsageError(f"target is {target!r}: there is no target without a name; see graphopt targets")
    if not texts:
        raise UsageError("target is an empty list; name at least one (graphopt targets)")
    return [_term(text) for text in texts]


def _term(text: str) -> tuple[str, str]:
    name, brace, rest = text.partition("{")
    options = parse_options(brace + rest, f"target {text}") if brace else {}
    precision = options.pop("precision", "")
    if options:
        raise UsageError(f"{name} has no option {next(iter(options))!r}; there is precision")
    if precision:
        require_precision(precision)
    return name.strip(), str(precision)


def require_precision(precision: object) -> None:
    """Raise UsageError for what is no precision."""
    known = "auto", *PRECISIONS
    if precision not in known:
        meant = near(precision, known, aliases.VALUES) if isinstance(precision, str) else None
        perhaps = f"; did you mean {meant!r}?" if meant else ""
        raise UsageError(f"precision is {precision!r}; give {', '.join(known[:-1])} or {known[-1]}{perhaps}")
