"""Life of one request: preparation, forwarding, retry, deadline, and its end.

What precedes the engine is one coroutine, which seldom waits and becomes a task only then. From there on the `Relay`
acts on what the engine's connection reads.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import NamedTuple

from llm_api_server.errors import ApiError, EngineUnavailable, RequestTimeout, ShuttingDown
from llm_api_server.event_loop import eager_task
from llm_api_server.gateway.http.request_head import RequestHead
from llm_api_server.gateway.http.responder import ClientDisconnected, Responder
from llm_api_server.gateway.manager_link.leases import Lease
from llm_api_server.gateway.metering.completion import RequestCompletion
from llm_api_server.gateway.metering.request_record import CLIENT_CLOSED_REQUEST, RequestRecord
from llm_api_server.gateway.proxy.client_response import ClientResponse
from llm_api_server.gateway.proxy.engine_request import EngineRequest
from llm_api_server.gateway.proxy.forwarding import Forwarder
from llm_api_server.gateway.proxy.head_decisions import decisions_of
from llm_api_server.gateway.proxy.preparation import Preparation
from llm_api_server.gateway.proxy.queue_timeout import QueueTimeout
from llm_api_server.gateway.proxy.relay import Relay, internal_error
from llm_api_server.gateway.proxy.running_requests import RunningRequests
from llm_api_server.gateway.wire.stream_reader import waiting_comment
from llm_api_server.http_client.response import NoResponse, UpstreamError

#: Seconds before a request is retried: the end of an instance that did not respond is about to be noticed.
RETRY_DELAY = 0.1
ATTEMPTS = 2
_NEVER = float("inf")


class SharedParts(NamedTuple):
    """Collaborators of all exchanges that begin under one configuration."""

    preparation: Preparation
    forwarder: Forwarder
    running: RunningRequests


class Exchange:
    """One request and its response: `RequestListener` of the client's connection, `RelayOwner`, `RunningRequest`.

    Ends exactly once, in `_finish`. `completion` is None behind a middleware, which finishes the record. The deadline
    is in seconds of `time.monotonic`.
    """

    __slots__ = (
        "_attempts", "_completion", "_deadline", "_forwarder", "_head", "_is_over", "_next_ping", "_preparation",
        "_queue", "_record", "_relay", "_request", "_responder", "_response", "_running", "_stop_reason", "_task",
    )  # fmt: skip

    def __init__(
        self,
        head: RequestHead,
        record: RequestRecord,
        responder: Responder,
        deadline: float,
        shared: SharedParts,
        completion: RequestCompletion | None,
    ) -> None:
        self._head = head
        self._record = record
        self._responder = responder
        self._response = ClientResponse(responder, record, decisions_of(head).endpoint.dialect, completion)
        self._deadline = deadline
        self._preparation, self._forwarder, self._running = shared
        self._completion = completion
        self._next_ping = _NEVER
        #: The request, once it is admitted.
        self._request: EngineRequest | None = None
        #: Set while the request waits for a slot.
        self._queue: QueueTimeout | None = None
        #: The request at an instance, once it has a slot.
        self._relay: Relay | None = None
        self._attempts = 0
        self._task: asyncio.Task[None] | None = None
        #: Why the response is no longer needed.
        self._stop_reason: Exception | None = None
        self._is_over = False

    # From the client's connection: `RequestListener`.

    def register(self) -> None:
        self._running.add(self)

    def begin(self) -> None:
        # Without a wait, the four coroutines cost about 1 % of a request, and no task is made (`make bench-stages`).
        self._task = eager_task.run(self._run())

    def on_blocked(self) -> None:
        if self._relay is not None:
            self._relay.set_blocked(is_blocked=True)

    def on_writable(self) -> None:
        if self._relay is not None:
            self._relay.set_blocked(is_blocked=False)

    def on_disconnect(self) -> None:
        self._stop(ClientDisconnected())

    # From the registry: `RunningRequest`.

    def on_shutdown(self) -> None:
        if self._is_over:
            return
        error = ShuttingDown("This server is shutting down.")
        self._stop_reason = self._stop_reason or error
        if self._task is not None:
            self._task.cancel()
        self._fail(error)

    def on_tick(self, now: float) -> None:
        queue = self._queue
        if now >= (self._deadline if queue is None else queue.until):
            late = queue.error(self._forwarder.models) if queue is not None else None
            self._stop(late or RequestTimeout(f"The request took longer than {self._timeout:g} seconds."))
        elif now >= self._next_ping and self._request is not None and self._response.accepts_pings:
            self._next_ping = now + self._running.ping_interval
            self._response.ping(waiting_comment(self._request.model.model, queue.position if queue else None))

    @property
    def _timeout(self) -> float:
        return self._deadline - self._record.started_at

    # To the engine.

    async def _run(self) -> None:
        try:
            request = self._request = await self._preparation.prepare(self._head, self._record, self._responder)
            if request.facts.stream:
                self._next_ping = monotonic() + self._running.first_ping_delay
            if request.facts.media and any(media.url for media in request.facts.media):
                request = self._request = await self._preparation.with_media(request, self._head, self._record)
            await self._forward(request)
        except (asyncio.CancelledError, Exception) as error:  # noqa: BLE001 - the edge of a request
            await self._refuse(error)

    async def _forward(self, request: EngineRequest) -> None:
        """Send the request to an instance that is ready. Raises `ApiError`."""
        record = self._record
        while True:
            lease = self._forwarder.take_slot(request) or await self._wait_slot(request)
            relay = self._relay = Relay(self, request, lease, record, self._responder, self._response)
            record.queued_seconds, record.instance = monotonic() - record.started_at, lease.instance.id
            if lease.prefilling is not None and not request.streams_from(lease.instance):
                lease.on_prefill_done()  # nothing will show when it is
            try:
                await self._forwarder.send(relay)
            except NoResponse as error:
                await self._leave(relay, error)
            else:
                return

    async def _wait_slot(self, request: EngineRequest) -> Lease:
        queue = self._queue = QueueTimeout(request.model.model, self._deadline, self._record)
        if not request.facts.stream:
            queue.apply_client_timeout(self._head.headers, self._record.started_at)
        lease = await self._forwarder.wait_slot(request, queue)
        self._queue = None
        return lease

    async def _leave(self, relay: Relay, error: UpstreamError) -> None:
        """Give up an instance that does not respond. Raises `EngineUnavailable` if no attempt is left."""
        relay.log(error)
        relay.lease.release(is_broken=True)
        self._relay = None
        self._attempts += 1
        if self._attempts >= ATTEMPTS:
            raise EngineUnavailable(f"The engine of '{relay.request.model.model}' does not respond.", retry_after=1)
        await asyncio.sleep(RETRY_DELAY)

    async def _retry(self, relay: Relay, error: UpstreamError, *, is_stale: bool) -> None:
        """Send the request again: on a new connection if the pooled one was stale, otherwise to another instance."""
        try:
            if is_stale:
                try:
                    await self._forwarder.send_again(relay)
                except NoResponse as failure:
                    error = failure
                else:
                    return
            await self._leave(relay, error)
            await self._forward(relay.request)
        except (asyncio.CancelledError, Exception) as failure:  # noqa: BLE001 - the edge of a request
            await self._refuse(failure)

    async def _refuse(self, error: BaseException) -> None:
        """Respond with an error before the engine has; a cancelled request ends for the reason it was stopped for."""
        if isinstance(error, asyncio.CancelledError):
            if self._stop_reason is None:  # the event loop ends
                self._fail(ShuttingDown("This server is shutting down."))
                raise error
            self._end_stopped()
            return
        if not isinstance(error, ApiError):
            error = internal_error(self._record)
        try:
            await self._preparation.add_rate_limits(self._record)
        except asyncio.CancelledError:
            pass
        except Exception:  # noqa: BLE001 - an error without rate limits is better than none
            internal_error(self._record)
        self._fail(error)

    # From the relay: `RelayOwner`.

    def on_relayed(self, failed: ApiError | None) -> None:
        if failed is not None:
            self._record.error = failed.kind
        self._responder.end()
        self._finish()

    def on_failed(self, error: ApiError) -> None:
        self._fail(error)

    def on_no_response(self, relay: Relay, error: UpstreamError, *, is_stale: bool) -> None:
        self._task = asyncio.create_task(self._retry(relay, error, is_stale=is_stale))

    # The end.

    def _stop(self, reason: Exception) -> None:
        """End a request whose response no one waits for."""
        if self._stop_reason is not None or self._is_over:
            return
        self._stop_reason = reason
        self._next_ping = _NEVER
        relay = self._relay
        if relay is not None and relay.connection is not None:
            try:
                ended = relay.detach(relay.connection)
            except Exception:  # noqa: BLE001 - the request ends without its last usage
                internal_error(self._record)
                self._end_stopped()
                return
            self._task = asyncio.create_task(self._wind_down(relay, ended))
        elif self._task is not None:
            self._task.cancel()
        else:
            self._end_stopped()

    async def _wind_down(self, relay: Relay, ended: asyncio.Future[None]) -> None:
        """Stop the generation at the engine. The client gets nothing more of it."""
        try:
            await self._forwarder.abort(relay, ended)
        except Exception:  # noqa: BLE001 - the engine ends the generation when its connection closes
            internal_error(self._record)
        finally:
            self._end_stopped()

    def _end_stopped(self) -> None:
        if self._is_over:
            return
        if isinstance(self._stop_reason, ApiError):
            self._fail(self._stop_reason)
        else:
            self._record.status = self._record.status or CLIENT_CLOSED_REQUEST
            self._record.error = "client_closed_request"
            self._finish()

    def _fail(self, error: ApiError) -> None:
        if not self._is_over:
            try:
                self._response.fail(error)
            except Exception:  # noqa: BLE001 - the client would wait for ever
                internal_error(self._record)
                self._responder.abort()
            finally:
                self._finish()

    def _finish(self) -> None:
        """Return what the request holds, however it ended: all of it, even if a step raises."""
        self._is_over = True
        relay, self._relay = self._relay, None  # breaks the cycle, which the garbage collector would have to find
        try:
            self._running.discard(self)
            try:
                if relay is not None:
                    relay.close()
            finally:
                try:
                    if self._completion is not None:
                        self._completion.finish(self._record)
                finally:
                    self._responder.close()
        except Exception:  # noqa: BLE001 - the edge of a request
            internal_error(self._record)
