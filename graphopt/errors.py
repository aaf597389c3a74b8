"""Every error that a user can see: one family, so that `except GraphoptError` catches all of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TypeVar

from graphopt import foreign

T = TypeVar("T")

LONGEST = 160
"""Most characters of another library's message: an engine's may hold the whole model."""


class GraphoptError(Exception):
    """The root of all errors that graphopt raises; the message names the value, the node and the way out."""


class UsageError(GraphoptError, ValueError):
    """What the user asked for cannot be: an unknown name, a wrong option, a wrong order. Nothing was changed."""


class CaptureError(GraphoptError, ValueError):
    """What was handed in cannot become a graph; says what, where, and the way out."""


class GraphError(GraphoptError):
    """A graph is malformed, or was asked for something it cannot do."""


class SpellingError(GraphError):
    """An operation has no spelling in the version of operators that a graph is written in; says which one has."""


class PassError(GraphoptError):
    """A pass failed. The user's model is unchanged.

    pass_name, node (with its module path, "" when unknown) and reproducer (a folder, or None) say where.
    """

    def __init__(self, pass_name: str, reason: str, node: str = "", reproducer: str | None = None) -> None:
        where = f" at {node}" if node else ""
        again = f"; to reproduce: {reproducer}" if reproducer else ""
        super().__init__(f"pass {pass_name} failed{where}: {reason}{again}")
        self.pass_name, self.reason, self.node, self.reproducer = pass_name, reason, node, reproducer


class RankError(GraphoptError):
    """Another process of the mesh failed, has ended, or does something else; says which, and what it said."""


class BundleError(GraphoptError, ValueError):
    """A bundle is damaged, does not run here, or answers otherwise than it did when it was made; says which."""


class LoweringError(GraphoptError):
    """The engine did not build what was promised, or the lowered graph computes something else; says where and why."""


@contextmanager
def outer_door(kind: Callable[[str], GraphoptError], doing: str | Callable[[], str]) -> Iterator[None]:
    """Let nothing but a GraphoptError out of a public function: use it as a `with` block, or as a decorator.

    kind: the class that other exceptions (of onnx, torch.export, an engine, the file system) become. They stay the
    `__cause__`, and their text ends the message. doing: what failed, and what to do; a function where that text
    takes work. A GraphoptError passes unchanged, and so does what is no Exception, such as KeyboardInterrupt.

    The user's own code (calibration batches, `evaluate`, `loss`) has a door of its own, `user_code`.
    """
    try:
        yield
    except GraphoptError:
        raise
    except Exception as error:
        what = doing if isinstance(doing, str) else doing()
        raise kind(f"{what}: {described(error)}") from error


def user_code(what: str, function: Callable[..., T]) -> Callable[..., T]:
    """A function of the user's whose exceptions become a UsageError that names it, with the exception as `__cause__`.

    A UsageError because it is no fault of the pass that called the function: nothing is written to reproduce it. A
    GraphoptError passes unchanged.
    """

    def call(*args: object, **kwargs: object) -> T:
        with outer_door(UsageError, f"your {what} failed"):
            return function(*args, **kwargs)

    return call


def user_batches(what: str, batches: Iterable[T]) -> Iterator[T]:
    """The batches of an iterable of the user's; its exceptions become a UsageError, like those of `user_code`."""
    with outer_door(UsageError, f"your {what} failed"):
        remaining = iter(batches)
    while True:
        with outer_door(UsageError, f"your {what} failed"):
            try:
                batch = next(remaining)
            except StopIteration:
                return
        yield batch


def described(error: BaseException) -> str:
    """An exception of another library in one line: its class, and the beginning of its message."""
    error = _unwrapped(error)
    message = foreign.reason(" ".join(str(error).split()))
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror + (f" ({error.filename})" if error.filename else "")
    return f"{type(error).__name__}: {_shortened(message)}" if message else type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without code and source of an engine; its class where it has none."""
    lines = str(_unwrapped(error)).strip().splitlines()
    return _shortened(foreign.reason(lines[0].strip())) if lines else type(error).__name__


_WRAPPERS = ("Error calling ", "In clone_graph with args ")
"""How messages of onnx-ir begin that print whole nodes and graphs, around the error that says why."""


def _unwrapped(error: BaseException) -> BaseException:
    while str(error).startswith(_WRAPPERS) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _shortened(message: str) -> str:
    return message if len(message) <= LONGEST else message[:LONGEST].rstrip() + " ..."


def require_positive_integer(name: str, value: object) -> None:
    """Raise UsageError, naming the argument, where its value is no int of at least 1; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} is {value!r}; give a whole number, at least 1")


def few(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def nearest(name: str, names: Sequence[str], aliases: Mapping[str, str] = MappingProxyType({})) -> str:
    """ '; did you mean ...' (see `near`), or the whole list where nothing is near and the list is short."""
    if meant := near(name, names, aliases):
        return f"; did you mean {meant!r}?"
    return f"; there are {', '.join(sorted(names))}" if len(names) <= 20 else ""


def near(name: str, names: Iterable[str], aliases: Mapping[str, str] = MappingProxyType({})) -> str | None:
    """What was meant by a name that is none of `names`; None where that is not clear.

    aliases: by `plain_name`, a text that begins with one of `names`. Else it is a name that differs by its spelling
    alone, or the one with the fewest typing errors, at most a quarter of its letters. Of a module path, the first or
    the last parts are enough.
    """
    known, plain = list(names), plain_name(name)
    meant = aliases.get(plain)
    if meant is not None and re.split(r"[{,=]", meant)[0] in known:
        return meant
    found: list[tuple[int, str]] = []
    for one in known:
        for part in _ends(one, name.count(".") + 1):
            errors = 0 if plain_name(part) == plain else typing_errors(name.lower(), part.lower())
            if errors <= max(1, len(name) // 4) and errors < min(len(name), len(part)):
                found.append((errors, one))
    return min(reversed(found), key=lambda pair: pair[0], default=(0, None))[1]


def _ends(path: str, length: int) -> Iterator[str]:
    """A path, and its first and last parts."""
    parts = path.split(".")
    yield path
    if len(parts) > length:
        yield ".".join(parts[:length])
        yield ".".join(parts[-length:])


def plain_name(name: str) -> str:
    """A name in lower case, without hyphens, underscores and spaces: how aliases are written."""
    return re.sub(r"[-_ ]", "", name.lower())


def typing_errors(a: str, b: str) -> int:
    """How many letters are missing, too many, wrong or swapped with the next one; a wrong digit counts as two, since
    int4 is no misspelt int8.

    Source: the optimal string alignment distance (Damerau, 1964).
    """
    before, last = [0] * (len(b) + 1), list(range(len(b) + 1))
    for row, one in enumerate(a, 1):
        line = [row]
        for column, other in enumerate(b, 1):
            wrong = 0 if one == other else 2 if one.isdigit() or other.isdigit() else 1
            cost = min(last[column] + 1, line[column - 1] + 1, last[column - 1] + wrong)
            if row > 1 and column > 1 and one == b[column - 2] and a[row - 2] == other:
                cost = min(cost, before[column - 2] + 1)
            line.append(cost)
        before, last = last, line
    return last[-1]
