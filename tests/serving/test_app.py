"""What the server answers: three protocols, and one line for each kind of wrong request."""

from __future__ import annotations

import gzip
import json
import logging
import threading
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from shutil import copy, copytree, rmtree
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import graphopt
from graphopt.errors import UsageError
from graphopt.serving import Predictor, bodies, golden, tensors_v1
from graphopt.serving.models import _stamp
from graphopt.serving.refusals import Refused
from tests.models import model, padding, tokens
from tests.serving.client import Answer, Client

IDS, MASK = tokens().numpy(), padding().numpy()
V2, V1 = "/v2/models/encoder/infer", "/v1/models/encoder:predict"


@pytest.fixture(scope="module")
def client(encoder: Path) -> Iterator[Client]:
    with Client.of(encoder) as found:
        yield found


@pytest.fixture(scope="module")
def labels(classifier: Path) -> Iterator[Client]:
    with Client.of(classifier) as found:
        yield found


@pytest.fixture(scope="module")
def text(writer: Path) -> Iterator[Client]:
    with Client.of(writer) as found:
        yield found


def tensor(name: str, array: Any, datatype: str = "INT64", **more: Any) -> dict[str, Any]:
    return {"name": name, "shape": list(array.shape), "datatype": datatype, "data": array.tolist()} | more


def v2(ids: Any = IDS, mask: Any = MASK, **more: Any) -> dict[str, Any]:
    return {"inputs": [tensor("ids", ids), tensor("mask", mask)]} | more


def binary(*arrays: Any, **parameters: Any) -> tuple[bytes, dict[str, str]]:
    """A request with its tensors behind the JSON, and its headers."""
    inputs = [
        {
            "name": name,
            "shape": list(array.shape),
            "datatype": "INT64",
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in zip(("ids", "mask"), arrays, strict=True)
    ]
    head = json.dumps({"inputs": inputs, "parameters": parameters}).encode()
    return head + b"".join(one.tobytes() for one in arrays), {"Inference-Header-Content-Length": str(len(head))}


# --- health and metadata ----------------------------------------------------------------------------------------------


def test_health_and_metadata(client: Client, encoder: Path) -> None:
    assert client("GET", "/v2/health/live").status == client("GET", "/v2/health/ready").status == 200
    assert client("GET", "/v2").json()["extensions"][0] == "binary_tensor_data"
    found = client("GET", "/v2/models/encoder").json()
    assert found["inputs"][0] == {"name": "ids", "datatype": "INT64", "shape": [-1, -1]}
    assert found["versions"] == ["1"]
    assert client("GET", "/v2/models/encoder/versions/1/ready").status == 200
    assert client("GET", "/v1/models/encoder").json()["model_version_status"][0]["state"] == "AVAILABLE"
    assert client("POST", "/v2/repository/index").json() == [
        {"name": "encoder", "version": "1", "state": "READY", "reason": ""}
    ]
    config = client("GET", "/v2/models/encoder/config").json()
    assert config["input"][0]["data_type"] == "TYPE_INT64"
    assert "serving_default" in json.dumps(client("GET", "/v1/models/encoder/metadata").json())


def test_it_is_live_but_not_ready_before_its_models_are_checked(encoder: Path) -> None:
    from graphopt.serving.app import App, Settings

    starting = Client(App(Settings(encoder)))
    starting.app.start()
    with starting:
        assert starting("GET", "/v2/health/live").status == 200
        assert starting("GET", "/v2/health/ready").status == 503
        assert starting("POST", V2, v2()).status == 503


def test_a_server_that_stops_is_not_ready_and_closes_connections(encoder: Path) -> None:
    with Client.of(encoder) as stopping:
        stopping.app.draining = True
        assert stopping("GET", "/v2/health/ready").status == 503
        answer = stopping("POST", V2, v2())
        assert answer.status == 200 and answer.headers["connection"] == "close"


# --- tensors ----------------------------------------------------------------------------------------------------------


def test_v2_in_json_and_in_bytes_and_v1_answer_as_the_predictor(client: Client, encoder: Path) -> None:
    wanted = Predictor(encoder)(ids=IDS, mask=MASK)["y"]
    found = client("POST", V2, v2(id="seven")).json()
    assert found["id"] == "seven" and found["model_name"] == "encoder" and found["model_version"] == "1"
    assert found["outputs"][0]["datatype"] == "FP32" and found["outputs"][0]["shape"] == list(wanted.shape)
    assert np.array_equal(np.float32(found["outputs"][0]["data"]).reshape(wanted.shape), wanted)

    answer = client("POST", V2, *binary(IDS, MASK, binary_data_output=True))
    head = int(answer.headers["inference-header-content-length"])
    assert json.loads(answer.body[:head])["outputs"][0]["parameters"] == {"binary_data_size": wanted.nbytes}
    assert np.array_equal(np.frombuffer(answer.body[head:], np.float32).reshape(wanted.shape), wanted)

    rows = [{"ids": ids.tolist(), "mask": mask.tolist()} for ids, mask in zip(IDS, MASK, strict=True)]
    assert np.array_equal(np.float32(client("POST", V1, {"instances": rows}).json()["predictions"]), wanted)
    columns = {"ids": IDS.tolist(), "mask": MASK.tolist()}
    assert np.array_equal(np.float32(client("POST", V1, {"inputs": columns}).json()["outputs"]), wanted)
    assert client("POST", "/v1/models/encoder/versions/1:predict", {"inputs": columns}).status == 200


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress], ids=["gzip", "deflate"])
def test_a_compressed_body(pack: Any, client: Client) -> None:
    body, name = pack(json.dumps(v2()).encode()), "gzip" if pack is gzip.compress else "deflate"
    assert client("POST", V2, body, {"Content-Encoding": name}).status == 200


def test_only_the_outputs_that_are_asked_for(client: Client) -> None:
    answer = client("POST", V2, v2(outputs=[{"name": "y", "parameters": {"binary_data": True}}]))
    assert "inference-header-content-length" in answer.headers
    assert client("POST", V2, v2(outputs=[{"name": "z"}])).error == "there is no output 'z'; there are y"


FLOATS = IDS.astype(np.float64) + 0.5
ROW: dict[str, Any] = {"ids": [1], "mask": [1]}
LONG = np.ones((2, 3), np.int64)
WRONG: list[tuple[str, str, Any, int, str]] = [
    ("no JSON", V2, b"{", 400, "the body is no JSON"),
    ("a list", V2, [], 400, "the body must be an object"),
    ("deep JSON", V2, b"[" * 100_000, 400, "the body is no JSON"),
    ("no UTF-8", V2, b'{"a": "\xff"}', 400, "the body is no JSON"),
    ("no inputs", V2, {}, 400, "inputs must be a list of tensors"),
    ("inputs of another kind", V2, {"inputs": [1]}, 400, "inputs must be a list of tensors"),
    ("a wrong name", V2, {"inputs": [tensor("idz", IDS)]}, 400, "there is no input 'idz'; did you mean 'ids'?"),
    ("a missing input", V2, {"inputs": [tensor("ids", IDS)]}, 400, "missing inputs: mask"),
    ("an input twice", V2, {"inputs": [tensor("ids", IDS)] * 2}, 400, "input 'ids' is given twice"),
    ("a wrong dtype", V2, {"inputs": [tensor("ids", FLOATS, "FP32"), tensor("mask", MASK)]}, 400, "ids is float32"),
    ("an unknown dtype", V2, {"inputs": [tensor("ids", IDS, "INT7")]}, 400, "ids: datatype must be one of"),
    ("floats for integers", V2, {"inputs": [tensor("ids", FLOATS)]}, 400, "ids is float64, and should be int64"),
    ("texts", V2, {"inputs": [tensor("ids", IDS, data=["a"])]}, 400, "ids holds no numbers, and should be int64"),
    ("too large", V2, {"inputs": [tensor("ids", IDS, data=[2**70])]}, 400, "ids holds"),
    ("a wrong rank", V2, v2(ids=IDS[0], mask=MASK[0]), 400, "ids has the shape [7], and should have [batch, seq]"),
    ("axes that differ", V2, v2(mask=LONG), 400, "ids and mask differ along seq: 7 and 3"),
    ("a shape that lies", V2, {"inputs": [tensor("ids", IDS, shape=[3, 7])]}, 400, "ids has 14 numbers"),
    ("a negative shape", V2, {"inputs": [tensor("ids", IDS, shape=[-1, 7])]}, 400, "shape must be a list of sizes"),
    ("a huge shape", V2, {"inputs": [tensor("ids", IDS, shape=[2**39, 2**39])]}, 400, "ids has 14 numbers"),
    ("more axes than arrays have", V2, {"inputs": [tensor("ids", IDS, shape=[*[1] * 63, 2, 7])]}, 400, "65 axes"),
    ("axes of no numbers", V2, {"inputs": [tensor("ids", IDS, shape=[0, 2**39, 2**39], data=[])]}, 400, "3 axes"),
    ("deep data", V2, {"inputs": [tensor("ids", IDS, data=json.loads("[" * 99 + "]" * 99))]}, 400, "64 deep"),
    ("a text among numbers", V2, {"inputs": [tensor("ids", IDS, data=["x" * 9999] + [1] * 13)]}, 400, "no numbers"),
    ("classes", V2, v2(outputs=[{"name": "y", "parameters": {"classification": 3}}]), 400, "no classification here"),
    ("memory of the client", V2, v2(outputs=[{"name": "y", "parameters": {"shared_memory_region": "r"}}]), 400, "no s"),
    ("a sequence", V2, v2(parameters={"sequence_id": 7}), 400, "there are no sequences here"),
    ("ragged", V2, {"inputs": [tensor("ids", IDS, data=[[1, 2], [3]])]}, 400, "ids is ragged"),
    ("an empty batch", V2, v2(ids=IDS[:0], mask=MASK[:0]), 400, "which holds nothing"),
    ("a token that is none", V2, v2(ids=IDS + 48), 400, "and the model knows 0 to 47"),
    ("parameters", V2, v2(parameters=[]), 400, "parameters must be an object"),
    ("shared memory", V2, {"inputs": [tensor("ids", IDS, parameters={"shared_memory_region": "r"})]}, 400, "no shared"),
    ("v1 of both forms", V1, {"instances": [], "inputs": {}}, 400, "give either instances"),
    ("v1 without rows", V1, {"instances": []}, 400, "instances must be a list of rows"),
    ("v1 with ragged rows", V1, {"instances": [dict(ROW, ids=[1, 2]), ROW]}, 400, "ids is ragged"),
    ("v1 with other rows", V1, {"instances": [ROW, {"ids": [1]}]}, 400, "each instance must be"),
    ("v1 with another signature", V1, {"signature_name": "x", "inputs": {}}, 400, "there is no signature 'x'"),
    ("an unknown model", "/v2/models/nobody/infer", v2(), 404, "there is no model 'nobody'"),
    ("an unknown version", "/v2/models/encoder/versions/9/infer", v2(), 404, "encoder has no version '9'"),
    ("a name that climbs", "/v2/models/%2e%2e/infer", v2(), 400, "the name of a model or version has"),
    ("a name with a slash", "/v2/models/a%2Fb/infer", v2(), 400, "the name of a model or version has"),
    ("a version that climbs", "/v2/models/encoder/versions/%2e%2e/infer", v2(), 400, "the name of a model or version"),
    ("no path", "/v3", v2(), 404, "there is no such path"),
    ("texts to a model without a tokenizer", "/predict", b"hello", 400, "has no tokenizer"),
    ("a prompt to no language model", "/generate", {"prompt": "a"}, 400, "is no language model"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "status", "message"), [one[1:] for one in WRONG], ids=[one[0] for one in WRONG]
)
def test_wrong_requests(path: str, body: Any, status: int, message: str, client: Client) -> None:
    answer = client("POST", path, body)
    assert (answer.status, message in answer.error) == (status, True), answer.error


def test_a_method_that_a_path_does_not_take(client: Client) -> None:
    answer = client("GET", V2)
    assert answer.status == 405 and answer.headers["allow"] == "POST"


LIES: list[tuple[str, Any, str]] = [
    ("no number", lambda body, head: (body, "x"), "is no length"),
    ("negative", lambda body, head: (body, "-1"), "is no length"),
    ("more than all", lambda body, head: (body, str(len(body) + 1)), "is no length"),
    ("less than the JSON", lambda body, head: (body, str(head - 1)), "is no JSON"),
    ("more than the JSON", lambda body, head: (body, str(head + 1)), "is no JSON"),
    ("bytes are missing", lambda body, head: (body[:-1], str(head)), "binary_data_size is more than the body holds"),
    ("bytes too many", lambda body, head: (body + b"x", str(head)), "1 bytes behind the tensors belong to none"),
]


@pytest.mark.parametrize("lie", [one[1:] for one in LIES], ids=[one[0] for one in LIES])
def test_binary_lengths_that_lie(lie: tuple[Any, str], client: Client) -> None:
    body, headers = binary(IDS, MASK)
    body, length = lie[0](body, int(headers["Inference-Header-Content-Length"]))
    answer = client("POST", V2, body, {"Inference-Header-Content-Length": length})
    assert answer.status == 400 and lie[1] in answer.error


def test_answers_that_json_lacks_are_null(tmp_path: Path) -> None:
    onnx.save(model("g (float[batch, 2] x) => (float[batch, 2] y) {y = Log(x)}"), tmp_path / "log.onnx")
    graphopt.bundle(tmp_path / "log.onnx", tmp_path / "log", inputs=[{"x": torch.tensor([[1.0, 2.0]])}])
    asked = tensor("x", np.array([[-1, 0]], np.float32), "FP32")
    with Client.of(tmp_path / "log") as logs:
        for path, body in (
            ("/v1/models/log:predict", {"instances": [[-1, 0]]}),
            ("/v2/models/log/infer", {"inputs": [asked]}),
        ):
            answer = logs("POST", path, body)
            assert answer.status == 200 and b"null,null" in answer.body
            json.loads(answer.body, parse_constant=pytest.fail)
        binary = logs("POST", "/v2/models/log/infer", {"inputs": [asked], "parameters": {"binary_data_output": True}})
        found = np.frombuffer(binary.body[-8:], np.float32)
        assert np.isnan(found[0]) and np.isneginf(found[1])


SHAPES = st.lists(st.lists(st.integers(0, 3), max_size=2).map(tuple), min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(SHAPES)
def test_predictions_are_rows_of_all_outputs(shapes: list[tuple[int, ...]]) -> None:
    """One output is held to that as several are: a scalar has no rows."""
    outputs = {f"y{place}": np.full(shape, place, np.float32) for place, shape in enumerate(shapes)}
    if not all(shapes) or len({shape[0] for shape in shapes}) > 1:
        with pytest.raises(Refused, match="not rows: ask with inputs"):
            tensors_v1.written(outputs, True)
    else:
        rows = tensors_v1.written(outputs, True)["predictions"]
        assert len(rows) == shapes[0][0]
        for row in rows:
            named = row if len(outputs) > 1 else {"y0": row}
            assert {name: np.shape(one) for name, one in named.items()} == {
                name: array.shape[1:] for name, array in outputs.items()
            }
    assert "outputs" in tensors_v1.written(outputs, False)


def test_nan_is_refused(tmp_path: Path) -> None:
    onnx.save(model("g (float[batch, 2] x) => (float[batch, 2] y) {y = Relu(x)}"), tmp_path / "relu.onnx")
    graphopt.bundle(tmp_path / "relu.onnx", tmp_path / "relu")
    with Client.of(tmp_path / "relu") as floats:
        for value in ("NaN", "Infinity", "1e39"):
            body = b'{"instances": [[1, %s]]}' % value.encode()
            answer = floats("POST", "/v1/models/relu:predict", body)
            assert answer.status == 400 and answer.error == "x holds NaN or infinity"
        assert floats("POST", "/v1/models/relu:predict", {"instances": [[1, -2]]}).json() == {
            "predictions": [[1.0, 0.0]]
        }


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow(encoder: Path) -> Iterator[Client]:
    with Client.of(encoder, max_bytes=2000, max_tokens=20, body_timeout=0.02) as found:
        yield found


def test_a_body_that_is_too_large(narrow: Client) -> None:
    assert narrow("POST", V2, b"x" * 2001).status == 413
    assert narrow("POST", V2, b"x", {"Content-Length": "2001"}).status == 413
    assert narrow("POST", V2, b"x", {"Content-Length": "9" * 30}).status == 413


def test_a_zip_bomb(narrow: Client) -> None:
    bomb = gzip.compress(b"0" * 1_000_000, mtime=0)
    assert len(bomb) < 2000
    answer = narrow("POST", V2, bomb, {"Content-Encoding": "gzip"})
    assert answer.status == 413 and "after decompression" in answer.error


@pytest.mark.parametrize(
    ("body", "encoding", "status"),
    [(b"x", "gzip", 400), (gzip.compress(b"{}" * 50, mtime=0)[:-9], "gzip", 400), (b"x", "br", 415)],
)
def test_what_cannot_be_decompressed(body: bytes, encoding: str, status: int, narrow: Client) -> None:
    assert narrow("POST", V2, body, {"Content-Encoding": encoding}).status == status


def test_too_many_tokens(narrow: Client) -> None:
    answer = narrow("POST", V2, v2(np.ones((3, 7), int), np.ones((3, 7), int)))
    assert answer.status == 413 and answer.error == "the request has 21 tokens; the most is 20"


def test_a_slow_sender(narrow: Client) -> None:
    answer = narrow.loop.run_until_complete(narrow.call("POST", V2, v2(IDS[:1], MASK[:1]), slow=0.2))
    assert answer.status == 408 and answer.headers["connection"] == "close"


def test_an_answer_that_takes_too_long_and_a_queue_that_is_full(encoder: Path) -> None:
    with Client.of(encoder, timeout=0.05, max_queue=1, at_once=1) as busy:
        hold, run = threading.Event(), busy.app.models.get("encoder").batcher._run
        busy.app.models.get("encoder").batcher._run = lambda feeds: (hold.wait(5), run(feeds))[1]
        answers = busy.together(*[("POST", V2, v2())] * 3)
        hold.set()
        assert sorted(one.status for one in answers) == [408, 408, 429]
        assert next(one for one in answers if one.status == 429).headers["retry-after"] == "1"


def test_a_request_of_more_items_than_the_queue_holds(classifier: Path) -> None:
    texts = [f"w{2 + number % 40} w3" for number in range(100)]
    with Client.of(classifier, max_queue=4, at_once=1, max_tokens=200) as client:
        answer = client("POST", "/predict", {"inputs": texts})
        assert answer.status == 200
        alone = [client("POST", "/predict", text.encode()).json()["predictions"][0] for text in texts[:3]]
        assert answer.json()["predictions"][:3] == alone and len(answer.json()["predictions"]) == 100
        refused = client("POST", "/predict", {"inputs": [*texts, "w2"]})
        assert refused.status == 413 and refused.error == "the request has 201 tokens; the most is 200"


def test_a_batch_that_is_larger_than_pays_is_cut(client: Client, encoder: Path) -> None:
    sizes, ids = list[int](), np.random.default_rng(0).integers(0, 48, (50, 7))
    client.app.models.get("encoder").batcher._on_batch = sizes.append
    answer = client("POST", V2, v2(ids, np.ones_like(ids))).json()
    wanted = Predictor(encoder)(ids=ids, mask=np.ones_like(ids))["y"]
    found = np.float32(answer["outputs"][0]["data"]).reshape(answer["outputs"][0]["shape"])
    assert golden.sqnr({"y": wanted}, {"y": found}) > 100
    assert sum(sizes) == 50 and max(sizes) == 8


def test_a_long_prompt_is_too_large(writer: Path) -> None:
    with Client.of(writer, max_tokens=5) as client:
        answer = client("POST", "/generate", {"prompt": "w2 " * 6})
        assert answer.status == 413 and answer.error == "the request has 6 tokens; the most is 5"


# --- who may ask ------------------------------------------------------------------------------------------------------


def test_a_token(encoder: Path) -> None:
    with Client.of(encoder, token="secret") as guarded:
        assert guarded("GET", "/v2/health/ready").status == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            assert guarded("POST", V2, v2(), headers).status == 401
            assert guarded("GET", "/metrics", b"", headers).status == 401
        assert guarded("POST", V2, v2(), {"Authorization": "Bearer secret"}).status == 200


def test_pages_of_other_origins(encoder: Path, client: Client) -> None:
    origin = {"Origin": "https://page.example"}
    assert client("POST", V2, v2(), origin).status == 403
    with Client.of(encoder, cors=("https://page.example",)) as open_:
        assert open_("POST", V2, v2(), origin).headers["access-control-allow-origin"] == "https://page.example"
        assert open_("OPTIONS", V2, b"", origin).status == 204
        assert open_("POST", V2, v2(), {"Origin": "https://other.example"}).status == 403


# --- texts and images -------------------------------------------------------------------------------------------------


def test_predict_takes_texts_and_answers_labels(labels: Client) -> None:
    asked: list[Any] = [b"w2 w5 w9", {"text": "w2 w5 w9"}, {"inputs": ["w2 w5 w9"]}, ["w2 w5 w9"]]
    answers = [labels("POST", "/predict", body).json() for body in asked]
    assert all(one == answers[0] for one in answers)
    table = answers[0]["predictions"][0]
    assert {row["label"] for row in table} == {"bad", "good", "other"}
    assert sum(row["score"] for row in table) == pytest.approx(1)
    assert [row["score"] for row in table] == sorted((row["score"] for row in table), reverse=True)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "an empty text has no tokens"),
        ({"inputs": []}, "there is no item"),
        ({"inputs": [1]}, "a text is a string"),
        ({"text": 7}, "a text is a string"),
        ({"sentence": "x"}, 'give {"text"'),
        ({"text": "w2", "model": 3}, "model must be a text"),
        (b"\xff\xfe", "the body is no text in UTF-8"),
        (b'{"text": "\\ud800"}', "the text cannot be tokenized"),
        ({"text": "w2", "text_pair": {"a": 1}}, "a text is a string"),
    ],
)
def test_what_predict_refuses(body: Any, message: str, labels: Client) -> None:
    answer = labels("POST", "/predict", body)
    assert answer.status == 400 and message in answer.error


def test_a_long_text_is_cut_to_what_the_model_takes(labels: Client) -> None:
    assert labels("POST", "/predict", ("w2 " * 500).encode()).status == 200


# --- language models --------------------------------------------------------------------------------------------------


def test_generate(text: Client) -> None:
    assert text("POST", "/generate", {"prompt": "w2", "max_tokens": 3}).json()["text"] == "w3 w4 w5"
    assert text("POST", "/generate", {"prompt": "w2", "stop": "w6"}).json()["text"] == "w3 w4 w5 "
    assert text("POST", "/generate", {"prompt": "w44"}).json()["text"] == "w45 w46"  # and then the end
    drawn = [text("POST", "/generate", {"prompt": "w2", "top_p": 0.9, "seed": 7}).json()["text"] for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_a_temperature_next_to_zero_takes_the_likeliest_token(text: Client) -> None:
    asked = {"prompt": "w2", "max_tokens": 3, "temperature": 1e-320, "seed": 0}
    assert text("POST", "/generate", asked).json()["text"] == "w3 w4 w5"


def test_a_prompt_is_tokenized_beside_the_event_loop(text: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    generation = text.app.models.get(None).predictor.require_generation()
    names, ids = list[str](), generation.ids

    def noted(prompt: str) -> list[int]:
        names.append(threading.current_thread().name)
        return ids(prompt)

    monkeypatch.setattr(generation, "ids", noted)
    assert text("POST", "/generate", {"prompt": "w2", "max_tokens": 1}).status == 200
    assert names and names[0].startswith("graphopt-prepare")


def test_a_client_that_leaves_ends_its_text(text: Client) -> None:
    answer = text.loop.run_until_complete(
        text.call("POST", "/generate", {"prompt": "w2", "max_tokens": 30, "stream": True}, leaves=True)
    )
    assert b"DONE" not in answer.body and text.app.generating == 0


@pytest.mark.parametrize("stream", [False, True])
def test_no_more_texts_are_written_at_once_than_may_be(
    stream: bool, writer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of requests that come together, and wait for the tokenizer together."""
    with Client.of(writer, max_queue=2) as client:
        call = ("POST", "/generate", {"prompt": "w2", "max_tokens": 2, "stream": stream})
        answers = client.together(*[call] * 5)
        assert sorted(one.status for one in answers) == [200, 200, 429, 429, 429]
        assert next(one for one in answers if one.status == 429).headers["retry-after"] == "1"
        assert client.app.generating == 0
        assert client("POST", "/generate", {"prompt": ""}).status == 400 and client.app.generating == 0

        async def gone(*_: object) -> None:
            raise bodies.Gone

        with monkeypatch.context() as patch:
            patch.setattr(client.app, "_send", gone)  # before the first piece
            with pytest.raises(ValueError, match="not enough values"):
                client(*call)
        assert client.app.generating == 0 and client(*call).status == 200


def test_generate_in_events(text: Client) -> None:
    answer = text("POST", "/generate", {"prompt": "w2", "max_tokens": 3, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.body.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    pieces = [json.loads(one.removeprefix("data: "))["text"] for one in events[:-2]]
    assert len(pieces) == 3 and "".join(pieces) == "w3 w4 w5"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, 'give {"prompt"'),
        ({"prompt": 3}, "the prompt is 3, and should be a text"),
        ({"prompt": ""}, "the prompt has no tokens"),
        (b'{"prompt": "\\ud800"}', "the text cannot be tokenized"),
        ({"prompt": "w2", "stop": ["a"] * 65}, "stop has 65 texts; give at most 64"),
        ({"prompt": "w2", "seed": "x" * 10_000}, "seed is 'xxx"),
        ({"prompt": "w2 " * 64}, "the prompt has 64 tokens, and the model takes 64"),
        ({"prompt": "w2", "max_tokens": 0}, "max_tokens is 0"),
        ({"prompt": "w2", "max_tokens": True}, "max_tokens is True"),
        ({"prompt": "w2", "top_p": 0}, "top_p is 0; give a number in (0, 1]"),
        ({"prompt": "w2", "temperature": -1}, "temperature is -1"),
        ({"prompt": "w2", "seed": 1.5}, "seed is 1.5"),
        ({"prompt": "w2", "stop": [""]}, "stop is ['']"),
        ({"prompt": "w2", "tokens": 1}, "there is no option 'tokens'"),
    ],
)
def test_what_generate_refuses(body: Any, message: str, text: Client) -> None:
    answer = text("POST", "/generate", body)
    assert answer.status == 400 and message in answer.error


# --- batches ----------------------------------------------------------------------------------------------------------


def test_batched_answers_are_those_of_single_requests(client: Client, encoder: Path) -> None:
    predictor, sizes = Predictor(encoder), list[int]()
    served = client.app.models.get("encoder")
    served.batcher._on_batch = sizes.append
    random = np.random.default_rng(0)
    rows = [random.integers(0, 48, (1, int(length))) for length in random.integers(1, 20, 40)]
    answers = client.together(*[("POST", V2, *binary(row, np.ones_like(row), binary_data_output=True)) for row in rows])
    for row, answer in zip(rows, answers, strict=True):
        wanted = predictor(ids=row, mask=np.ones_like(row))["y"]
        head = int(answer.headers["inference-header-content-length"])
        found = np.frombuffer(answer.body[head:], np.float32).reshape(wanted.shape)
        assert golden.sqnr({"y": wanted}, {"y": found}) > 100
    assert len(sizes) < len(rows) and sum(sizes) == len(rows)


def test_one_wrong_request_in_a_batch_is_refused_alone(client: Client) -> None:
    served = client.app.models.get("encoder")
    run = served.batcher._run

    def fails_on_47(feeds: dict[str, Any]) -> Any:
        if (feeds["ids"] == 47).any():
            raise UsageError("47")
        return run(feeds)

    served.batcher._run = fails_on_47
    try:
        calls = [("POST", V2, v2(np.full((1, 4), token), np.ones((1, 4), int))) for token in (1, 47, 2, 3)]
        assert [one.status for one in client.together(*calls)] == [200, 400, 200, 200]
    finally:
        served.batcher._run = run


@pytest.mark.parametrize(("allowed", "batches"), [(False, False), (True, True)])
def test_a_bundle_whose_rows_depend_on_each_other_is_batched_when_told_to(
    allowed: bool, batches: bool, classifier: Path
) -> None:
    with Client.of(classifier, allow_batch_variance=allowed) as client:
        sizes = list[int]()
        client.app.models.get("classifier").batcher._on_batch = sizes.append
        client.together(*[("POST", "/predict", b"w2 w3")] * 8)
        assert (max(sizes) > 1) == batches


# --- models -----------------------------------------------------------------------------------------------------------


def test_versions_and_hot_reload(encoder: Path, writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.serving.models.GONE_SECONDS", 0.0)
    for version in ("2", "10"):
        copytree(encoder, tmp_path / "m" / version)
    (tmp_path / "m" / "notes.txt").touch()
    with Client.of(tmp_path) as client:
        assert client("GET", "/v2/models/m").json()["versions"] == ["2", "10"]
        status = client("GET", "/v1/models/m").json()["model_version_status"]
        assert [one["version"] for one in status] == ["2", "10"]
        assert client("POST", "/v2/models/m/infer", v2()).json()["model_version"] == "10"
        assert client("POST", "/v2/models/m/versions/2/infer", v2()).json()["model_version"] == "2"

        copytree(writer, tmp_path / "w" / "1")
        copytree(encoder, tmp_path / "m" / "11")
        damaged = tmp_path / "m" / "12"
        copytree(encoder, damaged)
        (damaged / "golden.npz").write_bytes(b"")
        rmtree(tmp_path / "m" / "2")
        client.loop.run_until_complete(client.app.models.refresh())
        assert client("GET", "/v2/models/m").json()["versions"] == ["10", "11"]
        assert client("POST", "/generate", {"prompt": "w2", "max_tokens": 1, "model": "w"}).json()["text"] == "w3"
        index = client("POST", "/v2/repository/index").json()
        assert [(one["name"], one["version"]) for one in index if one["state"] == "UNAVAILABLE"] == [("m", "12")]
        rmtree(damaged)
        client.loop.run_until_complete(client.app.models.refresh())
        assert all(one["state"] == "READY" for one in client("POST", "/v2/repository/index").json())
        assert client("POST", "/predict", b"w2").error == "name the model: there are m, w"


def test_a_bundle_that_changes_takes_over_when_it_is_right(encoder: Path, writer: Path, tmp_path: Path) -> None:
    place = tmp_path / "m"
    copytree(encoder, place)
    with Client.of(place) as client:
        before = client.app.models.get(None)
        (place / "manifest.json").write_text("{", encoding="utf-8")
        client.loop.run_until_complete(client.app.models.refresh())
        assert client.app.models.get(None) is before and client("POST", V2, v2()).status == 200
        rmtree(place)
        copytree(writer, place)
        client.loop.run_until_complete(client.app.models.refresh())
        assert client("POST", "/generate", {"prompt": "w2", "max_tokens": 1}).status == 200
        assert client("POST", V2, v2()).status == 404


def test_a_bundle_that_is_replaced_file_by_file(encoder: Path, tmp_path: Path) -> None:
    place = tmp_path / "m"
    copytree(encoder, place)
    with Client.of(place) as client:
        for step in (lambda: rmtree(place), place.mkdir, lambda: copy(encoder / "manifest.json", place)):
            step()
            client.loop.run_until_complete(client.app.models.refresh())
            assert client("POST", V2, v2()).status == 200
        assert [one["state"] for one in client("POST", "/v2/repository/index").json()] == ["READY", "UNAVAILABLE"]
        copytree(encoder, place, dirs_exist_ok=True)
        client.loop.run_until_complete(client.app.models.refresh())
        assert [one["state"] for one in client("POST", "/v2/repository/index").json()] == ["READY"]


def test_files_that_are_not_of_a_bundle_change_nothing(encoder: Path, tmp_path: Path) -> None:
    """A log that grows in its folder, and a link to nowhere."""
    place = tmp_path / "m"
    copytree(encoder, place)
    (place / "link").symlink_to(tmp_path / "nowhere")
    with Client.of(place) as client:
        before = client.app.models.get(None)
        for line in ("one", "one\ntwo"):
            (place / "log").write_text(line, encoding="utf-8")
            client.loop.run_until_complete(client.app.models.refresh())
            assert client.app.models.get(None) is before


def test_each_file_that_a_bundle_names_is_watched(encoder: Path, tmp_path: Path) -> None:
    copytree(encoder, tmp_path / "m")
    with Client.of(encoder) as client:
        named = ["manifest.json", *client.app.models.get(None).predictor.manifest.files]
    before = _stamp(tmp_path / "m")
    assert before is not None and [name for name, *_ in before] == [named[0], *sorted(named[1:])]
    for name in reversed(named):
        (tmp_path / "m" / name).rename(tmp_path / "away")
        after = _stamp(tmp_path / "m")
        assert after != before and (after is None) == (name == "manifest.json")
        (tmp_path / "away").rename(tmp_path / "m" / name)
        assert _stamp(tmp_path / "m") == before


def test_a_file_that_leads_nowhere_is_a_failed_bundle(encoder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        copytree(encoder, tmp_path / name)
    (tmp_path / "b" / "golden.npz").unlink()
    (tmp_path / "b" / "golden.npz").symlink_to("nowhere")
    with Client.of(tmp_path) as client:
        (index,) = [one for one in client("POST", "/v2/repository/index").json() if one["state"] == "UNAVAILABLE"]
        assert index["name"] == "b" and "golden.npz is missing" in index["reason"]


def test_a_folder_that_is_away_for_a_moment_keeps_what_failed(encoder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        copytree(encoder, tmp_path / "root" / name)
    (tmp_path / "root" / "b" / "golden.npz").unlink()
    with Client.of(tmp_path / "root") as client:
        failed, served = dict(client.app.models.failed), client.app.models.get("a")
        assert len(failed) == 1
        for to, back in ((tmp_path / "away", tmp_path / "root"), (tmp_path / "root", tmp_path / "away")):
            back.rename(to)
            client.loop.run_until_complete(client.app.models.refresh())
            assert client.app.models.failed == failed and client.app.models.get("a") is served


def test_where_nothing_can_be_served(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no bundle"):
        Client.of(tmp_path)


# --- metrics, ids and the log -----------------------------------------------------------------------------------------


def test_metrics(encoder: Path) -> None:
    with Client.of(encoder) as client:
        client("POST", V2, v2())
        client("POST", "/v2/models/nobody/infer", v2())
        text = client("GET", "/metrics").body.decode()
    assert 'graphopt_requests_total{model="encoder:1",route="v2_infer",status="200"} 1' in text
    assert 'graphopt_requests_total{model="",route="v2_infer",status="404"} 1' in text
    assert 'graphopt_request_seconds_bucket{model="encoder:1",route="v2_infer",le="+Inf"} 1' in text
    assert 'graphopt_batch_rows_count{model="encoder:1"} 1' in text
    assert 'graphopt_queue{model="encoder:1"} 0' in text


def test_request_ids_and_a_line_for_each_request(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "graphopt.serving.access"):
        assert client("GET", "/v2", b"", {"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
        made = client("GET", "/v2", b"", {"X-Request-Id": "a b"}).headers["x-request-id"]
    assert " " not in made
    assert [record.getMessage().split(" ")[:3] for record in caplog.records] == [["GET", "/v2", "200"]] * 2
    assert f"id={made}" in caplog.records[1].getMessage()


# --- anything at all --------------------------------------------------------------------------------------------------


def test_openapi_names_each_route(client: Client) -> None:
    from graphopt.serving.app import _V1, _V2, ROUTES

    paths = client("GET", "/openapi.json").json()["paths"]
    assert {f"/{one}" for one in ROUTES} <= set(paths)
    assert {f"/v2/models/{{name}}/{one}".rstrip("/") for one in _V2} <= set(paths)
    assert {f"/v1/models/{{name}}{one if one.startswith(':') or not one else '/' + one}" for one in _V1} <= set(paths)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
PATHS = [V2, V1, "/predict", "/generate"]


def is_an_answer(answer: Answer) -> bool:
    return answer.status == 200 or (400 <= answer.status < 500 and bool(answer.error))


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(PATHS), body=JSON, data=st.data())
def test_any_json_is_answered(path: str, body: Any, data: st.DataObject, client: Client) -> None:
    if data.draw(st.booleans()):
        base: dict[str, Any] = v2() if path == V2 else {"instances": [{"ids": [1, 2], "mask": [1, 1]}]}
        body = base | {data.draw(st.sampled_from([*base, "outputs", "parameters"])): body}
    assert is_an_answer(client("POST", path, json.dumps(body).encode()))


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(PATHS), data=st.data())
def test_any_bytes_are_answered(path: str, data: st.DataObject, client: Client) -> None:
    body, headers = binary(IDS, MASK)
    content = bytearray(body)
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=8)):
        content[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    length: Mapping[str, str] = headers if data.draw(st.booleans()) else {}
    assert is_an_answer(client("POST", path, bytes(content[: cut or len(content)]), length))


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=40),
    method=st.sampled_from(["GET", "POST"]),
)
def test_any_path_is_answered(path: str, method: str, client: Client) -> None:
    for prefix in ("/", "/v2/models/", "/v1/models/encoder/versions/"):
        assert is_an_answer(client(method, prefix + path))
