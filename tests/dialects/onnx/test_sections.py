"""A model that does not fit memory, run a section at a time: the same values, each weight mapped in its turn."""

from __future__ import annotations

import errno
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

import graphopt
from graphopt.dialects.onnx import run as onnx_run
from graphopt.dialects.onnx import sections as onnx_sections
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.dialects.onnx.sections import Spool
from graphopt.ir import cost
from graphopt.ir.graph import Flow, Graph, Value
from graphopt.numerics.moments import Covariance
from graphopt.numerics.observe import MinMax
from graphopt.pipeline.calibration import Calibration, Remembered
from tests.dialects.fx.test_graph import normal
from tests.dialects.onnx.test_large import NBYTES, WIDTH, Mappings, large, layers, mappings
from tests.language import build, feeds
from tests.models import model, plain_run

__all__ = ["large", "mappings"]

COUNT = 7
"""Layers."""


@pytest.fixture
def sections(large: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two layers are a section."""
    monkeypatch.setattr(onnx_sections, "MOST", 2.5 * NBYTES)
    return large


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    return [{"h0": normal(2, WIDTH, seed=number)} for number in range(count)]


def sessions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The nodes of each session that is made from now on."""
    made: list[int] = []
    original = onnx_run.session

    def counted(model: Any, *arguments: Any, **options: Any) -> Any:
        made.append(len(model.graph))
        return original(model, *arguments, **options)

    monkeypatch.setattr(onnx_run, "session", counted)
    return made


def test_all_batches_go_through_a_section_before_the_next_is_read(
    sections: Path, tmp_path: Path, mappings: Mappings, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = layers(tmp_path / "m", COUNT)
    graph = OnnxGraph.from_file(path)
    values = [node.result for node in graph.sites("relu")]
    mappings.most = read = 0
    read, made = mappings.read, sessions(monkeypatch)
    seen = list(graph.flow(batches()).through(values))
    assert mappings.most <= 2 and mappings.alive == 0 and mappings.read - read == COUNT
    assert made == [4, 4, 4, 2] and [number for number, _, _ in seen] == 4 * [0, 1, 2]
    found = {(number, value): tensor for number, _, tensors in seen for value, tensor in tensors.items()}
    assert len(found) == 3 * COUNT
    for number, batch in enumerate(batches()):
        x = batch["h0"]
        for layer, value in enumerate(values):
            x = torch.relu(x @ (normal(WIDTH, WIDTH, seed=layer) / 8) + normal(WIDTH, seed=layer))
            torch.testing.assert_close(found[number, value], x, rtol=1e-5, atol=1e-5)


def test_one_evaluation_maps_a_section_at_a_time(sections: Path, tmp_path: Path, mappings: Mappings) -> None:
    path = layers(tmp_path / "m", COUNT)
    graph = OnnxGraph.from_file(path)
    mappings.most = 0
    (found,) = graph.evaluate(batches()[0], graph.outputs)
    torch.testing.assert_close(found, plain_run(str(path), batches()[0])[0], rtol=1e-5, atol=1e-5)
    assert mappings.most <= 2 and mappings.alive == 0


def branching(path: Path) -> Path:
    """Values that are read far behind, in a subgraph too; integers; one that nobody reads."""
    text = f"""g (float[n,{WIDTH}] h0) => (float[n,{WIDTH}] y) {{
        s = Shape(h0) a = MatMul(h0, W0) unused = Relu(a) b = MatMul(a, W1) c = MatMul(b, W2) d = MatMul(c, W3)
        e = Add(d, h0) f = Add(e, a)
        yes = Less(ZERO, ONE)
        g = If (yes) <
            then_branch = then () => (float[n,{WIDTH}] p) {{ p = Add(f, b) }},
            else_branch = other () => (float[n,{WIDTH}] q) {{ q = Sub(f, b) }}
        >
        k = MatMul(g, W4) y = Expand(k, s)
    }}"""
    weights = {f"W{n}": normal(WIDTH, WIDTH, seed=n) / 8 for n in range(5)}
    numbers = {"ZERO": torch.tensor(0.0), "ONE": torch.tensor(1.0)}
    path.mkdir()
    onnx.save(model(text, weights | numbers), path / "m.onnx", save_as_external_data=True, size_threshold=64)
    return path / "m.onnx"


def test_what_is_read_far_behind_is_carried_along(sections: Path, tmp_path: Path) -> None:
    path = branching(tmp_path / "m")
    graph = OnnxGraph.from_file(path)
    values = [*graph.inputs, *(node.result for node in graph.nodes if node.result.dtype is not None)]
    named = {value.name: (number, tensor) for number, _, some in graph.flow(batches(1)).through(values)
             for value, tensor in some.items()}  # fmt: skip
    assert len(named) == len(values)
    plain = OnnxGraph.from_model(onnx.load(path))
    for node in plain.nodes:
        if node.result.dtype is not None and node.result.name in named:
            (expected,) = plain.evaluate(batches(1)[0], [node.result])
            torch.testing.assert_close(named[node.result.name][1], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(named["y"][1], plain_run(str(path), batches(1)[0])[0], rtol=1e-5, atol=1e-5)


class Counted:
    """Batches, and how often they were asked for."""

    def __init__(self) -> None:
        self.runs = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.runs += 1
        return iter(batches())


def test_a_further_part_goes_on_where_the_flow_stands(
    sections: Path, tmp_path: Path, mappings: Mappings, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = layers(tmp_path / "m", COUNT)
    graph, given = OnnxGraph.from_file(path), Counted()
    monkeypatch.setattr(onnx_sections, "STATISTICS", 2 * Covariance(WIDTH).nbytes)
    wanted = [site.input for site in graph.sites("linear")]
    read = mappings.read
    calibration = Calibration(given, graph.inputs)
    found = [one.matrix() for one in calibration.observe(graph, [(value, Covariance(WIDTH)) for value in wanted])]
    assert given.runs == 1 and mappings.read - read == COUNT - 1  # the last layer's result is not asked for
    plain = OnnxGraph.from_model(onnx.load(path))
    inputs = [(site.input, Covariance(WIDTH)) for site in plain.sites("linear")]
    for ours, theirs in zip(found, Calibration(batches(), plain.inputs).observe(plain, inputs), strict=True):
        torch.testing.assert_close(ours, theirs.matrix(), rtol=1e-6, atol=1e-6)


def test_a_value_from_before_begins_anew(sections: Path, tmp_path: Path) -> None:
    graph, given = OnnxGraph.from_file(layers(tmp_path / "m", COUNT)), Counted()
    flow, values = graph.flow(given), [node.result for node in graph.sites("relu")]
    late, early, last = (list(flow.through([values[index]])) for index in (5, 1, 6))
    assert given.runs == 2 and [len(seen) for seen in (late, early, last)] == [3, 3, 3]


def test_activations_that_do_not_fit_go_by_sections_too(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(f"h{n + 1} = relu(linear(h{n}{'[batch,8]' if n == 0 else ''}, W{n}[8,8]))" for n in range(6))
    graph = build("onnx", text + "\nreturn h6")
    values: list[Value] = [node.result for node in graph.sites("relu")]
    monkeypatch.setattr(Flow, "memory", 2 * 4 * 8 * 4)  # two values of a batch of 4
    made = sessions(monkeypatch)
    given = [{"h0": normal(4, 8, seed=number)} for number in range(2)]
    found = ranges(graph, values, given)
    assert len(made) == 3
    monkeypatch.undo()
    assert found == ranges(graph, values, given)


def ranges(graph: Graph, values: list[Value], given: list[dict[str, Tensor]]) -> list[tuple[float, float]]:
    wanted = [(value, MinMax()) for value in values]
    return [one.range() for one in Calibration(given, graph.inputs).observe(graph, wanted)]


def test_what_fits_is_run_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = build("onnx", "y = relu(linear(x[batch,8], W[8,8]))")
    made = sessions(monkeypatch)
    ((number, fed, tensors),) = graph.flow(iter([feeds(graph)])).through(graph.outputs)
    assert number == 0 and fed.keys() == {"x"} and list(tensors) == [graph.outputs[0]] and len(made) == 1


def test_in_fx_values_are_handed_out_as_they_are_computed() -> None:
    graph = build("fx", "a = relu(x[batch,8])\nb = add(a, a)\ny = relu(b)\nreturn y, b")
    values = [graph.outputs[0], graph.sites("relu")[0].result, graph.inputs[0]]
    x = normal(4, 8)
    seen = list(graph.flow([{"x": x}, {"x": -x}]).through(values))
    assert [(number, len(tensors)) for number, _, tensors in seen] == [(0, 1)] * 3 + [(1, 1)] * 3
    found = {value: tensor for number, _, tensors in seen if number == 1 for value, tensor in tensors.items()}
    assert [torch.equal(found[value], expected) for value, expected in
            zip(values, [2 * torch.relu(-x), torch.relu(-x), -x], strict=True)] == [True] * 3  # fmt: skip


# --- static quantization -------------------------------------------------------------------------------------------


STATIC = "quantize{scheme=static}"


@pytest.mark.parametrize("passes", [STATIC, "smooth," + STATIC, "low-rank{rank=0.5}," + STATIC])
def test_static_is_that_of_the_path_in_memory(
    passes: str, sections: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = layers(tmp_path / "m", COUNT)
    small = graphopt.optimize(path, passes, calibration=batches())
    with monkeypatch.context() as patched:
        patched.setattr(cost, "LARGE", 2**31)
        whole = graphopt.optimize(path, passes, calibration=batches(), agree=False)
    assert small.folded.text() == whole.folded.text() and small.lowered.text() == whole.lowered.text()
    ours, theirs = (dict(one.lowered.constants()) for one in (small, whole))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


def test_static_maps_a_section_at_a_time(sections: Path, tmp_path: Path, mappings: Mappings) -> None:
    path = layers(tmp_path / "m", COUNT)
    mappings.most = 0
    result = graphopt.optimize(path, STATIC, calibration=batches())
    record = next(record for record in result.report.passes if record.name == "quantize")
    assert record.changed == COUNT and mappings.most <= 3
    result.export(tmp_path / "out.onnx")
    assert mappings.most <= 3 and mappings.alive == 0


def test_statistics_of_what_is_not_timed_are_not_kept(
    sections: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are for reruns, which there are none of above the limit: to keep them would hold gigabytes."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError("statistics are kept")

    monkeypatch.setattr(Remembered, "_keep", refuse)
    path = layers(tmp_path / "m", COUNT)
    graphopt.optimize(path, STATIC, example_inputs=batches()[0], calibration=batches(), measure=True)


# --- what is kept --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [2**20, 16])
def test_what_flows_is_kept_as_it_is(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_sections, "_IN_MEMORY", most)
    kept = [
        {"a": normal(3, 4), "b": torch.arange(5), "c": torch.tensor(True)},
        {"a": normal(0, 4), "b": torch.tensor(7, dtype=torch.int8), "c": normal(2, 2).to(torch.bfloat16).mT},
    ]
    spool = Spool()
    for batch in kept:
        spool.append(batch)
    assert len(spool) == 2
    for _ in range(2):
        for ours, theirs in zip(spool, kept, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype
                       for name in ours)  # fmt: skip


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch, large: Path) -> None:
    class Full(io.BytesIO):
        def write(self, content: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "SpooledTemporaryFile", lambda **options: Full())
    with pytest.raises(OSError, match=f"no room for what flows .* in {large}; set TMPDIR to a folder on a larger disk"):
        Spool().append({"x": normal(2)})
