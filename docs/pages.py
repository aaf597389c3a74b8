"""Pages that mkdocs makes of what stands elsewhere: the README, and the docstrings of passes and targets.

A hook of mkdocs (mkdocs.yml names it): `on_config` puts the pages into the navigation, `on_files` writes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from functools import cache
from inspect import cleandoc, getmodule
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from graphopt.backends import TARGETS
from graphopt.passes import REGISTRY
from graphopt.pipeline.options import allowed
from graphopt.pipeline.passes import Pass
from graphopt.pipeline.spelling import value_text

ROOT = Path(__file__).parents[1]

FILES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "benchmarks/run.md": "benchmarks/README.md",
}
"""Pages that are files of the repository, by their place in the site."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put a page for each pass and each target after the first page of its section."""
    generated = {
        "Passes": [f"passes/{name}.md" for name in REGISTRY.built_in],
        "Targets": [f"targets/{name}.md" for name in TARGETS.built_in],
    }
    for section in config.nav or []:
        for title, pages in section.items():
            if title in generated:
                pages += generated[title]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {place: _of_file(place, ROOT / file) for place, file in FILES.items()}
    pages |= {f"passes/{name}.md": pass_page(REGISTRY[name]) for name in REGISTRY.built_in}
    pages |= {f"targets/{name}.md": target_page(name) for name in TARGETS.built_in}
    for place, text in pages.items():
        files.append(File.generated(config, place, content=text))
    return files


def pass_page(cls: type[Pass]) -> str:
    """What the pass turns into what, its docstring, and a table of its options."""
    module = getmodule(cls)
    change = cleandoc((module and module.__doc__) or "").split("\n\n")[0]
    effect = "The outputs stay the same, up to rounding." if cls.lossless else "The outputs change."
    parts = [f"# {cls.name}", f"    {' '.join(change.split())}", _reference(cls), f"Stage {cls.stage.name}. {effect}"]
    helps = _option_helps(cls)
    rows = [
        (f"`{option.name}`", _cell(allowed(cls, option.name)), _default(option), _cell(helps.get(option.name, "")))
        for option in fields(cls)
    ]
    if rows:
        parts += ["## Options", _table(("option", "what it may be", "default", "meaning"), rows)]
    return "\n\n".join(parts) + "\n"


def target_page(name: str) -> str:
    """The target's docstring, and what passes ask it for."""
    cls = TARGETS[name]
    parts = [f"# {name}", f"{cls.summary[0].upper()}{cls.summary[1:]}.", _reference(cls)]
    if cls.schemes:
        rows = [(f"`{op}`", ", ".join(schemes)) for op, schemes in cls.schemes.items()]
        parts += ["## Quantized ops", "The schemes that have a fast kernel, the preferred one first."]
        parts.append(_table(("op", "schemes"), rows))
    if cls.weight_bits:
        rows = [(f"`{op}`", ", ".join(map(str, bits))) for op, bits in cls.weight_bits.items()]
        parts += ["Bits of weights that alone are integers (`scheme=weight-only`):", _table(("op", "bits"), rows)]
    facts = {
        "Dialect of the graphs that it deploys": f"`{cls.dialect}`",
        "Types that it multiplies in 8 bits": ", ".join(cls.types) if cls.schemes else "",
        "Floats of 16 bits": ", ".join(cls.floats),
        "Its kernels run fast where sizes are multiples of": ", ".join(
            f"{n} ({kind})" for kind, n in cls.round_to.items()
        ),
        "Zeros in weights": cls.zeros if isinstance(cls.zeros, str) else "",
    }
    parts += ["## Facts", "\n".join(f"- {fact}: {value}" for fact, value in facts.items() if value)]
    return "\n\n".join(parts) + "\n"


def _of_file(place: str, file: Path) -> str:
    """A file of the repository, its links made relative to its page."""
    text = file.read_text(encoding="utf-8")
    up = "../" * place.count("/")
    text = text.replace("](docs/", f"]({up}").replace("](CONTRIBUTING.md", f"]({up}contributing.md")
    return text.replace("](benchmarks/README.md", f"]({up}benchmarks/run.md")


def _reference(cls: type) -> str:
    """The class and its docstring, by mkdocstrings."""
    return f"::: {cls.__module__}.{cls.__qualname__}\n    options:\n      members: false\n      heading_level: 2"


def _option_helps(cls: type) -> dict[str, str]:
    """The docstring under each field, with those of classes above."""
    helps: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        attributes = _sources()[f"{base.__module__}.{base.__qualname__}".removeprefix("graphopt.")].attributes
        helps |= {name: one.docstring.value for name, one in attributes.items() if one.docstring}
    return helps


@cache
def _sources() -> Any:
    """graphopt as griffe reads it."""
    return griffe.load("graphopt", search_paths=[ROOT])


def _default(option: Any) -> str:
    return "required" if option.default is MISSING else f"`{value_text(option.default) or 'none'}`"


def _cell(text: str) -> str:
    return re.sub(r"([|*<])", r"\\\1", " ".join(text.split()))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))
