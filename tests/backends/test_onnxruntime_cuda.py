"""Target onnxruntime-cuda without a GPU: what a file holds, its numbers on the CPU, and what its rules refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.backends.onnxruntime_cuda import CUDA, OnnxRuntimeCuda, OrtCudaRunner, faults
from graphopt.dialects.onnx import export as onnx_export
from graphopt.dialects.onnx import run as onnx_run
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.errors import LoweringError, UsageError
from graphopt.ir.decline import Decline
from graphopt.numerics.metrics import sqnr
from graphopt.passes import Cast, Quantize
from tests.language import build, declined, outputs, run

X = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0))
AXES = {"x": {0: "batch", 1: "length"}}


class Block(nn.Module):
    """Causal attention, its keys shared in groups or not, and a feed-forward layer over x (batch, length, 128)."""

    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(128, 128), nn.Linear(128, 128)
        self.key, self.value = (nn.Linear(128, 32 * kv_heads) for _ in range(2))
        self.up, self.down, self.first, self.last = (
            nn.Linear(128, 256), nn.Linear(256, 128), nn.LayerNorm(128), nn.LayerNorm(128)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        split = [f(x).unflatten(-1, (-1, 32)).transpose(1, 2) for f in (self.query, self.key, self.value)]
        query, key, value = split
        grouped = query.shape[1] != key.shape[1]
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        y = y.transpose(1, 2).flatten(2)
        x = self.first(x + self.out(y))
        return self.last(x + self.down(F.gelu(self.up(x)))) + 1  # type: ignore[no-any-return]


def optimized(kv_heads: int, passes: str) -> tuple[Block, Any]:
    torch.manual_seed(kv_heads)
    module = Block(kv_heads).eval()
    target = "onnxruntime-cuda"
    return module, graphopt.optimize(module, passes, target=target, example_inputs=X, dynamic_shapes=AXES)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(
    ("passes", "packed", "least"),
    [
        ("", 0, 100),
        ("cast{dtype=float16}", 0, 60),
        ("cast{dtype=bfloat16}", 0, 38),
        ("quantize{scheme=weight-only,bits=8}", 6, 45),
        ("quantize{scheme=weight-only,bits=4,symmetric=false}", 6, 20),
        ("quantize{scheme=weight-only,bits=4},cast{dtype=float16}", 6, 20),
        ("quantize{scheme=weight-only,bits=8},cast{dtype=bfloat16}", 6, 36),
    ],
)
def test_a_block_end_to_end(kv_heads: int, passes: str, packed: int, least: float, tmp_path: Path) -> None:
    """Fused attention and norms, numbers as the ops', at other shapes too, in a file that loads."""
    module, small = optimized(kv_heads, passes)
    kernels = small.report.kernels
    attention = "MultiHeadAttention" if kv_heads == 4 else "GroupQueryAttention"
    assert kernels[attention] == 1 and kernels["SkipLayerNormalization"] == 2
    assert kernels.get("MatMulNBits", 0) == packed
    assert not {"Attention", "LayerNormalization", "DequantizeLinear"} & set(kernels)
    x = torch.randn(1, 9, 128, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert sqnr(module(x), small(x)) > least
    small.export(tmp_path / "small.onnx")
    weights = [one for one in onnx.load(tmp_path / "small.onnx").graph.initializer if len(one.dims) == 2]
    stored = {one.data_type for one in weights}
    if "float16" in passes and not packed:
        assert stored <= {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}


def test_bfloat16_on_the_cpu_rounds_as_a_gpu_does() -> None:
    """Each result is rounded, and nothing within an operator: as torch has it."""
    graph = build("onnx", "y = relu(linear(x[3,64], W[16,64]))")
    weight = graph.sites("linear")[0].weight
    assert weight is not None
    run(Cast(dtype="bfloat16"), graph)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    (found,) = graph.evaluate({"x": x}, graph.outputs)
    wanted = F.relu(F.linear(x.bfloat16().float(), weight.bfloat16().float())).bfloat16().float()
    assert torch.equal(found, found.bfloat16().float())
    torch.testing.assert_close(found, wanted, rtol=2**-8, atol=1e-6)  # one step, where the order of sums decides


def test_a_norm_in_float32_is_in_16_bits_as_its_kernel_sums_in_float32() -> None:
    _, small = optimized(4, "cast{dtype=float16}")
    kinds = [node.kind for node in small.lowered.nodes]
    assert kinds.count("com.microsoft.SkipLayerNormalization") == 2
    casts = [node for node in small.lowered.nodes if node.kind == "cast"]
    assert len(casts) == 2  # of the model's input, and of its output


def test_attention_that_no_contrib_kernel_takes_stays_whole() -> None:
    graph = build("onnx", "y = attention(q[2,3,128], k[2,3,64], v[2,3,64], heads=4, kv_heads=2)")
    lowered, logs = OnnxRuntimeCuda().lower(graph)
    assert [node.kind for node in lowered.nodes] == ["attention"]
    assert list(logs["attention"].declined.values()) == [Decline("attention_not_causal")]


def test_a_sum_that_others_read_is_not_fused_away() -> None:
    graph = build("onnx", "s = add(x[2,3,8], r[2,3,8])\ny = add(layer_norm(s, g[8], b[8]), s)")
    lowered, logs = OnnxRuntimeCuda().lower(graph)
    assert logs["residual-norm"].hits == 0 and lowered.text() == graph.text()
    torch.testing.assert_close(outputs(lowered), outputs(graph), rtol=1e-5, atol=1e-5)


def test_int8_activations_have_no_kernel() -> None:
    graph = build("onnx", "y = linear(x[2,16], W[4,16])")
    context = run(Quantize(scheme="dynamic"), graph, target=OnnxRuntimeCuda())
    assert declined(context) == ["no_kernel"]
    with pytest.raises(UsageError, match="leave out cpu=avx2"):
        OnnxRuntimeCuda(cpu="avx2")


def test_rules_name_what_the_provider_would_run_slowly() -> None:
    graph = build("onnx", "y = linear(x[2,16], W[4,16])")
    run(Quantize(scheme="weight-only"), graph)
    assert isinstance(graph, OnnxGraph)
    runner = OrtCudaRunner(graph, None, (onnx_run.CPU,))
    with pytest.raises(LoweringError, match="1 weight-only linear were promised and the file has 0 MatMulNBits"):
        OnnxRuntimeCuda().check(graph, runner)
    (fault,) = faults(onnx_export.deployable(graph))
    assert fault.endswith("dequantizes a stored weight at each run")
    lowered, _ = OnnxRuntimeCuda().lower(graph)
    OnnxRuntimeCuda().check(graph, OnnxRuntimeCuda(providers=[onnx_run.CPU]).compile(lowered))


def test_without_the_provider_it_says_so_and_times_nothing() -> None:
    backend = OnnxRuntimeCuda(providers=["CPUExecutionProvider"])
    assert not backend.runs and not backend.times() and backend.chooser([]) is None
    assert "never run on a GPU" in backend.notes()[0]
    assert OnnxRuntimeCuda(providers=[CUDA, "CPUExecutionProvider"]).times()


@pytest.mark.skipif(CUDA not in ort.get_available_providers(), reason="this onnxruntime has no CUDA provider")
def test_the_provider_loads_and_agrees() -> None:
    module, small = optimized(4, "cast{dtype=float16}")
    with torch.no_grad():
        assert np.isfinite(float(sqnr(module(X), small(X)))) and sqnr(module(X), small(X)) > 50
