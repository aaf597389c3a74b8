"""Many clients against a server: how fast it answers, how often not, and how often wrong.

Each request is a golden case of the served bundle, and each answer is compared with the golden one.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from graphopt.errors import UsageError, described
from graphopt.serving import bundles, golden
from graphopt.serving.golden import Arrays, Case
from graphopt.serving.numbers import json_bytes
from graphopt.serving.tensors_v2 import DATATYPES, DTYPES

_SECONDS = 60.0
"""Until an answer counts as an error."""


@dataclass(frozen=True)
class Loaded:
    """What a server did under load."""

    url: str
    model: str
    clients: int
    seconds: float
    answers: int
    """Right ones."""
    wrong: int
    """Answers with an SQNR more than 3 dB below the recorded one of their case."""
    errors: dict[str, int]
    """By status, or by what failed on the way."""
    p50: float
    """In ms, as the next two."""
    p90: float
    p99: float
    cpu_ms: float | None
    """CPU time of the server for each request; None where it does not tell."""

    @property
    def throughput(self) -> float:
        """Right answers a second."""
        return self.answers / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        found = {
            key: None if isinstance(value, float) and math.isnan(value) else value for key, value in vars(self).items()
        }
        return found | {"throughput": self.throughput}

    def __str__(self) -> str:
        errors = ", ".join(f"{count} x {kind}" for kind, count in self.errors.items()) or "none"
        cpu = "" if self.cpu_ms is None else f", {self.cpu_ms:.2f} ms of server CPU each"
        return (
            f"{self.url} {self.model}, {self.clients} clients, {self.seconds:.1f} s\n"
            f"{self.throughput:.1f} requests a second{cpu}\n"
            f"p50 {self.p50:.2f} ms, p90 {self.p90:.2f} ms, p99 {self.p99:.2f} ms\n"
            f"errors: {errors}; wrong answers: {self.wrong}"
        )


@dataclass
class _Tally:
    """What all clients have seen so far."""

    milliseconds: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    wrong: int = 0


def load(
    url: str,
    *,
    clients: int = 32,
    seconds: float = 10.0,
    bundle: str | Path | None = None,
    token: str | None = None,
    binary: bool = True,
) -> Loaded:
    """Send golden cases from many clients at once, each on its own connection, one request after the other.

    url: of the server, or of a model on it (/v2/models/NAME). bundle: where the golden set lies, for servers that do
    not hand it out; this one does. token: what the server wants. binary: send tensors, and ask for them, as bytes
    behind the JSON; some servers know JSON alone.
    Raises UsageError where the server cannot be reached, or serves no such model.
    """
    return asyncio.run(_load(url, clients, seconds, bundle, token, binary))


async def _load(
    url: str, clients: int, seconds: float, bundle: str | Path | None, token: str | None, binary: bool
) -> Loaded:
    server = _Server.of(url, token)
    try:
        async with server.connected() as connection:
            path = server.path or await _only_model(connection)
            cases, least = await _golden(connection, path, bundle)
            before = await _cpu(connection)
    except (OSError, EOFError, asyncio.IncompleteReadError) as error:
        raise UsageError(f"{url} cannot be reached: {described(error)}") from error
    requests = [connection.request("POST", f"{path}/infer", *_body(case, binary)) for case in cases]
    tally, begin = _Tally(), time.perf_counter()
    end = begin + seconds
    tasks = [_client(server, requests, cases, least, tally, end, seed) for seed in range(clients)]
    await asyncio.gather(*tasks)
    took = time.perf_counter() - begin
    cpu = None
    try:
        async with server.connected() as connection:
            after = await _cpu(connection)
            total = len(tally.milliseconds) + sum(tally.errors.values())
            cpu = None if before is None or after is None or not total else (after - before) * 1e3 / total
    except (OSError, EOFError, asyncio.IncompleteReadError):  # it was stopped under load
        pass
    times = np.array(tally.milliseconds or [math.nan])
    p50, p90, p99 = (float(np.quantile(times, share)) for share in (0.5, 0.9, 0.99))
    return Loaded(
        url, path.rsplit("/models/", 1)[1], clients, took, len(tally.milliseconds) - tally.wrong, tally.wrong,
        dict(sorted(tally.errors.items())), p50, p90, p99, cpu,
    )  # fmt: skip


async def _client(
    server: _Server, requests: Sequence[bytes], cases: Sequence[Case], least: Sequence[float], tally: _Tally,
    end: float, seed: int,
) -> None:  # fmt: skip
    """One client, until the time is over; a connection that breaks is opened again."""
    choose = random.Random(seed)
    while time.perf_counter() < end:
        try:
            async with server.connected() as connection:
                while time.perf_counter() < end:
                    number = choose.randrange(len(cases))
                    begin = time.perf_counter()
                    async with asyncio.timeout(_SECONDS):
                        status, headers, body = await connection.send(requests[number])
                    taken = (time.perf_counter() - begin) * 1e3
                    if status != 200:
                        tally.errors[str(status)] += 1
                        await asyncio.sleep(0.01 if status == 429 else 0)
                    else:
                        tally.milliseconds.append(taken)
                        tally.wrong += golden.sqnr(cases[number].outputs, _outputs(headers, body)) < least[number]
                    if headers.get("connection") == "close":
                        break
        except (OSError, EOFError, ValueError, KeyError, TimeoutError, asyncio.IncompleteReadError) as error:
            tally.errors[type(error).__name__] += 1
            await asyncio.sleep(0.05)


async def _only_model(connection: _Connection) -> str:
    """The path of the only model."""
    found = json.loads(await connection.ask("POST", "/v2/repository/index", b"{}"))
    names = sorted({one["name"] for one in found if one.get("state", "READY") == "READY"})
    if len(names) != 1:
        raise UsageError(f"name the model in the URL, as /v2/models/NAME: there are {', '.join(names) or 'none'}")
    return f"/v2/models/{names[0]}"


async def _golden(connection: _Connection, path: str, bundle: str | Path | None) -> tuple[list[Case], list[float]]:
    """The golden cases, and the SQNR that each answer must have."""
    if bundle is not None:
        opened = bundles.opened(bundle)
        cases, total, each = opened.cases, opened.manifest.golden.sqnr, opened.manifest.golden.case_sqnr
    else:
        status, headers, body = await connection.send(connection.request("GET", f"{path}/golden"))
        if status != 200:
            raise UsageError(f"{path} hands out no golden set (status {status}): name its bundle with --bundle")
        cases, total = golden.read(body, path), float(headers["x-graphopt-sqnr"])
        each = tuple(map(float, headers["x-graphopt-case-sqnr"].split(",")))
    return cases, [golden.least(min(total, one)) for one in each]


async def _cpu(connection: _Connection) -> float | None:
    """Seconds of CPU time that the server's process took so far."""
    status, _, body = await connection.send(connection.request("GET", "/metrics"))
    found = re.search(rb"^process_cpu_seconds_total (\S+)$", body, re.MULTILINE) if status == 200 else None
    return None if found is None else float(found[1])


def infer_request(path: str, case: Case) -> bytes:
    """A whole request for an answer to a golden case, with binary tensors. path: .../infer"""
    return _Connection(_Server("localhost", 80, False, path, None)).request("POST", path, *_body(case, True))


def _body(case: Case, binary: bool) -> tuple[bytes, dict[str, str]]:
    """A request of the Open Inference Protocol. binary: its tensors, and those of the answer, are bytes behind the
    JSON."""
    if not binary:
        return json_bytes({
            "inputs": [
                {
                    "name": name, "shape": array.shape, "datatype": DATATYPES[array.dtype.name],
                    "data": array.ravel().tolist(),
                }
                for name, array in case.inputs.items()
            ]
        }), {"Content-Type": "application/json"}  # fmt: skip
    inputs = [
        {
            "name": name,
            "shape": list(array.shape),
            "datatype": DATATYPES[array.dtype.name],
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in case.inputs.items()
    ]
    outputs = [{"name": name, "parameters": {"binary_data": True}} for name in case.outputs]
    head = json.dumps({"inputs": inputs, "outputs": outputs}).encode()
    content = head + b"".join(array.tobytes() for array in case.inputs.values())
    return content, {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}


def _outputs(headers: dict[str, str], body: bytes) -> Arrays:
    """The tensors of an answer: bytes, or numbers in JSON."""
    length = int(headers.get("inference-header-content-length", len(body)))
    found, start = {}, length
    for one in json.loads(body[:length])["outputs"]:
        if "data" in one:
            found[one["name"]] = np.array(one["data"], DTYPES[one["datatype"]]).reshape(one["shape"])
            continue
        size = one["parameters"]["binary_data_size"]
        array = np.frombuffer(body, DTYPES[one["datatype"]], size // DTYPES[one["datatype"]].itemsize, start)
        found[one["name"]] = array.reshape(one["shape"])
        start += size
    return found


# --- HTTP/1.1, as much of it as it takes ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Server:
    host: str
    port: int
    is_secure: bool
    path: str
    """Of a model; empty where the URL names none."""
    token: str | None

    @classmethod
    def of(cls, url: str, token: str | None) -> _Server:
        parts = urlsplit(url)
        found = re.fullmatch(r"(/v2/models/[^/]+(?:/versions/[^/]+)?)?(?:/infer)?/?", parts.path)
        if parts.scheme not in ("http", "https") or not parts.hostname or found is None:
            raise UsageError(f"{url} is no URL of a server or a model: http://HOST:PORT or .../v2/models/NAME")
        is_secure = parts.scheme == "https"
        return cls(parts.hostname, parts.port or (443 if is_secure else 80), is_secure, found[1] or "", token)

    def connected(self) -> _Connection:
        return _Connection(self)


class _Connection:
    """One connection that is kept open."""

    def __init__(self, server: _Server) -> None:
        self._server = server

    async def __aenter__(self) -> _Connection:
        own = self._server
        self._reader, self._writer = await asyncio.open_connection(
            own.host, own.port, ssl=own.is_secure or None, limit=1 << 20
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    def request(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
        own = self._server
        lines = [f"{method} {path} HTTP/1.1", f"Host: {own.host}:{own.port}", f"Content-Length: {len(body)}"]
        lines += [] if own.token is None else [f"Authorization: Bearer {own.token}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        return "\r\n".join([*lines, "", ""]).encode() + body

    async def send(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers in lower case, and body."""
        self._writer.write(request)
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])}
        if "chunked" in headers.get("transfer-encoding", ""):
            parts = []
            while size := int((await self._reader.readuntil(b"\r\n")).split(b";")[0], 16):
                parts.append((await self._reader.readexactly(size + 2))[:-2])
            await self._reader.readuntil(b"\r\n")
            return int(head[0].split(" ")[1]), headers, b"".join(parts)
        return int(head[0].split(" ")[1]), headers, await self._reader.readexactly(int(headers["content-length"]))

    async def ask(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The body of an answer. Raises UsageError for a refusal."""
        status, _, found = await self.send(self.request(method, path, body))
        if status != 200:
            raise UsageError(f"{path} answers with status {status}: {found[:200].decode('utf-8', 'replace')}")
        return found
