"""Ends a generation that nobody waits for, so that the engine itself says how many tokens it had. For `proxy.py`.

vLLM's development mode has an endpoint for it: the answer under way then ends at once, with its usage. Every answer of
llama.cpp is a stream, what has come of it is counted, and closing the connection ends it.
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

#: How long an engine that is told to end an answer may take to say how long it was, and how often it is told.
LAST_WORDS_TIMEOUT = 2.0
ABORT_INTERVAL = 0.2
_OK = 200
_MAX_ANSWER_BYTES = 64 * 1024


def engine_ids(facts: RequestFacts, request_id: str) -> list[str]:
    """What vLLM calls the parts of a request that was sent with `request_id`; nothing where it has no such name."""
    match facts.request:
        case schemas.ChatRequest() | schemas.MessagesRequest():
            return [f"chatcmpl-{request_id}"]
        case schemas.CompletionRequest():
            return [f"cmpl-{request_id}-{index}" for index in range(token_estimates.prompt_count(facts.request))]
        case schemas.ResponsesRequest():
            return [f"resp_{request_id}_0"]
    return []


async def hear_last_words(
    upstream: HttpClient, instance: InstanceInfo, ids: list[str], last_words: asyncio.Future[None]
) -> bool:
    """End what has these ids, and wait until the answer has come to its end, if waiting is of use. Whether it has."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAST_WORDS_TIMEOUT):
            # More than once: the first may come before the engine knows the request.
            while not last_words.done() and await abort(upstream, instance, ids):
                await asyncio.wait({last_words}, timeout=ABORT_INTERVAL)
    return last_words.done()


async def abort(upstream: HttpClient, instance: InstanceInfo, ids: list[str]) -> bool:
    """Whether the engine has ended it: then its answer is about to come to its end."""
    if instance.engine != "vllm" or not ids:  # an empty list would end everybody's
        return False
    body = msgspec.json.encode({"request_ids": ids})
    try:
        response = await upstream.post(
            instance.address, "/abort_requests", body, content_type="application/json", headers=instance.headers
        )
        await response.read_all(_MAX_ANSWER_BYTES)
    except UpstreamError:
        return False
    return response.status == _OK
