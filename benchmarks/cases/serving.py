"""What a server adds to the engine, on loopback: at one client over ONNX Runtime in this process, and with 32 clients
beside other servers.

All servers run the same int8 MiniLM with the same number of threads, and take turns. Clients choose among golden inputs
of mixed lengths, one row each, and compare each answer with the golden one. Tensors are bytes behind the JSON where the
server takes them so.
"""

from __future__ import annotations

import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import onnxruntime as ort
import torch

import graphopt
from benchmarks import sentences
from benchmarks.case import Settings, checked, table
from benchmarks.models import Batch, bert, minilm
from benchmarks.servers.launching import GRAPHOPT, NAME, PEERS, PeerFailed, Server, cpu_seconds, started
from benchmarks.speed import write
from graphopt.serving.bundles import Bundle, opened
from graphopt.serving.load import Loaded, infer_request, load

ADDED = 0.7
"""Most milliseconds that the server adds to ONNX Runtime in the process of the client, at 1x16, in the median."""
CLIENTS = 32
SECONDS = 5.0
"""Of load in a round."""
CALLS = 200
"""One after the other in a round."""
LENGTHS = (5, 8, 11, 14, 16, 19, 23, 27, 32, 38, 45, 52, 64, 80, 100, 120)
"""Of the golden inputs."""


@dataclass
class Row:
    """What one server did."""

    throughput: list[float] = field(default_factory=list)
    """Right answers a second, by round, as are the next two."""
    p99: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    """CPU time of all its processes for each request."""
    wrong: int = 0
    errors: Counter[str] = field(default_factory=Counter)


def run(settings: Settings) -> bool:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = make_bundle(folder / "bundle", settings)
        added, times = _added(bundle, folder, settings)
        rows, failed = _loaded(bundle, folder, settings)
    settings.console.print(
        f"1x16, one client: {times['in process']:.2f} ms in process, {times['served']:.2f} ms served",
        checked(f"the server adds {added:.2f} ms, bound {ADDED}", added <= ADDED), sep="\n",
    )  # fmt: skip
    write(settings, "serving", {"ms": times, "servers": {one: asdict(row) for one, row in rows.items()}} | failed)
    return _shown(rows, failed, settings) and added <= ADDED


def make_bundle(folder: Path, settings: Settings) -> Path:
    """MiniLM in int8, with one golden input of each length; of random weights where the trained ones are missing."""
    tokens: Any = None
    try:
        tokens, module = sentences.tokenizer(), minilm()
    except ModuleNotFoundError:
        module = bert(6, 384, heads=12)
    made = [_tokens(tokens, length) for length in LENGTHS]
    small = graphopt.optimize(
        module, "quantize{scheme=static}", example_inputs=[made[LENGTHS.index(16)], made[-1]], calibration=made,
        threads=settings.threads, measure=False,
    )  # fmt: skip
    return small.bundle(folder, name=NAME, inputs=made, measure=True)


def _tokens(tokens: Any, length: int) -> Batch:
    """One row of so many tokens."""
    if tokens is not None:
        return sentences.filled(tokens, 1, length)
    ids = torch.randint(0, 1000, (1, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# --- one client -------------------------------------------------------------------------------------------------------


def _added(bundle: Path, folder: Path, settings: Settings) -> tuple[float, dict[str, float]]:
    """Milliseconds that the server adds at 1x16, and the medians of both. They take turns."""
    source = opened(bundle)
    case = source.cases[LENGTHS.index(16)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.threads
    session = ort.InferenceSession(source.content[source.manifest.model], options, providers=["CPUExecutionProvider"])
    venv = GRAPHOPT.venv
    assert venv is not None  # as it is this one
    with (
        started(GRAPHOPT, venv, bundle, settings.threads, folder / "alone") as (_, url),
        socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as connection,
    ):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        request = infer_request(f"/v2/models/{NAME}/infer", case)
        calls: dict[str, Callable[[], object]] = {
            "in process": partial(session.run, None, case.inputs),
            "served": partial(_asked, connection, request),
        }
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(settings.rounds + 1):
            for name, call in calls.items():
                found = [_milliseconds(call) for _ in range(CALLS)]
                if turn:  # the first one warms up
                    taken[name].append(median(found))
    added = median(b - a for a, b in zip(taken["in process"], taken["served"], strict=True))
    return added, {name: median(several) for name, several in taken.items()}


def _milliseconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def _asked(connection: socket.socket, request: bytes) -> bytes:
    """The whole answer to a request."""
    connection.sendall(request)
    received = connection.recv(1 << 18)
    while b"\r\n\r\n" not in received:
        received += connection.recv(1 << 18)
    head, _, body = received.partition(b"\r\n\r\n")
    length = next(int(one[15:]) for one in head.lower().split(b"\r\n") if one.startswith(b"content-length:"))
    parts, missing = [body], length - len(body)
    while missing:
        parts.append(connection.recv(min(missing, 1 << 18)))
        missing -= len(parts[-1])
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(head.decode("latin-1"))
    return b"".join(parts)


# --- many clients -----------------------------------------------------------------------------------------------------


def _loaded(bundle: Path, folder: Path, settings: Settings) -> tuple[dict[str, Row], dict[str, str]]:
    """By server what it did, and why others did nothing. All stay up, and take turns; an idle one takes no time."""
    rows, failed = dict[str, Row](), dict[str, str]()
    running: dict[str, tuple[Server, int, str]] = {}
    with ExitStack() as stack:
        for server in (GRAPHOPT, *PEERS):
            venv = server.venv
            if venv is None:
                failed[server.name] = f"not installed: {server.variable} names a venv with {server.packages}"
                continue
            place = folder / server.name.replace(" ", "-")
            try:
                process, url = stack.enter_context(started(server, venv, bundle, settings.threads, place))
            except PeerFailed as error:
                failed[server.name] = f"did not start: {error}"
                continue
            running[server.name], rows[server.name] = (server, process, url), Row()
        source = opened(bundle)
        for turn in range(max(1, settings.rounds // 5) + 1):
            for name, (server, process, url) in running.items():
                before = cpu_seconds(process)
                found = _load(server, url, bundle, SECONDS if turn else 1.0)
                if turn:  # the first one warms up
                    _add(rows[name], found, cpu_seconds(process) - before, source)
    return rows, failed


def _load(server: Server, url: str, bundle: Path, seconds: float) -> Loaded:
    target = f"{url}/v2/models/{NAME}"
    return load(target, clients=CLIENTS, seconds=seconds, bundle=bundle, binary=server.binary)


def _add(row: Row, found: Loaded, cpu: float, source: Bundle) -> None:
    total = found.answers + found.wrong + sum(found.errors.values())
    row.throughput.append(found.throughput)
    row.p99.append(found.p99)
    row.cpu_ms.append(cpu * 1e3 / max(1, total))
    row.wrong += found.wrong
    row.errors.update(found.errors)


def _shown(rows: dict[str, Row], failed: dict[str, str], settings: Settings) -> bool:
    """Print the table; whether graphopt answers the most requests a second, all of them right."""
    shown = table(
        f"{CLIENTS} clients, lengths {LENGTHS[0]} to {LENGTHS[-1]}", "", "requests/s", "p99 ms", "server CPU ms each",
        "wrong", "errors",
    )  # fmt: skip
    ours = median(rows[GRAPHOPT.name].throughput)
    fastest = all(ours >= median(row.throughput) for row in rows.values())
    for name, row in rows.items():
        errors = ", ".join(f"{count} x {kind}" for kind, count in row.errors.items()) or "0"
        is_right = name != GRAPHOPT.name or (fastest and not row.wrong and not row.errors)
        shown.add_row(
            name, checked(f"{median(row.throughput):.0f}", is_right), f"{median(row.p99):.1f}",
            f"{median(row.cpu_ms):.2f}", str(row.wrong), errors,
        )  # fmt: skip
    settings.console.print(shown)
    for name, why in failed.items():
        settings.console.print(f"{name}: {why}", style="yellow", soft_wrap=True)
    return fastest and not rows[GRAPHOPT.name].wrong and not rows[GRAPHOPT.name].errors
