"""The models of a server: a bundle, or a folder of NAME/VERSION/ bundles; a changed one is loaded again while the old
one answers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from graphopt.errors import BundleError, GraphoptError, described, nearest
from graphopt.serving import manifest
from graphopt.serving.batching import Batcher
from graphopt.serving.bundles import manifest_of
from graphopt.serving.metrics import Metrics
from graphopt.serving.predictor import Predictor
from graphopt.serving.refusals import Refused

LOG = logging.getLogger("graphopt.serving")

Facts = tuple[str, int, int, int]
"""What of a file changes with its content: name, inode, time and size."""

Stamp = tuple[Facts, ...]
"""The facts of a bundle's files."""

GONE_SECONDS = 5.0
"""How long a bundle must be missing before it is served no more: one that is replaced is missing for a moment."""


@dataclass(frozen=True)
class Served:
    """One version of a model."""

    name: str
    version: str
    predictor: Predictor
    batcher: Batcher

    @property
    def label(self) -> str:
        return f"{self.name}:{self.version}"


@dataclass(frozen=True)
class Failed:
    """A bundle that could not be loaded."""

    name: str
    version: str
    stamp: Stamp | None
    """What its files were then."""
    reason: str


@dataclass
class Models:
    """All models of one process."""

    root: Path
    pool: Executor
    threads: int | None
    at_once: int
    most_waiting: int
    allow_variance: bool
    metrics: Metrics
    served: dict[str, dict[str, Served]] = field(default_factory=dict)
    failed: dict[Path, Failed] = field(default_factory=dict)
    """Bundles that could not be loaded."""
    _stamps: dict[Path, Stamp] = field(default_factory=dict)
    _places: dict[Path, tuple[str, str]] = field(default_factory=dict)
    _missing: dict[Path, float] = field(default_factory=dict)
    """Since when a served bundle is missing from the folder."""

    def get(self, name: str | None, version: str | None = None) -> Served:
        """A version of a model, the highest where none is named; the only model where no name is given.

        Raises Refused: 400 for a name or version that cannot be one, 404 for one that is not there.
        """
        if name is None:
            if len(self.served) != 1:
                raise Refused(400, f"name the model: there are {', '.join(sorted(self.served)) or 'none'}")
            name = next(iter(self.served))
        for given in filter(None, (name, version)):
            if not manifest.NAME.fullmatch(given):
                raise Refused(400, "the name of a model or version has letters, digits, dots and hyphens")
        versions = self.served.get(name)
        if not versions:
            raise Refused(404, f"there is no model {name!r}{nearest(name, list(self.served))}")
        if version is None:
            return versions[in_order(versions)[-1]]
        if version not in versions:
            raise Refused(404, f"{name} has no version {version!r}; there are {', '.join(in_order(versions))}")
        return versions[version]

    async def refresh(self) -> None:
        """Load what is new or changed, and drop what is gone for `GONE_SECONDS`. A changed bundle takes over once it
        was read whole and has answered its golden inputs; a damaged one changes nothing.

        Raises BundleError where the folder is not there and nothing is served yet.
        """
        loop = asyncio.get_running_loop()
        found: Mapping[Path, tuple[str, str]] | None = None
        try:
            found = await loop.run_in_executor(None, places, self.root)
        except (BundleError, OSError):  # it is being replaced
            if not self.served:
                raise
        now = time.monotonic()
        self._missing = {one: self._missing.get(one, now) for one in self._places if one not in (found or {})}
        for path, since in self._missing.items():
            if now - since >= GONE_SECONDS:
                self._drop(path)
        if found is None:
            return
        for path in [one for one in self.failed if one not in found]:
            del self.failed[path]
        for path, (name, version) in found.items():
            stamp = await loop.run_in_executor(None, _stamp, path)
            if stamp is None or self._stamps.get(path) == stamp:
                continue
            if path in self.failed and self.failed[path].stamp == stamp:
                continue
            await self._load(path, name, version, stamp)

    async def _load(self, path: Path, name: str, version: str, stamp: Stamp) -> None:
        loop = asyncio.get_running_loop()
        try:
            predictor = await loop.run_in_executor(None, lambda: Predictor(path, threads=self.threads))
        except GraphoptError as error:
            self.failed[path] = Failed(name or path.name, version, stamp, str(error))
            LOG.error("%s", error)
            return
        except Exception as error:
            self.failed[path] = Failed(name or path.name, version, stamp, described(error))
            LOG.exception("%s cannot be loaded", path)
            return
        if await loop.run_in_executor(None, _stamp, path) != stamp:
            return  # it changed again while it was read: the next round reads it
        name = name or predictor.manifest.name
        self.failed.pop(path, None)
        before = self.served.get(name, {}).get(version)
        label = f"{name}:{version}"
        batcher = Batcher(
            predictor.manifest,
            predictor.run,
            self.pool,
            at_once=self.at_once,
            most_waiting=self.most_waiting,
            allow_variance=self.allow_variance,
            on_batch=lambda rows: self.metrics.batch(label, rows),
        )
        self._drop(path)
        self.served.setdefault(name, {})[version] = Served(name, version, predictor, batcher)
        self._stamps[path], self._places[path] = stamp, (name, version)
        LOG.info("%s %s: SQNR %.1f dB", "reloaded" if before else "loaded", label, predictor.sqnr)

    def _drop(self, path: Path) -> None:
        """Take a bundle out of service; requests that it has taken are answered by it."""
        self._stamps.pop(path, None)
        if path not in self._places:
            return
        name, version = self._places.pop(path)
        versions = self.served.get(name, {})
        versions.pop(version, None)
        if not versions:
            self.served.pop(name, None)

    @property
    def all(self) -> list[Served]:
        return [versions[version] for _, versions in sorted(self.served.items()) for version in in_order(versions)]


def places(root: Path) -> Mapping[Path, tuple[str, str]]:
    """The bundles under a folder, with the name (empty: that of the manifest) and the version that they are served as.

    Raises BundleError where the folder is not there.
    """
    if (root / manifest.FILE).is_file():
        return {root: ("", "1")}
    if not root.is_dir():
        raise BundleError(f"there is no folder {root}")
    found: dict[Path, tuple[str, str]] = {}
    for model in sorted(root.iterdir()):
        if not model.is_dir() or not manifest.NAME.fullmatch(model.name):
            continue
        if (model / manifest.FILE).is_file():
            found[model] = (model.name, "1")
            continue
        for version in sorted(model.iterdir()):
            if manifest.NAME.fullmatch(version.name) and (version / manifest.FILE).is_file():
                found[version] = (model.name, version.name)
    return found


def _stamp(path: Path) -> Stamp | None:
    """Of the manifest and the files that it names: whoever copies a bundle may write the manifest before the files
    whose hashes it holds. None where there is no manifest; a file that is not there yet has no facts."""
    own = _facts(path, manifest.FILE)
    if own is None:
        return None
    try:
        names = _named(path, own)
    except BundleError:  # which loading it raises too
        names = ()
    found = (_facts(path, name) for name in names)
    return (own, *(one for one in found if one is not None))


def _facts(folder: Path, name: str) -> Facts | None:
    try:
        own = (folder / name).stat()
    except OSError:
        return None
    return name, own.st_ino, own.st_mtime_ns, own.st_size


@lru_cache(maxsize=1024)
def _named(folder: Path, facts: Facts) -> tuple[str, ...]:
    """The files that a manifest names. facts: of the manifest, which is read again once they are others. Raises
    BundleError where it cannot be read."""
    return tuple(sorted(manifest_of(folder).files))


def in_order(versions: Iterable[str]) -> list[str]:
    """Versions, the highest last: it serves unless another one is named."""
    return sorted(versions, key=_order)


def _order(version: str) -> tuple[int, int, str]:
    """Versions that are numbers by their value, and above all others."""
    return (1, int(version), "") if version.isdecimal() else (0, 0, version)
