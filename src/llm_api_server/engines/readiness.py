"""The few HTTP requests of the manager to an engine: health checks, probes and the warm-up.

One connection per request and whole responses. On the manager's event loop.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from llm_api_server.engines.base import LaunchPlan, ModelProblem
from llm_api_server.engines.explain import without_paths
from llm_api_server.http_client.client import HttpClient
from llm_api_server.http_client.response import UpstreamError

_OK = 200
_MAX_BYTES = 4 * 1024 * 1024


class ProbeFailed(Exception):
    """The engine sent no response, or none that can be read."""


@dataclass(frozen=True)
class ProbeResponse:
    status: int
    body: bytes

    def error_message(self) -> str | None:
        """Return the message of an OpenAI error body, or of one of its flat variants."""
        try:
            body = json.loads(self.body)
        except ValueError:
            return None
        found = body.get("error", body) if isinstance(body, dict) else None
        message = found.get("message") if isinstance(found, dict) else found
        return message if isinstance(message, str) else None


async def request(address: str, method: str, path: str, body: Any = None) -> ProbeResponse:
    """Send one request to `unix:/path` or `http://host:port` and read the whole response. Raises `ProbeFailed`."""
    payload = b"" if body is None else json.dumps(body).encode()
    headers = {"connection": "close", **({"content-type": "application/json"} if payload else {})}
    client = HttpClient()
    try:
        response = await client.request(method, address, path, payload, headers=headers)
        content = await response.read_all(_MAX_BYTES)
    except (UpstreamError, ValueError) as error:
        raise ProbeFailed(str(error) or type(error).__name__) from error
    finally:
        client.close()
    if len(content) == _MAX_BYTES:
        raise ProbeFailed("the response is too long")
    return ProbeResponse(response.status, content)


async def wait_healthy(address: str, interval: float = 0.05) -> None:
    """Request `/health` until the engine responds with 200. Never gives up by itself."""
    while True:
        try:
            if (await request(address, "GET", "/health")).status == _OK:
                return
        except ProbeFailed:
            pass
        await asyncio.sleep(interval)


async def warm_up(plan: LaunchPlan) -> None:
    """Make the plan's warm-up request. Raises `ModelProblem` if it fails."""
    if plan.warmup is None:
        return
    try:
        response = await request(plan.address, "POST", plan.warmup.path, plan.warmup.body)
    except ProbeFailed:
        raise ModelProblem("the engine broke the connection on its first request; see the model's log") from None
    if response.status != _OK:
        reason = without_paths(response.error_message() or f"status {response.status}")
        raise ModelProblem(f"the model is loaded, but its first request failed: {reason}")
