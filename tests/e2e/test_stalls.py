"""Stalled engines are restarted alone; a client that does not read is no stall."""

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


def test_stalled_engine_is_restarted_and_no_request_hangs(server: Server) -> None:
    """SIGSTOP stalls the engine: its stream ends with an error, and the next engine serves the waiting request."""
    before = server.models()
    (engine,) = psutil.Process(before[MODEL]["pid"]).children()
    responses: list[httpx.Response] = []
    with server.client() as client:
        with client.stream("POST", "/v1/completions", json=body(stream=True)) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            engine.send_signal(signal.SIGSTOP)
            late = threading.Thread(
                target=lambda: responses.append(client.post("/v1/completions", json=body(max_tokens=1)))
            )
            late.start()
            rest = [line for line in lines if line.startswith("data: ")]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "engine_error"
        late.join()
    assert [response.status_code for response in responses] == [200]
    after = server.models()
    assert after[MODEL]["pid"] != before[MODEL]["pid"]
    assert after[OTHER]["pid"] == before[OTHER]["pid"]
    assert "made no progress" in server.output()


def test_client_that_does_not_read_is_no_stall(server: Server) -> None:
    """The response is blocked far longer than the stall timeout."""
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
        wait_until(lambda: no_progress_for(server) > 2 * STALL, timeout=240)
        assert server.models()[MODEL]["pid"] == before["pid"]


def no_progress_for(server: Server) -> float:
    progress_at = server.models()[MODEL]["progress_at"]
    return time.time() - progress_at if progress_at is not None else 0.0


def test_busy_engine_is_no_stall(server: Server) -> None:
    """One response takes longer than the stall timeout."""
    with server.client() as client:
        response = client.post("/v1/completions", json=body(max_tokens=1200))
    assert response.json()["usage"]["completion_tokens"] == 1200
    status = server.models()[MODEL]
    assert status["progress_at"] > status["loaded_at"]
    assert "made no progress" not in server.output()
