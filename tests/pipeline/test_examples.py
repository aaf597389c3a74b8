"""Example inputs from the first batch: which of its tensors are inputs, and what cannot be told."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, BertConfig, BertForSequenceClassification

from graphopt.capture.sources import capture
from graphopt.errors import CaptureError, UsageError
from graphopt.pipeline.batches import SAMPLES
from graphopt.pipeline.examples import first_batch

FEED, LABELS = torch.arange(6.0).reshape(2, 3), torch.tensor([0, 1])
IDS, MASK = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)


class One(Headed):
    def forward(self, x: Tensor) -> Any:
        return self.head(x)


class Masked(Headed):
    def forward(self, x: Tensor, mask: Tensor, labels: Tensor | None = None) -> Any:
        y = self.head(x) * mask
        return y if labels is None else nn.functional.cross_entropy(y, labels)


class Optional(Headed):
    def forward(self, x: Tensor | None = None, mask: Tensor | None = None) -> Any:
        return self.head(x)


class OnlyOptional(Headed):
    def forward(self, x: Tensor | None = None) -> Any:
        return self.head(x)


class Starred(Headed):
    def forward(self, *xs: Tensor) -> Any:
        return self.head(xs[0])


class Anything(Headed):
    def forward(self, **named: Tensor) -> Any:
        return self.head(named["x"])


class NamedAndAnything(Headed):
    def forward(self, x: Tensor, **named: Tensor) -> Any:
        return self.head(x)


class NeedsLabels(Headed):
    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return self.head(x) + labels.unsqueeze(1)


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


# --- modules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "batch", "expected"),
    [
        (One(), FEED, (FEED,)),
        (One(), (FEED, LABELS), (FEED,)),
        (One(), [FEED.numpy(), LABELS], (FEED,)),
        (One(), [FEED.double().numpy(), LABELS], (FEED,)),
        (One().double(), (FEED.double(), LABELS), (FEED.double(),)),
        (One(), {"x": FEED, "label": LABELS, "text": ["a", "b"]}, {"x": FEED}),
        (One(), {"x": FEED.tolist()}, {"x": FEED}),
        (One(), ({"x": FEED}, LABELS), {"x": FEED}),
        (One(), (FEED[0], 1), (FEED[:1],)),
        (One(), {"x": FEED[0], "label": 1}, {"x": FEED[:1]}),
        (Masked(), (FEED, FEED[:, :2], LABELS), (FEED, FEED[:, :2])),
        (Masked(), {"mask": FEED[:, :2], "x": FEED, "labels": LABELS}, {"mask": FEED[:, :2], "x": FEED}),
        (Optional(), FEED, (FEED,)),
        (Optional(), {"x": FEED, "mask": None, "target": LABELS}, {"x": FEED}),
        (OnlyOptional(), (FEED, LABELS), (FEED,)),
        (Starred(), (FEED,), (FEED,)),
        (Anything(), {"x": FEED, "y": FEED, "labels": LABELS}, {"x": FEED, "y": FEED}),
        (NeedsLabels(), {"x": FEED, "labels": LABELS}, {"x": FEED, "labels": LABELS}),
    ],
    ids=lambda case: type(case).__name__,
)
def test_of_a_module(module: nn.Module, batch: Any, expected: Any) -> None:
    example = first_batch(module, [batch, 3])
    assert same(example, expected)
    assert (module(**example) if isinstance(example, dict) else module(*example)).shape[1] == 2


def test_of_stacked_arrays_the_first_rows() -> None:
    many = torch.arange(3.0 * 3 * SAMPLES).reshape(-1, 3)
    assert same(first_batch(One(), many), (many[:SAMPLES],))
    assert same(first_batch(One(), {"x": many.numpy(), "labels": np.arange(3 * SAMPLES)}), {"x": many[:SAMPLES]})


def test_of_loaders_that_start_anew() -> None:
    loader = DataLoader(TensorDataset(FEED, LABELS), batch_size=2)
    assert same(first_batch(One(), loader), (FEED,)) and same(next(iter(loader)), (FEED, LABELS))


def test_what_forward_does_not_name_is_left_out_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"NamedAndAnything\.forward does not name: idx"):
        assert same(first_batch(NamedAndAnything(), [{"x": FEED, "idx": LABELS, "label": LABELS}]), {"x": FEED})


def test_of_a_transformer_and_what_a_tokenizer_gives() -> None:
    config = BertConfig(
        vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4,
        max_position_embeddings=8,
    )  # fmt: skip
    bert = BertForSequenceClassification(config)
    encoding = BatchEncoding({"input_ids": IDS, "attention_mask": MASK, "labels": LABELS})
    expected = {"input_ids": IDS, "attention_mask": MASK}
    assert same(first_batch(bert, [encoding]), expected)
    with pytest.raises(UsageError, match=r"BertForSequenceClassification\.forward needs none of them"):
        first_batch(bert, [(IDS, MASK, LABELS)], name="training")


# --- files and programs --------------------------------------------------------------------------------------------


def tokens_model() -> onnx.ModelProto:
    pair = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "seq"]) for name in ("ids", "mask")]
    product = helper.make_tensor_value_info("y", TensorProto.INT64, ["batch", "seq"])
    graph = helper.make_graph([helper.make_node("Mul", ["ids", "mask"], ["y"])], "tokens", pair, [product])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("form", ["proto", "surgeon", "file"])
@pytest.mark.parametrize(
    "batch",
    [
        {"mask": MASK.int().numpy(), "ids": IDS, "label": LABELS},
        (IDS, MASK, LABELS),
        ({"ids": IDS, "mask": MASK}, LABELS),
    ],
)
def test_of_an_onnx_model(form: str, batch: Any, tmp_path: Path) -> None:
    model = tokens_model()
    onnx.save(model, tmp_path / "tokens.onnx")
    forms = {"proto": model, "surgeon": onnx_graphsurgeon.import_onnx(model), "file": tmp_path / "tokens.onnx"}
    assert same(first_batch(forms[form], [batch]), {"ids": IDS, "mask": MASK})
    row = {"ids": [1, 2], "mask": [1, 0]}
    assert first_batch(forms[form], [row])["mask"].tolist() == [[1, 0]]


def test_of_a_program(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(One(), (FEED,), dynamic_shapes={"x": {0: batch}})
    torch.export.save(program, tmp_path / "one.pt2")
    for model in (program, tmp_path / "one.pt2"):
        assert same(first_batch(model, [(FEED.double().numpy(), LABELS)]), {"x": FEED})


# --- what it refuses -----------------------------------------------------------------------------------------------


def generator() -> Iterator[Tensor]:
    yield FEED


class Reader:
    def get_next(self) -> None: ...


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        (One(), generator(), "the first training batch is read twice, and a generator gives it once; pass a list"),
        (One(), Reader(), "the first training batch is read twice"),
        (tokens_model(), generator(), "the first training batch is read twice"),
        (One(), [], "training holds no batch"),
        (One(), 3, "training must be an iterable of batches, not a int"),
        (One(), [{"y": FEED, "label": LABELS}], "training batch 0 has no 'x'; there are y"),
        (Optional(), [{"y": FEED}], "training batch 0 holds y, and Optional.forward takes x, mask"),
        (Starred(), [{"y": FEED}], "training batch 0 holds y, and Starred.forward takes tensors by position"),
        (Masked(), [(FEED,)], "training batch 0 holds 1 tensor, and the model has the inputs x, mask"),
        (Optional(), [(FEED, LABELS)], "Optional.forward needs none of them, so which are its inputs cannot be told"),
        (Starred(), [(FEED, LABELS)], "Starred.forward needs none of them"),
        (One(), [FEED * np.nan], "training batch 0, input 'x' holds 6 NaN"),
        (One(), [{"x": ["a"]}], "training batch 0, input 'x': a list is not an array of numbers"),
        (tokens_model(), [{"ids": IDS}], "training batch 0 has no 'mask'"),
        (tokens_model(), [(FEED, MASK)], "training batch 0, input 'ids' holds float32, and the model takes int64"),
    ],
)
def test_refuses(module: Any, source: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        first_batch(module, source, name="training")
    assert message in str(caught.value)


def test_what_is_no_model_is_refused_as_by_capture(tmp_path: Path) -> None:
    (tmp_path / "model.pt").touch()
    with pytest.raises(CaptureError, match="may hold a pickle"):
        first_batch(tmp_path / "model.pt", [FEED])
    with pytest.raises(CaptureError, match=r"cannot capture a builtins\.int"):
        first_batch(3, [FEED])
    with pytest.raises(CaptureError, match="there is no file"):
        first_batch(tmp_path / "none.onnx", [FEED])


@given(inputs=st.integers(1, 3), labels=st.integers(0, 2), rows=st.integers(1, 3))
def test_as_many_leading_tensors_as_forward_needs(inputs: int, labels: int, rows: int) -> None:
    names = ["a", "b", "c"][:inputs]
    module = nn.Module()
    module.forward = eval(f"lambda {', '.join(names)}, scale=None: None")
    tensors = tuple(torch.full((rows, 2), float(number)) for number in range(inputs + labels))
    assert same(first_batch(module, [tensors]), tensors[:inputs])
    assert same(first_batch(module, [dict(zip([*names, "label", "targets"], tensors, strict=False))]),
                dict(zip(names, tensors, strict=False)))  # fmt: skip


# --- labels among the example inputs that the user gives -----------------------------------------------------------


@pytest.mark.parametrize("dialect", ["fx", "onnx"])
def test_labels_among_example_inputs_are_left_out_with_a_warning(dialect: str) -> None:
    example = {"x": FEED, "mask": FEED[:, :2], "labels": LABELS}
    with pytest.warns(UserWarning, match="labels would make Masked compute a loss, and is left out of its inputs"):
        captured = capture(Masked().eval(), dialect, example_inputs=example)
    assert captured.signature.inputs == ("x", "mask")


def test_labels_that_forward_needs_are_inputs() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        captured = capture(NeedsLabels().eval(), "fx", example_inputs={"x": FEED, "labels": LABELS})
    assert captured.signature.inputs == ("x", "labels")
