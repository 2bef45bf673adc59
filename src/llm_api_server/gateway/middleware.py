"""The outer layers of the app as plain ASGI classes, one job each: request id and errors, authentication, methods.

Their order is in `app.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

from loguru import logger
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm_api_server.auth.authenticator import Authenticator
from llm_api_server.auth.keys import ANONYMOUS
from llm_api_server.errors import ApiError, InternalError, InvalidKey, MethodNotAllowed, render
from llm_api_server.gateway.http.body_limit import small_body
from llm_api_server.gateway.http.request_head import headers_of, lines_of
from llm_api_server.gateway.metering.admission import AdmissionClient
from llm_api_server.gateway.metering.request_record import RequestLog, RequestRecord, attach, record_of

INTERNAL_ERROR = "The server had an error while processing your request."


class RequestIdMiddleware:
    """Gives every request a record and an id, every answer `x-request-id`, every error its body, every row its end.

    Outermost, so that nothing can answer without an id.
    """

    def __init__(self, app: ASGIApp, accounts: AdmissionClient, log: RequestLog) -> None:
        self._app = app
        self._accounts = accounts
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(
            request_id=self._log.id_of(dict(scope["headers"])),
            method=scope["method"],
            path=scope["path"],
            started_at=time.monotonic(),
        )
        attach(scope, record)
        send_with_id = _SendWithId(send, record, self._accounts)
        try:
            await self._app(scope, receive, send_with_id)
        except ApiError as error:
            record.error = error.kind
            await _send_unless_started(record, send_with_id, error_response(error, scope["path"]))
        except Exception:  # noqa: BLE001 - the edge of a request: whatever went wrong must not leak
            logger.exception("request {} failed", record.request_id)
            record.error = InternalError.code
            await _send_unless_started(
                record, send_with_id, error_response(InternalError(INTERNAL_ERROR), scope["path"])
            )
        finally:
            finish(record, self._accounts, self._log)


class _SendWithId:
    """Adds the headers of every answer, those of the key's limits among them, and notes its status."""

    def __init__(self, send: Send, record: RequestRecord, accounts: AdmissionClient) -> None:
        self._send = send
        self._record = record
        self._accounts = accounts

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            record = self._record
            if record.status == 0:
                record.status = message["status"]
            if record.limit_lines is None and record.key is not None:
                record.limit_lines = await self._accounts.look(record.key)
            message["headers"] = [*message.get("headers", ()), *headers_of(answer_lines(record))]
        await self._send(message)


class AuthenticationMiddleware:
    """Deny by default: whatever is not in `public` needs a valid key or token. Without `authenticator` all may all."""

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
                    secret(dict(scope["headers"])), client[0] if client else None
                )
        await self._app(scope, receive, send)


class Dispatcher:
    """Sends engine endpoints to the proxy by exact path and everything else to the routes."""

    def __init__(self, engine_endpoints: Mapping[str, ASGIApp], routes: ASGIApp) -> None:
        self._endpoints = engine_endpoints
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get(scope["path"]) if scope["type"] == "http" else None
        if endpoint is None:
            if scope["type"] == "http" and scope["method"] == "HEAD":
                # A copy: the HTTP server looks at its own scope to leave out the body of an answer to HEAD.
                scope = {**scope, "method": "GET"}
            if scope["type"] == "http" and scope["method"] not in {"GET", "HEAD"}:
                receive = await small_body(scope, receive)
            await self._routes(scope, receive, send)
        elif scope["method"] == "POST":
            await endpoint(scope, receive, send)
        elif scope["method"] == "OPTIONS":
            await send_response(send, (204, [(b"allow", b"POST, OPTIONS")], b""))
        else:
            raise method_not_allowed(scope["method"], "POST, OPTIONS", record_of(scope))


Response = tuple[int, Sequence[tuple[bytes, bytes]], bytes]


def error_response(error: ApiError, path: str) -> Response:
    """Status, headers and body of `error`, in Anthropic's form under `/v1/messages`."""
    headers = [(b"content-type", b"application/json")]
    if error.retry_after is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(error.retry_after))).encode()))
    if error.should_retry is not None:
        headers.append((b"x-should-retry", b"true" if error.should_retry else b"false"))
    if error.position is not None:
        headers.append((b"x-queue-position", str(error.position).encode()))
    if error.status == 401:  # noqa: PLR2004
        headers.append((b"www-authenticate", b'Bearer realm="llm-api-server"'))
    return error.status, headers, render(error, anthropic=is_anthropic(path))


def is_anthropic(path: str) -> bool:
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def method_not_allowed(method: str, allowed: str, record: RequestRecord) -> MethodNotAllowed:
    """The error; the `Allow` header that must go with it (RFC 9110, 15.5.6) is put on the record."""
    record.extra_headers.append((b"allow", allowed.encode()))
    return MethodNotAllowed(f"{method} is not allowed here; use {allowed}.")


async def send_response(send: Send, response: Response) -> None:
    status, headers, body = response
    length = [(b"content-length", str(len(body)).encode())] if body or status != 204 else []  # noqa: PLR2004
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *length]})
    await send({"type": "http.response.body", "body": body})


async def _send_unless_started(record: RequestRecord, send: Send, response: Response) -> None:
    if record.status == 0:
        await send_response(send, response)


def answer_lines(record: RequestRecord) -> bytes:
    """Headers of every answer, as lines of its head: the request's id, and how its key stands."""
    lines = b"x-request-id: %b\r\n%b" % (record.request_id.encode(), record.limit_lines or b"")
    return lines + lines_of(record.extra_headers) if record.extra_headers else lines


def finish(record: RequestRecord, accounts: AdmissionClient, log: RequestLog) -> None:
    """A request is over: its line in the log, and the end of its row."""
    record.seconds = time.monotonic() - record.started_at
    log.add(record)
    accounts.end(record)


def secret(headers: Mapping[bytes, bytes]) -> str:
    """`Authorization: Bearer KEY`, or `x-api-key` as Anthropic's clients send it. Raises `InvalidKey`."""
    scheme, _, credentials = headers.get(b"authorization", b"").decode("latin-1").strip().partition(" ")
    if scheme.lower() == "bearer" and (found := credentials.strip()):
        return found
    if other := headers.get(b"x-api-key", b"").decode("latin-1").strip():
        return other
    raise InvalidKey(
        "You didn't provide an API key. Send it in the Authorization header: 'Authorization: Bearer YOUR_KEY'."
    )
