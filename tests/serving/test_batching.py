"""Which requests make one run of the engine, and in which order."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.serving.batching import PASSED_BY, Batcher
from graphopt.serving.golden import Arrays
from graphopt.serving.manifest import BatchTiming, Manifest, Padding, TensorSpec

AXES = ("batch", "seq")
LENGTHS = (4, 8)


def manifest(table: Sequence[BatchTiming]) -> Manifest:
    """What batching reads of one: rows are independent, and tokens may be padded."""
    tokens = (TensorSpec("ids", "int64", AXES),)
    padding = Padding("seq", {"ids": 0}, True, 100.0)
    found = SimpleNamespace(batch_invariant=True, padding=padding, batches=table, inputs=tokens, outputs=tokens)
    return cast(Manifest, found)


def runs_of(lengths: Sequence[int], table: Sequence[BatchTiming]) -> list[list[int]]:
    """The requests of each run, by their number, where all of them wait while one before them runs.

    Requests are rows that hold their number, and their answers are checked to be their own.
    """
    found: list[list[int]] = []
    everyone_waits = Event()

    def run(feeds: Arrays) -> Arrays:
        everyone_waits.wait()
        found.append([int(row[0]) for row in feeds["ids"]])
        return dict(feeds)

    async def all_of_them() -> None:
        with ThreadPoolExecutor(1) as pool:
            batcher = Batcher(manifest(table), run, pool)
            feeds = [{"ids": np.full((1, length), number, np.int64)} for number, length in enumerate((1, *lengths), -1)]
            asked = [asyncio.ensure_future(batcher.infer(one)) for one in feeds]
            await asyncio.sleep(0)
            everyone_waits.set()
            for one, answer in zip(feeds, await asyncio.gather(*asked), strict=True):
                np.testing.assert_array_equal(answer["ids"], one["ids"])

    asyncio.run(all_of_them())
    assert found.pop(0) == [-1]
    return found


def timings(**ms: Any) -> list[BatchTiming]:
    """A batch table: milliseconds of 1, 2, 4 rows and so on at each length."""
    return [BatchTiming(2**power, int(length[1:]), one) for length, row in ms.items() for power, one in enumerate(row)]


@given(st.lists(st.integers(1, max(LENGTHS)), max_size=24))
@settings(max_examples=50, deadline=None)
def test_requests_run_in_order_but_for_the_few_that_a_batch_may_take_along(lengths: list[int]) -> None:
    runs = runs_of(lengths, timings(_4=(1, 1, 1, 1), _8=(1, 1, 1, 1)))
    assert sorted(one for run in runs for one in run) == list(range(len(lengths)))
    waiting = list(range(len(lengths)))
    for run in runs:
        most = PASSED_BY * (len(waiting) - 1)
        assert run[0] == waiting[0]
        assert len({lengths[one] > 4 for one in run}) == 1
        for one in run[1:]:
            assert sum(other < one and other not in run for other in waiting) <= most
        waiting = [one for one in waiting if one not in run]


def test_requests_of_one_length_fill_a_batch() -> None:
    assert runs_of([3] * 10, timings(_4=(1, 1, 1, 1))) == [list(range(8)), [8, 9]]


def test_a_batch_that_pays_a_few_percent_is_not_waited_for() -> None:
    assert runs_of([3] * 4, timings(_4=(1.0, 1.94, 3.8))) == [[0], [1], [2], [3]]
    assert runs_of([3] * 4, timings(_4=(1.0, 1.6, 3.1))) == [[0, 1], [2, 3]]
