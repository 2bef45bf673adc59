"""Many clients: chats and completions, streamed and plain, a third of them aborted at a random moment."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import httpx

from tests.running import KEY, TLS, Server

CONCURRENT = 8


def _request(chance: random.Random, most_tokens: int) -> tuple[str, dict[str, Any]]:
    tokens = chance.randint(most_tokens // 4, most_tokens)
    body: dict[str, Any] = {"max_tokens": tokens, "stream": chance.random() < 0.5}
    text = f"{chance.randint(0, 10**9)} reasons to visit the sea: "
    if chance.random() < 0.5:
        return "/v1/completions", {**body, "prompt": text}
    return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]}


async def run(server: Server, count: int, *, seed: int, most_tokens: int) -> int:
    """Send `count` requests; return the number aborted before their response was complete.

    A client aborts after a random share of the time that the last whole request took.
    """
    chance = random.Random(seed)
    times = [1.0]
    left = 0
    slots = asyncio.Semaphore(CONCURRENT)
    loop = asyncio.get_running_loop()

    async def one(path: str, body: dict[str, Any], share: float | None) -> None:
        nonlocal left
        async with slots, httpx.AsyncClient(base_url=server.url, timeout=120, verify=TLS) as client:
            patience = None if share is None else share * times[-1]
            began = loop.time()
            try:
                async with asyncio.timeout(patience):
                    response = await client.post(path, json=body, headers={"Authorization": f"Bearer {KEY}"})
                    assert response.status_code == 200, response.text
                times.append(loop.time() - began)
            except TimeoutError:
                left += 1

    jobs = []
    for number in range(count):
        path, body = _request(chance, most_tokens)
        jobs.append(one(path, body, chance.random() if number % 3 == 0 else None))
    await asyncio.gather(*jobs)
    return left
