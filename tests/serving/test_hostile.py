"""A server and clients that mean no good: damaged bytes, and all that its OpenAPI document allows."""

from __future__ import annotations

import gzip
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copytree

import pytest

from graphopt.serving.load import load
from tests.serving.servers import ask, memory, running

pytest.importorskip("uvicorn")
pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("GRAPHOPT_FUZZ_SECONDS", "5"))
"""Of each test."""
SEED = int(os.environ.get("GRAPHOPT_FUZZ_SEED", "0"))


@pytest.fixture
def folder(encoder: Path, classifier: Path, writer: Path, tmp_path: Path) -> Path:
    """One bundle of each kind."""
    for bundle in (encoder, classifier, writer):
        copytree(bundle, tmp_path / bundle.name / "1")
    return tmp_path


def request(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def requests() -> list[bytes]:
    """Right ones, of each kind."""
    tokens = [{"name": name, "shape": [1, 3], "datatype": "INT64", "data": [1, 1, 1]} for name in ("ids", "mask")]
    sizes = [
        {"name": name, "shape": [1, 3], "datatype": "INT64", "parameters": {"binary_data_size": 24}}
        for name in ("ids", "mask")
    ]
    plain = json.dumps({"id": "7", "inputs": tokens, "outputs": [{"name": "y"}]}).encode()
    head = json.dumps({"inputs": sizes, "parameters": {"binary_data_output": True}}).encode()
    binary = head + (1).to_bytes(8, "little") * 6
    rows = json.dumps({"instances": [{"ids": [1, 2], "mask": [1, 1]}]}).encode()
    prompt = json.dumps({"prompt": "w2 w3", "max_tokens": 4, "top_p": 0.9, "seed": 1, "stop": ["w9"]}).encode()
    stream = json.dumps({"prompt": "w2", "stream": True, "model": "writer"}).encode()
    text = json.dumps({"inputs": ["w2 w3", ["w4", "w5"]], "model": "classifier", "version": "1"}).encode()
    infer, chunked = "/v2/models/encoder/infer", b"%x\r\n%s\r\n0\r\n\r\n" % (len(plain), plain)
    return [
        request("POST", infer, plain, Content_Type="application/json"),
        request("POST", infer, binary, Inference_Header_Content_Length=str(len(head))),
        request("POST", infer, gzip.compress(plain), Content_Encoding="gzip"),
        b"POST /v2/models/encoder/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked,
        request("POST", "/v1/models/encoder:predict", rows),
        request("POST", "/predict", text, Content_Type="application/json"),
        request("POST", "/predict?model=classifier", b"w2 w3"),
        request("POST", "/generate?model=writer", prompt),
        request("POST", "/generate", stream, Accept="text/event-stream"),
        request("POST", "/v2/repository/index", b"{}"),
        *(request("GET", path, X_Request_Id="a") for path in PATHS),
    ]


PATHS = (
    "/v2", "/v2/health/ready", "/v2/models/encoder/versions/1", "/v2/models/writer/config", "/v2/models/encoder/golden",
    "/v1/models/encoder", "/v1/models/classifier/versions/1/metadata", "/metrics", "/openapi.json",
)  # fmt: skip


def damaged(content: bytes, others: list[bytes], choose: random.Random) -> bytes:
    """Bytes changed, cut, repeated, or taken from another request; the length of the body is mended now and then."""
    found = bytearray(content)
    for _ in range(choose.choice((1, 1, 2, 4, 16))):
        start = choose.randrange(len(found) + 1)
        end = min(len(found), start + choose.choice((1, 1, 2, 8, 64)))
        match choose.randrange(6):
            case 0:
                found[start:end] = bytes(choose.randrange(256) for _ in range(end - start))
            case 1:
                del found[start:end]
            case 2:
                found[start:start] = found[start:end] * choose.choice((1, 2, 100))
            case 3:
                other = choose.choice(others)
                place = choose.randrange(len(other))
                found[start:end] = other[place : place + choose.choice((1, 8, 64, 1024))]
            case 4:
                found[start:end] = choose.choice((b"\x00", b"\xff", b"-1", b"1e999", b"NaN", b"[[", b"{", b'"', b"%2e"))
            case _:
                found[start:end] = str(choose.choice((0, 2**31, 2**63, 2**64, -1))).encode()
    head, blank, body = bytes(found).partition(b"\r\n\r\n")
    if choose.random() < 0.5 and blank:
        lines = [one for one in head.split(b"\r\n") if not one.lower().startswith(b"content-length")]
        head = b"\r\n".join([*lines, b"Content-Length: %d" % len(body)])
    return head + blank + body


def answer_to(address: tuple[str, int], content: bytes) -> bytes:
    """The first bytes of the answer; empty where the server waits for more, or closes the connection."""
    with socket.create_connection(address, timeout=0.3) as connection:
        try:
            connection.sendall(content)
            return connection.recv(1 << 16)
        except (TimeoutError, ConnectionError):
            return b""


def test_damaged_bytes(folder: Path) -> None:
    with running(folder, "--quiet", "--timeout", "5") as (server, url):
        address, right = ("127.0.0.1", int(url.rsplit(":", 1)[1])), requests()
        assert all(answer_to(address, one).startswith(b"HTTP/1.1 200") for one in right[:9])
        before, ends = memory(server.pid), time.monotonic() + SECONDS

        def attack(seed: int) -> Counter[int]:
            choose, statuses = random.Random(seed), Counter[int]()
            while time.monotonic() < ends:
                content = damaged(choose.choice(right), right, choose)
                answer = answer_to(address, content)
                status = int(answer[9:12]) if answer else 0
                statuses[status] += 1
                assert status < 500, (content, answer)
                assert answer == b"" or answer.startswith(b"HTTP/1.1 "), (content, answer)
            return statuses

        with ThreadPoolExecutor(8) as pool:
            statuses = sum(pool.map(attack, range(SEED, SEED + 8)), Counter[int]())
        print(f"{SECONDS:g} s: {dict(sorted(statuses.items()))}, {before >> 20} -> {memory(server.pid) >> 20} MiB")
        assert statuses[200] and statuses[400] and server.poll() is None
        assert memory(server.pid) - before < 256 << 20
        found = load(f"{url}/v2/models/encoder", clients=2, seconds=0.5)
        assert found.wrong == 0 and found.errors == {} and found.answers


def test_all_that_openapi_allows(folder: Path) -> None:
    pytest.importorskip("schemathesis")
    checks = (
        "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
        "response_schema_conformance", "unsupported_method", "allow_header_conformance",
    )  # fmt: skip
    with running(folder, "--quiet", "--timeout", "5") as (server, url):
        ran = subprocess.run(
            [
                str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json",
                "--checks", ",".join(checks), "--max-time", str(round(SECONDS)), "--seed", str(SEED), "--no-color",
                "--continue-on-failure", "--warnings", "off",
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        print(ran.stdout)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert server.poll() is None and ask(f"{url}/v2/health/ready")[0] == 200
