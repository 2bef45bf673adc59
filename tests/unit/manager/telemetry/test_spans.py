"""The spans of a request, and the collector that gets them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from msgspec.structs import replace

from llm_api_server.config.models import TracingConfig
from llm_api_server.ipc.trace_context import TraceContext, Traced
from llm_api_server.ipc.usage_events import CLIENT_CLOSED, Usage, Whole
from llm_api_server.manager.instances.load_phases import LoadTrace
from llm_api_server.manager.telemetry.spans import Span, Tracing, spans_of
from tests.collector import collecting
from tests.running import free_port

pytestmark = pytest.mark.anyio

CONTEXT = TraceContext("1" * 32, "2" * 16, "3" * 16, "4" * 16)
WHOLE = Whole(
    "row-1", "req-1", "id", "ann", "m", "/v1/chat/completions", True, 1000.0, None, 200, None, "i1", Usage(7, 5), 4.0,
    4.5, 6.0,
)  # fmt: skip
LOAD = LoadTrace("i1", "m", 999.0, 1003.9, {"process": 1.0, "weights": 3.9})


def spans(loads: tuple[LoadTrace, ...] = (), **changes: Any) -> dict[str, Span]:
    return {span.name: span for span in spans_of(Traced(CONTEXT, replace(WHOLE, **changes)), loads)}


def test_a_request_is_a_tree() -> None:
    found = spans()
    server, queue, engine = found["POST /v1/chat/completions"], found["queue"], found["chat m"]
    assert (server.parent_id, server.span_id, server.start, server.end) == ("2" * 16, "3" * 16, 1000.0, 1006.0)
    assert (queue.parent_id, queue.start, queue.end) == (server.span_id, 1000.0, 1004.0)
    assert (engine.parent_id, engine.span_id, engine.start, engine.end) == (server.span_id, "4" * 16, 1004.0, 1006.0)
    assert engine.events == (("first token", 1004.5),)
    assert engine.attributes["gen_ai.usage.output_tokens"] == 5
    assert server.attributes["llm_api_server.key"] == "ann"


def test_the_load_it_waited_for_is_below_its_queue() -> None:
    found = spans((replace(LOAD, instance="i2"), LOAD, replace(LOAD, model="other", instance="i3")))
    load = found["load m"]
    assert (load.parent_id, load.start, load.end) == (found["queue"].span_id, 999.0, 1003.9)
    assert [(found[name].parent_id, found[name].start, found[name].end) for name in ("process", "weights")] == [
        (load.span_id, 999.0, 1000.0),
        (load.span_id, 1000.0, 1003.9),
    ]


def test_a_load_before_it_came_is_not_its_own() -> None:
    assert "load m" not in spans((replace(LOAD, started_at=990.0, ended_at=995.0),))


def test_a_load_that_failed_is_found_by_its_model() -> None:
    failed = replace(LOAD, error="failed")
    found = spans((failed,), instance=None, queued=None, first_token=None, status=503, error="model_load_failed")
    assert found["load m"].error == "failed"
    assert found["POST /v1/chat/completions"].error == "model_load_failed"
    assert "chat m" not in found


def test_a_refused_request_is_one_span_without_a_failure() -> None:
    found = spans(row="", status=429, error="rate_limit_exceeded", instance=None, queued=None, first_token=None)
    (server,) = found.values()
    assert server.error is None
    assert server.attributes["error.type"] == "rate_limit_exceeded"


def test_a_client_that_leaves_is_no_failure() -> None:
    assert {span.error for span in spans(error=CLIENT_CLOSED).values()} == {None}
    assert {span.error for span in spans(error="engine_error").values()} == {None, "engine_error"}


async def test_all_is_sent_before_the_manager_ends() -> None:
    with collecting() as collector:
        tracing = Tracing()
        tracing.configure(
            TracingConfig(endpoint=collector.url, headers={"authorization": "Bearer x"}, service_name="s")
        )
        tracing.loaded(LOAD)
        tracing.over([Traced(CONTEXT, WHOLE)])
        await tracing.close()
        found = collector.trace(CONTEXT.trace_id)
    assert set(found) == {"POST /v1/chat/completions", "queue", "load m", "process", "weights", "chat m"}
    assert found["chat m"].kind == "CLIENT"
    assert found["POST /v1/chat/completions"].kind == "SERVER"
    assert {span.service for span in found.values()} == {"s"}
    assert (collector.paths, collector.headers["authorization"]) == ({"/v1/traces"}, "Bearer x")


async def test_a_collector_that_is_away_holds_nobody_up() -> None:
    tracing = Tracing()
    tracing.configure(TracingConfig(endpoint=f"http://127.0.0.1:{free_port()}"))
    tracing.over([Traced(CONTEXT, WHOLE)] * 10_000)
    async with asyncio.timeout(30):
        await tracing.close()


async def test_another_collector_gets_what_comes_from_now_on() -> None:
    with collecting() as first, collecting() as second:
        tracing = Tracing()
        tracing.configure(TracingConfig(endpoint=first.url))
        tracing.over([Traced(CONTEXT, WHOLE)])
        tracing.configure(TracingConfig(endpoint=f"{second.url}/v1/traces"))
        tracing.over([Traced(replace(CONTEXT, trace_id="5" * 32), WHOLE)])
        await tracing.close()
        end = time.monotonic() + 30
        while not first.spans and time.monotonic() < end:
            await asyncio.sleep(0.01)
    assert {span.trace_id for span in first.spans} == {CONTEXT.trace_id}
    assert {span.trace_id for span in second.spans} == {"5" * 32}
