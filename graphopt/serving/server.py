"""The application in processes that listen: uvicorn, with limits that it lacks, and a stop that loses no request."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address
from types import FrameType
from typing import Any

from graphopt.errors import GraphoptError, UsageError, described, require_positive_integer
from graphopt.serving.app import ACCESS, App, Settings
from graphopt.serving.models import places

LOG = logging.getLogger("graphopt.serving")

MOST_HEADER_BYTES = 64 << 10
HEADER_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 75.0
DRAIN_SECONDS = 0.5
"""How long a server that stops still answers on open connections, each for the last time, before it closes idle ones:
a client that sends at that moment would lose its request."""
STOP_SECONDS = 30.0
STEADY_SECONDS = 10.0
"""A worker that lived so long, and was ready, is started again at once."""
LONGEST_WAIT = 10.0
MOST_UNREADY = 3
"""Workers in one place that end before they are ready, after which the server stops where no other one answers."""


def serve(settings: Settings, *, host: str = "127.0.0.1", port: int = 8000, workers: int = 1) -> None:
    """Serve until the process is told to stop (SIGTERM, Ctrl-C); what was taken is answered first.

    port: 0 takes any free one. workers: processes, each with its own models, metrics and engine.
    Raises UsageError for a host other than loopback without a token, a port in use, where nothing can be served, and
    where uvicorn is not installed.
    """
    require_positive_integer("workers", workers)
    if not _is_loopback(host) and settings.token is None:
        raise UsageError(f"{host} can be reached from other machines: give a token, or serve on 127.0.0.1")
    _require_uvicorn()
    if not places(settings.folder):
        raise UsageError(f"{settings.folder} holds no bundle, and no NAME/VERSION/ folders with bundles")
    with _listening(host, port) as listener:
        address = listener.getsockname()
        LOG.info("listening on http://%s:%d", f"[{address[0]}]" if ":" in address[0] else address[0], address[1])
        if workers == 1:
            _work(App(settings), listener)
        else:
            _supervise(settings, listener, workers)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _require_uvicorn() -> None:
    try:
        import httptools  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError("serving needs uvicorn: pip install 'graphopt[serve]'") from error


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise UsageError(f"{host}:{port} cannot be listened on: {error.strerror}") from error
    listener.set_inheritable(True)
    return listener


def _work(app: App, listener: socket.socket) -> None:
    """One process, until it is told to stop. Raises UsageError where nothing could be served."""
    import uvicorn

    config = uvicorn.Config(
        app,
        http=_protocol(),
        ws="none",
        loop="uvloop" if _has_uvloop() else "asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=int(KEEP_ALIVE_SECONDS),
        timeout_graceful_shutdown=int(STOP_SECONDS),
    )
    server = _draining(config, app, listener)
    failures: list[str] = []

    def failed(reason: str) -> None:
        failures.append(reason)
        server.should_exit = True

    app.on_failure = failed
    server.run(sockets=[listener])
    if failures:
        raise UsageError(failures[0])


def _has_uvloop() -> bool:
    try:
        import uvloop  # noqa: F401
    except ImportError:
        return False
    return True


def _draining(config: Any, app: App, listener: socket.socket) -> Any:
    """A server that, once told to stop, takes those connections that wait and no more, closes each one behind its next
    answer, and then stops."""
    import uvicorn

    class Draining(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if app.draining or not app.started:
                super().handle_exit(sig, frame)
                return
            app.draining = True
            LOG.info("stopping: %d requests in flight", app.metrics.in_flight)
            # A task, as the loop may have connections in hand while it calls this. At once, so that nobody who is told
            # to close connects again in vain.
            self._stopping = asyncio.get_running_loop().create_task(self._stop_listening())

        async def _stop_listening(self) -> None:
            loop = asyncio.get_running_loop()
            loop.call_later(DRAIN_SECONDS, lambda: setattr(self, "should_exit", True))
            connections = _accepted(listener)  # closing would reset those that wait, with the requests that they hold
            for server in self.servers:
                server.close()
            listener.close()  # which the loop may keep open
            make = partial(
                config.http_protocol_class, config=config, server_state=self.server_state,
                app_state=self.lifespan.state, _loop=loop,
            )  # fmt: skip
            await _take(connections, make, loop)

    return Draining(config)


def _accepted(listener: socket.socket) -> list[socket.socket]:
    """The connections that wait. listener: one that does not block."""
    found: list[socket.socket] = []
    while True:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:  # none waits any more
            return found
        except ConnectionAbortedError:  # this client has left
            continue
        except OSError as error:
            LOG.error("the connections that still wait cannot be taken: %s", described(error))
            return found
        connection.setblocking(False)
        found.append(connection)


async def _take(
    connections: Iterable[socket.socket], make: Callable[[], asyncio.Protocol], loop: asyncio.AbstractEventLoop
) -> None:
    """Give each connection a protocol. One that fails is closed, and leaves the others as they are."""
    for connection in connections:
        try:
            await loop.connect_accepted_socket(make, connection)
        except Exception:
            LOG.exception("a connection that waited cannot be served")
            connection.close()


def _protocol() -> Any:
    """HTTP/1.1 of uvicorn, with a limit on the bytes and on the time of headers."""
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class Limited(HttpToolsProtocol):
        _header_bytes = 0
        _deadline: asyncio.TimerHandle | None = None
        _unread = 0
        """Bytes of the answer that waited to be sent at the last look."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait_for_headers()

        def data_received(self, data: bytes) -> None:
            if self._deadline is not None:
                self._header_bytes += len(data)
                if self._header_bytes > MOST_HEADER_BYTES and self._is_in_headers():
                    self._refuse(431, b"the headers are too large")
                    return
            elif self.cycle is None or self.cycle.response_complete:
                self._wait_for_headers()
            super().data_received(data)

        def on_headers_complete(self) -> None:
            self._stop_waiting()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            self._unset_keepalive_if_required()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._unread = self.transport.get_write_buffer_size()
            if self._unread and self.transport.is_closing():  # closed behind this answer: uvicorn sets no timer
                self._look_again()

        def timeout_keep_alive_handler(self) -> None:
            before, self._unread = self._unread, self.transport.get_write_buffer_size()
            if self._unread < before:  # the client is slow, and reads
                self._look_again()
            elif self._unread:
                self.transport.abort()  # an answer that nobody reads would stay in memory
            else:
                super().timeout_keep_alive_handler()

        def _look_again(self) -> None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

        def _is_in_headers(self) -> bool:
            return self._deadline is not None

        def _wait_for_headers(self) -> None:
            self._header_bytes = 0
            self._deadline = self.loop.call_later(HEADER_SECONDS, self._refuse, 408, b"the headers came too slowly")

        def _stop_waiting(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _refuse(self, status: int, reason: bytes) -> None:
            self._stop_waiting()
            if self.transport is None or self.transport.is_closing():
                return
            body = b'{"error": "' + reason + b'"}'
            head = b"HTTP/1.1 %d Refused\r\ncontent-type: application/json\r\nconnection: close\r\n" % status
            self.transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            self.transport.close()

    return Limited


# --- several processes ------------------------------------------------------------------------------------------------


@dataclass
class Restarts:
    """When the worker of one place starts again after it has ended. Times are in seconds."""

    quick: int = 0
    """Ends in a row before the worker had lived `STEADY_SECONDS`."""
    unready: int = 0
    """Ends in a row before the worker was ready."""

    def ended(self, *, ready: bool, lived: float) -> float:
        """How long to wait: not at all for the first end, then twice as long each time."""
        self.unready = 0 if ready else self.unready + 1
        self.quick = 0 if ready and lived >= STEADY_SECONDS else self.quick + 1
        return 0.0 if self.quick < 2 else min(0.5 * 2 ** (self.quick - 2), LONGEST_WAIT)

    @property
    def is_hopeless(self) -> bool:
        return self.unready >= MOST_UNREADY


@dataclass
class _Place:
    """One of the workers: its process, and those that take its place."""

    start: Callable[[], tuple[Any, Any]]
    """A process, and the event that it sets once it is ready."""
    restarts: Restarts = field(default_factory=Restarts)
    process: Any = None
    ready: Any = None
    born: float = 0.0
    due: float | None = None
    """When it is started again; None while it lives."""

    def begin(self) -> None:
        self.process, self.ready = self.start()
        self.born, self.due = time.monotonic(), None

    def look(self) -> None:
        """Start another process where this one has ended."""
        now = time.monotonic()
        if self.due is None and not self.process.is_alive():
            wait = self.restarts.ended(ready=self.ready.is_set(), lived=now - self.born)
            self.due = now + wait
            LOG.error(
                "worker %d ended with %s; another one starts in %g s", self.process.pid, self.process.exitcode, wait
            )
        if self.due is not None and now >= self.due:
            self.begin()

    @property
    def answers(self) -> bool:
        return self.due is None and bool(self.ready.is_set()) and bool(self.process.is_alive())


def _supervise(settings: Settings, listener: socket.socket, workers: int) -> None:
    """Processes that share a listening socket: one that ends is started again, and all are told to stop together.

    Raises UsageError where nothing can be served at the start, and where workers end again and again before they are
    ready while no other one answers.
    """
    context = multiprocessing.get_context("spawn")
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: stopping.append(received))

    def start() -> tuple[Any, Any]:
        ready = context.Event()
        given = (settings, listener, ACCESS.isEnabledFor(logging.INFO), ready)
        process = context.Process(target=_worker, args=given)
        process.start()
        return process, ready

    places = [_Place(start) for _ in range(workers)]
    for place in places:
        place.begin()
    has_answered = has_failed = False
    while not (stopping or has_failed):
        time.sleep(0.2)
        answers = any(place.answers for place in places)
        has_answered = has_answered or answers
        has_failed = not has_answered and any(place.process.exitcode == _FAILED for place in places)
        if not has_failed:
            for place in places:
                place.look()
            has_failed = not answers and any(place.restarts.is_hopeless for place in places)
    listener.close()
    processes = [place.process for place in places]
    for process in processes:
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGTERM)
    end = time.monotonic() + STOP_SECONDS + 5
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
        if process.is_alive():
            process.kill()
    if has_failed:
        raise UsageError("a worker could serve nothing: its log says why")


_FAILED = 3


def _worker(settings: Settings, listener: socket.socket, logs_requests: bool, ready: Any) -> None:
    """A process of several, which ends with the one that started it, however that ends. ready: an event to set."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # as it was started by `_supervise`
    threading.Thread(target=_stop_with, args=(parent,), daemon=True).start()
    log_lines(of_requests=logs_requests)
    try:
        _work(App(settings, loads_first=True, on_ready=ready.set), listener)
    except GraphoptError:
        sys.exit(_FAILED)


def _stop_with(parent: Any) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def log_lines(*, of_requests: bool) -> None:
    """Write what the logger `graphopt` says to stderr, a line each. of_requests: also one for each request."""
    logger = logging.getLogger("graphopt")
    logger.setLevel(logging.INFO)
    ACCESS.setLevel(logging.INFO if of_requests else logging.WARNING)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
