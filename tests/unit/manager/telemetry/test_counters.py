"""Events are counted once, by labels with bounded values."""

from __future__ import annotations

from typing import Any

from llm_api_server.ipc.usage_events import (
    CLIENT_CLOSED,
    Batch,
    FinishedRequest,
    RequestEnded,
    RequestStarted,
    RequestsWithoutRow,
    Usage,
    finish,
)
from llm_api_server.manager.telemetry import metrics
from llm_api_server.manager.telemetry.counters import Buckets, Counters
from llm_api_server.manager.telemetry.exposition import text_of

CHAT = "/v1/chat/completions"
USAGE = Usage(prompt_tokens=10, completion_tokens=5, cached_tokens=4, reasoning_tokens=2)


def finished(**changed: Any) -> FinishedRequest:
    values: dict[str, Any] = {
        "row": "r", "request_id": "id", "key_id": "k", "key_name": "team", "model": "m", "endpoint": CHAT,
        "stream": True, "at": 0.0, "prompt": None, "status": 200, "error": None, "instance": "i", "usage": USAGE,
        "queued": 0.2, "first_token": 1.0, "duration": 3.0,
    }  # fmt: skip
    return FinishedRequest(**{**values, **changed})


def started() -> RequestStarted:
    return RequestStarted("r", "id", "k", "team", "m", CHAT, True, 0.0)


def ended(**changed: Any) -> RequestEnded:
    values: dict[str, Any] = {
        "row": "r", "status": 200, "error": None, "instance": "i", "usage": USAGE, "queued": 0.2,
        "first_token": 1.0, "duration": 3.0,
    }  # fmt: skip
    return RequestEnded(**{**values, **changed})


def histograms(counters: Counters) -> dict[tuple[str, ...], tuple[int, float]]:
    """Return the number of values and their sum by metric and labels."""
    return {(metric.name, *labels): (sum(b.counts), b.total) for metric, labels, b in counters.times()}


def test_a_request_counts_with_its_tokens_and_times() -> None:
    counters = Counters()
    counters.report("w", 1, Batch(finished=[finished()]), [])
    counts = counters.counts()
    assert counts[metrics.REQUESTS] == {(CHAT, "m", "team", "200"): 1}
    assert counts[metrics.TOKENS] == {
        ("m", "team", "prompt"): 10,
        ("m", "team", "completion"): 5,
        ("m", "team", "cached"): 4,
        ("m", "team", "reasoning"): 2,
    }
    assert metrics.ERRORS not in counts
    assert histograms(counters) == {
        (metrics.REQUEST_SECONDS.name, CHAT, "m"): (1, 3.0),
        (metrics.QUEUE_SECONDS.name, "m"): (1, 0.2),
        (metrics.FIRST_TOKEN_SECONDS.name, "m"): (1, 1.0),
        (metrics.INTER_TOKEN_SECONDS.name, "m"): (1, 0.5),
    }


def test_a_response_without_stream_has_no_first_token() -> None:
    counters = Counters()
    counters.report("w", 1, Batch(finished=[finished(stream=False)]), [])
    assert histograms(counters)[metrics.FIRST_TOKEN_SECONDS.name, "m"] == (0, 0.0)


def test_a_repeated_report_counts_nothing() -> None:
    counters = Counters()
    for number in (1, 1, 2, 1):
        counters.report("w", number, Batch(finished=[finished()]), [])
    counters.report("another", 1, Batch(finished=[finished()]), [])
    assert counters.counts()[metrics.REQUESTS] == {(CHAT, "m", "team", "200"): 3}


def test_long_requests_count_when_they_end() -> None:
    counters = Counters()
    counters.report("w", 1, Batch(started=[started()]), [])
    assert counters.counts() == {}
    counters.report("w", 2, Batch(), [finish(started(), ended()), finish(None, ended())])
    assert counters.counts()[metrics.REQUESTS] == {(CHAT, "m", "team", "200"): 1, ("", "", "", "200"): 1}


def test_refused_requests_count_with_their_reason() -> None:
    counters = Counters()
    counters.report("w", 1, Batch(others=[RequestsWithoutRow(CHAT, "m", "team", 429, "rate_limit_exceeded", 3)]), [])
    counters.limit_hit("team", "max_concurrent")
    counts = counters.counts()
    assert counts[metrics.REQUESTS] == {(CHAT, "m", "team", "429"): 3}
    assert counts[metrics.ERRORS] == {(CHAT, "m", "rate_limit_exceeded"): 3}
    assert counts[metrics.LIMIT_HITS] == {("team", "max_concurrent"): 1}


def test_tokens_of_aborted_requests_are_counted() -> None:
    counters = Counters()
    counters.report("w", 1, Batch(finished=[finished(error=CLIENT_CLOSED), finished()]), [])
    assert counters.counts()[metrics.ABORTED_TOKENS] == {("m",): 5}


def test_keys_beyond_the_limit_share_a_label() -> None:
    counters = Counters()
    batch = Batch(
        others=[RequestsWithoutRow("other", "", f"key-{n}", 200, "", 1) for n in range(metrics.MAX_KEYS + 50)]
    )
    counters.report("w", 1, batch, [])
    requests = counters.counts()[metrics.REQUESTS]
    assert len(requests) == metrics.MAX_KEYS + 1
    assert requests["other", "", metrics.OTHER_KEYS, "200"] == 50


def test_loads_count_with_their_phases() -> None:
    counters = Counters()
    counters.loaded("m", 3.0, {"weights": 2.0, "warm_up": 1.0})
    counters.load_over("m", "failed")
    counters.unloaded("m", "evicted")
    counts = counters.counts()
    assert counts[metrics.LOADS] == {("m", "ok"): 1, ("m", "failed"): 1}
    assert counts[metrics.UNLOADS] == {("m", "evicted"): 1}
    assert histograms(counters) == {
        (metrics.LOAD_SECONDS.name, "m"): (1, 3.0),
        (metrics.PHASE_SECONDS.name, "m", "weights"): (1, 2.0),
        (metrics.PHASE_SECONDS.name, "m", "warm_up"): (1, 1.0),
    }


def test_a_bound_belongs_to_its_bucket() -> None:
    buckets = Buckets((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        buckets.observe([value])
    assert buckets.cumulative() == [("1.0", 2.0), ("2.0", 3.0), ("+Inf", 4.0)]
    assert buckets.total == 12.0


def test_without_families_the_text_is_empty() -> None:
    assert text_of([]) == ""
