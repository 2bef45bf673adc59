"""Running requests as their workers report them."""

from __future__ import annotations

from llm_api_server.ipc.usage_events import (
    NO_USAGE,
    Batch,
    RequestEnded,
    RequestProgress,
    RequestStarted,
    RunningState,
    Usage,
)
from llm_api_server.manager.usage.open_requests import OpenRequests


def started(row: str, at: float) -> RequestStarted:
    return RequestStarted(row, f"req-{row}", "k", "key", "m", "/v1/completions", stream=True, at=at, prompt="a secret")


def test_open_requests_have_their_usage_and_state() -> None:
    rows = OpenRequests()
    rows.update("w1", Batch([started("a", 2.0)], live=[RunningState("a", position=3)]))
    rows.update(
        "w2", Batch([started("b", 1.0)], [RequestProgress("b", Usage(5, 7))], live=[RunningState("b", 0.1, 0.2)])
    )
    first, second = rows.open()
    assert (first.request_id, first.usage, first.queued, first.first_token) == ("req-b", Usage(5, 7), 0.1, 0.2)
    assert (second.request_id, second.usage, second.position) == ("req-a", NO_USAGE, 3)
    assert not hasattr(first, "prompt")


def test_ended_and_lost_requests_are_not_open() -> None:
    rows = OpenRequests()
    rows.update("w1", Batch([started("a", 1.0), started("b", 1.0)]))
    rows.update("w1", Batch(ended=[RequestEnded("a", 200, None, "i", NO_USAGE, 0.0, 0.1, 0.2)]))
    assert [one.request_id for one in rows.open()] == ["req-b"]
    rows.lose("w1", 5.0)
    assert rows.open() == []


def test_a_request_without_a_known_beginning_is_not_shown() -> None:
    rows = OpenRequests()
    rows.update("w1", Batch(live=[RunningState("a", 0.1)]))
    assert rows.open() == []
