"""Puts a vLLM engine to sleep and wakes it, by the endpoints of its development mode on its own socket.

Level 1 keeps the weights in RAM, level 2 forgets them: they are read again from disk on waking (vLLM documentation,
"Sleep Mode"). Raises `SleepFailed`; what the engine is then is not known.
"""

from __future__ import annotations

import json

from llm_api_server.engines.readiness import HTTPFailed, request

_OK = 200


class SleepFailed(Exception):
    """The engine did not do as told; the message says what it answered."""


async def fall_asleep(address: str, level: int, *, from_level: int = 0) -> None:
    """Returns when the engine says that it sleeps. It cannot go from one level to another without waking."""
    if from_level:
        await wake_up(address, from_level)
    await _call(address, "POST", f"/sleep?level={level}")
    if not await is_sleeping(address):
        raise SleepFailed("it says that it is awake")


async def wake_up(address: str, level: int) -> None:
    """Returns when the engine is awake, with its weights."""
    if level == 1:
        await _call(address, "POST", "/wake_up")
    else:
        await _call(address, "POST", "/wake_up?tags=weights")
        await _call(address, "POST", "/collective_rpc", {"method": "reload_weights"})
        await _call(address, "POST", "/wake_up?tags=kv_cache")
    if await is_sleeping(address):
        raise SleepFailed("it says that it still sleeps")


async def is_sleeping(address: str) -> bool:
    answer = await _call(address, "GET", "/is_sleeping")
    try:
        return bool(json.loads(answer)["is_sleeping"])
    except (ValueError, TypeError, KeyError):
        raise SleepFailed("its answer to /is_sleeping cannot be read") from None


async def _call(address: str, method: str, path: str, body: dict[str, str] | None = None) -> bytes:
    try:
        answer = await request(address, method, path, body)
    except HTTPFailed as error:
        raise SleepFailed(f"{path}: {error}") from error
    if answer.status != _OK:
        raise SleepFailed(f"{path}: status {answer.status} {answer.error_message() or ''}".rstrip())
    return answer.body
