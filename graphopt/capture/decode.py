"""The decode step of a Hugging Face language model on plain tensors: cache in; logits and cache out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.capture.arguments import Call, Constant, as_tensor, leaves_of
from graphopt.errors import CaptureError

PAST, PRESENT = "past_key_values", "present"
NEW_TOKENS = 2
"""New tokens in the example that is traced: torch.export fixes an axis of size 1."""

IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"


class DecodeStep(nn.Module):
    """forward(input_ids, attention_mask, past_key_values_N_key, past_key_values_N_value, ...) of the wrapped model.

    Keys and values are (batch, heads, past length, head size). Returns a dict of the model's own tensors and
    present.N.key and present.N.value, each longer by the new tokens.
    """

    def __init__(
        self, model: nn.Module, inputs: Sequence[str], constants: Mapping[str, Constant] | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.constants = {name: value for name, value in (constants or {}).items() if name != "use_cache"}
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
        result = self.model(**own, **self.constants, past_key_values=cache, use_cache=True)
        if not (isinstance(result, Mapping) and is_cache(result.get(PAST))):
            raise CaptureError(f"{type(self.model).__name__} returns no {PAST}: capture it without a cache")
        tensors = {name: value for name, value in result.items() if isinstance(value, Tensor)}
        return tensors | _entries(result[PAST], PRESENT)

    @classmethod
    def around(
        cls, model: nn.Module, prompt: Any
    ) -> tuple[DecodeStep, dict[str, Tensor], dict[str, dict[int, str]]]:
        """The wrapped model, an example of its arguments that running `prompt` gives, with NEW_TOKENS new tokens, and
        their dynamic axes. Raises CaptureError, as `after_prompt`."""
        call = step_of(model, after_prompt(model, prompt))
        example = {_argument(name): tensor for name, tensor in to_trace(call.tensors).items()}
        axes = {_argument(name): named for name, named in axes_of(call.tensors).items()}
        return cls(model, list(call.tensors)), example, axes


def is_cache(value: Any) -> bool:
    """Whether a value is a key-value cache of transformers."""
    return type(value).__name__.endswith("Cache") and hasattr(value, "layers")


def has_cache(example: Any) -> bool:
    """Whether an example holds a cache, or, under the name of one, a pair of tensors for each layer."""
    return isinstance(example, Mapping) and (
        any(map(is_cache, example.values())) or isinstance(example.get(PAST), list | tuple)
    )


def has_past(inputs: Collection[str]) -> bool:
    """Whether inputs of these names are those of a decode step."""
    return f"{PAST}.0.key" in inputs


def named_leaves(name: str, value: Any) -> dict[str, Any]:
    """The leaves of an argument by name, also of a cache."""
    if is_cache(value) or (name == PAST and isinstance(value, list | tuple)):
        return dict(_past(value))
    return leaves_of(name, value)


def after_prompt(model: nn.Module, prompt: Any) -> dict[str, Any]:
    """The arguments of a step of one token after a prompt, with the cache that running the prompt gives.

    prompt: a dict with input_ids (batch, length), and at most an attention_mask of ones, so that all rows fill the
    cache to the same length. Raises CaptureError for other prompts, and for a model that returns no cache.
    """
    if not isinstance(prompt, Mapping) or IDS not in prompt:
        raise CaptureError(f"cache=True needs example_inputs: a dict with {IDS}, a prompt that fills the cache")
    for name, value in prompt.items():
        if name not in (IDS, MASK):
            raise CaptureError(
                f"cache=True takes {IDS} and {MASK} as the prompt, and no {name!r}: leave it out, or leave out "
                f"cache=True and give the arguments of one step, {PAST} among them"
            )
        if name == MASK and not bool(torch.as_tensor(value).all()):
            raise CaptureError(f"cache=True needs a prompt without padding: its {MASK} has zeros")
    ids = torch.as_tensor(prompt[IDS])
    result = model(input_ids=ids, use_cache=True)
    if not (isinstance(result, Mapping) and is_cache(result.get(PAST))):
        raise CaptureError(f"{type(model).__name__} returns no {PAST}: capture it without cache=True")
    batch, length = ids.shape
    mask = torch.ones(batch, length + 1, dtype=ids.dtype, device=ids.device)
    return {IDS: ids[:, -1:], MASK: mask, PAST: result[PAST]}


def step_of(model: nn.Module, example: Mapping[str, Any]) -> Call:
    """The call of a step whose past_key_values is a cache, or a pair of keys and values for each layer.

    Raises CaptureError where the cache is empty, not of plain keys and values, or under another name.
    """
    tensors, constants = dict[str, Tensor](), dict[str, Constant]()
    for name, value in example.items():
        if name == PAST:
            tensors |= _past(value)
        elif is_cache(value):
            raise CaptureError(f"example_inputs: {name} is a {type(value).__name__}; a cache is taken as {PAST} only")
        elif isinstance(value, Constant):
            constants[name] = value
        else:
            tensors[name] = as_tensor(value, name)
    step = DecodeStep(model, list(tensors), constants)
    return Call(tensors, constants, tuple(example), step.step, lambda other: step_of(other, example))


def to_trace(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a step with at least NEW_TOKENS new tokens after as many, since a trace fixes sizes of 1."""
    result = dict(tensors)
    past = [name for name in result if name.startswith(f"{PAST}.")]
    more = NEW_TOKENS - 1 if result[IDS].shape[1] == 1 else 0
    older = NEW_TOKENS - 1 if result[past[0]].shape[2] == 1 else 0
    if more:
        result[IDS] = result[IDS].repeat(1, NEW_TOKENS)
        if POSITIONS in result:
            result[POSITIONS] = torch.cat([result[POSITIONS], result[POSITIONS] + 1], 1)
    if older:
        result |= {name: result[name].repeat(1, 1, NEW_TOKENS, 1) for name in past}
    if MASK in result and more + older:
        result[MASK] = torch.cat([result[MASK], result[MASK][:, -1:].repeat(1, more + older)], 1)
    return result


def axes_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """The names of the dynamic axes of a step's inputs; all layers of the cache are as long."""
    axes = {IDS: {0: "batch", 1: "seq"}, POSITIONS: {0: "batch", 1: "seq"}, MASK: {0: "batch", 1: "total"}}
    axes |= {name: {0: "batch", 2: "past_sequence"} for name in tensors if name.startswith(f"{PAST}.")}
    return {name: named for name, named in axes.items() if name in tensors}


def _argument(name: str) -> str:
    return name.replace(".", "_")


def _entries(cache: Any, prefix: str) -> dict[str, Tensor]:
    """The tensors of a cache, or of pairs of keys and values, by name."""
    layers = [(layer.keys, layer.values) for layer in cache.layers] if is_cache(cache) else cache
    return {
        f"{prefix}.{number}.{name}": tensor
        for number, pair in enumerate(layers)
        for name, tensor in zip(("key", "value"), pair, strict=True)
    }


def _past(cache: Any) -> dict[str, Tensor]:
    """The tensors of a cache that a user gives, by name."""
    try:
        entries = _entries(cache, PAST)
    except (AttributeError, TypeError, ValueError):  # of what is made otherwise
        entries = {}
    if not entries or not all(isinstance(one, Tensor) and one.dim() == 4 and one.numel() for one in entries.values()):
        raise CaptureError(
            f"{PAST} is a {type(cache).__name__} without keys and values (batch, heads, length, head size) for each "
            "layer: run the model on a prompt first, which fills a DynamicCache, or pass cache=True and the prompt"
        )
    return {name: tensor.detach() for name, tensor in entries.items()}
