"""What crashes onnxruntime at load is written in another form, and what no rule reaches is loaded in a child first."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import onnx_ir
import pytest
import torch

from graphopt.backends.onnxruntime.runner import OrtRunner
from graphopt.capture import capture
from graphopt.dialects.onnx import crashing
from graphopt.dialects.onnx.export import deployable
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.errors import GraphError, LoweringError
from tests.language import assert_outputs_equal, build
from tests.models import model

PERMS = [perm for rank in (3, 4) for perm in itertools.permutations(range(rank)) if perm != tuple(range(rank))]


def transposed(perm: tuple[int, ...], product: str) -> OnnxGraph:
    """A product in 16 bits, or of what is cast from them, that reads a transpose of a value with open axes."""
    last = perm[-1]
    sizes = ",".join("8" if axis == last else "abcd"[axis] for axis in range(len(perm)))
    order = ",".join(map(str, perm))
    short = f"t = transpose(cast(x[{sizes}], dtype=float16), perm=[{order}])\n"
    text = {
        "linear": "y = cast(linear(t, W[5,8]:float16), dtype=float32)",
        "matmul": "y = cast(matmul(t, V[8,5]:float16), dtype=float32)",
        "cast": "y = linear(cast(t, dtype=float32), W[5,8])",
    }[product]
    graph = build("onnx", short + text)
    assert isinstance(graph, OnnxGraph)
    return graph


@pytest.mark.parametrize("product", ["linear", "matmul", "cast"])
@pytest.mark.parametrize("perm", [perm for perm in PERMS if crashing._moves_first(perm)], ids=str)
def test_a_transpose_of_the_first_axis_is_in_float32(perm: tuple[int, ...], product: str) -> None:
    """onnxruntime 1.31.1 dies of signal 11 where it is not."""
    graph = transposed(perm, product)
    lowered = OrtRunner(graph, None)
    assert crashing._suspect(lowered.model) is None
    feeds = {"x": torch.randn([8 if axis == perm[-1] else 2 + axis for axis in range(len(perm))])}
    torch.testing.assert_close(lowered(feeds)[0], graph.evaluate(feeds, graph.outputs)[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("perm", [perm for perm in PERMS if not crashing._moves_first(perm)][:4], ids=str)
def test_other_transposes_stay(perm: tuple[int, ...]) -> None:
    graph = transposed(perm, "linear")
    assert [node.op_type for node in deployable(graph).graph] == ["Cast", "Transpose", "MatMul", "Cast"]


@pytest.mark.parametrize("moves", [
    pytest.param("r = Identity(d)", marks=pytest.mark.slow), "r = Reshape(d, R)", "r = Transpose<perm = [1,0]>(d)",
    pytest.param("u = Unsqueeze(d, Z) r = Squeeze(u, Z)", marks=pytest.mark.slow),
    pytest.param("r = Flatten(d)", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_branch_reads_a_sum_of_what_is_dequantized(moves: str, tmp_path: Path) -> None:
    """onnxruntime 1.31.1 aborts where it reads a moved value itself; so the file is loaded in a process of its own."""
    stored = {"S": torch.tensor(0.1), "Z": torch.tensor([0]), "R": torch.tensor([8, -1]), "L": torch.tensor(0.0)}
    proto = model(
        f"""g (int8[4,8] x) => (float[] r, float[] y) {{
            d = DequantizeLinear(x, S) {moves} m = ReduceMax<keepdims = 0>(d) c = Greater(m, L)
            y = If<then_branch = t () => (float[] a) {{ a = Relu(r) }},
                   else_branch = e () => (float[] b) {{ b = Neg(r) }}>(c)
        }}""",
        {name: tensor for name, tensor in stored.items() if name in "SL" or f" {name})" in moves}, opset=17,
    )  # fmt: skip
    captured = capture(proto, "onnx", run=False)
    assert isinstance(captured.graph, OnnxGraph)
    onnx_ir.save(deployable(captured.graph), tmp_path / "out.onnx")
    code = "import onnxruntime, sys; onnxruntime.InferenceSession(sys.argv[1])"
    ran = subprocess.run([sys.executable, "-c", code, tmp_path / "out.onnx"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_float32_stays() -> None:
    graph = build("onnx", "y = linear(transpose(x[a,b,8], perm=[1,0,2]), W[5,8])")
    assert isinstance(graph, OnnxGraph)
    assert [node.op_type for node in deployable(graph).graph] == ["Transpose", "MatMul"]
    assert_outputs_equal(graph, build("onnx", "y = transpose(linear(x[a,b,8], W[5,8]), perm=[1,0,2])"))


BRANCHES = """
    g (float16[a,b,8] x, bool c) => (float16[n,m,k] y) {{
        {} y = If (c) <
            then_branch = t () => (float16[n,m,k] p) {{ {} p = MatMul (q, W) }},
            else_branch = e () => (float16[n,m,k] r) {{ r = Relu (x) }}
        >
    }}
"""
TURNED = "q = Transpose <perm = [1,0,2]> (x)"


def test_a_transpose_within_a_branch_is_in_float32() -> None:
    graph = OnnxGraph.from_model(model(BRANCHES.format("", TURNED), {"W": torch.randn(8, 8).half()}))
    assert crashing._suspect(OrtRunner(graph, None).model) is None


def test_what_no_rule_reaches_is_loaded_in_a_child_first(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = OnnxGraph.from_model(model(BRANCHES.format(TURNED, ""), {"W": torch.randn(8, 8).half()}))
    written = deployable(graph)
    suspect = crashing._suspect(written)
    assert suspect is not None and suspect.op_type == "MatMul"
    monkeypatch.setattr(crashing, "_LOADS", "import sys; assert sys.argv[1].endswith('model.onnx')")
    crashing.require_loads(written)
    monkeypatch.setattr(crashing, "_LOADS", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(GraphError, match=r"onnxruntime dies of signal 11 when it loads this model: MatMul"):
        crashing.require_loads(written)
    with pytest.raises(LoweringError, match="dies of signal 11"):
        OrtRunner(graph, None)
    plain = build("onnx", "y = relu(x[2,4])")
    assert isinstance(plain, OnnxGraph)
    crashing.require_loads(plain.model)  # no child is started for it
