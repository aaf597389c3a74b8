"""Whether what ships is as good as what was trained."""

from __future__ import annotations

import pytest

from graphopt.report.records import Shipped


@pytest.mark.parametrize(
    ("original", "trained", "shipped", "is_equal"),
    [
        (80.0, 90.0, 90.039, True),
        (80.0, 90.0, 90.041, False),  # the share is the original's, not that of what was trained
        (-2.0, -1.0, -1.0009, True),
        (-2.0, -1.0, -1.0011, False),
        (0.0, -4.0, -4.0019, True),
        (0.0, -4.0, -4.0021, False),
        (0.0, 0.0, 1e-9, False),
    ],
)
def test_the_last_two_differ_by_less_than_a_share(
    original: float, trained: float, shipped: float, is_equal: bool
) -> None:
    found = Shipped(original, trained, shipped)
    assert found.is_equal is is_equal
    assert str(found).startswith("warning: ") is not is_equal
