"""Which candidates of a race fit into memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import UsageError
from graphopt.lowering.backend import Backend
from graphopt.racing.fitting import ASKED, PROCESS, UNCOMPRESSED, fitting
from tests.racing import fakes

AUTO = {"healthy": "auto", "rounding": "auto"}
HEALTHY, ROUNDING = fakes.Healthy(), fakes.Rounding()


def test_further_precisions_go_first_and_then_the_last_engines() -> None:
    def taken(processes: int) -> set[tuple[str, str, str]]:
        free = int(processes * PROCESS) + 1
        return set(fitting([ROUNDING, HEALTHY], AUTO, size=0, free=free, is_lossy=True).taken)

    of_rounding = {("rounding", model, "float32") for model in (ASKED, UNCOMPRESSED)}
    engines = of_rounding | {("healthy", model, "float32") for model in (ASKED, UNCOMPRESSED)}
    as_asked = ("rounding", ASKED, "bfloat16")
    assert [taken(processes) for processes in range(7)] == [
        set(), set(), of_rounding, of_rounding | {as_asked}, engines, engines | {as_asked},
        engines | {as_asked, ("rounding", UNCOMPRESSED, "bfloat16")},
    ]  # fmt: skip


def test_a_precision_that_was_asked_for_goes_with_its_engine() -> None:
    asked = {"rounding": "bfloat16"}
    none = fitting([ROUNDING], asked, size=0, free=int(2.5 * PROCESS), is_lossy=True)
    assert none.taken == ()
    assert none.note() == ("nothing was raced for want of memory (each candidate needs about 500 MB, and 1.25 GB are "
                           "free)")  # fmt: skip
    found = fitting([ROUNDING], asked, size=0, free=int(3.5 * PROCESS), is_lossy=True)
    assert found.taken[-1] == ("rounding", ASKED, "bfloat16") and found.left_out[0][1] == UNCOMPRESSED
    assert found.note() == ("left out for want of memory: rounding uncompressed bfloat16 (each candidate needs about "
                            "500 MB, and 1.75 GB are free)")  # fmt: skip


def test_an_engine_of_which_nothing_fits_says_so() -> None:
    found = fitting([ROUNDING, HEALTHY], AUTO, size=1e9, free=int(12e9), is_lossy=False)
    found.require("rounding")
    with pytest.raises(UsageError, match=r"want of memory: each candidate needs about 3\.00 GB, and 12\.0 GB are free"):
        found.require("healthy")


@given(
    st.lists(st.sampled_from([HEALTHY, ROUNDING]), unique=True, min_size=1), st.sampled_from(["auto", "bfloat16"]),
    st.floats(0, 1e10), st.none() | st.integers(0, 10**11), st.booleans(),
)  # fmt: skip
def test_what_fits_never_needs_more_than_is_free(
    engines: list[Backend], precision: str, size: float, free: int | None, is_lossy: bool
) -> None:
    found = fitting(engines, {"healthy": "auto", "rounding": precision}, size=size, free=free, is_lossy=is_lossy)
    everything = fitting(engines, {"healthy": "auto", "rounding": precision}, size=size, free=None, is_lossy=is_lossy)
    assert sorted(found.taken + found.left_out) == sorted(everything.taken) and not everything.left_out
    assert free is None or not found.taken or found.each * len(found.taken) < free
    assert (found.note() is None) == (not found.left_out)
    assert ("nothing was raced" in (found.note() or "")) == (not found.taken)
    if free is not None and free >= found.all + 1:
        assert not found.left_out
