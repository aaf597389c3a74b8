"""When workers that end are started again, and what becomes of connections: slow readers, and those that wait."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.serving.server import (
    KEEP_ALIVE_SECONDS,
    LONGEST_WAIT,
    MOST_UNREADY,
    STEADY_SECONDS,
    Restarts,
    _accepted,
    _protocol,
    _take,
)

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


class Transport(asyncio.Transport):
    """A client that has read all but so many bytes at each look."""

    def __init__(self, sizes: list[int], is_closed: bool) -> None:
        super().__init__()
        self.sizes, self.is_closed, self.ended = sizes, is_closed, ""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def get_write_buffer_size(self) -> int:
        return self.sizes.pop(0)

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed, self.ended = True, "closed"

    def abort(self) -> None:
        self.ended = "aborted"


class Clock:
    """A loop that only keeps timers."""

    def __init__(self) -> None:
        self.due: list[asyncio.TimerHandle] = []

    def call_later(self, seconds: float, call: Any, *arguments: Any) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(seconds, call, arguments, cast(asyncio.AbstractEventLoop, self))
        self.due.append(handle)
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        self.due.remove(handle)

    def get_debug(self) -> bool:
        return False


SIZES = st.lists(st.integers(0, 4), min_size=1, max_size=8)
"""Bytes of an answer that wait to be sent, at each look."""


@settings(max_examples=40, deadline=None)
@given(SIZES, st.booleans())
def test_an_answer_is_dropped_only_where_nobody_reads_it(sizes: list[int], closes: bool) -> None:
    """closes: whether the server closes the connection behind the answer."""
    uvicorn = pytest.importorskip("uvicorn")
    from uvicorn.server import ServerState

    sizes = [*sizes, sizes[-1]]  # at last the client reads no more
    clock, transport = Clock(), Transport(list(sizes), closes)
    config = uvicorn.Config(lambda: None, log_config=None, timeout_keep_alive=int(KEEP_ALIVE_SECONDS))
    protocol = _protocol()(config=config, server_state=ServerState(), app_state={}, _loop=clock)
    protocol.connection_made(transport)
    protocol._stop_waiting()  # the headers have come
    protocol.on_response_complete()
    looks = 1
    while clock.due:
        (timer,) = clock.due
        assert timer.when() == KEEP_ALIVE_SECONDS and not transport.ended
        clock.due.clear()
        timer._run()
        looks += 1
    if closes and not sizes[0]:
        assert looks == 1 and not transport.ended  # all was sent: the transport ends by itself
        return
    still = next(place for place in range(1, len(sizes)) if sizes[place] >= sizes[place - 1])
    assert looks == still + 1
    assert transport.ended == ("aborted" if sizes[still] else "" if closes else "closed")


@pytest.mark.parametrize("error", [None, OSError()])
def test_a_connection_that_ends_leaves_no_timer(error: Exception | None) -> None:
    uvicorn = pytest.importorskip("uvicorn")
    from uvicorn.server import ServerState

    clock, transport = Clock(), Transport([3], True)
    config = uvicorn.Config(lambda: None, log_config=None)
    protocol = _protocol()(config=config, server_state=ServerState(), app_state={}, _loop=clock)
    protocol.connection_made(transport)
    protocol.on_response_complete()
    assert len(clock.due) == 2
    protocol.connection_lost(error)
    assert clock.due == []


class Queue(socket.socket):
    """A listener whose waiting clients stand in a list: connections, and what `accept` raises instead of one."""

    waiting: list[socket.socket | int]

    def accept(self) -> tuple[socket.socket, Any]:
        found = self.waiting.pop(0) if self.waiting else errno.EAGAIN
        if isinstance(found, int):
            raise OSError(found, "")
        return found, None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["connection", "aborted"]), max_size=6), st.booleans())
def test_a_client_that_left_hides_no_other_that_waits(waiting: list[str], is_full: bool) -> None:
    """is_full: whether this process has no room for one more connection in the end."""
    with Queue() as listener:
        connections = [socket.socket() for one in waiting if one == "connection"]
        remaining = iter(connections)
        listener.waiting = [next(remaining) if one == "connection" else errno.ECONNABORTED for one in waiting]
        listener.waiting += [errno.EMFILE] if is_full else []
        found = _accepted(listener)
        assert found == connections and not any(one.getblocking() for one in found)
        for one in found:
            one.close()


def test_a_connection_that_fails_takes_no_other_with_it(caplog: pytest.LogCaptureFixture) -> None:
    class Noted(asyncio.Protocol):
        def __init__(self) -> None:
            made.append(self)
            if len(made) == 2:
                raise OSError("this one fails")

    made: list[Noted] = []

    async def taken() -> None:
        pairs = [socket.socketpair() for _ in range(3)]
        for ours, _ in pairs:
            ours.setblocking(False)
        await _take([ours for ours, _ in pairs], Noted, asyncio.get_running_loop())
        assert len(made) == 3
        assert [ours.fileno() < 0 for ours, _ in pairs] == [False, True, False]
        for pair in pairs:
            for one in pair:
                one.close()

    asyncio.run(taken())
    assert "a connection that waited cannot be served" in caplog.text
