"""Int8 convolutions on onnxruntime: forms in which its fastest kernel takes them."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F

from graphopt.backends import onnxruntime_conv
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.dialects import onnx_export, onnx_run
from graphopt.dialects.onnx import OnnxGraph
from graphopt.rewrite import Choice, rewrite
from tests.language import build

SHALLOW = (
    "y = conv_int8(x[n,3,{h},{w}]:uint8, S[]:values(0.02), Z[]:values(114):uint8, "
    "W[16,3,{k},{k}]:values(-90,33,77,120,-8,60,-41):int8, V[16]:values(0.01,0.02), T[]:values(0.3), "
    "U[]:values(100):uint8, B[16], stride=[{s},{s}], padding=[{p},{p},{p},{p}])"
)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(7, 2, 3), (3, 2, 1), (3, 1, 1), (5, 4, 2), (4, 4, 0)])
@pytest.mark.parametrize(("channels", "together"), [(3, 4), (1, 4), (2, 4), (6, 4)])
def test_columns_as_channels_is_the_same_convolution(
    kernel: int, stride: int, padding: int, channels: int, together: int
) -> None:
    """In whole numbers, against torch: 2 rows of images, 12 columns."""
    generator = torch.Generator().manual_seed(kernel)
    x = torch.randint(-9, 9, (2, channels, 8, 12), generator=generator).double()
    weight = torch.randint(-9, 9, (5, channels, kernel, kernel), generator=generator).double()
    expected = F.conv2d(F.pad(x, (padding, 99, padding, padding)), weight, stride=stride)[..., : 12 // stride]

    several, first, last = onnxruntime_conv.columns_as_channels(weight, stride, padding, together)
    assert several.shape[:3] == (together // stride * 5, together * channels, kernel)
    side_by_side = x.permute(0, 2, 3, 1).reshape(2, 8, 12 // together, -1).permute(0, 3, 1, 2)
    y = F.conv2d(F.pad(side_by_side, (first, last, padding, padding)), several, stride=(stride, 1))
    found = y.permute(0, 2, 3, 1).reshape(2, y.shape[2], 12 // stride, 5).permute(0, 3, 1, 2)
    assert torch.equal(found, expected)


def lowered(text: str, form: str) -> OnnxGraph:
    """The graph with its convolutions in one form, and all else as the target lowers it."""
    graph = build("onnx", text).clone()
    (log,) = rewrite(graph, [onnxruntime_conv.SHALLOW.only(form)]).values()
    assert log.hits == 1 and not log.declined
    for stage in OnnxRuntime().rules(graph):
        rewrite(graph, [rule.rule() if isinstance(rule, Choice) else rule for rule in stage])
        graph.sweep()
    assert isinstance(graph, OnnxGraph)
    graph.verify()
    return graph


@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), [(16, 7, 2, 3), (12, 3, 2, 1), (8, 3, 1, 1)])
def test_both_forms_give_the_same_integers(size: int, kernel: int, stride: int, padding: int) -> None:
    text = SHALLOW.format(h=size, w=size, k=kernel, s=stride, p=padding)
    x = torch.randint(0, 256, (2, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = [
        onnx_run.run(onnx_run.session(onnx_export.deployable(lowered(text, form)), level=level), {"x": x})[0]
        for form in onnxruntime_conv.SHALLOW.forms
        for level in ("disable", "all")
    ]
    assert found[0].float().std() > 20  # not all saturated
    for other in found[1:]:
        assert torch.equal(found[0], other)


@pytest.mark.parametrize("level", ["basic", "extended", "all"])
def test_the_engine_keeps_columns_as_channels(level: str, tmp_path: Path) -> None:
    """It neither undoes the form nor transposes more than into it and out of it."""
    graph = lowered(SHALLOW.format(h=16, w=16, k=7, s=2, p=3), "columns as channels")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnx_run.session(onnx_export.deployable(graph), level=level, options=options)
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    assert [node.op_type for node in nodes] == ["Transpose", "Reshape", "QLinearConv", "Reshape", "Transpose"]
    assert nodes[2].domain == "com.microsoft"


@pytest.mark.parametrize(
    "text",
    [
        SHALLOW.format(h=16, w=18, k=7, s=2, p=3),  # 18 columns are no groups of 4
        SHALLOW.format(h=16, w="w", k=7, s=2, p=3),
        SHALLOW.format(h=16, w=16, k=7, s=2, p=0),  # 5 columns are written, not 8
        SHALLOW.format(h=16, w=16, k=7, s=2, p=3).replace("padding=", "dilation=[2,2], padding="),
        SHALLOW.format(h=16, w=16, k=3, s=1, p=1).replace(",3,", ",4,"),  # as many channels as the kernel wants
        SHALLOW.format(h=16, w=16, k=3, s=4, p=0).replace("[16", "[8"),  # too few outputs for it
    ],
)
def test_other_convolutions_stay_as_they_are(text: str) -> None:
    assert not onnxruntime_conv.SHALLOW.matches(build("onnx", text))


def test_the_first_convolution_of_a_network_takes_its_columns_as_channels() -> None:
    """Unmeasured, in the static order, between a quantize and a pool that moves integers."""
    text = SHALLOW.format(h=16, w=16, k=7, s=2, p=3).replace("y = conv_int8(x[n,3,16,16]:uint8", "c = conv_int8(q")
    graph = build("onnx", f"q = quantize(x[n,3,16,16], S[]:values(0.02), Z[]:values(114):uint8)\n{text}\n"
                          "y = max_pool(c, kernel=[3,3], stride=[2,2], padding=[1,1,1,1])")  # fmt: skip
    made, logs = OnnxRuntime().lower(graph)
    assert logs["shallow-conv"].hits == 1 and logs["qlinear-conv"].hits == 0
    assert isinstance(made, OnnxGraph) and made.outputs[0].shape == ("n", 16, 4, 4)
    feeds = {"x": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    (expected,) = graph.evaluate(feeds, graph.outputs)
    (found,) = OnnxRuntime().compile(made)(feeds)
    assert (expected.int() - found.int()).abs().max() <= 1  # a rounding may fall the other way
