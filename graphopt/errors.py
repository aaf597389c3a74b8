"""Every error that a user can see: one family, so that `except GraphoptError` catches all of it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class GraphoptError(Exception):
    """The root of all errors that graphopt raises; the message names the value, the node and the way out."""


class UsageError(GraphoptError, ValueError):
    """What the user asked for cannot be: an unknown name, a wrong option, a wrong order. Nothing was changed."""


class CaptureError(GraphoptError, ValueError):
    """What was handed in cannot become a graph; says what, where, and the way out."""


class GraphError(GraphoptError):
    """A graph is malformed, or was asked for something it cannot do."""


class PassError(GraphoptError):
    """A pass failed. The user's model is untouched.

    pass_name, node (with its module path, "" when unknown) and reproducer (a folder, or None) say where.
    """

    def __init__(self, pass_name: str, reason: str, node: str = "", reproducer: str | None = None) -> None:
        where = f" at {node}" if node else ""
        again = f"; to reproduce: {reproducer}" if reproducer else ""
        super().__init__(f"pass {pass_name} failed{where}: {reason}{again}")
        self.pass_name, self.reason, self.node, self.reproducer = pass_name, reason, node, reproducer


class LoweringError(GraphoptError):
    """The engine did not build what was promised, or the lowered graph computes something else; says where and why."""


def nearest(name: str, names: Sequence[str]) -> str:
    """ '; did you mean ...', or the whole list where nothing is near and the list is short."""
    close = difflib.get_close_matches(name, names, 1, 0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are {', '.join(sorted(names))}" if len(names) <= 20 else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
