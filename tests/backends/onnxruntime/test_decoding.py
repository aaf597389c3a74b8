"""Decode steps on onnxruntime: kernels append to the cache, for every batch, length and padding; caches in place."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.backends.onnxruntime import cached_attention
from graphopt.backends.onnxruntime.cache import Decoder
from graphopt.backends.onnxruntime.cached_attention import IN_PLACE
from graphopt.backends.onnxruntime.runner import OrtRunner
from graphopt.backends.onnxruntime.target import OnnxRuntime
from graphopt.dialects import repeated_heads
from graphopt.dialects.onnx import rotary
from graphopt.dialects.onnx.graph import OnnxGraph, OnnxValue
from graphopt.dialects.raising import run_stages
from graphopt.errors import UsageError
from graphopt.ir.graph import Value
from graphopt.ir.ops import OPS
from graphopt.ir.rewrite import rewrite
from tests import models

VOCABULARY, SIZE, KERNEL = 20, 8, "GroupQueryAttention"
TOTAL = "past + seq"


def weights(heads: int, kv_heads: int) -> dict[str, Tensor]:
    width, narrow = heads * SIZE, kv_heads * SIZE
    shapes = {"table": (VOCABULARY, width), "q": (width, width), "k": (narrow, width), "v": (narrow, width),
              "o": (width, width)}  # fmt: skip
    generator = torch.Generator().manual_seed(heads)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def frequencies(turned: int) -> Tensor:
    return 0.5 ** torch.arange(turned // 2)


@cache
def step(heads: int = 4, kv_heads: int = 2, turned: int = SIZE, causal: bool = True) -> OnnxGraph:
    """One layer of a Llama with a cache, as torch's exporter writes it; of each head `turned` entries are turned."""
    cached = ("batch", kv_heads, "past", SIZE)
    graph = OnnxGraph.empty({
        "input_ids": (("batch", "seq"), torch.int64), "attention_mask": (("batch", "total"), torch.int64),
        **{f"past_key_values.0.{name}": (cached, torch.float32) for name in ("key", "value")},
    })  # fmt: skip
    ids, mask, past_key, past_value = graph.inputs
    emit, stored = graph.emit, {name: graph.add_constant(one) for name, one in weights(heads, kv_heads).items()}

    def numbers(*several: int) -> Value:
        return graph.add_constant(torch.tensor(several))

    def number(one: float) -> Value:
        return graph.add_constant(torch.tensor(one))

    def shaped(value: OnnxValue, *shape: int | str) -> OnnxValue:
        value.native.shape = ir.Shape(shape)
        return value

    def size_of(value: Value, axis: int) -> OnnxValue:
        return emit("onnx.Squeeze", emit("onnx.Shape", value, start=axis, end=axis + 1))

    def entry(value: Value) -> OnnxValue:
        return emit("reshape", value, numbers(1))

    batch, new, past = size_of(ids, 0), size_of(ids, 1), size_of(past_key, 2)
    total = emit("add", past, new)
    positions = emit("add", shaped(emit("onnx.Range", number(0), new, number(1)), "seq"), past)
    keys = shaped(emit("onnx.Range", number(0), total, number(1)), TOTAL)
    queries = emit("unsqueeze", emit("unsqueeze", positions, axes=(0, 1)), axes=(3,))
    kept = emit("onnx.Slice", emit("cast", mask, dtype=torch.bool), numbers(0), entry(total), numbers(1))
    allowed = emit("unsqueeze", shaped(kept, "batch", TOTAL), axes=(1, 2))
    if causal:
        allowed = emit("onnx.And", emit("onnx.LessOrEqual", emit("unsqueeze", keys, axes=(0, 1, 2)), queries), allowed)
    whole = emit("concat", entry(batch), numbers(1), entry(new), entry(total))
    allowed = shaped(emit("onnx.Expand", allowed, whole), "batch", 1, "seq", TOTAL)
    angles = emit("unsqueeze", emit("cast", emit("unsqueeze", positions, axes=(0,)), dtype=torch.float32), axes=(2,))
    angles = emit("mul", angles, graph.add_constant(frequencies(turned)))
    both = emit("concat", angles, angles, axis=-1)
    cos, sin = (emit("unsqueeze", emit(kind, both), axes=(1,)) for kind in ("onnx.Cos", "onnx.Sin"))

    def heads_of(x: Value, name: str, count: int) -> OnnxValue:
        sizes = emit("concat", entry(batch), entry(new), numbers(-1), numbers(SIZE))
        split = shaped(emit("reshape", emit("linear", x, stored[name]), sizes), "batch", "seq", count, SIZE)
        return emit("transpose", split, perm=(0, 2, 1, 3))

    def turn(x: OnnxValue) -> OnnxValue:
        part = x if turned == SIZE else emit("slice", x, axis=3, start=0, end=turned)
        half = turned // 2
        first, second = (emit("slice", part, axis=3, start=i * half, end=(i + 1) * half) for i in range(2))
        swapped = emit("concat", emit("onnx.Neg", second), first, axis=-1)
        y = emit("add", emit("mul", part, cos), emit("mul", swapped, sin))
        return y if turned == SIZE else emit("concat", y, emit("slice", x, axis=3, start=turned, end=SIZE), axis=-1)

    def repeated(x: OnnxValue) -> OnnxValue:
        if heads == kv_heads:
            return x
        groups = heads // kv_heads
        spread = emit("concat", entry(batch), numbers(kv_heads), numbers(groups), entry(total), numbers(SIZE))
        spread = emit("onnx.Expand", emit("unsqueeze", x, axes=(2,)), spread)
        shaped(spread, "batch", kv_heads, groups, TOTAL, SIZE)
        joined = emit("concat", entry(batch), numbers(heads), entry(total), numbers(SIZE))
        return shaped(emit("reshape", spread, joined), "batch", heads, TOTAL, SIZE)

    x = emit("embedding", stored["table"], ids)
    query, key, value = heads_of(x, "q", heads), heads_of(x, "k", kv_heads), heads_of(x, "v", kv_heads)
    joined = [shaped(emit("concat", old, one, axis=-2), "batch", kv_heads, TOTAL, SIZE)
              for old, one in ((past_key, turn(key)), (past_value, value))]  # fmt: skip
    y = emit("attention", turn(query), *map(repeated, joined), allowed, scale=SIZE**-0.5)
    sizes = emit("concat", entry(batch), entry(new), numbers(-1))
    y = emit("reshape", emit("transpose", y, perm=(0, 2, 1, 3)), sizes)
    y = emit("linear", shaped(y, "batch", "seq", heads * SIZE), stored["o"])
    logits = emit("linear", emit("add", x, y), stored["table"])
    graph.set_outputs({"logits": logits, "present.0.key": joined[0], "present.0.value": joined[1]})
    run_stages((repeated_heads.STAGE, rotary.STAGE), graph)
    graph.sweep()
    return graph


@cache
def lowered(heads: int = 4, kv_heads: int = 2, turned: int = SIZE, causal: bool = True) -> tuple[OnnxGraph, OrtRunner]:
    backend = OnnxRuntime()
    graph, _ = backend.lower(step(heads, kv_heads, turned, causal))
    assert isinstance(graph, OnnxGraph)
    return graph, backend.compile(graph)


def eagerly(feeds: dict[str, Tensor], heads: int, kv_heads: int, turned: int) -> list[Tensor]:
    """The same layer in torch."""
    held = weights(heads, kv_heads)
    ids, mask = feeds["input_ids"], feeds["attention_mask"]
    (batch, new), past = ids.shape, feeds["past_key_values.0.key"].shape[2]
    positions = torch.arange(past, past + new)
    angles = (positions[:, None].float() * frequencies(turned))[None]
    x = F.embedding(ids, held["table"])

    def heads_of(name: str) -> Tensor:
        return F.linear(x, held[name]).view(batch, new, -1, SIZE).transpose(1, 2)

    query, key = (OPS["rotary"].reference(heads_of(name), angles.cos(), angles.sin()) for name in "qk")
    keys = torch.cat([feeds["past_key_values.0.key"], key], 2)
    values = torch.cat([feeds["past_key_values.0.value"], heads_of("v")], 2)
    allowed = (torch.arange(past + new)[None] <= positions[:, None]) & mask[:, None, None, : past + new].bool()
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    spread = (one.repeat_interleave(heads // kv_heads, 1) for one in (keys, values))
    y = OPS["attention"].reference(query, *spread, bias, scale=SIZE**-0.5).transpose(1, 2).flatten(2)
    return [F.linear(x + F.linear(y, held["o"]), held["table"]), keys, values]


def fed(batch: int, past: int, new: int, padding: int = 0, longer: int = 0, kv_heads: int = 2) -> dict[str, Tensor]:
    """padding: positions in front of the first row that the mask leaves out. longer: of the mask, beyond the step."""
    generator = torch.Generator().manual_seed(past)
    mask = torch.ones(batch, past + new + longer, dtype=torch.int64)
    mask[0, :padding] = 0
    cached = {f"past_key_values.0.{name}": torch.randn(batch, kv_heads, past, SIZE, generator=generator)
              for name in ("key", "value")}  # fmt: skip
    return {"input_ids": torch.randint(VOCABULARY, (batch, new), generator=generator), "attention_mask": mask, **cached}


def test_a_step_becomes_kernels_that_append_to_the_cache() -> None:
    graph, runner = lowered()
    kinds = [node.kind for node in graph.nodes]
    assert kinds.count("onnx.If") == 1 and kinds.count("rotary") == 2
    assert not {"attention", "transpose", "slice", "onnx.Neg"} & set(kinds)
    kernels = runner.kernels()
    assert kernels[KERNEL] == kernels["Attention"] == 1 and kernels["RotaryEmbedding"] == 2
    assert graph.model.metadata_props[IN_PLACE] == "true"
    assert [value.name for value in graph.inputs] == [value.name for value in step().inputs]
    assert [value.name for value in graph.outputs] == ["logits", "present.0.key", "present.0.value"]


@given(
    layer=st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 3]), st.sampled_from([4, SIZE])),
    batch=st.integers(1, 3), past=st.integers(0, 7), new=st.integers(1, 4), padding=st.integers(0, 3),
    longer=st.integers(0, 2),
)  # fmt: skip
@example(layer=(2, 3, 4), batch=2, past=3, new=2, padding=1, longer=0)  # which the fused kernel does not take
@example(layer=(2, 1, SIZE), batch=1, past=0, new=4, padding=0, longer=1)
@settings(deadline=None, max_examples=15)
def test_any_step_computes_what_it_did(
    layer: tuple[int, int, int], batch: int, past: int, new: int, padding: int, longer: int
) -> None:
    kv_heads, groups, turned = layer
    heads = kv_heads * groups
    feeds = fed(batch, past, new, padding if batch > 1 else 0, longer, kv_heads)
    graph, runner = lowered(heads, kv_heads, turned)
    tokens = feeds["attention_mask"][:, past : past + new].bool()  # what padding attends to is not said
    original = step(heads, kv_heads, turned)
    expected = eagerly(feeds, heads, kv_heads, turned)
    for found in (original.evaluate(feeds, original.outputs), runner(feeds), graph.evaluate(feeds, graph.outputs)):
        torch.testing.assert_close(found[0][tokens], expected[0][tokens], rtol=1e-4, atol=1e-5)
        for cached, other in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(cached, other, rtol=1e-4, atol=1e-5)


def test_a_mask_that_allows_later_positions_is_left_to_the_operator_of_onnx() -> None:
    original, (graph, runner) = step(causal=False), lowered(causal=False)
    assert [node.op_type for node in graph.model.graph if node.op_type in ("Attention", "If")] == ["Attention"]
    assert IN_PLACE not in graph.model.metadata_props
    feeds = fed(2, 3, 2)
    torch.testing.assert_close(runner(feeds), original.evaluate(feeds, original.outputs), rtol=1e-4, atol=1e-5)
    log = rewrite(step(causal=False).clone(), [cached_attention.FORMS.only(KERNEL)])["cached-attention"]
    assert [decline.code for decline in log.declined.values()] == ["mask_not_causal"]


@pytest.mark.parametrize(("size", "form"), [(4, "Attention"), (12, "Attention"), (16, "If")])
def test_heads_of_a_size_that_the_kernel_refuses_are_left_to_the_operator_of_onnx(
    size: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SIZE", size)
    original, backend = step.__wrapped__(turned=size), OnnxRuntime()
    graph, _ = backend.lower(original)
    assert isinstance(graph, OnnxGraph)
    assert [node.op_type for node in graph.model.graph if node.op_type in ("Attention", "If")] == [form]
    feeds = fed(1, 3, 1)
    found = backend.compile(graph)(feeds)
    torch.testing.assert_close(found, original.evaluate(feeds, original.outputs), rtol=1e-4, atol=1e-5)
    log = rewrite(original.clone(), [cached_attention.FORMS.only(KERNEL)])["cached-attention"]
    assert [decline.code for decline in log.declined.values()] == ([] if form == "If" else ["head_size_not_divided"])


# --- caches that stay where they are ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("causal", [True, False], ids=["in place", "handed back"])
def test_a_decoder_computes_what_a_whole_prompt_does(batch: int, causal: bool) -> None:
    _, runner = lowered(causal=causal)
    decoder = Decoder(runner.session, capacity=12, batch=batch)
    assert decoder.in_place is causal
    ids = fed(batch, 0, 9)["input_ids"].numpy()
    for kept in (0, 0, 4):  # the second time over what the first has left, and then with its beginning
        decoder.truncate(min(kept, decoder.length))
        parts = [decoder.step(ids[:, i:j]) for i, j in ((0, 4), (4, 5), (5, 8), (8, 9)) if i >= kept]
        found = np.concatenate(parts, 1)
        assert decoder.length == 9
        expected = runner(fed(batch, 0, 9))[0]
        if causal:
            np.testing.assert_allclose(found, expected.numpy()[:, kept:], rtol=1e-4, atol=1e-5)
        else:  # each token attends to the last part too, which then is the whole
            np.testing.assert_allclose(found[:, -1], expected.numpy()[:, -1], rtol=1e-4, atol=1e-5)


def test_padding_in_front_of_a_prompt_stays_out() -> None:
    _, runner = lowered()
    ids = fed(2, 0, 6)["input_ids"].numpy()
    mask = np.ones_like(ids)
    mask[0, :2] = 0
    decoder = Decoder(runner.session, 8, 2)
    found = np.concatenate([decoder.step(ids[:, :4], mask[:, :4]), decoder.step(ids[:, 4:])], 1)
    expected = eagerly({**fed(2, 0, 6), "attention_mask": torch.from_numpy(mask)}, 4, 2, SIZE)[0].numpy()
    np.testing.assert_allclose(found[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-5)


def test_what_a_decoder_cannot_run_is_refused() -> None:
    _, runner = lowered()
    decoder = Decoder(runner.session, capacity=3)
    decoder.step(np.zeros((1, 2), np.int64))
    with pytest.raises(UsageError, match=r"the cache holds 2 of 3 positions, and 2 more do not fit"):
        decoder.step(np.zeros((1, 2), np.int64))
    with pytest.raises(UsageError, match=r"the cache holds 2 positions, of which 3 cannot be kept"):
        decoder.truncate(3)
    with pytest.raises(UsageError, match=r"ids have the shape \[2, 1\]; a step takes \[1, 1 or more\]"):
        decoder.step(np.zeros((2, 1), np.int64))
    backend = OnnxRuntime()
    graph = OnnxGraph.empty({"x": ((1, 4), torch.float32)})
    graph.set_outputs({"y": graph.emit("relu", graph.inputs[0])})
    with pytest.raises(UsageError, match="the file is no decode step: it has the inputs x and the outputs y"):
        Decoder(backend.compile(graph).session, 3)


# --- models ----------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "vocab_size": 97, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64
}  # fmt: skip
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2}),
    "Qwen2": ("Qwen2ForCausalLM", {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 1}),
    "Mistral": ("MistralForCausalLM", {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2,
                                       "sliding_window": 5}),
    "GPT2": ("GPT2LMHeadModel", {"hidden_size": 32}),
    "GPTNeoX": ("GPTNeoXForCausalLM", {"hidden_size": 64, "intermediate_size": 64}),
    "Phi": ("PhiForCausalLM", {"hidden_size": 64, "intermediate_size": 64}),
}  # fmt: skip


def made(name: str) -> nn.Module:
    import transformers

    architecture, options = ARCHITECTURES[name]
    config = getattr(transformers, f"{name}Config")(**SMALL, **options)
    return models.seeded(getattr(transformers, architecture), config).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_language_models_decode_with_fused_kernels(name: str) -> None:
    from transformers import DynamicCache

    model = made(name)
    small = graphopt.optimize(model, example_inputs={"input_ids": models.tokens(1, 6)}, cache=True, measure=False)
    kernels = small.report.kernels
    assert kernels[KERNEL] == 2 and kernels.get("RotaryEmbedding", 0) == (0 if name == "GPT2" else 4)
    for batch, past, new, padding in ((1, 5, 1, 0), (2, 5, 3, 0), (2, 0, 4, 2), (2, 5, 1, 2), (1, 6, 3, 0)):
        ids, mask = models.tokens(batch, past + new, seed=past), torch.ones(batch, past + new, dtype=torch.int64)
        mask[0, :padding] = 0
        held = DynamicCache()
        with torch.no_grad():
            if past:
                model(input_ids=ids[:, :past], attention_mask=mask[:, :past], past_key_values=held)
            feeds = {"input_ids": ids[:, past:], "attention_mask": mask}
            for value in small.lowered.inputs[2:]:
                _, layer, kind = value.name.rsplit(".", 2)
                _, heads, _, size = (int(one) if isinstance(one, int) else 0 for one in value.shape or ())
                empty = torch.zeros(batch, heads, 0, size)
                feeds[value.name] = getattr(held.layers[int(layer)], f"{kind}s").clone() if past else empty
            expected = model(input_ids=ids[:, past:], attention_mask=mask, past_key_values=held, use_cache=True)
        found, real = small(feeds), mask.bool()
        torch.testing.assert_close(
            found["logits"][real[:, past:]], expected.logits[real[:, past:]], rtol=1e-4, atol=1e-5
        )
        keys = found["present.1.key"], expected.past_key_values.layers[1].keys
        torch.testing.assert_close(*(one.transpose(1, 2)[real] for one in keys), rtol=1e-4, atol=1e-5)
    assert isinstance(small.runner, OrtRunner)
    decoder = Decoder(small.runner.session, 16)
    ids = models.tokens(1, 9)
    steps = [decoder.step(part.numpy()) for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:])]
    with torch.no_grad():
        whole = model(input_ids=ids).logits.numpy()
    np.testing.assert_allclose(np.concatenate(steps, 1), whole, rtol=1e-4, atol=1e-5)
