"""How commands print: tables and colours on a terminal, plain text elsewhere, or JSON."""

from __future__ import annotations

import json
import sys
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
