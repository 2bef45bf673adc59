"""Makes spans of what workers tell of traced requests and the manager knows of loads. On the manager's one loop.

Of each request one span for the server, and below it one for the time it waited, with the load that it waited for, and
one for the engine's work. They are put together when the request is over, so that tracing costs nothing on its way.
`otlp.py` sends them; it is imported when a collector is configured, and not before.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import msgspec

from llm_api_server.config.models import TracingConfig
from llm_api_server.ipc.trace_context import Traced
from llm_api_server.ipc.usage_events import CLIENT_CLOSED, Whole
from llm_api_server.manager.instances.load_phases import LoadTrace

if TYPE_CHECKING:
    from llm_api_server.manager.telemetry.otlp import Sender

#: Loads that are remembered for the requests that waited for them.
MAX_LOADS = 256
#: Seconds that what is left may take to be sent when the manager ends.
CLOSE_TIMEOUT = 3.0
#: Between a load's end and the requests that hear of it.
_SLACK = 1.0
_CLIENT_ERRORS = range(400, 500)
#: Names of OpenTelemetry's conventions for generative AI; other endpoints are called by their last word.
_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion", "/v1/messages": "chat",
               "/v1/responses": "chat", "/v1/embeddings": "embeddings"}  # fmt: skip

Attributes = dict[str, str | int | float | bool]


class Span(msgspec.Struct, frozen=True):
    """Ids in hexadecimal, times in Unix seconds. `kind` is a word of OpenTelemetry's; an `error` makes it failed."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start: float
    end: float
    kind: str = "INTERNAL"
    attributes: Attributes = {}
    events: tuple[tuple[str, float], ...] = ()
    error: str | None = None


class Tracing:
    """Off until `configure` gives it a collector."""

    def __init__(self) -> None:
        self._config = TracingConfig()
        self._sender: Sender | None = None
        self._loads: deque[LoadTrace] = deque(maxlen=MAX_LOADS)

    def configure(self, config: TracingConfig) -> None:
        """What was to be sent to a former collector still is."""
        if config == self._config:
            return
        self._config = config
        if self._sender is not None:
            threading.Thread(target=self._sender.close, daemon=True).start()
        self._sender = None
        if config.endpoint:
            # 15 MB that only those pay for who use it.
            from llm_api_server.manager.telemetry.otlp import Sender  # noqa: PLC0415

            self._sender = Sender(config.endpoint, config.headers, config.service_name)

    def loaded(self, load: LoadTrace) -> None:
        """Also one that failed. Before the requests that waited for it are told of."""
        self._loads.append(load)

    def over(self, requests: Iterable[Traced]) -> None:
        """They have ended."""
        if self._sender is not None:
            for traced in requests:
                self._sender.send(spans_of(traced, self._loads))

    async def close(self) -> None:
        """Send what is left, as long as that takes no longer than `CLOSE_TIMEOUT`."""
        if self._sender is None:
            return
        loop, sender, is_closed = asyncio.get_running_loop(), self._sender, asyncio.Event()

        def work() -> None:
            sender.close()
            with contextlib.suppress(RuntimeError):  # nobody waits any more
                loop.call_soon_threadsafe(is_closed.set)

        threading.Thread(target=work, daemon=True).start()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(is_closed.wait(), CLOSE_TIMEOUT)


def spans_of(traced: Traced, loads: Iterable[LoadTrace]) -> list[Span]:
    """Of one request; the server's comes first."""
    context, whole = traced.context, traced.whole
    end = whole.at + whole.duration
    spans = [
        Span(
            f"POST {whole.endpoint}",
            context.trace_id,
            context.span_id,
            context.parent_id,
            whole.at,
            end,
            "SERVER",
            _of_request(whole),
            error=_failure(whole),
        )
    ]
    waited_until = end if whole.queued is None else whole.at + whole.queued
    waited_for = [load for load in loads if _is_for(load, whole) and whole.at < load.ended_at <= waited_until + _SLACK]
    if whole.row:
        queue = Span("queue", context.trace_id, secrets.token_hex(8), context.span_id, whole.at, waited_until)
        spans.append(queue)
        for load in waited_for:
            spans += _of_load(load, queue)
    if whole.queued is not None:
        first = () if whole.first_token is None else (("first token", whole.at + whole.first_token),)
        spans.append(
            Span(
                f"{_operation(whole)} {whole.model}",
                context.trace_id,
                context.engine_id,
                context.span_id,
                waited_until,
                end,
                "CLIENT",
                _of_engine(whole),
                first,
                _failure(whole),
            )
        )
    return spans


def _failure(whole: Whole) -> str | None:
    """What the server did wrong: no client that left, nothing that was refused."""
    return None if whole.error == CLIENT_CLOSED or whole.status in _CLIENT_ERRORS else whole.error


def _is_for(load: LoadTrace, whole: Whole) -> bool:
    return load.instance == whole.instance if whole.instance else load.model == whole.model


def _of_load(load: LoadTrace, parent: Span) -> Iterator[Span]:
    attributes: Attributes = {"llm_api_server.instance": load.instance}
    span = Span(
        f"load {load.model}", parent.trace_id, secrets.token_hex(8), parent.span_id, load.started_at, load.ended_at,
        attributes=attributes, error=load.error,
    )  # fmt: skip
    yield span
    start = load.started_at
    for phase, seconds in load.phases.items():
        yield Span(phase, parent.trace_id, secrets.token_hex(8), span.span_id, start, start + seconds)
        start += seconds


def _operation(whole: Whole) -> str:
    return _OPERATIONS.get(whole.endpoint) or whole.endpoint.rpartition("/")[2]


def _of_request(whole: Whole) -> Attributes:
    """Names of OpenTelemetry's conventions where it has one. No prompt, no answer, no key."""
    found: Attributes = {
        "http.request.method": "POST",
        "http.route": whole.endpoint,
        "url.path": whole.endpoint,
        "http.response.status_code": whole.status,
        "llm_api_server.request_id": whole.request_id,
    }
    if whole.key_name:
        found["llm_api_server.key"] = whole.key_name
    if whole.error:
        found["error.type"] = whole.error
    if whole.model:
        found["gen_ai.request.model"] = whole.model
    return found


def _of_engine(whole: Whole) -> Attributes:
    usage = whole.usage
    found: Attributes = {
        "gen_ai.operation.name": _operation(whole),
        "gen_ai.request.model": whole.model,
        "gen_ai.request.stream": whole.stream,
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        "llm_api_server.row": whole.row,
    }
    if whole.instance:
        found["llm_api_server.instance"] = whole.instance
    if whole.first_token is not None and whole.queued is not None:
        found["gen_ai.response.time_to_first_chunk"] = whole.first_token - whole.queued
    if whole.error:
        found["error.type"] = whole.error
    return found
