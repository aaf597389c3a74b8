"""Curves between measurements, against the power laws that they come from."""

import pytest
import torch

from graphopt.numerics.power import power_between

AT = torch.tensor([0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.75], dtype=torch.float64)


@pytest.mark.parametrize("power", [1, 2, 3.5])
def test_a_power_law_is_met_everywhere(power: float) -> None:
    xs = [0.25, 0.5, 0.75]
    found = power_between(xs, [7 * x**power for x in xs], AT)
    torch.testing.assert_close(found, 7 * AT**power, rtol=1e-12, atol=0)


def test_what_falls_or_is_flat_does_no_less() -> None:
    found = power_between([0.25, 0.5, 0.75], [4.0, 2.0, 8.0], AT)
    expected = torch.tensor([0.0, 1.6, 4.0, 4.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(found[:5], expected, rtol=1e-12, atol=0)
    assert 4 < found[5] < found[6] and found[6] == pytest.approx(8)


def test_nothing_until_something() -> None:
    found = power_between([0.25, 0.5, 0.75], [0.0, 0.0, 1.0], AT)
    assert (found[:5] < 1e-300).all() and found[6] == pytest.approx(1) and torch.isfinite(found).all()


def test_refuses() -> None:
    for xs in ([0.5], [0.5, 0.5], [0.0, 0.5]):
        with pytest.raises(ValueError, match="xs must rise from above 0, and be at least 2"):
            power_between(xs, [1.0] * len(xs), AT[:1])
    with pytest.raises(ValueError, match=r"points must lie in \[0, 0.5\]"):
        power_between([0.25, 0.5], [1.0, 2.0], AT)
