"""A stand-in for an OpenTelemetry collector: accepts OTLP over HTTP and records it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status


@dataclass(frozen=True)
class Seen:
    """One span. Times are in seconds."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: str
    start: float
    end: float
    attributes: dict[str, Any]
    events: list[str]
    has_failed: bool
    service: str


@dataclass
class Collector:
    """Recorded spans; `headers` are those of the last request."""

    url: str = ""
    spans: list[Seen] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    paths: set[str] = field(default_factory=set)

    def trace(self, trace_id: str) -> dict[str, Seen]:
        """Return the spans of one trace, by name."""
        return {span.name: span for span in list(self.spans) if span.trace_id == trace_id}

    def take(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        for resource in request.resource_spans:
            service = str(_plain(resource.resource.attributes)["service.name"])
            for scope in resource.scope_spans:
                self.spans += [_seen(span, service) for span in scope.spans]


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            collector.paths.add(self.path)
            collector.headers = {name.lower(): value for name, value in self.headers.items()}
            collector.take(body)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _seen(span: Span, service: str) -> Seen:
    return Seen(
        span.name, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(),
        Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"), span.start_time_unix_nano / 1e9,
        span.end_time_unix_nano / 1e9, _plain(span.attributes), [event.name for event in span.events],
        span.status.code == Status.STATUS_CODE_ERROR, service,
    )  # fmt: skip


def _plain(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}
