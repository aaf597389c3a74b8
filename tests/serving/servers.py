"""Servers that run for real, in processes of their own."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen


@contextmanager
def running(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server, once it is ready, and its URL."""
    command = [sys.executable, "-m", "graphopt", "serve", str(folder), "--port", "0", *options]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as server:
        lines: list[str] = []
        try:
            assert server.stderr is not None
            while not (found := re.search(r"listening on (http://\S+)", "".join(lines))):
                lines.append(server.stderr.readline())
                assert lines[-1], "".join(lines)
            threading.Thread(target=lines.extend, args=(server.stderr,), daemon=True).start()
            end = time.monotonic() + 60
            while time.monotonic() < end and ask(f"{found[1]}/v2/health/ready")[0] != 200:
                time.sleep(0.05)
            yield server, found[1]
        finally:
            server.kill()
            print("".join(lines[-40:]))  # which pytest shows where a test fails


def ask(url: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    try:
        with urlopen(Request(url, data, headers), timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except OSError as error:
        return getattr(error, "code", 0), None


def raw(url: str, content: bytes, seconds: float = 30) -> bytes:
    """What a server answers to bytes, until it closes the connection."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        connection.sendall(content)
        received = b""
        while part := connection.recv(65536):
            received += part
        return received


def workers_of(server: subprocess.Popen[str]) -> list[int]:
    """The processes that answer."""
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text(encoding="utf-8").split()
    return [int(one) for one in children if b"spawn_main" in Path(f"/proc/{one}/cmdline").read_bytes()]


def memory(process: int) -> int:
    """Resident bytes."""
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
