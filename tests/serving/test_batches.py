"""What is measured of batches: how inputs may be padded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest.mock import Mock

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from graphopt.serving.batches import measured_padding
from graphopt.serving.golden import Case
from graphopt.serving.manifest import TensorSpec

Arrays = Mapping[str, NDArray[Any]]
INPUTS = (TensorSpec("mask", "int64", ("batch", "seq")),)
OUTPUTS = (TensorSpec("sum", "float32", ("batch", 1)),)


def summed(inputs: Arrays) -> dict[str, NDArray[Any]]:
    return {"sum": inputs["mask"].sum(1, keepdims=True).astype(np.float32)}


def cases(*lengths: int) -> list[Case]:
    made = [{"mask": np.ones((1, length), np.int64)} for length in lengths]
    return [Case(one, summed(one)) for one in made]


@given(st.lists(st.integers(0, 40), max_size=4), st.none() | st.integers(1, 60))
def test_padding_that_no_case_was_tried_with_is_not_measured(lengths: list[int], most: int | None) -> None:
    found = measured_padding(summed, cases(*lengths), INPUTS, OUTPUTS, 0, most)
    run = Mock(side_effect=summed)
    measured_padding(run, cases(*lengths), INPUTS, OUTPUTS, 0, most)
    assert found is not None
    assert (found.sqnr is not None) == found.invariant == run.called


def test_padding_that_the_engine_does_not_take_is_not_measured() -> None:
    def fixed(inputs: Arrays) -> dict[str, NDArray[Any]]:
        if inputs["mask"].shape[1] != 4:
            raise ValueError("this engine takes 4 tokens")
        return summed(inputs)

    found = measured_padding(fixed, cases(4), INPUTS, OUTPUTS, 0, None)
    assert found is not None and (found.invariant, found.sqnr) == (False, None)
