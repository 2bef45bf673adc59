"""`/metrics` across workers and engines, compared with the ledger."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.running import KEY, KEYS, RESTRICTED_KEY, Server, running
from tests.waiting import wait_until

MODEL = "SmolLM2-135M-Instruct"
LIMITED_KEY = "sk-limited-0123456789abcdef"
CHAT = "/v1/chat/completions"
COUNT = 12


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: Path) -> Iterator[Server]:
    limited = {"key": LIMITED_KEY, "name": "limited", "requests_per_minute": 1}
    config: dict[str, Any] = {
        "server": {"workers": 2},
        "auth": {"api_keys": [*KEYS, limited]},
        "models": {"default": MODEL, "available": {MODEL: {"path": str(smollm2_gguf), "max_tokens": 512}}},
    }
    with running(tmp_path_factory.mktemp("metrics"), config) as one:
        yield one


class Metrics:
    """The samples of one scrape."""

    def __init__(self, server: Server) -> None:
        with server.client() as client:
            response = client.get("/metrics").raise_for_status()
        assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        families = list(text_string_to_metric_families(response.text))
        self.samples = [sample for family in families for sample in family.samples]

    def sum(self, name: str, **labels: str) -> float:
        name = name if ":" in name else f"llm_api_server_{name}"
        return sum(s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items())


def chat(server: Server, key: str, **more: Any) -> httpx.Response:
    """Send a chat on a connection of its own, which any worker may accept."""
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6, **more}
    with server.client(key) as client:
        return client.post(CHAT, json=body)


class Growth:
    """Differences since its creation."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._before = Metrics(server)

    def sum(self, name: str, **labels: str) -> float:
        return Metrics(self._server).sum(name, **labels) - self._before.sum(name, **labels)


def completion_tokens(server: Server, key: str) -> int:
    """Return the completion tokens of a key from the ledger."""
    with server.client() as client:
        rows = client.get("/admin/api/usage", params={"group_by": "key"}).json()["data"]
    return sum(row["completion_tokens"] for row in rows if row["key_name"] == key)


@pytest.mark.story
def test_metrics_sum_all_workers(server: Server) -> None:
    grown, ledger = Growth(server), completion_tokens(server, "all")
    usages = [chat(server, KEY).json()["usage"] for _ in range(COUNT)]
    assert {chat(server, KEY, stream=True).status_code for _ in range(COUNT)} == {200}
    assert [chat(server, LIMITED_KEY).status_code for _ in range(3)] == [200, 429, 429]
    assert chat(server, "sk-unknown").status_code == 401
    with server.client(RESTRICTED_KEY) as client:
        assert client.post("/v1/embeddings", json={"input": "x"}).status_code == 403
        assert client.get("/metrics").status_code == 403
    wait_until(lambda: grown.sum("requests_total", endpoint=CHAT) == 2 * COUNT + 4)
    wait_until(lambda: grown.sum("requests_total", key="restricted", status="403") == 2)
    assert grown.sum("requests_total", key="all", model=MODEL, status="200") == 2 * COUNT
    assert grown.sum("requests_total", key="", status="401") == 1
    assert grown.sum("requests_total", key="limited", status="200") == 1
    assert grown.sum("requests_total", key="limited", status="429") == 2
    assert grown.sum("errors_total", code="rate_limit_exceeded", endpoint=CHAT) == 2
    assert grown.sum("limit_hits_total", key="limited", limit="requests_per_minute") == 2
    assert grown.sum("tokens_total", kind="prompt", key="all") == 2 * COUNT * usages[0]["prompt_tokens"]
    added = completion_tokens(server, "all") - ledger
    assert (
        grown.sum("tokens_total", kind="completion", key="all") == added >= sum(u["completion_tokens"] for u in usages)
    )
    assert grown.sum("time_to_first_token_seconds_count", model=MODEL) == COUNT
    assert grown.sum("inter_token_seconds_count", model=MODEL) == COUNT
    assert grown.sum("queue_seconds_count", model=MODEL) == 2 * COUNT + 1
    assert grown.sum("request_seconds_count", endpoint=CHAT) == 2 * COUNT + 1


def test_metrics_cover_models_devices_and_processes(server: Server) -> None:
    assert chat(server, KEY).status_code == 200
    found = Metrics(server)
    assert found.sum("model_state", model=MODEL, state="ready") == 1
    assert found.sum("model_loads_total", model=MODEL, result="ok") >= 1
    assert found.sum("model_load_seconds_count", model=MODEL) >= 1
    assert found.sum("model_load_phase_seconds_count", model=MODEL) >= 2
    assert found.sum("model_memory_bytes", model=MODEL) > 50e6
    assert found.sum("workers") == 2
    assert found.sum("device_memory_bytes", kind="total") > 1e9
    for process in ("manager", "workers"):
        assert found.sum("process_memory_bytes", process=process) > 20e6
        assert found.sum("process_open_fds", process=process) > 5
        assert found.sum("process_cpu_seconds_total", process=process) > 0
    assert found.sum("store_up") == 1
    assert found.sum("build_info") == 1


def test_metrics_of_engines_are_labelled_with_their_models(server: Server) -> None:
    assert chat(server, KEY).status_code == 200
    assert Metrics(server).sum("llamacpp:tokens_predicted_total", model=MODEL) > 0


def test_unloads_and_failures_are_counted(server: Server) -> None:
    grown = Growth(server)
    with server.client() as client:
        for what in ("load", "unload", "load"):
            assert client.post(f"/admin/api/models/{MODEL}/{what}").status_code == 200
    (engine,) = server.engines()
    engine.kill()
    wait_until(lambda: grown.sum("model_unloads_total", reason="failed") == 1)
    assert grown.sum("model_unloads_total", reason="ordered") == 1


def test_client_that_leaves_is_counted_with_its_tokens(server: Server) -> None:
    grown = Growth(server)
    body = {"prompt": "Once", "max_tokens": 400, "stream": True, "ignore_eos": True}
    with server.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        assert [next(lines) for _ in range(9)]
    wait_until(lambda: grown.sum("errors_total", code="client_closed_request") == 1)
    assert grown.sum("aborted_tokens_total", model=MODEL) > 0
