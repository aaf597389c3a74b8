"""Passes and targets by name: those of graphopt, and those that installed packages add by an entry point."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from graphopt.errors import UsageError, nearest, outer_door

T = TypeVar("T")


class Registry(Mapping[str, type[T]], Generic[T]):
    """Classes by name. A class is imported when its name is looked up, and none before.

    A package adds one by an entry point of `group` in its pyproject.toml, whose name is the `name` of the class:

        [project.entry-points."graphopt.passes"]
        clip-weights = "clipping:ClipWeights"

    A name of graphopt's own always stands for graphopt's class; where a package registers it too, a warning says so.
    The same holds for names that are reserved for something else.
    """

    def __init__(
        self,
        group: str,
        kind: str,
        base: type[Any],
        built_in: Mapping[str, str],
        aliases: Mapping[str, str] = MappingProxyType({}),
        reserved: Collection[str] = (),
    ) -> None:
        """group: of the entry points. kind: what one is called in messages. base: what a class must derive from.

        built_in: "module:class" by name. aliases: what users write in place of names (`errors.near`). reserved: names
        that no class may have.
        """
        self.group, self.kind, self.base, self.built_in = group, kind, base, built_in
        self.aliases, self.reserved = aliases, reserved

    @cached_property
    def added(self) -> Mapping[str, list[EntryPoint]]:
        """The entry points of installed packages by name, read once (tens of milliseconds)."""
        found: dict[str, list[EntryPoint]] = {}
        for entry in sorted(entry_points(group=self.group), key=_package):
            found.setdefault(entry.name, []).append(entry)
        return found

    def __getitem__(self, name: str) -> type[T]:
        """The class called `name`, imported.

        Raises KeyError where there is none. Raises UsageError where two packages register the name, and where the
        package that does cannot be imported, or registers something else than such a class.
        """
        entries = self.added.get(name, [])
        if name in self.built_in:
            if entries:
                warnings.warn(f"{self.kind} {name!r} is graphopt's own; {self.why_unused(name)}", stacklevel=2)
            module, class_name = self.built_in[name].split(":")
            with outer_door(UsageError, f"{self.kind} {name!r} cannot be imported"):  # where an engine is not installed
                found: type[T] = getattr(import_module(module), class_name)
            return found
        if not entries or name in self.reserved:
            raise KeyError(name)
        if len(entries) > 1:
            packages = " and ".join(map(_package, entries))
            raise UsageError(f"{self.kind} {name!r} is registered by {packages}: uninstall one of them")
        return self._loaded(entries[0])

    def lookup(self, name: str) -> type[T]:
        """As `[name]`, for a name that the user wrote: raises UsageError where there is none, naming the nearest."""
        if name not in self:
            raise UsageError(f"there is no {self.kind} {name!r}{nearest(name, [*self, *self.reserved], self.aliases)}")
        return self[name]

    def _loaded(self, entry: EntryPoint) -> type[T]:
        with outer_door(UsageError, f"{self._of(entry)} cannot be imported"):
            found = entry.load()
        if not (isinstance(found, type) and issubclass(found, self.base)):
            raise UsageError(f"{self._of(entry)} is {entry.value}, which is no {self.base.__name__} class")
        called = getattr(found, "name", None)
        if called != entry.name:
            raise UsageError(f"{self._of(entry)} is {entry.value}, whose name is {called!r}: make both names equal")
        return found

    def _of(self, entry: EntryPoint) -> str:
        return f"{self.kind} {entry.name!r} of package {_package(entry)}"

    def why_unused(self, name: str) -> str:
        """Which packages register a name of graphopt's own, or a reserved one; "" where none does."""
        taken = name in self.built_in or name in self.reserved
        packages = " and ".join(_package(entry) for entry in self.added.get(name, []) if taken)
        return f"that of package {packages} is not used: it needs another name" if packages else ""

    def __contains__(self, name: object) -> bool:
        return name in self.built_in or (name in self.added and name not in self.reserved)

    def __iter__(self) -> Iterator[str]:
        yield from self.built_in
        yield from (name for name in self.added if name not in self.built_in and name not in self.reserved)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _package(entry: EntryPoint) -> str:
    """Name and version of the distribution that an entry point belongs to."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "an unknown distribution"
