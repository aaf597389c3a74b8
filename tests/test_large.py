"""Models above the limit: the result of the path in memory, one weight at a time, and nothing run unless asked."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

import graphopt
from graphopt.backends.onnxruntime.target import OnnxRuntime
from graphopt.dialects.onnx import files as onnx_files
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.errors import PassError
from graphopt.ir import cost
from graphopt.ir.graph import Graph
from graphopt.lowering.backend import Runner
from graphopt.pipeline.context import Context
from graphopt.pipeline.instruments import Reproduce
from graphopt.pipeline.passes import Pass, Stage
from graphopt.result import Optimized
from tests.dialects.fx.test_graph import normal
from tests.dialects.onnx.test_large import NBYTES, WIDTH, Mappings, large, layers, mappings, open_scratch
from tests.models import plain_run

__all__ = ["large", "mappings"]
DYNAMIC = "quantize{scheme=dynamic}"
X = {"h0": normal(5, WIDTH, seed=20)}


def weights(path: Path) -> dict[str, Tensor]:
    stored = onnx.load(path).graph.initializer
    return {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in stored}


def changed(result: Optimized, name: str) -> int:
    return next(record.changed for record in result.report.passes if record.name == name)


@pytest.mark.parametrize("passes", [None, DYNAMIC, "sparsify{amount=0.5}," + DYNAMIC])
def test_the_result_is_that_of_the_path_in_memory(
    passes: str | None, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = layers(tmp_path / "m")
    small = graphopt.optimize(path, passes)
    outside = small.export(tmp_path / "large.onnx", external_data=True)
    with monkeypatch.context() as patched:
        patched.setattr(cost, "LARGE", 2**31)
        whole = graphopt.optimize(path, passes, agree=False)
        inside = whole.export(tmp_path / "small.onnx", external_data=True)
    assert small.folded.text() == whole.folded.text() and small.lowered.text() == whole.lowered.text()
    assert outside.read_bytes() == inside.read_bytes().replace(b"small.onnx.", b"large.onnx.")
    data = [next(file.parent.glob(f"{file.name}.*.data")).read_bytes() for file in (outside, inside)]
    assert data[0] == data[1]
    torch.testing.assert_close(plain_run(str(outside), X)[0], whole(X)["h4"], rtol=1e-5, atol=1e-5)
    assert not list(large.iterdir())


@pytest.mark.parametrize("count", [4, 12])
def test_memory_does_not_grow_with_layers(count: int, large: Path, tmp_path: Path, mappings: Mappings) -> None:
    """Neither mapped weights nor integers that were made of them; what is dropped is dropped without the collector."""
    path = layers(tmp_path / "m", count)
    mappings.most = 0
    result = graphopt.optimize(path, DYNAMIC)
    assert changed(result, "quantize") == count and mappings.most <= 2
    result.export(tmp_path / "out.onnx")
    assert mappings.most <= 2 and mappings.alive == 0
    graphs = (result.captured, result.folded, result.lowered)
    assert all(held(graph) <= count * 12 * WIDTH for graph in graphs)
    assert open_scratch(large) == 1
    del result, graphs
    gc.collect()
    assert open_scratch(large) == 0


def held(graph: Graph) -> int:
    """Bytes of weights that a graph has in memory."""
    assert isinstance(graph, OnnxGraph)
    stored = [value.const_value for value in graph.model.graph.initializers.values()]
    return sum(one.nbytes for one in stored if one is not None and not isinstance(one, onnx_files.FileTensor))


def test_what_is_made_of_a_large_model_is_written_beside_the_file(large: Path, tmp_path: Path) -> None:
    """Though it would fit one file: to write one, memory would hold it all twice."""
    result = graphopt.optimize(layers(tmp_path / "m"), DYNAMIC)
    (tmp_path / "to").mkdir()
    result.export(tmp_path / "to" / "out.onnx")
    (data,) = (tmp_path / "to").glob("*.data")
    assert {file.name for file in (tmp_path / "to").iterdir()} == {"out.onnx", data.name, "out.onnx.json"}
    before = {file.name: file.read_bytes() for file in (tmp_path / "to").iterdir()}
    result.export(tmp_path / "to" / "out.onnx")
    assert {file.name: file.read_bytes() for file in (tmp_path / "to").iterdir()} == before
    result.export(tmp_path / "to" / "one.onnx", external_data=False)
    assert list((tmp_path / "to").glob("*.data")) == [data]
    one, two = weights(tmp_path / "to" / "one.onnx"), weights(tmp_path / "to" / "out.onnx")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_over_the_model_that_it_was_made_of(large: Path, tmp_path: Path) -> None:
    path = layers(tmp_path / "m")
    (expected,) = plain_run(str(path), X)
    result = graphopt.optimize(path)
    for _ in range(2):  # the second time reads what the first has replaced
        result.export(path)
        torch.testing.assert_close(plain_run(str(path), X)[0], expected, rtol=1e-5, atol=1e-5)


# --- what is off ---------------------------------------------------------------------------------------------------


def test_nothing_is_run_unless_asked(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = layers(tmp_path / "m")
    compiled: list[Graph] = []
    original = OnnxRuntime.compile

    def compile(backend: OnnxRuntime, graph: Graph, threads: int | None = None) -> Runner:
        compiled.append(graph)
        return original(backend, graph, threads)

    def refuse(graph: OnnxGraph, feeds: Any, fetch: Any) -> list[Tensor]:
        assert not fetch, f"{[value.name for value in fetch]} are computed"
        return []

    monkeypatch.setattr(OnnxRuntime, "compile", compile)
    with monkeypatch.context() as patched:
        patched.setattr(OnnxGraph, "evaluate", refuse)
        result = graphopt.optimize(path, DYNAMIC)
    notes = "; ".join(result.report.notes)
    assert "0.0 GiB of weights: the model is not run (agree=True runs it)" in notes
    assert "outputs are not compared with the original, nor kernels counted (agree=True does both)" in notes
    assert not result.report.agreement and not result.report.kernels and not compiled
    assert result.report.cost_before.flops is not None  # sizes come from the feeds that were made
    (found,) = result(X).values()
    torch.testing.assert_close(found, result(X)["h4"], rtol=0, atol=0)
    assert compiled == [result.lowered]  # once, when it was asked for
    (expected,) = plain_run(str(path), X)
    assert float(torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0)) > 0.999


def test_asked_for_it_is_compared_and_counted(large: Path, tmp_path: Path) -> None:
    result = graphopt.optimize(layers(tmp_path / "m"), DYNAMIC, agree=True)
    (agreement,) = result.report.agreement
    assert agreement.sqnr > 20 and result.report.kernels["DynamicQuantizeMatMul"] == 4
    assert not any("not run" in note or "not compared" in note for note in result.report.notes)


def test_an_older_opset_is_kept_and_said(large: Path, tmp_path: Path) -> None:
    path = layers(tmp_path / "m")
    proto = onnx.load(path, load_external_data=False)
    proto.opset_import[0].version = 20
    onnx.save(proto, path)
    result = graphopt.optimize(path, DYNAMIC)
    assert isinstance(result.folded, OnnxGraph) and result.folded.opset == 20 and changed(result, "quantize") == 4
    assert any("not run, and stays at opset 20" in note for note in result.report.notes)
    result = graphopt.optimize(path, DYNAMIC, agree=True)
    assert isinstance(result.folded, OnnxGraph) and result.folded.opset == 23


@dataclass(frozen=True)
class Fails(Pass):
    """Raises."""

    name = "fails"
    stage = Stage.SIMPLIFY

    def run(self, graph: Graph, context: Context) -> None:
        raise ValueError("on purpose")


def test_a_failed_pass_leaves_gigabytes_only_where_told(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = layers(tmp_path / "m")
    with pytest.raises(PassError) as caught:
        graphopt.optimize(path, [Fails()])
    assert caught.value.reproducer is None and not list(large.iterdir())
    monkeypatch.setattr(onnx_files, "INSIDE", NBYTES)
    with pytest.raises(PassError) as caught:
        graphopt.optimize(path, [Fails()], instruments=[Reproduce(tmp_path / "again")])
    assert caught.value.reproducer == str(tmp_path / "again")
    (data,) = (tmp_path / "again").glob("graph.onnx.*.data")
    assert data.stat().st_size >= 4 * NBYTES
    saved = OnnxGraph.load(tmp_path / "again" / "graph.onnx")
    torch.testing.assert_close(saved.evaluate(X, saved.outputs)[0], plain_run(str(path), X)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("stop", "raised"), [(KeyboardInterrupt, KeyboardInterrupt), (OSError, graphopt.GraphError)])
@pytest.mark.parametrize("written", [0, 2])
def test_an_interrupted_export_leaves_what_was_there(
    stop: type[BaseException],
    raised: type[BaseException],
    written: int,
    large: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = layers(tmp_path / "m")
    (tmp_path / "to").mkdir()
    out = graphopt.optimize(path).export(tmp_path / "to" / "out.onnx")
    before = {file.name: file.read_bytes() for file in out.parent.iterdir()}
    result = graphopt.optimize(path, DYNAMIC)
    original, calls = onnx_files.append, iter(range(100))

    def interrupted(*arguments: Any) -> int:
        if next(calls) == written:
            raise stop
        return original(*arguments)

    monkeypatch.setattr(onnx_files, "append", interrupted)
    with pytest.raises(raised):
        result.export(out)
    assert {file.name: file.read_bytes() for file in out.parent.iterdir()} == before
