"""An engine that hangs is found and restarted alone; who merely does not read is left alone."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.running import KEY, Server, running
from tests.waiting import wait_until

MODEL, OTHER = "SmolLM2-135M-Instruct", "other"
STALL = 3


@pytest.fixture
def server(tmp_path: Path, smollm2_gguf: Path) -> Iterator[Server]:
    config: dict[str, Any] = {
        "models": {
            "default": MODEL,
            "preload": [MODEL, OTHER],
            "max_loaded": 2,
            "available": {name: {"path": str(smollm2_gguf), "max_tokens": 8192} for name in (MODEL, OTHER)},
        },
        "limits": {"stall_timeout": STALL},
    }
    with running(tmp_path, config) as one:
        wait_until(lambda: all(model["state"] == "ready" for model in one.models().values()))
        yield one


def body(**more: Any) -> dict[str, Any]:
    return {"prompt": "Once upon a time", "max_tokens": 4000, "ignore_eos": True, **more}


def ask(client: httpx.Client, **more: Any) -> httpx.Response:
    return client.post("/v1/completions", json=body(**more))


def test_an_engine_that_hangs_is_restarted_and_nobody_waits_for_ever(server: Server) -> None:
    """Stopped in its tracks: its stream ends with an error, a request that had not begun is answered by the next."""
    before = server.models()
    (engine,) = psutil.Process(before[MODEL]["pid"]).children()
    answers: list[httpx.Response] = []
    with server.client() as client:
        with client.stream("POST", "/v1/completions", json=body(stream=True)) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            engine.send_signal(signal.SIGSTOP)
            late = threading.Thread(
                target=lambda: answers.append(client.post("/v1/completions", json=body(max_tokens=1)))
            )
            late.start()
            rest = [line for line in lines if line.startswith("data: ")]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "engine_error"
        late.join()
    assert [answer.status_code for answer in answers] == [200]
    after = server.models()
    assert after[MODEL]["pid"] != before[MODEL]["pid"]
    assert after[OTHER]["pid"] == before[OTHER]["pid"]
    assert "made no progress" in server.output()


def test_a_client_that_does_not_read_is_no_reason(server: Server) -> None:
    """Its answer is stuck far longer than an engine may be."""
    before = server.models()[MODEL]
    request = json.dumps(body(stream=True, logprobs=20)).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(request)}\r\n\r\n"
    )
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.sendall(head.encode() + request)
        wait_until(lambda: server.models()[MODEL]["in_flight"] == 1)
        seen = []
        for _ in range(6):
            time.sleep(STALL / 2)
            seen.append(server.models()[MODEL])
    assert {one["pid"] for one in seen} == {before["pid"]}
    assert seen[0]["progress_at"] is not None


def test_a_busy_engine_makes_progress(server: Server) -> None:
    """Longer at one answer than it may stand still."""
    with server.client() as client:
        answer = client.post("/v1/completions", json=body(max_tokens=1200))
    assert answer.json()["usage"]["completion_tokens"] == 1200
    status = server.models()[MODEL]
    assert status["progress_at"] > status["loaded_at"]
    assert "made no progress" not in server.output()
