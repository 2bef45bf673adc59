"""Spans on their way to a collector."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from llm_api_server.config.models import TracingConfig
from llm_api_server.ipc.trace_context import TraceContext, TracedRequest
from llm_api_server.ipc.usage_events import FinishedRequest, Usage
from llm_api_server.manager.instances.load_phases import LoadTrace
from llm_api_server.manager.telemetry.tracing import Tracing
from tests.collector import collecting
from tests.running import free_port
from tests.waiting import until

pytestmark = pytest.mark.anyio

CONTEXT = TraceContext("1" * 32, "2" * 16, "3" * 16, "4" * 16)
WHOLE = FinishedRequest(
    "row-1", "req-1", "id", "ann", "m", "/v1/chat/completions", True, 1000.0, None, 200, None, "i1", Usage(7, 5), 4.0,
    4.5, 6.0,
)  # fmt: skip
LOAD = LoadTrace("i1", "m", 999.0, 1003.9, {"process": 1.0, "weights": 3.9})


async def test_all_spans_are_sent_before_the_manager_stops() -> None:
    with collecting() as collector:
        tracing = Tracing()
        tracing.configure(
            TracingConfig(endpoint=collector.url, headers={"authorization": "Bearer x"}, service_name="s")
        )
        tracing.loaded(LOAD)
        tracing.finished([TracedRequest(CONTEXT, WHOLE)])
        await tracing.close()
        found = collector.trace(CONTEXT.trace_id)
    assert set(found) == {"POST /v1/chat/completions", "queue", "load m", "process", "weights", "chat m"}
    assert found["chat m"].kind == "CLIENT"
    assert found["POST /v1/chat/completions"].kind == "SERVER"
    assert {span.service for span in found.values()} == {"s"}
    assert (collector.paths, collector.headers["authorization"]) == ({"/v1/traces"}, "Bearer x")


async def test_closing_does_not_wait_for_an_absent_collector() -> None:
    tracing = Tracing()
    tracing.configure(TracingConfig(endpoint=f"http://127.0.0.1:{free_port()}"))
    tracing.finished([TracedRequest(CONTEXT, WHOLE)] * 10_000)
    async with asyncio.timeout(30):
        await tracing.close()


async def test_a_new_collector_gets_the_requests_after_the_change() -> None:
    with collecting() as first, collecting() as second:
        tracing = Tracing()
        tracing.configure(TracingConfig(endpoint=first.url))
        tracing.finished([TracedRequest(CONTEXT, WHOLE)])
        tracing.configure(TracingConfig(endpoint=f"{second.url}/v1/traces"))
        tracing.finished([TracedRequest(replace(CONTEXT, trace_id="5" * 32), WHOLE)])
        await tracing.close()
        await until(lambda: first.spans)
    assert {span.trace_id for span in first.spans} == {CONTEXT.trace_id}
    assert {span.trace_id for span in second.spans} == {"5" * 32}
