"""A failed pass with all that it was given, in a folder."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from graphopt.ir.graph import Graph
from graphopt.ir.untouched import Untouched
from graphopt.pipeline.instruments.instrument import Instrument
from graphopt.pipeline.target import AnyTarget

if TYPE_CHECKING:
    from graphopt.pipeline.context import Context
    from graphopt.pipeline.passes import Pass


class Reproduce(Instrument):
    """What a failed pass was given, in a folder: the pass as text, the graph before, feeds and calibration batches."""

    BATCHES = 8
    """Most calibration batches to keep."""

    def __init__(self, folder: str | Path | None = None) -> None:
        """folder: where to write; None is a temporary folder of this process, which holds its last failure only."""
        self.folder = folder
        self._before: Graph | None = None

    def before(self, pass_: Pass, graph: Graph, context: Context) -> None:
        self._before = graph.clone()  # shares the weights

    def failed(self, pass_: Pass, graph: Graph, context: Context, error: Exception) -> str | None:
        if self._before is None:
            return None
        folder = _own_folder() if self.folder is None else Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._before.save(folder / f"graph.{graph.dialect}")
        _save_feeds(folder / "feeds", context.feeds)
        if context.calibration is not None and not context.calibration.once:
            _save_feeds(folder / "calibration", list(itertools.islice(context.calibration, self.BATCHES)))
        facts = {
            "pass": str(pass_),
            "dialect": graph.dialect,
            "target": None if isinstance(context.target, AnyTarget) else context.target.name,
            "error": f"{type(error).__name__}: {error}",
        }
        (folder / "pass.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        command = shlex.join([sys.executable, "-m", "graphopt", "reproduce", str(folder)])
        readme = (
            f"{pass_} failed on this graph.\n{facts['error']}\n\nTo run it again, in a folder that you trust (a "
            f"graph.fx can run code when it is loaded):\n\n    {command}\n"
        )
        (folder / "README").write_text(readme, encoding="utf-8")
        return str(folder)


_PREFIX = "graphopt-failed-"
_KEPT_SECONDS = 24 * 3600
"""How long the folder of another process stays."""


def _own_folder() -> Path:
    """A new temporary folder; that of this process's earlier failure is removed, and old ones of other processes."""
    parent, own = Path(tempfile.gettempdir()), f"{_PREFIX}{os.getpid()}-"
    for folder in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # of another user, or gone by now
            if folder.name.startswith(own) or time.time() - folder.stat().st_mtime > _KEPT_SECONDS:
                shutil.rmtree(folder)
    return Path(tempfile.mkdtemp(prefix=own))


def _save_feeds(folder: Path, batches: Sequence[Mapping[str, Tensor]]) -> None:
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    for number, feeds in enumerate(batches):
        copies = {name: tensor.detach().clone().contiguous() for name, tensor in feeds.items()
                  if not isinstance(tensor, Untouched)}  # fmt: skip  # no shared memory, and nothing but tensors
        save_file(copies, str(folder / f"{number:03}.safetensors"))
