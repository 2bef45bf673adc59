"""How far an engine has come, by its own counters: what they said last and say again is an engine that does nothing.

Both engines count steps and tokens on `/metrics` (vLLM documentation, "Metrics"; llama.cpp, tools/server/README.md).
"""

from __future__ import annotations

import asyncio
import re

from llm_api_server.engines.readiness import HTTPFailed, request

_COUNTERS = re.compile(
    rb"^(?:vllm:(?:prompt_tokens|generation_tokens|request_success|iteration_tokens_total_count)"
    rb"|llamacpp:(?:prompt_tokens|tokens_predicted|n_decode))[^\n]*$",
    re.MULTILINE,
)


async def progress(address: str, seconds: float) -> tuple[bytes, ...] | None:
    """The counters as they stand now; None when the engine does not tell within `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            answer = await request(address, "GET", "/metrics")
    except (HTTPFailed, TimeoutError):
        return None
    return tuple(_COUNTERS.findall(answer.body)) or None
