"""A bundle -> what another server reads: its folders and configs, all from the bundle's manifest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from graphopt import writing
from graphopt.errors import GraphError, UsageError, nearest, outer_door
from graphopt.serving.bundles import Bundle, opened
from graphopt.serving.repositories import container, kserve, openvino, ray, triton

MARK = "graphopt-repository"
"""A file in each such folder, which holds the digest of the bundle."""


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

    kind: of KINDS. folder: a new one, an empty one, or one that this wrote before.
    Raises BundleError for a damaged bundle, UsageError for an unknown kind, GraphError where nothing can be written.
    """
    folder = Path(folder)
    if kind not in KINDS:
        raise UsageError(f"there is no kind of repository {kind!r}{nearest(kind, list(KINDS))}")
    source = opened(bundle)
    with outer_door(GraphError, f"{folder} cannot be written"), writing.whole_folder(folder, MARK) as part:
        KINDS[kind](source, part)
        (part / MARK).write_text(f"{kind} {source.digest}\n", encoding="utf-8")
    return folder
