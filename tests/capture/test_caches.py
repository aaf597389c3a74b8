"""Decoders with a key-value cache: given as a cache or as pairs of tensors, and calibrated with whole prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DynamicCache

import graphopt
from graphopt.capture.sources import Captured, capture
from graphopt.errors import CaptureError, UsageError
from graphopt.ir.cost import Cost, sizes
from graphopt.pipeline.prompts import STEPS, in_steps
from tests.models import gpt2, tokens


def step(length: int = 6, new: int = 1, batch: int = 2) -> dict[str, Any]:
    """The arguments of a decode step after a prompt, with a cache of its own."""
    with torch.no_grad():
        past = gpt2()(tokens(batch, length), use_cache=True).past_key_values
    mask = torch.ones(batch, length + new, dtype=torch.int64)
    return {"input_ids": tokens(batch, new, seed=1), "attention_mask": mask, "past_key_values": past}


def pairs(cache: Any) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple((layer.keys, layer.values) for layer in cache.layers)


@pytest.fixture(scope="module")
def captured() -> Captured:
    return capture(gpt2(), "onnx", example_inputs={"input_ids": tokens(2, 6)}, cache=True)


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(step(), id="a token"),
        pytest.param(step(1), id="after a token", marks=pytest.mark.slow),
        pytest.param(step(4, 3, 1), id="three tokens", marks=pytest.mark.slow),
    ],
)
def test_a_cache_among_the_example_inputs_is_captured(example: dict[str, Any]) -> None:
    of_cache = capture(gpt2(), "onnx", example_inputs=example)
    past = pairs(example["past_key_values"])
    of_pairs = capture(gpt2(), "onnx", example_inputs={**example, "past_key_values": past})
    assert of_cache.signature.inputs == of_pairs.signature.inputs
    other = step(5)
    expected = gpt2()(**step(5), use_cache=True)
    for graph in (of_cache, of_pairs):
        for given in (other, {**other, "past_key_values": pairs(other["past_key_values"])}):
            feeds, _ = graph.signature.bind((given,), {})
            found = graph.signature.rebuild(graph.graph.evaluate(feeds, graph.graph.outputs))
            torch.testing.assert_close(found["logits"], expected.logits, rtol=0, atol=1e-5)
            keys = expected.past_key_values.layers[1].keys
            torch.testing.assert_close(found["present.1.key"], keys, rtol=0, atol=1e-5)


def test_all_layers_have_one_past_and_flops_are_counted(captured: Captured) -> None:
    shapes = {value.name: value.shape for value in captured.graph.inputs}
    assert {shape for name, shape in shapes.items() if name.startswith("past")} == {("batch", 4, "past_sequence", 8)}
    assert shapes["input_ids"] == ("batch", "seq") and shapes["attention_mask"] == ("batch", "total")
    cost = Cost.of(captured.graph, sizes(captured.graph, captured.feeds[0]))
    assert cost.flops is not None and cost.flops > 2 * 2 * 20_000  # a multiply-add a weight, for two rows


@pytest.mark.parametrize("past", [DynamicCache(), (), ((torch.ones(2, 4, 3),),), "a text"])
def test_a_cache_without_keys_and_values_is_refused(past: Any) -> None:
    with pytest.raises(CaptureError, match=r"pass cache=True and the prompt|GPT2LMHeadModel fails on"):
        example = {**step(), "past_key_values": past}
        capture(gpt2(), "onnx", example_inputs=example)


PROMPTS: dict[str, Any] = {
    "dicts": lambda: [{"input_ids": tokens(2, 9), "labels": torch.ones(2)}],
    "rows": lambda: [{"input_ids": tokens(1, 9)[0].tolist()}],
    "a loader": lambda: DataLoader([{"input_ids": row} for row in tokens(2, 9)], batch_size=2),  # type: ignore[arg-type]
    "tensors": lambda: [tokens(2, 9)],
    "stacked": lambda: {"input_ids": tokens(2, 9).numpy()},
    "a generator": lambda: iter([({"input_ids": tokens(2, 9)}, torch.ones(2))]),
    "padded": lambda: [{"input_ids": tokens(2, 9), "attention_mask": np.ones((2, 9), np.int64)}],
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_become_steps_with_the_cache_that_they_would_have(captured: Captured, kind: str) -> None:
    found = list(in_steps(PROMPTS[kind](), captured.graph, captured.signature.outputs, "calibration"))
    assert len(found) == STEPS
    ids = torch.cat([one["input_ids"] for one in found], 1)
    assert torch.equal(ids, tokens(2, 9)[: len(ids)] if len(ids) == 2 else tokens(1, 9))
    seen = 0
    for one in found:
        with torch.no_grad():
            past = gpt2()(ids[:, :seen], use_cache=True).past_key_values if seen else None
        key = one["past_key_values.1.key"]
        assert key.shape[2] == seen
        if past is not None:
            torch.testing.assert_close(key, past.layers[1].keys, rtol=0, atol=1e-5)
        seen += one["input_ids"].shape[1]
        assert one["attention_mask"].shape[1] == seen


def test_batches_that_hold_the_cache_are_left_as_they_are(captured: Captured) -> None:
    given = dict(captured.feeds[0])
    (found,) = in_steps([given], captured.graph, captured.signature.outputs, "calibration")
    assert found is given
    with pytest.raises(UsageError, match="calibration batch 0 has no input_ids"):
        list(in_steps([{"ids": tokens()}], captured.graph, captured.signature.outputs, "calibration"))


def test_a_decoder_is_quantized_with_prompts_as_calibration() -> None:
    prompts = [{"input_ids": tokens(2, 9, seed=seed)} for seed in range(3)]
    small = graphopt.optimize(
        gpt2(), "quantize{scheme=static}", cache=True, calibration=prompts, calibration_steps=2
    )
    assert next(one for one in small.report.passes if one.name == "quantize").changed > 4
    expected = gpt2()(**step(5), use_cache=True)
    found = small(step(5))
    assert torch.cosine_similarity(found["logits"].flatten(), expected.logits.flatten(), 0) > 0.99
