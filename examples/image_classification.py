"""Image classification: quantization after training and aware of it, on ONNX Runtime and OpenVINO.

    python examples/image_classification.py

GRAPHOPT_DATA=FOLDER takes a trained ResNet-20 and CIFAR-10 from that folder; else the ResNet is trained on pictures
that are drawn here. MobileNetV2 is trained here in both cases.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from frame import Deployed, Out, Size, Summary, data, folder, program, sizes, speed
from torch import Tensor, nn

import graphopt

MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
Batch = dict[str, Tensor]


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.grow = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.grow:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.grow, self.grow))
        return F.relu(x + y)


class ResNet(nn.Module):
    """images (batch, 3, 32, 32) -> logits (batch, 10); 3 blocks in each stage make ResNet-20 (He et al., 2015)."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        sizes = (16, *[16] * blocks, *[32] * blocks, *[64] * blocks)
        made = [Block(a, b, 1 if a == b else 2) for a, b in pairwise(sizes)]
        self.layer1, self.layer2, self.layer3 = (nn.Sequential(*made[i * blocks : (i + 1) * blocks]) for i in range(3))
        self.linear = nn.Linear(64, 10)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(pixel_values))))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def mobilenet(full: bool) -> Any:
    """MobileNetV2 of transformers, for images of 32 x 32."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(
        image_size=32, depth_multiplier=0.5 if full else 0.1, output_stride=32, tf_padding=False,
        classifier_dropout_prob=0.0,
    )  # fmt: skip
    config.num_labels = 10
    model: Any = MobileNetV2ForImageClassification(config)
    return model.eval()


def drawn(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures that stand in for photographs: one of ten directions and widths of stripes, in any phase, in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (number,), generator=generator)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    angle, frequency = (labels % 5) * torch.pi / 5, 0.4 + 0.5 * (labels // 5)
    phase = 6.3 * torch.rand(number, generator=generator)
    along = x * angle.cos()[:, None, None] + y * angle.sin()[:, None, None]
    stripes = (along * frequency[:, None, None] + phase[:, None, None]).sin()
    return stripes[:, None] + 1.5 * torch.randn(number, 3, 32, 32, generator=generator), labels


def photographs(part: str, number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of CIFAR-10 where they are there, else pictures that are drawn."""
    file = data("cifar10", f"{part}.npz")
    if file is None:
        return drawn(number, seed)
    with np.load(file) as held:
        x, y = torch.from_numpy(held["x"][:number]), torch.from_numpy(held["y"][:number]).long()
    return ((x / 255 - MEAN) / DEVIATION).permute(0, 3, 1, 2).contiguous(), y


def batches(images: Tensor, labels: Tensor, size: int = 64) -> list[Batch]:
    return [
        {"pixel_values": x, "labels": y}
        for x, y in zip(torch.split(images, size), torch.split(labels, size), strict=True)
    ]


def accuracy(model: Callable[..., Any], test: list[Batch]) -> float:
    """Share of images whose class is found."""
    found = []
    for batch in test:
        with torch.no_grad():
            result = model(pixel_values=batch["pixel_values"])
        logits = result if isinstance(result, Tensor) else next(iter(result.values()))
        found.append(logits.argmax(-1) == batch["labels"])
    return float(torch.cat(found).float().mean())


def main(size: Size = "full", out: Out = Path("out/image_classification")) -> None:
    """Quantize two networks, with and without training, for two engines, which both add and scale in float32."""
    out, summary = folder(out), Summary()
    full = size == "full"
    torch.manual_seed(0)
    train = batches(*photographs("train10k", 10000 if full else 4, seed=1), 64 if full else 2)
    test = batches(*photographs("val", 1000 if full else 4, seed=2))
    weights = data("resnet_cifar10", "resnet20-12fca82f.th")
    resnet, epochs = ResNet() if full else ResNet(1), "epochs=3" if full else "steps=1"
    networks: dict[str, Any] = {"ResNet-20": resnet.eval(), "MobileNetV2": mobilenet(full)}
    trained = set()
    if full and weights is not None:
        trained.add("ResNet-20")
        state = torch.load(weights, map_location="cpu", weights_only=True)["state_dict"]
        resnet.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    engines = ["onnxruntime", *(["openvino"] if find_spec("openvino") else [])]
    if len(engines) == 1:
        print("OpenVINO is left out: pip install 'graphopt[openvino]'")

    for name, module in networks.items():
        before = module
        if name not in trained:
            before = graphopt.optimize(
                module, f"finetune{{{epochs} lr=1e-3}}", training=train, measure=False, verbose=full
            )
        original = accuracy(before, test)
        for engine in engines:
            for way, passes in {
                "after training": "quantize{scheme=static}",
                "aware": f"quantize{{scheme=static}},distill{{steps={40 if full else 1} lr=1e-5}}",
            }.items():
                small = graphopt.optimize(
                    before, passes, target=engine, precision="float32", calibration=train[:8],
                    training=train if "distill" in passes else None,
                )  # fmt: skip
                path = small.export(out / f"{name}-{engine}-{way.replace(' ', '-')}.onnx")
                found = accuracy(Deployed(path) if engine == "onnxruntime" else small, test)
                bytes_before = small.report.cost_before.bytes
                summary[f"{name}, {way}, {engine}"] = (
                    f"accuracy {original:.1%} -> {found:.1%}, size {sizes(bytes_before, path)}, "
                    f"speed {speed(small, size)}"
                )
    summary.show()


if __name__ == "__main__":
    program(main)
