"""Custom operators of ONNX files: libraries that sessions load, and functions of onnxscript that are put into models.

What is registered stays so as long as the process lives, as what the engine loads does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort

from graphopt.dialects.onnx.spellings import DOMAIN, STANDARD
from graphopt.errors import UsageError, described

_libraries: dict[str, None] = {}
_functions: dict[ir.OperatorIdentifier, onnx.FunctionProto] = {}


def register(custom_ops: Iterable[Any]) -> None:
    """Let all sessions and models of this process know custom operators.

    custom_ops: paths of libraries of onnxruntime, functions of onnxscript, or a module with `get_library_path()`, such
    as onnxruntime_extensions. Raises UsageError for anything else, and for a library that does not load.
    """
    if isinstance(custom_ops, str | Path | ModuleType) or not isinstance(custom_ops, Iterable):
        custom_ops = [custom_ops]
    for one in custom_ops:
        if hasattr(one, "to_function_proto"):
            proto = one.to_function_proto()
            _functions[proto.domain, proto.name, ""] = proto
        elif isinstance(one, str | Path):
            _load(str(one))
        elif hasattr(one, "get_library_path"):
            _load(str(one.get_library_path()))
        else:
            raise UsageError(
                f"custom_ops: {one!r} is of type {type(one).__name__}; give the path of a library, a function of "
                "onnxscript, or the module onnxruntime_extensions"
            )


def _load(path: str) -> None:
    if path in _libraries:
        return
    if not Path(path).is_file():
        raise UsageError(f"custom_ops: there is no file {path}")
    try:
        if not hasattr(ctypes.CDLL(path), "RegisterCustomOps"):
            raise UsageError(
                f"custom_ops: {path} has no function RegisterCustomOps: it is no library of operators"
            )
        ort.SessionOptions().register_custom_ops_library(path)
    except UsageError:
        raise
    except Exception as error:  # what the loader, or the engine, makes of a wrong file
        raise UsageError(f"custom_ops: {path} does not load ({described(error)})") from error
    _libraries[path] = None


def add_libraries(options: ort.SessionOptions) -> None:
    """Let a session know the libraries that are registered."""
    for path in _libraries:
        options.register_custom_ops_library(path)


def add_functions(model: ir.Model) -> None:
    """Put the registered functions that a model calls into it, and those that these call. [changes]"""
    wanted = [node.op_identifier() for node in model.graph.all_nodes()]
    while wanted:
        domain, name, _ = wanted.pop()
        proto = _functions.get((domain, name, ""))
        if proto is None or (domain, name, "") in model.functions:
            continue
        function = ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function
        model.graph.opset_imports.setdefault(domain, 1)
        wanted += [node.op_identifier() for node in function.all_nodes()]


def unknown(operators: Iterable[tuple[str, str]]) -> list[str]:
    """Those of operators, by domain and name, that are neither standard nor the engine's own: once each, domain.Op."""
    return list(dict.fromkeys(f"{domain}.{name}" for domain, name in operators if not _is_own(domain)))


def _is_own(domain: str) -> bool:
    """Whether the engine defines a domain itself, or graphopt does."""
    return domain in (*STANDARD, DOMAIN, "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training") or (
        domain.startswith(("com.microsoft", "com.ms."))
    )


def why_not_run(operators: list[str]) -> str:
    """Why a model with these operators does not run, and what to do."""
    return (
        f"onnxruntime does not know {', '.join(operators)}: hand over the library, or the functions of "
        "onnxscript, that define it: custom_ops=[...]"
    )
