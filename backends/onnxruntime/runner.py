"""A session of onnxruntime on the CPU: runs a lowered graph, tells its kernels, and profiles it."""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from statistics import median

import onnx
import onnxruntime as ort
from torch import Tensor

from graphopt.backends.onnxruntime.guards import guarded
from graphopt.dialects.onnx import crashing
from graphopt.dialects.onnx import export as onnx_export
from graphopt.dialects.onnx import run as onnx_run
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.errors import LoweringError, first_line
from graphopt.lowering.backend import Runner

PROFILED = 7
"""Runs that a profile takes the median of, after one to warm up."""

_KERNEL = "_kernel_time"
"""What the profiler appends to the name of a node."""


class OrtRunner(Runner):
    """A session at the default options, of the file as it would be exported."""

    def __init__(self, graph: OnnxGraph, threads: int | None) -> None:
        self.model, self.threads = onnx_export.deployable(guarded(graph)), threads
        self.names = [value.name for value in graph.outputs]
        try:
            crashing.require_loads(self.model)
            self.session = onnx_run.session(self.model, level="all", threads=threads)
        except Exception as error:  # the engine's own exceptions have no base of theirs
            raise LoweringError(f"onnxruntime cannot load the model: {first_line(error)}") from error

    def __call__(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        return onnx_run.run(self.session, feeds)

    def kernels(self) -> dict[str, int]:
        """From the model that the session optimized, dumped at the level below hardware layouts."""
        return dict(self._kernels)

    def profile(self, feeds: Mapping[str, Tensor]) -> Mapping[str, float]:
        """By the engine's own profiler, the median of PROFILED runs."""
        options = ort.SessionOptions()
        seconds: dict[str, list[float]] = defaultdict(list)
        with tempfile.TemporaryDirectory() as folder:
            options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
            session = onnx_run.session(self.model, level="all", threads=self.threads, options=options)
            for _ in range(PROFILED + 1):
                onnx_run.run(session, feeds)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
                seconds[event["name"].removesuffix(_KERNEL)].append(event["dur"] / 1e6)
        return {name: median(several[1:]) for name, several in seconds.items()}

    @cached_property
    def _kernels(self) -> Counter[str]:
        options = ort.SessionOptions()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "optimized.onnx"
            options.optimized_model_filepath = str(path)
            # The dump holds every weight: externally, so that no model is too large for it.
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
            onnx_run.session(self.model, level="extended", options=options)
            graph = onnx.load(path, load_external_data=False).graph
        return Counter(sorted(node.op_type for node in _nodes(graph)))


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of its subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)
