"""Object detection: heads at two scales, their boxes decoded and joined, and non-maximum suppression, all in one file.

    python examples/detection.py

The network is trained on pictures that are drawn here. NonMaxSuppression is put behind it with onnx-graphsurgeon, as it
is no operator of torch; then the whole file becomes int8. What decodes boxes stays in float.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F
from frame import Deployed, Out, Size, Summary, folder, program, show
from torch import Tensor, nn

import graphopt

IMAGE, CLASSES, STRIDES = 64, 3, (8, 16)
Batch = dict[str, Tensor]


def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    layers = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    return nn.Sequential(*layers)


class Detector(nn.Module):
    """images (batch, 3, 64, 64) -> boxes (batch, 80, 4) as x1, y1, x2, y2, and logits of classes (batch, 3, 80)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(block(3, width, 2), block(width, 2 * width, 2), block(2 * width, 2 * width, 1))
        self.fine, self.coarse = block(2 * width, 4 * width, 2), block(4 * width, 4 * width, 2)
        self.lateral = block(8 * width, 4 * width, 1)
        self.heads = nn.ModuleList(nn.Conv2d(4 * width, 4 + CLASSES, 1) for _ in STRIDES)
        centres, strides = [], []
        for stride in STRIDES:
            row = (torch.arange(IMAGE // stride) + 0.5) * stride
            y, x = torch.meshgrid(row, row, indexing="ij")
            centres.append(torch.stack([x, y], -1).reshape(-1, 2))
            strides.append(torch.full((len(centres[-1]), 1), float(stride)))
        self.centres, self.strides = nn.Buffer(torch.cat(centres)), nn.Buffer(torch.cat(strides))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        fine = self.fine(self.stem(images))
        coarse = self.coarse(fine)
        fine = self.lateral(torch.cat([fine, F.interpolate(coarse, scale_factor=2.0)], 1))
        found = torch.cat([head(x).flatten(2) for head, x in zip(self.heads, (fine, coarse), strict=True)], 2)
        offsets, logits = found[:, :4].transpose(1, 2), found[:, 4:]
        near, far = torch.split(
            F.softplus(offsets) * self.strides, 2, -1
        )  # distances from the centre to the box's edges
        return {"boxes": torch.cat([self.centres - near, self.centres + far], -1), "logits": logits}


def pictures(batches: int, rows: int, seed: int) -> list[Batch]:
    """One rectangle in each of the three colours, in noise: images, and the boxes by class (rows, 3, 4)."""
    generator, made = torch.Generator().manual_seed(seed), []
    for _ in range(batches):
        images = 0.3 * torch.randn(rows, 3, IMAGE, IMAGE, generator=generator)
        sizes = torch.randint(10, 28, (rows, CLASSES, 2), generator=generator)
        corners = (torch.rand(rows, CLASSES, 2, generator=generator) * (IMAGE - sizes)).long()
        boxes = torch.cat([corners, corners + sizes], -1)
        for image, of_image in zip(images, boxes.tolist(), strict=True):
            for colour, (x1, y1, x2, y2) in enumerate(of_image):
                image[colour, y1:y2, x1:x2] += 1.5
        made.append({"images": images, "boxes_label": boxes.float()})
    return made


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes (..., 4)."""
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    shared = sides.prod(-1)
    return shared / ((a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared)


def detection_loss(output: Any, batch: Batch) -> Tensor:
    """For each class: which places are inside its box, and how well the boxes at its middle fit."""
    boxes, logits, target = output["boxes"], output["logits"], batch["boxes_label"]
    middle = (target[..., :2] + target[..., 2:]) / 2
    centres = torch.cat([
        torch.stack(torch.meshgrid(*[(torch.arange(IMAGE // s) + 0.5) * s] * 2, indexing="xy"), -1).reshape(-1, 2)
        for s in STRIDES
    ])  # fmt: skip
    scale = torch.cat([torch.full(((IMAGE // s) ** 2,), float(s)) for s in STRIDES])
    near = ((centres - middle[:, :, None]).abs().amax(-1) <= 0.75 * scale).float()
    fit = 1 - overlap(boxes[:, None], target[:, :, None])
    return F.binary_cross_entropy_with_logits(logits, near) * 20 + (fit * near).sum() / near.sum()


def with_suppression(path: Path, whole: Path) -> Path:
    """Put scores and NonMaxSuppression behind boxes and logits: the file then gives boxes, scores and what is kept."""
    graph = gs.import_onnx(onnx.load(path))
    boxes, logits = (next(one for one in graph.outputs if one.name == name) for name in ("boxes", "logits"))
    scores = gs.Variable("scores", np.float32, ["batch", CLASSES, "places"])
    kept = gs.Variable("kept", np.int64, ["found", 3])
    graph.nodes.append(gs.Node("Sigmoid", "scores", inputs=[logits], outputs=[scores]))
    limits = [
        gs.Constant("most", np.array([5], np.int64)), gs.Constant("overlap", np.array([0.5], np.float32)),
        gs.Constant("score", np.array([0.4], np.float32)),
    ]  # fmt: skip
    graph.nodes.append(gs.Node("NonMaxSuppression", "suppress", inputs=[boxes, scores, *limits], outputs=[kept]))
    graph.outputs = [boxes, scores, kept]
    onnx.save(gs.export_onnx(graph.cleanup().toposort()), whole)
    return whole


def found(model: Deployed, batches: list[Batch]) -> tuple[float, float]:
    """Share of the rectangles that a kept box of their class covers by half, and kept boxes by rectangle."""
    right = kept = total = 0
    for batch in batches:
        result = model(**batch)
        total += len(batch["images"]) * CLASSES
        kept += len(result["kept"])
        hits = {
            (image, label) for image, label, place in result["kept"].tolist()
            if overlap(result["boxes"][image, place], batch["boxes_label"][image, label]) > 0.5
        }  # fmt: skip
        right += len(hits)
    return right / total, kept / total


def main(size: Size = "full", out: Out = Path("out/detection")) -> None:
    """Make a detector with its decoding and suppression int8, and say what stays in float."""
    out, summary = folder(out), Summary()
    full = size == "full"
    torch.manual_seed(0)
    module = Detector(32 if full else 4).eval()
    rows = 16 if full else 2
    train, test = pictures(100 if full else 1, rows, seed=1), pictures(8 if full else 1, rows, seed=2)
    images = [{"images": batch["images"]} for batch in train[:8]]
    steps = "epochs=3" if full else "steps=1"
    trained = graphopt.optimize(
        module, f"finetune{{{steps} lr=3e-3}}", training=train, loss=detection_loss, example_inputs=images[0],
        measure=False,
    )  # fmt: skip
    whole = with_suppression(trained.export(out / "heads.onnx", portable=True), out / "detector.onnx")

    small = graphopt.optimize(whole, "quantize{scheme=static}", example_inputs=images[0], calibration=images)
    show(small)
    path = small.export(out / "model.onnx")
    before, after = found(Deployed(whole), test), found(Deployed(path), test)
    summary["accuracy"] = f"{before[0]:.1%} -> {after[0]:.1%} of rectangles found"
    summary["boxes"] = f"{before[1]:.2f} -> {after[1]:.2f} kept for each rectangle"
    summary.model(small, path, size)
    summary.show()


if __name__ == "__main__":
    program(main)
