"""The ledger against the engine's own count, over many requests of which a third are aborted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import mixed_load
from tests.running import TLS, Server, running
from tests.waiting import wait_until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]

MODEL = "SmolLM2-135M-Instruct"


def total(server: Server) -> dict[str, Any]:
    with server.client() as client:
        return dict(client.get("/admin/api/usage").raise_for_status().json()["total"] or {"requests": 0})


def open_rows(server: Server) -> list[str]:
    """Return the ids of the latest requests that are not settled."""
    with server.client() as client:
        rows = client.get("/admin/api/requests", params={"limit": 100}).raise_for_status().json()["data"]
    return [row["request_id"] for row in rows if row["ended_at"] is None]


def metrics(server: Server) -> dict[str, float]:
    """Return the engine's own metrics by name, summed over labels."""
    (socket,) = (server.run_dir / "engines").glob("*.sock")
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket), verify=TLS), base_url="http://engine") as client:
        text = client.get("/metrics").raise_for_status().text
    found: dict[str, float] = {}
    for name, value in re.findall(r"^(\w+:\w+)(?:\{.*\})? ([\d.e+]+)$", text, re.MULTILINE):
        found[name] = found.get(name, 0) + float(value)
    return found


async def compare(server: Server, metric: str, requests: int, most_tokens: int) -> None:
    wait_until(lambda: server.models()[MODEL]["state"] == "ready", timeout=200)
    before = metrics(server)[metric]
    left = await mixed_load.run(server, requests, seed=20261122, most_tokens=most_tokens)
    assert left > requests / 10
    # A request aborted before its admission has no row.
    wait_until(lambda: requests - left <= total(server)["requests"] <= requests)
    wait_until(lambda: not open_rows(server))
    ours, theirs = total(server)["completion_tokens"], metrics(server)[metric] - before
    print(f"{left} of {requests} left; completion tokens: ledger {ours}, engine {theirs:.0f}")
    assert total(server)["aborted"] >= left / 2
    assert ours == pytest.approx(theirs, rel=0.01)


@pytest.mark.vllm
async def test_ledger_and_vllm_count_the_same_tokens(tmp_path: Path, smollm2_folder: Path) -> None:
    available = {MODEL: {"path": str(smollm2_folder), "max_tokens": 512}}
    config = {"server": {"workers": 2}, "models": {"default": MODEL, "preload": [MODEL], "available": available}}
    with running(tmp_path, config) as server:
        await compare(server, "vllm:generation_tokens_total", 500, 20)


async def test_ledger_and_llama_cpp_count_the_same_tokens(tmp_path: Path, smollm2_gguf: Path) -> None:
    available = {MODEL: {"path": str(smollm2_gguf), "max_tokens": 512}}
    config = {
        "server": {"workers": 2},
        "models": {"default": MODEL, "preload": [MODEL], "available": available},
        "inference": {"max_batch_size": 8},
    }
    with running(tmp_path, config) as server:
        await compare(server, "llamacpp:tokens_predicted_total", 250, 40)


def rows(server: Server) -> list[dict[str, Any]]:
    with server.client() as client:
        found: list[dict[str, Any]] = client.get("/admin/api/requests").raise_for_status().json()["data"]
        return [row for row in found if row["ended_at"] is not None]


def test_prompts_are_recorded_if_configured_and_a_timeout_settles(tmp_path: Path, smollm2_gguf: Path) -> None:
    available = {MODEL: {"path": str(smollm2_gguf), "max_tokens": 8192}}
    config = {
        "server": {"timeout": 3},
        "models": {"default": MODEL, "preload": [MODEL], "available": available},
        "storage": {"record_prompts": True},
    }
    with running(tmp_path, config) as server, server.client() as client:
        wait_until(lambda: server.models()[MODEL]["state"] == "ready")
        messages = [{"role": "user", "content": "Say hello."}]
        body = {"messages": messages, "max_tokens": 2, "temperature": 0}
        client.post("/v1/chat/completions", json=body).raise_for_status()
        wait_until(lambda: len(rows(server)) == 1)
        assert json.loads(rows(server)[0]["prompt"]) == {"messages": messages}
        for stream in (False, True):
            endless = {"prompt": "Once", "max_tokens": 8000, "ignore_eos": True, "stream": stream}
            response = client.post("/v1/completions", json=endless)
            assert response.status_code == (200 if stream else 504)
            assert '"code":"timeout"' in response.text
        wait_until(lambda: len(rows(server)) == 3)
        plain, streamed = sorted(rows(server)[:2], key=lambda row: row["stream"])
        assert (plain["status"], plain["error"]) == (504, "timeout")
        assert (streamed["status"], streamed["error"]) == (200, "timeout")
        for row in (plain, streamed):
            assert row["completion_tokens"] > 10
            assert row["duration"] >= 3
            assert 0 < row["queued"] <= row["first_token"] < row["duration"]
