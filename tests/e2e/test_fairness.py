"""Fair scheduling on a real engine: a flood from one key beside the few requests of another, and full queues."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.running import KEYS, TLS, Server, running
from tests.waiting import wait_until

pytestmark = pytest.mark.anyio

MODEL = "SmolLM2-135M-Instruct"
SLOTS = 4
ROUNDS = 20
TIMES_THE_LOAD = 10


def secret(name: str) -> str:
    return f"sk-of-{name}-0123456789abcdef"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: Path) -> Iterator[Server]:
    keys = [{"key": secret(name), "name": name} for name in ("small", "flood", "other")]
    keys.append({"key": secret("batch"), "name": "batch", "priority_class": "batch"})
    config: dict[str, Any] = {
        "server": {"workers": 2},
        "auth": {"api_keys": [*KEYS, *keys]},
        "models": {
            "default": MODEL,
            "preload": [MODEL],
            "available": {MODEL: {"path": str(smollm2_gguf), "max_tokens": 1024}},
        },
        "inference": {"max_batch_size": SLOTS},
        "limits": {"queue_per_key": 20, "queue_per_model": 24},
    }
    with running(tmp_path_factory.mktemp("fairness"), config) as one:
        wait_until(lambda: one.models()[MODEL]["state"] == "ready")
        yield one


class Caller:
    """A client with a key of its own. No two of its prompts are alike, so that no cache hides the prefill."""

    def __init__(self, server: Server, name: str, tokens: tuple[int, int]) -> None:
        self._client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=secret(name), max_retries=0, timeout=240)
        self._numbers = itertools.count()
        self._chance = random.Random(name)
        self._name = name
        self._tokens = tokens
        self.answered = 0

    async def close(self) -> None:
        await self._client.close()

    async def first_token(self) -> float:
        """Send a request, read the whole stream, and return the seconds until its first token."""
        tokens = self._chance.randint(*self._tokens)
        prompt = f"{next(self._numbers)} {self._name} " + "once upon a time there was a king " * 20
        begun = time.monotonic()
        seconds = 0.0
        stream = await self._client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=tokens, stream=True, extra_body={"ignore_eos": True}
        )
        async for chunk in stream:
            seconds = seconds or (time.monotonic() - begun if chunk.choices and chunk.choices[0].text else 0.0)
        self.answered += 1
        return seconds

    async def keep_asking(self) -> None:
        while True:
            await self.first_token()

    async def median(self) -> float:
        """Return the median time to first token of requests at random moments."""
        seconds = []
        for _ in range(ROUNDS):
            await asyncio.sleep(self._chance.random())
            seconds.append(await self.first_token())
        return statistics.median(seconds)


@pytest.mark.alone
async def test_key_with_ten_times_the_load_hardly_delays_another(server: Server, record_property: Any) -> None:
    small, flood = Caller(server, "small", (2, 8)), Caller(server, "flood", (24, 72))
    alone = [await small.median()]
    crowd = [asyncio.create_task(flood.keep_asking()) for _ in range(TIMES_THE_LOAD)]
    await becomes(server, in_flight=SLOTS, queued=1)
    beside = await small.median()
    for one in crowd:
        one.cancel()
    await asyncio.gather(*crowd, return_exceptions=True)
    alone.append(await small.median())
    for caller in (small, flood):
        await caller.close()
    ratio = beside / statistics.mean(alone)
    record_property("ratio_of_first_token", ratio)
    print(f"first token alone {alone[0]:.3f} and {alone[1]:.3f} s, beside the flood {beside:.3f} s: {ratio:.2f} times")
    assert flood.answered > TIMES_THE_LOAD, "the flood was none"
    assert ratio <= 2


async def test_full_queues_refuse_and_a_queued_stream_gets_its_position(server: Server) -> None:
    """At most 20 requests of a key may wait, and 24 in all."""
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=server.url, verify=TLS, timeout=60))

        async def ask(name: str, **more: Any) -> httpx.Response:
            body = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True, **more}
            request = client.build_request(
                "POST", "/v1/completions", json=body, headers={"Authorization": f"Bearer {secret(name)}"}
            )
            response = await client.send(request, stream=True)
            stack.push_async_callback(response.aclose)
            return response

        async def ask_until_refused(name: str) -> httpx.Response:
            """Send streams, each after the one before has its head or waits in the queue, until one is refused."""
            while True:
                task = asyncio.create_task(ask(name, stream=True))
                done, _ = await asyncio.wait({task}, timeout=0.1)
                if done and task.result().status_code != httpx.codes.OK:
                    return task.result()
                waiting.append(task)

        waiting: list[asyncio.Task[httpx.Response]] = []
        refused = await ask_until_refused("other")
        error = json.loads(await refused.aread())["error"]
        assert (refused.status_code, error["code"], error["type"]) == (429, "slow_down", "rate_limit_error")
        assert refused.headers["x-queue-position"] == "21"
        assert 1 <= int(refused.headers["retry-after"]) <= 60

        refused = await ask_until_refused("small")
        error = json.loads(await refused.aread())["error"]
        assert (refused.status_code, error["code"]) == (503, "server_overloaded")
        assert refused.headers["x-queue-position"] == "25"

        lines = (await waiting[-1]).aiter_lines()
        assert re.fullmatch(rf": waiting for {MODEL}, position [1-9]\d*", await anext(lines))
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    await becomes(server, queued=0, in_flight=0)


async def test_batch_requests_wait_for_all_others(server: Server) -> None:
    """Requests are batch requests by their key or by `service_tier`."""
    ends: list[str] = []
    async with httpx.AsyncClient(base_url=server.url, verify=TLS, timeout=120) as client:

        async def ask(name: str, tokens: int, label: str, **more: Any) -> None:
            body = {"prompt": f"{len(ends)} {name}", "max_tokens": tokens, "ignore_eos": True, **more}
            headers = {"Authorization": f"Bearer {secret(name)}"}
            response = await client.post("/v1/completions", json=body, headers=headers)
            assert response.status_code == 200, response.text
            ends.append(label)

        first = [asyncio.create_task(ask("other", 100, "first")) for _ in range(SLOTS + 1)]
        await becomes(server, queued=1)
        batch = [
            asyncio.create_task(ask("batch", 60, "batch")),
            asyncio.create_task(ask("small", 60, "flex", service_tier="flex")),
        ]
        await becomes(server, queued=3)
        rest = [asyncio.create_task(ask("other", 8, "rest")) for _ in range(6)]
        await asyncio.gather(*first, *batch, *rest)
    assert set([end for end in ends if end != "first"][-2:]) == {"batch", "flex"}


async def becomes(server: Server, **wanted: int) -> None:
    """Wait until counters of the model reach their values, or zero where zero is given."""
    async with asyncio.timeout(60):
        while True:
            status = (await asyncio.to_thread(server.models))[MODEL]
            if all(status[name] >= value if value else status[name] == 0 for name, value in wanted.items()):
                return
            await asyncio.sleep(0.05)
