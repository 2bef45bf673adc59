"""Trace context of a request by W3C's Trace Context, level 1. Pure but for new ids.

A worker continues the caller's trace, passes a context of its own to the engine and reports both to the manager, which
makes the spans.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping

import msgspec

from llm_api_server.ipc.usage_events import FinishedRequest

TRACEPARENT, TRACESTATE = b"traceparent", b"tracestate"
#: Version, trace, parent, flags. Later versions may have more behind a dash (section 3.2.4 of the recommendation).
_FORM = re.compile(rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1
_FRACTION = 2**56


class TraceContext(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Ids in hexadecimal: the trace, the caller's span (empty: none), the server's span and the engine's."""

    trace_id: str
    parent_id: str
    span_id: str
    engine_id: str

    def for_engine(self) -> bytes:
        """Return the value of `traceparent` for the engine."""
        return f"00-{self.trace_id}-{self.engine_id}-01".encode()


def engine_lines(headers: Mapping[bytes, bytes], context: TraceContext | None) -> bytes:
    """Return trace headers for the engine: of our own context, else the caller's unchanged."""
    if context is None and TRACEPARENT not in headers:
        return b""
    parent = headers[TRACEPARENT] if context is None else context.for_engine()
    state = headers.get(TRACESTATE)
    return b"traceparent: %b\r\n" % parent + (b"" if state is None else b"tracestate: %b\r\n" % state)


class TracedRequest(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A finished request with its trace. `request.row` is empty if it was refused before it had one."""

    context: TraceContext
    request: FinishedRequest


class Sampler:
    """Decides which requests are traced: as the caller decided, else the fraction `ratio` of them."""

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio

    def begin(self, headers: Mapping[bytes, bytes]) -> TraceContext | None:
        """Return a context if the request is to be traced. An invalid `traceparent` is ignored."""
        given = _FORM.fullmatch(headers.get(TRACEPARENT, b"").strip())
        if given is None or (given[1] == b"00" and given[5] is not None):
            return self._begin_own()
        if not int(given[4], 16) & _SAMPLED:
            return None
        return _context(given[2].decode(), given[3].decode())

    def _begin_own(self) -> TraceContext | None:
        trace_id = secrets.token_hex(16)
        # The last 7 bytes decide, as OpenTelemetry's consistent sampling wants it.
        if int(trace_id[-14:], 16) >= self._ratio * _FRACTION:
            return None
        return _context(trace_id, "")


def _context(trace_id: str, parent_id: str) -> TraceContext:
    return TraceContext(trace_id, parent_id, secrets.token_hex(8), secrets.token_hex(8))
