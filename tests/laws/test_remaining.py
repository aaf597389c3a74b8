"""The law that no op with weights passes a lossy pass in silence: it is changed, or declined by name with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from graphopt.dialects.fx.graph import FxGraph
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.ir.graph import Graph, Node, Value, every_node
from graphopt.ir.ops import OPS
from graphopt.passes import Cast, LowRank, Prune, Quantize, Sparsify
from graphopt.pipeline import remaining
from graphopt.pipeline.context import Context
from graphopt.pipeline.passes import Pass
from graphopt.pipeline.runner import run_pass
from graphopt.pipeline.selectors import Selector
from tests.dialects.fx.test_graph import CASES, Case, operand_names

KINDS: tuple[Literal["neurons", "heads", "channels", "width"], ...] = ("neurons", "heads", "channels", "width")
PASSES: dict[str, Callable[[], Pass]] = {
    **{f"quantize-{scheme}": lambda scheme=scheme: Quantize(scheme=scheme, smooth=False)  # type: ignore[misc]
       for scheme in ("auto", "dynamic", "weight-only")},
    "prune": lambda: Prune(params=0.9, kinds=KINDS, round_to=1),
    "sparsify": lambda: Sparsify(amount=0.5),
    "low-rank": lambda: LowRank(energy=0.5),
    "cast": lambda: Cast(dtype="bfloat16"),
}  # fmt: skip
OF_THE_WHOLE: dict[str, Callable[[], Pass]] = {
    "prune": PASSES["prune"],
    "sparsify-global": lambda: Sparsify(amount=0.5, scope="global"),
    "low-rank-params": lambda: LowRank(params=0.5),
}
"""Passes that weigh all sites against each other, and enter no branch."""

WEIGHTS = ("weight", "recurrent", "table")
"""The operands that are weights."""
INTEGERS = ("linear_int8", "conv_int8")
"""Ops whose weights are small already."""


def beside_a_pair(dialect: str, emit: Callable[[Graph, list[Value]], list[Value]], *inputs: Tensor) -> Graph:
    """A graph of what `emit` makes of its inputs, and a pair of linears, so that each pass finds something."""
    empty = FxGraph.empty if dialect == "fx" else OnnxGraph.empty
    named = {f"x{place}": (tuple(tensor.shape), tensor.dtype) for place, tensor in enumerate(inputs)}
    graph = empty({"beside": ((4, 16), torch.float32), **named})
    beside, *given = graph.inputs
    inner = graph.emit("relu", graph.emit("linear", beside, graph.add_constant(torch.randn(64, 16))))
    outer = graph.emit("linear", inner, graph.add_constant(torch.randn(16, 64)))
    results = emit(graph, list(given))
    graph.set_outputs({"pair": outer, **{f"y{place}": value for place, value in enumerate(results)}})
    graph.sweep()
    return graph


def with_stored_weights(dialect: str, op: str, case: Case) -> Graph:
    tensors, attributes = case
    names = operand_names(op, tensors)
    inputs = [t for name, t in zip(names, tensors, strict=False) if t is not None and name in ("x", "ids")]

    def emit(graph: Graph, given: list[Value]) -> list[Value]:
        waiting = iter(given)
        operands = [
            None if tensor is None else next(waiting) if name in ("x", "ids") else graph.add_constant(tensor)
            for name, tensor in zip(names, tensors, strict=False)
        ]
        return list(graph.emit_all(op, *operands, **attributes))

    return beside_a_pair(dialect, emit, *inputs)


def require_a_reason_for_each(pass_: Pass, graph: Graph) -> dict[Node, str]:
    """Run a pass; the code for each node with weights that is as it was. Fails where one has none."""
    before = remaining.nodes_with_weights(graph)
    context = Context()
    run_pass(pass_, graph, context)
    (record,) = context.report.passes
    codes = {}
    for node in every_node(graph):
        if node in before and remaining.stored_operands(node) == before[node]:
            label = context.labels.get(node, node.label)
            assert label in record.declined, f"{pass_} says nothing of {label} ({node.kind})"
            assert label in record.eligible
            codes[node] = record.declined[label].code
    return codes


OPS_WITH_WEIGHTS = [op for op in OPS if set(WEIGHTS) & set(OPS[op].operands) and (OPS[op].flops or op == "embedding")]


def test_the_law_is_about_these_ops() -> None:
    assert set(OPS_WITH_WEIGHTS) - set(INTEGERS) == {
        "linear", "conv", "conv_transpose", "embedding", "lstm", "gru", "rnn",
    }  # fmt: skip


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("op", [op for op in OPS_WITH_WEIGHTS if op not in INTEGERS])
def test_an_op_with_weights_is_changed_or_declined(op: str, name: str, dialect: str) -> None:
    for case in CASES[op]:
        require_a_reason_for_each(PASSES[name](), with_stored_weights(dialect, op, case))


OPAQUE: dict[str, tuple[str, dict[str, Any]]] = {"fx": ("aten.kron.default", {}), 
                                                "onnx": ("onnx.Einsum", {"equation": "ij,kj->ik"})}  # fmt: skip


@pytest.mark.parametrize("dialect", OPAQUE)
@pytest.mark.parametrize("name", PASSES)
def test_an_operator_that_is_no_op_is_declined(name: str, dialect: str) -> None:
    kind, attributes = OPAQUE[dialect]

    def emit(graph: Graph, given: list[Value]) -> list[Value]:
        return [graph.emit(kind, given[0], graph.add_constant(torch.randn(6, 8)), **attributes)]

    codes = require_a_reason_for_each(PASSES[name](), beside_a_pair(dialect, emit, torch.randn(3, 8)))
    assert {node.kind: code for node, code in codes.items()}[kind] == "opaque_operator"


def branching(held: str) -> onnx.ModelProto:
    """A pair of linears, and a conv of its result in one branch of an If, whose weight the branch has, computes of a
    constant node, or reads from around it."""
    weight = numpy_helper.from_array(torch.randn(2, 2, 3, 3).numpy(), "weight")
    nodes = [helper.make_node("Conv", ["pair", "weight"], ["then"], pads=[1, 1, 1, 1])]
    if held == "constant":
        nodes.insert(0, helper.make_node("Constant", [], ["weight"], value=weight))
    image = helper.make_tensor_value_info("then", TensorProto.FLOAT, [1, 2, 4, 16])
    then = helper.make_graph(nodes, "then", [], [image], [weight] if held == "branch" else [])
    same = helper.make_tensor_value_info("else", TensorProto.FLOAT, [1, 2, 4, 16])
    other = helper.make_graph([helper.make_node("Identity", ["pair"], ["else"])], "else", [], [same])
    stored = {"V": torch.randn(16, 64), "W": torch.randn(64, 16)}
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "V"], ["inner"]), helper.make_node("Relu", ["inner"], ["positive"]),
            helper.make_node("MatMul", ["positive", "W"], ["pair"]),
            helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=other, name="choice"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 4, 16]),
         helper.make_tensor_value_info("flag", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, 4, 16])],
        [*(numpy_helper.from_array(tensor.numpy(), name) for name, tensor in stored.items()),
         *([weight] if held == "around" else [])],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


@pytest.mark.parametrize("name", PASSES | OF_THE_WHOLE)
@pytest.mark.parametrize("held", ["branch", "constant", "around"])
def test_weights_inside_a_branch_are_changed_or_declined_too(name: str, held: str) -> None:
    pass_ = (PASSES | OF_THE_WHOLE)[name]()
    codes = require_a_reason_for_each(pass_, OnnxGraph.from_model(branching(held)))
    inside = [code for node, code in codes.items() if node.graph.whole is not node.graph]
    assert inside == ["in_body"] if name in OF_THE_WHOLE else not {"in_body", "opaque_operator"}.intersection(inside)


def test_what_the_user_left_out_is_not_declined() -> None:
    graph = with_stored_weights("onnx", "lstm", CASES["lstm"][0])
    context = Context()
    run_pass(Sparsify(amount=0.5, targets=Selector("linear")), graph, context)
    assert all(node.kind == "linear" for node in context.considered)
