"""Limits under 32 clients, several workers and a real engine: a key gets all of its quota and never more."""

from __future__ import annotations

import asyncio
import itertools
import re
import threading
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
CLIENTS = 32
PER_MINUTE, TOKENS, CONCURRENT = 25, 500, 3
LIMITED = {
    "requests": {"requests_per_minute": PER_MINUTE},
    "tokens": {"tokens_per_minute": TOKENS},
    "concurrent": {"max_concurrent": CONCURRENT},
    "day": {"tokens_per_day": 300},
    "month": {"tokens_per_month": 300},
    "every": {"requests_per_minute": 5, "tokens_per_minute": 10_000, "max_concurrent": 4, "tokens_per_day": 10_000},
}


def secret(name: str) -> str:
    return f"sk-limited-by-{name}-0123456789"


def make_config(smollm2_gguf: Path, workers: int) -> dict[str, Any]:
    keys = [{"key": secret(name), "name": name, **limits} for name, limits in LIMITED.items()]
    return {
        "server": {"workers": workers},
        "auth": {"api_keys": [*KEYS, *keys]},
        "models": {
            "default": MODEL,
            "preload": [MODEL],
            "available": {MODEL: {"path": str(smollm2_gguf), "max_tokens": 256}},
        },
        "inference": {"max_batch_size": 8},
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: Path) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("limits"), make_config(smollm2_gguf, 4)) as one:
        wait_until(lambda: one.models()[MODEL]["state"] == "ready")
        yield one


def body(tokens: int = 1, **more: Any) -> dict[str, Any]:
    return {"prompt": "Once", "max_tokens": tokens, "ignore_eos": True, **more}


async def ask_at_once(server: Server, name: str, count: int, **options: Any) -> list[httpx.Response]:
    """Send `count` requests from `CLIENTS` clients, each with connections of its own."""
    numbers = itertools.count()

    async def client() -> list[httpx.Response]:
        responses = []
        headers = {"Authorization": f"Bearer {secret(name)}"}
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=120, verify=TLS) as one:
            while next(numbers) < count:
                responses.append(await one.post("/v1/completions", json=body(**options)))
        return responses

    found = await asyncio.gather(*(client() for _ in range(min(CLIENTS, count))))
    return [response for responses in found for response in responses]


async def spend(server: Server, name: str, tokens: int) -> tuple[int, httpx.Response]:
    """Use up a key's tokens, by all clients at once and then by one until it is refused. Return tokens and refusal."""
    responses = await ask_at_once(server, name, 64, tokens=tokens)
    while responses[-1].status_code == 200 or len(responses) == 64:
        responses += await ask_at_once(server, name, 1, tokens=tokens)
    assert {response.status_code for response in responses} <= {200, 429}
    return sum(
        response.json()["usage"]["total_tokens"] for response in responses if response.status_code == 200
    ), responses[-1]


def reservation(tokens: int) -> int:
    """Return the most tokens reserved for a request: the body's length for the prompt, `tokens` for the output."""
    return tokens + len(str(body(tokens)))


def check_refusal(response: httpx.Response, code: str, words: str) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (429, code, None)
    assert words in error["message"]
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("workers", [1, 2, 4])
async def test_requests_per_minute_are_exact(tmp_path: Path, smollm2_gguf: Path, workers: int) -> None:
    with running(tmp_path, make_config(smollm2_gguf, workers)) as server:
        wait_until(lambda: server.models()[MODEL]["state"] == "ready")
        responses = await ask_at_once(server, "requests", 4 * PER_MINUTE)
        passed = [response for response in responses if response.status_code == 200]
        refused = [response for response in responses if response.status_code != 200]
        assert (len(passed), len(refused)) == (PER_MINUTE, 3 * PER_MINUTE)
        for response in refused:
            check_refusal(response, "rate_limit_exceeded", f"{PER_MINUTE} requests per minute")
        left = sorted(int(response.headers["x-ratelimit-remaining-requests"]) for response in passed)
        assert (left[0], left[-1] < PER_MINUTE) == (0, True)
        if workers == 1:  # workers do not know what is left of each other's quota
            assert left == list(range(PER_MINUTE))
        assert {response.headers["x-ratelimit-limit-requests"] for response in responses} == {str(PER_MINUTE)}
        assert all(
            re.fullmatch(r"(\d+m)?\d+m?s", response.headers["x-ratelimit-reset-requests"]) for response in responses
        )


@pytest.mark.story
async def test_tokens_per_minute_hold_within_one_reservation(server: Server) -> None:
    used, refused = await spend(server, "tokens", 20)
    assert TOKENS - reservation(20) < used <= TOKENS
    check_refusal(refused, "rate_limit_exceeded", f"{TOKENS} tokens per minute")


async def test_concurrent_requests_never_exceed_their_limit(server: Server) -> None:
    before = len(engine_events(server))
    responses = await ask_at_once(server, "concurrent", 300, tokens=8)
    passed = [response for response in responses if response.status_code == 200]
    for response in responses:
        if response.status_code != 200:
            check_refusal(response, "rate_limit_exceeded", "concurrent requests")
    wait_until(lambda: len(engine_events(server)) == before + 2 * len(passed))
    running_now, most = 0, 0
    for change in engine_events(server)[before:]:
        running_now += change
        most = max(most, running_now)
    assert most == CONCURRENT
    assert running_now == 0


def engine_events(server: Server) -> list[int]:
    """Return +1 for each request that the engine started and -1 for each that ended, in the order of its log."""
    (log,) = (server.folder / "logs" / "engines").glob("*.log")
    events = []
    for line in log.read_text(errors="replace").splitlines():
        if "launch_slot_" in line and "processing task" in line:
            events.append(1)
        elif "stop processing" in line:
            events.append(-1)
    return events


def recorded_tokens(server: Server, key: str) -> int:
    with server.client() as client:
        rows = client.get("/admin/api/usage", params={"group_by": "key"}).raise_for_status().json()["data"]
    return sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows if row["key_name"] == key)


@pytest.mark.parametrize(("period", "kills"), [("day", True), ("month", False)])
async def test_budgets_hold_across_a_restart_of_everything(
    tmp_path: Path, smollm2_gguf: Path, period: str, kills: bool
) -> None:
    config = make_config(smollm2_gguf, 4)

    server = Server(tmp_path, config)
    try:
        server.start()
        wait_until(lambda: server.models()[MODEL]["state"] == "ready")
        used, refused = await spend(server, period, 20)
        assert 300 - reservation(20) < used <= 300
        check_refusal(refused, "insufficient_quota", f"300 tokens per {period}")
        assert refused.headers["x-should-retry"] == "false"
        if kills:
            wait_until(lambda: recorded_tokens(server, period) == used)  # a kill loses what is not yet written
        else:
            assert server.stop() == 0
    finally:
        server.kill_all()
    with running(tmp_path, config) as again:
        wait_until(lambda: again.models()[MODEL]["state"] == "ready")
        more, refused = await spend(again, period, 1)
        assert 300 - reservation(1) < used + more <= 300
        check_refusal(refused, "insufficient_quota", f"300 tokens per {period}")


@pytest.mark.story
def test_every_response_to_a_limited_key_has_rate_limit_headers(server: Server) -> None:
    with server.client(secret("every")) as client:
        first = client.post("/v1/completions", json=body())
        assert first.status_code == 200
        assert first.headers["x-ratelimit-remaining-requests"] == "4"
        assert int(first.headers["x-ratelimit-remaining-tokens"]) < 10_000
        for response in (
            client.get("/v1/models"),
            client.post("/v1/completions", json={"prompt": 7}),
            client.post("/v1/completions", json=body(model="nothing")),
            client.get("/nowhere"),
        ):
            assert response.headers["x-ratelimit-limit-requests"] == "5"
            assert response.headers["x-ratelimit-remaining-requests"] == "4"
            assert response.headers["x-ratelimit-limit-tokens"] == "10000"
        with client.stream("POST", "/v1/completions", json=body(stream=True)) as stream:
            assert stream.headers["x-ratelimit-remaining-requests"] == "3"
            stream.read()
    with server.client() as client:
        assert not any(name.startswith("x-ratelimit") for name in client.get("/v1/models").headers)


def test_the_official_client_sees_a_rate_limit_and_an_empty_budget(tmp_path: Path, smollm2_gguf: Path) -> None:
    config = make_config(smollm2_gguf, 1)
    config["auth"]["api_keys"][-1] |= {"requests_per_minute": 1}
    with running(tmp_path, config) as server:
        for name, code in (("every", "rate_limit_exceeded"), ("day", "insufficient_quota")):
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=secret(name), max_retries=0)
            client.completions.create(model=MODEL, prompt="Once", max_tokens=1)
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(model=MODEL, prompt="Once", max_tokens=400 if name == "day" else 1)
            assert caught.value.code == code


def test_clients_that_leave_free_their_slots(server: Server) -> None:
    """Aborted streams do not use up the concurrency of a key."""
    name = "concurrent"

    def give_up() -> int:
        with (
            server.client(secret(name)) as client,
            client.stream("POST", "/v1/completions", json=body(200, stream=True)) as stream,
        ):
            if stream.status_code == 200:
                next(stream.iter_raw())
            return stream.status_code

    statuses: list[int] = []
    threads = [threading.Thread(target=lambda: statuses.append(give_up())) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 200 in statuses

    def all_slots_are_free() -> bool:
        with server.client(secret(name)) as client:
            return client.post("/v1/completions", json=body()).status_code == 200

    for _ in range(CONCURRENT):
        wait_until(all_slots_are_free)
