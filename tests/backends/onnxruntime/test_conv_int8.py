"""Int8 convolutions on onnxruntime: forms in which its fastest kernel takes them, and those of small images."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F

from graphopt.backends.onnxruntime import conv_int8, linear_int8
from graphopt.backends.onnxruntime.conv_int8_few_channels import FEW_CHANNELS, columns_as_channels
from graphopt.backends.onnxruntime.kernel_counts import convolutions_as_products
from graphopt.backends.onnxruntime.runner import OrtRunner
from graphopt.backends.onnxruntime.target import OnnxRuntime
from graphopt.dialects.onnx import export as onnx_export
from graphopt.dialects.onnx import run as onnx_run
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.errors import LoweringError
from graphopt.ir.rewrite import Choice, Match, rewrite
from tests.language import build

# Weights of 7 bits: sums of two products with more saturate on a CPU without VNNI, each kernel's at another place.
SHALLOW = (
    "y = conv_int8(x[n,3,{h},{w}]:uint8, S[]:values(0.02), Z[]:values(114):uint8, "
    "W[16,3,{k},{k}]:values(-63,33,57,60,-8,40,-41):int8, V[16]:values(0.01,0.02), T[]:values(0.2), "
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

    several, first, last = columns_as_channels(weight, stride, padding, together)
    assert several.shape[:3] == (together // stride * 5, together * channels, kernel)
    side_by_side = x.permute(0, 2, 3, 1).reshape(2, 8, 12 // together, -1).permute(0, 3, 1, 2)
    y = F.conv2d(F.pad(side_by_side, (first, last, padding, padding)), several, stride=(stride, 1))
    found = y.permute(0, 2, 3, 1).reshape(2, y.shape[2], 12 // stride, 5).permute(0, 3, 1, 2)
    assert torch.equal(found, expected)


def lowered(text: str, form: str, choice: Choice = FEW_CHANNELS) -> OnnxGraph:
    """The graph with its convolutions in one form, and all else as the target lowers it."""
    graph = build("onnx", text).clone()
    (log,) = rewrite(graph, [choice.only(form)]).values()
    assert log.hits == 1 and not log.declined
    for stage in OnnxRuntime().rules(graph):
        rewrite(graph, [rule.rule() if isinstance(rule, Choice) else rule for rule in stage])
        graph.sweep()
    assert isinstance(graph, OnnxGraph)
    graph.verify()
    return graph


def ran(graph: OnnxGraph, x: torch.Tensor, level: str = "all") -> torch.Tensor:
    return onnx_run.run(onnx_run.session(onnx_export.deployable(graph), level=level), {"x": x})[0]


def dumped(graph: OnnxGraph, level: str, folder: Path) -> list[onnx.NodeProto]:
    """The nodes that a session at a level runs."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnx_run.session(onnx_export.deployable(graph), level=level, options=options)
    return list(onnx.load(folder / "optimized.onnx").graph.node)


@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), [(16, 7, 2, 3), (12, 3, 2, 1), (8, 3, 1, 1)])
def test_both_forms_give_the_same_integers(size: int, kernel: int, stride: int, padding: int) -> None:
    text = SHALLOW.format(h=size, w=size, k=kernel, s=stride, p=padding)
    x = torch.randint(0, 256, (2, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = [
        ran(lowered(text, form), x, level)
        for form in FEW_CHANNELS.forms
        for level in ("disable", "all")
    ]
    assert found[0].float().std() > 20  # not all saturated
    for other in found[1:]:
        assert torch.equal(found[0], other)


@pytest.mark.parametrize("level", ["basic", "extended", "all"])
def test_the_engine_keeps_columns_as_channels(level: str, tmp_path: Path) -> None:
    """It neither undoes the form nor transposes more than into it and out of it."""
    graph = lowered(SHALLOW.format(h=16, w=16, k=7, s=2, p=3), "columns as channels")
    nodes = dumped(graph, level, tmp_path)
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
    assert not FEW_CHANNELS.matches(build("onnx", text))


def test_the_first_convolution_of_a_network_takes_its_columns_as_channels() -> None:
    """Unmeasured, in the static order, between a quantize and a pool that moves integers."""
    text = SHALLOW.format(h=16, w=16, k=7, s=2, p=3).replace("y = conv_int8(x[n,3,16,16]:uint8", "c = conv_int8(q")
    graph = build("onnx", f"q = quantize(x[n,3,16,16], S[]:values(0.02), Z[]:values(114):uint8)\n{text}\n"
                          "y = max_pool(c, kernel=[3,3], stride=[2,2], padding=[1,1,1,1])")  # fmt: skip
    made, logs = OnnxRuntime().lower(graph)
    assert logs["conv-of-few-channels"].hits == 1 and logs["qlinear-conv"].hits == 0
    assert isinstance(made, OnnxGraph) and made.outputs[0].shape == ("n", 16, 4, 4)
    feeds = {"x": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    (expected,) = graph.evaluate(feeds, graph.outputs)
    (found,) = OnnxRuntime().compile(made)(feeds)
    assert (expected.int() - found.int()).abs().max() <= 1  # a rounding may fall the other way


# --- small images --------------------------------------------------------------------------------------------------

CONV = (
    "y = conv_int8(x[{n},{c},{h},{w}]:uint8, S[]:values(0.02), Z[]:values(114):uint8, "
    "W[16,{i},{kh},{kw}]:values(-63,33,57,60,-8,40,-41):int8, V[16]:values(0.01,0.02), T[]:values(0.3), "
    "U[]:values(100):uint8, B[16], stride=[{s},{r}], padding=[{p}], dilation=[{d},{d}], groups={g})"
)
POINTWISE: dict[str, int | str] = dict(n="n", c=8, i=8, h=7, w=5, kh=1, kw=1, s=1, r=1, p="0,0,0,0", d=1, g=1)
GEOMETRIES: dict[str, dict[str, int | str]] = {
    "pointwise": {},
    "3x3": dict(kh=3, kw=3, p="1,1,1,1"),
    "stride 2, a row too many": dict(kh=3, kw=3, p="1,1,1,1", s=2, r=2),
    "stride 2 of pixels": dict(s=2, r=2, h=8),
    "stride 3 of pixels": dict(s=3, r=1, h=7),
    "no padding": dict(kh=3, kw=2, d=1),
    "padded on one side": dict(kh=3, kw=3, p="0,0,2,1", s=2, r=1),
    "dilated": dict(kh=3, kw=3, p="2,2,2,2", d=2),
    "no batch axis that is open": dict(n=3, kh=3, kw=3, p="1,1,1,1"),
}


def images(text: str) -> torch.Tensor:
    """Three, at random, of the size that a graph reads."""
    (value,) = build("onnx", text).inputs
    assert value.shape is not None
    sizes = [size if isinstance(size, int) else 3 for size in value.shape]
    return torch.randint(0, 256, sizes, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_several_images_as_one_give_the_same_integers(geometry: str) -> None:
    text = CONV.format(**{**POINTWISE, **GEOMETRIES[geometry]})
    x = images(text)
    expected = ran(lowered(text, "QLinearConv", conv_int8.SMALL), x, "disable")
    assert expected.float().std() > 10 and expected.shape[0] == 3
    tall = lowered(text, "one tall image", conv_int8.SMALL)
    for level in ("disable", "all"):
        assert torch.equal(ran(tall, x, level), expected)
    if geometry != "no batch axis that is open":
        assert torch.equal(ran(tall, x[:1]), expected[:1])


@pytest.mark.parametrize(
    ("x", "weight", "space"),
    [
        ("n,8,9", "16,8,1", "stride=[1], padding=[0,0], dilation=[1]"),
        ("n,8,9", "16,8,3", "stride=[2], padding=[0,3], dilation=[2]"),
        ("n,8,3,4,5", "16,8,1,1,1", "stride=[1,1,1], padding=[0,0,0,0,0,0], dilation=[1,1,1]"),
        ("n,8,4,5,5", "16,8,3,2,3", "stride=[2,1,1], padding=[1,0,1,2,1,1], dilation=[1,1,1]"),
    ],
)
def test_small_images_of_one_and_three_axes(x: str, weight: str, space: str) -> None:
    text = (
        f"y = conv_int8(x[{x}]:uint8, S[]:values(0.02), Z[]:values(114):uint8, W[{weight}]:values(-63,33,57,60):int8, "
        f"V[16]:values(0.01,0.02), T[]:values(0.2), U[]:values(100):uint8, {space}, groups=1)"
    )
    steps = images(text)
    expected = ran(lowered(text, "QLinearConv", conv_int8.SMALL), steps, "disable")
    assert expected.float().std() > 10
    assert torch.equal(ran(lowered(text, "one tall image", conv_int8.SMALL), steps), expected)
    product = ran(lowered(text, "QGemm", conv_int8.SMALL), steps)
    assert product.shape == expected.shape and (product.int() - expected.int()).abs().max() <= 1


def test_products_of_linears_do_not_count_as_convolutions() -> None:
    linears = """
        i = quantize(f[b,24], S[]:values(0.02), Z[]:values(114):uint8)
        j = quantize(linear_int8(i, S, Z, L[16,24]:int8, M[16]:values(0.1)), S, Z)
        z = linear_int8(j, S, Z, N[8,16]:int8, O[8]:values(0.01))"""
    conv = CONV.format(**{**POINTWISE, **GEOMETRIES["3x3"]}).replace("S[]:values(0.02), Z[]:values(114):uint8", "S, Z")
    pointwise = CONV.format(**POINTWISE).replace("S[]:values(0.02), Z[]:values(114):uint8", "S, Z")
    target, closing = OnnxRuntime(), linear_int8.TO_INTEGERS
    alone, three, one = (build("onnx", f"{linears}{more}") for more in
                         ("", f"\n{conv}\nreturn y, z", f"\n{pointwise}\nreturn y, z"))  # fmt: skip
    made = alone.clone()
    rewrite(made, [closing.only("QGemm")])
    target.check(alone, target.compile(target.lower(made)[0]))
    for without in (three, one):
        both = without.clone()
        rewrite(both, [closing.only("QGemm"), conv_int8.SMALL.only("QGemm")])
        target.check(without, target.compile(target.lower(both)[0]))
        with pytest.raises(LoweringError, match="1 conv_int8 were promised and onnxruntime built 0"):
            target.check(without, target.compile(target.lower(made)[0]))


def test_a_linear_of_moved_channels_does_not_count_as_a_convolution() -> None:
    text = """
        i = transpose(quantize(f[b,24,7], S[]:values(0.02), Z[]:values(114):uint8), perm=[0,2,1])
        j = quantize(linear_int8(i, S, Z, L[16,24]:int8, M[16]:values(0.1)), S, Z)
        z = linear_int8(j, S, Z, N[8,16]:int8, O[8]:values(0.01))"""
    graph = build("onnx", text)
    made = graph.clone()
    rewrite(made, [linear_int8.TO_INTEGERS.only("QGemm")])
    runner = OnnxRuntime().compile(OnnxRuntime().lower(made)[0])
    assert made.sites("com.microsoft.QGemm") and isinstance(runner, OrtRunner)
    assert convolutions_as_products(runner.model) == 0
    OnnxRuntime().check(graph, runner)


@pytest.mark.parametrize("n", ["n", 1, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_convolution_as_a_product(n: int | str, geometry: str) -> None:
    text = CONV.format(**{**POINTWISE, **GEOMETRIES[geometry], "n": n})
    x = images(text)
    expected = ran(lowered(text, "QLinearConv", conv_int8.SMALL), x, "disable")
    for level in ("disable", "all"):
        found = ran(lowered(text, "QGemm", conv_int8.SMALL), x, level)
        assert found.shape == expected.shape and (found.int() - expected.int()).abs().max() <= 1
        assert (found == expected).float().mean() > 0.99


@pytest.mark.parametrize(
    ("form", "kernels"),
    [
        ("one tall image", ["Transpose", "Pad", "Reshape", "QLinearConv", "Reshape", "Slice", "Transpose"]),
        ("QGemm", ["Transpose", "Reshape", "QGemm", "Reshape", "Transpose"]),
    ],
)
@pytest.mark.parametrize("level", ["basic", "extended", "all"])
def test_the_engine_keeps_the_form(form: str, kernels: list[str], level: str, tmp_path: Path) -> None:
    geometry = GEOMETRIES["3x3"] if form == "one tall image" else {}
    graph = lowered(CONV.format(**{**POINTWISE, **geometry}), form, conv_int8.SMALL)
    assert [node.op_type for node in dumped(graph, level, tmp_path)] == kernels


@pytest.mark.parametrize(
    "geometry",
    [
        dict(h=17, w=16),  # large enough
        dict(c=16, i=1, kh=3, kw=3, p="1,1,1,1", g=16),
        dict(h="h"),
    ],
)
def test_other_images_are_convolved_one_by_one(geometry: dict[str, int | str]) -> None:
    assert not conv_int8.SMALL.matches(build("onnx", CONV.format(**{**POINTWISE, **geometry})))


@pytest.mark.parametrize(
    "geometry",
    [
        dict(kh=2, kw=2, p="2,2,2,2"),
        dict(kh=2, kw=2, p="2,0,0,0"),
        dict(s=2, r=2, p="1,1,1,1", h=8, w=8),
        dict(s=8, p="1,0,0,0"),
    ],
)
def test_padding_beyond_a_window_fits_no_gap(geometry: dict[str, int | str]) -> None:
    graph = build("onnx", CONV.format(**{**POINTWISE, **geometry}))
    (log,) = rewrite(graph, [conv_int8.SMALL.only("one tall image")]).values()
    assert [decline.code for decline in log.declined.values()] == ["padding_beyond_window"]


def test_large_windows_are_not_copied() -> None:
    graph = build("onnx", CONV.format(**{**POINTWISE, "kh": 7, "kw": 4}))
    (log,) = rewrite(graph, [conv_int8.SMALL.only("QGemm")]).values()
    assert [decline.code for decline in log.declined.values()] == ["large_window"]


def test_transposes_between_small_convolutions_cancel_out(tmp_path: Path) -> None:
    """One into the chain and one out of it, whatever the forms."""
    geometry = "stride=[1,1], padding=[{0},{0},{0},{0}], dilation=[1,1], groups=1"
    first = "S[]:values(0.02), Z[]:values(114):uint8, W[16,16,1,1]:values(-63,33,57):int8, V[16]:values(0.01,0.02)"
    behind = "T[]:values(0.3), U[]:values(100):uint8, B[16]"
    text = f"""
        a = conv_int8(x[n,16,7,7]:uint8, {first}, {behind}, {geometry.format(0)})
        b = conv_int8(a, T, U, P[16,16,3,3]:values(-60,33,57):int8, V, T, U, B, {geometry.format(1)})
        c = add_int8(a, T, U, b, T, U, T, U)
        y = conv_int8(c, T, U, W, V, T, U, B, {geometry.format(0)})"""
    graph = build("onnx", text).clone()
    read = graph.inputs[0]

    def form(match: Match) -> str:
        pointwise = match.weight.shape[-1] == 1
        return "QLinearConv" if not pointwise else "one tall image" if match.x == read else "QGemm"

    rewrite(graph, [conv_int8.SMALL.rule(form)])
    made, _ = OnnxRuntime().lower(graph)
    assert isinstance(made, OnnxGraph)
    kernels = [node.op_type for node in dumped(made, "all", tmp_path)]
    assert sorted(kernels) == sorted(["Transpose", "Reshape", "QLinearConv", "Reshape", "QLinearConv", "QLinearAdd",
                                      "Reshape", "QGemm", "Reshape", "Transpose"])  # fmt: skip
