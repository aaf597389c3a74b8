"""When workers that end are started again."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.serving.server import LONGEST_WAIT, MOST_UNREADY, STEADY_SECONDS, Restarts

ENDS = st.lists(st.tuples(st.booleans(), st.floats(0, 100)), min_size=1, max_size=30)
"""Whether a worker was ready when it ended, and how long it had lived."""


@settings(max_examples=40, deadline=None)
@given(ENDS)
def test_a_worker_that_was_ready_is_always_started_again(ends: list[tuple[bool, float]]) -> None:
    restarts = Restarts()
    waits = [restarts.ended(ready=ready, lived=lived) for ready, lived in ends]
    assert waits[0] == 0 and max(waits) <= LONGEST_WAIT
    last = ends[-MOST_UNREADY:]
    assert restarts.is_hopeless == (len(last) == MOST_UNREADY and not any(ready for ready, _ in last))
    if ends[-1] == (True, STEADY_SECONDS):
        assert waits[-1] == 0


def test_the_wait_doubles_until_a_worker_stays() -> None:
    restarts = Restarts()
    assert [restarts.ended(ready=True, lived=0.1) for _ in range(7)] == [0, 0.5, 1, 2, 4, 8, 10]
    assert restarts.ended(ready=True, lived=STEADY_SECONDS) == 0
