"""The onnxruntime target: which kernels it builds, what it computes, and what it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import graphopt
from graphopt.backends.onnxruntime import gelu, linear_int8, skip_layer_norm
from graphopt.backends.onnxruntime.runner import OrtRunner
from graphopt.backends.onnxruntime.target import OnnxRuntime
from graphopt.dialects.onnx import export as onnx_export
from graphopt.dialects.onnx import run as onnx_run
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.errors import GraphError, LoweringError
from graphopt.ir.decline import Decline
from graphopt.ir.rewrite import Choice, rewrite
from graphopt.numerics.metrics import cosine, sqnr, within_tolerance
from graphopt.result import Optimized
from tests.language import build
from tests.models import ConvNet, Decoder, Encoder, images, model, padding, plain_run, seeded, tokens

ENCODED = {"ids": tokens(), "mask": padding()}
COMPUTING = {
    "Attention", "LayerNormalization", "RMSNormalization", "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Gelu",
    "BiasGelu", "QuickGelu", "Sum", "Softmax", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger",
    "DynamicQuantizeLinear", "QuantizeLinear", "DequantizeLinear", "Conv", "FusedConv", "QLinearConv", "QLinearAdd",
    "QLinearMatMul", "QGemm", "BatchNormalization",
}  # fmt: skip


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    return [{"ids": tokens(seed=seed), "mask": padding()} for seed in range(count)]


@pytest.fixture(scope="module")
def encoders() -> dict[str, Optimized]:
    """One encoder as float, and quantized in both ways."""
    module = seeded(Encoder)
    return {
        "float": graphopt.optimize(module, example_inputs=ENCODED),
        "dynamic": graphopt.optimize(module, "quantize{scheme=dynamic}", example_inputs=ENCODED),
        "static": graphopt.optimize(module, "quantize{scheme=static}", example_inputs=ENCODED, calibration=batches()),
    }


@pytest.fixture(scope="module")
def conv_net() -> Optimized:
    calibration = [{"x": images(seed=seed)} for seed in range(4)]
    module = seeded(ConvNet)
    return graphopt.optimize(module, "quantize{scheme=static}", example_inputs=images(), calibration=calibration)


def kernels(path: Path, level: str) -> list[onnx.NodeProto]:
    """The nodes of the model that a plain session makes of a file."""
    options = ort.SessionOptions()
    options.graph_optimization_level = onnx_run.LEVELS[level]
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path) + f".{level}"
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return list(onnx.load(options.optimized_model_filepath).graph.node)


def computing(nodes: list[onnx.NodeProto]) -> dict[str, int]:
    return {op: count for op, count in Counter(node.op_type for node in nodes).items() if op in COMPUTING}


KERNEL_COUNTS = {
    "float": {"Attention": 2, "LayerNormalization": 4, "MatMul": 12, "BiasGelu": 2, "Sum": 4},
    "dynamic": {
        "Attention": 2, "LayerNormalization": 4, "Gelu": 2, "Sum": 4,
        "DynamicQuantizeMatMul": 6, "MatMulIntegerToFloat": 6, "DynamicQuantizeLinear": 2,
    },
    "static": {
        "Attention": 2, "LayerNormalization": 4, "Gelu": 2, "Sum": 4, "MatMulIntegerToFloat": 12, "QuantizeLinear": 8,
    },
}  # fmt: skip


@pytest.mark.parametrize("level", ["extended", "all"])
@pytest.mark.parametrize("scheme", KERNEL_COUNTS)
def test_an_exported_encoder_gets_exactly_these_kernels(
    encoders: dict[str, Optimized], scheme: str, level: str, tmp_path: Path
) -> None:
    path = encoders[scheme].export(tmp_path / "out.onnx")
    assert computing(kernels(path, level)) == KERNEL_COUNTS[scheme]
    built = encoders[scheme].report.kernels
    assert {op: count for op, count in built.items() if op in COMPUTING} == KERNEL_COUNTS[scheme]


@pytest.mark.parametrize("level", ["extended", "all"])
def test_an_exported_conv_net_gets_exactly_these_kernels(conv_net: Optimized, level: str, tmp_path: Path) -> None:
    """Each conv in int8, the residual too, and batch norms and relus gone into them."""
    path = conv_net.export(tmp_path / "out.onnx")
    found = computing(kernels(path, level))
    assert found == {
        "QLinearConv": 3, "QLinearAdd": 1, "MatMulIntegerToFloat": 1, "QuantizeLinear": 2, "DequantizeLinear": 1,
    }  # fmt: skip


@pytest.mark.parametrize("scheme", ["dynamic", "static", "conv"])
def test_weights_are_int8_and_activations_uint8(
    encoders: dict[str, Optimized], conv_net: Optimized, scheme: str, tmp_path: Path
) -> None:
    result = conv_net if scheme == "conv" else encoders[scheme]
    model = onnx.load(result.export(tmp_path / "out.onnx"))
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        types = [stored[name].data_type if name in stored else None for name in node.input]
        if node.op_type in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat"):
            assert types[1] == onnx.TensorProto.INT8
        if node.op_type == "MatMulIntegerToFloat" and types[4] is not None:
            assert types[4] == onnx.TensorProto.UINT8
        if node.op_type == "QLinearConv":
            assert (types[3], types[7]) == (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
        if node.op_type == "QuantizeLinear":
            assert types[2] == onnx.TensorProto.UINT8
        assert not (node.op_type == "DequantizeLinear" and node.input[0] in stored)
    large = [t.name for t in stored.values() if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) > 48 * 32]
    assert not large, "float weights are left beside the int8 ones"


def unoptimized(result: Optimized, feeds: Mapping[str, Tensor]) -> list[Tensor]:
    """The graph of ops, by the bodies of its ops, in a session without any optimization."""
    assert isinstance(result.folded, OnnxGraph)
    return onnx_run.run(onnx_run.session(result.folded.model, level="disable"), feeds)


@pytest.mark.parametrize("scheme", ["float", "dynamic", "static"])
def test_the_engine_computes_what_the_ops_mean(encoders: dict[str, Optimized], scheme: str) -> None:
    """Against the op graph without optimizations; through Q/DQ a rounding may fall the other way."""
    result = encoders[scheme]
    for batch in (ENCODED, {"ids": tokens(3, 11, seed=5), "mask": padding(3, 11)}):
        plain = unoptimized(result, batch)
        if scheme == "float":
            assert within_tolerance(plain[0], result(**batch))
        else:
            assert sqnr(plain[0], result(**batch)) > 40
        basic = result.folded.evaluate(batch, result.folded.outputs)
        assert sqnr(plain[0], basic[0]) > 40


def test_the_conv_net_computes_what_the_ops_mean(conv_net: Optimized) -> None:
    x = images(3, seed=9)
    plain = unoptimized(conv_net, {"x": x})
    assert sqnr(plain[0], conv_net(x)) > 40
    assert cosine(seeded(ConvNet)(x), conv_net(x)) > 0.99


@pytest.mark.parametrize("scheme", ["float", "dynamic", "static"])
def test_outputs_stay_close_to_the_module(encoders: dict[str, Optimized], scheme: str) -> None:
    module, result = seeded(Encoder), encoders[scheme]
    expected, found = module(**ENCODED), result(**ENCODED)
    assert isinstance(found, Tensor) and found.shape == expected.shape
    if scheme == "float":
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    else:
        assert cosine(expected, found) > 0.999
    (agreement,) = result.report.agreement
    assert agreement.cosine == pytest.approx(cosine(expected, found), abs=1e-6)


# --- attention -----------------------------------------------------------------------------------------------------

MASKS = {
    "none": None,
    "boolean": padding()[:, None, None, :].bool(),
    "full": padding()[:, None, None, :].bool().repeat(1, 1, 7, 1),
    "float": torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(0)),
}  # fmt: skip


class Heads(nn.Module):
    """Attention between reshapes, for any number of key heads."""

    def __init__(self, kv_heads: int, causal: bool, mask: Tensor | None) -> None:
        super().__init__()
        self.kv_heads, self.causal = kv_heads, causal
        self.mask: Tensor | None
        self.register_buffer("mask", mask)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query = q.view(*q.shape[:2], 4, -1).transpose(1, 2)
        key, value = (t.view(*t.shape[:2], self.kv_heads, -1).transpose(1, 2) for t in (k, v))
        y = nn.functional.scaled_dot_product_attention(
            query, key, value, self.mask, is_causal=self.causal, enable_gqa=self.kv_heads != 4
        )  # fmt: skip
        joined: Tensor = y.transpose(1, 2).reshape(q.shape)
        return joined


@pytest.mark.parametrize(("mask", "causal"), [*((mask, False) for mask in MASKS), ("none", True)])
@pytest.mark.parametrize("kv_heads", [pytest.param(4, marks=pytest.mark.slow), 2])
def test_attention_splits_its_own_heads(kv_heads: int, causal: bool, mask: str) -> None:
    module = Heads(kv_heads, causal, MASKS[mask]).eval()
    draw = torch.Generator().manual_seed(3)
    heads = {"q": 4, "k": kv_heads, "v": kv_heads}
    inputs = {name: torch.randn(2, 7, 8 * count, generator=draw) for name, count in heads.items()}
    result = graphopt.optimize(module, example_inputs=inputs)
    (site,) = result.lowered.sites("attention")
    assert (site.attributes["heads"], site.attributes["kv_heads"]) == (4, kv_heads)
    assert "Transpose" not in result.report.kernels and "Reshape" not in result.report.kernels
    torch.testing.assert_close(result(**inputs), module(**inputs), rtol=1e-5, atol=1e-5)


class BlockHeads(nn.Module):
    """Attention within blocks of the length: the reshape that splits the heads makes a batch of blocks too."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key, value = (t.view(-1, 4, 4, 8).transpose(1, 2) for t in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(query, key, value)
        joined: Tensor = y.transpose(1, 2).reshape(q.shape)
        return joined


def test_attention_within_blocks_stays_within_them() -> None:
    inputs = {name: torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(ord(name))) for name in "qkv"}
    module = BlockHeads().eval()
    result = graphopt.optimize(module, example_inputs=inputs, dynamic_shapes={name: {} for name in inputs})
    (site,) = result.lowered.sites("attention")
    assert site.attributes["heads"] == 0
    torch.testing.assert_close(result(**inputs), module(**inputs), rtol=1e-5, atol=1e-5)


def test_a_residual_that_is_read_on_is_added_once() -> None:
    """Pre-norm: the next residual add reads the sum that the norm reads."""
    graph = build("onnx", "s = add(x[2,4,8], r[2,4,8])\nn = layer_norm(s, W[8], B[8])\ny = add(n, s)\nreturn y, s")
    lowered, _ = OnnxRuntime().lower(graph)
    assert [node.kind for node in lowered.nodes] == ["onnx.Sum", "layer_norm", "add"]
    feeds = {name: torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(ord(name))) for name in "xr"}
    expected, found = (one.evaluate(feeds, one.outputs) for one in (graph, lowered))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("layers", "masks_made"), [(1, 0), (3, 1)])
def test_a_boolean_mask_becomes_floats_once_where_several_layers_read_it(layers: int, masks_made: int) -> None:
    text = "y0 = identity(q[2,4,5,8])\n" + "\n".join(
        f"y{n + 1} = attention(y{n}, k[2,4,5,8], v[2,4,5,8], mask[2,1,5,5]:bool)" for n in range(layers)
    )
    graph = build("onnx", text)
    lowered, _ = OnnxRuntime().lower(graph)
    assert len(lowered.sites("where")) == masks_made
    generator = torch.Generator().manual_seed(0)
    feeds = {name: torch.randn(2, 4, 5, 8, generator=generator) for name in "qkv"}
    feeds["mask"] = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    expected, found = (one.evaluate(feeds, one.outputs)[0] for one in (graph, lowered))
    assert within_tolerance(expected, found, rtol=1e-6)


def test_a_decoder_is_lowered_whole() -> None:
    module, inputs = seeded(Decoder), {"ids": tokens()}
    result = graphopt.optimize(module, "quantize{scheme=dynamic}", example_inputs=inputs)
    found = {op: count for op, count in result.report.kernels.items() if op in COMPUTING}
    assert found == {
        "Attention": 1, "RMSNormalization": 2, "QuickGelu": 1,
        "DynamicQuantizeMatMul": 3, "MatMulIntegerToFloat": 5, "DynamicQuantizeLinear": 2,
    }  # fmt: skip
    assert cosine(module(**inputs), result(**inputs)) > 0.999


# --- products of activations ---------------------------------------------------------------------------------------


class Products(nn.Module):
    """Attention as two batched products; 3-D, so that it stays decomposed."""

    masked = False

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = torch.bmm(self.q(x), self.k(x).transpose(1, 2))
        scores = scores + mask if self.masked else scores
        y: Tensor = self.out(torch.bmm(scores.softmax(-1), self.v(x + 0 * mask.sum())))
        return y


class MaskedProducts(Products):
    """With a mask that is added to the scores."""

    masked = True


CLOSED = {"MatMulIntegerToFloat": 4, "QLinearMatMul": 2, "QLinearSoftmax": 1, "QuantizeLinear": 5}
OPEN = {"MatMulIntegerToFloat": 5, "QLinearMatMul": 1, "Softmax": 1, "QuantizeLinear": 6}


@pytest.mark.parametrize(
    ("kind", "ops", "kernels"),
    [
        (Products, "linear,matmul,softmax", CLOSED),
        pytest.param(Products, "linear,matmul", OPEN, marks=pytest.mark.slow),
        (MaskedProducts, "linear,matmul,softmax", OPEN),
    ],
)
def test_products_of_attention_in_integers(
    kind: type[Products], ops: str, kernels: dict[str, int], tmp_path: Path
) -> None:
    draw = torch.Generator().manual_seed(0)
    batches = [{"x": torch.randn(2, 16, 32, generator=draw), "mask": torch.randn(2, 16, 16, generator=draw)}
               for _ in range(4)]  # fmt: skip
    module = seeded(kind)
    result = graphopt.optimize(module, f"quantize{{targets=[{ops}]}}", example_inputs=batches[0],
                               calibration=batches, measure=False)  # fmt: skip

    def integer(kernels: Mapping[str, int]) -> dict[str, int]:
        counted = {*COMPUTING, "QLinearSoftmax"} - {"Sum"}
        return {op: count for op, count in kernels.items() if op in counted}

    assert integer(result.report.kernels) == kernels
    record = next(record for record in result.report.passes if record.name == "quantize")
    assert record.changed == (6 if kernels == OPEN else 7)
    (expected,), found = unoptimized(result, batches[1]), result(**batches[1])
    moved = (found - expected).abs().amax(-1) > 1e-6  # a score at the edge between two steps moves all of its row
    assert moved.sum() <= 1 and sqnr(expected, found) > 40
    assert sqnr(module(**batches[1]), found) > 25
    for portable in (False, True):
        path = result.export(tmp_path / f"{portable}.onnx", portable=portable)
        again = graphopt.optimize(path, example_inputs=batches[0], measure=False)
        assert integer(again.report.kernels) == kernels
        assert (next(iter(again(**batches[1]).values())) - found).abs().max() <= expected.abs().max() / 255


# --- promises ------------------------------------------------------------------------------------------------------


def test_fewer_kernels_than_promised_is_an_error_that_lists_the_nodes() -> None:
    graph = build("onnx", """
        q = quantize(x[n,16], S[]:values(0.1), Z[]:uint8)
        h = linear_int8(q, S, Z, W[8,16]:int8, V[8]:ones)
        y = gelu(h)""")  # fmt: skip
    assert isinstance(graph, OnnxGraph)
    graph.model.graph[1].metadata_props["graphopt.path"] = "block.up"

    class Float(OrtRunner):
        def kernels(self) -> dict[str, int]:
            return super().kernels() | {"MatMulIntegerToFloat": 0, "QLinearMatMul": 0, "QGemm": 0}

    with pytest.raises(LoweringError, match=r"1 linear_int8 were promised and onnxruntime built 0 .* block\.up"):
        OnnxRuntime().check(graph, Float(graph, None))


def test_products_are_promised_with_the_linears() -> None:
    text = "y = matmul(dequantize(a[2,3]:uint8, S[]:ones, Z[]:uint8:ones), dequantize(b[3,2]:uint8, S, Z))"
    graph = build("onnx", text)
    assert isinstance(graph, OnnxGraph)
    lowered, _ = OnnxRuntime().lower(graph)
    OnnxRuntime().check(graph, OnnxRuntime().compile(lowered))

    class Float(OrtRunner):
        def kernels(self) -> dict[str, int]:
            return {"MatMul": 1}

    with pytest.raises(LoweringError, match=r"1 matmul were promised and onnxruntime built 0 .* among MatMul"):
        OnnxRuntime().check(graph, Float(graph, None))


def test_a_computed_bias_of_a_conv_is_refused() -> None:
    graph = build("onnx", "y = conv_int8(x[1,4,6,6]:uint8, S[]:ones, Z[]:uint8, W[4,4,1,1]:int8, V[4]:ones, "
                          "T[]:ones, Z, b[4])")  # fmt: skip
    _, logs = OnnxRuntime().lower(graph)
    assert list(logs["qlinear-conv"].declined.values()) == [Decline("bias_computed")]


def test_threads_are_the_engines() -> None:
    result = graphopt.optimize(seeded(ConvNet), example_inputs=images(), threads=1)
    assert isinstance(result.runner, OrtRunner)
    assert result.runner.session.get_session_options().intra_op_num_threads == 1


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["float", "dynamic", "static"])
@pytest.mark.parametrize("portable", [False, True])
def test_an_exported_file_runs_by_itself(
    encoders: dict[str, Optimized], scheme: str, portable: bool, tmp_path: Path
) -> None:
    result = encoders[scheme]
    path = result.export(tmp_path / "out.onnx", portable=portable)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    domains = {node.domain for node in model.graph.node} | {entry.domain for entry in model.opset_import}
    assert domains <= ({""} if portable else {"", "com.microsoft"}) and not model.functions
    assert [value.name for value in model.graph.input] == ["ids", "mask"]
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (ENCODED, {"ids": tokens(1, 3), "mask": padding(1, 3)}):
        feeds = {name: tensor.numpy() for name, tensor in batch.items()}
        (found,) = session.run(None, feeds)
        expected = result(**batch)
        if portable and scheme != "float":
            assert cosine(expected, torch.from_numpy(found)) > 0.9999
        else:
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", ["float", "dynamic", "static"])
def test_a_portable_file_runs_in_the_reference_evaluator(
    encoders: dict[str, Optimized], scheme: str, tmp_path: Path
) -> None:
    path = encoders[scheme].export(tmp_path / "out.onnx", portable=True)
    (found,) = ReferenceEvaluator(onnx.load(path)).run(None, {name: t.numpy() for name, t in ENCODED.items()})
    expected = encoders[scheme](**ENCODED)
    assert cosine(expected, torch.from_numpy(found)) > 0.9999


@pytest.mark.parametrize("opset", [17, 20, 21])
@pytest.mark.parametrize("scheme", ["float", "dynamic", "static"])
def test_a_portable_file_at_an_older_opset(
    encoders: dict[str, Optimized], scheme: str, opset: int, tmp_path: Path
) -> None:
    path = encoders[scheme].export(tmp_path / "out.onnx", portable=True, opset=opset)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    assert cosine(encoders[scheme](**ENCODED), plain_run(str(path), ENCODED)[0]) > 0.9999


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize("kind", [Decoder, ConvNet])
def test_a_decoder_and_a_conv_net_at_an_older_opset(kind: type[nn.Module], opset: int, tmp_path: Path) -> None:
    """Causal grouped-query attention and RMS norms written out, and means with their axes as attributes."""
    module, inputs = seeded(kind), {"ids": tokens()} if kind is Decoder else {"x": images()}
    path = graphopt.optimize(module, example_inputs=inputs).export(tmp_path / "out.onnx", opset=opset)
    exported = onnx.load(path)
    onnx.checker.check_model(exported, full_check=True)
    assert [(entry.domain, entry.version) for entry in exported.opset_import] == [("", opset)]
    assert not {"Attention", "RMSNormalization"} & {node.op_type for node in exported.graph.node}
    others = {"ids": tokens(3, 11, seed=5)} if kind is Decoder else {"x": images(3, seed=5)}
    for feeds in (inputs, others):
        torch.testing.assert_close(plain_run(str(path), feeds)[0], module(**feeds), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("mask", "causal"), [("none", True), ("boolean", False), ("float", False)])
@pytest.mark.parametrize("kv_heads", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_attention_at_an_older_opset(kv_heads: int, causal: bool, mask: str, tmp_path: Path) -> None:
    module = Heads(kv_heads, causal, MASKS[mask]).eval()
    draw = torch.Generator().manual_seed(3)
    heads = {"q": 4, "k": kv_heads, "v": kv_heads}
    inputs = {name: torch.randn(2, 7, 8 * count, generator=draw) for name, count in heads.items()}
    path = graphopt.optimize(module, example_inputs=inputs).export(tmp_path / "out.onnx", opset=17)
    torch.testing.assert_close(plain_run(str(path), inputs)[0], module(**inputs), rtol=1e-5, atol=1e-5)


def test_what_an_opset_lacks_is_refused_by_name_and_nothing_is_written(tmp_path: Path) -> None:
    body = "s = Constant<value_ints = [2]>() [crop] y = CenterCropPad<axes = [2]>(x, s)"
    proto = model(f"g (float[n,4,3] x) => (float[n,4,2] y) {{ {body} }}", {}, opset=21)
    result = graphopt.optimize(proto)
    with pytest.raises(GraphError, match=r"CenterCropPad is not in opset 17 \(crop\)"):
        result.export(tmp_path / "out.onnx", opset=17)
    with pytest.raises(GraphError, match="cannot write opset 5"):
        result.export(tmp_path / "out.onnx", opset=5)
    assert not list(tmp_path.iterdir())


def test_integers_in_a_graph_of_an_opset_without_them_are_refused() -> None:
    graph = build("onnx", "y = conv(x[1,4,6,6], V[4,4,1,1])")
    assert isinstance(graph, OnnxGraph)
    graph.model.graph.opset_imports[""] = 9
    scale = graph.add_constant(torch.ones(()))
    for op, x in (("quantize", graph.inputs[0]), ("dequantize", graph.add_constant(torch.ones(4, 4).to(torch.int8)))):
        with pytest.raises(GraphError, match=rf"{op}.* at opset 9; it needs 10: convert the file first"):
            graph.emit(op, x, scale, axis=None)


def test_exports_are_identical_bytes(encoders: dict[str, Optimized], tmp_path: Path) -> None:
    first = encoders["static"].export(tmp_path / "a.onnx").read_bytes()
    assert encoders["static"].export(tmp_path / "b.onnx").read_bytes() == first
    again = graphopt.optimize(
        seeded(Encoder), "quantize{scheme=static}", example_inputs=ENCODED, calibration=batches()
    )
    assert again.export(tmp_path / "c.onnx").read_bytes() == first


def test_a_file_says_how_it_was_made(encoders: dict[str, Optimized], tmp_path: Path) -> None:
    path = encoders["static"].export(tmp_path / "out.onnx")
    model = onnx.load(path)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert model.producer_name == "graphopt"
    assert properties["graphopt.pipeline"] == "simplify,quantize{scheme=static},fold-int8"
    assert properties["graphopt.target"] == "onnxruntime"
    assert json.loads(properties["graphopt.versions"])["onnxruntime"] == ort.__version__
    assert len(properties["graphopt.input"]) == 64
    assert json.loads(properties["graphopt.choices"])["static-linear"] == 12
    paths = {prop.value for node in model.graph.node for prop in node.metadata_props if prop.key == "graphopt.path"}
    assert {"layers.0.attention.query", "layers.1.down", "layers.0.norm1"} <= paths
    manifest = json.loads((tmp_path / "out.onnx.json").read_text())
    assert [record["name"] for record in manifest["passes"]] == ["simplify", "quantize", "fold-int8"]
    assert manifest["passes"][1]["changed"] == 13 and manifest["kernels"]["MatMulIntegerToFloat"] == 12
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.onnx", "out.onnx.json"]


def test_a_file_tells_nothing_of_where_it_was_made(encoders: dict[str, Optimized], tmp_path: Path) -> None:
    """The exporter's stack traces hold paths of source files; the module path is in each node's name."""
    path = encoders["static"].export(tmp_path / "out.onnx")
    written = path.read_bytes()
    assert b"pkg.torch" not in written and str(Path(__file__).parent.parent).encode() not in written
    nodes = onnx.load_from_string(written).graph.node
    paths = {node.name: prop.value for node in nodes for prop in node.metadata_props if prop.key == "graphopt.path"}
    assert len(paths) > 30 and all(name.startswith(f"{path}/") for name, path in paths.items())
    assert {prop.key for node in nodes for prop in node.metadata_props} == {"graphopt.path"}
    assert len({node.name for node in nodes}) == len(nodes)


def test_weights_beside_the_file_are_found_from_elsewhere(encoders: dict[str, Optimized], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    path = encoders["float"].export(tmp_path / "there" / "out.onnx", external_data=True)
    (data,) = path.parent.glob("out.onnx.*.data")
    assert {p.name for p in path.parent.iterdir()} == {"out.onnx", data.name, "out.onnx.json"}
    assert path.stat().st_size < data.stat().st_size
    np.savez(tmp_path / "feeds.npz", ids=ENCODED["ids"].numpy(), mask=ENCODED["mask"].numpy())
    code = (
        "import numpy, onnxruntime; feeds = dict(numpy.load('../feeds.npz')); "
        "numpy.save('y.npy', onnxruntime.InferenceSession('../there/out.onnx').run(None, feeds)[0])"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "here", check=True, env=os.environ | {"PYTHONPATH": ""})
    found = torch.from_numpy(np.load(tmp_path / "here" / "y.npy"))
    torch.testing.assert_close(found, encoders["float"](**ENCODED), rtol=1e-5, atol=1e-6)
    again = graphopt.optimize(path, example_inputs=ENCODED)
    torch.testing.assert_close(next(iter(again(**ENCODED).values())), found, rtol=1e-5, atol=1e-5)
    # Over itself: the weights are read from the file that is replaced.
    again.export(path, external_data=True)
    torch.testing.assert_close(plain_run(str(path), ENCODED)[0], found, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(next(iter(again(**ENCODED).values())), found, rtol=1e-5, atol=1e-5)


def test_through_graphsurgeon_and_back(encoders: dict[str, Optimized]) -> None:
    surgical = encoders["float"].graphsurgeon()
    assert {tensor.name for tensor in surgical.inputs} == {"ids", "mask"}
    again = graphopt.optimize(surgical, "quantize{scheme=dynamic}", example_inputs=ENCODED)
    record = next(record for record in again.report.passes if record.name == "quantize")
    assert record.changed == 13 and "layers.0.attention.query" in record.eligible
    assert cosine(encoders["float"](**ENCODED), next(iter(again(**ENCODED).values()))) > 0.999


def test_an_exported_file_is_optimized_again(encoders: dict[str, Optimized], tmp_path: Path) -> None:
    """A file that is quantized already stays so, kernel by kernel."""
    path = encoders["static"].export(tmp_path / "out.onnx")
    again = graphopt.optimize(path, example_inputs=ENCODED)
    found = {op: count for op, count in again.report.kernels.items() if op in COMPUTING}
    assert found == KERNEL_COUNTS["static"]
    (y,) = again(**ENCODED).values()
    torch.testing.assert_close(y, encoders["static"](**ENCODED), rtol=1e-4, atol=1e-4)


def test_a_portable_static_file_has_the_same_int8_kernels(encoders: dict[str, Optimized], tmp_path: Path) -> None:
    """Standard operators only: the engine itself finds the int8 kernels in Q/DQ."""
    path = encoders["static"].export(tmp_path / "out.onnx", portable=True)
    for level in ("extended", "all"):
        found = computing(kernels(path, level))
        assert found["MatMulIntegerToFloat"] == 12 and "MatMul" not in found and "DequantizeLinear" not in found
    again = graphopt.optimize(path, example_inputs=ENCODED)
    assert again.report.kernels["MatMulIntegerToFloat"] == 12
    assert sqnr(encoders["static"](**ENCODED), next(iter(again(**ENCODED).values()))) > 40


# --- forms ---------------------------------------------------------------------------------------------------------

SHARED = """
    s, z = choose_qparams(x[n,72])
    q = quantize(x, s, z)
    y = linear_int8(q, s, z, W[16,72]:int8, V[16]:values(0.01,0.02))
    w = linear_int8(q, s, z, U[24,72]:int8, T[24]:values(0.02))
    return y, w"""
ALONE = "\n".join(SHARED.splitlines()[:4])
CALIBRATED = "q = quantize(x[n,72], S[]:values(0.02), Z[]:uint8)\ny = linear_int8(q, S, Z, W[16,72]:int8, V[16]:ones)"
RESIDUAL = "y = layer_norm(add(x[2,4,8], r[2,4,8]), W[8], B[8])"
TANH = "y = gelu(x[2,4,8], approximate=tanh)"


@pytest.mark.parametrize(
    ("text", "choice", "form", "kernels"),
    [
        (ALONE, linear_int8.DYNAMIC, "DynamicQuantizeMatMul", ["DynamicQuantizeMatMul"]),
        (ALONE, linear_int8.DYNAMIC, "MatMulNBits", ["MatMulNBits"]),
        (SHARED, linear_int8.DYNAMIC, "MatMulIntegerToFloat",
         ["DynamicQuantizeLinear", "MatMulIntegerToFloat", "MatMulIntegerToFloat"]),
        (SHARED, linear_int8.DYNAMIC, "MatMulNBits", ["MatMulNBits", "MatMulNBits"]),
        (CALIBRATED, linear_int8.STATIC, "MatMulIntegerToFloat",
         ["MatMulIntegerToFloat", "QuantizeLinear"]),
        (CALIBRATED, linear_int8.STATIC, "MatMulNBits", ["Clip", "MatMulNBits"]),  # the quantize's range
        (RESIDUAL, skip_layer_norm.RESIDUAL, "Sum", ["LayerNormalization", "Sum"]),
        (RESIDUAL, skip_layer_norm.RESIDUAL, "SkipLayerNormalization", ["SkipLayerNormalization"]),
        (TANH, gelu.TANH, "Gelu", ["Gelu"]),
        (TANH, gelu.TANH, "FastGelu", ["FastGelu"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("level", ["extended", "all"])
def test_the_engine_runs_the_form_that_was_chosen(
    text: str, choice: Choice, form: str, kernels: list[str], level: str, tmp_path: Path
) -> None:
    """Its own fusions neither undo a form nor make another of it."""
    target, graph = OnnxRuntime(), build("onnx", text).clone()
    if choice.forms[form] is not None:
        (log,) = rewrite(graph, [choice.only(form)]).values()
        assert log.hits == len(graph.outputs) and not log.declined
    for stage in target.rules(graph):
        rewrite(graph, [rule.rule() if isinstance(rule, Choice) else rule for rule in stage if rule is not choice])
        graph.sweep()
    assert isinstance(graph, OnnxGraph)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnx_run.session(onnx_export.deployable(graph), level=level, options=options)
    assert sorted(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node) == kernels


def test_a_dynamic_linear_alone_is_no_shared_one() -> None:
    (log,) = rewrite(build("onnx", ALONE), [linear_int8.DYNAMIC.only("MatMulIntegerToFloat")]).values()
    assert list(log.declined.values()) == [Decline("quantized_input_not_shared")]
