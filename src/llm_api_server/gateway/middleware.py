"""Outer layers of the app as plain ASGI classes: request id, errors, authentication, dispatch."""

from __future__ import annotations

import time
from collections.abc import Mapping

from loguru import logger
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm_api_server.auth.authenticator import Authenticator
from llm_api_server.auth.credentials import secret_of
from llm_api_server.auth.keys import ANONYMOUS
from llm_api_server.errors import ApiError, BodyTimeout, InternalError, MethodNotAllowed, RequestTooLarge
from llm_api_server.gateway.http.body_limit import BODY_TIMEOUT, read_small_body
from llm_api_server.gateway.http.header_lines import headers_of
from llm_api_server.gateway.metering.admission import AdmissionClient
from llm_api_server.gateway.metering.completion import RequestCompletion, common_header_lines
from llm_api_server.gateway.metering.request_record import RequestRecord, attach, record_of
from llm_api_server.gateway.wire.error_response import INTERNAL_ERROR, Response, error_response
from llm_api_server.gateway.wire.known_paths import meant_path, unknown_url


class RequestIdMiddleware:
    """Gives every request its record, every response the common headers, every record its end.

    Outermost, so that no response lacks a request id.
    """

    def __init__(self, app: ASGIApp, completion: RequestCompletion) -> None:
        self._app = app
        self._completion = completion

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(
            request_id=self._completion.log.id_of(dict(scope["headers"])),
            method=scope["method"],
            path=scope["path"],
            started_at=time.monotonic(),
        )
        attach(scope, record)
        try:
            await self._app(scope, receive, _SendWithHeaders(send, record, self._completion.admission))
        finally:
            self._completion.finish(record)


class ErrorMiddleware:
    """Gives every error a body. Inside the CORS layer, so that pages of other origins can read it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = record_of(scope)
        try:
            await self._app(scope, receive, send)
        except ApiError as error:
            await _send_error(error, record, send)
        except Exception:  # noqa: BLE001 - the edge of a request: no detail may leak
            logger.exception("request {} failed", record.request_id)
            await _send_error(InternalError(INTERNAL_ERROR), record, send)


#: The rest of a body that did not arrive would be read as the next request (RFC 9110, 15.5.9).
_CLOSE = (b"connection", b"close")


class _SendWithHeaders:
    """Adds the common headers to a response and records its status."""

    def __init__(self, send: Send, record: RequestRecord, admission: AdmissionClient) -> None:
        self._send = send
        self._record = record
        self._admission = admission

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            record = self._record
            if record.status == 0:
                record.status = message["status"]
            if record.limit_lines is None and record.key is not None:
                record.limit_lines = await self._admission.peek(record.key)
            headers = [*message.get("headers", ()), *headers_of(common_header_lines(record))]
            message["headers"] = [*headers, _CLOSE] if message["status"] == BodyTimeout.status else headers
        await self._send(message)


class AuthenticationMiddleware:
    """Demands a valid key or token for every path outside `public`; without `authenticator`, nothing is refused."""

    def __init__(self, app: ASGIApp, *, authenticator: Authenticator | None, public: frozenset[str]) -> None:
        self._app = app
        self._authenticator = authenticator
        self._public = public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._public:
            record = record_of(scope)
            if self._authenticator is None:
                record.key = ANONYMOUS
            else:
                client = scope.get("client")
                record.key, record.by_token = await self._authenticator.authenticate(
                    secret_of(dict(scope["headers"])), client[0] if client else None
                )
        await self._app(scope, receive, send)


class Dispatcher:
    """Sends engine endpoints to the proxy, by exact path, and all other requests to the routes."""

    def __init__(
        self, engine_endpoints: Mapping[str, ASGIApp], routes: ASGIApp, body_timeout: float = BODY_TIMEOUT
    ) -> None:
        self._endpoints = engine_endpoints
        self._routes = routes
        self._body_timeout = body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get(scope["path"]) if scope["type"] == "http" else None
        if endpoint is None:
            if scope["type"] == "http" and scope["method"] == "HEAD":
                # A copy: the server reads its own scope to leave out the body of a response to HEAD.
                scope = {**scope, "method": "GET"}
            if scope["type"] == "http" and scope["method"] not in {"GET", "HEAD"}:
                receive = await self._read_body(scope, receive)
            await self._routes(scope, receive, send)
        elif scope["method"] == "POST":
            await endpoint(scope, receive, send)
        elif scope["method"] == "OPTIONS":
            await _send_response(send, (204, [(b"allow", b"POST, OPTIONS")], b""))
        else:
            raise method_not_allowed(scope["method"], "POST, OPTIONS", record_of(scope))

    async def _read_body(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body for a route. One that is too large may be for an engine: a client with a wrong base URL."""
        try:
            return await read_small_body(scope, receive, body_timeout=self._body_timeout)
        except RequestTooLarge:
            if meant_path(scope["path"], self._endpoints.keys()) is None:
                raise
            raise unknown_url(scope["method"], scope["path"], self._endpoints.keys()) from None


def method_not_allowed(method: str, allowed: str, record: RequestRecord) -> MethodNotAllowed:
    """Return the error, and put the `Allow` header that it requires (RFC 9110, 15.5.6) on the record."""
    record.extra_headers.append((b"allow", allowed.encode()))
    return MethodNotAllowed(f"{method} is not allowed here; use {allowed}.")


async def _send_error(error: ApiError, record: RequestRecord, send: Send) -> None:
    record.error = error.kind
    if record.status == 0:
        await _send_response(send, error_response(error, record.path))


async def _send_response(send: Send, response: Response) -> None:
    status, headers, body = response
    length = [(b"content-length", str(len(body)).encode())] if body or status != 204 else []  # noqa: PLR2004
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *length]})
    await send({"type": "http.response.body", "body": body})
