"""Sleep mode of a vLLM engine, by the endpoints of its development mode on its own socket.

Level 1 keeps the weights in RAM; level 2 drops them and reads them from disk on waking (vLLM documentation,
"Sleep Mode"). After `SleepFailed` the state of the engine is unknown.
"""

from __future__ import annotations

import json

from llm_api_server.engines.readiness import ProbeFailed, request

_OK = 200


class SleepFailed(Exception):
    """The engine did not fall asleep or wake up; the message has its response."""


async def fall_asleep(address: str, level: int, *, from_level: int = 0) -> None:
    """Return when the engine reports that it sleeps. It must wake up to change from one level to another."""
    if from_level:
        await wake_up(address, from_level)
    await _call(address, "POST", f"/sleep?level={level}")
    if not await is_sleeping(address):
        raise SleepFailed("the engine reports that it is awake")


async def wake_up(address: str, level: int) -> None:
    """Return when the engine is awake, with its weights."""
    if level == 1:
        await _call(address, "POST", "/wake_up")
    else:
        await _call(address, "POST", "/wake_up?tags=weights")
        await _call(address, "POST", "/collective_rpc", {"method": "reload_weights"})
        await _call(address, "POST", "/wake_up?tags=kv_cache")
    if await is_sleeping(address):
        raise SleepFailed("the engine reports that it still sleeps")


async def is_sleeping(address: str) -> bool:
    body = await _call(address, "GET", "/is_sleeping")
    try:
        return bool(json.loads(body)["is_sleeping"])
    except (ValueError, TypeError, KeyError):
        raise SleepFailed("the response to /is_sleeping cannot be read") from None


async def _call(address: str, method: str, path: str, body: dict[str, str] | None = None) -> bytes:
    try:
        response = await request(address, method, path, body)
    except ProbeFailed as error:
        raise SleepFailed(f"{path}: {error}") from error
    if response.status != _OK:
        raise SleepFailed(f"{path}: status {response.status} {response.error_message() or ''}".rstrip())
    return response.body
