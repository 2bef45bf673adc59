"""From the head of a request to an admitted one: sender, permission, body, model, quota.

Shared by all requests that begin under one configuration. Most requests never wait here.
"""

from __future__ import annotations

from llm_api_server.auth.access import Key
from llm_api_server.auth.authenticator import Authenticator
from llm_api_server.auth.credentials import secret_of
from llm_api_server.auth.keys import ANONYMOUS
from llm_api_server.config.models import InferenceConfig
from llm_api_server.event_loop.eager_task import ensure_task
from llm_api_server.gateway.http.body_limit import body_too_large, without_bom
from llm_api_server.gateway.http.request_head import RequestHead
from llm_api_server.gateway.http.responder import Responder
from llm_api_server.gateway.manager_link.leases import Leases
from llm_api_server.gateway.media.content_parts import inline
from llm_api_server.gateway.media.fetcher import MediaFetcher
from llm_api_server.gateway.metering.admission import AdmissionClient
from llm_api_server.gateway.metering.request_record import RequestRecord
from llm_api_server.gateway.metering.usage_reporter import UsageReporter
from llm_api_server.gateway.proxy.engine_request import EngineRequest
from llm_api_server.gateway.proxy.head_decisions import HeadDecisions, decisions_of
from llm_api_server.gateway.proxy.model_catalog import ModelCatalog
from llm_api_server.gateway.wire.multipart import Form
from llm_api_server.gateway.wire.request import read_request
from llm_api_server.gateway.wire.responses import EVENT_STREAM
from llm_api_server.gateway.wire.rewrite import rewrite
from llm_api_server.ipc.trace_context import TRACEPARENT, engine_lines


class Preparation:
    """Checks requests and admits them. Without `authenticator`, every client is the anonymous key."""

    def __init__(
        self,
        inference: InferenceConfig,
        *,
        authenticator: Authenticator | None,
        catalog: ModelCatalog,
        leases: Leases,
        admission: AdmissionClient,
        usage: UsageReporter,
        media: MediaFetcher,
        max_body_bytes: int,
        records_prompts: bool,
    ) -> None:
        self._inference = inference
        self._authenticator = authenticator
        self._catalog = catalog
        self._leases = leases
        self._admission = admission
        self._usage = usage
        self._media = media
        self._max_body_bytes = max_body_bytes
        self._records_prompts = records_prompts

    async def prepare(self, head: RequestHead, record: RequestRecord, responder: Responder) -> EngineRequest:
        """Read the request, count it against the limits of its key and give it a row. Raises `ApiError`."""
        decisions = decisions_of(head)
        key = record.key  # set where a middleware has authenticated the request
        if key is None:
            key = record.key = self._known_key(decisions, record, responder)
        while key is None:
            await self._look_up(head, decisions)
            key = record.key = self._known_key(decisions, record, responder)
        if decisions.permitted is not key:
            decisions.check_permission(key, head)
        if not responder.has_body:
            await responder.wait_body()
        request = self._read(head, decisions, record, key, responder.take_body())
        requested, optional = request.output_tokens()
        reserved = request.prompt_tokens + requested
        if not self._admission.admit_from_held(record, reserved + optional):
            await self._admission.admit(record, reserved, optional)
        request.row = self._usage.start(record, request.prompt_text() if self._records_prompts else None)
        return request

    async def with_media(self, request: EngineRequest, head: RequestHead, record: RequestRecord) -> EngineRequest:
        """Return the request with the data of all media that it names by URL. Raises `ApiError`."""
        await ensure_task()
        data: dict[str, str] = {}
        left = self._max_body_bytes - len(request.body)
        for media in request.facts.media:
            if media.url is not None and media.url not in data:
                data[media.url] = await self._media.fetch(media.url, media.param)
                left -= len(data[media.url])
                if left < 0:
                    raise body_too_large(self._max_body_bytes)
        inlined = self._read(head, decisions_of(head), record, request.key, inline(request.body, data))
        inlined.row = request.row
        return inlined

    async def add_rate_limits(self, record: RequestRecord) -> None:
        """Record the rate limits of the key for the response, unless they are known."""
        if record.limit_lines is None and record.key is not None:
            record.limit_lines = await self._admission.peek(record.key)

    def _known_key(self, decisions: HeadDecisions, record: RequestRecord, responder: Responder) -> Key | None:
        """Return the key of the sender; None if it must be looked up. Raises `ApiError` for a wrong network."""
        authenticator, known = self._authenticator, decisions.known
        if authenticator is None:
            return ANONYMOUS
        if known is None or decisions.key_changes != authenticator.changes:
            return None
        authenticator.check(known, responder)
        record.by_token = known.is_token
        return known.key

    async def _look_up(self, head: RequestHead, decisions: HeadDecisions) -> None:
        if self._authenticator is not None:
            decisions.key_changes = self._authenticator.changes
            decisions.known = await self._authenticator.find(secret_of(head.headers))

    def _read(
        self, head: RequestHead, decisions: HeadDecisions, record: RequestRecord, key: Key, body: bytes
    ) -> EngineRequest:
        """Check everything about the request that needs no engine. Raises `ApiError`."""
        endpoint, inference = decisions.endpoint, self._inference
        form = None
        if endpoint.request is None:
            form = Form(head.get(b"content-type"), body)
            facts = form.read()
        else:
            by_default = inference.streaming_default and EVENT_STREAM in head.get(b"accept")
            body = without_bom(body)
            facts = read_request(endpoint, body, stream_by_default=by_default, may_fetch=self._media.is_on)
            if facts.changes:
                body = rewrite(body, facts.changes)
        model = decisions.resolve(facts.model, key, self._leases.models, self._catalog)
        record.model = model.name
        record.stream = facts.stream
        request = EngineRequest(head, key, body, facts, model, form)
        if facts.media or not model.is_checked:
            request.check(inference)
        if record.trace is not None or TRACEPARENT in head.headers:
            request.trace_lines = engine_lines(head.headers, record.trace)
        return request
