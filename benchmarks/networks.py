"""The networks of full size that are timed, and what torch's exporter is given of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks import sentences
from benchmarks.models import SEED, Batch, gpt2, minilm, mobilenetv2, resnet50, vit
from graphopt.capture.decode import DecodeStep

SHAPES = ((1, 16), (1, 128), (8, 128), (32, 32))
"""Batch and length at which MiniLM is timed."""


@dataclass(frozen=True)
class Network:
    """A network of full size, and the batches at which it is timed, by what they are called."""

    name: str
    module: nn.Module
    shapes: dict[str, Batch]
    convolutional: bool = False
    prompt: Batch | None = None
    """Fills the cache, where what is timed is the decode step after it."""

    @property
    def options(self) -> dict[str, Any]:
        """What `graphopt.optimize` is given with the module."""
        if self.prompt is not None:
            return {"example_inputs": self.prompt, "cache": True}
        return {"example_inputs": list(self.shapes.values())}

    def traceable(self) -> tuple[nn.Module, Batch, dict[str, dict[int, Any]]]:
        """What torch's exporter is given: a module, arguments of two rows at least, and their dynamic axes."""
        if self.prompt is not None:
            two = {name: tensor.repeat(2, 1) for name, tensor in self.prompt.items()}
            step, example, named = DecodeStep.around(self.module, two)
            return step, example, {name: _dynamic(axes) for name, axes in named.items()}
        last = list(self.shapes.values())[-1]
        example = {name: torch.cat([x, x]) if len(x) == 1 else x for name, x in last.items()}
        axes = {name: _dynamic((0,) if x.is_floating_point() else (0, 1)) for name, x in example.items()}
        return self.module, example, axes


def _dynamic(axes: Iterable[int]) -> dict[int, Any]:
    return dict.fromkeys(axes, torch.export.Dim.DYNAMIC)


def _minilm_network() -> Network:
    tokens = sentences.tokenizer()
    return Network("MiniLM", minilm(), {f"{batch}x{length}": sentences.filled(tokens, batch, length)
                                        for batch, length in SHAPES})  # fmt: skip


def _vision(name: str, module: nn.Module, *, convolutional: bool = True) -> Network:
    return Network(name, module, {str(rows): pictures(rows) for rows in (1, 8)}, convolutional)


def pictures(rows: int, size: int = 224) -> Batch:
    """Seeded noise."""
    return {"pixel_values": torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(rows))}


def _prompt() -> Batch:
    return {"input_ids": torch.randint(0, 50257, (1, 128), generator=torch.Generator().manual_seed(SEED))}


def _gpt2_decode() -> Network:
    """One token after a prompt of 128."""
    module, prompt = gpt2(), _prompt()
    with torch.inference_mode():
        step, two_tokens, _ = DecodeStep.around(module, prompt)
    one = two_tokens | {
        "input_ids": two_tokens["input_ids"][:, -1:], "attention_mask": two_tokens["attention_mask"][:, :-1]
    }  # fmt: skip
    return Network("GPT-2, decode", module, {"1x1 after 128": {step.public_names[name]: x for name, x in one.items()}},
                   prompt=prompt)  # fmt: skip


NETWORKS: dict[str, Callable[[], Network]] = {
    "minilm": _minilm_network,
    "resnet50": lambda: _vision("ResNet-50", resnet50()),
    "mobilenetv2": lambda: _vision("MobileNetV2", mobilenetv2()),
    "vit": lambda: _vision("ViT-B/16", vit(), convolutional=False),
    "gpt2": lambda: Network("GPT-2, prefill", gpt2(), {"1x128": _prompt()}),
    "gpt2-decode": _gpt2_decode,
}
"""Networks of full size, by what they are called on the command line; all but MiniLM with seeded weights."""
