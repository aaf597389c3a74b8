"""The commands that list what there is: passes and targets."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli.options import Json
from graphopt.cli.printing import print_json
from graphopt.errors import UsageError

if TYPE_CHECKING:
    from graphopt.pipeline.passes import Pass


def passes(
    name: Annotated[str | None, typer.Argument(help="A pass, to see its options.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List the passes and the presets, or the options of one."""
    from graphopt.passes import REGISTRY
    from graphopt.pipeline.presets import PRESETS

    listed: list[dict[str, Any]] = []
    for one in [name] if name else [*REGISTRY, *PRESETS]:
        if one in PRESETS:
            listed.append({"name": one, "preset": PRESETS[one].text, "help": PRESETS[one].summary})
            if unused := REGISTRY.why_unused(one):
                listed.append({"name": one, "broken": unused})
            continue
        try:
            listed.append(_described(REGISTRY.lookup(one)))
        except UsageError as error:
            if name:
                raise
            listed.append({"name": one, "broken": str(error)})
        if unused := REGISTRY.why_unused(one):
            listed.append({"name": one, "broken": unused})
    if as_json:
        print_json(listed)
        return
    for facts in listed:
        if "broken" in facts:
            typer.echo(f"{facts['name']}  (broken: {facts['broken']})")
            continue
        if "preset" in facts:
            typer.echo(f"{facts['name']}  (preset: {facts['preset']})\n    {facts['help']}")
            continue
        kind = "loses nothing" if facts["lossless"] else "lossy"
        typer.echo(f"{facts['name']}  ({facts['stage']}, {kind}, {' and '.join(facts['dialects'])})")
        typer.echo(textwrap.indent(facts["help"] if name else facts["help"].splitlines()[0], "    "))
        for option, (default, help_) in facts["options"].items():
            typer.echo(f"    {option}={default}" + (f"\n        {help_}" if name else ""))


def targets(as_json: Json = False) -> None:
    """List the targets, and what the engines of this machine reach."""
    from graphopt.backends import TARGETS, target
    from graphopt.measure.limits import line, measured
    from graphopt.measure.timing import is_on

    found: dict[str, dict[str, Any]] = {}
    for name in TARGETS:
        try:
            backend = target(name)
        except UsageError as error:  # its engine is not installed, or its package is broken
            found[name] = {"broken": str(error)}
            continue
        schemes = {op: list(schemes) for op, schemes in backend.schemes.items()}
        found[name] = {"dialect": backend.dialect, "summary": backend.summary, "schemes": schemes}
        if unused := TARGETS.why_unused(name):
            found[name]["note"] = unused
    limits = measured() if is_on() else None
    if as_json:
        print_json(found if limits is None else found | {"machine": asdict(limits)})
        return
    for name, facts in found.items():
        if "broken" in facts:
            typer.echo(f"{name}  (broken: {facts['broken']})")
            continue
        quantized = ", ".join(f"{op} {' or '.join(schemes)}" for op, schemes in facts["schemes"].items()) or "none"
        typer.echo(f"{name}  ({facts['dialect']})\n    {facts['summary']}\n    quantized: {quantized}")
        if "note" in facts:
            typer.echo(f"    {facts['note']}")
    typer.echo(line(limits))


def _described(cls: type[Pass]) -> dict[str, Any]:
    """What a pass says of itself: its docstring, and each option with its default and the docstring under it."""
    from dataclasses import MISSING, fields
    from inspect import cleandoc

    from graphopt.pipeline.spelling import value_text

    helps = _option_docs(cls)
    options = {
        field.name: ("required" if field.default is MISSING else value_text(field.default), helps.get(field.name, ""))
        for field in fields(cls)
    }
    return {
        "name": cls.name,
        "stage": cls.stage.name,
        "lossless": cls.lossless,
        "dialects": cls.dialects,
        "help": cleandoc(cls.__doc__ or ""),
        "options": options,
    }


def _option_docs(cls: type) -> dict[str, str]:
    """The string that stands under each field in the source of the class, or of one that it inherits from."""
    docs: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        docs |= _own_docs(one) if is_dataclass(one) else {}
    return docs


def _own_docs(cls: type) -> dict[str, str]:
    import ast
    from inspect import getsource
    from itertools import pairwise

    try:
        source = textwrap.dedent(getsource(cls))
    except OSError:
        return {}
    body = ast.parse(source).body[0].body  # type: ignore[attr-defined]  # a ClassDef
    return {
        field.target.id: " ".join(doc.value.value.split())
        for field, doc in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str)
    }  # fmt: skip
