"""quantize on recurrent layers and transposed convs: both weights of a layer, a scale for each row of a gate."""

from __future__ import annotations

import pytest
import torch

from graphopt.numerics.metrics import sqnr
from graphopt.passes import Quantize
from graphopt.pipeline.target import AnyTarget
from tests.language import assert_unchanged, build, declined, listing, outputs, run

LSTM = "h, a, b = lstm(x[6,2,3], A[2,20,3], B[2,20,5], D[2,40], direction=bidirectional)\nreturn h"
GRU = "h, a = gru(x[6,2,3], A[1,15,3], B[1,15,5], D[1,30])\nreturn h"
RNN = "h, a = rnn(x[6,2,3], A[1,5,3], B[1,5,5])\nreturn h"
TRANSPOSED = "y = conv_transpose(x[2,3,5,5], A[3,4,2,2], D[4], stride=[2,2])"


@pytest.mark.parametrize("text", [LSTM, GRU, RNN, TRANSPOSED])
def test_weights_alone(text: str, dialect: str) -> None:
    graph, floats = build(dialect, text), build(dialect, text)
    context = run(Quantize(scheme="weight-only"), graph)
    assert not declined(context)
    stored = graph.sites("dequantize")
    assert len(stored) == (1 if text == TRANSPOSED else 2)
    for node in stored:
        shape, axis = node.input.shape, node.attributes["axis"]
        assert shape is not None and node.input.dtype is torch.int8
        assert (axis, node.required("scale").shape) == (1, (shape[1],))
    assert sqnr(outputs(floats)[0], outputs(graph)[0]) > 30
    assert_unchanged(Quantize(scheme="weight-only"), graph)


def test_the_input_of_an_lstm_too(dialect: str) -> None:
    graph = build(dialect, LSTM)
    run(Quantize(scheme="dynamic"), graph)
    kinds = [node.kind for node in graph.nodes]
    assert kinds == ["choose_qparams", "quantize", "dequantize", "dequantize", "dequantize", "lstm"]
    assert sqnr(outputs(build(dialect, LSTM))[0], outputs(graph)[0]) > 25


@pytest.mark.parametrize(
    ("text", "options", "code"),
    [
        (GRU, {"scheme": "dynamic"}, "no_kernel"),
        (RNN, {"scheme": "static"}, "no_kernel"),
        (TRANSPOSED, {"scheme": "dynamic"}, "no_kernel"),
        ("h, a, b = lstm(x[6,2,3], A[1,20,3], relu(z[1,20,5]))\nreturn h", {}, "weight_computed"),
    ],
)
def test_declines(text: str, options: dict[str, str], code: str, dialect: str) -> None:
    graph = build(dialect, text)
    before = listing(graph)
    context = run(Quantize(**options), graph)  # type: ignore[arg-type]
    assert declined(context) == [code] and listing(graph) == before


def test_a_target_without_a_kernel_says_so(dialect: str) -> None:
    target = AnyTarget()
    target.schemes = {"linear": ("dynamic",)}
    context = run(Quantize(), build(dialect, GRU), target=target)
    assert declined(context) == ["no_kernel"]
