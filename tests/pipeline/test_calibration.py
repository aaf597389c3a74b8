"""What calibration takes as batches, what it refuses, and the ranges it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from graphopt.capture.sources import Declared
from graphopt.errors import PassError, UsageError
from graphopt.numerics.observe import MinMax
from graphopt.pipeline.batches import SAMPLES
from graphopt.pipeline.calibration import Calibration, NotFinite
from graphopt.pipeline.instruments import Instrument
from graphopt.pipeline.runner import run_pass
from graphopt.report.records import PassRecord
from tests.language import build

X = (Declared("x", ("batch", 3), torch.float32),)
TOKENS = (
    Declared("input_ids", ("batch", "seq"), torch.int64),
    Declared("attention_mask", ("batch", "seq"), torch.int64),
)


def shapes(calibration: Calibration) -> list[list[int]]:
    return [list(next(iter(feeds.values())).shape) for feeds in calibration]


# --- what it takes -------------------------------------------------------------------------------------------------


class Reader:
    """An ONNX Runtime CalibrationDataReader."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self.batches, self.position = batches, 0

    def get_next(self) -> dict[str, Any] | None:
        self.position += 1
        return self.batches[self.position - 1] if self.position <= len(self.batches) else None


class Rewindable(Reader):
    def rewind(self) -> None:
        self.position = 0


BATCH = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize(
    "batches",
    [
        [BATCH],
        [torch.from_numpy(BATCH)],
        [{"x": BATCH}],
        [(BATCH,)],
        [[torch.from_numpy(BATCH)]],
        [{"x": BATCH.astype(np.float64)}],
        [{"x": BATCH.tolist(), "label": [0, 1]}],
        {"x": BATCH},
        BATCH,
        torch.from_numpy(BATCH),
        DataLoader(TensorDataset(torch.from_numpy(BATCH)), batch_size=2),
        Reader([{"x": BATCH}]),
        Rewindable([{"x": BATCH}]),
        (batch for batch in [BATCH]),
    ],
    ids=lambda batches: type(batches).__name__,
)
def test_takes(batches: Any) -> None:
    (feeds,) = Calibration(batches, X)
    assert list(feeds) == ["x"]
    assert feeds["x"].dtype == torch.float32
    assert torch.equal(feeds["x"], torch.from_numpy(BATCH))


def test_rows_of_a_dataset_get_a_batch_axis() -> None:
    long = {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 0], "text": "a b"}
    rows = [long, {"input_ids": [4], "attention_mask": [1]}]
    first, second = Calibration(rows, TOKENS)
    assert first["input_ids"].tolist() == [[1, 2, 3]] and second["attention_mask"].tolist() == [[1]]


def test_integer_casts_that_keep_values_are_silent() -> None:
    given = {"input_ids": np.array([[1, 2]], dtype=np.int32), "attention_mask": np.array([[True, False]])}
    (feeds,) = Calibration([given], TOKENS)
    assert feeds["input_ids"].dtype == feeds["attention_mask"].dtype == torch.int64
    assert feeds["attention_mask"].tolist() == [[1, 0]]


def test_stacked_arrays_are_cut(tmp_path: Path) -> None:
    np.savez(tmp_path / "calibration.npz", x=np.zeros((2 * SAMPLES + 1, 3), np.float32))
    with np.load(tmp_path / "calibration.npz") as archive:
        assert shapes(Calibration(archive, X)) == [[SAMPLES, 3], [SAMPLES, 3], [1, 3]]
    fixed = (Declared("x", (2, 3), torch.float32),)
    assert shapes(Calibration({"x": np.zeros((4, 3), np.float32)}, fixed)) == [[2, 3], [2, 3]]


def test_steps_limit_the_batches() -> None:
    assert len(shapes(Calibration([BATCH] * 5, X, calibration_steps=2))) == 2


def test_lists_and_rewindable_readers_serve_twice() -> None:
    for batches in ([BATCH], Rewindable([{"x": BATCH}]), {"x": BATCH}):
        calibration = Calibration(batches, X)
        assert shapes(calibration) == shapes(calibration) == [[2, 3]]
        assert not calibration.once


# --- what it refuses -----------------------------------------------------------------------------------------------


def endless() -> Iterator[np.ndarray[Any, Any]]:
    while True:
        yield BATCH


@pytest.mark.parametrize(
    ("batches", "inputs", "message"),
    [
        ([], X, "calibration holds no batch"),
        (iter([]), X, "used up before? pass a list or a DataLoader"),
        ({"x": np.zeros((0, 3), np.float32)}, X, "calibration holds no batch"),
        ([BATCH, {"y": BATCH}], X, "calibration batch 1 has no 'x'; there are y"),
        ([{"imput_ids": [[1]], "attention_mask": [[1]]}], TOKENS, "has no 'input_ids'; did you mean 'imput_ids'?"),
        ([BATCH.tolist()], X, "calibration batch 0 holds 2 tensors, and the model has the inputs x"),
        ([BATCH[:, :2]], X, "calibration batch 0, input 'x' has shape [2, 2], and the model takes [batch, 3]"),
        ([BATCH[0, 0]], X, "has shape [], and the model takes [batch, 3]"),
        ([BATCH.astype(np.int64)], X, "input 'x' holds int64, and the model takes float32"),
        ([{"input_ids": [[0.5]], "attention_mask": [[1]]}], TOKENS, "'input_ids' holds float32, and the model takes i"),
        ([{"x": [[1.0, 2.0, 3.0], [1.0]]}], X, "calibration batch 0, input 'x': a list is not an array of numbers"),
        ([{"x": "text"}], X, "a str is not an array of numbers"),
        ([BATCH, BATCH * np.nan], X, "calibration batch 1, input 'x' holds 6 NaN"),
        ("calibration.npz", X, "must be an iterable of batches, not a str"),
        (3, X, "must be an iterable of batches, not a int"),
        (BATCH, TOKENS, "the model has the inputs input_ids, attention_mask; give a dict of arrays"),
        ({"y": BATCH}, X, "calibration has no 'x'"),
        ({"x": np.float32(1)}, X, "axis 0 must hold the same number of samples"),
        (
            {"input_ids": np.ones((2, 4), np.int64), "attention_mask": np.ones((3, 4), np.int64)},
            TOKENS,
            "the same number of samples in every array, not {'input_ids': 2, 'attention_mask': 3}",
        ),
        ({"x": BATCH}, (Declared("x", (4, 3), torch.float32),), "2 samples cannot be cut into batches of 4"),
    ],
)
def test_refuses(batches: Any, inputs: tuple[Declared, ...], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        list(Calibration(batches, inputs))
    assert message in str(caught.value)


def test_refuses_integers_that_do_not_fit() -> None:
    narrow = (Declared("ids", ("batch",), torch.int32),)
    with pytest.raises(UsageError, match="holds int64, and the model takes int32"):
        list(Calibration([{"ids": np.array([2**40])}], narrow))


def test_a_generator_serves_once() -> None:
    calibration = Calibration(endless(), X, calibration_steps=1)
    assert calibration.once and len(list(calibration)) == 1
    with pytest.raises(UsageError, match="a generator gives them once; pass a list or a DataLoader"):
        next(iter(calibration))


@pytest.mark.parametrize("steps", [0, 1.5, True, "2"])
def test_refuses_what_is_no_number_of_steps(steps: Any) -> None:
    with pytest.raises(UsageError, match=f"calibration_steps is {steps!r}; give a whole number, at least 1"):
        Calibration([BATCH], X, calibration_steps=steps)


def test_watchers_are_told_of_each_batch(dialect: str) -> None:
    told: list[Any] = []

    class Watcher(Instrument):
        @contextmanager
        def watch(self, what: str, steps: int | None) -> Iterator[Callable[[str], None]]:
            told.append((what, steps))
            yield told.append

    graph = build(dialect, "y = relu(x[batch,3])")
    for batches, steps in (([BATCH] * 3, 2), ((BATCH for _ in range(2)), None)):
        wanted = [(value, MinMax()) for value in (graph.inputs[0], graph.outputs[0])]
        list(Calibration(batches, graph.inputs, steps, [Watcher()]).observe(graph, wanted))
    assert told == [("calibration", 2), "batch 0", "batch 1", ("calibration", None), "batch 0", "batch 1"]


# --- ranges --------------------------------------------------------------------------------------------------------


def ranges(graph: Any, batches: Any, *kinds: str) -> list[tuple[float, float]]:
    values = [graph.inputs[0], *(node.result for node in graph.nodes if node.kind in kinds)]
    observed = Calibration(batches, graph.inputs).observe(graph, [(value, MinMax()) for value in values])
    return [seen.range() for seen in observed]


def test_ranges_over_batches(dialect: str) -> None:
    graph = build(dialect, "y = mul(x[batch,2], SCALE[2]:values(2,-3))")
    assert ranges(graph, [torch.tensor([[1.0, 2.0]]), torch.tensor([[-4.0, 0.0], [0.5, 1.0]])], "mul") == [
        (-4.0, 2.0),
        (-8.0, 2.0),
    ]


def test_padding_is_left_out(dialect: str) -> None:
    graph = build(
        dialect,
        "h = mul(x[batch,seq,2], TWO[2]:values(2))\n"
        "flat = reshape(h, SHAPE[2]:values(-1,2):int64)\n"
        "y = relu(flat)\n"
        "m = cast(attention_mask[batch,seq]:int64, dtype=float32)\n"
        "return y, m",
    )
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [99.0, -99.0]]])
    batch = {"x": x, "attention_mask": torch.tensor([[1, 1, 0]])}
    assert ranges(graph, [batch], "mul", "reshape", "relu") == [(1.0, 4.0), (2.0, 8.0), (2.0, 8.0), (2.0, 8.0)]


def test_a_float_mask_hides_nothing() -> None:
    graph = build("onnx", "y = add(x[batch,seq], mask[batch,seq])")
    batch = {"x": torch.tensor([[1.0, 5.0]]), "mask": torch.tensor([[1.0, 0.0]])}
    assert ranges(graph, [batch]) == [(1.0, 5.0)]


def test_heads_are_no_tokens_even_in_equal_number() -> None:
    graph = build("onnx", "y = relu(x[batch,2,4])\nm = cast(mask[batch,seq]:int64, dtype=float32)\nreturn y, m")
    x = torch.arange(8.0).reshape(1, 2, 4)
    assert ranges(graph, [{"x": x, "mask": torch.tensor([[1, 0]])}], "relu") == [(0.0, 7.0), (0.0, 7.0)]


def test_a_position_counts_that_any_mask_keeps() -> None:
    text = "y = relu(x[batch,seq])\nm = add(mask_a[batch,seq]:int64, mask_b[batch,seq]:int64)\nreturn y, m"
    x, a, b = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1, 0, 0]]), torch.tensor([[0, 1, 0]])
    batch = {"x": x, "mask_a": a, "mask_b": b}
    assert ranges(build("onnx", text), [batch]) == [(1.0, 2.0)]


def test_an_activation_that_is_not_finite_names_its_node(dialect: str) -> None:
    graph = build(dialect, "h = div(ONE[2]:ones, x[batch,2])\ny = relu(h)")
    batches: list[Tensor] = [torch.ones(1, 2), torch.zeros(1, 2)]
    node = graph.sites("div")[0]
    with pytest.raises(NotFinite, match="calibration batch 1") as caught:
        list(Calibration(batches, graph.inputs).observe(graph, [(node.result, MinMax())]))
    assert caught.value.node == node.label


def test_a_pass_that_meets_one_is_reported_with_its_node() -> None:
    from graphopt.passes import Quantize
    from graphopt.pipeline.context import Context

    graph = build("onnx", "h = div(ONE[4]:ones, x[batch,4])\ny = linear(h, W[4,4])")
    context = Context(calibration=Calibration([torch.zeros(1, 4)], graph.inputs), record=PassRecord("", ""))
    with pytest.raises(PassError, match=r"pass quantize failed at .*calibration batch 0"):
        run_pass(Quantize(scheme="static"), graph, context)
