"""The command line. Exit codes: 0 done, 1 failed, 2 wrong usage; errors are one line on stderr.

Everything heavy is imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from graphopt import __version__
from graphopt.cli import bundling, catalogue, comparisons, inspecting, optimizing, reproducing, serving, timings
from graphopt.cli.sources import SYNTAX
from graphopt.errors import GraphoptError, UsageError, described

_SHOWN_AS = {"<bool>": "", "<int range>": "N", "<path>": "PATH", "<str>": "TEXT", "<list[str]>": "TEXT"}
"""How --help shows the types of options: flags have none."""


class _Plain:
    """A command whose help shows what options take in one short word."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if param.param_type_name == "option" and param.metavar is None:
                param.metavar = _SHOWN_AS.get(param.display_type(ctx))
        return params


class Command(_Plain, TyperCommand):
    """One command."""


class Group(_Plain, TyperGroup):
    """All commands."""


app = typer.Typer(
    name="graphopt",
    cls=Group,
    help="Shrink neural networks: every rewrite is checked, every refusal has its reason.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

COMMANDS = (
    optimizing.optimize,
    comparisons.sensitivity,
    inspecting.inspect,
    inspecting.diff,
    comparisons.compare,
    timings.bench,
    bundling.bundle,
    bundling.verify,
    serving.serve,
    catalogue.passes,
    catalogue.targets,
    timings.cache,
    optimizing.demo,
    reproducing.reproduce,
)
"""In the order of --help."""


_trace = False


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"graphopt {__version__}")
        raise typer.Exit()


@app.callback()
def settings(
    trace: Annotated[
        bool, typer.Option("--trace", envvar="GRAPHOPT_TRACE", help="Show the traceback of an error.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    global _trace
    _trace = trace


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with errors as one line on stderr and an exit code; with --trace they are raised as they are."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, BrokenPipeError):
            raise
        except Exception as error:
            if _trace:
                raise
            known = isinstance(error, GraphoptError)
            line = " ".join(str(error).split()) if known else f"{described(error)} (--trace shows where)"
            typer.echo(f"graphopt: {line}", err=True)
            raise typer.Exit(2 if isinstance(error, UsageError) else 1) from None

    return run


TAKE_SOURCES = (
    optimizing.optimize, comparisons.sensitivity, comparisons.compare, timings.bench, inspecting.inspect,
    bundling.bundle,
)  # fmt: skip

for command in COMMANDS:
    app.command(cls=Command, epilog=SYNTAX if command in TAKE_SOURCES else None)(guarded(command))


def main() -> None:
    """The entry point of the console script, and of `python -m graphopt`."""
    app()
