"""`bench`: its requests and its figures, against a server that responds as the test wants."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from typer.testing import CliRunner

from llm_api_server.cli.client import bench
from llm_api_server.cli.client.api_client import TokenUsage
from llm_api_server.cli.client.load_run import LoadResult, LoadRun, Sample
from llm_api_server.cli.main import app
from tests.tiny_api import TinyApi, words

MODELS = [{"id": "m"}]


def run(api: TinyApi, *more: str) -> Any:
    return CliRunner().invoke(app, ["bench", "m", "--url", api.url, *more])


def test_every_request_except_the_warm_up_is_counted() -> None:
    with TinyApi(lambda _: words("a", "b", "c", completion_tokens=5), MODELS) as api:
        result = run(
            api, "--requests", "6", "--concurrency", "3", "--prompt-tokens", "14", "--max-tokens", "9", "--json"
        )
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert len(api.requests) == 7
    prompts = [body["messages"][0]["content"] for body in api.requests]
    assert len(set(prompts)) == 7, "no prefix cache helps"
    # The server counted 7 tokens instead of 14, so the prompts get twice as many words.
    assert [len(prompt.split(".")[0].split()) for prompt in prompts] == [14, *[28] * 6]
    assert {body["max_tokens"] for body in api.requests} == {9}
    assert all(body["stream"] and body["stream_options"] == {"include_usage": True} for body in api.requests)
    assert (found["requests_ok"], found["requests_failed"], found["concurrency"]) == (6, 0, 3)
    assert (found["prompt_tokens_mean"], found["completion_tokens_mean"]) == (7, 5)
    assert found["output_tokens_per_second"] == pytest.approx(5 * found["requests_per_second"])
    assert list(found["ttft_seconds"]) == ["p50", "p95", "p99"]
    assert list(found["inter_token_latency_seconds"]) == ["p50", "p95"]


def test_concurrency_is_reached_and_not_exceeded() -> None:
    together, lock, now, most = threading.Barrier(3, timeout=60), threading.Lock(), 0, 0

    def answer(_: dict[str, Any]) -> list[str]:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        if len(api.requests) > 1:  # all but the warm-up
            together.wait()
        with lock:
            now -= 1
        return words("a")

    with TinyApi(answer, MODELS) as api:
        assert run(api, "--requests", "6", "--concurrency", "3").exit_code == 0
    assert most == 3


def test_failures_are_counted_by_reason_and_the_exit_code_is_1() -> None:
    def answer(_: dict[str, Any]) -> list[str] | tuple[int, str]:
        return (429, "Too many.") if len(api.requests) in {2, 3} else words("a")

    with TinyApi(answer, MODELS) as api:
        result = run(api, "--requests", "5", "--concurrency", "1")
    assert result.exit_code == 1
    assert "3 ok, 2 failed" in result.stdout
    assert "2 failed: Too many." in result.stdout


def test_a_failed_warm_up_ends_the_run() -> None:
    with TinyApi(lambda _: (503, "It cannot be loaded."), MODELS) as api:
        result = run(api)
    assert (result.exit_code, len(api.requests)) == (1, 1)
    assert "It cannot be loaded." in result.stderr


def result_of(samples: list[Sample], errors: dict[str, int]) -> LoadResult:
    return LoadResult(LoadRun("m", 4, 2, 128, 64), 1.5, 2.0, samples, errors)


def test_rates_and_percentiles_count_requests_that_succeeded() -> None:
    times = [0.01, 0.02, 0.03, 0.5]
    samples = [Sample(1.0, time, [time / 10] * 2, TokenUsage(100, 10)) for time in times]
    text = bench.as_text("http://x", result_of(samples, {}))
    assert "Prompts of 100 tokens" in text
    assert "One warm-up request (1.5 s) is not counted." in text
    assert "requests             4 ok, 0 failed, in 2.0 s" in text
    assert "requests/s           2.00" in text
    assert "output tokens/s      20.0" in text
    assert "TTFT                 p50 20.0 ms, p95 500 ms, p99 500 ms" in text
    assert "inter-token latency  p50 2.0 ms, p95 50.0 ms" in text


def test_a_run_without_success_has_no_percentiles() -> None:
    result = result_of([], {"Too many.\x1b[31m": 4})
    text = bench.as_text("http://x", result)
    assert "TTFT                 -" in text
    assert r"4 failed: Too many.\x1b[31m" in text
    found = bench.json_content("http://x", result)
    assert (found["ttft_seconds"], found["requests_per_second"]) == (None, 0)
