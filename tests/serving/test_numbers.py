"""Numbers that strangers send, and JSON that they read."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from graphopt.errors import UsageError
from graphopt.serving.numbers import array_of, json_bytes, reshaped
from graphopt.serving.tensors_v2 import DTYPES

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
NESTED = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4), max_leaves=12)
DTYPE = st.sampled_from(list(DTYPES.values()))


@settings(max_examples=40, deadline=None)
@given(NESTED, DTYPE)
def test_json_becomes_an_array_of_the_dtype_or_an_error(value: Any, dtype: np.dtype[Any]) -> None:
    try:
        array = array_of(value, dtype, "x")
    except UsageError as error:
        assert str(error).startswith("x ")
        return
    assert array.dtype == dtype
    if dtype.kind in "iu":
        assert array.tolist() == value


@settings(max_examples=40, deadline=None)
@given(arrays.arrays(DTYPE, arrays.array_shapes(max_dims=3, max_side=3)), DTYPE)
def test_no_number_changes_when_integers_change_their_width(array: Any, dtype: np.dtype[Any]) -> None:
    try:
        found = array_of(array, dtype, "x")
    except UsageError:
        return
    assert found.dtype == dtype and (dtype.kind == "f" or found.tolist() == array.tolist())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 2**40), max_size=70))
def test_any_shape_is_taken_or_refused(shape: list[int]) -> None:
    try:
        assert reshaped(np.zeros(0), shape, "x").shape == tuple(shape)
    except UsageError as error:
        assert str(error).startswith("x has ")


@settings(max_examples=40, deadline=None)
@given(st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12))
def test_answers_are_json_that_any_parser_reads(answer: Any) -> None:
    json.loads(json_bytes(answer), parse_constant=pytest.fail)


def test_integers_beyond_64_bits_are_floats() -> None:
    assert array_of([1, 2**70], np.dtype("float32"), "x").tolist() == [1.0, 2.0**70]
    with pytest.raises(UsageError, match="ragged"):
        array_of([10**400, 1], np.dtype("float32"), "x")
