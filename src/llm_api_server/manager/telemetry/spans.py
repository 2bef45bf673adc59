"""Spans of finished requests, and the thread that sends them to a collector by OTLP over HTTP (OpenTelemetry's own).

A request has one span for the server and below it one for its queue, with the load it waited for, and one for the
engine. If the collector is away, spans that do not fit the queue are dropped, and the log says so.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from llm_api_server import __version__
from llm_api_server.ipc.trace_context import TracedRequest
from llm_api_server.ipc.usage_events import CLIENT_CLOSED, FinishedRequest
from llm_api_server.manager.instances.load_phases import LoadTrace

#: Where a collector takes traces, below its address.
PATH = "/v1/traces"
MAX_WAITING_SPANS = 8192
SEND_INTERVAL = 1.0
SEND_TIMEOUT = 2.0
#: Seconds between the end of a load and the moment its waiting requests are admitted.
_SLACK = 1.0
_CLIENT_ERRORS = range(400, 500)
#: Operation names of OpenTelemetry's conventions for generative AI; other endpoints use the last part of their path.
_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion", "/v1/messages": "chat",
               "/v1/responses": "chat", "/v1/embeddings": "embeddings"}  # fmt: skip
_SCOPE = InstrumentationScope("llm_api_server", __version__)

Attributes = dict[str, str | int | float | bool]


class SpanSender:
    """Sends the spans of requests to `endpoint`, given with or without `PATH`."""

    def __init__(self, endpoint: str, headers: Mapping[str, str], service_name: str) -> None:
        self._resource = Resource.create({"service.name": service_name, "service.version": __version__})
        url = endpoint if endpoint.endswith(PATH) else endpoint.rstrip("/") + PATH
        self._processor = BatchSpanProcessor(
            OTLPSpanExporter(url, headers=dict(headers), timeout=SEND_TIMEOUT),
            max_queue_size=MAX_WAITING_SPANS,
            schedule_delay_millis=SEND_INTERVAL * 1000,
        )

    def send(self, traced: TracedRequest, loads: Iterable[LoadTrace]) -> None:
        """Queue the spans of a request; they are sent in batches."""
        for span in spans_of(traced, loads, self._resource):
            self._processor.on_end(span)

    def close(self) -> None:
        """Wait until what is left is sent or has failed."""
        self._processor.shutdown()  # type: ignore[no-untyped-call] # as OpenTelemetry has it


@dataclass(frozen=True)
class _Spans:
    """Makes spans of one trace. Ids are in hexadecimal, times in Unix seconds."""

    trace_id: str
    resource: Resource

    def make(
        self,
        name: str,
        span_id: str,
        parent_id: str,
        times: tuple[float, float],
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes | None = None,
        events: Iterable[tuple[str, float]] = (),
        error: str | None = None,
    ) -> ReadableSpan:
        is_remote = kind is SpanKind.SERVER
        return ReadableSpan(
            name,
            context=self._context(span_id, is_remote=False),
            parent=self._context(parent_id, is_remote=is_remote) if parent_id else None,
            resource=self.resource,
            attributes=attributes or {},
            events=[Event(event, timestamp=_nanoseconds(at)) for event, at in events],
            kind=kind,
            status=Status(StatusCode.ERROR, error) if error else Status(StatusCode.UNSET),
            start_time=_nanoseconds(times[0]),
            end_time=_nanoseconds(times[1]),
            instrumentation_scope=_SCOPE,
        )

    def _context(self, span_id: str, *, is_remote: bool) -> SpanContext:
        return SpanContext(int(self.trace_id, 16), int(span_id, 16), is_remote, TraceFlags(TraceFlags.SAMPLED))


def spans_of(traced: TracedRequest, loads: Iterable[LoadTrace], resource: Resource) -> list[ReadableSpan]:
    """Return the spans of one request, the server's first."""
    context, request = traced.context, traced.request
    spans = _Spans(context.trace_id, resource)
    start, end = request.at, request.at + request.duration
    error = _failure(request)
    found = [
        spans.make(
            f"POST {request.endpoint}",
            context.span_id,
            context.parent_id,
            (start, end),
            kind=SpanKind.SERVER,
            attributes=_request_attributes(request),
            error=error,
        )
    ]
    queue_end = end if request.queued is None else start + request.queued
    if request.row:
        queue_id = secrets.token_hex(8)
        found.append(spans.make("queue", queue_id, context.span_id, (start, queue_end)))
        for load in loads:
            if _is_for(load, request) and start < load.ended_at <= queue_end + _SLACK:
                found += _load_spans(spans, load, queue_id)
    if request.queued is not None:
        found.append(
            spans.make(
                f"{_operation(request)} {request.model}",
                context.engine_id,
                context.span_id,
                (queue_end, end),
                kind=SpanKind.CLIENT,
                attributes=_engine_attributes(request),
                events=[] if request.first_token is None else [("first token", start + request.first_token)],
                error=error,
            )
        )
    return found


def _load_spans(spans: _Spans, load: LoadTrace, parent_id: str) -> Iterator[ReadableSpan]:
    span_id = secrets.token_hex(8)
    yield spans.make(
        f"load {load.model}",
        span_id,
        parent_id,
        (load.started_at, load.ended_at),
        attributes={"llm_api_server.instance": load.instance},
        error=load.error,
    )
    start = load.started_at
    for phase, seconds in load.phases.items():
        yield spans.make(phase, secrets.token_hex(8), span_id, (start, start + seconds))
        start += seconds


def _failure(request: FinishedRequest) -> str | None:
    """Return the server's error; a client that left and a refused request are none."""
    return None if request.error == CLIENT_CLOSED or request.status in _CLIENT_ERRORS else request.error


def _is_for(load: LoadTrace, request: FinishedRequest) -> bool:
    return load.instance == request.instance if request.instance else load.model == request.model


def _operation(request: FinishedRequest) -> str:
    return _OPERATIONS.get(request.endpoint) or request.endpoint.rpartition("/")[2]


def _request_attributes(request: FinishedRequest) -> Attributes:
    """Return attributes by OpenTelemetry's conventions where they have a name; no prompt, no response, no key."""
    found: Attributes = {
        "http.request.method": "POST",
        "http.route": request.endpoint,
        "url.path": request.endpoint,
        "http.response.status_code": request.status,
        "llm_api_server.request_id": request.request_id,
    }
    if request.key_name:
        found["llm_api_server.key"] = request.key_name
    if request.error:
        found["error.type"] = request.error
    if request.model:
        found["gen_ai.request.model"] = request.model
    return found


def _engine_attributes(request: FinishedRequest) -> Attributes:
    usage = request.usage
    found: Attributes = {
        "gen_ai.operation.name": _operation(request),
        "gen_ai.request.model": request.model,
        "gen_ai.request.stream": request.stream,
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        "llm_api_server.row": request.row,
    }
    if request.instance:
        found["llm_api_server.instance"] = request.instance
    if request.first_token is not None and request.queued is not None:
        found["gen_ai.response.time_to_first_chunk"] = request.first_token - request.queued
    if request.error:
        found["error.type"] = request.error
    return found


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
