"""Progress of an engine by its own counters: the same values twice mean an engine that does nothing.

Both engines count steps and tokens on `/metrics` (vLLM documentation, "Metrics"; llama.cpp, tools/server/README.md).
"""

from __future__ import annotations

import asyncio
import re

from llm_api_server.engines.readiness import ProbeFailed, request

_COUNTERS = re.compile(
    rb"^(?:vllm:(?:prompt_tokens|generation_tokens|request_success|iteration_tokens_total_count)"
    rb"|llamacpp:(?:prompt_tokens|tokens_predicted|n_decode))[^\n]*$",
    re.MULTILINE,
)


async def progress(address: str, timeout: float) -> tuple[bytes, ...] | None:  # noqa: ASYNC109 - seconds, for callers
    """Return the counters as they are now; None if the engine does not respond within `timeout` seconds."""
    try:
        async with asyncio.timeout(timeout):
            response = await request(address, "GET", "/metrics")
    except (ProbeFailed, TimeoutError):
        return None
    return tuple(_COUNTERS.findall(response.body)) or None
