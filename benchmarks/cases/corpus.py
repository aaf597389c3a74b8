"""ONNX files as found in the wild: the simplified file in place of the original gives the same outputs.

Both run without any optimization of the engine, on three seeded feeds that the original accepts. A file that loads in
ONNX Runtime must come out equal; only one that does not may be refused.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

import graphopt
from benchmarks.case import Settings, checked, table
from graphopt.capture.sources import CaptureError
from graphopt.errors import GraphError, UsageError
from graphopt.numerics import metrics

SEEDS = (0, 1, 2)
SIZES = (16, 32, 64, 128, 512, 1, 4)
"""Tried for the dynamic axes after the first, all of them alike, until the original runs."""
LARGEST = (256, 64, 2)
"""Exclusive upper ends tried for integers that are not masks, until the original runs."""
REFUSALS = (CaptureError, GraphError, UsageError)

Feeds = dict[str, np.ndarray[Any, Any]]


def run(settings: Settings) -> bool:
    folder = settings.required("onnx_corpus")
    entries = json.loads((folder / "MANIFEST.json").read_text(encoding="utf-8"))
    rows = table("simplify, then export: outputs against the original's", "file", "loads in ort", "verdict")
    verdicts = []
    for entry in entries:
        loads = entry["ort"] == "ok"
        verdict = judged(folder / entry["file"], settings.threads)
        holds = verdict.startswith("equal") or (verdict.startswith("refused") and not loads)
        verdicts.append(holds)
        rows.add_row(entry["file"], "yes" if loads else "no", checked(verdict, holds))
    rows.columns[2].justify, rows.columns[2].no_wrap = "left", False
    settings.console.print(rows)
    settings.console.print(f"{sum(verdicts)} of {len(verdicts)} as they should be")
    return all(verdicts)


def judged(path: Path, threads: int) -> str:
    """equal, refused (why), DIFFERENT (where) or CRASH (what)."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            written = graphopt.optimize(path, "simplify", threads=threads).export(Path(folder) / "simplified.onnx")
        except REFUSALS as reason:
            return f"refused: {line(reason)}"
        except Exception as error:
            return f"CRASH: {type(error).__name__}: {line(error)}"
        try:
            original, simplified = plain_session(path, threads), plain_session(written, threads)
            feeds = accepted_feeds(original)
            for number, one in enumerate(feeds):
                names = [output.name for output in original.get_outputs()]
                for name, a, b in zip(names, original.run(names, one), simplified.run(names, one), strict=True):
                    # Int8 kernels round elsewhere than Q/DQ as written: those of the engine's own choice count too.
                    if not equal(a, b) and not (is_quantized(path) and equal(engines_own(path, threads, name, one), b)):
                        return f"DIFFERENT: output {name!r} on feed {number}{_how_far(a, b)}"
        except Exception as error:
            return f"CRASH: {type(error).__name__}: {line(error)}"
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds[0].items())
    return f"equal on {len(feeds)} feeds ({shapes})"


def plain_session(path: Path, threads: int) -> ort.InferenceSession:
    """The file as it is, every operator as it is written."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def is_quantized(path: Path) -> bool:
    """Whether a file rounds activations."""
    return any(node.op_type == "QuantizeLinear" for node in onnx.load(path, load_external_data=False).graph.node)


def engines_own(path: Path, threads: int, name: str, feeds: Feeds) -> Any:
    """An output of the file as the engine runs it by default, in int8 kernels where it finds them."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run([name], feeds)[0]


def accepted_feeds(session: ort.InferenceSession, seeds: Sequence[int] = SEEDS) -> list[Feeds]:
    """One for each seed, on which the session runs. Raises RuntimeError with the last refusal where nothing does."""
    refusal = "it takes no input"
    for size, largest in itertools.product(SIZES, _choices_of_largest(session)):
        feeds = [made_feeds(session.get_inputs(), seed, size, largest) for seed in seeds]
        try:
            for one in feeds:
                session.run(None, one)
            return feeds
        except Exception as error:
            refusal = line(error)
    raise RuntimeError(f"no feed was found that the original accepts; the last refusal: {refusal}")


def _choices_of_largest(session: ort.InferenceSession) -> Iterator[Mapping[str, int]]:
    """Upper ends for the integer inputs, large ones first: ids reach far, masks and segments do not."""
    names = [given.name for given in session.get_inputs() if "int" in given.type and "mask" not in given.name]
    for choice in itertools.product(LARGEST, repeat=len(names)):
        yield dict(zip(names, choice, strict=True))


def made_feeds(inputs: Sequence[Any], seed: int, size: int, largest: Mapping[str, int]) -> Feeds:
    """Standard normal floats; integers from 0, below 2 or below `largest`; open batch axes are 1, others `size`."""
    random = np.random.default_rng(seed)
    feeds: Feeds = {}
    batch = {name for one in inputs for name in one.shape[:1] if isinstance(name, str)}
    for given in inputs:
        dtype = np.dtype({"float": "float32", "double": "float64"}.get(kind := given.type[7:-1], kind))
        open_sizes = [1 if axis == 0 or name in batch else size for axis, name in enumerate(given.shape)]
        shape = [n if isinstance(n, int) else other for n, other in zip(given.shape, open_sizes, strict=True)]
        if dtype.kind == "f":
            feeds[given.name] = random.standard_normal(shape).astype(dtype)
        else:
            feeds[given.name] = random.integers(0, largest.get(given.name, 2), shape).astype(dtype)
    return feeds


def equal(a: Any, b: Any) -> bool:
    """By the tolerance of `metrics.within_tolerance`; sequences and maps entry by entry."""
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    first, second = np.asarray(a), np.asarray(b)
    if first.dtype.kind not in "fiub":
        return bool(np.array_equal(first, second))
    return first.dtype == second.dtype and metrics.within_tolerance(torch.as_tensor(first), torch.as_tensor(second))


def _how_far(a: Any, b: Any) -> str:
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
        return ""
    if a.shape != b.shape:
        return f": shape {list(a.shape)} became {list(b.shape)}"
    largest = float(np.abs(a.astype(np.float64)).max()) if a.size else 0.0
    return f": by {metrics.max_error(torch.as_tensor(a), torch.as_tensor(b)):.3g}, of at most {largest:.3g}"


def line(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:200]
