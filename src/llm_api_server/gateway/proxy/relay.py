"""Relay of one engine response to the client, from its head to its last byte.

The connection to the engine calls it once per read of the socket: no task, future or timer per chunk.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Protocol

from loguru import logger

from llm_api_server.errors import ApiError, EngineError, InternalError
from llm_api_server.gateway.http.responder import Responder
from llm_api_server.gateway.manager_link.leases import Lease
from llm_api_server.gateway.metering.request_record import RequestRecord
from llm_api_server.gateway.proxy.client_response import ClientResponse
from llm_api_server.gateway.proxy.engine_request import EngineRequest
from llm_api_server.gateway.wire.error_response import INTERNAL_ERROR
from llm_api_server.gateway.wire.responses import FIRST_ERROR_STATUS, EngineResponse, ErrorResponse, StreamResponse
from llm_api_server.gateway.wire.stream_reader import CUT_OFF, StreamReader
from llm_api_server.http_client.connection import Connection
from llm_api_server.http_client.response import NoResponse, UpstreamError


class RelayOwner(Protocol):
    """The exchange that a relay belongs to. At most one of these is called, once, and only by an attached relay."""

    def on_relayed(self, failed: ApiError | None) -> None:
        """The response is complete; `failed` is the error that its last event reports."""

    def on_failed(self, error: ApiError) -> None:
        """The response cannot be completed."""

    def on_no_response(self, relay: Relay, error: UpstreamError, *, is_stale: bool) -> None:
        """The engine sent nothing. `is_stale`: on a pooled connection, which it may have closed before."""


class Relay:
    """`Receiver` of the response to one request on one leased slot.

    Once detached, it reads the rest of the response for its usage and writes nothing to the client.
    """

    __slots__ = (
        "_ended", "_flow", "_is_closed", "_owner", "_responder", "_response", "_sent", "connection", "encoded",
        "lease", "record", "request",
    )  # fmt: skip

    def __init__(
        self,
        owner: RelayOwner,
        request: EngineRequest,
        lease: Lease,
        record: RequestRecord,
        responder: Responder,
        sent: ClientResponse,
    ) -> None:
        self._owner = owner
        self.request = request
        self.lease = lease
        self.record = record
        self._responder = responder
        self._sent = sent
        #: The request as it was sent.
        self.encoded = b""
        #: Connection to the engine, from sending the request to the last byte of the response.
        self.connection: Connection | None = None
        self._response: EngineResponse | None = None
        #: Reader of a stream that has begun. Nearly all data takes this short way.
        self._flow: StreamReader | None = None
        #: Set once detached; done when the engine has ended the response.
        self._ended: asyncio.Future[None] | None = None
        self._is_closed = False

    # For the exchange.

    def set_blocked(self, *, is_blocked: bool) -> None:
        """Stop reading from the engine while the client does not read, so that the engine notices."""
        if self.connection is not None and self._ended is None:
            if is_blocked:
                self.connection.pause()
            else:
                self.connection.resume()
            self.lease.on_blocked(is_blocked=is_blocked)

    def detach(self, connection: Connection) -> asyncio.Future[None]:
        """Write nothing more to the client. Return a future that is done when the engine has ended the response."""
        self._flow = None
        connection.resume()
        self._ended = asyncio.get_running_loop().create_future()
        return self._ended

    def close(self) -> None:
        """Record the usage, close the connection unless the response is complete, and release the slot.

        Each of them happens even if another raises.
        """
        self._is_closed = True
        record, lease, cost = self.record, self.lease, None
        connection, self.connection = self.connection, None
        try:
            if self._response is not None:
                record.usage = self._response.usage
            cost = record.usage_or_estimate().cost if lease.needs_cost else None
        finally:
            try:
                if connection is not None:
                    connection.abort_for(self)
            finally:
                lease.release(cost)

    def log(self, error: UpstreamError) -> None:
        logger.warning("{}: instance {}: {}", self.record.request_id, self.lease.instance.id, error)

    # For the connection: `Receiver`.

    def on_head(self, status: int, headers: dict[str, str]) -> None:
        if self._is_closed:
            return
        try:
            response = self._response = self.request.response(status, headers, self.lease.instance)
            self.record.reader = response.reader
            if status >= FIRST_ERROR_STATUS:
                self.record.prompt_estimate = 0
        except ApiError as error:
            self._fail(error)
        except Exception:  # noqa: BLE001 - the edge of a request: the event loop would swallow it
            self._fail(internal_error(self.record))

    def on_data(self, data: bytes, *, is_last: bool) -> None:
        if self._is_closed:
            return
        if is_last:
            self.connection = None
        try:
            if (flow := self._flow) is None or is_last:
                self._relay(data, is_last=is_last)
            elif (out := flow.feed(data)) and flow.failed is None:
                self._responder.send(out)
            elif flow.failed is not None:
                self._responder.write(out)
                self._complete(flow.failed)
        except ApiError as error:
            self._fail(error)
        except Exception:  # noqa: BLE001 - the edge of a request: the event loop would swallow it
            self._fail(internal_error(self.record))

    def on_chunks(self, chunks: bytes) -> bool:
        # Forwarding whole chunks instead of reading them: 2.2 -> 1.3 us per chunk (`make bench-stages`).
        flow, responder = self._flow, self._responder
        if flow is None or not responder.is_chunked or not flow.passes(chunks):
            return False
        try:
            responder.forward(chunks)
        except Exception:  # noqa: BLE001 - the edge of a request: the event loop would swallow it
            self._fail(internal_error(self.record))
        return True

    def on_error(self, error: UpstreamError) -> None:
        if self._is_closed:
            return
        connection, self.connection = self.connection, None
        if self._ended is not None:
            self._settle(self._ended)
        elif isinstance(error, NoResponse):
            is_stale = connection is not None and connection.is_reused
            self._owner.on_no_response(self, error, is_stale=is_stale)
        else:
            self.log(error)
            if self._response is None:
                self._owner.on_failed(EngineError("The engine's response could not be understood."))
            elif isinstance(self._response, ErrorResponse):
                self.on_data(b"", is_last=True)
            else:
                self._owner.on_failed(EngineError(CUT_OFF))

    def _relay(self, data: bytes, *, is_last: bool) -> None:
        response, record = self._response, self.record
        assert response is not None, "the connection passes a head first"
        if data and record.first_token_seconds is None and not isinstance(response, ErrorResponse):
            record.first_token_seconds = monotonic() - record.started_at
            if self.lease.prefilling is not None:
                self.lease.on_prefill_done()
        out = response.feed(data) if data else b""
        failed = response.failed
        if is_last and failed is None:
            out += response.end()
            failed = response.failed
        is_attached = self._ended is None
        if is_attached and (out or is_last):
            if self._sent.is_event_stream and not response.is_stream:  # pings have begun a stream
                raise EngineError("The engine did not respond with a stream.")
            self._sent.accepts_pings = False
            self._sent.write(response.head, out, response.status)
        if failed is not None or is_last:
            self._complete(failed)
        elif is_attached:
            self._responder.flush()
            self._flow = response.reader if self._sent.is_started and isinstance(response, StreamResponse) else None

    def _complete(self, failed: ApiError | None) -> None:
        if self._ended is not None:
            self._settle(self._ended)
        else:
            self._owner.on_relayed(failed)

    def _fail(self, error: ApiError) -> None:
        if self._ended is not None:
            self._settle(self._ended)
        else:
            self._owner.on_failed(error)

    def _settle(self, ended: asyncio.Future[None]) -> None:
        self.connection = None
        if not ended.done():
            ended.set_result(None)


def internal_error(record: RequestRecord) -> InternalError:
    """Log the exception being handled and return an error without its details."""
    logger.exception("request {} failed", record.request_id)
    return InternalError(INTERNAL_ERROR)
