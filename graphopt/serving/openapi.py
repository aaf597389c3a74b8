"""What the server takes and answers, as OpenAPI describes it: by hand, since there are few paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graphopt import __version__
from graphopt.serving.models import Served
from graphopt.serving.tensors_v2 import DATATYPES

_TEXT = {"type": "string"}
_OBJECT = {"type": "object"}
_NUMBERS: dict[str, Any] = {"type": "array", "items": {}}
_TENSOR = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": _TEXT,
        "datatype": {"enum": sorted(DATATYPES.values())},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "data": {},
        "parameters": _OBJECT,
    },
}
_INFER = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": _TEXT,
        "inputs": {"type": "array", "items": _TENSOR},
        "outputs": _NUMBERS,
        "parameters": _OBJECT,
    },
}
_ITEM = {"anyOf": [_TEXT, _OBJECT, {"type": "array", "items": _TEXT}]}
_PREDICT = {
    "type": "object",
    "properties": {
        "text": _TEXT, "text_pair": _TEXT, "image": _TEXT,
        "inputs": {"anyOf": [_TEXT, {"type": "array", "items": _ITEM}]},
        "model": _TEXT, "version": _TEXT,
    },
}  # fmt: skip
_GENERATE = {
    "type": "object",
    "required": ["prompt"],
    "additionalProperties": False,
    "properties": {
        "prompt": _TEXT, "max_tokens": {"type": "integer", "minimum": 1},
        "temperature": {"type": "number", "minimum": 0},
        "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "seed": {"type": "integer", "minimum": 0},
        "stop": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}, "stream": {"type": "boolean"},
        "model": _TEXT, "version": _TEXT,
    },
}  # fmt: skip
_REFUSALS = {
    400: "what was sent is wrong",
    401: "the token is missing or wrong",
    403: "pages of this origin may not call",
    404: "there is no such path, model or version",
    405: "the path does not take this method",
    408: "the body, or the answer, took too long",
    413: "the body, or the number of tokens, is too large",
    415: "the compression is none that is taken",
    429: "too many requests wait",
    500: "the server failed",
    503: "the models are not loaded yet",
}


def document(models: Sequence[Served]) -> dict[str, Any]:
    """The document, with the models that are served as examples of names."""
    names = sorted({one.name for one in models})
    versions = sorted({one.version for one in models})
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "examples": names}}
    version = {"name": "version", "in": "path", "required": True, "schema": {"type": "string", "examples": versions}}
    paths: dict[str, Any] = {
        "/v2": {"get": _operation("The server", _OBJECT)},
        "/v2/health/live": {"get": _operation("Whether the process answers", _OBJECT)},
        "/v2/health/ready": {"get": _operation("Whether the models are loaded and checked", _OBJECT)},
        "/v2/repository/index": {"post": _operation("All models, and bundles that could not be loaded", _NUMBERS)},
        "/metrics": {"get": _operation("Metrics for Prometheus", _TEXT, "text/plain")},
        "/openapi.json": {"get": _operation("This document", _OBJECT)},
        "/predict": {"post": _operation("Texts or images to labels, scores or embeddings", _OBJECT, body=_PREDICT)},
        "/generate": {"post": _operation("A prompt to text", _OBJECT, "*/*", body=_GENERATE)},
    }
    for parameters, between in (([name], ""), ([name, version], "/versions/{version}")):
        for rest, what in (("", "Inputs and outputs"), ("/ready", "Whether it answers"), ("/config", "As Triton's")):
            paths[f"/v2/models/{{name}}{between}{rest}"] = {"get": _operation(what, _OBJECT, parameters=parameters)}
        paths[f"/v2/models/{{name}}{between}/golden"] = {
            "get": _operation("The golden set", _TEXT, "application/octet-stream", parameters=parameters)
        }
        paths[f"/v2/models/{{name}}{between}/infer"] = {
            "post": _operation("Tensors to tensors", _OBJECT, "*/*", body=_INFER, parameters=parameters)
        }
        paths[f"/v1/models/{{name}}{between}"] = {"get": _operation("Its versions", _OBJECT, parameters=parameters)}
        paths[f"/v1/models/{{name}}{between}/metadata"] = {
            "get": _operation("Its signature", _OBJECT, parameters=parameters)
        }
        paths[f"/v1/models/{{name}}{between}:predict"] = {
            "post": _operation("As TensorFlow Serving", _OBJECT, body=_OBJECT, parameters=parameters)
        }
    return {"openapi": "3.1.0", "info": {"title": "graphopt", "version": __version__}, "paths": paths}


def _operation(
    what: str,
    answer: Mapping[str, Any],
    kind: str = "application/json",
    *,
    body: Mapping[str, Any] | None = None,
    parameters: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    error = {"type": "object", "required": ["error"], "properties": {"error": _TEXT}}
    responses: dict[str, Any] = {"200": {"description": what, "content": {kind: {"schema": answer}}}}
    for status, reason in _REFUSALS.items():
        responses[str(status)] = {"description": reason, "content": {"application/json": {"schema": error}}}
    found: dict[str, Any] = {"summary": what, "parameters": list(parameters), "responses": responses}
    if body is not None:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return found
