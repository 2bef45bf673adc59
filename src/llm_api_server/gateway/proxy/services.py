"""What all requests to engines share in a worker, and how they get in: straight from the protocol, or as ASGI.

`HttpProtocol` finds a `FastPathHandler` in the app's lifespan state and hands it requests of engine endpoints
without ASGI in
between. Under another server, and where a middleware must see the request, `ProxyServices.serve` is the way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from starlette.types import Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from llm_api_server.auth.authenticator import Authenticator
from llm_api_server.auth.keys import ANONYMOUS
from llm_api_server.config.models import Config
from llm_api_server.event_loop.eager_task import ensure_task
from llm_api_server.event_loop.write_buffer import WriteBuffer
from llm_api_server.gateway.engine_calls.context_length import ContextLimits
from llm_api_server.gateway.engine_calls.template_probe import TemplateProbe
from llm_api_server.gateway.http.request_head import RequestHead, lines_of
from llm_api_server.gateway.http.responder import AsgiResponder, Responder, too_large
from llm_api_server.gateway.manager_link.leases import Leases
from llm_api_server.gateway.media.content_parts import inline
from llm_api_server.gateway.media.fetcher import MediaFetcher
from llm_api_server.gateway.metering.admission import AdmissionClient
from llm_api_server.gateway.metering.request_record import RequestLog, RequestRecord, record_of
from llm_api_server.gateway.middleware import secret
from llm_api_server.gateway.proxy.engine_request import EngineRequest
from llm_api_server.gateway.proxy.exchange import Exchange
from llm_api_server.gateway.proxy.model_catalog import ModelCatalog
from llm_api_server.gateway.wire.endpoints import ENDPOINTS, Endpoint
from llm_api_server.http_client.client import HttpClient
from llm_api_server.ipc.trace_context import Sampler

#: A stream without a byte after this gets its head and a comment, so that proxies and clients don't time out ...
FIRST_PING_DELAY = 2.0
#: ... and another comment as often as this until its first byte.
PING_INTERVAL = 10.0
#: How often deadlines and pings are looked at: one timer for all requests.
TICK = 0.1
#: The name of the `FastPathHandler` in the state of the app's lifespan.
FAST_PATH = "llm_api_server.front_door"


class ProxyServices:
    """`running` are the requests under way. Without `authenticator` all may all."""

    def __init__(
        self,
        config: Config,
        catalog: ModelCatalog,
        leases: Leases,
        accounts: AdmissionClient,
        upstream: HttpClient,
        authenticator: Authenticator | None,
    ) -> None:
        self.catalog = catalog
        self.leases = leases
        self.accounts = accounts
        self.upstream = upstream
        self.running: set[Exchange] = set()
        self.templates = TemplateProbe(upstream)
        self.configure(config)
        self.first_ping_delay = FIRST_PING_DELAY
        self.ping_interval = PING_INTERVAL
        self.log = RequestLog()
        self.authenticator = authenticator
        self._timer: asyncio.TimerHandle | None = None

    def configure(self, config: Config) -> None:
        """For requests that come from now on."""
        self.limits = ContextLimits(config.inference, self.upstream)
        self.timeout = config.server.timeout
        self.max_body_bytes = config.server.max_body_bytes
        self.inference = config.inference
        self.media = MediaFetcher(config.media)
        self.may_fetch = self.media.is_on
        self.streaming_default = config.inference.streaming_default
        self.records_prompts = config.storage.record_prompts
        self.sampler = Sampler(config.tracing.sample_ratio) if config.tracing.endpoint else None

    def start(self) -> None:
        self._tick()

    def close(self) -> None:
        """End what still runs."""
        if self._timer is not None:
            self._timer.cancel()
        for exchange in list(self.running):
            exchange.on_shutdown()
        self.log.flush()

    def now(self) -> float:
        """Of the clock that deadlines are given in."""
        return time.monotonic()

    def recognize(self, record: RequestRecord, head: RequestHead, client: Responder) -> bool:
        """Note the key, where no middleware has. False: `look_up` must find it first. Raises `ApiError`."""
        authenticator, known = self.authenticator, head.known
        if record.key is not None:
            return True
        if authenticator is None:
            record.key = ANONYMOUS
            return True
        if known is None or head.changes != authenticator.changes:
            return False
        authenticator.check(known, client)
        record.key, record.by_token = known.key, known.is_token
        return True

    async def look_up(self, head: RequestHead) -> None:
        """Who sent it. Raises `ApiError`."""
        authenticator = self.authenticator
        assert authenticator is not None, "without one, everybody is recognized"
        head.changes = authenticator.changes
        head.known = await authenticator.find(secret(head.headers))

    async def with_media(self, question: EngineRequest) -> bytes:
        """The body with all that it names by URL. Raises `ApiError`."""
        await ensure_task()
        data: dict[str, str] = {}
        room = self.max_body_bytes - len(question.body)
        for one in question.facts.media:
            if one.url is not None and one.url not in data:
                data[one.url] = await self.media.fetch(one.url, one.param)
                room -= len(data[one.url])
                if room < 0:
                    raise too_large(self.max_body_bytes)
        return inline(question.body, data)

    async def serve(self, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request by ASGI, behind the middleware."""
        head = RequestHead(endpoint, scope["headers"])
        client = AsgiResponder(receive, send, head.headers.get(b"content-length", b""), self.max_body_bytes)
        record = record_of(scope)
        if self.sampler is not None:
            record.trace = self.sampler.begin(head.headers)
        exchange = Exchange(self, record, head, client)
        exchange.arrive()
        exchange.begin()
        await client.serve(exchange)

    def _tick(self) -> None:
        now = self.now()
        for exchange in list(self.running):
            exchange.on_tick(now)
        self._timer = asyncio.get_running_loop().call_later(TICK, self._tick)


class FastPathHandler:
    """Requests of engine endpoints as the HTTP protocol has them, without ASGI."""

    def __init__(self, config: Config, proxy: ProxyServices) -> None:
        self.endpoints: Mapping[bytes, Endpoint] = MappingProxyType(
            {path.encode(): endpoint for path, endpoint in ENDPOINTS.items()}
        )
        self.proxy = proxy
        self._needs_cors = bool(config.server.cors_origins)
        trusted = config.server.trusted_proxies
        self._proxies = ProxyHeadersMiddleware(_nobody, trusted).trusted_hosts if trusted else None
        self._default_headers: Sequence[tuple[bytes, bytes]] = ()
        self._default_lines = b""

    @property
    def turns(self) -> WriteBuffer:
        """In which connections to clients are to write."""
        return self.proxy.upstream.write_buffer

    def takes(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        """Whether nothing but the proxy needs to see the request."""
        return not (self._needs_cors and any(name == b"origin" for name, _ in headers))

    def address(self, peer: str | None, headers: Sequence[tuple[bytes, bytes]]) -> str | None:
        """Of the client; what a proxy says is believed of those that are trusted."""
        if self._proxies is None or peer not in self._proxies:
            return peer
        forwarded = b", ".join(value for name, value in headers if name == b"x-forwarded-for")
        return self._proxies.get_trusted_client_address(forwarded.decode("latin-1"))[0] or peer

    def open(self, head: RequestHead, client: Responder) -> tuple[Exchange, RequestRecord]:
        """A request whose head has come; to be begun."""
        proxy = self.proxy
        record = RequestRecord(proxy.log.id_of(head.headers), "POST", head.endpoint.path, time.monotonic())
        if proxy.sampler is not None:
            record.trace = proxy.sampler.begin(head.headers)
        return Exchange(proxy, record, head, client), record

    def lines_of(self, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
        """As they stand in a head; the same as last time need not be put together again."""
        if headers is not self._default_headers:
            self._default_headers, self._default_lines = headers, lines_of(headers)
        return self._default_lines


async def _nobody(scope: object, receive: object, send: object) -> None:
    """An app where only a middleware's parsing is wanted."""
