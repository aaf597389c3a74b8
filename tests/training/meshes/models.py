"""Small models with blocks, compressed and trained on a mesh, or in one process: what each leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphopt

Trained = tuple[list[float], dict[str, list[float]]]
"""The losses of the steps, and the weights by name."""

PASSES = {
    "neurons": "prune{neurons=0.5},finetune{OPTIONS}",
    "cut": "prune{amount=0.5},low-rank{energy=0.6},finetune{OPTIONS}",
    "sparse": "sparsify{pattern=2:4},distill{OPTIONS}",
    "hidden": "prune{neurons=0.5},distill{hidden=0.5 OPTIONS}",
    "qat": "quantize{scheme=static},finetune{learn_scales=true OPTIONS}",
    "dynamic": "quantize{scheme=dynamic},finetune{OPTIONS}",
}
"""Pipelines; OPTIONS are those of the training."""


def model(kind: str) -> nn.Module:
    """A seeded BERT, a Llama with grouped queries and tied embeddings, or a ResNet."""
    import transformers

    hf: Any = transformers
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 50}
    if kind == "bert":
        config = hf.BertConfig(
            **sizes, num_attention_heads=4, max_position_embeddings=16, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        found: nn.Module = hf.BertForSequenceClassification(config).eval()
        return found
    if kind == "llama":
        config = hf.LlamaConfig(
            **sizes, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=16,
            tie_word_embeddings=True,
        )  # fmt: skip
        found = hf.LlamaForCausalLM(config).eval()
        return found
    found = hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], num_labels=3)
    ).eval()
    return found


def batches(kind: str, count: int = 8, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """Batches with labels; some rows of tokens are padded."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        if kind == "resnet":
            images = torch.randn(4, 3, 16, 16, generator=draw).to(dtype)
            found.append({"pixel_values": images, "labels": torch.randint(0, 3, (4,), generator=draw)})
            continue
        mask = torch.ones(4, 7, dtype=torch.int64)
        mask[1, 4:] = 0
        batch = {"input_ids": torch.randint(0, 50, (4, 7), generator=draw), "attention_mask": mask}
        found.append(batch | ({"labels": torch.randint(0, 2, (4,), generator=draw)} if kind == "bert" else {}))
    return found


def trained(
    kind: str, how: str, mesh: str | None, accumulate: int, *, optimizer: str = "sgd", steps: int = 20,
    dtype: torch.dtype = torch.float64, checkpoint: Path | None = None, loss: Any = None,
) -> Trained:  # fmt: skip
    """Compress a model, and train it."""
    data = batches(kind, dtype=dtype)
    inputs = {name: one for name, one in data[0].items() if name != "labels"}
    rate = 0.05 if optimizer == "sgd" else 1e-3
    options = f"steps={steps} lr={rate} optimizer={optimizer} accumulate={accumulate}"
    options += " freeze=[batch_norm]" if kind == "resnet" else ""
    small = graphopt.optimize(
        model(kind).to(dtype), PASSES[how].replace("OPTIONS", options), target="torch-cpu", training=data,
        calibration=data[:3], example_inputs=inputs, measure=False, mesh=mesh, checkpoint=checkpoint, loss=loss,
        agree=False,
    )  # fmt: skip
    record = next(one for one in small.report.passes if one.training)
    weights = {
        name: one.double().flatten().tolist() for name, one in small.transformed.constants() if one.is_floating_point()
    }
    return [line["loss"] for line in record.training], weights


def several(cases: list[tuple[Any, ...]], **options: Any) -> list[Trained]:
    """One training after the other, in the same processes."""
    return [trained(*case, **options) for case in cases]
