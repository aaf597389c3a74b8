"""Requests of many clients -> runs of the engine.

While the engine is idle a request runs at once, alone; those that come while it runs wait, and the next run takes the
one that waits longest with as many as fit beside it: of its padded length, at most as many rows as the batch table
found to pay, and none that would pass by too many others. So there is no delay to choose, and batches grow with the
load.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from graphopt.serving.batches import are_rows, cropped, length_of, padded
from graphopt.serving.engine import stacked
from graphopt.serving.golden import Arrays
from graphopt.serving.manifest import Manifest
from graphopt.serving.refusals import Refused

Key = tuple[Any, ...]


@dataclass(eq=False)
class _Waiting:
    """A request in the queue."""

    feeds: Arrays
    rows: int
    length: int
    """Of the axis that is padded; 0 where nothing is."""
    key: Key
    """Requests of one key fit into one batch."""
    most: int
    """Most rows of a batch that it may be in; 1 where it runs alone."""
    answer: asyncio.Future[Arrays]


class Batcher:
    """The queue of one model, for one event loop."""

    def __init__(
        self,
        manifest: Manifest,
        run: Callable[[Arrays], Arrays],
        pool: Executor,
        *,
        at_once: int = 1,
        most_waiting: int = 256,
        allow_variance: bool = False,
        on_batch: Callable[[int], object] = lambda rows: None,
    ) -> None:
        """run: feeds -> outputs, called in `pool`, at most `at_once` times together. most_waiting: requests in the
        queue. allow_variance: batch also where a request's answer depends on its neighbours. on_batch: told the rows of
        each run."""
        self._run, self._pool, self._at_once, self._most_waiting = run, pool, at_once, most_waiting
        self._manifest, self._on_batch = manifest, on_batch
        self._batches = bool(manifest.batch_invariant) or (manifest.batch_invariant is False and allow_variance)
        padding = manifest.padding
        self._padding = padding if self._batches and padding is not None and padding.invariant else None
        self._table = _most_rows(manifest)
        self._waiting: deque[_Waiting] = deque()
        self._running = 0

    def __len__(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    async def infer(self, feeds: Arrays) -> Arrays:
        """Outputs, of feeds that were checked. More rows than the largest batch that pays are several batches.

        Raises Refused (429) where the queue is full, and UsageError where the model does not run on the feeds."""
        parts = self._parts(feeds)
        found = await self.infer_all(parts)
        if len(parts) == 1:
            return found[0]
        if all(are_rows(outputs, _rows(part)) for outputs, part in zip(found, parts, strict=True)):
            return stacked(found)
        return (await self.infer_all([feeds], admitted=True))[0]  # rows are no parts of these outputs

    async def infer_all(self, parts: Sequence[Arrays], *, admitted: bool = False) -> list[Arrays]:
        """Outputs of each part of one request, as `infer`. A request is admitted whole, where the queue has room for
        its first part. admitted: it was, with parts before these."""
        if not admitted and len(self._waiting) >= self._most_waiting:
            raise Refused(429, f"{len(self._waiting)} requests wait already: try again", ((b"retry-after", b"1"),))
        loop = asyncio.get_running_loop()
        waiting = [self._as_waiting(one, loop.create_future()) for one in parts]
        self._waiting.extend(waiting)
        self._start()
        return await asyncio.gather(*(one.answer for one in waiting))

    def _parts(self, feeds: Arrays) -> list[Arrays]:
        """Batches that are no larger than what pays, where rows do not depend on each other."""
        rows = _rows(feeds) if self._manifest.batch_invariant else 1
        most = self._most(feeds) if rows > 1 else 1
        if rows <= most:
            return [feeds]
        return [{name: array[at : at + most] for name, array in feeds.items()} for at in range(0, rows, most)]

    def _most(self, feeds: Arrays) -> int:
        """Most rows of a batch that requests of one length make."""
        if self._padding is None:
            return max(self._table.values(), default=1)
        length = length_of(feeds, self._manifest.inputs, self._padding.axis)
        return self._table.get(self._grown(length), 1)

    def _grown(self, length: int) -> int:
        """What a length is padded to."""
        return next((one for one in self._table if one is not None and one >= length), length)

    def _as_waiting(self, feeds: Arrays, answer: asyncio.Future[Arrays]) -> _Waiting:
        if not self._batches:
            return _Waiting(feeds, 1, 0, (), 1, answer)
        rows, length = _rows(feeds), 0
        if self._padding is not None:
            length = length_of(feeds, self._manifest.inputs, self._padding.axis)
            feeds = padded(feeds, self._manifest.inputs, self._padding, self._grown(length))
        key = tuple(array.shape[1:] for array in feeds.values())
        return _Waiting(feeds, rows, length, key, self._most(feeds), answer)

    def _start(self) -> None:
        """Start runs, as long as there are requests, and the engine may take one more."""
        while self._running < self._at_once and self._waiting:
            batch = self._next()
            if not batch:
                continue
            self._running += 1
            self._on_batch(sum(one.rows for one in batch))
            self._pool.submit(self._work, batch, asyncio.get_running_loop())

    def _next(self) -> list[_Waiting]:
        """The request that waits longest, and those behind it that fit beside it; nobody waits for cancelled ones."""
        first = self._waiting.popleft()
        if first.answer.done():
            return []
        batch, rows = [first], first.rows
        if rows < first.most and self._waiting:
            passed_by = PASSED_BY * len(self._waiting)
            left: deque[_Waiting] = deque()
            for one in self._waiting:
                if one.answer.done():
                    continue
                if one.key == first.key and rows + one.rows <= first.most and len(left) <= passed_by:
                    batch.append(one)
                    rows += one.rows
                else:
                    left.append(one)
            self._waiting = left
        return batch

    def _work(self, batch: Sequence[_Waiting], loop: asyncio.AbstractEventLoop) -> None:
        """In a thread: run, and hand the answers to the event loop."""
        answers = self._answers(batch)
        loop.call_soon_threadsafe(self._done, batch, answers)

    def _answers(self, batch: Sequence[_Waiting]) -> Sequence[Arrays | Exception]:
        try:
            if len(batch) == 1:
                return [self._cropped(self._run(batch[0].feeds), batch[0])]
            outputs = self._run(stacked([one.feeds for one in batch]))
        except Exception as error:
            if len(batch) == 1:
                return [error]
            return [answer for one in batch for answer in self._answers([one])]  # whose fault it was
        if not are_rows(outputs, sum(one.rows for one in batch)):
            return [answer for one in batch for answer in self._answers([one])]  # rows are no parts of these outputs
        found, start = [], 0
        for one in batch:
            rows = {name: array[start : start + one.rows] for name, array in outputs.items()}
            found.append(self._cropped(rows, one))
            start += one.rows
        return found

    def _cropped(self, outputs: Arrays, one: _Waiting) -> Arrays:
        return outputs if self._padding is None else cropped(outputs, self._manifest.outputs, self._padding, one.length)

    def _done(self, batch: Sequence[_Waiting], answers: Sequence[Arrays | Exception]) -> None:
        self._running -= 1
        for one, answer in zip(batch, answers, strict=True):
            if one.answer.done():
                continue
            if isinstance(answer, Exception):
                one.answer.set_exception(answer)
            else:
                one.answer.set_result(answer)
        self._start()


def _rows(feeds: Arrays) -> int:
    return len(next(iter(feeds.values())))


PASSED_BY = 1 / 3
"""Share of the queue that a request may pass by to join a batch. With 32 clients and 16 lengths of MiniLM a third costs
2% of the requests a second, and takes an eighth off the 99th percentile of latency."""
UNMEASURED = 8
"""Most rows of a batch where the batch table has no latencies."""
NEAR_BEST = 0.95
"""Share of the most rows a second that a batch must answer to pay: the last few percent take batches several times as
large, behind which all others wait."""


def _most_rows(manifest: Manifest) -> Mapping[int | None, int]:
    """By length of the batch table, in order, the smallest batch that answers nearly the most rows a second."""
    speeds: dict[int | None, dict[int, float]] = {}
    for row in manifest.batches:
        if row.ms is None and row.batch > UNMEASURED:
            continue
        speeds.setdefault(row.length, {})[row.batch] = row.batch / (row.ms or 1.0)
    return {
        length: min(batch for batch, speed in of.items() if speed >= NEAR_BEST * max(of.values()))
        for length, of in sorted(speeds.items(), key=lambda item: item[0] or 0)
    }
