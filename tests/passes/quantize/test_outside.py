"""Example inputs that leave the ranges which calibration saw are named; those inside are not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import graphopt
from graphopt.passes import Quantize
from graphopt.passes.quantize.ranges import OUTSIDE
from graphopt.pipeline.calibration import Calibration
from graphopt.pipeline.context import Context
from graphopt.pipeline.runner import run_pass
from graphopt.report.records import Report
from tests.language import build

TEXT = """
    a = linear(x[batch,8], W[8,8]:seed1)
    y = linear(relu(a), V[4,8]:seed2)
"""
BATCH = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def warnings(dialect: str, *examples: dict[str, torch.Tensor], text: str = TEXT, made_up: bool = False) -> list[str]:
    """What `quantize`, calibrated on BATCH, says of these example inputs."""
    graph = build(dialect, text)
    given = [{"x": BATCH} if text == TEXT else {"x": BATCH[None], "mask": torch.ones(1, 16, dtype=torch.int64)}]
    context = Context(feeds=examples, calibration=Calibration(given, graph.inputs), made_up=made_up)
    run_pass(Quantize(scheme="static"), graph, context)
    return [note for note in context.record.notes if note.startswith("warning: the example input")]


@settings(max_examples=10, deadline=None)
@given(factor=st.floats(0.1, 20.0))
def test_an_example_is_named_if_it_leaves_a_range(factor: float) -> None:
    low, high = float(BATCH.min()), float(BATCH.max())
    span = (max(high, factor * high) - min(low, factor * low)) / (high - low)
    assume(abs(span - OUTSIDE) > 0.01)
    told = warnings("onnx", {"x": factor * BATCH})
    assert len(told) == (span > OUTSIDE)
    if told:
        assert "x [16, 8] leaves the calibrated ranges of" in told[0] and f"({span:.3g} times the range)" in told[0]


def test_each_example_is_told_by_its_shape(dialect: str) -> None:
    told = warnings(dialect, {"x": BATCH[:4]}, {"x": 9 * BATCH[:3]}, {"x": 5 * BATCH[:5]})
    assert [note.split(" leaves")[0] for note in told] == [
        "warning: the example input x [3, 8]", "warning: the example input x [5, 8]"
    ]  # fmt: skip
    assert all("2 of 2 activations: " in note and note.endswith("or use scheme=dynamic") for note in told)


def test_padding_of_an_example_is_left_out() -> None:
    text = "y = linear(x[batch,seq,8], W[8,8]:seed1)\nm = add(mask[batch,seq]:int64, mask)\nreturn y, m"
    padded = torch.cat([BATCH[:1], torch.full((1, 8), 1e6)])[None]
    assert warnings("onnx", {"x": padded, "mask": torch.tensor([[1, 0]])}, text=text) == []
    assert len(warnings("onnx", {"x": padded, "mask": torch.tensor([[1, 1]])}, text=text)) == 1


def test_inputs_that_nobody_gave_are_not_told() -> None:
    assert warnings("onnx", {"x": 100 * BATCH}, made_up=True) == []


def test_the_report_has_a_row_for_each_shape(tmp_path: Path) -> None:
    build("onnx", TEXT).save(tmp_path / "model.onnx")
    examples = [BATCH[:4], 30 * BATCH[:3], BATCH[4:8]]
    small = graphopt.optimize(
        tmp_path / "model.onnx", "quantize{scheme=static}", calibration=[BATCH], example_inputs=examples, measure=False
    )
    report = small.report
    assert list(report.agreement_by_shapes) == ["x [4, 8]", "x [3, 8]"]
    near, far = (one.sqnr for (one,) in report.agreement_by_shapes.values())
    assert near > far + 10 and report.agreement[0].sqnr == far
    rows = [line.split() for line in str(report).splitlines() if "x [" in line and "dB" in line]
    assert [row[:4] for row in rows] == [["y", "x", "[4,", "8]"], ["y", "x", "[3,", "8]"]]
    assert "warning: the example input x [3, 8] leaves" in " ".join(str(small).split())
    assert [*report.to_dict()["agreement_by_shapes"]] == ["x [4, 8]", "x [3, 8]"]
    assert "inputs" not in str(Report(agreement=report.agreement)).split()


def test_a_file_without_examples_is_not_warned_of(tmp_path: Path) -> None:
    build("onnx", TEXT).save(tmp_path / "model.onnx")
    tiny = (1e-3 * BATCH for _ in range(1))  # a generator is not read for examples
    once = "quantize{scheme=static rounding=nearest smooth=false bias_correction=false}"
    small = graphopt.optimize(tmp_path / "model.onnx", once, calibration=tiny, measure=False)
    assert not [note for one in small.report.passes for note in one.notes if "leaves the calibrated" in note]


@pytest.mark.parametrize(("example", "times"), [(0.0, None), (2.0, math.inf)])
def test_a_range_of_one_number(example: float, times: float | None) -> None:
    graph = build("onnx", "y = linear(x[batch,8], W[8,8]:seed1)")
    calibration = Calibration([{"x": torch.zeros(4, 8)}], graph.inputs)
    context = Context(feeds=[{"x": torch.full((2, 8), example)}], calibration=calibration)
    run_pass(Quantize(scheme="static"), graph, context)
    told = [note for note in context.record.notes if note.startswith("warning: the example input")]
    assert len(told) == (times is not None) and all(f"({times} times the range)" in note for note in told)
