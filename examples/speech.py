"""Speech: a streaming recognizer with an LSTM and a GRU, whose states are inputs and outputs of the file.

    python examples/speech.py

It is trained on sounds that are drawn here, compressed, and called chunk by chunk. An LSTM computes in int8; a GRU has
no int8 kernel, and only its weights are stored in 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from frame import Deployed, Out, Size, Summary, folder, program, show
from torch import Tensor, nn

import graphopt

SOUNDS, BANDS, CHUNK = 20, 40, 10
Batch = dict[str, Tensor]


class Recognizer(nn.Module):
    """frames (batch, time, bands) and three states (1, batch, width) -> a sound for each frame, and the next states."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.inputs = nn.Linear(BANDS, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.sounds = nn.Linear(width, SOUNDS)

    def forward(self, frames: Tensor, hidden: Tensor, cell: Tensor, state: Tensor) -> dict[str, Tensor]:
        x, (hidden, cell) = self.lstm(torch.relu(self.inputs(frames)), (hidden, cell))
        x, state = self.gru(x, state)
        return {"logits": self.sounds(x), "next_hidden": hidden, "next_cell": cell, "next_state": state}


def silent(rows: int, width: int) -> Batch:
    """The states that every recording starts from."""
    return {name: torch.zeros(1, rows, width) for name in ("hidden", "cell", "state")}


def recordings(batches: int, rows: int, time: int, width: int, seed: int) -> list[Batch]:
    """Sounds of 5 frames each in noise; a sound is known only by how its 5 frames follow each other."""
    patterns = torch.randn(SOUNDS, 5, BANDS, generator=torch.Generator().manual_seed(0))
    generator, made = torch.Generator().manual_seed(seed), []
    for _ in range(batches):
        sounds = torch.randint(0, SOUNDS, (rows, time // 5), generator=generator)
        frames = patterns[sounds].flatten(1, 2) + 2 * torch.randn(rows, time, BANDS, generator=generator)
        made.append({"frames": frames, **silent(rows, width), "labels": sounds.repeat_interleave(5, 1)})
    return made


def follow(output: Any, batch: Batch) -> Tensor:
    """The loss, of the sounds alone: states have no labels."""
    return nn.functional.cross_entropy(output["logits"].flatten(0, 1), batch["labels"].flatten())


def streamed(model: Callable[..., Any], batch: Batch, width: int) -> Tensor:
    """The logits of whole recordings, from one call for each chunk."""
    states, found = silent(len(batch["frames"]), width), []
    for chunk in torch.split(batch["frames"], CHUNK, 1):
        with torch.no_grad():
            result = model(frames=chunk, **states)
        states = {name: result[f"next_{name}"] for name in states}
        found.append(result["logits"])
    return torch.cat(found, 1)


def main(size: Size = "full", out: Out = Path("out/speech")) -> None:
    """Compress a streaming recognizer, and say what stays in float, and why."""
    out, summary = folder(out), Summary()
    full = size == "full"
    width, time = (256, 100) if full else (16, 20)
    torch.manual_seed(0)
    module = Recognizer(width).eval()
    train = recordings(40 if full else 2, 16 if full else 2, time, width, seed=1)
    test = recordings(4 if full else 1, 16 if full else 2, time, width, seed=2)

    def accuracy(model: Callable[..., Any]) -> float:
        found = torch.cat([streamed(model, batch, width).argmax(-1) for batch in test])
        return float((found == torch.cat([batch["labels"] for batch in test])).float().mean())

    live = {name: x[:1, :CHUNK] if name == "frames" else x[:, :1] for name, x in train[0].items() if name != "labels"}
    axes = {"frames": {0: "batch", 1: "time"}, **{name: {1: "batch"} for name in silent(1, width)}}
    trained = graphopt.optimize(
        module, f"finetune{{{'epochs=6' if full else 'steps=1'} lr=3e-3}}", training=train, loss=follow, measure=False,
        dynamic_shapes=axes,
    )  # fmt: skip
    small = graphopt.optimize(
        trained, "quantize", example_inputs=[live, {k: v for k, v in test[0].items() if k != "labels"}],
        calibration=train[:4],
    )  # fmt: skip
    show(small)
    path = small.export(out / "model.onnx")
    deployed = Deployed(path)
    whole = deployed(**{name: test[0][name] for name in deployed.inputs})["logits"]
    error = float((streamed(deployed, test[0], width) - whole).abs().max())
    summary["accuracy"] = f"{accuracy(trained):.1%} -> {accuracy(deployed):.1%} of frames, in chunks of {CHUNK}"
    summary["streaming"] = f"chunks differ from whole recordings by {error:.2g} in logits at most"
    summary.model(small, path, size)
    summary.show()


if __name__ == "__main__":
    program(main)
