"""A folder -> a bundle in memory: each file is read once, and what was hashed is what is used."""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from graphopt.errors import BundleError, described
from graphopt.measure.machine import environment
from graphopt.serving import golden, manifest
from graphopt.serving.engine import NAME, Engine, is_older, standards, version
from graphopt.serving.golden import Case
from graphopt.serving.manifest import Manifest


@dataclass(frozen=True)
class Bundle:
    """The content of a folder, whose hashes are right."""

    folder: Path
    manifest: Manifest
    content: Mapping[str, bytes]
    digest: str
    """SHA-256 of manifest.json, which has the hashes of all other files: it tells one bundle from another."""

    @property
    def cases(self) -> list[Case]:
        return golden.read(self.content[self.manifest.golden.file], str(self.folder))

    def engine(self, threads: int | None = None, *, portable: bool = False) -> Engine:
        """The model in its engine. threads: None takes what the manifest says. portable: the twin of it."""
        own = self.manifest
        name = own.portable if portable else own.model
        if name is None:
            raise BundleError(f"{self.folder} holds no portable twin")
        data = {one: self.content[one] for one in own.weights}
        return Engine(self.content[name], data, own.threads if threads is None else threads, where=str(self.folder))


def opened(folder: str | Path) -> Bundle:
    """The bundle in a folder. Files that its manifest does not name are not read.

    Raises BundleError where a file is missing or another than was hashed, where the bundle is swapped while it is read,
    where it needs a newer engine or another opset than the manifest says. Warns where this CPU lacks flags that it was
    tuned for.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BundleError(f"there is no folder {folder}")
    raw = _read(folder, manifest.FILE, manifest.LARGEST)
    found = manifest.parsed(raw, str(folder))
    content = {name: _read(folder, name, file.bytes) for name, file in found.files.items()}
    if _read(folder, manifest.FILE, manifest.LARGEST) != raw:
        raise BundleError(f"{folder} was replaced while it was read: read it again")
    for name, file in found.files.items():
        if len(content[name]) != file.bytes or hashlib.sha256(content[name]).hexdigest() != file.sha256:
            raise BundleError(f"{folder}: {name} is not the file that the bundle was made with: its SHA-256 differs")
    _require_engine(folder, found, content[found.model])
    if missing := missing_flags(found):
        warnings.warn(
            f"{folder} was tuned for {found.cpu.model or 'a CPU'} with {missing}, which this CPU lacks: it is slower "
            "here, and its golden inputs say whether its answers are right",
            stacklevel=2,
        )
    return Bundle(folder, found, content, hashlib.sha256(raw).hexdigest())


def manifest_of(folder: Path) -> Manifest:
    """What the bundle in a folder says of itself; its other files are not read. Raises BundleError."""
    return manifest.parsed(_read(folder, manifest.FILE, manifest.LARGEST), str(folder))


def missing_flags(found: Manifest) -> str:
    """The CPU flags that a bundle was tuned for and this CPU lacks, separated by spaces."""
    here = environment()["flags"].split()
    return " ".join(flag for flag in found.cpu.flags.split() if flag not in here)


def _require_engine(folder: Path, found: Manifest, model: bytes) -> None:
    if found.engine.name != NAME:
        raise BundleError(f"{folder} is for the engine {found.engine.name!r}, and {NAME} runs bundles")
    if is_older(version(), found.engine.least):
        raise BundleError(f"{folder} needs {NAME} {found.engine.least} or newer, and {version()} is installed")
    opset, _ = standards(model, str(folder))
    if opset != found.opset:
        raise BundleError(f"{folder}: {found.model} is at opset {opset}, and {manifest.FILE} says {found.opset}")


def _read(folder: Path, name: str, most: int) -> bytes:
    """The content of a file that is no device, pipe or link to elsewhere, and has at most so many bytes."""
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise BundleError(f"{folder}: {name} leads out of the folder")
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise BundleError(f"{folder}: {name} is no regular file")
            return file.read(most + 1)
    except FileNotFoundError:
        if name == manifest.FILE:
            raise BundleError(f"{folder} is no bundle: it holds no {name}") from None
        raise BundleError(f"{folder}: {name} is missing") from None
    except OSError as error:
        raise BundleError(f"{folder}: {name} cannot be read: {described(error)}") from error
