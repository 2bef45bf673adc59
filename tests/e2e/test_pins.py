"""Pinned models are not evicted, even after the manager was killed, until they are unpinned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from tests.running import running
from tests.waiting import wait_until

PINNED, OTHER = "pinned", "other"


def complete(client: httpx.Client, model: str) -> httpx.Response:
    return client.post("/v1/completions", json={"model": model, "prompt": "Hi", "max_tokens": 2})


def test_pinned_model_stays_until_it_is_unpinned(tmp_path: Path, smollm2_gguf: Path) -> None:
    available = {name: {"path": str(smollm2_gguf), "engine": "llama_cpp"} for name in (PINNED, OTHER)}
    config: dict[str, Any] = {"models": {"max_loaded": 1, "min_loaded_time": 0, "available": available}}
    with running(tmp_path, config) as server, server.client() as client:
        too_early = client.post(f"/admin/api/models/{PINNED}/pin")
        assert (too_early.status_code, too_early.json()["error"]["code"]) == (409, "model_not_loaded")
        assert complete(client, PINNED).status_code == 200
        assert client.post(f"/admin/api/models/{PINNED}/pin").json()["pinned"] is True
        assert f"{PINNED}  ready, pinned" in server.command("models", "list").stdout

        def refusal() -> str:
            response = complete(client, OTHER)
            assert response.status_code == 503, response.text
            return str(response.json()["error"]["message"])

        assert f"pinned models ({PINNED}) use up models.max_loaded (1): unpin or unload it" in refusal()
        explained = client.get(f"/admin/api/models/{OTHER}/explain").json()
        assert (explained["verdict"], explained["evict"]) == ("not_now", [])

        (engine,) = server.engines()
        server.manager().kill()
        wait_until(server.has_manager)
        wait_until(lambda: server.models()[PINNED]["state"] == "ready")
        assert [process.pid for process in server.engines()] == [engine.pid]
        assert client.get(f"/admin/api/models/{PINNED}").json()["pinned"] is True
        assert f"pinned models ({PINNED}) use up" in refusal()

        assert server.command("models", "unpin", PINNED).stdout == f"{PINNED}: not pinned\n"
        wait_until(lambda: complete(client, OTHER).status_code == 200)
        assert server.models()[PINNED]["state"] == "stopped"
