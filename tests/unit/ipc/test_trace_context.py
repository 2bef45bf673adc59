"""W3C's trace context, as received and as passed to the engine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_api_server.ipc.trace_context import Sampler, TraceContext, engine_lines

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
NEVER, ALWAYS = Sampler(0.0), Sampler(1.0)


def headers(value: str) -> dict[bytes, bytes]:
    return {b"traceparent": value.encode()}


@pytest.mark.parametrize(
    "value", [f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-ff", f"cc-{TRACE}-{PARENT}-01-more"]
)
def test_a_sampled_context_is_continued(value: str) -> None:
    context = NEVER.begin(headers(value))
    assert context is not None
    assert (context.trace_id, context.parent_id) == (TRACE, PARENT)
    assert len({context.span_id, context.engine_id, PARENT}) == 3


def test_an_unsampled_context_is_not_traced() -> None:
    assert ALWAYS.begin(headers(f"00-{TRACE}-{PARENT}-00")) is None
    assert ALWAYS.begin(headers(f"00-{TRACE}-{PARENT}-02")) is None


@pytest.mark.parametrize(
    "value",
    [
        "",
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE}-{PARENT}-01-more",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[1:]}-{PARENT}-01",
    ],
)
def test_an_invalid_context_starts_a_new_trace(value: str) -> None:
    context = ALWAYS.begin(headers(value))
    assert context is not None
    assert context.trace_id != TRACE
    assert context.parent_id == ""
    assert NEVER.begin(headers(value)) is None


@given(st.binary(max_size=80))
def test_any_value_is_accepted(value: bytes) -> None:
    context = ALWAYS.begin({b"traceparent": value})
    assert context is None or len(context.trace_id) == 32


def test_the_ratio_holds() -> None:
    sampler, count = Sampler(0.25), 4000
    traced = sum(sampler.begin({}) is not None for _ in range(count))
    assert 800 < traced < 1200  # 7 standard deviations


def test_the_engine_gets_the_servers_span_as_its_parent() -> None:
    context = TraceContext(TRACE, PARENT, "a" * 16, "b" * 16)
    given = {b"traceparent": b"whatever", b"tracestate": b"vendor=1"}
    assert engine_lines(given, context) == (
        f"traceparent: 00-{TRACE}-{'b' * 16}-01\r\ntracestate: vendor=1\r\n".encode()
    )


def test_without_tracing_the_callers_context_passes_through() -> None:
    given = headers(f"00-{TRACE}-{PARENT}-01")
    assert engine_lines(given, None) == f"traceparent: 00-{TRACE}-{PARENT}-01\r\n".encode()
    assert engine_lines({b"tracestate": b"vendor=1"}, None) == b""
