"""Entry of requests to engine endpoints: past ASGI, and behind it.

`HttpProtocol` finds the proxy in the state of the app's lifespan; requests that another server or a middleware has to
see first arrive through `EngineProxy.serve`.
"""

from __future__ import annotations

import time

from starlette.types import Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from llm_api_server.auth.authenticator import Authenticator
from llm_api_server.config.models import Config
from llm_api_server.gateway.engine_calls.context_length import ContextLimits
from llm_api_server.gateway.engine_calls.template_probe import TemplateProbe
from llm_api_server.gateway.http.asgi import AsgiResponder
from llm_api_server.gateway.http.body_limit import BODY_TIMEOUT
from llm_api_server.gateway.http.header_lines import CachedLines, Headers
from llm_api_server.gateway.http.request_head import RequestHead
from llm_api_server.gateway.http.responder import Responder
from llm_api_server.gateway.manager_link.leases import Leases
from llm_api_server.gateway.media.fetcher import MediaFetcher
from llm_api_server.gateway.metering.admission import AdmissionClient
from llm_api_server.gateway.metering.completion import RequestCompletion
from llm_api_server.gateway.metering.request_record import RequestRecord, record_of
from llm_api_server.gateway.metering.usage_reporter import UsageReporter
from llm_api_server.gateway.proxy.exchange import Exchange, SharedParts
from llm_api_server.gateway.proxy.forwarding import Forwarder
from llm_api_server.gateway.proxy.model_catalog import ModelCatalog
from llm_api_server.gateway.proxy.preparation import Preparation
from llm_api_server.gateway.proxy.running_requests import RunningRequests
from llm_api_server.gateway.wire.endpoints import ENDPOINTS
from llm_api_server.http_client.client import HttpClient
from llm_api_server.ipc.trace_context import Sampler


class EngineProxy:
    """Opens an exchange for each request to an engine endpoint; `RequestHandler` of the fast path."""

    def __init__(
        self,
        config: Config,
        *,
        authenticator: Authenticator | None,
        catalog: ModelCatalog,
        leases: Leases,
        client: HttpClient,
        admission: AdmissionClient,
        usage: UsageReporter,
        completion: RequestCompletion,
        running: RunningRequests,
        body_timeout: float = BODY_TIMEOUT,
    ) -> None:
        self.default_lines = CachedLines()
        self.write_buffer = client.write_buffer
        self.body_timeout = body_timeout
        self._paths = frozenset(path.encode() for path in ENDPOINTS)
        self._needs_cors = bool(config.server.cors_origins)
        trusted = config.server.trusted_proxies
        self._trusted_proxies = ProxyHeadersMiddleware(_no_app, trusted).trusted_hosts if trusted else None
        self._authenticator = authenticator
        self._catalog = catalog
        self._leases = leases
        self._client = client
        self._admission = admission
        self._usage = usage
        self._completion = completion
        self._running = running
        self._templates = TemplateProbe(client)
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Apply a configuration to requests that begin from now on."""
        self.max_body_bytes = config.server.max_body_bytes
        self._timeout = config.server.timeout
        self._sampler = Sampler(config.tracing.sample_ratio) if config.tracing.endpoint else None
        preparation = Preparation(
            config.inference,
            authenticator=self._authenticator,
            catalog=self._catalog,
            leases=self._leases,
            admission=self._admission,
            usage=self._usage,
            media=MediaFetcher(config.media),
            max_body_bytes=config.server.max_body_bytes,
            records_prompts=config.storage.record_prompts,
        )
        limits = ContextLimits(config.inference, self._client)
        forwarder = Forwarder(self._leases, self._client, limits, self._templates)
        self._shared = SharedParts(preparation, forwarder, self._running)

    def open(self, head: RequestHead, responder: Responder) -> Exchange:
        """Return the exchange of a request that bypasses ASGI. It is not registered and has not begun."""
        record = RequestRecord(self._completion.log.id_of(head.headers), "POST", head.path, time.monotonic())
        return self._exchange(head, record, responder, self._completion)

    def accepts(self, path: bytes, headers: Headers) -> bool:
        """Return whether `path` is an engine endpoint and the request needs no CORS middleware."""
        return path in self._paths and not (self._needs_cors and any(name == b"origin" for name, _ in headers))

    def client_address(self, peer: str | None, headers: Headers) -> str | None:
        """Return the address that a trusted proxy forwards, else that of the peer."""
        if self._trusted_proxies is None or peer not in self._trusted_proxies:
            return peer
        forwarded = b", ".join(value for name, value in headers if name == b"x-forwarded-for")
        return self._trusted_proxies.get_trusted_client_address(forwarded.decode("latin-1"))[0] or peer

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request behind ASGI: its middleware finishes the record and adds the common headers."""
        head = RequestHead(scope["path"], scope["headers"])
        content_length = head.headers.get(b"content-length", b"")
        responder = AsgiResponder(receive, send, content_length, self.max_body_bytes, self.body_timeout)
        await responder.serve(self._exchange(head, record_of(scope), responder, None))

    def _exchange(
        self, head: RequestHead, record: RequestRecord, responder: Responder, completion: RequestCompletion | None
    ) -> Exchange:
        if self._sampler is not None:
            record.trace = self._sampler.begin(head.headers)
        return Exchange(head, record, responder, record.started_at + self._timeout, self._shared, completion)


async def _no_app(scope: object, receive: object, send: object) -> None:
    """Stand-in for the app of a middleware that only parses."""
