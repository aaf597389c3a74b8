"""A bundle -> what another server reads: its folders and configs, all from the bundle's manifest."""

from __future__ import annotations

import glob
from collections.abc import Callable
from functools import partial
from pathlib import Path

from graphopt import writing
from graphopt.errors import GraphError, UsageError, nearest, outer_door
from graphopt.serving.bundles import Bundle, opened
from graphopt.serving.repositories import container, kserve, openvino, ray, triton

MARK = "graphopt-repository"
"""A file in each such folder: its kind and the digest of the bundle, and in each further line the name of a file that
was written with it."""


def _tensorflow(bundle: Bundle, folder: Path) -> None:
    from graphopt.serving.repositories import tensorflow  # which imports torch

    tensorflow.write(bundle, folder)


KINDS: dict[str, Callable[[Bundle, Path], None]] = {
    "triton": triton.write,
    "openvino": openvino.write,
    "tensorflow": _tensorflow,
    "kserve": kserve.write,
    "ray": ray.write,
    "docker": container.write,
}
"""What writes each kind into an empty folder."""


def repository(bundle: str | Path, folder: str | Path, kind: str) -> Path:
    """Write what another server reads; returns the folder.

    kind: of KINDS. folder: a new one, an empty one, or one that this wrote before, to which nobody has added a file.
    Raises BundleError for a damaged bundle, UsageError for an unknown kind, GraphError where nothing can be written.
    """
    folder = Path(folder)
    if kind not in KINDS:
        raise UsageError(f"there is no kind of repository {kind!r}{nearest(kind, list(KINDS))}")
    source = opened(bundle)
    with (
        outer_door(GraphError, f"{folder} cannot be written"),
        writing.whole_folder(folder, MARK, partial(_written_with, folder / MARK)) as part,
    ):
        KINDS[kind](source, part)
        names = sorted(file.relative_to(part).as_posix() for file in part.rglob("*") if file.is_file())
        (part / MARK).write_text("\n".join([f"{kind} {source.digest}", *names, ""]), encoding="utf-8")
    return folder


def _written_with(mark: Path) -> list[str]:
    """The files that a mark names, as patterns, and what Python leaves beside code; none where there is no mark."""
    if not mark.is_file():
        return []
    return [*map(glob.escape, mark.read_text(encoding="utf-8", errors="replace").split("\n")[1:]), "*.pyc"]
