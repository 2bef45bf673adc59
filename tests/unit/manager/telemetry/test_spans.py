"""The spans of one request."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan

from llm_api_server.ipc.trace_context import TraceContext, TracedRequest
from llm_api_server.ipc.usage_events import CLIENT_CLOSED, FinishedRequest, Usage
from llm_api_server.manager.instances.load_phases import LoadTrace
from llm_api_server.manager.telemetry.spans import spans_of

CONTEXT = TraceContext("1" * 32, "2" * 16, "3" * 16, "4" * 16)
WHOLE = FinishedRequest(
    "row-1", "req-1", "id", "ann", "m", "/v1/chat/completions", True, 1000.0, None, 200, None, "i1", Usage(7, 5), 4.0,
    4.5, 6.0,
)  # fmt: skip
LOAD = LoadTrace("i1", "m", 999.0, 1003.9, {"process": 1.0, "weights": 3.9})


def spans(loads: tuple[LoadTrace, ...] = (), **changes: Any) -> dict[str, ReadableSpan]:
    found = spans_of(TracedRequest(CONTEXT, replace(WHOLE, **changes)), loads, Resource.create({}))
    return {span.name: span for span in found}


def span_id(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.span_id:016x}"


def parent_id(span: ReadableSpan) -> str:
    assert span.parent is not None
    return f"{span.parent.span_id:016x}"


def times(span: ReadableSpan) -> tuple[float, float]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time / 1e9, span.end_time / 1e9


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_a_request_is_a_tree() -> None:
    found = spans()
    server, queue, engine = found["POST /v1/chat/completions"], found["queue"], found["chat m"]
    assert (parent_id(server), span_id(server), times(server)) == ("2" * 16, "3" * 16, (1000.0, 1006.0))
    assert server.parent is not None
    assert server.parent.is_remote
    assert (parent_id(queue), times(queue)) == (span_id(server), (1000.0, 1004.0))
    assert (parent_id(engine), span_id(engine), times(engine)) == (span_id(server), "4" * 16, (1004.0, 1006.0))
    assert [(event.name, event.timestamp / 1e9) for event in engine.events] == [("first token", 1004.5)]
    assert attributes(engine)["gen_ai.usage.output_tokens"] == 5
    assert attributes(server)["llm_api_server.key"] == "ann"


def test_the_load_that_a_request_waited_for_is_below_its_queue() -> None:
    found = spans((replace(LOAD, instance="i2"), LOAD, replace(LOAD, model="other", instance="i3")))
    load = found["load m"]
    assert (parent_id(load), times(load)) == (span_id(found["queue"]), (999.0, 1003.9))
    assert [(parent_id(found[name]), times(found[name])) for name in ("process", "weights")] == [
        (span_id(load), (999.0, 1000.0)),
        (span_id(load), (1000.0, 1003.9)),
    ]


def test_a_load_before_the_request_is_not_part_of_it() -> None:
    assert "load m" not in spans((replace(LOAD, started_at=990.0, ended_at=995.0),))


def test_a_failed_load_is_found_by_its_model() -> None:
    failed = replace(LOAD, error="failed")
    found = spans((failed,), instance=None, queued=None, first_token=None, status=503, error="model_load_failed")
    assert found["load m"].status.description == "failed"
    assert found["POST /v1/chat/completions"].status.description == "model_load_failed"
    assert "chat m" not in found


def test_a_refused_request_is_one_span_without_a_failure() -> None:
    found = spans(row="", status=429, error="rate_limit_exceeded", instance=None, queued=None, first_token=None)
    (server,) = found.values()
    assert server.status.is_unset
    assert attributes(server)["error.type"] == "rate_limit_exceeded"


def test_a_client_that_left_is_no_failure() -> None:
    assert {span.status.description for span in spans(error=CLIENT_CLOSED).values()} == {None}
    assert {span.status.description for span in spans(error="engine_error").values()} == {None, "engine_error"}
