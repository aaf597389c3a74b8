"""A program that trains a small network in several passes, says each step, and writes an ONNX file.

python trained_once.py small.onnx [folder for checkpoints]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import graphopt
from graphopt.pipeline.instruments import Instrument
from tests.training.networks import Noisy, accuracy_of, dropping, shuffled

EVERY = "checkpoint_minutes=0.0000001"
PASSES = (
    f"finetune{{epochs=10 lr=0.02 {EVERY}}},prune{{neurons=0.5}},"
    f"distill{{epochs=10 alpha=0.5 optimizer=sgd accumulate=2 lr=0.05 evaluate_every=3 {EVERY}}},"
    f"quantize{{scheme=dynamic}},finetune{{epochs=4 lr=0.001 {EVERY}}}"
)
STEPS = 60 + 30 + 24


class Aloud(Instrument):
    def trained(self, line: Mapping[str, Any]) -> None:
        if "loss" in line:
            print(line["step"], flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = sys.argv[2] if len(sys.argv) > 2 else None
    small = graphopt.optimize(
        dropping(), PASSES, training=shuffled(4, Noisy()), evaluate=accuracy_of, checkpoint=folder,
        instruments=[Aloud()], measure=False,
    )  # fmt: skip
    small.export(Path(sys.argv[1]))
