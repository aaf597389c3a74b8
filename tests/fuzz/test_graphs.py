"""Random models, in a run that is short and always the same; `make fuzz` runs on with others."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests.fuzz import properties
from tests.fuzz.further_operators import ALL
from tests.fuzz.onnx_graphs import OPSETS, Array, models, runs
from tests.fuzz.reduced import reduced, text_of

SHORT = settings(max_examples=15, derandomize=True, deadline=None, database=None,
                 suppress_health_check=list(HealthCheck), phases=(Phase.generate,))  # fmt: skip

Model = tuple[onnx.ModelProto, dict[str, Array]]


@SHORT
@given(models(ALL))
def test_simplify_keeps_the_numbers(drawn: Model) -> None:
    properties.simplify_keeps_the_numbers(*drawn)


def test_export_at_any_opset() -> None:
    @SHORT
    @given(models(ALL), st.sampled_from(OPSETS), st.booleans())
    def each(drawn: Model, opset: int, portable: bool) -> None:
        properties.export_at(opset, *drawn, portable=portable)

    before = properties.references[properties.COMPARED]
    each()
    assert properties.references[properties.COMPARED] > before, dict(properties.references)


def test_one_element_that_is_not_finite_hides_no_other() -> None:
    """Where outputs hold infinities, the noise and the rounding of their finite elements are measured."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [8])
    nodes = [helper.make_node("Exp", ["x"], ["e"]), helper.make_node("QuantizeLinear", ["x", "scale"], ["q"]),
             helper.make_node("DequantizeLinear", ["q", "scale"], ["d"]), helper.make_node("Div", ["d", "zero"], ["y"])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [8]) for name in ("e", "y")]
    stored = {"scale": np.array(1, np.float32), "zero": np.array([0, *[1] * 7], np.float32)}
    graph = helper.make_graph(nodes, "g", [x], outputs, [numpy_helper.from_array(a, n) for n, a in stored.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    feeds = {"x": np.array([100, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5], np.float32)}
    found = runs(model, feeds)
    assert found is not None and all(np.isinf(one[0]) for one in found)
    least = properties.floors("cast", model, feeds, found)
    assert all(one is not None and -100 < one < 30 for one in least)  # 30 dB are what cast itself is allowed
    assert properties.moved_by_rounding(model, feeds, found) == [0, 1]


@settings(SHORT, max_examples=10)
@given(models(ALL))
def test_a_second_pass_changes_nothing(drawn: Model) -> None:
    properties.a_second_pass_changes_nothing(*drawn)


@pytest.mark.slow
@settings(SHORT, max_examples=15)
@given(models(ALL))
def test_torch_computes_the_same(drawn: Model) -> None:
    properties.torch_computes_the_same(*drawn)


@settings(SHORT, max_examples=8)
@given(models(ALL))
def test_every_form_keeps_the_numbers(drawn: Model) -> None:
    properties.every_form_keeps_the_numbers(*drawn)


@settings(SHORT, max_examples=10)
@given(models(ALL))
def test_a_text_and_a_file_are_the_graph(drawn: Model) -> None:
    properties.a_text_and_a_file_are_the_graph(*drawn)


@settings(SHORT, max_examples=10)
@given(models(ALL), st.sampled_from(list(properties.PASSES)))
def test_a_pass_counts_every_weight(drawn: Model, passes: str) -> None:
    properties.a_pass_counts_every_weight(passes, *drawn)


@settings(SHORT, max_examples=5)
@given(models(ALL))
def test_a_failing_model_is_cut_to_the_node_at_fault(drawn: Model) -> None:
    """Here the fault is an operator by its name."""
    model, feeds = drawn
    guilty = model.graph.node[len(model.graph.node) // 2].op_type
    smaller, fed = reduced(model, feeds, lambda one, _: any(node.op_type == guilty for node in one.graph.node))
    assert [node.op_type for node in smaller.graph.node] == [guilty]
    assert set(fed) <= {value.name for value in smaller.graph.input} and guilty in text_of(smaller)
