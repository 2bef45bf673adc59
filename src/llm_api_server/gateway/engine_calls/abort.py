"""End of a generation whose response no client waits for, such that the engine still reports its tokens.

vLLM's development mode has an endpoint for it: the response then ends immediately, with its usage. llama.cpp always
streams, so its tokens are counted as they arrive, and closing the connection ends the generation.
"""

from __future__ import annotations

import asyncio
import contextlib

import msgspec

from llm_api_server.gateway.wire import schemas, token_estimates
from llm_api_server.gateway.wire.request import RequestFacts
from llm_api_server.http_client.client import HttpClient
from llm_api_server.http_client.response import UpstreamError
from llm_api_server.ipc.lease_messages import InstanceInfo

#: Seconds that an engine has to end an aborted response and report its usage ...
ABORT_TIMEOUT = 2.0
#: ... and between two attempts to abort it.
ABORT_INTERVAL = 0.2
_OK = 200
_MAX_RESPONSE_BYTES = 64 * 1024


def engine_ids(facts: RequestFacts, request_id: str) -> list[str]:
    """Return vLLM's ids of the parts of the request sent as `request_id`; empty if it has none."""
    match facts.request:
        case schemas.ChatRequest() | schemas.MessagesRequest():
            return [f"chatcmpl-{request_id}"]
        case schemas.CompletionRequest():
            return [f"cmpl-{request_id}-{index}" for index in range(token_estimates.prompt_count(facts.request))]
        case schemas.ResponsesRequest():
            return [f"resp_{request_id}_0"]
    return []


async def abort_and_wait(
    client: HttpClient, instance: InstanceInfo, ids: list[str], ended: asyncio.Future[None]
) -> bool:
    """Abort the requests with these ids, and wait until the response has `ended`. Return whether it has."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ABORT_TIMEOUT):
            # Repeatedly: the first attempt may precede the request at the engine.
            while not ended.done() and await abort(client, instance, ids):
                await asyncio.wait({ended}, timeout=ABORT_INTERVAL)
    return ended.done()


async def abort(client: HttpClient, instance: InstanceInfo, ids: list[str]) -> bool:
    """Return whether the engine has accepted the abort: the response is then about to end."""
    if instance.engine != "vllm" or not ids:  # an empty list would abort all requests of the engine
        return False
    body = msgspec.json.encode({"request_ids": ids})
    try:
        response = await client.post(
            instance.address, "/abort_requests", body, content_type="application/json", headers=instance.headers
        )
        await response.read_all(_MAX_RESPONSE_BYTES)
    except UpstreamError:
        return False
    return response.status == _OK
