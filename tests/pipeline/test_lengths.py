"""Batches of tokens at other lengths: rows joined and cut, without padding, and no token made up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.capture.sources import Declared
from graphopt.dialects.onnx.graph import OnnxGraph
from graphopt.ir.graph import Graph
from graphopt.numerics.observe import MinMax
from graphopt.passes import Quantize
from graphopt.pipeline import lengths
from graphopt.pipeline.calibration import Calibration, Remembered
from tests.language import build, run

INPUTS = (
    Declared("ids", ("batch", "seq"), torch.int64),
    Declared("types", ("batch", "seq"), torch.int64),
    Declared("mask", ("batch", "seq"), torch.int64),
)
POSITIONS = 64
TEXT = """
    t = embedding(T[50,8], ids[batch,seq]:int64)
    k = embedding(K[2,8], types[batch,seq]:int64)
    y = linear(add(t, k), W[8,8])
    m = add(mask[batch,seq]:int64, mask)
    return y, m
"""


def padded(*rows: list[int], left: bool = False) -> dict[str, Tensor]:
    """A batch of rows of ids; types are their parities."""
    length = max(map(len, rows))

    def column(values: list[list[int]]) -> Tensor:
        return torch.tensor([[0] * (length - len(one)) + one if left else one + [0] * (length - len(one))
                             for one in values])  # fmt: skip

    return {
        "ids": column(list(rows)), "types": column([[one % 2 for one in row] for row in rows]),
        "mask": column([[1] * len(row) for row in rows]),
    }  # fmt: skip


ROWS = st.lists(st.lists(st.integers(1, 49), min_size=1, max_size=9), min_size=1, max_size=30)


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, size=st.integers(1, 8), left=st.booleans(), times=st.sampled_from([2, 4, 16]))
def test_joined_rows_are_those_tokens_in_order(rows: list[list[int]], size: int, left: bool, times: int) -> None:
    batches = [padded(*rows[start : start + size], left=left) for start in range(0, len(rows), size)]
    found = lengths.joined(lengths.first_rows(batches, INPUTS, 1000), times)
    whole = [token for row in rows for token in row]
    ids = [one["ids"].tolist() for one in found]
    assert [token for row in ids for token in row] == whole[: sum(map(len, ids))]
    assert len(found) == (len(rows) // min(times, len(rows)) if len(rows) > 1 else 0)
    for one in found:
        assert bool(one["mask"].all()) and one["types"].tolist() == [token % 2 for token in one["ids"].tolist()]


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, most=st.integers(1, 200), least=st.integers(1, 20))
def test_what_does_not_fit_is_cut_to_a_power_of_two(rows: list[list[int]], most: int, least: int) -> None:
    joined = lengths.joined(lengths.first_rows([padded(*rows)], INPUTS, 1000), 4)
    found = lengths.fitting(joined, least=least, fits=lambda feeds: feeds["ids"].shape[1] <= most)
    given_ = min((len(row["ids"]) for row in joined), default=0)
    wanted = given_ if given_ <= most else 1 << most.bit_length() - 1
    if not joined or wanted < least:
        assert found == []
    else:
        (batch,) = found
        assert batch["ids"].shape[1] == wanted and bool(batch["mask"].all())


def test_rows_are_joined_to_what_the_positions_allow() -> None:
    graph = positions()
    rows = [[1 + (start + place) % 49 for place in range(6)] for start in range(40)]
    found = lengths.at_other_lengths([padded(*rows)], graph)
    assert found is not None and [list(feeds["ids"].shape) for feeds in found.batches] == [[10, 24], [2, 64]]
    assert found.note == (
        "calibrated at other lengths too: rows of 6 tokens were joined to 24 (10 rows), joined to 64 (2 rows)"
    )


def positions() -> Graph:
    """A model that has a table of POSITIONS positions."""
    graph = build("onnx", TEXT)
    assert isinstance(graph, OnnxGraph)
    y, mask = graph.outputs
    table = graph.add_constant(torch.zeros(POSITIONS, 8))
    counted = graph.emit("onnx.CumSum", graph.emit("onnx.Sign", graph.inputs[0]), graph.add_constant(torch.tensor(1)))
    places = graph.emit("sub", counted, graph.add_constant(torch.tensor(1)))
    summed = graph.emit("add", y, graph.emit("embedding", table, places))
    graph.set_outputs({"y": summed, "m": mask})
    return graph


def test_long_rows_are_cut_too() -> None:
    rows = [[1 + (start + place) % 49 for place in range(40 + start)] for start in range(3)]
    found = lengths.at_other_lengths([padded(*rows)], build("onnx", TEXT))
    assert found is not None
    assert [list(feeds["ids"].shape) for feeds in found.batches] == [[1, 123], [3, 10]]
    assert "cut to 10 (3 rows)" in found.note and found.batches[1]["ids"].tolist() == [row[:10] for row in rows]


def test_a_fixed_batch_gets_batches_of_its_size() -> None:
    rows = [{"ids": torch.arange(5)} for _ in range(5)]
    assert [list(feeds["ids"].shape) for feeds in lengths.in_batches(rows, 4, 2)] == [[2, 4], [2, 4]]
    assert lengths.in_batches(rows, 4, 6) == []


def test_a_decoder_is_cut_by_the_same_share() -> None:
    rows = [{"ids": torch.arange(8), "decoder": torch.arange(4)}, {"ids": torch.arange(9), "decoder": torch.arange(5)}]
    (batch,) = lengths.in_batches(rows, 4)
    assert {name: list(tensor.shape) for name, tensor in batch.items()} == {"ids": [2, 4], "decoder": [2, 2]}


@pytest.mark.parametrize(
    "text",
    [
        "y = linear(x[batch,8], W[4,8])",
        "y = embedding(T[9,4], ids[batch,7]:int64)",
        "y = linear(embedding(T[9,4], ids[batch,seq]:int64), W[4,4])\nz = add(x[batch,seq], x)\nreturn y, z",
    ],
)
def test_what_takes_no_tokens_is_left_alone(dialect: str, text: str) -> None:
    assert not lengths.takes_tokens(build(dialect, text))


# --- what quantize makes of it ----------------------------------------------------------------------------------------


def test_static_ranges_are_calibrated_at_other_lengths(dialect: str) -> None:
    graph = build(dialect, TEXT)
    batches = [padded([1, 2, 3], [4, 5, 6, 7]), padded([8, 9])]
    (note,) = [one for one in run(Quantize(scheme="static"), graph, calibration=batches).record.notes if "other" in one]
    assert note == "calibrated at other lengths too: rows of 2 to 4 tokens were joined to 9 (1 rows)"


def test_other_lengths_are_made_once(dialect: str) -> None:
    """For all who ask: calibrating, with a graph that passes have changed, and the report, with the original."""
    graph, read = build(dialect, TEXT), list[int]()

    class Source:
        def __iter__(self) -> Iterator[Any]:
            read.append(0)
            yield padded([1, 2, 3], [4, 5, 6, 7])

    calibration = Calibration(Source(), graph.inputs)
    found = calibration.at_other_lengths(graph)
    assert found is not None and Remembered(calibration).at_other_lengths(graph.clone()) is found
    assert calibration.followed_by(found.batches).at_other_lengths(graph) is found
    assert len(read) == 1


@pytest.mark.parametrize("options", [{"scheme": "dynamic"}, {"scheme": "weight-only"}])
def test_other_schemes_are_not(options: dict[str, Any]) -> None:
    context = run(Quantize(**options), build("onnx", TEXT), calibration=[padded([1, 2, 3], [4, 5, 6, 7])])
    assert not [one for one in context.record.notes if "lengths" in one]


def test_a_generator_is_left_alone_and_said_so() -> None:
    graph = build("onnx", TEXT)
    once = Calibration(iter([padded([1, 2, 3], [4, 5, 6, 7])]), graph.inputs)
    context = run(Quantize(scheme="static", smooth=False, rounding="nearest", bias_correction=False), graph,
                  calibration=once)  # fmt: skip
    assert "calibrated at the lengths of the batches alone: a generator gives them once" in context.record.notes


def test_further_batches_follow_and_statistics_are_kept_apart() -> None:
    graph = build("onnx", TEXT)
    first, second = padded([1, 2, 3]), padded([40, 41, 42, 43])
    kept = Remembered(Calibration([first], graph.inputs))
    both = kept.followed_by([second])
    assert (kept.count, both.count) == (1, 2) and [feeds["ids"].tolist() for feeds in both][1] == second["ids"].tolist()
    value = graph.sites("linear")[0].input
    (alone,), (together,) = (list(one.observe(graph, [(value, MinMax())])) for one in (kept, both))
    (again,) = list(kept.observe(graph, [(value, MinMax())]))
    assert alone is again and together.count == alone.count + 4 * 8
