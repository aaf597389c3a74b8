"""What the user named on the command line: are the files there, can the others be written, what do they hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt import writing
from graphopt.errors import LoweringError, UsageError, outer_door

if TYPE_CHECKING:
    from torch import Tensor

    from graphopt.ir.graph import Graph


def require_file(path: Path) -> None:
    """Raise UsageError where there is no such file."""
    if not path.is_file():
        raise UsageError(f"there is no file {path}")


def require_writable(
    model: Path, output: Path | None, report: Path | None, mark: str = "", folder_files: Sequence[str] = ()
) -> None:
    """Raise UsageError where a file to write is none that can be written, holds weights of the model, or is written
    twice, and where the report would replace the model. Output may be the model itself.

    mark, folder_files: of a target that writes a folder, `Backend.folder_mark` and the other files in it.
    """
    from graphopt.dialects.onnx.reading import external_files

    exported = [] if output is None else [output, writing.manifest_of(output)]
    files = [*exported, *([] if report is None else [report])]
    for path in files:
        is_folder = mark and path is output
        if reason := writing.why_not_folder(path, mark, folder_files) if is_folder else writing.why_not(path):
            raise UsageError(reason)
    if report is not None and report.resolve() == model.resolve():
        raise UsageError(f"{report} is the model itself; write the report to another file")
    if report is not None and report.resolve() in [path.resolve() for path in exported]:
        raise UsageError(f"{report} is what --output writes; write the report to another file")
    there = [path for path in files if path.exists()]
    is_onnx = model.is_file() and model.suffix != ".pt2"
    weights = {path.resolve() for path in external_files(model)} if there and is_onnx else set()
    for path in there:
        if path.resolve() in weights:
            raise UsageError(f"{path} holds weights of the model; write to another file")


def graph_of(path: Path) -> Graph:
    """The captured graph of an ONNX file."""
    from graphopt.capture.sources import capture

    require_file(path)
    return capture(path, "onnx").graph


def session_of(path: Path, threads: int | None) -> Callable[[Mapping[str, Tensor]], list[Tensor]]:
    """The file as it is, in ONNX Runtime at its default options. Raises LoweringError where that does not load it."""
    from graphopt.dialects.onnx import run as onnx_run
    from graphopt.dialects.onnx.reading import read_model

    with outer_door(LoweringError, f"onnxruntime cannot load {path}"):
        session = onnx_run.session(read_model(path), level="all", threads=threads)
    return partial(onnx_run.run, session)
