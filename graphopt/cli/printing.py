"""How commands print: tables and colours on a terminal, plain text elsewhere, or JSON; and what runs now, on stderr."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer


def show(what: Any) -> None:
    """In tables and colours on a terminal, as plain text elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(what)
    else:
        typer.echo(str(what))


def print_json(facts: Any) -> None:
    typer.echo(json.dumps(facts, indent=2))


@contextmanager
def logged(verbose: bool | None) -> Iterator[bool | None]:
    """What the logger `graphopt` says, as lines on stderr: each step where asked for (True), nothing (False); without
    either, a line for each stage where stderr is no terminal, on which bars show more.

    Yields the `verbose=` for functions that are called inside: with these lines they need no bars.
    """
    if verbose is False or (verbose is None and sys.stderr.isatty()):
        yield verbose
        return
    logger, handler = logging.getLogger("graphopt"), logging.StreamHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    try:
        yield None
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
