"""The OpenAPI description: FastAPI's for its routes, and one of the engine endpoints from their request structs."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from llm_api_server import __version__
from llm_api_server.gateway.routes.public import PUBLIC_PATHS
from llm_api_server.gateway.wire import schemas
from llm_api_server.gateway.wire.endpoints import ENDPOINTS, Endpoint

DESCRIPTION = "One OpenAI-compatible endpoint for all models. The engine also gets members that are not listed here."
_CONFLICT = 409
_REF = "#/components/schemas/{name}"
_ERRORS = {
    400: "The request is invalid; `param` names the field.",
    401: "The key is missing or wrong.",
    403: "The key lacks the permission.",
    404: "There is no such model or key.",
    408: "The body of the request made no progress; send the request again.",
    409: "The name is taken, or the state forbids it; the message says what to do.",
    413: "The body is too large.",
    429: "A rate limit is reached; retry after `Retry-After` seconds.",
    500: "The engine failed.",
    503: "The model cannot be loaded or the engine does not respond; retry after `Retry-After` seconds.",
    504: "The request took longer than the server allows.",
}


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(msgspec.Struct):
    """OpenAI's error body."""

    error: ErrorDetail


class AnthropicErrorDetail(msgspec.Struct):
    type: str
    message: str


class AnthropicError(msgspec.Struct):
    """The error body under `/v1/messages`."""

    type: str
    error: AnthropicErrorDetail


def describe(app: FastAPI) -> dict[str, Any]:
    """Return the whole description; the first call builds it."""
    if app.openapi_schema is None:
        document = get_openapi(title="LLM API Server", version=__version__, description=DESCRIPTION, routes=app.routes)
        components = document.setdefault("components", {})
        components["securitySchemes"] = {
            "key": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        document["security"] = [{"key": []}, {"x-api-key": []}]
        _describe_routes(document["paths"])
        components["schemas"] = {**_without_fastapi_errors(components.get("schemas", {})), **_engine_schemas()}
        document["paths"].update({path: {"post": _operation(one)} for path, one in ENDPOINTS.items()})
        app.openapi_schema = document
    return app.openapi_schema


def _describe_routes(paths: dict[str, Any]) -> None:
    """Replace FastAPI's 422, which this server never sends, by its own errors."""
    for path, operations in paths.items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if path in PUBLIC_PATHS:
                operation["security"] = []
                continue
            for status in (400, 401, 403, 404, 409, 503):
                operation["responses"].setdefault(str(status), _error_response(status, "Error"))


def _without_fastapi_errors(found: dict[str, Any]) -> dict[str, Any]:
    return {name: one for name, one in found.items() if name not in ("HTTPValidationError", "ValidationError")}


def _engine_schemas() -> dict[str, Any]:
    types = {one.request for one in ENDPOINTS.values() if one.request is not None}
    _, components = msgspec.json.schema_components(
        [*sorted(types, key=lambda one: one.__name__), schemas.AudioForm, Error, AnthropicError],
        ref_template=_REF,
    )
    return dict(components)


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    request = endpoint.request or schemas.AudioForm
    body_type = "application/json" if endpoint.request is not None else "multipart/form-data"
    error = "AnthropicError" if endpoint.dialect == "anthropic" else "Error"
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if endpoint.streams:
        content["text/event-stream"] = {}
    return {
        "tags": ["engine"],
        "summary": endpoint.summary,
        "description": f"Needs the permission `{endpoint.permission}`. The response is the engine's.",
        "operationId": "post" + endpoint.path.replace("/", "_"),
        "requestBody": {
            "required": True,
            "content": {body_type: {"schema": {"$ref": _REF.format(name=request.__name__)}}},
        },
        "responses": {
            "200": {"description": "The engine's response.", "content": content},
            **{str(status): _error_response(status, error) for status in _ERRORS if status != _CONFLICT},
        },
    }


def _error_response(status: int, schema: str) -> dict[str, Any]:
    return {
        "description": _ERRORS[status],
        "content": {"application/json": {"schema": {"$ref": _REF.format(name=schema)}}},
    }
