"""Why a module cannot be traced or exported, in one line: where, what torch says, and the way out of this cause."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from graphopt.dialects.fx.native import module_path
from graphopt.dialects.silence import quiet
from graphopt.errors import CaptureError, first_line

_OUTSIDE = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<")
"""How the file names of frames begin that are no code of the user's: torch's, graphopt's, and generated code."""


class NotExported(CaptureError):
    """A module runs, and cannot be traced or exported."""


def trace_failure(module: nn.Module, error: BaseException) -> str:
    """Why torch.export cannot trace a module."""
    where = f"torch.export cannot trace {type(module).__name__}{user_line(error)}"
    return f"{where}: {named(error)}{_way_out(error)}"


def _way_out(error: BaseException) -> str:
    if isinstance(error, GuardOnDataDependentSymNode | DataDependentOutputException | DynamicOutputShapeException):
        return ". Control flow and sizes that depend on values must go through torch.cond or torch.where"
    if isinstance(error, UnsupportedOperatorException):
        return ". Say which shapes that operator returns, with torch.library.register_fake"
    if isinstance(error, ImportError):
        return ". Install what forward imports"
    if "numpy" in str(error):
        return ". NumPy is not traced: compute with torch"
    return ""


def named(error: BaseException) -> str:
    """The class of an exception, and the first line of its message, if it has any."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


def user_line(error: BaseException) -> str:
    """' at file:line (code)' of the innermost frame that is the user's, or of another library; '' without one."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_OUTSIDE)]
    if not frames:  # the exporter quotes the user's code in its message
        found = re.search(rf'File "(?!{re.escape(_OUTSIDE[0])})([^"]+)", line (\d+), in \w+\n\s*(.+)', str(error))
        return f" at {Path(found[1]).name}:{found[2]} ({found[3].strip()})" if found else ""
    return f" at {frames[-1].filename}:{frames[-1].lineno} ({(frames[-1].line or '').strip()})"


def export_failure(program: ExportedProgram, error: BaseException) -> str:
    """Why torch.onnx cannot export a program: the operator, its module path, and what the first exception says."""
    chain = list(_causes(error))
    if (refused := _refused(error)) is not None:
        name, operator = refused
        path = _path(program, name)
        with quiet(), contextlib.suppress(Exception):  # of which only the path is lost
            path = path or _path(program.run_decompositions(), name)  # as the exporter names nodes
        return f"{operator} has no form in ONNX: {_plain(first_line(chain[-1]))}" + (f" ({path})" if path else "")
    return f"it has no form in ONNX: {_plain(named(chain[-1]))}"


def refused_operator(error: BaseException) -> str | None:
    """The operator that torch.onnx has no form for, such as aten.linalg_matrix_exp.default; None if it names none."""
    refused = _refused(error)
    return None if refused is None else refused[1]


def _refused(error: BaseException) -> tuple[str, str] | None:
    """The names of the node that torch.onnx cannot translate, and of its operator."""
    for said in map(str, reversed(list(_causes(error)))):
        if found := re.search(r"translating node %(\w+)\b.*?\btarget=torch\.ops\.([\w.]+)\]", said):
            return found[1], found[2]
    return None


def _plain(message: str) -> str:
    """A message with operators as aten.add.Tensor."""
    return re.sub(r"<OpOverload\(op='([\w.]+)', overload='(\w+)'\)>", r"\1.\2", message)


def _path(program: ExportedProgram, name: str) -> str:
    """The module path of a node by its name; "" where there is none."""
    return next((module_path(node) for node in program.graph.nodes if node.name == name), "")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__
