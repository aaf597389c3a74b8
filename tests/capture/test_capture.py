"""Capture: what may be handed in, how the result is called, what is dynamic, and that the model stays as it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.capture.sources import Captured, CaptureError, capture
from graphopt.dialects.onnx.graph import OnnxGraph
from tests.models import ConvNet, Encoder, bert, exported, gpt2, images, model, padding, seeded, tokens


class Two(nn.Module):
    """Two inputs, and a result of any structure."""

    def __init__(self, shape: Any = tuple) -> None:
        super().__init__()
        self.up, self.result = nn.Linear(4, 6), shape

    def forward(self, x: Tensor, scale: Tensor) -> Any:
        y = self.up(x) * scale
        return self.result((y, y.sum(-1))) if self.result is tuple else self.result(y, x)


def ran(captured: Captured, *args: Any, **kwargs: Any) -> Any:
    """The captured graph, called as `Optimized` calls it."""
    feeds, _ = captured.signature.bind(args, kwargs)
    return captured.signature.rebuild(captured.graph.evaluate(feeds, captured.graph.outputs))


X, SCALE = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.randn(3, 1)


# --- example inputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "example",
    [
        (X, SCALE), {"x": X, "scale": SCALE}, [(X, SCALE), (X[:2], SCALE[:2])], (X.numpy(), SCALE.numpy()),
        {"x": X.numpy(), "scale": SCALE}, [{"scale": SCALE, "x": X}],
    ],
    ids=["tuple", "dict", "several", "numpy", "mixed", "list of a dict"],
)  # fmt: skip
def test_examples_of_every_form(dialect: str, example: Any) -> None:
    module = seeded(Two)
    captured = capture(module, dialect, example_inputs=example)
    assert set(captured.signature.inputs) == {"x", "scale"}
    assert len(captured.feeds) == (len(example) if isinstance(example, list) else 1)
    assert torch.equal(captured.feeds[0]["x"], X)
    expected = module(X, SCALE)
    found = ran(captured, x=X, scale=SCALE)
    assert isinstance(found, tuple)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_single_tensor(dialect: str) -> None:
    module = seeded(ConvNet)
    captured = capture(module, dialect, example_inputs=images())
    assert captured.signature.inputs == ("x",) and captured.signature.outputs == ("output",)
    torch.testing.assert_close(ran(captured, images(5)), module(images(5)), rtol=1e-5, atol=1e-5)


class Sum(nn.Module):
    """Any number of tensors behind one, and a keyword behind those."""

    def forward(self, x: Tensor, *others: Tensor, scale: Tensor | None = None) -> Tensor:
        total = x if scale is None else x * scale
        for other in others:
            total = total * 2 + other
        return total


class ByPosition(nn.Module):
    def forward(self, x: Tensor, y: Tensor, /, scale: Tensor) -> Tensor:
        return (x - y) * scale


def test_arguments_that_only_a_position_names(dialect: str) -> None:
    a, b, c = X, X + 1, X[:, :1]
    captured = capture(Sum(), dialect, example_inputs=(a, b, c))
    assert captured.signature.inputs == ("x", "others_0", "others_1")
    assert captured.graph.inputs[1].shape == ("batch", 4)
    torch.testing.assert_close(ran(captured, a[:2], b[:2], c[:2]), Sum()(a[:2], b[:2], c[:2]))
    keyword = capture(Sum(), dialect, example_inputs={"scale": SCALE, "x": a})
    torch.testing.assert_close(ran(keyword, x=b, scale=SCALE), Sum()(b, scale=SCALE))
    for example in ((a, b, SCALE), {"scale": SCALE, "y": b, "x": a}):
        captured = capture(ByPosition(), dialect, example_inputs=example)
        assert captured.signature.inputs == ("x", "y", "scale")
        torch.testing.assert_close(ran(captured, b, a, SCALE), ByPosition()(b, a, SCALE))


def test_a_dict_has_no_place_for_any_number_of_tensors() -> None:
    with pytest.raises(CaptureError, match="'others' takes any number of tensors; give a tuple"):
        capture(Sum(), "onnx", example_inputs={"x": X, "others": (X,)})


def test_numpy_in_gives_numpy_out() -> None:
    result = graphopt.optimize(seeded(Two), example_inputs=(X, SCALE))
    found = result(X.numpy(), SCALE.numpy())
    assert all(isinstance(part, np.ndarray) for part in found)
    assert all(isinstance(part, Tensor) for part in result(X, scale=SCALE))
    np.testing.assert_allclose(found[0], result({"x": X, "scale": SCALE})[0].numpy(), rtol=0, atol=0)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


STRUCTURES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "dict": (lambda y, x: {"logits": y, "hidden": x * 2}, ("logits", "hidden")),
    "nested": (lambda y, x: {"logits": y, "more": [x * 2, (x + 1,)]}, ("logits", "more.0", "more.1.0")),
    "named tuple": (Pair, ("first", "second")),
    "with None": (lambda y, x: (y, None, x * 2), ("output_0", "output_2")),
    "an input again": (lambda y, x: (x, y, y), ("output_0", "output_1", "output_2")),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_results_keep_their_structure(dialect: str, name: str) -> None:
    build, names = STRUCTURES[name]
    module = seeded(Two, build)
    captured = capture(module, dialect, example_inputs=(X, SCALE))
    assert captured.signature.outputs == names
    expected, found = module(X, SCALE), ran(captured, X, SCALE)
    assert type(found) is type(expected)
    flat, tree = torch.utils._pytree.tree_flatten(expected)
    other, same = torch.utils._pytree.tree_flatten(found)
    assert tree == same
    for a, b in zip(flat, other, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


# --- Hugging Face --------------------------------------------------------------------------------------------------


def test_a_model_output_stays_one() -> None:
    module, inputs = bert(), {"input_ids": tokens(), "attention_mask": padding()}
    result = graphopt.optimize(module, example_inputs=inputs)
    expected, found = module(**inputs), result(**inputs)
    assert type(found) is type(expected)
    assert result.signature.outputs == ("last_hidden_state", "pooler_output")
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, rtol=0, atol=1e-5)
    assert result.report.ops_before["attention"] == 2
    other = {"input_ids": tokens(1, 3), "attention_mask": padding(1, 3)}
    torch.testing.assert_close(result(other).pooler_output, module(**other).pooler_output, rtol=0, atol=1e-5)


def test_a_model_with_a_cache_is_captured_without_it(dialect: str) -> None:
    module = gpt2()
    captured = capture(module, dialect, example_inputs={"input_ids": tokens()})
    assert any("use_cache=False" in note and "cache=True" in note for note in captured.notes)
    assert captured.signature.outputs == ("logits",)
    found = ran(captured, tokens(3, 5))
    torch.testing.assert_close(found.logits, module(tokens(3, 5), use_cache=False).logits, rtol=0, atol=1e-5)


def test_the_decode_step_is_the_models_own() -> None:
    """Logits and cache of one new token on a prompt of another length, against the model's."""
    module, prompt = gpt2(), tokens(2, 6)
    example = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}
    result = graphopt.optimize(module, cache=True, example_inputs=example)
    with torch.no_grad():
        past = module(prompt, use_cache=True).past_key_values
        inputs = {"input_ids": tokens(2, 1, seed=1), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
        for number, layer in enumerate(past.layers):
            inputs |= {f"past_key_values.{number}.key": layer.keys, f"past_key_values.{number}.value": layer.values}
        found = result(inputs)
        expected = module(inputs["input_ids"], past_key_values=past, use_cache=True)
    torch.testing.assert_close(found["logits"], expected.logits, rtol=0, atol=1e-4)
    assert set(found) == {"logits", *(f"present.{number}.{name}" for number in (0, 1) for name in ("key", "value"))}
    for number, layer in enumerate(expected.past_key_values.layers):
        torch.testing.assert_close(found[f"present.{number}.key"], layer.keys, rtol=0, atol=1e-5)
        torch.testing.assert_close(found[f"present.{number}.value"], layer.values, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("example", "options", "message"),
    [
        ({"input_ids": tokens(), "attention_mask": padding()}, {}, "prompt without padding"),
        ({"input_ids": tokens(), "position_ids": tokens()}, {}, "no 'position_ids'"),
        (tokens(), {}, "a dict with input_ids"),
        ({"input_ids": tokens()}, {"dynamic_shapes": {"input_ids": {0: "n"}}}, "leave out dynamic_shapes"),
    ],
)
def test_prompts_that_no_decode_step_is_made_of(example: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(gpt2(), "onnx", example_inputs=example, cache=True, **options)


# --- other things that are models ----------------------------------------------------------------------------------


def test_an_exported_program(dialect: str) -> None:
    module = seeded(Two)
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (X, SCALE), dynamic_shapes=({0: batch}, {0: batch}))
    captured = capture(program, dialect)
    assert captured.signature.inputs == ("x", "scale") and captured.graph.inputs[0].shape == ("batch", 4)
    assert torch.equal(captured.feeds[0]["x"], X)
    torch.testing.assert_close(ran(captured, X[:2], SCALE[:2]), module(X[:2], SCALE[:2]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"x": X}, "missing inputs: scale"),
        ((X,), "missing inputs: scale"),
        ((X, SCALE, X), r"takes 2 inputs \(x, scale\), not 3"),
        ({"x": X, "scal": SCALE}, "no input 'scal'; did you mean 'scale'"),
    ],
)
def test_example_inputs_that_an_exported_program_does_not_take(dialect: str, example: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(torch.export.export(seeded(Two), (X, SCALE)), dialect, example_inputs=example)


def test_an_exported_program_that_returns_more_than_tensors(dialect: str) -> None:
    module = seeded(Two, lambda y, x: {"loss": None, "logits": y})
    captured = capture(torch.export.export(module, (X, SCALE)), dialect)
    found, expected = ran(captured, X, SCALE), module(X, SCALE)
    assert captured.signature.outputs == ("logits",)
    assert list(found) == list(expected) and found["loss"] is None
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-5, atol=1e-6)


def test_a_symbolically_traced_module(dialect: str) -> None:
    module = seeded(ConvNet)
    captured = capture(torch.fx.symbolic_trace(module), dialect, example_inputs=images())
    torch.testing.assert_close(ran(captured, images(4)), module(images(4)), rtol=1e-5, atol=1e-5)


def test_onnx_in_memory_in_a_file_and_in_graphsurgeon(tmp_path: Path) -> None:
    module, inputs = seeded(Encoder), {"ids": tokens(), "mask": padding()}
    proto = exported(module, inputs, 18, dynamo=True)
    onnx.save(proto, tmp_path / "inline.onnx")
    onnx.save(onnx.load(tmp_path / "inline.onnx"), tmp_path / "outside.onnx", save_as_external_data=True,
              location="weights.bin", size_threshold=64)  # fmt: skip
    assert (tmp_path / "weights.bin").stat().st_size > 10_000
    handed = [proto, tmp_path / "inline.onnx", str(tmp_path / "outside.onnx"), onnx_graphsurgeon.import_onnx(proto)]
    texts, expected = set(), module(**inputs)
    for one in handed:
        captured = capture(one, "onnx", example_inputs=inputs)
        assert captured.signature.inputs == ("ids", "mask") and captured.signature.outputs == ("y",)
        torch.testing.assert_close(ran(captured, **inputs)["y"], expected, rtol=0, atol=1e-5)
        texts.add("\n".join(line.split("  #")[0] for line in captured.graph.text().splitlines()))
    assert len(texts) == 1
    assert "inline.onnx" in capture(handed[1], "onnx").source


def test_a_file_captured_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(64, 64)
    proto = model("g (float[n,64] x) => (float[n,64] y) { y = MatMul(x, W) }", {"W": weight})
    (tmp_path / "models").mkdir()
    onnx.save(proto, tmp_path / "models" / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=64)
    monkeypatch.chdir(tmp_path)
    captured = capture("models/m.onnx", "onnx")
    monkeypatch.chdir(tmp_path / "models")
    x = torch.randn(2, 64)
    torch.testing.assert_close(ran(captured, x)["y"], x @ weight, rtol=1e-4, atol=1e-4)


def test_without_example_inputs_feeds_are_made_and_noted() -> None:
    text = "g (float[b,n,4] x, int64[b,n] i, bool k) => (float[b,n,4] y) { y = Relu(x) }"
    captured = capture(model(text), "onnx")
    (feeds,) = captured.feeds
    assert {name: tuple(tensor.shape) for name, tensor in feeds.items()} == {"x": (1, 16, 4), "i": (1, 16), "k": ()}
    assert feeds["x"].dtype == torch.float32 and set(feeds["i"].flatten().tolist()) == {0, 1}
    assert any("feeds were made" in note and "x [1, 16, 4]" in note for note in captured.notes)


def test_a_model_that_does_not_run_when_lifted_stays_at_its_opset() -> None:
    """onnxruntime has no kernel for the RandomNormal of opset 22."""
    text = "g (float[2,2] x) => (float[2,2] y) { r = RandomNormal<shape = [2,2], scale = 1e-20>()  y = Add(x, r) }"
    captured = capture(model(text, opset=21), "onnx")
    assert isinstance(captured.graph, OnnxGraph) and captured.graph.opset == 21
    assert any("stays at opset 21" in note for note in captured.notes)


def test_a_lifted_model_that_cannot_be_checked_is_not_taken() -> None:
    text = "g (float[n,4] x) => (float[3,m] y) { y = Reshape(x, s) }"  # no batch of 1 has a third
    captured = capture(model(text, {"s": torch.tensor([3, -1])}, opset=17), "onnx")
    assert isinstance(captured.graph, OnnxGraph) and captured.graph.opset == 17
    assert "stays at opset 17: it cannot be checked that the lifted model computes the same" in captured.notes


def test_lifting_is_noted() -> None:
    captured = capture(model("g (float[n,4] x) => (float[n,4] y) { y = Relu(x) }", opset=17), "onnx")
    assert isinstance(captured.graph, OnnxGraph) and captured.graph.opset == 23
    assert "lifted from opset 17 to 23" in captured.notes


# --- dynamic axes --------------------------------------------------------------------------------------------------


class Ids(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        return F.relu(self.table(ids).sum(1) + x)


def shapes(captured: Captured) -> dict[str, Any]:
    return {value.name: value.shape for value in captured.graph.inputs}


def test_default_and_given_dynamic_axes(dialect: str) -> None:
    module, example = seeded(Ids), {"ids": torch.ones(2, 5, dtype=torch.int64), "x": torch.randn(2, 4)}
    assert shapes(capture(module, dialect, example_inputs=example)) == {"ids": ("batch", "seq"), "x": ("batch", 4)}
    given = capture(module, dialect, example_inputs=example, dynamic_shapes={"ids": {0: "rows", 1: "length"}})
    assert shapes(given)["ids"] == ("rows", "length")
    fixed = capture(module, dialect, example_inputs=example, dynamic_shapes={"ids": {1: "length"}, "x": {}})
    assert shapes(fixed) == {"ids": (2, "length"), "x": (2, 4)}


class Scores(nn.Module):
    """Each query against each document: their numbers are independent, and so are the lengths of two texts."""

    def forward(self, query: Tensor, docs: Tensor) -> Tensor:
        return query @ docs.mT


class Texts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, ids: Tensor, other_ids: Tensor) -> Tensor:
        y: Tensor = self.table(ids).sum(1) + self.table(other_ids).sum(1)
        return y


def test_axes_that_the_export_keeps_apart_have_names_of_their_own(dialect: str) -> None:
    module, example = Scores(), (torch.randn(2, 4), torch.randn(3, 4))
    captured = capture(module, dialect, example_inputs=example)
    assert shapes(captured) == {"query": ("batch", 4), "docs": ("docs_batch", 4)}
    assert captured.graph.outputs[0].shape == ("batch", "docs_batch")
    torch.testing.assert_close(ran(captured, *example), module(*example), rtol=1e-5, atol=1e-6)
    two = {"ids": torch.ones(2, 5, dtype=torch.int64), "other_ids": torch.ones(2, 3, dtype=torch.int64)}
    found = shapes(capture(seeded(Texts), dialect, example_inputs=two))
    assert found == {"ids": ("batch", "seq"), "other_ids": ("batch", "other_ids_seq")}


def test_a_size_of_one_is_repeated_for_the_trace(dialect: str) -> None:
    module, example = seeded(Ids), {"ids": torch.ones(1, 1, dtype=torch.int64), "x": torch.randn(1, 4)}
    captured = capture(module, dialect, example_inputs=example)
    assert any("size 1" in note for note in captured.notes)
    assert shapes(captured) == {"ids": ("batch", "seq"), "x": ("batch", 4)}
    assert captured.feeds[0]["ids"].shape == (1, 1)
    for batch, length in ((1, 1), (3, 4)):
        feeds = {"ids": torch.randint(0, 9, (batch, length)), "x": torch.randn(batch, 4)}
        torch.testing.assert_close(ran(captured, **feeds), module(**feeds), rtol=1e-5, atol=1e-6)


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(6.0)[:, None]


def test_axes_that_the_export_fixes_are_noted(dialect: str) -> None:
    captured = capture(Fixed(), dialect, example_inputs=torch.randn(6, 4))
    assert any("fixed axis 0 (batch) of x at 6" in note for note in captured.notes)
    assert shapes(captured) == {"x": (6, 4)}


# --- the user's model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", ["quantize{scheme=dynamic}", "sparsify{amount=0.5},low-rank{rank=0.25}"])
def test_the_module_stays_as_it_was(passes: str) -> None:
    module = seeded(Encoder).train()
    module.layers[0].norm1.eval()  # type: ignore[index, union-attr]
    modes = {name: inner.training for name, inner in module.named_modules()}
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    hooks = sum(len(inner._forward_hooks) for inner in module.modules())
    result = graphopt.optimize(module, passes, example_inputs={"ids": tokens(), "mask": padding()})
    assert {name: inner.training for name, inner in module.named_modules()} == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in module.parameters())
    assert sum(len(inner._forward_hooks) for inner in module.modules()) == hooks
    assert any(record.changed for record in result.report.passes if record.name != "simplify")


def test_weights_of_the_module_are_not_followed_after_capture() -> None:
    module, inputs = seeded(Encoder), {"ids": tokens(), "mask": padding()}
    result = graphopt.optimize(module, example_inputs=inputs)
    before = result(**inputs)
    assert torch.equal(before, result(**inputs))
    captured: Mapping[str, Any] = result.report.to_dict()
    assert captured["source"].endswith("Encoder")


def test_dropout_is_off() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9)).train()
    result = graphopt.optimize(module, example_inputs=X)
    torch.testing.assert_close(result(X), module[0](X), rtol=1e-5, atol=1e-6)


def test_calls_that_do_not_fit() -> None:
    result = graphopt.optimize(seeded(Two), example_inputs=(X, SCALE))
    with pytest.raises(CaptureError, match="takes 2 inputs"):
        result(X, SCALE, X)
    with pytest.raises(CaptureError, match="no input 'scal'; did you mean 'scale'"):
        result(X, scal=SCALE)
    with pytest.raises(CaptureError, match="missing inputs: scale"):
        result(X)
    with pytest.raises(CaptureError, match="'x' is a str"):
        result("x", SCALE)
