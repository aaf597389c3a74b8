"""The least that products take, by class, on a machine whose limits are given."""

from __future__ import annotations

import pytest
import torch

from graphopt.lowering.roofline import least_seconds
from graphopt.measure.limits import Limits
from tests.language import build

LIMITS = Limits({"float32": 1e9, "int8": 4e9}, bandwidth=1e12, threads=1)


def test_products_take_their_multiply_adds(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[4,16], W[8,16])")
    least = least_seconds(graph, {"x": torch.ones(4, 16)}, LIMITS)
    assert least == pytest.approx({"float32": 4 * 8 * 16 / 1e9})
    assert least_seconds(graph, {"x": torch.ones(4, 16)}, LIMITS, "bfloat16") == {"bfloat16": least["float32"]}


def test_weights_take_their_bytes(dialect: str) -> None:
    graph = build(dialect, "y = linear(x[4,16], W[8,16])")
    slow = Limits({"float32": 1e12}, bandwidth=1e6, threads=1)
    assert least_seconds(graph, {"x": torch.ones(4, 16)}, slow) == pytest.approx({"float32": 4 * 8 * 16 / 1e6})
