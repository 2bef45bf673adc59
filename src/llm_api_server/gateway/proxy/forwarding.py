"""From an admitted request to an instance that has it: slot, encoding, connection.

Shared by all requests that begin under one configuration.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from llm_api_server.gateway.engine_calls import abort, tokenize_adapter
from llm_api_server.gateway.engine_calls.context_length import ContextLimits
from llm_api_server.gateway.engine_calls.template_probe import TemplateProbe
from llm_api_server.gateway.manager_link.leases import Lease, Leases
from llm_api_server.gateway.proxy.engine_request import EngineRequest
from llm_api_server.gateway.proxy.queue_timeout import QueueTimeout
from llm_api_server.gateway.proxy.relay import Relay
from llm_api_server.gateway.tools import forced_tool_choice
from llm_api_server.gateway.wire.rewrite import rewrite
from llm_api_server.gateway.wire.validation import check_supported
from llm_api_server.http_client.client import HttpClient
from llm_api_server.ipc.lease_messages import InstanceInfo
from llm_api_server.ipc.model_status import ModelStatus


class Forwarder:
    """Leases slots, and sends requests to instances."""

    def __init__(self, leases: Leases, client: HttpClient, limits: ContextLimits, templates: TemplateProbe) -> None:
        self._leases = leases
        self._client = client
        self._limits = limits
        self._templates = templates

    @property
    def models(self) -> Mapping[str, ModelStatus]:
        """State of every configured model."""
        return self._leases.models

    def take_slot(self, request: EngineRequest) -> Lease | None:
        """Take a slot that this worker holds; return None if the manager must grant one."""
        return self._leases.take(request.model.model, request.endpoint.task, request.key.key_id)

    async def wait_slot(self, request: EngineRequest, queue: QueueTimeout) -> Lease:
        """Wait for a slot that the manager grants. Raises its refusal as an `ApiError`."""
        return await self._leases.acquire(
            request.model.model, request.endpoint.task, request.claim(), queue.on_position
        )

    async def send(self, relay: Relay) -> None:
        """Encode the request for its instance and send it. Raises `ApiError`, or `NoResponse` if connecting fails."""
        request, instance = relay.request, relay.lease.instance
        body = request.body_for(instance)
        if request.may_need_adapting:
            body = await self._adapt(request, instance, body)
        if self._limits.may_exceed(request.facts, instance, body):
            await self._limits.check(request.facts, instance, body)
        encoded = relay.encoded = request.frame(instance, body)
        relay.record.prompt_estimate = request.prompt_tokens
        relay.connection = self._client.send_on_idle(instance.address, encoded, relay)
        if relay.connection is None:
            await self.send_again(relay)

    async def _adapt(self, request: EngineRequest, instance: InstanceInfo, body: bytes) -> bytes:
        """Return the body with what this instance needs in a form of its own. Raises `ApiError` if it cannot."""
        facts = request.facts
        check_supported(facts.request, instance.engine)
        if request.is_forced_at(instance):
            knows_tools = await self._templates.knows_tools(instance)
            body = rewrite(body, forced_tool_choice.changes(facts, body, knows_tools=knows_tools))
        if request.is_translated_at(instance):
            body = await tokenize_adapter.to_llama_cpp(self._client, facts, instance, body)
        return body

    async def send_again(self, relay: Relay) -> None:
        """Send the encoded request on a new connection. Raises `NoResponse` if connecting fails."""
        address = relay.lease.instance.address
        relay.connection = await self._client.send_on_new(address, relay.encoded, relay)

    async def abort(self, relay: Relay, ended: asyncio.Future[None]) -> None:
        """End the generation of a detached relay, and wait for its usage as far as the engine reports it."""
        request, instance = relay.request, relay.lease.instance
        ids = abort.engine_ids(request.facts, request.row)
        has_ended = await abort.abort_and_wait(self._client, instance, ids, ended)
        if not has_ended and relay.record.reader is not None and instance.engine == "llama_cpp":
            relay.record.reader.cut_off()
