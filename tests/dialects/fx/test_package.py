"""AOTInductor packages: what inductor makes of a graph, and that plain PyTorch runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graphopt
from graphopt import UsageError
from graphopt.dialects.fx.graph import FxGraph
from graphopt.dialects.fx.package import KernelCounts, promises
from graphopt.dialects.fx.spellings import quantized_decomposed
from graphopt.errors import GraphError, LoweringError
from graphopt.ir.qdq.integer_forms import unfold
from tests import models

PLAIN = """
import sys, torch
from safetensors.torch import load_file, save_file
model = torch._inductor.aoti_load_package(sys.argv[1])
for given in sys.argv[2:]:
    found = {name: one.contiguous() for name, one in model(**load_file(given)).items() if name != "kind"}
    save_file(found, given + ".out")
assert not [name for name in sys.modules if name.split(".")[0] in ("graphopt", "transformers")]
"""
ARCHIVE = """
import sys, torch, graphopt.backends.torch_cpu
from safetensors.torch import load_file, save_file
model = torch.export.load(sys.argv[1]).module()
for given in sys.argv[2:]:
    found = {name: one.contiguous() for name, one in model(*load_file(given).values()).items() if name != "kind"}
    save_file(found, given + ".out")
"""


class Layers(nn.Module):
    """x (batch, length, 16) -> {"y": (batch, length, 16), "mean": (batch, 16), "kind": a number}."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 32), nn.Linear(32, 16, bias=False), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.norm(x + self.down(F.gelu(self.up(x))))
        return {"y": y, "mean": y.mean(1), "kind": 3}


def run_apart(script: str, package: Path, batches: list[dict[str, Tensor]], folder: Path) -> list[dict[str, Tensor]]:
    """What a script makes of batches in a process of its own."""
    files = [folder / f"{number}.safetensors" for number in range(len(batches))]
    for file, batch in zip(files, batches, strict=True):
        save_file(batch, str(file))
    done = subprocess.run([sys.executable, "-c", script, package, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [load_file(f"{file}.out") for file in files]


def assert_near(found: dict[str, Tensor], expected: dict[str, Any], rtol: float) -> None:
    for name, tensor in found.items():
        reference = expected[name].detach()
        assert (tensor - reference).abs().max() <= rtol * reference.abs().max(), name


def x(batch: int, length: int = 5) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(batch))}


@pytest.mark.slow
def test_a_package_runs_in_plain_pytorch(tmp_path: Path) -> None:
    module = models.seeded(Layers)
    shapes = {"x": {0: "batch", 1: "length"}}
    small = graphopt.optimize(
        module, "quantize", target="fbgemm", example_inputs=x(2), dynamic_shapes=shapes, calibration=[x(8)]
    )
    path = small.export(tmp_path / "model.pt2", aot=True)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["model.pt2", "model.pt2.json"]
    batches = [x(2), x(1, 1), x(7, 3)]
    for batch, found in zip(batches, run_apart(PLAIN, path, batches, tmp_path), strict=True):
        assert found.keys() == {"y", "mean"}
        assert_near(found, small(**batch), rtol=0.02)  # one step of integers
        assert_near(found, module(**batch), rtol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_a_package_of_bert_takes_any_batch_and_length(scheme: str, tmp_path: Path) -> None:
    def tokens(batch: int, length: int) -> dict[str, Tensor]:
        return {"input_ids": models.tokens(batch, length), "attention_mask": models.padding(batch, length)}

    small = graphopt.optimize(
        models.bert(), f"quantize{{scheme={scheme}}}", target="fbgemm", example_inputs=tokens(2, 7),
        calibration=[tokens(2, 7)] if scheme == "static" else None,
    )  # fmt: skip
    path = small.export(tmp_path / "bert.pt2", aot=True)
    batches = [tokens(2, 7), tokens(1, 4), tokens(3, 1), tokens(4, 9)]
    for batch, found in zip(batches, run_apart(PLAIN, path, batches, tmp_path), strict=True):
        assert found.keys() == {"last_hidden_state", "pooler_output"}
        assert_near(found, small(**batch), rtol=0.03)


@pytest.mark.slow
def test_a_package_of_convs_has_int8_convs(tmp_path: Path) -> None:
    net = models.seeded(models.ConvNet)
    program = torch.export.export(net, (models.images(),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    graph = FxGraph.from_program(program, output_names=["y"])
    sites = graph.sites("conv", "linear")
    for site in sites:
        quantized(graph, site)
    assert len(promises(graph)) == 4
    counts = graph.package(tmp_path / "net.pt2", {"x": models.images()}, {"graphopt.pipeline": "by hand"})
    assert sum(number for name, number in counts.items() if name.startswith("onednn.qconv")) == 3
    model = torch._inductor.aoti_load_package(str(tmp_path / "net.pt2"))
    assert model.get_metadata()["graphopt.pipeline"] == "by hand"
    for rows in (1, 2, 5):
        (found,) = model(x=models.images(rows))
        (expected,) = graph.evaluate({"x": models.images(rows)}, graph.outputs)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def quantized(graph: FxGraph, site: Any) -> None:
    """Quantize and dequantize what a site reads: x within +-4, the weight by its largest entry in each row."""
    scale, zero = graph.add_constant(torch.tensor(8 / 255)), graph.add_constant(torch.tensor(128, dtype=torch.uint8))
    steps = graph.emit("quantize", site.input, scale, zero, at=site)
    top = site.weight.flatten(1).abs().amax(1) / 127
    integers = (site.weight / top.reshape([-1] + [1] * (site.weight.dim() - 1))).round().to(torch.int8)
    weight = graph.emit("dequantize", graph.add_constant(integers), graph.add_constant(top), axis=0, at=site)
    floats = graph.emit("dequantize", steps, scale, zero, at=site)
    graph.replace(site, graph.emit(site.kind, floats, weight, site.bias, at=site, **site.attributes))


def test_an_archive_returns_what_the_model_does(tmp_path: Path) -> None:
    module = models.seeded(Layers)
    small = graphopt.optimize(
        module, "quantize{scheme=dynamic}", target="fbgemm", example_inputs=x(2),
        dynamic_shapes={"x": {0: "batch", 1: "length"}},
    )  # fmt: skip
    path = small.export(tmp_path / "model.pt2")
    batches = [x(2), x(3, 1)]
    for batch, found in zip(batches, run_apart(ARCHIVE, path, batches, tmp_path), strict=True):
        assert_near(found, small(**batch), rtol=1e-5)
    again = FxGraph.load(path)
    assert again.returns == small.lowered.returns and set(again.returns) == {"y", "mean", "kind"}  # type: ignore[attr-defined]


def test_no_compiler_is_said_and_the_archive_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    small = graphopt.optimize(models.seeded(Layers), target="fbgemm", example_inputs=x(2))
    with pytest.raises(LoweringError, match=r"no compiler here: install g\+\+ .* or export without aot=True"):
        small.export(tmp_path / "model.pt2", aot=True)
    assert list(tmp_path.iterdir()) == []
    assert small.export(tmp_path / "model.pt2").is_file()


def test_what_a_package_is_not_for() -> None:
    small = graphopt.optimize(models.seeded(Layers), target="fbgemm", example_inputs=x(2))
    with pytest.raises(UsageError, match="opset, portable and external_data are for ONNX files"):
        small.export("model.pt2", aot=True, opset=20)
    with pytest.raises(GraphError, match=r"ends in \.pt2"):
        small.export("model.zip", aot=True)
    onnx = graphopt.optimize(models.seeded(models.ConvNet), example_inputs=models.images())
    with pytest.raises(GraphError, match="aot=True compiles for PyTorch, and a graph of the onnx dialect"):
        onnx.export("model.pt2", aot=True)
    with pytest.raises(GraphError, match="no module: use a target of PyTorch"):
        _ = onnx.module


def test_the_kernels_names_what_stayed_float() -> None:
    graph = torch.fx.Graph()
    weight = graph.placeholder("w")
    target = quantized_decomposed().dequantize_per_channel.default
    graph.call_function(target, (weight,)).meta["nn_module_stack"] = {"a": ("L['self'].encoder.up", nn.Linear)}
    kernels = KernelCounts()
    kernels(graph)
    with pytest.raises(LoweringError, match=r"2 int8 .* promised and inductor made 0 .*; in float: encoder\.up\."):
        kernels.require({"encoder.up": "linear", "encoder.down": "linear"})
    kernels.counts["onednn.qlinear_pointwise.default"] = 2
    kernels.require({"encoder.up": "linear", "encoder.down": "linear"})


def test_promised_is_what_reads_integers() -> None:
    small = graphopt.optimize(
        models.seeded(Layers), "quantize{scheme=dynamic ignore=down}", target="fbgemm", example_inputs=x(2)
    )
    graph = small.folded.clone()
    unfold(graph)
    assert [name.split()[0] for name in promises(graph)] == ["up"]
