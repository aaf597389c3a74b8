"""What a batch becomes: feeds by input name, labels, and the user's own batch beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers import BatchEncoding

from graphopt.capture.sources import Declared
from graphopt.errors import UsageError
from graphopt.pipeline.batches import SAMPLES, Batch, Batches

X = (Declared("x", ("batch", 3), torch.float32),)
TOKENS = (
    Declared("input_ids", ("batch", "seq"), torch.int64),
    Declared("attention_mask", ("batch", "seq"), torch.int64),
)
FEED = torch.arange(6.0).reshape(2, 3)
LABELS = torch.tensor([0, 1])
IDS, MASK = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
ENCODING = {"input_ids": IDS, "attention_mask": MASK}


def only(source: Any, inputs: tuple[Declared, ...] = X) -> Batch:
    (batch,) = Batches(source, inputs, name="training").with_batches()
    return batch


# --- labels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch",
    [
        (FEED, LABELS),
        [FEED, LABELS],
        (FEED.numpy(), [0, 1]),
        ({"x": FEED}, LABELS),
        ({"x": FEED, "target": LABELS + 7}, LABELS),
        ({"x": FEED, "label": LABELS},),
        *({"x": FEED, name: LABELS.numpy(), "idx": [5, 6]} for name in ("labels", "label", "targets", "target")),
        {"x": FEED, "label": LABELS + 7, "labels": LABELS},
        {"x": FEED, "labels": [0, 1], "text": ["a", "b"]},
    ],
)
def test_labels_of_a_batch(batch: Any) -> None:
    found = only([batch])
    assert list(found.feeds) == ["x"] and torch.equal(found.feeds["x"], FEED)
    assert torch.equal(found.labels, LABELS)
    assert found.raw is batch


def test_a_data_loader_gives_inputs_then_labels() -> None:
    loader = DataLoader(TensorDataset(FEED, LABELS), batch_size=2)
    assert torch.equal(only(loader).labels, LABELS)
    tokens = DataLoader(TensorDataset(IDS, MASK, LABELS), batch_size=2)
    batches = Batches(tokens, TOKENS, name="training")
    (found,) = batches.with_batches()
    assert torch.equal(found.feeds["attention_mask"], MASK) and torch.equal(found.labels, LABELS)
    assert batches.note == (
        "training batches hold 3 tensors: the first 2 are inputs input_ids, attention_mask, the rest are labels"
    )


def test_several_labels_stay_several() -> None:
    found = only([(FEED, LABELS, FEED)])
    assert isinstance(found.labels, tuple) and torch.equal(found.labels[1], FEED)
    answers = {"start_positions": [0, 1], "end_positions": LABELS, "offset_mapping": [[0], [1]]}
    found = only([ENCODING | answers], TOKENS)
    assert {name: label.tolist() for name, label in found.labels.items()} == {
        "start_positions": [0, 1],
        "end_positions": [0, 1],
    }
    assert only([{"x": FEED, "label_ids": LABELS}]).labels.tolist() == [0, 1]


def test_what_is_an_input_is_no_label() -> None:
    inputs = (*X, Declared("labels", ("batch",), torch.int64))
    assert only([{"x": FEED, "labels": LABELS}], inputs).labels is None


@pytest.mark.parametrize("batch", [FEED, {"x": FEED}, (FEED,), {"x": FEED, "text": ["a", "b"], "position": [1, 2]}])
def test_there_may_be_no_labels(batch: Any) -> None:
    batches = Batches([batch], X)
    assert [found.labels for found in batches.with_batches()] == [None]
    assert batches.note is None


def test_labels_that_are_no_numbers_stay_as_they_are() -> None:
    assert only([{"x": FEED, "label": ["good", "bad"]}]).labels == ["good", "bad"]
    boxes = [{"boxes": FEED}, {"boxes": FEED}]
    assert only([(FEED, boxes)]).labels is boxes


def test_labels_of_doubles_become_floats() -> None:
    assert only([(FEED, np.array([0.5, 1.5]))]).labels.dtype == torch.float32


def test_rows_and_their_labels_get_a_batch_axis() -> None:
    class Rows:  # as a Hugging Face dataset is iterated
        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Iterator[dict[str, Any]]:
            for ids, mask, label in zip(IDS, MASK, LABELS, strict=True):
                yield {"input_ids": ids, "attention_mask": mask, "label": label, "sentence": "a b"}

    batches = Batches(Rows(), TOKENS)
    first, second = batches.with_batches()
    assert batches.count == 2
    assert first.feeds["input_ids"].shape == (1, 3) and second.labels.tolist() == [1]


def test_encodings_of_transformers() -> None:
    encoding = BatchEncoding(ENCODING | {"labels": LABELS})
    assert torch.equal(only([encoding], TOKENS).labels, LABELS)
    assert torch.equal(only([(BatchEncoding(ENCODING), LABELS)], TOKENS).labels, LABELS)
    assert torch.equal(only(encoding, TOKENS).feeds["input_ids"], IDS)  # arrays by name, all in one


def test_stacked_labels_are_cut_with_the_inputs() -> None:
    total = 2 * SAMPLES + 1
    stacked = {"x": np.zeros((total, 3)), "labels": np.arange(total), "names": [str(i) for i in range(total)], "n": 3}
    found = list(Batches(stacked, X).with_batches())
    assert torch.equal(torch.cat([batch.labels for batch in found]), torch.arange(total))
    assert found[-1].raw["names"] == [str(total - 1)] and "n" not in found[0].raw


# --- counting, and asking again ------------------------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield FEED


class Numbers(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from torch.arange(24.0).reshape(8, 3)


def test_a_loader_of_a_stream_is_read_in_parts() -> None:
    """Its batch sampler has no say over what it reads."""
    whole = Batches(DataLoader(Numbers(), batch_size=2), X)
    parts = [[feeds["x"] for feeds in whole.part(index, 2)] for index in (0, 1)]
    read = torch.cat([parts[0][0], parts[1][0], parts[0][1], parts[1][1]])
    torch.testing.assert_close(read, torch.arange(24.0).reshape(8, 3))


def test_count() -> None:
    assert Batches([FEED] * 5, X).count == 5
    assert Batches([FEED] * 5, X, steps=2).count == 2
    assert Batches(iter([FEED]), X).count is None
    stream = Batches(DataLoader(Stream(), batch_size=None), X)
    assert stream.count is None and len(list(stream)) == 1


def test_an_iterable_that_is_used_up_is_told_from_an_empty_one() -> None:
    class Once:
        def __init__(self) -> None:
            self.rows = iter([FEED])

        def __iter__(self) -> Iterator[Any]:
            yield from self.rows

    batches = Batches(Once(), X, name="training")
    assert len(list(batches)) == 1
    with pytest.raises(UsageError, match=r"training holds no batch .*used up before"):
        list(batches)


# --- what it refuses -----------------------------------------------------------------------------------------------


def failing() -> Iterator[Tensor]:
    yield FEED
    raise OSError(5, "the disk is gone")


@pytest.mark.parametrize(
    ("source", "inputs", "message"),
    [
        ([FEED, {"y": FEED}], X, "training batch 1 has no 'x'; there are y"),
        ([({"y": FEED}, LABELS)], X, "training batch 0 has no 'x'; there are y"),
        ([(FEED, LABELS), (FEED * np.nan, LABELS)], X, "training batch 1, input 'x' holds 6 NaN"),
        ([(IDS,)], TOKENS, "training batch 0 holds 1 tensor, and the model has the inputs input_ids, attention_mask"),
        ([()], X, "training batch 0 holds 0 tensors, and the model has the inputs x; give a dict"),
        ([(FEED.tolist(), LABELS)], X, "training batch 0 holds 2 tensors, and the model has the inputs x; give a dict"),
        ([(LABELS, FEED)], X, "training batch 0, input 'x' has shape [1, 2], and the model takes [batch, 3]"),
        ([], X, "training holds no batch"),
        (TensorDataset(FEED), X, "not a TensorDataset; a dataset of rows goes into a torch.utils.data.DataLoader"),
        ({"x": FEED, "labels": [1]}, X, "training: 'labels' holds 1 labels, for 2 samples"),
        ({"x": FEED, "labels": 1}, X, "training: 'labels' holds no labels, for 2 samples"),
        (FEED, TOKENS, "training is one array"),
        (failing(), X, "your training batches failed: OSError: the disk is gone"),
    ],
)
def test_refuses(source: Any, inputs: tuple[Declared, ...], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        list(Batches(source, inputs, name="training"))
    assert message in str(caught.value)


def test_refuses_what_is_no_number_of_steps() -> None:
    with pytest.raises(UsageError, match="training_steps is 0; give a whole number, at least 1"):
        Batches([FEED], X, name="training", steps=0)


# --- any form gives the same ---------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 4),
    form=st.sampled_from(["dict", "tuple", "list", "nested", "encoding"]),
    numpy=st.booleans(),
    label=st.sampled_from(["labels", "label", "targets", "target"]),
)
def test_every_form_of_a_batch_gives_the_same_feeds_and_labels(rows: int, form: str, numpy: bool, label: str) -> None:
    ids = torch.arange(rows * 3).reshape(rows, 3)
    mask, labels = ids % 2, torch.arange(rows)
    a, b, y = ((ids, mask, labels), (ids.numpy(), mask.numpy(), labels.numpy()))[numpy]
    named = {"attention_mask": b, "input_ids": a}
    batch: Any = {
        "dict": named | {label: y},
        "tuple": (a, b, y),
        "list": [a, b, y],
        "nested": (named, y),
        "encoding": (BatchEncoding(named), y),
    }[form]
    found = only([batch], TOKENS)
    assert list(found.feeds) == ["input_ids", "attention_mask"]
    assert torch.equal(found.feeds["input_ids"], ids) and torch.equal(found.feeds["attention_mask"], mask)
    assert torch.equal(found.labels, labels)


def test_tensors_of_inference_mode_can_be_trained_on() -> None:
    with torch.inference_mode():
        x, labels = torch.ones(2, 3), torch.zeros(2)
    (batch,) = Batches([(x, labels)], X).with_batches()
    weight = torch.ones(3, requires_grad=True)
    ((batch.feeds["x"] @ weight - batch.labels) ** 2).sum().backward()
    assert weight.grad is not None


def test_inputs_within_lists_dicts_and_tuples_are_taken_apart() -> None:
    inputs = [Declared(name, ("n", 3), torch.float32) for name in ("x", "past.0.0", "past.0.1")]
    past, labels = [(FEED + 1, FEED + 2)], [{"boxes": FEED}]
    for raw in (
        {"x": FEED, "past": past, "labels": labels}, ({"x": FEED, "past": past}, labels), (FEED, past, labels),
        {"x": FEED, "past.0.0": FEED + 1, "past.0.1": FEED + 2, "labels": labels},
    ):  # fmt: skip
        (batch,) = Batches([raw], inputs).with_batches()
        assert [float(tensor[0, 0] - FEED[0, 0]) for tensor in batch.feeds.values()] == [0, 1, 2]
        assert batch.labels == labels
