"""A file in its engine and no other library: `python -m benchmarks.loading ENGINE FILE BATCH.npz THREADS` prints what
a process takes that loads it and runs it once. Linux only."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnxruntime as ort

LOADS = 3
"""Sessions of which the median time to load counts."""

Arrays = dict[str, np.ndarray[Any, Any]]
Bind = Callable[[Mapping[str, Any]], Callable[[], Any]]
"""A loaded file: from a batch to a call without arguments; a file's returns its outputs, in order."""


@dataclass(frozen=True)
class OpenVinoFile:
    """A file that OpenVINO runs, ONNX or its own .xml; where a bare path stands for one, onnxruntime runs it."""

    path: Path


def session(path: Path, threads: int) -> ort.InferenceSession:
    """Default options, but for the threads."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feeds(one: ort.InferenceSession, batch: Mapping[str, Any]) -> Arrays:
    """A batch by the names of a session's inputs."""
    return _named((value.name for value in one.get_inputs()), batch)


def onnxruntime(path: Path, threads: int) -> Bind:
    one = session(path, threads)
    return lambda batch: partial(one.run, None, feeds(one, batch))


def openvino(path: Path, threads: int) -> Bind:
    """Default options, but for the threads."""
    compiled = importlib.import_module("openvino").compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": threads})

    def bind(batch: Mapping[str, Any]) -> Callable[[], list[Any]]:
        given = _named((port.any_name for port in compiled.inputs), batch)
        return lambda: list(compiled(given).values())

    return bind


ENGINES: dict[str, Callable[[Path, int], Bind]] = {"onnxruntime": onnxruntime, "openvino": openvino}


def _named(names: Iterable[str], batch: Mapping[str, Any]) -> Arrays:
    """Torch's exporter has _ in names where graphopt has a dot."""
    given = {name.replace(".", "_"): np.asarray(array) for name, array in batch.items()}
    return {name: given[name.replace(".", "_")] for name in names}


def main(engine: str, path: Path, given: Path, threads: int) -> None:
    """Print the seconds to load, and the most bytes of resident memory after one session and one run."""
    load = ENGINES[engine]
    with np.load(given) as batch:
        bind = load(path, threads)
        bind(batch)()
    peak = 1024 * int(Path("/proc/self/status").read_text(encoding="utf-8").split("VmHWM:")[1].split()[0])
    del bind
    seconds = []
    for _ in range(LOADS):
        start = time.perf_counter()
        load(path, threads)
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"load": median(seconds), "peak": peak}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
