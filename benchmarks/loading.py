"""An ONNX file in onnxruntime and no other library: `python -m benchmarks.loading FILE BATCH.npz THREADS` prints what
a process takes that loads it and runs it once. Linux only."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort

LOADS = 3
"""Sessions of which the median time to load counts."""

Arrays = dict[str, np.ndarray[Any, Any]]


def session(path: Path, threads: int) -> ort.InferenceSession:
    """Default options, but for the threads."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feeds(one: ort.InferenceSession, batch: Mapping[str, Any]) -> Arrays:
    """A batch by the names of a session's inputs, in which torch's exporter has _ where graphopt has a dot."""
    given = {name.replace(".", "_"): np.asarray(array) for name, array in batch.items()}
    return {value.name: given[value.name.replace(".", "_")] for value in one.get_inputs()}


def main(path: Path, given: Path, threads: int) -> None:
    """Print the seconds to load, and the most bytes of resident memory after one session and one run."""
    with np.load(given) as batch:
        one = session(path, threads)
        one.run(None, feeds(one, batch))
    peak = 1024 * int(Path("/proc/self/status").read_text(encoding="utf-8").split("VmHWM:")[1].split()[0])
    del one
    seconds = []
    for _ in range(LOADS):
        start = time.perf_counter()
        session(path, threads)
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"load": median(seconds), "peak": peak}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
