"""Weights in blocks and in less than 8 bits: each dialect stores them its own way, and shows the same op."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from graphopt.errors import GraphError
from graphopt.ir.cost import Cost
from graphopt.ir.graph import Graph
from graphopt.numerics import quantize
from tests.language import assert_outputs_equal, build, feeds, outputs, producer, stored

FORMS = [(bits, block, symmetric) for bits in (8, 4, 3, 2) for block in (None, 16, 32) for symmetric in (True, False)]


def weight_only(dialect: str, grid: quantize.Grid, integers: torch.Tensor, bits: int, block: int | None) -> Graph:
    """linear(x[batch,64], dequantize(integers))."""
    graph = build(dialect, "y = relu(x[batch,64])")
    q, scale = graph.add_constant(integers), graph.add_constant(grid.scale)
    zero_point = None if grid.zero_point is None else graph.add_constant(grid.zero_point)
    axis = 1 if block else 0
    weight = graph.emit("dequantize", q, scale, zero_point, axis=axis, block=block or 0, bits=bits)
    graph.set_outputs({"y": graph.emit("linear", graph.inputs[0], weight)})  # type: ignore[attr-defined]
    graph.sweep()
    return graph


def fitted(bits: int, block: int | None, symmetric: bool) -> tuple[quantize.Grid, torch.Tensor]:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(bits))
    grid = quantize.fit(weight, bits=bits, axis=0, block=block, symmetric=symmetric)
    return grid, grid.round(weight)


@pytest.mark.parametrize(("bits", "block", "symmetric"), FORMS)
def test_stores_and_computes_every_form(
    dialect: str, bits: int, block: int | None, symmetric: bool, tmp_path: Path
) -> None:
    grid, integers = fitted(bits, block, symmetric)
    graph = weight_only(dialect, grid, integers, bits, block)
    graph.verify()
    inputs = feeds(graph)
    scale, zero_point = grid.expanded(integers)
    values = (integers.double() - zero_point) * scale
    expected = inputs["x"].double() @ values.T
    torch.testing.assert_close(outputs(graph, inputs)[0].double(), expected, rtol=1e-5, atol=1e-5)
    node = producer(graph.sites("linear")[0].operand("weight"))
    assert dict(node.attributes) == {"axis": 1 if block else 0, "block": block or 0, "bits": bits}
    assert torch.equal(stored(node, "x"), integers)
    if not symmetric:
        assert grid.zero_point is not None and torch.equal(stored(node, "zero_point"), grid.zero_point)
    graph.save(path := tmp_path / ("graph.onnx" if dialect == "onnx" else "graph.pt2"))
    loaded = type(graph).load(path)
    assert loaded.text() == graph.text()
    assert_outputs_equal(loaded, graph, rtol=0, atol=0)


@pytest.mark.parametrize(("bits", "block", "symmetric"), FORMS)
def test_emits_the_node_anew(dialect: str, bits: int, block: int | None, symmetric: bool) -> None:
    graph = weight_only(dialect, *fitted(bits, block, symmetric), bits, block)
    again = graph.clone()
    node = again.sites("dequantize")[0]
    again.replace(node, again.emit(node, *node.operands, at=node))
    again.sweep()
    assert again.text() == graph.text()
    assert_outputs_equal(again, graph, rtol=0, atol=0)


@pytest.mark.parametrize(("bits", "block", "symmetric"), [form for form in FORMS if form[0] == 4])
def test_onnx_packs_two_weights_a_byte(bits: int, block: int | None, symmetric: bool) -> None:
    grid, integers = fitted(bits, block, symmetric)
    graph = weight_only("onnx", grid, integers, bits, block)
    node = graph.sites("dequantize")[0]
    held = node.required("x").native.const_value  # type: ignore[attr-defined]
    assert held.dtype == (ir.DataType.INT4 if symmetric else ir.DataType.UINT4)
    assert held.nbytes == 6 * 64 // 2


@pytest.mark.parametrize(("bits", "block", "symmetric"), FORMS)
def test_cost_counts_bits(dialect: str, bits: int, block: int | None, symmetric: bool) -> None:
    grid, integers = fitted(bits, block, symmetric)
    graph = weight_only(dialect, grid, integers, bits, block)
    zero_points = 0 if grid.zero_point is None else -(-grid.zero_point.numel() * bits // 8)
    assert Cost.of(graph).bytes == 6 * 64 * bits // 8 + 4 * grid.scale.numel() + zero_points


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (4, True), (4, False), (2, False)])
@pytest.mark.parametrize("opset", [17, 20])
def test_onnx_computes_blocks_by_itself_where_the_operator_has_none(opset: int, bits: int, symmetric: bool) -> None:
    graph = build("onnx", "y = relu(x[2,64])")
    graph.model.graph.opset_imports[""] = opset  # type: ignore[attr-defined]
    grid, integers = fitted(bits, 32, symmetric)
    zero_point = None if grid.zero_point is None else graph.add_constant(grid.zero_point)
    operands = graph.add_constant(integers), graph.add_constant(grid.scale), zero_point
    value = graph.emit("dequantize", *operands, axis=1, block=32, bits=bits)
    assert dict(producer(value).attributes) == {"axis": 1, "block": 32, "bits": bits} and value.shape == (6, 64)
    torch.testing.assert_close(graph.evaluate(feeds(graph), [value])[0], grid.values(integers))
    with pytest.raises(GraphError, match="for matrices only, in blocks along axis 1, before opset 21"):
        graph.emit("dequantize", *operands, axis=0, block=2, bits=bits)


@pytest.mark.parametrize("opset", [17, 20])
def test_onnx_keeps_narrow_integers_in_bytes_where_the_opset_has_none(opset: int) -> None:
    graph = build("onnx", "y = relu(x[2,64])")
    graph.model.graph.opset_imports[""] = opset  # type: ignore[attr-defined]
    grid, integers = fitted(4, None, True)
    q, scale = graph.add_constant(integers), graph.add_constant(grid.scale)
    value = graph.emit("dequantize", q, scale, axis=0, bits=4)
    node = producer(value)
    assert node.attributes["bits"] == 4 and torch.equal(stored(node, "x"), integers)
    torch.testing.assert_close(graph.evaluate(feeds(graph), [value])[0], grid.values(integers))


def test_fx_refuses_blocks_that_it_has_no_operator_for() -> None:
    graph = build("fx", "y = relu(x[2,64])")
    integers, scale = graph.add_constant(torch.ones(4, 64, dtype=torch.int8)), graph.add_constant(torch.ones(1, 64))
    with pytest.raises(GraphError, match=r"blocks of 2 or more that divide axis 1 of a matrix, not 4 along axis 0"):
        graph.emit("dequantize", integers, scale, axis=0, block=4)
