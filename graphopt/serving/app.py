"""The server as an ASGI application: routes, health, limits, metrics and a log line for each request.

It is written to the ASGI interface itself. A framework would add what is not needed here (dependency injection, models
of requests), and its router and middlewares take longer than the rest of a request: the answer to 16 tokens takes the
engine about a millisecond.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote_to_bytes

from graphopt import __version__
from graphopt.errors import GraphoptError, UsageError
from graphopt.measure.machine import usable_cores
from graphopt.serving import bodies, golden, openapi, tensors_v1, tensors_v2
from graphopt.serving.batches import SIZES, Axes
from graphopt.serving.golden import Arrays
from graphopt.serving.metrics import Labels, Metrics
from graphopt.serving.models import Models, Served, in_order
from graphopt.serving.numbers import json_bytes
from graphopt.serving.refusals import Refused
from graphopt.serving.requests import checked

LONGEST_ERROR = 500
"""Characters."""
ITEMS = SIZES[-1]
"""Of /predict, that are prepared and answered together."""

LOG = logging.getLogger("graphopt.serving")
ACCESS = logging.getLogger("graphopt.serving.access")
_ID = re.compile(rb"[\x21-\x7e]{1,128}")

Headers = list[tuple[bytes, bytes]]
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How a server runs. Times are in seconds."""

    folder: Path
    threads: int | None = None
    """Of the engine in each run; None takes what the bundle says."""
    at_once: int | None = None
    """Runs of a model at the same time, which share its threads; None is one for each core."""
    token: str | None = None
    """What a client must send as `Authorization: Bearer TOKEN`."""
    cors: tuple[str, ...] = ()
    """Origins of pages that may call the server from a browser."""
    max_bytes: int = 64 << 20
    """Of a body, as sent and after decompression."""
    max_queue: int = 256
    """Parts of requests that wait for a model: batches, and items of /predict."""
    max_tokens: int = 65536
    """Rows times tokens of a request; a prompt's tokens."""
    timeout: float = 30.0
    """From the body to the answer."""
    body_timeout: float = 10.0
    """Until a body must have come."""
    reload_every: float = 2.0
    """Between looks at the folder; 0 never looks again."""
    allow_batch_variance: bool = False


@dataclass
class Request:
    """A request whose headers have come."""

    method: str
    parts: list[str]
    """Of the path, between its slashes."""
    headers: Mapping[bytes, bytes]
    query: bytes
    receive: bodies.Receive
    id: str
    settings: Settings
    model: str = ""
    """NAME:VERSION, once it is known; for metrics and the log."""
    route: str = "unknown"
    until_answered: ExitStack = field(default_factory=ExitStack)
    """What ends once the answer is sent, or cannot be."""

    async def body(self) -> bytes:
        own = self.settings
        return await bodies.read(self.headers, self.receive, most=own.max_bytes, seconds=own.body_timeout)

    def option(self, name: str) -> str | None:
        """A parameter in the query."""
        if not self.query:
            return None
        try:
            found = parse_qs(self.query.decode("ascii"), max_num_fields=20)
        except ValueError as error:
            raise Refused(400, "the query cannot be read") from error
        return found.get(name, [None])[0]


@dataclass
class Response:
    """An answer. body: whole, or in pieces as they come."""

    status: int
    body: bytes | AsyncGenerator[bytes]
    headers: Headers = field(default_factory=lambda: [(b"content-type", b"application/json")])


Handler = Callable[["App", Request], Awaitable[Response]]


class App:
    """The ASGI application. Each worker process has its own."""

    def __init__(
        self, settings: Settings, *, loads_first: bool = False, on_ready: Callable[[], object] = lambda: None
    ) -> None:
        """loads_first: take no connection before the models are loaded, where other processes take them meanwhile.
        on_ready: told once they are."""
        self.settings, self.loads_first, self.on_ready = settings, loads_first, on_ready
        self.draining = False
        """Whether the server stops: it answers what comes on open connections, and closes them."""
        self.on_failure: Callable[[str], object] | None = None
        """Told why, where nothing can be served at the start."""
        self.started = False

    # --- ASGI ---------------------------------------------------------------------------------------------------------

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await self._answer(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})

    async def _live(self, receive: Any, send: Any) -> None:
        await receive()
        self.start()
        if self.loads_first and not await self._is_loaded():
            await send({"type": "lifespan.startup.failed", "message": "nothing can be served"})
            return
        loading = asyncio.create_task(self._keep_loaded())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        loading.cancel()
        self.stop()
        await send({"type": "lifespan.shutdown.complete"})

    def start(self) -> None:
        """Make what belongs to this process."""
        own = self.settings
        self.metrics = Metrics()
        at_once = own.at_once or usable_cores()
        self.pool = ThreadPoolExecutor(max(32, 2 * at_once), "graphopt-engine")
        self.preparing = ThreadPoolExecutor(max(4, 2 * usable_cores()), "graphopt-prepare")
        """For texts and images, which may take long: they keep no batch waiting."""
        self.models = Models(
            own.folder, self.pool, own.threads, at_once, own.max_queue, own.allow_batch_variance, self.metrics
        )
        self.generating = 0
        """Texts that are being written."""
        self._count = 0
        self._prefix = f"{os.getpid():x}-{time.time_ns() & 0xFFFFFF:x}"

    def stop(self) -> None:
        for pool in (self.pool, self.preparing):
            pool.shutdown(wait=False, cancel_futures=True)

    async def load(self) -> None:
        """Load all models. Raises BundleError where none can be served."""
        await self.models.refresh()
        if not self.models.served:
            reasons = [one.reason for one in self.models.failed.values()]
            raise UsageError(reasons[0] if reasons else f"{self.settings.folder} holds no bundle and no NAME/VERSION/")
        self.started = True
        self.on_ready()

    async def _is_loaded(self) -> bool:
        """Load all models; whether any can be served."""
        try:
            await self.load()
        except GraphoptError as error:
            LOG.error("%s", error)
            if self.on_failure is not None:
                self.on_failure(str(error))
        return self.started

    async def _keep_loaded(self) -> None:
        if not self.started and not await self._is_loaded():
            return
        while self.settings.reload_every:
            await asyncio.sleep(self.settings.reload_every)
            try:
                await self.models.refresh()
            except Exception:  # what answers goes on
                LOG.exception("the folder cannot be read")

    # --- one request --------------------------------------------------------------------------------------------------

    async def _answer(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        began = time.perf_counter()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id")
        self._count += 1
        request = Request(
            scope["method"],
            scope["raw_path"].decode("ascii", "replace").split("/")[1:] or [""],
            headers,
            scope.get("query_string", b""),
            receive,
            given.decode("ascii") if given is not None and _ID.fullmatch(given) else f"{self._prefix}-{self._count:x}",
            self.settings,
        )
        self.metrics.in_flight += 1
        try:
            with request.until_answered:
                response = await self._response(request)
                status = response.status
                sent = [*response.headers, (b"x-request-id", request.id.encode()), *self._cors(headers)]
                if self.draining:
                    sent.append((b"connection", b"close"))
                await self._send(response, sent, request, send)
        except bodies.Gone:
            status = 499
        finally:
            self.metrics.in_flight -= 1
        seconds = time.perf_counter() - began
        self.metrics.answered(request.route, request.model, status, seconds)
        if ACCESS.isEnabledFor(logging.INFO):
            path = ascii("/" + "/".join(request.parts))[1:-1][:200]
            ACCESS.info(
                "%s %s %d %.2fms id=%s model=%s", request.method, path, status, seconds * 1e3, request.id,
                request.model or "-",
            )  # fmt: skip

    async def _send(self, response: Response, headers: Headers, request: Request, send: Any) -> None:
        start: dict[str, Any] = {"type": "http.response.start", "status": response.status, "headers": headers}
        if isinstance(response.body, bytes):
            if response.status != 204:
                headers.append((b"content-length", str(len(response.body)).encode()))
            await send(start)
            await send({"type": "http.response.body", "body": b"" if request.method == "HEAD" else response.body})
            return
        await send(start)
        further = asyncio.ensure_future(request.receive())  # which ends when the client leaves
        try:
            async with aclosing(response.body) as pieces:
                async for piece in pieces:
                    if further.done() and further.result()["type"] == "http.disconnect":
                        raise bodies.Gone
                    async with asyncio.timeout(self.settings.timeout):
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
        except TimeoutError:
            raise bodies.Gone from None  # it does not read what it asked for
        finally:
            further.cancel()
        await send({"type": "http.response.body", "body": b""})

    async def _response(self, request: Request) -> Response:
        """The answer of a route; an error as its status and one line."""
        try:
            self._admit(request)
            handler, request.route = self._handler(request)
            return await handler(self, request)
        except Refused as error:
            return Response(error.status, _error(str(error)), [_JSON, *error.headers])
        except GraphoptError as error:
            return Response(400, _error(str(error)))
        except bodies.Gone:
            raise
        except Exception:
            LOG.exception("request %s failed", request.id)
            return Response(500, _error(f"the server failed; its log says more of request {request.id}"))

    def _admit(self, request: Request) -> None:
        """Raise Refused for a client that may not ask."""
        origin = request.headers.get(b"origin")
        if origin is not None and origin.decode("latin-1") not in self.settings.cors and "*" not in self.settings.cors:
            raise Refused(403, "pages of this origin may not call the server: name it with --cors")
        token = self.settings.token
        is_health = request.parts[:2] == ["v2", "health"]
        if token is not None and not is_health and request.method != "OPTIONS":
            given = request.headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + token.encode()):
                raise Refused(401, "send the token: Authorization: Bearer TOKEN", ((b"www-authenticate", b"Bearer"),))

    def _cors(self, headers: Mapping[bytes, bytes]) -> Headers:
        origin = headers.get(b"origin")
        if origin is None or not self.settings.cors:
            return []
        return [(b"access-control-allow-origin", origin), (b"vary", b"origin")]

    def _handler(self, request: Request) -> tuple[Handler, str]:
        """Who answers, and the route's name for metrics. Raises Refused: 404, 405."""
        parts, method = request.parts, "GET" if request.method == "HEAD" else request.method
        if request.method == "OPTIONS" and self.settings.cors:
            return _preflight, "preflight"
        found: dict[str, tuple[Handler, str]] = {}
        if parts[0] in ("v1", "v2") and len(parts) > 2 and parts[1] == "models":
            found = _model_routes(parts)
        found = found or ROUTES.get("/".join(parts).rstrip("/"), {})
        if not found:
            raise Refused(404, "there is no such path; /openapi.json lists them")
        if method not in found:
            allowed = ", ".join(found)
            raise Refused(405, f"this path takes {allowed}", ((b"allow", allowed.encode()),))
        return found[method]

    # --- what routes share --------------------------------------------------------------------------------------------

    def named(self, request: Request) -> Served:
        """The model that a path names, as /v2/models/NAME/versions/VERSION/... does."""
        parts = [unquote_to_bytes(one).decode("utf-8", "replace") for one in request.parts[2:]]
        name, version = parts[0], None
        if request.parts[0] == "v1":
            name = name.removesuffix(":predict")
        if len(parts) > 2 and parts[1] == "versions":
            version = parts[2].removesuffix(":predict") if request.parts[0] == "v1" else parts[2]
        return self.model(request, name, version)

    def model(self, request: Request, name: str | None, version: str | None) -> Served:
        if not self.started:
            raise Refused(503, "the models are not loaded yet", ((b"retry-after", b"1"),))
        served = self.models.get(name, version)
        request.model = served.label
        return served

    def feeds(self, served: Served, given: Mapping[str, Any]) -> Arrays:
        """Checked inputs, of a size that the server takes. Raises UsageError and Refused (413)."""
        found = checked(given, served.predictor.manifest)
        self.require_tokens(self.tokens(served, found))
        return found

    def tokens(self, served: Served, feeds: Arrays) -> int:
        """Rows times tokens; 0 for a model that takes none."""
        manifest = served.predictor.manifest
        if Axes.of(manifest.inputs, manifest.outputs).length is None:
            return 0
        return max(array.size for array in feeds.values() if array.ndim == 2)

    def require_tokens(self, count: int) -> None:
        """Raise Refused (413) for more tokens than a request may have."""
        if count > self.settings.max_tokens:
            raise Refused(413, f"the request has {count} tokens; the most is {self.settings.max_tokens}")

    async def infer(self, served: Served, feeds: Arrays) -> Arrays:
        """Outputs. Raises Refused: 429 where too many wait, 408 where it takes too long."""
        return await self.in_time(served.batcher.infer(feeds))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Count a text among those that are being written. Raises Refused (429) where these are too many."""
        if self.generating >= self.settings.max_queue:
            reason = f"{self.generating} texts are being written already: try again"
            raise Refused(429, reason, ((b"retry-after", b"1"),))
        self.generating += 1
        try:
            yield
        finally:
            self.generating -= 1

    async def in_time(self, answer: Awaitable[T]) -> T:
        """The answer. Raises Refused (408) where it takes too long."""
        try:
            async with asyncio.timeout(self.settings.timeout):
                return await answer
        except TimeoutError:
            raise Refused(408, f"there was no answer within {self.settings.timeout:g} s") from None

    async def in_thread(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.preparing, call, *arguments)


# --- health and metadata ----------------------------------------------------------------------------------------------

_JSON = (b"content-type", b"application/json")


def _error(reason: str) -> bytes:
    """One line, whatever of the request stands in it."""
    return json.dumps({"error": " ".join(reason.split())[:LONGEST_ERROR]}).encode()


def _json(found: Any, status: int = 200) -> Response:
    return Response(status, json_bytes(found))


async def _preflight(app: App, request: Request) -> Response:
    headers = [
        (b"access-control-allow-methods", b"GET, POST"),
        (
            b"access-control-allow-headers",
            b"authorization, content-type, inference-header-content-length, x-request-id",
        ),
        (b"access-control-max-age", b"600"),
    ]
    return Response(204, b"", headers)


async def _live(app: App, request: Request) -> Response:
    return _json({"live": True})


async def _ready(app: App, request: Request) -> Response:
    is_ready = app.started and not app.draining
    return _json({"ready": is_ready}, 200 if is_ready else 503)


async def _server(app: App, request: Request) -> Response:
    return _json(
        {"name": "graphopt", "version": __version__, "extensions": ["binary_tensor_data", "model_configuration"]}
    )


async def _index(app: App, request: Request) -> Response:
    loaded = [{"name": one.name, "version": one.version, "state": "READY", "reason": ""} for one in app.models.all]
    failed = [
        {"name": one.name, "version": one.version, "state": "UNAVAILABLE", "reason": one.reason}
        for one in app.models.failed.values()
    ]
    return _json([*loaded, *failed])


async def _model_ready(app: App, request: Request) -> Response:
    app.named(request)
    return _json({"ready": True})


async def _model_metadata(app: App, request: Request) -> Response:
    served = app.named(request)
    own = served.predictor.manifest
    versions = in_order(app.models.served.get(served.name, {served.version: served}))
    return _json({
        "name": served.name, "versions": versions, "platform": "onnxruntime_onnx",
        "inputs": tensors_v2.metadata(own.inputs), "outputs": tensors_v2.metadata(own.outputs),
    })  # fmt: skip


async def _model_config(app: App, request: Request) -> Response:
    served = app.named(request)
    own = served.predictor.manifest

    def tensors(specs: Any) -> list[dict[str, Any]]:
        return [
            {"name": one["name"], "data_type": f"TYPE_{one['datatype']}", "dims": one["shape"]}
            for one in tensors_v2.metadata(specs)
        ]

    return _json({
        "name": served.name, "platform": "onnxruntime_onnx", "backend": "onnxruntime", "max_batch_size": 0,
        "input": tensors(own.inputs), "output": tensors(own.outputs),
    })  # fmt: skip


async def _golden(app: App, request: Request) -> Response:
    """The golden set, so that a client can tell right answers from wrong ones."""
    served = app.named(request)
    own = served.predictor.manifest.golden
    headers = [
        (b"content-type", b"application/octet-stream"), (b"x-graphopt-sqnr", f"{own.sqnr!r}".encode()),
        (b"x-graphopt-case-sqnr", ",".join(map(repr, own.case_sqnr)).encode()),
    ]  # fmt: skip
    return Response(200, await app.in_thread(golden.written, served.predictor.cases), headers)


async def _metrics(app: App, request: Request) -> Response:
    models: list[tuple[Labels, Served]] = [((("model", one.label),), one) for one in app.models.all]
    gauges: dict[str, tuple[str, list[tuple[Labels, float]]]] = {
        "graphopt_queue": ("Requests that wait.", [(labels, float(len(one.batcher))) for labels, one in models]),
        "graphopt_golden_sqnr_db": (
            "SQNR of the golden inputs on this machine.",
            [(labels, one.predictor.sqnr) for labels, one in models],
        ),
        "process_cpu_seconds_total": ("CPU time of this process.", [((), time.process_time())]),
        "graphopt_in_flight": ("Requests that are being answered.", [((), float(app.metrics.in_flight))]),
        "graphopt_failed_bundles": ("Bundles that could not be loaded.", [((), float(len(app.models.failed)))]),
    }
    return Response(200, app.metrics.text(gauges).encode(), [(b"content-type", b"text/plain; version=0.0.4")])


async def _openapi(app: App, request: Request) -> Response:
    return _json(openapi.document(app.models.all))


# --- inference --------------------------------------------------------------------------------------------------------


async def _infer(app: App, request: Request) -> Response:
    served = app.named(request)
    asked = tensors_v2.read(await request.body(), request.headers.get(tensors_v2.LENGTH))
    known = [one.name for one in served.predictor.manifest.outputs]
    for name in asked.outputs or ():
        if name not in known:
            raise Refused(400, f"there is no output {name[:60]!r}; there are {', '.join(known)}")
    outputs = await app.infer(served, app.feeds(served, asked.inputs))
    body, headers = tensors_v2.written(asked, outputs, served.name, served.version)
    return Response(200, body, headers)


async def _predict_v1(app: App, request: Request) -> Response:
    served = app.named(request)
    asked = tensors_v2.parse_object(await request.body())
    inputs, is_rows = tensors_v1.read(asked, served.predictor.manifest)
    outputs = await app.infer(served, app.feeds(served, inputs))
    return _json(tensors_v1.written(outputs, is_rows))


async def _status_v1(app: App, request: Request) -> Response:
    served = app.named(request)
    is_named = len(request.parts) > 3
    versions = [served.version] if is_named else in_order(app.models.served.get(served.name, {}))
    return _json(tensors_v1.status(versions))


async def _metadata_v1(app: App, request: Request) -> Response:
    served = app.named(request)
    return _json(tensors_v1.metadata(served.predictor.manifest, served.version))


async def _predict(app: App, request: Request) -> Response:
    items, asked = _items(await request.body(), request.headers.get(b"content-type", b""))
    name, version = (_text(asked, key) or request.option(key) for key in ("model", "version"))
    served = app.model(request, name, version)
    several = items if isinstance(items, list) else [items]
    found = await app.in_time(_predictions(app, served, several))
    return _json({"model": served.name, "version": served.version, "predictions": found})


async def _predictions(app: App, served: Served, items: list[Any]) -> list[Any]:
    """The answers to items. `ITEMS` are prepared and answered at a time, so that few inputs wait in memory and other
    requests have their turn."""
    predictor, tokens = served.predictor, 0
    found: list[Any] = []
    for start in range(0, max(1, len(items)), ITEMS):
        feeds = await app.in_thread(predictor.prepared, items[start : start + ITEMS])
        tokens += sum(app.tokens(served, one) for one in feeds)
        app.require_tokens(tokens)
        outputs = await served.batcher.infer_all(feeds, admitted=start > 0)
        found += await app.in_thread(
            lambda ready: [predictor.answer(*pair) for pair in ready], list(zip(outputs, feeds, strict=True))
        )
    return found


def _items(body: bytes, kind: bytes) -> tuple[Any, Mapping[str, Any]]:
    """What /predict is asked for, and the other keys: an image, a text, or either in JSON, one or a list of them."""
    if kind.startswith(b"image/") or kind == b"application/octet-stream":
        return body, {}
    is_json = kind.startswith(b"application/json")
    if not is_json and body.lstrip()[:1] not in (b"{", b"[", b'"'):
        try:
            return body.decode("utf-8"), {}
        except UnicodeDecodeError as error:
            raise Refused(400, "the body is no text in UTF-8; send an image as image/png or image/jpeg") from error
    found = tensors_v2.parse(body)
    if not isinstance(found, dict):
        return found, {}
    for key in ("inputs", "instances", "texts", "images", "text", "image"):
        if key in found:
            is_pair = key == "text" and "text_pair" in found
            return ({"text": found["text"], "text_pair": found["text_pair"]} if is_pair else found[key]), found
    raise Refused(400, 'give {"text": "..."}, {"image": "BASE64"}, or {"inputs": [...]} with several of them')


def _text(asked: Mapping[str, Any], key: str) -> str | None:
    found = asked.get(key)
    if found is not None and not isinstance(found, str):
        raise Refused(400, f"{key} must be a text")
    return found


_OPTIONS = ("max_tokens", "temperature", "top_p", "seed", "stop")


async def _generate(app: App, request: Request) -> Response:
    asked = tensors_v2.parse_object(await request.body())
    served = app.model(request, *(_text(asked, key) or request.option(key) for key in ("model", "version")))
    known = ("prompt", "stream", "model", "version", *_OPTIONS)
    for key in asked:
        if key not in known:
            raise Refused(400, f"there is no option {key[:60]!r}; there are {', '.join(known)}")
    if "prompt" not in asked:
        raise Refused(400, 'give {"prompt": "..."}')
    options = {key: asked[key] for key in _OPTIONS if asked.get(key) is not None}
    generation = served.predictor.require_generation()
    request.until_answered.enter_context(app.writing())
    ids = await app.in_time(app.in_thread(generation.ids, asked["prompt"]))
    app.require_tokens(len(ids))
    pieces = generation.pieces(ids, **options)
    accepts = request.headers.get(b"accept", b"")
    if asked.get("stream") is True or (asked.get("stream") is None and b"text/event-stream" in accepts):
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        return Response(200, _events(app, pieces), headers)
    found = [piece async for piece in _in_order(app, pieces)]
    return _json({"model": served.name, "version": served.version, "text": "".join(found)})


async def _events(app: App, pieces: Iterator[str]) -> AsyncGenerator[bytes]:
    """Server-sent events: a piece of text each, and [DONE] at the end."""
    try:
        async with aclosing(_in_order(app, pieces)) as found:
            async for piece in found:
                yield b"data: " + json.dumps({"text": piece}).encode() + b"\n\n"
    except GraphoptError as error:  # the status is sent already
        yield b"event: error\ndata: " + _error(str(error)) + b"\n\n"
    yield b"data: [DONE]\n\n"


async def _in_order(app: App, pieces: Iterator[str]) -> AsyncGenerator[str]:
    """Pieces of an iterator, each made in a thread. Ends with Refused (408) where they take too long together."""
    end = time.monotonic() + app.settings.timeout
    loop = asyncio.get_running_loop()
    while (piece := await loop.run_in_executor(app.pool, next, pieces, None)) is not None:
        yield piece
        if time.monotonic() > end:
            raise Refused(408, f"there was no answer within {app.settings.timeout:g} s")


# --- routes -----------------------------------------------------------------------------------------------------------

ROUTES: dict[str, dict[str, tuple[Handler, str]]] = {
    "v2": {"GET": (_server, "server")},
    "v2/health/live": {"GET": (_live, "live")},
    "v2/health/ready": {"GET": (_ready, "ready")},
    "v2/repository/index": {"POST": (_index, "index")},
    "metrics": {"GET": (_metrics, "metrics")},
    "openapi.json": {"GET": (_openapi, "openapi")},
    "predict": {"POST": (_predict, "predict")},
    "generate": {"POST": (_generate, "generate")},
}

_V2: dict[str, dict[str, tuple[Handler, str]]] = {
    "": {"GET": (_model_metadata, "v2_metadata")},
    "ready": {"GET": (_model_ready, "v2_ready")},
    "config": {"GET": (_model_config, "v2_config")},
    "golden": {"GET": (_golden, "v2_golden")},
    "infer": {"POST": (_infer, "v2_infer")},
}
_V1: dict[str, dict[str, tuple[Handler, str]]] = {
    "": {"GET": (_status_v1, "v1_status")},
    "metadata": {"GET": (_metadata_v1, "v1_metadata")},
    ":predict": {"POST": (_predict_v1, "v1_predict")},
}


def _model_routes(parts: list[str]) -> dict[str, tuple[Handler, str]]:
    """What a path below /v1/models/ or /v2/models/ takes, by method."""
    rest = parts[3:]
    if len(rest) > 1 and rest[0] == "versions":
        last, rest = rest[1], rest[2:]
    else:
        last = parts[2]
    if parts[0] == "v2":
        return _V2.get("/".join(rest), {})
    return _V1.get(":predict" if last.endswith((":predict", "%3Apredict")) and not rest else "/".join(rest), {})
