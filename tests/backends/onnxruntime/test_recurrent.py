"""Recurrent layers on int8 weights in ONNX Runtime: its LSTM kernel, and weights that it unpacks at load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphopt import optimize
from graphopt.backends.onnxruntime.target import OnnxRuntime
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.numerics.metrics import sqnr
from graphopt.passes import Quantize
from tests.dialects.test_recurrent import LAYERS, classifier, ids
from tests.language import build, feeds, run

Floats = NDArray[np.float32]


def rounded(x: Floats) -> Floats:
    """uint8 of the range that x has, and 0, as DynamicQuantizeLinear rounds it."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = (high - low) / 255 or 1.0
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return np.asarray((np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale, np.float32)


def reference(x: Floats, weight: Floats, recurrent: Floats, bias: Floats) -> Floats:
    """An LSTM of one direction whose input is rounded as a whole, and whose hidden state at each step."""
    hidden = recurrent.shape[1]
    x, h, c = rounded(x), np.zeros((x.shape[1], hidden), np.float32), np.zeros((x.shape[1], hidden), np.float32)
    found = []
    for step in x:
        gates = step @ weight.T + rounded(h) @ recurrent.T + bias[: 4 * hidden] + bias[4 * hidden :]
        i, o, f, g = np.split(gates, 4, -1)
        i, o, f = (1 / (1 + np.exp(-gate)) for gate in (i, o, f))
        c = f * c + i * np.tanh(g)
        h = (o * np.tanh(c)).astype(np.float32)
        found.append(h)
    return np.stack(found)


LSTM = "h, a, b = lstm(x[6,2,3], A[1,20,3], B[1,20,5], D[1,40])\ny = squeeze(h, axes=[1])"


def lowered(text: str, form: str | None = None, **options: Any) -> tuple[OnnxGraph, OnnxGraph]:
    """The graph with int8 weights, and what the target makes of it."""
    graph, target = build("onnx", text), OnnxRuntime()
    run(Quantize(**options), graph, target=target)
    small, _ = target.lower(graph, None)
    assert isinstance(graph, OnnxGraph) and isinstance(small, OnnxGraph)
    return graph, small


def test_the_kernel_rounds_the_input_as_a_whole_and_the_state_at_each_step() -> None:
    graph, small = lowered(LSTM, scheme="dynamic", bits=7)
    assert [node.kind for node in small.nodes] == ["com.microsoft.DynamicQuantizeLSTM", "squeeze"]
    (site,) = graph.sites("lstm")
    weights = graph.evaluate({}, [value for value in site.operands[1:4] if value is not None])
    x = feeds(graph)["x"]
    found = OnnxRuntime().compile(small)({"x": x})[0]
    expected = torch.from_numpy(reference(x.numpy(), *(tensor[0].numpy() for tensor in weights)))
    assert float((found - expected).abs().max()) < 2e-3  # its sigmoid and tanh are approximations
    floats = build("onnx", LSTM)
    assert sqnr(floats.evaluate({"x": x}, floats.outputs)[0], found) > 30


@pytest.mark.parametrize("text", [
    LSTM,
    "h, a = gru(x[6,2,3], A[2,15,3], B[2,15,5], D[2,30], direction=bidirectional)\ny = transpose(h, perm=[0,2,1,3])",
    "h, a = rnn(x[6,2,3], A[1,5,3], B[1,5,5])\ny = squeeze(h, axes=[1])",
    "y = conv_transpose(x[2,3,5,5], A[3,4,2,2], D[4], stride=[2,2])",
], ids=["lstm", "gru", "rnn", "conv_transpose"])  # fmt: skip
@pytest.mark.parametrize("symmetric", [True, False])
def test_stored_weights_are_integers_in_the_file_and_floats_once_loaded(
    text: str, symmetric: bool, tmp_path: Path
) -> None:
    graph, small = lowered(text, scheme="weight-only", symmetric=symmetric)
    stored = {tensor.dtype for _, tensor in small.constants() if tensor.dim() > 2 and tensor.numel() > 20}
    assert stored == {torch.int8 if symmetric else torch.uint8}
    runner = OnnxRuntime().compile(small)
    kernels = runner.kernels()
    assert not {"DequantizeLinear", "Cast", "Mul", "Sub"} & kernels.keys(), kernels
    torch.testing.assert_close(runner(feeds(graph)), graph.evaluate(feeds(graph), graph.outputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_an_exported_model_is_read_back_as_it_was(kind: str, tmp_path: Path) -> None:
    """So that to optimize it again leaves its weights in integers."""
    example = ids(2, 5)
    small = optimize(classifier(kind), "quantize", target="onnxruntime", example_inputs=example, measure=False)
    small.export(tmp_path / "small.onnx")
    again = optimize(str(tmp_path / "small.onnx"), target="onnxruntime", example_inputs=example, measure=False)
    again.export(tmp_path / "again.onnx")
    assert again.transformed.sites(kind) and again.report.cost_before.flops == small.report.cost_after.flops
    assert again.report.kernels == small.report.kernels
    both = [onnx.load(tmp_path / name) for name in ("small.onnx", "again.onnx")]
    sizes = [sum(len(tensor.raw_data) for tensor in model.graph.initializer) for model in both]
    assert sizes[1] <= sizes[0]
    expected: Tensor = small(example)
    assert sqnr(expected, again(example)["output"]) > 40
