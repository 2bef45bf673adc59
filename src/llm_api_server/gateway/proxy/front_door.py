"""The two ways of a request to an engine endpoint into the proxy: past ASGI, and behind it.

`HttpProtocol` finds the `FastPathHandler` in the state of the app's lifespan. `serve_asgi` takes the requests that
another server, or a middleware, has to handle first.
"""

from __future__ import annotations

import time

from starlette.types import Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from llm_api_server.config.models import ServerConfig
from llm_api_server.event_loop.write_buffer import WriteBuffer
from llm_api_server.gateway.http.asgi import AsgiResponder
from llm_api_server.gateway.http.header_lines import CachedLines, Headers
from llm_api_server.gateway.http.request_head import RequestHead
from llm_api_server.gateway.http.responder import RequestListener, Responder
from llm_api_server.gateway.metering.request_record import RequestRecord, record_of
from llm_api_server.gateway.proxy.exchange import Exchange
from llm_api_server.gateway.proxy.services import ProxyServices
from llm_api_server.gateway.wire.endpoints import ENDPOINTS


class FastPathHandler:
    """`RequestHandler` of the engine endpoints."""

    def __init__(self, server: ServerConfig, proxy: ProxyServices) -> None:
        self.default_lines = CachedLines()
        self._proxy = proxy
        self._paths = frozenset(path.encode() for path in ENDPOINTS)
        self._needs_cors = bool(server.cors_origins)
        trusted = server.trusted_proxies
        self._trusted_proxies = ProxyHeadersMiddleware(_no_app, trusted).trusted_hosts if trusted else None

    @property
    def max_body_bytes(self) -> int:
        return self._proxy.max_body_bytes

    @property
    def write_buffer(self) -> WriteBuffer:
        return self._proxy.upstream.write_buffer

    def accepts(self, path: bytes, headers: Headers) -> bool:
        """Return whether `path` is an engine endpoint and the request needs no CORS middleware."""
        return path in self._paths and not (self._needs_cors and any(name == b"origin" for name, _ in headers))

    def open(self, head: RequestHead, responder: Responder) -> RequestListener:
        proxy = self._proxy
        record = RequestRecord(proxy.log.id_of(head.headers), "POST", head.path, time.monotonic())
        if proxy.sampler is not None:
            record.trace = proxy.sampler.begin(head.headers)
        return Exchange(proxy, record, head, responder, is_outermost=True)

    def client_address(self, peer: str | None, headers: Headers) -> str | None:
        """Return the address that a trusted proxy forwards, else that of the peer."""
        if self._trusted_proxies is None or peer not in self._trusted_proxies:
            return peer
        forwarded = b", ".join(value for name, value in headers if name == b"x-forwarded-for")
        return self._trusted_proxies.get_trusted_client_address(forwarded.decode("latin-1"))[0] or peer


async def serve_asgi(proxy: ProxyServices, scope: Scope, receive: Receive, send: Send) -> None:
    """Handle one request behind the middleware."""
    head = RequestHead(scope["path"], scope["headers"])
    content_length = head.headers.get(b"content-length", b"")
    responder = AsgiResponder(receive, send, content_length, proxy.max_body_bytes)
    record = record_of(scope)
    if proxy.sampler is not None:
        record.trace = proxy.sampler.begin(head.headers)
    exchange = Exchange(proxy, record, head, responder)
    exchange.register()
    exchange.begin()
    await responder.serve(exchange)


async def _no_app(scope: object, receive: object, send: object) -> None:
    """Stand-in for the app of a middleware that only parses."""
