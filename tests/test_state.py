"""Modules that write to their buffers, or to their inputs, through the targets of PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.backends.torch_cpu import bfloat16
from graphopt.capture import capture
from graphopt.dialects.fx.graph import FxGraph
from tests import models


class Counter(nn.Module):
    """y = fc(x) + steps, where each call adds one to the buffer `steps`, and keeps the last x."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)  # type: ignore[operator]
        y: Tensor = self.fc(x) + self.steps + self.last
        self.last.copy_(x.detach().mean(0))  # type: ignore[operator]
        return y


class Cache(nn.Module):
    """Writes the keys of x at `place` into `cache` (batch, room, 8), and attends to all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.query = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, cache: Tensor, place: Tensor) -> Tensor:
        cache.index_copy_(1, place, self.key(x))
        y: Tensor = self.query(x) @ cache.transpose(1, 2)
        return y


def x(seed: int = 0) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("passes", [None, "quantize{scheme=dynamic}"])
def test_buffers_are_written_to_call_by_call(passes: str | None, tmp_path: Path) -> None:
    original, module = models.seeded(Counter), models.seeded(Counter)
    small = graphopt.optimize(module, passes, target="fbgemm", example_inputs=x())
    assert torch.equal(module.steps, torch.zeros(())) and torch.equal(module.last, torch.zeros(4))  # type: ignore[arg-type]
    path = small.export(tmp_path / "counter.pt2")
    loaded, graph_module = torch.export.load(path).module(), small.module
    near = 0.02 if passes else 1e-5
    for step in range(3):
        with torch.no_grad():
            expected = original(x(step))
            for again in (small, loaded, graph_module):
                torch.testing.assert_close(again(x(step)), expected, rtol=near, atol=near)
    assert torch.equal(module.steps, torch.zeros(()))  # type: ignore[arg-type]
    assert graph_module.steps == 3


def test_inputs_are_written_to(tmp_path: Path) -> None:
    module = models.seeded(Cache)
    given = {"x": torch.ones(2, 1, 8), "cache": torch.zeros(2, 6, 8), "place": torch.tensor([2])}
    axes = {"x": {0: "batch"}, "cache": {0: "batch"}, "place": dict[int, str]()}
    small = graphopt.optimize(module, target="fbgemm", example_inputs=given, dynamic_shapes=axes)
    assert not given["cache"].any()
    loaded = torch.export.load(small.export(tmp_path / "cache.pt2")).module()
    for run in (small, lambda **one: loaded(*one.values()), small.module):
        ours, theirs = ({name: one.clone() for name, one in given.items()} for _ in range(2))
        with torch.no_grad():
            torch.testing.assert_close(run(**ours), module(**theirs), rtol=1e-5, atol=1e-5)  # type: ignore[no-untyped-call]
        assert theirs["cache"][:, 2].all()
        torch.testing.assert_close(ours["cache"], theirs["cache"], rtol=1e-5, atol=1e-5)


class Last(nn.Module):
    """The first row of the call before."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        old: Tensor = self.kept.clone()  # type: ignore[operator]
        self.kept.copy_(x)  # type: ignore[operator]
        return old[0]


@pytest.mark.parametrize("target", ["fbgemm", "onednn"])
def test_a_copy_of_state_is_what_it_was(target: str) -> None:
    axes = {"x": dict[int, str]()}
    small = graphopt.optimize(Last(), target=target, example_inputs=x(), dynamic_shapes=axes)
    assert torch.equal(small(x(1)), torch.zeros(4))
    assert torch.equal(small(x(2)), x(1)[0])


def test_state_is_no_constant() -> None:
    program = torch.export.export(models.seeded(Counter), (x(),))
    graph = FxGraph.from_program(program, output_names=["y"])
    assert graph.stateful and graph.clone().stateful
    copies = [node for node in graph.nodes if node.kind == "aten.copy_.default"]
    assert len(copies) == 2 and all(node.signature is None for node in copies)
    first = graph.evaluate({"x": x()}, graph.outputs)
    assert torch.equal(first[0], graph.evaluate({"x": x()}, graph.outputs)[0])  # evaluate writes nothing


@pytest.mark.slow
@pytest.mark.parametrize("make", [models.gpt2, "llama"])
def test_a_decode_step_with_its_cache(make: Any) -> None:
    model = llama() if make == "llama" else make()
    prompt = {"input_ids": models.tokens(1, 6)}
    small = graphopt.optimize(
        model, "quantize{scheme=dynamic}", target="fbgemm", example_inputs=prompt, cache=True
    )
    with torch.no_grad():
        whole = model(input_ids=models.tokens(1, 8), use_cache=True)
        past = model(input_ids=models.tokens(1, 8)[:, :7], use_cache=True).past_key_values
    feeds = {f"past_key_values.{n}.{name}": getattr(layer, f"{name}s" if name == "key" else "values")
             for n, layer in enumerate(past.layers) for name in ("key", "value")}  # fmt: skip
    step = {"input_ids": models.tokens(1, 8)[:, 7:], "attention_mask": torch.ones(1, 8, dtype=torch.int64)}
    for run in (small, lambda **one: small.module(**{name.replace(".", "_"): tensor for name, tensor in one.items()})):
        found = run(**step, **feeds)  # type: ignore[no-untyped-call]
        error = (found["logits"][:, -1] - whole.logits[:, -1]).abs().max()
        assert error < 0.03 * whole.logits.abs().max()
        _, heads, _, size = past.layers[1].values.shape
        assert found["present.1.value"].shape == (1, heads, 8, size)


def llama() -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=models.VOCABULARY, hidden_size=models.WIDTH, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    return models.seeded(transformers.LlamaForCausalLM, config)


def test_what_is_written_to_is_not_narrowed() -> None:
    """A cast from before a write would be read after it."""
    graph = capture(models.seeded(Counter), "fx", example_inputs=x()).graph
    before = graph.text()
    bfloat16.narrow(graph)
    assert graph.text() == before and graph.sites("linear")
