"""What all requests to engines share in a worker, and how they get in: straight from the protocol, or as ASGI.

`HttpProtocol` finds a `FastPathHandler` in the app's lifespan state and hands it requests of engine endpoints
without ASGI in
between. Under another server, and where a middleware must see the request, `ProxyServices.serve` is the way.
"""

from __future__ import annotations

import asyncio
import time

from llm_api_server.auth.authenticator import Authenticator
from llm_api_server.auth.credentials import secret_of
from llm_api_server.auth.keys import ANONYMOUS
from llm_api_server.config.models import Config
from llm_api_server.event_loop.eager_task import ensure_task
from llm_api_server.gateway.engine_calls.context_length import ContextLimits
from llm_api_server.gateway.engine_calls.template_probe import TemplateProbe
from llm_api_server.gateway.http.body_limit import body_too_large
from llm_api_server.gateway.http.request_head import RequestHead
from llm_api_server.gateway.http.responder import Responder
from llm_api_server.gateway.manager_link.leases import Leases
from llm_api_server.gateway.media.content_parts import inline
from llm_api_server.gateway.media.fetcher import MediaFetcher
from llm_api_server.gateway.metering.admission import AdmissionClient
from llm_api_server.gateway.metering.completion import RequestCompletion
from llm_api_server.gateway.metering.request_record import RequestLog, RequestRecord
from llm_api_server.gateway.metering.usage_reporter import UsageReporter
from llm_api_server.gateway.proxy.engine_request import EngineRequest
from llm_api_server.gateway.proxy.exchange import Exchange
from llm_api_server.gateway.proxy.head_decisions import HeadDecisions
from llm_api_server.gateway.proxy.model_catalog import ModelCatalog
from llm_api_server.http_client.client import HttpClient
from llm_api_server.ipc.trace_context import Sampler

#: A stream without a byte after this gets its head and a comment, so that proxies and clients don't time out ...
FIRST_PING_DELAY = 2.0
#: ... and another comment as often as this until its first byte.
PING_INTERVAL = 10.0
#: How often deadlines and pings are looked at: one timer for all requests.
TICK = 0.1


class ProxyServices:
    """`running` are the requests under way. Without `authenticator` all may all."""

    def __init__(
        self,
        config: Config,
        catalog: ModelCatalog,
        leases: Leases,
        admission: AdmissionClient,
        usage: UsageReporter,
        upstream: HttpClient,
        *,
        authenticator: Authenticator | None,
    ) -> None:
        self.catalog = catalog
        self.leases = leases
        self.admission, self.usage = admission, usage
        self.upstream = upstream
        self.running: set[Exchange] = set()
        self.templates = TemplateProbe(upstream)
        self.configure(config)
        self.first_ping_delay = FIRST_PING_DELAY
        self.ping_interval = PING_INTERVAL
        self.log = RequestLog()
        self.completion = RequestCompletion(self.log, admission, usage)
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

    def recognize(self, record: RequestRecord, decisions: HeadDecisions, client: Responder) -> bool:
        """Note the key, where no middleware has. False: `look_up` must find it first. Raises `ApiError`."""
        authenticator, known = self.authenticator, decisions.known
        if record.key is not None:
            return True
        if authenticator is None:
            record.key = ANONYMOUS
            return True
        if known is None or decisions.key_changes != authenticator.changes:
            return False
        authenticator.check(known, client)
        record.key, record.by_token = known.key, known.is_token
        return True

    async def look_up(self, head: RequestHead, decisions: HeadDecisions) -> None:
        """Who sent it. Raises `ApiError`."""
        authenticator = self.authenticator
        assert authenticator is not None, "without one, everybody is recognized"
        decisions.key_changes = authenticator.changes
        decisions.known = await authenticator.find(secret_of(head.headers))

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
                    raise body_too_large(self.max_body_bytes)
        return inline(question.body, data)

    def _tick(self) -> None:
        now = self.now()
        for exchange in list(self.running):
            exchange.on_tick(now)
        self._timer = asyncio.get_running_loop().call_later(TICK, self._tick)
