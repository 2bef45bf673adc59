"""Response to the client: its head once, its data, and its end as a success or an error."""

from __future__ import annotations

from time import monotonic

from loguru import logger

from llm_api_server.errors import ApiError, InternalError
from llm_api_server.gateway.http.header_lines import lines_of
from llm_api_server.gateway.http.responder import Responder
from llm_api_server.gateway.metering.completion import RequestCompletion, common_header_lines
from llm_api_server.gateway.metering.request_record import RequestRecord
from llm_api_server.gateway.wire.endpoints import Dialect
from llm_api_server.gateway.wire.error_response import INTERNAL_ERROR, error_response
from llm_api_server.gateway.wire.responses import STREAM_HEAD
from llm_api_server.gateway.wire.stream_reader import error_event


class ClientResponse:
    """Writes to one `Responder`, and records status and first byte.

    Behind a middleware (`completion` is None), that adds the headers which every response gets.
    """

    __slots__ = (
        "_adds_common_lines", "_dialect", "_record", "accepts_pings", "is_event_stream", "is_started", "responder",
    )  # fmt: skip

    def __init__(
        self, responder: Responder, record: RequestRecord, dialect: Dialect, completion: RequestCompletion | None
    ) -> None:
        self.responder = responder
        self._record = record
        self._dialect = dialect
        self._adds_common_lines = completion is not None
        self.is_started = False
        self.is_event_stream = False
        #: Whether nothing but pings has been written.
        self.accepts_pings = True

    def write(self, head: bytes, data: bytes, status: int = 200) -> None:
        """Write `data`, after the header lines `head` unless the response has begun."""
        if not self.is_started:
            self.is_event_stream = head is STREAM_HEAD
            record = self._record
            seconds = record.first_byte_seconds = monotonic() - record.started_at
            self._start(status, b"%bopenai-processing-ms: %d\r\n" % (head, round(seconds * 1000)))
        if data:
            self.responder.write(data)

    def ping(self, comment: bytes) -> None:
        """Begin a stream unless it has begun, and send a comment in it."""
        if self.responder.is_writable:
            self.write(STREAM_HEAD, comment)
            self.responder.flush()

    def fail(self, error: ApiError) -> None:
        """End the response with `error`: as a response if it has not begun, else as the last event of a stream."""
        record, responder = self._record, self.responder
        record.error = error.kind
        try:
            self._write_error(error)
        except Exception:  # noqa: BLE001 - the client would wait for ever
            logger.exception("request {}: the error {} could not be sent", record.request_id, error.kind)
            self._write_internal_error()
        if not responder.is_writable:
            responder.abort_if_stalled()

    def _write_internal_error(self) -> None:
        """Respond after `_write_error` has raised, or else leave the response without an end."""
        try:
            if self.is_started:
                self.responder.abort()
            else:
                self._write_error(InternalError(INTERNAL_ERROR))
        except Exception:  # noqa: BLE001 - the client would wait for ever
            self.responder.abort()

    def _write_error(self, error: ApiError) -> None:
        record, responder = self._record, self.responder
        if not self.is_started:
            status, headers, body = error_response(error, record.path)
            self._start(status, b"%bcontent-length: %d\r\n" % (lines_of(headers), len(body)))
            responder.write(body)
            responder.end()
        elif self.is_event_stream:
            number = record.reader.next_sequence_number if record.reader is not None else 0
            responder.write(error_event(self._dialect, error, number))
            responder.end()
        else:  # a JSON body that has begun cannot carry an error
            responder.abort()

    def _start(self, status: int, lines: bytes) -> None:
        if self._adds_common_lines:
            lines += common_header_lines(self._record)
        self.is_started = True
        self._record.status = status
        self.responder.start(status, lines)
