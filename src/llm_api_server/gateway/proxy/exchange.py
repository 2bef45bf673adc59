"""The data path: one request to one engine and its answer back.

What must be decided before an engine gets the request is one coroutine, which seldom waits (`eager.py`). From then on
the engine's connection calls with what it has read, and it is written on at once: no task, future or timer per chunk.
"""

from __future__ import annotations

import asyncio
import contextlib
from time import monotonic
from typing import TYPE_CHECKING

from loguru import logger

from llm_api_server.errors import (
    ApiError,
    EngineError,
    EngineUnavailable,
    InternalError,
    RequestTimeout,
    ShuttingDown,
)
from llm_api_server.event_loop import eager_task
from llm_api_server.gateway.engine_calls import abort
from llm_api_server.gateway.http.header_lines import lines_of
from llm_api_server.gateway.http.request_head import RequestHead
from llm_api_server.gateway.http.responder import ClientDisconnected, Responder
from llm_api_server.gateway.manager_link.leases import Lease
from llm_api_server.gateway.metering.completion import common_header_lines
from llm_api_server.gateway.metering.request_record import CLIENT_CLOSED_REQUEST, RequestRecord
from llm_api_server.gateway.proxy.engine_request import EngineRequest
from llm_api_server.gateway.proxy.head_decisions import decisions_of
from llm_api_server.gateway.proxy.queue_timeout import QueueTimeout
from llm_api_server.gateway.wire import token_estimates
from llm_api_server.gateway.wire.error_response import INTERNAL_ERROR, error_response
from llm_api_server.gateway.wire.responses import (
    FIRST_ERROR_STATUS,
    STREAM_HEAD,
    EngineResponse,
    ErrorResponse,
    StreamResponse,
)
from llm_api_server.gateway.wire.stream_reader import StreamReader, error_event, waiting_comment
from llm_api_server.http_client.connection import Connection
from llm_api_server.http_client.response import NoResponse, UpstreamError
from llm_api_server.ipc.lease_messages import InstanceInfo
from llm_api_server.ipc.trace_context import TRACEPARENT, engine_lines

if TYPE_CHECKING:
    from llm_api_server.gateway.proxy.services import ProxyServices

#: How long to wait before an instance that did not answer is asked for again: its end is about to be noticed.
RETRY_DELAY = 0.1
ATTEMPTS = 2


class Exchange:
    """One request, from its head to the last byte of its answer. `Listener` of its client, `Receiver` of its engine.

    From `arrive` on it is watched, with `begin` it starts. The record has a key already where a middleware has found
    it.
    """

    # What most requests leave as it is, is not set for each.
    _next_ping = float("inf")
    _question: EngineRequest | None = None
    _prompt_tokens = 0
    _lease: Lease | None = None
    _wait: QueueTimeout | None = None
    _attempt = 0
    _request = b""
    _row = ""
    _connection: Connection | None = None
    _answer: EngineResponse | None = None
    _task: asyncio.Task[None] | None = None
    #: Why nobody waits for the answer any more.
    _reason: Exception | None = None
    _last_words: asyncio.Future[None] | None = None
    _is_started = False
    _is_event_stream = False
    #: Reads a stream that has begun, and whose client is there.
    _flow: StreamReader | None = None
    _is_over = False

    def __init__(
        self,
        proxy: ProxyServices,
        record: RequestRecord,
        head: RequestHead,
        client: Responder,
        *,
        is_outermost: bool = False,
    ) -> None:
        """`is_outermost`: no middleware adds the common headers and finishes the record."""
        self._proxy = proxy
        self._decisions = decisions_of(head)
        self._endpoint = self._decisions.endpoint
        self._is_outermost = is_outermost
        self._record = record
        self._head = head
        self._client = client
        self._deadline = record.started_at + proxy.timeout

    # ── from its client and the clock ──

    def register(self) -> None:
        """It is its turn."""
        self._proxy.running.add(self)

    def begin(self) -> None:
        self._task = eager_task.run(self._open())

    def on_disconnect(self) -> None:
        self._stop(ClientDisconnected())

    def on_shutdown(self) -> None:
        """The server waits no longer."""
        if self._is_over:
            return
        error = ShuttingDown("This server is shutting down.")
        self._reason = self._reason or error
        if self._task is not None:
            self._task.cancel()
        self._fail(error)

    def on_blocked(self) -> None:
        if self._connection is not None and self._reason is None:
            self._connection.pause()
            if self._lease is not None:
                self._lease.on_blocked(is_blocked=True)

    def on_writable(self) -> None:
        if self._connection is not None:
            self._connection.resume()
            if self._lease is not None:
                self._lease.on_blocked(is_blocked=False)

    def on_tick(self, now: float) -> None:
        """Some time has passed."""
        if now >= (self._deadline if self._wait is None else self._wait.until):
            late = self._wait.too_long(self._proxy.leases.models) if self._wait is not None else None
            self._stop(late or RequestTimeout(f"The request took longer than {self._proxy.timeout:g} seconds."))
        elif now >= self._next_ping:
            self._next_ping = now + self._proxy.ping_interval
            if self._client.is_writable:
                self._write(
                    STREAM_HEAD, waiting_comment(self._asked.route.model, self._wait.position if self._wait else None)
                )
                self._client.flush()

    def _stop(self, reason: Exception) -> None:
        """Nobody waits for the answer any more."""
        if self._reason is not None or self._is_over:
            return
        self._reason = reason
        self._next_ping = float("inf")
        self._flow = None
        if self._connection is None:
            if self._task is not None:
                self._task.cancel()
            else:
                self._give_up()
        else:
            self._connection.resume()
            self._last_words = asyncio.get_running_loop().create_future()
            self._task = asyncio.create_task(self._wind_down(self._last_words))

    def _give_up(self) -> None:
        """End it for the reason that it was stopped for."""
        if self._is_over:
            return
        if isinstance(self._reason, ApiError):
            self._fail(self._reason)
        else:
            self._record.status = self._record.status or CLIENT_CLOSED_REQUEST
            self._record.error = "client_closed_request"
            self._finish()

    async def _wind_down(self, last_words: asyncio.Future[None]) -> None:
        """End the answer at the engine; the client gets nothing more of it."""
        ids = abort.engine_ids(self._asked.facts, self._row)
        try:
            is_said = await abort.hear_last_words(self._proxy.upstream, self._instance, ids, last_words)
            if not is_said and self._record.reader is not None and self._instance.engine == "llama_cpp":
                self._record.reader.cut_off()
        finally:
            self._give_up()

    # ── to the engine ──

    async def _open(self) -> None:
        """Everything that is left up to the moment when an engine has the request."""
        proxy, record, head, client = self._proxy, self._record, self._head, self._client
        try:
            while not proxy.recognize(record, self._decisions, client):
                await proxy.look_up(head, self._decisions)
            key = record.key
            assert key is not None
            if self._decisions.permitted is not key:
                self._decisions.check_permission(key, head)
            question = self._question or self._read(await client.body())
            if record.row is None:
                stated, spare = question.answer_tokens()
                await proxy.admission.admit(record, self._prompt_tokens + stated, spare)
                self._start(question)
            if any(one.url for one in question.facts.media):
                question = self._read(await proxy.with_media(question))
            await self._forward(question)
        except asyncio.CancelledError:
            if self._reason is None:
                raise
            self._give_up()
        except Exception as error:  # noqa: BLE001 - the edge of a request: whatever went wrong must not leak
            await self._refuse(error)

    async def _refuse(self, error: Exception) -> None:
        if not isinstance(error, ApiError):
            error = self._internal_error()
        if self._record.limit_lines is None and self._record.key is not None:
            with contextlib.suppress(asyncio.CancelledError):
                self._record.limit_lines = await self._proxy.admission.peek(self._record.key)
        self._fail(error)

    def _read(self, body: bytes) -> EngineRequest:
        """Everything about the request that can be wrong without an engine. Raises `ApiError`."""
        proxy, record = self._proxy, self._record
        assert record.key is not None
        question = EngineRequest(
            self._endpoint,
            self._head,
            body,
            streaming_default=proxy.streaming_default,
            may_fetch=proxy.may_fetch,
        )
        question.route = self._decisions.resolve(question.facts.model, record.key, proxy.leases.models, proxy.catalog)
        record.model = question.route.name
        record.stream = question.facts.stream
        if question.facts.media or not question.route.is_checked:
            question.check(proxy.inference)
        if record.trace is not None or TRACEPARENT in self._head.headers:
            question.trace_lines = engine_lines(self._head.headers, record.trace)
        self._prompt_tokens = token_estimates.prompt_tokens(self._endpoint, question.facts, len(body))
        self._question = question
        return question

    def _start(self, question: EngineRequest) -> None:
        """It is admitted."""
        proxy = self._proxy
        self._row = proxy.usage.start(self._record, question.prompt_text() if proxy.records_prompts else None)
        if question.facts.stream:
            self._next_ping = proxy.now() + proxy.first_ping_delay

    def _forward_at_once(self, question: EngineRequest) -> bool:
        """`_forward`, where an instance has a place and a connection, and nothing must be asked first."""
        proxy, record = self._proxy, self._record
        assert record.key is not None
        lease = proxy.leases.acquire_at_once(question.route.model, self._endpoint.task, record.key.key_id)
        if lease is None:
            return False
        self._lease = lease
        instance = lease.instance
        record.queued_seconds, record.instance = monotonic() - record.started_at, instance.id
        request = question.encode_at_once(instance, self._row, proxy)
        if request is None:
            return False
        self._request = request
        record.prompt_estimate = self._prompt_tokens
        self._connection = proxy.upstream.send_at_once(instance.address, request, self)
        return self._connection is not None

    async def _forward(self, question: EngineRequest) -> None:
        """Hand it to an instance that is ready. Raises `ApiError`."""
        record = self._record
        while True:
            if (lease := self._lease) is None:
                lease = self._lease = await self._turn(question)
                record.queued_seconds, record.instance = record.elapsed(), lease.instance.id
            if not question.streams_from(lease.instance):
                lease.on_prefill_done()
            self._request = await question.encode(lease.instance, self._row, self._proxy)
            record.prompt_estimate = self._prompt_tokens
            try:
                await self._send()
            except NoResponse as error:
                await self._try_another(error, question.route.model)
            else:
                return

    async def _turn(self, question: EngineRequest) -> Lease:
        key = self._record.key
        assert key is not None
        model = question.route.model
        wait = self._wait = QueueTimeout(model, self._deadline, self._record)
        if not question.facts.stream:
            wait.heed(self._head.headers, self._record.started_at)
        claim = question.claim(key, self._prompt_tokens)
        lease = await self._proxy.leases.acquire(model, self._endpoint.task, claim, wait.on_position)
        self._wait = None
        return lease

    async def _send(self, *, is_fresh: bool = False) -> None:
        address = self._instance.address
        self._connection = await self._proxy.upstream.send(address, self._request, self, is_fresh=is_fresh)

    async def _try_another(self, error: UpstreamError, model: str) -> None:
        """An instance that gives no answer is asked for again, once. Raises `EngineUnavailable` the second time."""
        self._log_engine(error)
        assert self._lease is not None
        self._lease.release(is_broken=True)
        self._lease = None
        self._attempt += 1
        if self._attempt >= ATTEMPTS:
            raise EngineUnavailable(f"The engine of '{model}' does not answer.", retry_after=1)
        await asyncio.sleep(RETRY_DELAY)

    async def _again(self, error: UpstreamError, *, is_stale: bool) -> None:
        """It was sent and nothing came back: over a new connection where the old one was stale, else elsewhere."""
        try:
            if is_stale:
                try:
                    await self._send(is_fresh=True)
                except NoResponse as failure:
                    error = failure
                else:
                    return
            question = self._asked
            await self._try_another(error, question.route.model)
            await self._forward(question)
        except asyncio.CancelledError:
            if self._reason is None:
                raise
            self._give_up()
        except Exception as failure:  # noqa: BLE001 - as in `_open`
            await self._refuse(failure)

    # ── from the engine ──

    def on_head(self, status: int, headers: dict[str, str]) -> None:
        if self._is_over:
            return
        assert self._question is not None
        assert self._lease is not None
        answer = self._answer = self._question.answer(status, headers, self._lease.instance)
        self._record.reader = answer.reader
        if status >= FIRST_ERROR_STATUS:
            self._record.prompt_estimate = 0

    def on_data(self, data: bytes, *, is_last: bool) -> None:
        if self._is_over:
            return
        if is_last:
            self._connection = None
        try:
            if (flow := self._flow) is None or is_last:
                self._relay(data, is_last=is_last)
            elif (out := flow.feed(data)) and flow.failed is None:  # nearly all of a stream
                self._client.send(out)
            elif flow.failed is not None:
                self._client.write(out)
                self._complete(flow.failed)
        except ApiError as error:
            self._settle_or_fail(error)
        except Exception:  # noqa: BLE001 - nothing of ours may fall into the event loop
            self._settle_or_fail(self._internal_error())

    def on_chunks(self, frames: bytes) -> bool:
        flow, client = self._flow, self._client
        if flow is None or not client.is_chunked or not flow.passes(frames):
            return False
        client.forward(frames)
        return True

    def on_error(self, error: UpstreamError) -> None:
        if self._is_over:
            return
        connection, self._connection = self._connection, None
        if self._reason is not None:
            self._hear_last_words()
        elif isinstance(error, NoResponse):
            assert connection is not None
            self._task = asyncio.create_task(self._again(error, is_stale=connection.is_reused))
        else:
            self._log_engine(error)
            if self._answer is None:
                self._fail(EngineError("The engine's answer could not be understood."))
            elif isinstance(self._answer, ErrorResponse):
                self.on_data(b"", is_last=True)
            else:
                self._fail(EngineError("The engine stopped in the middle of its answer."))

    def _relay(self, data: bytes, *, is_last: bool) -> None:
        answer, record = self._answer, self._record
        assert answer is not None, "a head comes first"
        if data and record.first_token_seconds is None and not isinstance(answer, ErrorResponse):
            record.first_token_seconds = monotonic() - record.started_at
            if self._lease is not None and self._lease.prefilling is not None:
                self._lease.on_prefill_done()
        out = answer.feed(data) if data else b""
        failed = answer.failed
        if is_last and failed is None:
            out += answer.end()
        if self._reason is None and (out or is_last):
            if self._is_event_stream and not answer.is_stream:  # pings have promised a stream
                raise EngineError("The engine did not answer with a stream.")
            self._next_ping = float("inf")
            self._write(answer.head, out, answer.status)
        if failed is not None or is_last:
            self._complete(failed)
        elif self._reason is None:
            self._client.flush()
            self._flow = answer.reader if self._is_started and isinstance(answer, StreamResponse) else None

    def _write(self, head: bytes, data: bytes, status: int = 200) -> None:
        """`data`, after the head where that has not been sent."""
        if not self._is_started:
            self._is_started = True
            self._is_event_stream = head is STREAM_HEAD
            record = self._record
            seconds = record.first_byte_seconds = monotonic() - record.started_at
            record.status = status
            self._start_response(status, b"%bopenai-processing-ms: %d\r\n" % (head, round(seconds * 1000)))
        if data:
            self._client.write(data)

    def _start_response(self, status: int, lines: bytes) -> None:
        self._client.start(status, lines + common_header_lines(self._record) if self._is_outermost else lines)

    def _complete(self, failed: ApiError | None) -> None:
        """The engine's answer is whole, or as whole as it gets: the last event of a stream may be an error."""
        if failed is not None:
            self._record.error = failed.kind
        if self._reason is not None:
            self._hear_last_words()
            return
        self._client.end()
        self._finish()

    def _hear_last_words(self) -> None:
        self._connection = None
        if self._last_words is not None and not self._last_words.done():
            self._last_words.set_result(None)

    def _settle_or_fail(self, error: ApiError) -> None:
        if self._reason is not None:
            self._hear_last_words()
        else:
            self._fail(error)

    # ── the end ──

    def _fail(self, error: ApiError) -> None:
        """Answer with `error`: as a response while nothing has been sent, else as the stream's last event."""
        if self._is_over:
            return
        record = self._record
        record.error = error.kind
        if not self._is_started:
            self._is_started = True
            status, headers, body = error_response(error, record.path)
            record.status = status
            self._start_response(status, b"%bcontent-length: %d\r\n" % (lines_of(headers), len(body)))
            self._client.write(body)
            self._client.end()
        elif self._is_event_stream:
            self._client.write(error_event(self._endpoint.dialect, error))
            self._client.end()
        else:  # a JSON answer cannot be mended
            self._client.abort()
        if not self._client.is_writable:
            self._client.abort_if_stalled()
        self._finish()

    def _finish(self) -> None:
        """Give back what the request holds, however it ended."""
        self._is_over = True
        self._proxy.running.discard(self)
        if self._answer is not None:
            self._record.usage = self._answer.usage
        if self._connection is not None:
            self._connection.abort_for(self)
            self._connection = None
        if self._lease is not None:
            self._lease.release(self._record.usage_or_estimate().cost)
        if self._is_outermost:
            self._proxy.completion.finish(self._record)
        self._client.close()

    def _internal_error(self) -> InternalError:
        logger.exception("request {} failed", self._record.request_id)
        return InternalError(INTERNAL_ERROR)

    def _log_engine(self, error: UpstreamError) -> None:
        logger.warning("{}: instance {}: {}", self._record.request_id, self._instance.id, error)

    @property
    def _instance(self) -> InstanceInfo:
        assert self._lease is not None
        return self._lease.instance

    @property
    def _asked(self) -> EngineRequest:
        assert self._question is not None, "it was read"
        return self._question
