"""Structured pruning of ONNX files as found in the wild: the groups of axes, what locks one, and a cut by a quarter."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime as ort

import graphopt
from benchmarks.case import Settings, checked, table
from benchmarks.cases.corpus import accepted_feeds, plain_session
from graphopt.analysis.groups import Group, groups
from graphopt.ir.graph import Graph
from graphopt.report.declines import Reason

FILES = {
    "ultraface": "ultraface__version-RFB-320.onnx",
    "ultraface-slim": "ultraface__version-slim-320_simplified.onnx",
    "ultraface-masked": "ultraface__RFB-640-masked_face-v2.onnx",
    "paddleocr-cls": "paddleocr__ch_ppocr_mobile_v2.0_cls_infer.onnx",
    "paddleocr-det": "paddleocr__ch_ppocr_mobile_v2.0_det_infer.onnx",
    "cnn-mnist": "ort__cnn_mnist_pytorch.onnx",
    "openwakeword": "openwakeword__embedding_model.onnx",
    "magika": "magika__standard_v3_3__model.onnx",
}
SHARE = 0.25


def run(settings: Settings) -> bool:
    rows = table(f"a cut of {SHARE:.0%} of every group", "file", "groups", "locked", "FLOPs", "parameters", "runs")
    locked: dict[str, list[Group]] = {}
    holds = True
    for name, file in FILES.items():
        if not settings.chosen(name):
            continue
        path = settings.required("onnx_corpus", file)
        graph = graphopt.optimize(path, threads=settings.threads).folded
        found = groups(graph)
        locked[name] = [group for group in found if group.locked is not None]
        cells, fits = cut(path, graph, settings)
        free = Counter(group.kind for group in found if group.locked is None)
        rows.add_row(name, ", ".join(f"{n} {kind}" for kind, n in free.items()), str(len(locked[name])), *cells[:-1],
                     checked(cells[-1], fits))  # fmt: skip
        holds = holds and fits
    settings.console.print(rows)
    for name, several in locked.items():
        settings.console.print(f"[bold]{name}[/bold]: locked")
        for group in several:
            reason = Reason.of(group.locked) if group.locked else ""
            settings.console.print(f"  {group.kind} {group.name} ({group.size}): {reason}", markup=False)
    return holds


def cut(path: Path, graph: Graph, settings: Settings) -> tuple[list[str], bool]:
    """FLOPs and parameters that are left, and whether the exported file is sound and runs on three feeds."""
    kinds = {group.kind for group in groups(graph) if group.locked is None}
    shares = [f"{kind}={SHARE}" for kind in sorted(kinds) if kind != "width"]
    if not shares:
        return ["", "", "no group may be cut"], False
    pipeline = f"prune{{{' '.join(shares)} round_to=1}}"
    with tempfile.TemporaryDirectory() as folder:
        small = graphopt.optimize(path, pipeline, threads=settings.threads)
        file = small.export(Path(folder) / "small.onnx")
        onnx.shape_inference.infer_shapes(onnx.load(file), check_type=True, strict_mode=True, data_prop=True)
        session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        original = plain_session(path, settings.threads)
        for feeds in accepted_feeds(original):
            expected, found = original.run(None, feeds), session.run(None, feeds)
            if [one.shape for one in expected] != [one.shape for one in found]:
                return ["", "", "its outputs have other shapes"], False
    before, after = small.report.cost_before, small.report.cost_after
    assert before is not None and after is not None
    flops = f"{after.flops / before.flops:.3f}" if after.flops and before.flops else "unknown"
    return [flops, f"{after.parameters / before.parameters:.3f}", "yes"], True
