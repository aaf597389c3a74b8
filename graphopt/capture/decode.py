"""The decode step of a Hugging Face language model as a module of plain tensors: cache in; logits and cache out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import CaptureError

PAST, PRESENT = "past_key_values", "present"
NEW_TOKENS = 2
"""New tokens in the example that is traced: torch.export fixes an axis of size 1."""


class DecodeStep(nn.Module):
    """forward(input_ids, attention_mask, past_key_values_N_key, past_key_values_N_value, ...) of the wrapped model.

    Keys and values are (batch, heads, past length, head size). Returns a dict of the model's own tensors and
    present.N.key and present.N.value, each longer by the new tokens.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.public_names = {_argument(name): name for name in inputs}
        """The names of the captured graph's inputs, by argument name, which cannot have dots."""

        def forward(**inputs: Tensor) -> dict[str, Tensor]:
            return self.step({self.public_names[name]: value for name, value in inputs.items()})

        # The arguments depend on the number of layers, and torch.export reads them from the signature.
        parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in self.public_names]
        forward.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward

    def step(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One decode step on inputs by their public names."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in range(sum(name.endswith(".key") for name in inputs)):
            cache.update(inputs[f"{PAST}.{layer}.key"], inputs[f"{PAST}.{layer}.value"], layer)
        own = {name: value for name, value in inputs.items() if not name.startswith(PAST)}
        result = self.model(**own, past_key_values=cache, use_cache=True)
        tensors = {name: value for name, value in result.items() if isinstance(value, Tensor)}
        return tensors | _entries(result[PAST], PRESENT)

    @classmethod
    def around(
        cls, model: nn.Module, prompt: Any
    ) -> tuple[DecodeStep, dict[str, Tensor], dict[str, dict[int, str]]]:
        """The wrapped model, an example of its arguments that running `prompt` gives, and their dynamic axes.

        prompt: a dict with input_ids (batch, length), and at most an attention_mask of ones, so that all rows fill the
        cache to the same length. Raises CaptureError for other prompts, and for a model that returns no cache.
        """
        if not isinstance(prompt, Mapping) or "input_ids" not in prompt:
            raise CaptureError("cache=True needs example_inputs: a dict with input_ids, a prompt that fills the cache")
        for name, value in prompt.items():
            if name not in ("input_ids", "attention_mask"):
                raise CaptureError(f"cache=True takes input_ids and attention_mask as the prompt, and no {name!r}")
            if name == "attention_mask" and not bool(torch.as_tensor(value).all()):
                raise CaptureError("cache=True needs a prompt without padding: its attention_mask has zeros")
        ids = torch.as_tensor(prompt["input_ids"])
        result = model(input_ids=ids, use_cache=True)
        if not (isinstance(result, Mapping) and PAST in result and hasattr(result[PAST], "layers")):
            raise CaptureError(f"{type(model).__name__} returns no {PAST}: capture it without cache=True")
        past = _entries(result[PAST], PAST)
        batch, length = ids.shape
        example = {
            "input_ids": ids[:, -1:].repeat(1, NEW_TOKENS),
            "attention_mask": torch.ones(batch, length + NEW_TOKENS, dtype=ids.dtype),
            **past,
        }
        axes = {"input_ids": {0: "batch", 1: "seq"}, "attention_mask": {0: "batch", 1: "total"}}
        axes |= {name: {0: "batch", 2: "past"} for name in past}
        by_argument = {_argument(name): tensor for name, tensor in example.items()}
        return cls(model, list(example)), by_argument, {_argument(name): named for name, named in axes.items()}

    @staticmethod
    def of_one_token(example: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The example with one new token: what a decoder runs, and so what is timed."""
        ids, mask = example["input_ids"], example["attention_mask"]
        return {**example, "input_ids": ids[:, :1], "attention_mask": mask[:, : 1 - NEW_TOKENS]}


def _argument(name: str) -> str:
    return name.replace(".", "_")


def _entries(cache: Any, prefix: str) -> dict[str, Tensor]:
    """The tensors of a cache, by name."""
    return {
        f"{prefix}.{number}.{name}": tensor
        for number, layer in enumerate(cache.layers)
        for name, tensor in (("key", layer.keys), ("value", layer.values))
    }
