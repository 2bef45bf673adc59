"""Clients that disconnect stop the generation, as the engine's own metrics show."""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.running import KEY, TLS, Server, running
from tests.waiting import wait_until

MODEL = "SmolLM2-135M-Instruct"
TRIALS = 100
#: Seconds within which the engine must have stopped.
LIMIT = 1.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: Path) -> Iterator[Server]:
    config: dict[str, Any] = {
        "server": {"workers": 2},
        "models": {
            "default": MODEL,
            "preload": [MODEL],
            "available": {MODEL: {"path": str(smollm2_gguf), "max_tokens": 4096}},
        },
    }
    with running(tmp_path_factory.mktemp("aborts"), config) as one:
        wait_until(lambda: one.models()[MODEL]["state"] == "ready")
        yield one


class Engine:
    """The engine's own metrics, from its own socket."""

    def __init__(self, server: Server) -> None:
        (path,) = (server.run_dir / "engines").glob("*.sock")
        self._client = httpx.Client(transport=httpx.HTTPTransport(uds=str(path), verify=TLS), base_url="http://engine")

    def close(self) -> None:
        self._client.close()

    def at_work(self) -> int:
        found = re.search(r"^llamacpp:requests_processing (\d+)", self._client.get("/metrics").text, re.MULTILINE)
        assert found is not None
        return int(found[1])


def ask(server: Server, path: str, body: dict[str, Any]) -> socket.socket:
    """Send a request and read nothing."""
    payload = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
    )
    client = socket.create_connection(("127.0.0.1", server.port))
    client.sendall(head.encode() + payload)
    return client


@pytest.fixture
def engine(server: Server) -> Iterator[Engine]:
    with contextlib.closing(Engine(server)) as one:
        yield one


@pytest.mark.alone
def test_engine_stops_within_a_second_of_every_disconnect(server: Server, engine: Engine, record_property: Any) -> None:
    """Streams and plain responses, chats and completions, each left at a random moment of its first half second."""
    chance = random.Random(3)
    slowest = 0.0
    for trial in range(TRIALS):
        text = f"{trial}: tell me a very long story of a king and his seven daughters"
        body: dict[str, Any] = {"max_tokens": 3000, "ignore_eos": True, "stream": trial % 2 == 0}
        path, more = (
            ("/v1/completions", {"prompt": text})
            if trial % 4 < 2
            else ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]})
        )
        client = ask(server, path, body | more)
        wait_until(lambda: engine.at_work() == 1, timeout=30)
        time.sleep(chance.random() / 2)
        assert engine.at_work() == 1
        client.close()
        left_at = time.monotonic()
        while engine.at_work():
            assert time.monotonic() - left_at < 30, "the engine goes on after the disconnect"
            time.sleep(0.01)
        slowest = max(slowest, time.monotonic() - left_at)
    record_property("slowest_seconds", slowest)
    print(f"{TRIALS} trials, the slowest {slowest:.3f} s")
    assert slowest <= LIMIT


def test_queued_request_of_a_client_that_left_never_starts(server: Server, engine: Engine) -> None:
    body = {"prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
    running_ = [ask(server, "/v1/completions", body) for _ in range(4)]
    wait_until(lambda: server.models()[MODEL]["in_flight"] == 4)
    waiting = [ask(server, "/v1/completions", body) for _ in range(8)]
    wait_until(lambda: server.models()[MODEL]["queued"] == 8)
    for client in waiting:
        client.close()
    wait_until(lambda: server.models()[MODEL]["queued"] == 0)
    assert server.models()[MODEL]["in_flight"] == 4
    for client in running_:
        client.close()
    wait_until(lambda: engine.at_work() == 0)
    wait_until(lambda: server.models()[MODEL]["in_flight"] == 0)
