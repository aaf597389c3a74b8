"""ONNX -> a torch.fx graph that trains: networks as exporters write them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import graphopt
from graphopt.capture import capture
from graphopt.capture.fx_conversion import to_fx
from graphopt.errors import CaptureError
from graphopt.numerics.metrics import within_tolerance
from tests.models import ConvNet, Decoder, Encoder, exported, images, model, padding, plain_run, seeded, tokens
from tests.operators import normal

TOKENS = {"ids": tokens(), "mask": padding()}
LONGER = {"ids": tokens(3, 9), "mask": padding(3, 9)}


def losses(module: nn.Module, inputs: Mapping[str, Tensor], steps: int = 10) -> list[float]:
    """Of training towards fixed random outputs."""
    target = torch.randn(module(**inputs)["y"].shape, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(module(**inputs)["y"], target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        found.append(loss.item())
    return found


def assert_same(module: fx.GraphModule, proto: onnx.ModelProto, inputs: Mapping[str, Tensor]) -> None:
    found = module(**inputs)
    assert list(found) == [output.name for output in proto.graph.output]
    for a, b in zip(plain_run(proto, inputs), found.values(), strict=True):
        assert within_tolerance(a, b.detach()), (a - b).abs().max()


@pytest.mark.parametrize(("opset", "dynamo"), [(14, False), (23, True)])
def test_a_transformer(opset: int, dynamo: bool) -> None:
    original = seeded(Encoder)
    proto = exported(original, TOKENS, opset, dynamo)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all axes stay dynamic
        module = graphopt.to_torch(proto, TOKENS)
    assert isinstance(module, fx.GraphModule) and not module.training
    assert {name for name, _ in module.named_parameters()} == {name for name, _ in original.named_parameters()}
    for inputs in (TOKENS, LONGER, {name: tensor[:1] for name, tensor in TOKENS.items()}):
        torch.testing.assert_close(module(**inputs)["y"], original(**inputs), rtol=1e-4, atol=1e-5)
    assert torch.equal(module(*TOKENS.values())["y"], module(**TOKENS)["y"])
    module.train()
    found = losses(module, LONGER)
    assert found[-1] < 0.9 * found[0]
    assert all(one.grad is not None for one in module.parameters())


def test_ops_and_paths_are_those_of_the_file() -> None:
    proto = exported(seeded(Decoder), {"ids": tokens()}, 23, True)
    captured = capture(proto, "onnx", example_inputs={"ids": tokens()})
    converted = to_fx(captured)
    assert converted.graph.dialect == "fx" and to_fx(converted) is converted
    assert converted.signature is captured.signature and converted.feeds is captured.feeds
    kept = ("embedding", "linear", "attention", "rms_norm", "silu", "mul", "add", "transpose")
    assert [(node.kind, node.path) for node in converted.graph.sites(*kept)] == [
        (node.kind, node.path or node.name) for node in captured.graph.sites(*kept)
    ]
    assert [value.shape for value in converted.graph.inputs] == [value.shape for value in captured.graph.inputs]


def test_a_convnet_follows_train_and_eval() -> None:
    """The batch norms that the file still has are torch's: they keep their statistics, and train."""
    original = seeded(ConvNet)
    batch = {"x": images(5)}
    proto = model(CONVNET, {name: tensor for name, tensor in original.state_dict().items() if "tracked" not in name})
    module = graphopt.to_torch(proto)
    assert_same(module, proto, batch)
    torch.testing.assert_close(module(**batch)["y"], original(batch["x"]), rtol=1e-4, atol=1e-5)
    assert {name for name, _ in module.named_parameters()} == {name for name, _ in original.named_parameters()}
    module.train(), original.train()
    torch.testing.assert_close(module(**batch)["y"], original(batch["x"]), rtol=1e-4, atol=1e-5)
    found = losses(module, batch)
    assert found[-1] < 0.9 * found[0]
    module.eval()
    assert torch.equal(module(**batch)["y"], module(**batch)["y"])


CONVNET = """g (float[batch,3,8,8] x) => (float[batch,5] y) {
    ["/stem/Conv"] a = Conv<pads = [1,1,1,1]>(x, "stem.weight", "stem.bias")
    ["/stem/Relu"] b = Relu(a)
    ["/conv1/Conv"] c = Conv<pads = [1,1,1,1]>(b, "conv1.weight")
    ["/bn1/Norm"] d = BatchNormalization(c, "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var")
    e = Relu(d)
    ["/conv2/Conv"] f = Conv<pads = [1,1,1,1]>(e, "conv2.weight")
    ["/bn2/Norm"] h = BatchNormalization(f, "bn2.weight", "bn2.bias", "bn2.running_mean", "bn2.running_var")
    i = Add(h, b)
    j = Relu(i)
    k = GlobalAveragePool(j)
    l = Flatten(k)
    ["/head/Gemm"] y = Gemm<transB = 1>(l, "head.weight", "head.bias")
}"""


def test_sources(tmp_path: Path) -> None:
    """A path, a proto, a graphsurgeon graph; inputs are made where none are given."""
    text = 'g (float[n,4] "x:0", float[n,3] input) => (float[n,3] y) { a = MatMul("x:0", w)  y = Add(a, input) }'
    proto = model(text, {"w": normal(4, 3)})
    onnx.save(proto, tmp_path / "model.onnx")
    x, other = normal(5, 4), normal(5, 3)
    expected = plain_run(proto, {"x:0": x, "input": other})[0]
    for source in (proto, gs.import_onnx(proto), tmp_path / "model.onnx", str(tmp_path / "model.onnx")):
        module = graphopt.to_torch(source)
        for found in (module(x, other), module(x_0=x, input=other)):
            torch.testing.assert_close(found["y"], expected)
    with pytest.raises(CaptureError, match="a torch module already"):
        graphopt.to_torch(module)


def test_a_quantized_file_keeps_its_integers_and_trains(tmp_path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Batches(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter([{"x": normal(8, 16, seed=seed).numpy()} for seed in range(2)])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.rest, None)

    text = "g (float[n,16] x) => (float[n,4] y) { a = MatMul(x, v)  b = Relu(a)  y = MatMul(b, w) }"
    onnx.save(model(text, {"v": normal(16, 32), "w": normal(32, 4)}), tmp_path / "float.onnx")
    quantize_static(tmp_path / "float.onnx", tmp_path / "small.onnx", Batches(), quant_format=QuantFormat.QDQ)
    small = onnx.load(tmp_path / "small.onnx")
    inputs = {"x": normal(6, 16, seed=5)}
    converted = to_fx(capture(small, "onnx", example_inputs=inputs))
    assert {node.kind for node in converted.graph.nodes} == {"quantize", "dequantize", "linear"}
    module = graphopt.to_torch(small, inputs)
    assert within_tolerance(plain_run(small, inputs)[0], module(**inputs)["y"].detach(), rtol=2 / 255)
    found = losses(module, inputs)
    assert found[-1] < 0.9 * found[0]


def test_an_axis_that_cannot_be_dynamic_is_told() -> None:
    proto = model("g (float[n,4] x) => (float[n,4] y) { y = Add(x, c) }", {"c": normal(2, 4)})
    with pytest.warns(UserWarning, match=r"axis 0 \(n\) of x is fixed at 2 in torch"):
        graphopt.to_torch(proto, {"x": normal(2, 4)})


def test_a_size_that_must_be_one_is_kept() -> None:
    """Squeeze takes axis 0 away, which the file calls dynamic."""
    text = "g (float[n,m] x) => (float[m] y) { y = Squeeze(x, axes) }"
    proto = model(text, {"axes": torch.tensor([0])})
    with pytest.warns(UserWarning, match=r"axis 0 \(n\) of x is fixed at 1"):
        module = graphopt.to_torch(proto, {"x": normal(1, 4)})
    assert module(normal(1, 7))["y"].shape == (7,)


def test_a_random_model_is_refused() -> None:
    proto = model("g (float[n,4] x) => (float[n,4] y) { r = RandomNormalLike(x)  y = Add(x, r) }", opset=20)
    with pytest.raises(CaptureError, match=r"no torch form: onnx\.RandomNormalLike"):
        graphopt.to_torch(proto, {"x": normal(2, 4)})


def test_a_difference_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.dialects.onnx.interpreter import module as interpreter
    from graphopt.dialects.onnx.interpreter.call import Form

    wrong = Form(lambda call: call[0] * 1.001)
    monkeypatch.setattr(interpreter, "FORMS", {**interpreter.FORMS, "relu": wrong})
    proto = model("g (float[n,4] x) => (float[n,4] y) { y = Relu(x) }")
    with pytest.raises(CaptureError, match=r"output 'y' differs in torch by .*pass example_inputs"):
        graphopt.to_torch(proto, {"x": normal(2, 4).abs()})
