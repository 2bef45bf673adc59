"""Requests in progress in the admin API, with their queue position and tokens, until they end."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.running import RESTRICTED_KEY, Server, running
from tests.waiting import wait_until

MODEL = "SmolLM2-135M-Instruct"
LIVE = "/admin/api/requests/live"


def live(server: Server) -> list[dict[str, Any]]:
    with server.client() as client:
        response = client.get(LIVE).raise_for_status().json()
    assert response["total"] == len(response["data"])
    return list(response["data"])


def states(server: Server) -> list[tuple[str, int | None]]:
    return [(one["state"], one["position"]) for one in live(server)]


def test_running_and_waiting_requests_are_listed(tmp_path: Path, smollm2_gguf: Path) -> None:
    available = {MODEL: {"path": str(smollm2_gguf), "engine": "llama_cpp", "max_tokens": 4096}}
    config: dict[str, Any] = {
        "server": {"workers": 2},
        "models": {"default": MODEL, "preload": [MODEL], "available": available},
        "inference": {"max_batch_size": 1},
    }
    body = {"model": MODEL, "prompt": "Once", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    short = {"model": MODEL, "prompt": "Once", "max_tokens": 2}
    with running(tmp_path, config) as server:
        wait_until(lambda: server.models()[MODEL]["state"] == "ready")
        assert live(server) == []
        began = time.time()
        with server.client() as first, first.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            wait_until(lambda: any(one["completion_tokens"] > 1 for one in live(server)))
            with ThreadPoolExecutor() as threads, server.client(timeout=60) as client:
                threads.submit(client.post, "/v1/completions", json=short, headers={"x-request-id": "w"})
                wait_until(lambda: states(server) == [("answering", None), ("waiting", 1)])
                one, other = live(server)
                response.close()
            assert (one["key_name"], one["model"], one["endpoint"]) == ("all", MODEL, "/v1/completions")
            assert began - 1 < one["started_at"] < one["started_at"] + one["first_token"] < time.time()
            assert 0 <= one["queued"] <= one["first_token"]
            assert (other["request_id"], other["queued"], other["completion_tokens"]) == ("w", None, 0)
            assert "prompt" not in one
        wait_until(lambda: live(server) == [])
        with server.client(RESTRICTED_KEY) as client:
            assert client.get(LIVE).status_code == 403
