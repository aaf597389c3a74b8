"""The main job on real weights: all-MiniLM-L6-v2, as a module and as every exporter writes it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.cli.demo import SENTENCES, embed, load
from graphopt.numerics.metrics import within_tolerance
from graphopt.result import Optimized

pytestmark = pytest.mark.slow

KERNELS = {
    "Attention": 6, "DynamicQuantizeMatMul": 19, "MatMulIntegerToFloat": 18, "DynamicQuantizeLinear": 6,
    "LayerNormalization": 13, "Sum": 12, "Gelu": 6, "Tanh": 1,
}  # fmt: skip
EXPORTERS = (("torchscript", 17), ("dynamo", 18), ("dynamo", 20), ("dynamo", 23))


@pytest.fixture(scope="module")
def minilm() -> tuple[nn.Module, dict[str, Tensor]]:
    module, tokenizer = load()
    return module, dict(tokenizer(list(SENTENCES[:8]), padding=True, return_tensors="pt"))


class Outputs(nn.Module):
    """With a tuple for a result, which the TorchScript exporter needs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        inputs = {"input_ids": input_ids, "token_type_ids": token_type_ids, "attention_mask": attention_mask}
        result = self.module(**inputs)
        return result.last_hidden_state, result.pooler_output


@pytest.fixture(scope="module")
def exported(minilm: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    module, batch = minilm
    folder = tmp_path_factory.mktemp("minilm")
    axes = {name: {0: "batch", 1: "seq"} for name in batch}
    paths = {key: folder / f"{key[0]}{key[1]}.onnx" for key in EXPORTERS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for (exporter, opset), path in paths.items():
            module.eval()  # the TorchScript exporter leaves it in training mode
            arguments = tuple(batch[name] for name in ("input_ids", "token_type_ids", "attention_mask"))
            names = ["input_ids", "token_type_ids", "attention_mask"]
            shapes: Any = {"dynamic_axes": axes} if exporter == "torchscript" else {"dynamic_shapes": axes}
            torch.onnx.export(
                Outputs(module).eval(), arguments, path, input_names=names, output_names=["states", "pooled"],
                opset_version=opset, dynamo=exporter == "dynamo", **shapes,
            )  # fmt: skip
    return paths


@pytest.mark.parametrize("exporter", EXPORTERS, ids=str)
def test_every_export_is_raised_and_lowered_alike(exporter: tuple[str, int], minilm: Any, exported: Any) -> None:
    module, batch = minilm
    float_form = graphopt.optimize(exported[exporter], example_inputs=batch)
    assert float_form.report.ops_before["attention"] == 6
    with torch.no_grad():
        states = module(**batch).last_hidden_state
    assert within_tolerance(states, float_form(**batch)["states"], rtol=1e-5)
    small = graphopt.optimize(exported[exporter], "quantize{scheme=dynamic}", example_inputs=batch)
    assert {kernel: small.report.kernels.get(kernel) for kernel in KERNELS} == KERNELS


@pytest.mark.parametrize("target", ["onnxruntime", "fbgemm"])
def test_embeddings_stay_close(target: str, minilm: Any) -> None:
    module, batch = minilm
    small: Optimized = graphopt.optimize(module, "quantize{scheme=dynamic}", target=target, example_inputs=batch)
    with torch.no_grad():
        exact, ours = (
            embed(run(**batch).last_hidden_state, batch["attention_mask"]) for run in (module, small)
        )
    assert torch.cosine_similarity(exact, ours).mean() >= 0.99
    assert [record.changed for record in small.report.passes if record.name == "quantize"] == [37]
