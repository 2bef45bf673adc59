"""Sends spans to a collector by OTLP over HTTP: OpenTelemetry's own exporter, in a thread of its own.

A collector that is away costs nobody anything: what does not fit the queue is dropped, and the log says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from llm_api_server import __version__
from llm_api_server.manager.telemetry.spans import Span

#: Where a collector takes traces, below its address.
PATH = "/v1/traces"
MAX_WAITING_SPANS = 8192
SEND_INTERVAL = 1.0
SEND_TIMEOUT = 2.0
_SCOPE = InstrumentationScope("llm_api_server", __version__)


class Sender:
    """`endpoint` with or without `PATH`."""

    def __init__(self, endpoint: str, headers: Mapping[str, str], service_name: str) -> None:
        self._resource = Resource.create({"service.name": service_name, "service.version": __version__})
        url = endpoint if endpoint.endswith(PATH) else endpoint.rstrip("/") + PATH
        self._processor = BatchSpanProcessor(
            OTLPSpanExporter(url, headers=dict(headers), timeout=SEND_TIMEOUT),
            max_queue_size=MAX_WAITING_SPANS,
            schedule_delay_millis=SEND_INTERVAL * 1000,
        )

    def send(self, spans: Iterable[Span]) -> None:
        """Soon, together with others."""
        for span in spans:
            self._processor.on_end(self._readable(span))

    def close(self) -> None:
        """Waits until what is left has been sent, or cannot be."""
        self._processor.shutdown()  # type: ignore[no-untyped-call] # as OpenTelemetry has it

    def _readable(self, span: Span) -> ReadableSpan:
        return ReadableSpan(
            span.name,
            context=_context(span.trace_id, span.span_id, is_remote=False),
            parent=_context(span.trace_id, span.parent_id, is_remote=span.kind == "SERVER") if span.parent_id else None,
            resource=self._resource,
            attributes=span.attributes,
            events=[Event(name, timestamp=_nanoseconds(at)) for name, at in span.events],
            kind=SpanKind[span.kind],
            status=Status(StatusCode.ERROR, span.error) if span.error else Status(StatusCode.UNSET),
            start_time=_nanoseconds(span.start),
            end_time=_nanoseconds(span.end),
            instrumentation_scope=_SCOPE,
        )


def _context(trace_id: str, span_id: str, *, is_remote: bool) -> SpanContext:
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote, TraceFlags(TraceFlags.SAMPLED))


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
