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
from ipaddress import ip_address
from types import FrameType
from typing import Any

from graphopt.errors import GraphoptError, UsageError, require_positive_integer
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
    server = _draining(config, app)
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


def _draining(config: Any, app: App) -> Any:
    """A server that, once told to stop, takes no connections any more, closes each one behind its next answer, and
    then stops."""
    import uvicorn

    class Draining(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if app.draining or not app.started:
                super().handle_exit(sig, frame)
                return
            app.draining = True
            LOG.info("stopping: %d requests in flight", app.metrics.in_flight)
            for server in self.servers:  # first, so that nobody who is told to close connects again in vain
                server.close()
            asyncio.get_running_loop().call_later(DRAIN_SECONDS, lambda: setattr(self, "should_exit", True))

    return Draining(config)


def _protocol() -> Any:
    """HTTP/1.1 of uvicorn, with a limit on the bytes and on the time of headers."""
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class Limited(HttpToolsProtocol):
        _header_bytes = 0
        _deadline: asyncio.TimerHandle | None = None

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
            super().connection_lost(exc)

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


def _supervise(settings: Settings, listener: socket.socket, workers: int) -> None:
    """Processes that share a listening socket: one that dies is started again, and all are told to stop together."""
    context = multiprocessing.get_context("spawn")
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: stopping.append(received))

    def start() -> Any:
        process = context.Process(target=_worker, args=(settings, listener, ACCESS.isEnabledFor(logging.INFO)))
        process.start()
        return process

    processes = [start() for _ in range(workers)]
    born = time.monotonic()
    while not stopping:
        time.sleep(0.2)
        for place, process in enumerate(processes):
            if process.is_alive():
                continue
            if process.exitcode == _FAILED or time.monotonic() - born < 1.0:
                stopping.append(signal.SIGTERM)
                break
            LOG.error("worker %d ended with %s; another one starts", process.pid, process.exitcode)
            processes[place], born = start(), time.monotonic()
    listener.close()
    for process in processes:
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGTERM)
    end = time.monotonic() + STOP_SECONDS + 5
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
        if process.is_alive():
            process.kill()
    if any(process.exitcode == _FAILED for process in processes):
        raise UsageError("a worker could serve nothing: its log says why")


_FAILED = 3


def _worker(settings: Settings, listener: socket.socket, logs_requests: bool) -> None:
    """A process of several, which ends with the one that started it, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # as it was started by `_supervise`
    threading.Thread(target=_stop_with, args=(parent,), daemon=True).start()
    log_lines(of_requests=logs_requests)
    try:
        _work(App(settings, loads_first=True), listener)
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
