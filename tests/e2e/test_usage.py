"""The ledger against the engine's own count, over many requests of which a third are given up on the way."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import mixed_load
from tests.running import Server, running, wait_until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]

MODEL = "SmolLM2-135M-Instruct"
REQUESTS = 500


def total(server: Server) -> dict[str, Any]:
    with server.client() as client:
        return dict(client.get("/admin/api/usage").raise_for_status().json()["total"] or {"requests": 0})


def open_rows(server: Server) -> list[str]:
    """Requests of the last ones that are not settled."""
    with server.client() as client:
        rows = client.get("/admin/api/requests", params={"limit": 100}).raise_for_status().json()["data"]
    return [row["request_id"] for row in rows if row["ended_at"] is None]


def metrics(server: Server) -> dict[str, float]:
    """The engine's own, by name, summed over labels."""
    (socket,) = (server.run_dir / "engines").glob("*.sock")
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://engine") as client:
        text = client.get("/metrics").raise_for_status().text
    found: dict[str, float] = {}
    for name, value in re.findall(r"^(\w+:\w+)(?:\{.*\})? ([\d.e+]+)$", text, re.MULTILINE):
        found[name] = found.get(name, 0) + float(value)
    return found


async def compare(server: Server, metric: str, most_tokens: int) -> None:
    wait_until(lambda: server.models()[MODEL]["state"] == "ready", timeout=200)
    before = metrics(server)[metric]
    left = await mixed_load.run(server, REQUESTS, seed=20261122, most_tokens=most_tokens)
    assert left > REQUESTS / 10
    # Who leaves before it was admitted has no row.
    wait_until(lambda: REQUESTS - left <= total(server)["requests"] <= REQUESTS)
    wait_until(lambda: not open_rows(server))
    ours, theirs = total(server)["completion_tokens"], metrics(server)[metric] - before
    print(f"{left} of {REQUESTS} left; completion tokens: ledger {ours}, engine {theirs:.0f}")
    assert total(server)["aborted"] >= left / 2
    assert ours == pytest.approx(theirs, rel=0.01)


@pytest.mark.vllm
async def test_the_ledger_counts_what_vllm_counts(tmp_path: Path, smollm2_folder: Path) -> None:
    available = {MODEL: {"path": str(smollm2_folder), "max_tokens": 512}}
    config = {"server": {"workers": 2}, "models": {"default": MODEL, "preload": [MODEL], "available": available}}
    with running(tmp_path, config) as server:
        await compare(server, "vllm:generation_tokens_total", 20)


async def test_the_ledger_counts_what_llama_cpp_counts(tmp_path: Path, smollm2_gguf: Path) -> None:
    available = {MODEL: {"path": str(smollm2_gguf), "max_tokens": 512}}
    config = {
        "server": {"workers": 2},
        "models": {"default": MODEL, "preload": [MODEL], "available": available},
        "inference": {"max_batch_size": 8},
    }
    with running(tmp_path, config) as server:
        await compare(server, "llamacpp:tokens_predicted_total", 32)
