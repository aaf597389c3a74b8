"""What passes say of a model that holds nothing for them."""

from __future__ import annotations

import pytest

from graphopt.ir.decline import Decline
from graphopt.passes import LowRank, Sparsify
from graphopt.pipeline.passes import Pass
from graphopt.pipeline.selectors import Selector
from tests.language import build, declines, run


@pytest.mark.parametrize("pass_", [Sparsify(), LowRank()], ids=str)
@pytest.mark.parametrize(("text", "told"), [
    ("y = relu(x[2,4])", "nothing to change: [linear,conv] selects no site of the model"),
    (
        "y = relu(dequantize(quantize(x[2,4], S[1]:ones), S))",
        "nothing to change: [linear,conv] selects no site of the model; it is quantized already: change the float "
        "model, and quantize it after",
    ),
], ids=["no site", "quantized"])  # fmt: skip
def test_says_that_there_is_nothing(dialect: str, pass_: Pass, text: str, told: str) -> None:
    assert run(pass_, build(dialect, text)).record.notes == [told]


def test_a_tied_weight_names_its_other_reader_once(dialect: str) -> None:
    graph = build(dialect, "a = linear(x[2,8], W[8,8])\nb = linear(a, W)")
    first, second = graph.nodes
    called = "linear" if first.label == "linear" else f"linear {first.label}"
    assert declines(run(Sparsify(targets=Selector.of(second)), graph)) == [Decline("weight_tied", reader=called)]


def test_says_that_ignore_leaves_nothing(dialect: str) -> None:
    notes = run(Sparsify(ignore=Selector("linear")), build(dialect, "y = linear(x[2,4], W[3,4])")).record.notes
    assert notes == ["nothing to change: [linear,conv] selects no site of the model that ignore leaves"]
