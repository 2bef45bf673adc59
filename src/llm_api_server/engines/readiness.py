"""The few HTTP requests the manager makes to an engine: is it ready, and the warm-up. Standard library only.

One connection per request, whole answers; the data path has its own client (`gateway/upstream.py`).
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from llm_api_server.engines.base import LaunchPlan, ModelProblem
from llm_api_server.engines.explain import without_paths

_OK = 200
_LIMIT = 4 * 1024 * 1024


class HTTPFailed(Exception):
    """No answer, or none that can be read."""


@dataclass(frozen=True)
class ProbeResponse:
    status: int
    body: bytes

    def error_message(self) -> str | None:
        """The message of an OpenAI error body, or of one of its flat variants."""
        try:
            body = json.loads(self.body)
        except ValueError:
            return None
        found = body.get("error", body) if isinstance(body, dict) else None
        message = found.get("message") if isinstance(found, dict) else found
        return message if isinstance(message, str) else None


async def request(address: str, method: str, path: str, body: Any = None) -> ProbeResponse:
    """Send one request to `unix:/path` or `http://host:port` and read the whole answer. Raises `HTTPFailed`."""
    payload = b"" if body is None else json.dumps(body).encode()
    head = [f"{method} {path} HTTP/1.1", "Host: engine", "Connection: close", f"Content-Length: {len(payload)}"]
    if payload:
        head.append("Content-Type: application/json")
    try:
        reader, writer = await _connect(address)
        try:
            writer.write("\r\n".join([*head, "", ""]).encode() + payload)
            await writer.drain()
            return await _read_answer(reader)
        finally:
            writer.close()
    except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        raise HTTPFailed(str(error) or type(error).__name__) from error


async def wait_healthy(address: str, interval: float = 0.05) -> None:
    """Ask `/health` until it answers 200. Whoever calls watches the process and the clock."""
    while True:
        try:
            if (await request(address, "GET", "/health")).status == _OK:
                return
        except HTTPFailed:
            pass
        await asyncio.sleep(interval)


async def _connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if address.startswith("unix:"):
        return await asyncio.open_unix_connection(address.removeprefix("unix:"), limit=_LIMIT)
    url = urlsplit(address)
    is_tls = url.scheme == "https"
    return await asyncio.open_connection(
        url.hostname, url.port or (443 if is_tls else 80), ssl=is_tls or None, limit=_LIMIT
    )


async def _read_answer(reader: asyncio.StreamReader) -> ProbeResponse:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    status_line, *lines = head.split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    status = int(status_line.partition(" ")[2][:3])
    if "chunked" in headers.get("transfer-encoding", ""):
        return ProbeResponse(status, await _read_chunks(reader))
    if "content-length" in headers:
        return ProbeResponse(status, await reader.readexactly(min(int(headers["content-length"]), _LIMIT)))
    return ProbeResponse(status, await reader.read(_LIMIT))


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        if len(body) + size > _LIMIT:
            raise ValueError("the answer is too long")
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    return bytes(body)


async def warm_up(plan: LaunchPlan) -> None:
    """Make the plan's warm-up request. Raises `ModelProblem` when the engine cannot answer even that."""
    if plan.warmup is None:
        return
    try:
        answer = await request(plan.address, "POST", plan.warmup.path, plan.warmup.body)
    except HTTPFailed:
        raise ModelProblem("the engine broke the connection on its first request; see the model's log") from None
    if answer.status != _OK:
        reason = without_paths(answer.error_message() or f"status {answer.status}")
        raise ModelProblem(f"the model is loaded, but its first answer failed: {reason}")
