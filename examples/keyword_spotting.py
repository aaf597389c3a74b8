"""Keyword spotting for a microcontroller: a DS-CNN in int8, in standard operators, in the smallest file.

    python examples/keyword_spotting.py

GRAPHOPT_DATA=FOLDER takes the trained network and the recorded clips of MLPerf Tiny from that folder; else a network is
trained on clips that are drawn here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from frame import Deployed, Out, Size, Summary, data, file_size, folder, program
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import graphopt

BUDGET = 64_000
"""Bytes that the device has for the model."""


def conv(
    inputs: int, outputs: int, kernel: int | tuple[int, int], *, pad: tuple[int, int, int, int] | None = None,
    stride: int = 1, groups: int = 1,
) -> nn.Sequential:  # fmt: skip
    layers: list[nn.Module] = [nn.ZeroPad2d(pad)] if pad else []
    layers += [nn.Conv2d(inputs, outputs, kernel, stride, groups=groups), nn.BatchNorm2d(outputs, eps=1e-3), nn.ReLU()]
    return nn.Sequential(*layers)


class DsCnn(nn.Module):
    """Features of one second (batch, 1, 49, 10) -> logits of 12 words (Zhang et al., 2017)."""

    def __init__(self, width: int = 64, blocks: int = 4) -> None:
        super().__init__()
        layers = [conv(1, width, (10, 4), pad=(1, 1, 4, 5), stride=2)]
        for _ in range(blocks):
            layers += [conv(width, width, 3, pad=(1, 1, 1, 1), groups=width), conv(width, width, 1)]
        self.body, self.pool, self.fc = nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), nn.Linear(width, 12)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.pool(self.body(x)).flatten(1))
        return logits


def drawn(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clips that stand in for recordings: each word has a pattern, which begins at any time, in noise."""
    patterns = torch.randn(12, 24, 10, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 12, (number,), generator=generator)
    clips = torch.randn(number, 1, 49, 10, generator=generator)
    for clip, word, start in zip(clips, words, torch.randint(0, 25, (number,), generator=generator), strict=True):
        clip[0, start : start + 24] += patterns[word]
    return clips, words


def batches(clips: Tensor, words: Tensor, size: int = 50) -> list[dict[str, Tensor]]:
    return [{"x": x, "labels": y} for x, y in zip(torch.split(clips, size), torch.split(words, size), strict=True)]


def accuracy(model: Any, clips: Tensor, words: Tensor) -> float:
    """Share of clips whose word is found."""
    with torch.no_grad():
        return float((torch.as_tensor(model(clips)).argmax(-1) == words).float().mean())


def main(size: Size = "full", out: Out = Path("out/keyword_spotting")) -> None:
    """Make the smallest file of a keyword spotter, and check it in ONNX's reference evaluator."""
    out, summary = folder(out), Summary()
    full = size == "full"
    weights, recorded = data("mlperf_tiny", "dscnn_kws_fp32.pt"), data("mlperf_tiny", "kws_val500.npz")
    model: Any = DsCnn().eval() if full else DsCnn(8, 1).eval()
    if full and weights and recorded:
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        with np.load(recorded) as file:
            clips, words = torch.from_numpy(file["x"]), torch.from_numpy(file["y"]).long()
        train, test = (clips[:250], words[:250]), (clips[250:], words[250:])
    else:
        torch.manual_seed(0)
        train, test = drawn(4000 if full else 32, seed=1), drawn(500 if full else 16, seed=2)
        epochs = "epochs=4" if full else "steps=1"
        model = graphopt.optimize(model, f"finetune{{{epochs} lr=3e-3}}", training=batches(*train), measure=False)

    small = graphopt.optimize(model, "quantize{scheme=static}", calibration=batches(*train))
    path = small.export(out / "model.onnx", portable=True, opset=21)
    stored = onnx.load(path)
    operators = sorted({node.op_type for node in stored.graph.node})
    assert {one.domain for one in stored.opset_import} == {""}, "an operator that is not standard"
    print("operators:", ", ".join(operators))

    def reference(x: Tensor) -> Any:
        (logits,) = ReferenceEvaluator(stored).run(None, {"x": x.numpy()})
        return logits

    def in_engine(x: Tensor) -> Tensor:
        (logits,) = Deployed(path)(x=x).values()
        return logits

    few = test[0][:100], test[1][:100]
    summary["accuracy"] = f"{accuracy(model, *test):.1%} -> {accuracy(in_engine, *test):.1%} in ONNX Runtime"
    summary["reference"] = (
        f"{accuracy(reference, *few):.1%} of {len(few[0])} clips in ONNX's reference evaluator, and "
        f"{accuracy(in_engine, *few):.1%} of the same in ONNX Runtime"
    )
    summary["budget"] = f"{file_size(path) / BUDGET:.0%} of {BUDGET / 1000:.0f} kB"
    summary.model(small, path, size)
    summary.show()


if __name__ == "__main__":
    program(main)
