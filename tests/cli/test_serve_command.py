"""graphopt serve and bench URL: how they refuse, and a server that runs for real."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest

from graphopt.serving import Predictor
from graphopt.serving.load import load
from tests.cli.test_cli import done, refused
from tests.serving.servers import ask, memory, raw, running, workers_of

uvicorn = pytest.importorskip("uvicorn")


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_serve_refuses(encoder: Path, tmp_path: Path) -> None:
    assert "0.0.0.0 can be reached from other machines: give a token" in refused(
        2, "serve", encoder, "--host", "0.0.0.0"
    )
    assert "holds no bundle" in refused(2, "serve", tmp_path)
    assert "there is no folder" in refused(1, "serve", tmp_path / "nowhere")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port} cannot be listened on: Address already in use" in refused(
            2, "serve", encoder, "--port", port
        )


def test_options_of_models_and_of_servers_do_not_mix(model: Path, tmp_path: Path) -> None:
    url = "http://127.0.0.1:1"
    assert "--passes is for models" in refused(2, "bench", url, "--passes", "quantize")
    for option, value in (("--clients", "2"), ("--seconds", "1"), ("--bundle", tmp_path), ("--token", "x")):
        assert f"{option} is for servers" in refused(2, "bench", model, option, value)
    assert "cannot be reached" in refused(2, "bench", url)
    assert "is no URL of a server or a model" in refused(2, "bench", "http://127.0.0.1:1/else")


# --- for real ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_bundle_that_is_damaged_is_not_served(encoder: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    copytree(encoder, bundle)
    (bundle / "golden.npz").write_bytes(b"")
    for workers in ("1", "2"):
        command = [sys.executable, "-m", "graphopt", "serve", str(bundle), "--port", "0", "--workers", workers]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 2 and "golden.npz is not the file" in ended.stderr


LOAD_SECONDS = float(os.environ.get("GRAPHOPT_LOAD_SECONDS", "6"))
"""How long the test of load takes."""
MALFORMED = (
    b"nonsense\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost",
    b"\x00" * 100,
    b"POST /v2/models/x/infer HTTP/9\r\n\r\n",
    b"POST /v2/models/b/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n{",
    b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Encoding: gzip\r\n\r\n{}",
    b"POST /v2/models/b/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n"
    b"Inference-Header-Content-Length: 2\r\n\r\n{}1234567",
    b"POST /v2/models/b/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
)  # fmt: skip


def send_malformed(url: str, ends: float) -> int:
    """One malformed request for each hundred that were answered, until a time. How many were sent."""
    sent = 0
    while time.monotonic() < ends:
        with urlopen(f"{url}/metrics", timeout=30) as answer:
            found = re.findall(rb'^graphopt_requests_total\{.*status="200"\} (\d+)$', answer.read(), re.MULTILINE)
        for _ in range(max(0, sum(map(int, found)) // 100 - sent)):
            with socket.create_connection(tuple(url.removeprefix("http://").split(":")), timeout=30) as connection:  # type: ignore[arg-type]
                connection.sendall(MALFORMED[sent % len(MALFORMED)])
                connection.shutdown(socket.SHUT_WR)
                answer_ = connection.recv(65536)
                assert answer_ == b"" or answer_.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), answer_
            sent += 1
        time.sleep(0.1)
    return sent


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="processes and their memory are read from /proc")
def test_load_with_damage_reload_and_stop(encoder: Path, tmp_path: Path) -> None:
    """Under load: malformed requests, a bundle that is replaced each second, a worker that is told to stop, and then
    the server. No answer is lost or wrong, and memory does not grow."""
    bundle, seconds = tmp_path / "b", LOAD_SECONDS
    copytree(encoder, bundle)
    with running(bundle, "--workers", "2", "--reload-every", "0.1", "--quiet") as (server, url):
        ends = time.monotonic() + seconds
        with ThreadPoolExecutor(2) as pool:
            loaded = pool.submit(load, url, clients=8, seconds=seconds)
            malformed = pool.submit(send_malformed, url, ends - 1)
            first, other = workers_of(server)
            begin, told, reloads = 0, False, 0
            while time.monotonic() < ends - 1:
                time.sleep(1)
                replace_bundle(encoder, bundle, reloads)
                reloads += 1
                if not told and time.monotonic() > ends - 0.7 * seconds:
                    os.kill(first, signal.SIGTERM)
                    told, begin = True, memory(other)
            end, replaced = memory(other), workers_of(server)
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
            found, sent = loaded.result(), malformed.result()
    print(f"{found}\n{sent} malformed requests, {reloads} reloads, {begin >> 20} -> {end >> 20} MiB")
    assert told and other in replaced and first not in replaced
    assert found.wrong == 0 and found.answers > 10 * seconds and sent > found.answers // 500
    assert set(found.errors) <= {"ConnectionRefusedError"}  # after the server has stopped
    assert end - begin < 32 << 20


def replace_bundle(encoder: Path, bundle: Path, number: int) -> None:
    """Put another bundle that answers the same in the place of one that is served."""
    made = bundle.with_name(f"new{number}")
    copytree(encoder, made)
    manifest = made / "manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf-8") + "\n" * (1 + number % 2), encoding="utf-8")
    rmtree(bundle)
    made.rename(bundle)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are found in /proc")
def test_workers_that_are_killed_together_are_started_again(encoder: Path) -> None:
    with running(encoder, "--workers", "2", "--quiet") as (server, url):
        before = workers_of(server)
        for one in before:
            os.kill(one, signal.SIGKILL)
        end = time.monotonic() + 60
        while time.monotonic() < end and (
            ask(f"{url}/v2/health/ready")[0] != 200 or not set(workers_of(server)).isdisjoint(before)
        ):
            time.sleep(0.1)
        assert ask(f"{url}/v2/health/ready")[0] == 200 and server.poll() is None
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


@pytest.mark.slow
def test_two_workers_a_token_and_bench(encoder: Path) -> None:
    options = ["--workers", "2", "--token", "secret", "--host", "127.0.0.1", "--threads", "1", "--at-once", "2"]
    with running(encoder, *options, "--cors", "https://a.example", "--allow-batch-variance") as (server, url):
        assert ask(f"{url}/v2/models/encoder")[0] == 401
        told = json.loads(done("bench", url, "--token", "secret", "--clients", "4", "--seconds", "1", "--json"))
        assert told["wrong"] == 0 and told["errors"] == {} and told["answers"] > 10
        said = done("bench", f"{url}/v2/models/encoder", "--bundle", encoder, "--token", "secret", "--seconds", "0.5")
        assert "wrong answers: 0" in said
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


@pytest.mark.slow
def test_limits_of_connections(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ["--max-bytes", "1000", "--max-queue", "4", "--max-tokens", "8", "--timeout", "5", "--body-timeout", "0.3"]
    with running(encoder, *limits) as (_, url):
        head = b"POST /v2/models/encoder/infer HTTP/1.1\r\nHost: x\r\n"
        assert raw(url, head + b"Content-Length: 5000\r\n\r\n" + b"x" * 5000).startswith(b"HTTP/1.1 413")
        assert raw(url, head + b"Content-Length: 100\r\n\r\nslow").startswith(b"HTTP/1.1 408")
        assert raw(url, head + b"X: " + b"x" * 70_000).startswith(b"HTTP/1.1 431")
        assert raw(url, b"GET /v2 HT").startswith(b"HTTP/1.1 408")  # after 10 seconds
        assert raw(url, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400")
        assert ask(f"{url}/v2/health/live")[0] == 200


@pytest.mark.slow
def test_a_client_of_triton_runs_unchanged(encoder: Path) -> None:
    client = pytest.importorskip("tritonclient.http")
    ids, mask = np.array([[3, 4, 5]]), np.ones((1, 3), np.int64)
    wanted = Predictor(encoder)(ids=ids, mask=mask)["y"]

    def inputs(binary: bool) -> list[Any]:
        found = []
        for name, array in (("ids", ids), ("mask", mask)):
            found.append(client.InferInput(name, array.shape, "INT64"))
            found[-1].set_data_from_numpy(array, binary_data=binary)
        return found

    with (
        running(encoder) as (_, url),
        client.InferenceServerClient(url.removeprefix("http://"), concurrency=4) as server,
    ):
        assert server.is_server_live() and server.is_server_ready() and server.is_model_ready("encoder", "1")
        assert "binary_tensor_data" in server.get_server_metadata()["extensions"]
        assert server.get_model_metadata("encoder")["outputs"][0]["name"] == "y"
        assert server.get_model_config("encoder")["input"][0]["data_type"] == "TYPE_INT64"
        assert server.get_model_repository_index()[0]["state"] == "READY"
        for binary in (True, False):
            outputs = [client.InferRequestedOutput("y", binary_data=binary)]
            answers = [
                server.infer("encoder", inputs(binary)),
                server.infer("encoder", inputs(binary), "1", outputs, request_id="7"),
                server.infer("encoder", inputs(binary), outputs=outputs, request_compression_algorithm="gzip"),
                server.infer("encoder", inputs(binary), request_compression_algorithm="deflate"),
                server.infer("encoder", inputs(binary), response_compression_algorithm="gzip"),
                server.async_infer("encoder", inputs(binary)).get_result(),
            ]
            assert all(np.array_equal(one.as_numpy("y"), wanted) for one in answers)
            assert answers[1].get_response()["id"] == "7"
        with pytest.raises(Exception, match="there is no model 'nobody'"):
            server.infer("nobody", inputs(True))
        with pytest.raises(Exception, match="outputs have no classification here"):
            server.infer("encoder", inputs(True), outputs=[client.InferRequestedOutput("y", class_count=2)])


@pytest.mark.slow
def test_a_rest_client_of_tensorflow_serving_runs_unchanged(encoder: Path) -> None:
    """As the guides of TensorFlow Serving write them, with requests."""
    requests = pytest.importorskip("requests")
    ids, mask = np.array([[3, 4, 5], [6, 7, 8]]), np.ones((2, 3), np.int64)
    wanted = Predictor(encoder)(ids=ids, mask=mask)["y"]
    with running(encoder) as (_, url):
        model = f"{url}/v1/models/encoder"
        assert requests.get(model).json()["model_version_status"][0]["state"] == "AVAILABLE"
        signatures = requests.get(f"{model}/metadata").json()["metadata"]["signature_def"]["signature_def"]
        assert signatures["serving_default"]["inputs"]["ids"]["dtype"] == "DT_INT64"
        rows = [{"ids": one.tolist(), "mask": other.tolist()} for one, other in zip(ids, mask, strict=True)]
        data = json.dumps({"signature_name": "serving_default", "instances": rows})
        for address in (f"{model}:predict", f"{model}/versions/1:predict"):
            answer = requests.post(address, data=data, headers={"content-type": "application/json"})
            assert np.array_equal(np.float32(json.loads(answer.text)["predictions"]), wanted)
        answer = requests.post(f"{model}:predict", data=data)  # as curl -d does
        answer.raise_for_status()
        columns = requests.post(f"{model}:predict", json={"inputs": {"ids": ids.tolist(), "mask": mask.tolist()}})
        assert np.array_equal(np.float32(columns.json()["outputs"]), wanted)
        refused_ = requests.post(f"{model}:predict", json={"instances": [{"idz": [1]}]})
        assert refused_.status_code == 400 and "idz" in refused_.json()["error"]
