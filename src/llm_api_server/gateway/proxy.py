"""The data path: one request to one engine and its answer back, raw ASGI, no framework.

`EngineProxy` is the app behind every engine endpoint; an `_Exchange` lives as long as its request and runs in the
request's task, with one more task that watches for the client to leave. Bytes are written as they are read.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from loguru import logger
from starlette.types import Receive, Scope, Send

from llm_api_server.config import Config
from llm_api_server.control import InstanceInfo
from llm_api_server.errors import (
    ApiError,
    EngineError,
    EngineUnavailable,
    InvalidRequest,
    NotSupported,
    PermissionDenied,
    RequestTimeout,
    ShuttingDown,
)
from llm_api_server.gateway import aborts, estimate, forced_tools, openai, schemas, tokens
from llm_api_server.gateway.accounts import Accounts
from llm_api_server.gateway.assemble import Assembler
from llm_api_server.gateway.catalog import Catalog
from llm_api_server.gateway.client import ClientGone, Pings, read_body, watch
from llm_api_server.gateway.context import ContextLimits
from llm_api_server.gateway.engine_errors import NO_CHAT_TEMPLATE, translate_error
from llm_api_server.gateway.forced_tools import ForcedCallStream
from llm_api_server.gateway.leases import Lease, Leases
from llm_api_server.gateway.media import check_pixels
from llm_api_server.gateway.multipart import Form
from llm_api_server.gateway.openai import Endpoint, RequestFacts
from llm_api_server.gateway.records import CLIENT_CLOSED_REQUEST, RequestRecord, record_of
from llm_api_server.gateway.sse import BodyReader, StreamReader, error_event, waiting_comment
from llm_api_server.gateway.templates import Templates
from llm_api_server.gateway.upstream import BrokenResponse, NoResponse, Response, UpstreamClient

#: A stream without a byte after this gets its head and a comment, so that proxies and clients don't time out ...
FIRST_PING_DELAY = 2.0
#: ... and another comment as often as this until its first byte.
PING_INTERVAL = 10.0
#: How long to wait before an instance that did not answer is asked for again: its end is about to be noticed.
RETRY_DELAY = 0.1
ATTEMPTS = 2
#: How long a client that has stopped reading is waited for with the last event.
FAREWELL_TIMEOUT = 1.0
#: How long an engine that is told to end an answer may take to say how long it was, and how often it is told.
LAST_WORDS_TIMEOUT = 2.0
ABORT_INTERVAL = 0.2
MAX_ERROR_BYTES = 64 * 1024
_CHAT = frozenset({"chat", "responses", "messages"})
_EVENT_STREAM = "text/event-stream"
_JSON = "application/json"
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class EngineProxy:
    """What all requests of a worker share."""

    def __init__(
        self, config: Config, catalog: Catalog, leases: Leases, accounts: Accounts, upstream: UpstreamClient
    ) -> None:
        self.catalog = catalog
        self.leases = leases
        self.accounts = accounts
        self.upstream = upstream
        self.limits = ContextLimits(config.inference, upstream)
        self.templates = Templates(upstream)
        self.timeout = config.server.timeout
        self.max_body_bytes = config.server.max_body_bytes
        self.max_image_pixels = config.inference.max_image_pixels
        self.streaming_default = config.inference.streaming_default
        self.records_prompts = config.storage.record_prompts
        self.first_ping_delay = FIRST_PING_DELAY
        self.ping_interval = PING_INTERVAL

    async def serve(self, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises `ApiError` only while nothing has been sent."""
        record = record_of(scope)
        key = record.key
        if key is None or not key.may(endpoint.permission):
            raise PermissionDenied(f"Your key has no permission for {endpoint.path} ('{endpoint.permission}').")
        headers = _headers(scope)
        if headers.get("content-encoding", "identity") != "identity":
            raise InvalidRequest("Compressed request bodies are not accepted; send the body as it is.")
        exchange = _Exchange(self, endpoint, record, headers, send)
        deadline = asyncio.get_running_loop().time() + self.timeout
        try:
            async with asyncio.timeout_at(deadline):
                body = await read_body(headers, receive, self.max_body_bytes)
            exchange.read(body)
            async with watch(receive, deadline, exchange.wind_down):
                await exchange.run()
        except ClientGone:
            record.status = record.status or CLIENT_CLOSED_REQUEST
            record.error = "client_closed_request"
        except TimeoutError:
            await exchange.fail(RequestTimeout(f"The request took longer than {self.timeout:g} seconds."))
        except ApiError as error:
            await exchange.fail(error)
        except asyncio.CancelledError:  # the HTTP server's drain time is over
            await exchange.fail(ShuttingDown("This server is shutting down."))
        finally:
            exchange.close()


class _Exchange:
    """One request on its way to an engine and back."""

    def __init__(
        self, proxy: EngineProxy, endpoint: Endpoint, record: RequestRecord, headers: dict[str, str], send: Send
    ) -> None:
        self._proxy = proxy
        self._endpoint = endpoint
        self._record = record
        self._headers = headers
        self._send = send
        self._facts = RequestFacts(request=None, model=None)
        self._form: Form | None = None
        self._body = b""
        self._model = ""
        self._prompt_tokens = 0
        self._adapter: str | None = None
        self._lease: Lease | None = None
        self._response: Response | None = None
        self._pings: Pings | None = None
        #: What vLLM calls the request under way, to end it by.
        self._engine_ids: list[str] = []
        self._is_muted = False
        self._is_started = False
        self._is_event_stream = False

    def read(self, body: bytes) -> None:
        """Everything about the request that can be wrong without an engine. Raises `ApiError`."""
        by_default = self._proxy.streaming_default and _EVENT_STREAM in self._headers.get("accept", "")
        if self._endpoint.request is None:
            self._form = Form(self._headers.get("content-type", ""), body)
            self._facts = self._form.read()
        else:
            self._facts = openai.read_request(self._endpoint, body, stream_by_default=by_default)
        self._body = body
        key = self._record.key
        assert key is not None
        found = self._proxy.catalog.find(self._facts.model, key)
        self._model, self._adapter = found.model, found.adapter
        self._record.model = found.name
        self._record.stream = self._facts.stream
        check_pixels(self._facts.media, self._proxy.max_image_pixels)
        self._check_vision()
        self._check_chat()
        if found.adapter and self._endpoint.task not in {None, "generate"}:
            raise NotSupported(f"The adapter '{found.adapter}' generates text only; ask '{found.model}' for this.")

    async def run(self) -> None:
        """Admit, lease, forward, relay. Raises `ApiError`."""
        await self._admit()
        if self._facts.stream:
            self._pings = Pings(self._send_ping, self._proxy.first_ping_delay, self._proxy.ping_interval)
        response = await self._forward()
        if response.status >= 400:  # noqa: PLR2004
            self._record.prompt_estimate = 0
            body = await self._read_error(response)
            raise translate_error(response.status, body, retry_after=response.headers.get("retry-after"))
        is_stream = response.headers.get("content-type", "").startswith(_EVENT_STREAM)
        try:
            if tokens.is_translated(self._facts, self._instance):
                body = await response.read_all(tokens.MAX_ANSWER_BYTES)
                await self._send_json(tokens.answer(self._facts, self._instance, body))
            elif is_stream and not self._facts.stream:
                await self._relay_assembled(response)
            elif is_stream:
                await self._relay_stream(response)
            else:
                await self._relay_body(response)
        except BrokenResponse as error:
            logger.warning("{}: instance {}: {}", self._record.request_id, self._instance.id, error)
            raise EngineError("The engine stopped in the middle of its answer.") from error

    async def wind_down(self) -> None:
        """Nobody waits for the answer any more: end it at the engine, and let its last words tell what it has used.

        Returns when waiting longer is of no use; the client gets nothing more of the answer.
        """
        self._is_muted = True
        if self._pings is not None:
            self._pings.cancel()
        if self._lease is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_TIMEOUT):
                # More than once: the first may come before the engine knows the request.
                for _ in range(round(LAST_WORDS_TIMEOUT / ABORT_INTERVAL)):
                    if not await aborts.abort(self._proxy.upstream, self._instance, self._engine_ids):
                        break
                    await asyncio.sleep(ABORT_INTERVAL)
        if self._record.reader is not None and self._instance.engine == "llama_cpp":
            self._record.reader.cut_off()

    async def fail(self, error: ApiError) -> None:
        """Answer with `error`: as a response while nothing has been sent, else as the stream's last event."""
        self._is_muted = False
        await self._stop_pings()
        self.close()
        if not self._is_started:
            raise error
        self._record.error = error.kind
        if self._is_event_stream:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FAREWELL_TIMEOUT):
                    await self._send_body(self._error_event(error))
                    await self._send_body(b"", more=False)
        # A JSON answer cannot be mended. Left without an end it makes the HTTP server close the connection, which
        # tells the client that it is incomplete.

    def close(self) -> None:
        """Give back what the request holds, however it ended."""
        if self._pings is not None:
            self._pings.cancel()
        if self._response is not None:
            self._response.abort()
        if self._lease is not None:
            self._lease.release()

    # ── to the engine ──

    async def _admit(self) -> None:
        """Count it against the limits of its key and give it a row in the ledger."""
        status = self._proxy.leases.models.get(self._model)
        self._prompt_tokens = estimate.prompt_tokens(self._endpoint, self._facts, len(self._body))
        stated, spare = estimate.answer_tokens(
            self._endpoint, self._facts, status.context_length if status is not None else None
        )
        await self._proxy.accounts.admit(self._record, self._prompt_tokens + stated, spare)
        keeps = self._proxy.records_prompts and self._form is None
        self._proxy.accounts.start(self._record, estimate.prompt_text(self._body) if keeps else None)

    async def _forward(self) -> Response:
        """The head of the engine's answer. An instance that gives none is asked for again, once."""
        for attempt in range(ATTEMPTS):
            lease = self._lease = await self._proxy.leases.acquire(self._model, self._endpoint.task)
            self._record.queued_seconds = self._record.elapsed()
            self._record.instance = lease.instance.id
            try:
                response = self._response = await self._post(lease.instance)
            except NoResponse as error:
                logger.warning("{}: instance {}: {}", self._record.request_id, lease.instance.id, error)
                lease.release(broken=True)
                if attempt + 1 < ATTEMPTS:
                    await asyncio.sleep(RETRY_DELAY)
            except BrokenResponse as error:
                logger.warning("{}: instance {}: {}", self._record.request_id, lease.instance.id, error)
                raise EngineError("The engine's answer could not be understood.") from error
            else:
                return response
        raise EngineUnavailable(f"The engine of '{self._model}' does not answer.", retry_after=1)

    async def _post(self, instance: InstanceInfo) -> Response:
        openai.check_supported(self._facts, instance.engine)
        body = self._body_for(instance)
        if self._is_forced(instance):
            knows_tools = await self._proxy.templates.knows_tools(instance)
            body = openai.rewrite(body, forced_tools.changes(self._facts, body, knows_tools=knows_tools))
        if tokens.is_translated(self._facts, instance):
            body = await tokens.question(self._proxy.upstream, self._facts, instance, body)
        await self._proxy.limits.check(self._facts, instance, body)
        self._record.prompt_estimate = self._prompt_tokens
        headers = {"accept": self._headers.get("accept", "*/*"), **instance.headers, **self._api_headers(instance)}
        if instance.engine != "remote":
            headers["x-request-id"] = self._row
        self._engine_ids = aborts.engine_ids(self._facts, self._row)
        return await self._proxy.upstream.post(
            instance.address,
            openai.upstream_path(self._endpoint, instance.engine),
            body,
            content_type=_JSON if self._form is None else self._headers["content-type"],
            headers=headers,
        )

    def _api_headers(self, instance: InstanceInfo) -> dict[str, str]:
        """Anthropic's version headers choose the form of an answer, so a remote gets the client's."""
        if self._endpoint.dialect != "anthropic" or instance.engine != "remote":
            return {}
        return {name: self._headers[name] for name in ("anthropic-version", "anthropic-beta") if name in self._headers}

    def _body_for(self, instance: InstanceInfo) -> bytes:
        """The body as this instance must see it; the client's own where nothing has to change."""
        facts = self._facts
        name = self._adapter or instance.upstream_model or instance.model
        if self._form is not None:
            return self._form.with_fields({"model": name}) if facts.model != name else self._body
        changes: dict[str, Any] = openai.tokenize_changes(facts, instance.engine)
        if facts.model != name:
            changes["model"] = name
        streams = facts.stream or self._is_assembled(instance)
        if not facts.says_stream or streams != facts.stream:
            changes["stream"] = streams
        if streams and self._endpoint.dialect == "openai" and not facts.wants_usage:
            changes["stream_options"] = openai.ask_for_usage(self._body)
        if instance.engine == "vllm" and isinstance(facts.request, schemas.ResponsesRequest):
            changes["request_id"] = f"resp_{self._row}"
        if instance.engine != "remote" and not self._proxy.catalog.knows_developer_role(instance.model):
            changes.update(openai.developer_changes(facts, self._body))
        return openai.rewrite(self._body, changes)

    def _is_assembled(self, instance: InstanceInfo) -> bool:
        """Whether a plain answer is made from a stream: so llama.cpp notices when the client leaves."""
        may = self._endpoint.streams and not self._facts.stream
        return may and (instance.engine == "llama_cpp" or self._is_forced(instance))

    def _is_forced(self, instance: InstanceInfo) -> bool:
        """Whether a tool call is demanded of an engine that would not hold itself to it."""
        return instance.engine != "remote" and forced_tools.is_forced(self._facts)

    def _check_vision(self) -> None:
        status = self._proxy.leases.models.get(self._model)
        if status is None or status.vision is not False:
            return
        for media in self._facts.media:
            if media.kind == "image":
                raise NotSupported(f"The model '{self._model}' cannot see images.", param=media.param)

    def _check_chat(self) -> None:
        """llama.cpp would chat with words that the model was never taught; vLLM refuses by itself."""
        status = self._proxy.leases.models.get(self._model)
        if status is not None and status.chat_template is False and self._endpoint.permission in _CHAT:
            raise NotSupported(NO_CHAT_TEMPLATE)

    @property
    def _row(self) -> str:
        assert self._record.row is not None, "it was admitted"
        return self._record.row

    @property
    def _instance(self) -> InstanceInfo:
        assert self._lease is not None
        return self._lease.instance

    async def _read_error(self, response: Response) -> bytes:
        try:
            return await response.read_all(MAX_ERROR_BYTES)
        except BrokenResponse:
            return b""

    # ── to the client ──

    async def _relay_stream(self, response: Response) -> None:
        reader = self._stream_reader(show_usage=self._facts.wants_usage)
        try:
            while data := await response.read():
                self._note_first_token()
                out = reader.feed(data)
                if reader.failed is not None and not self._is_started and out == self._error_event(reader.failed):
                    raise reader.failed  # vLLM's way to say that a schema is bad
                if out:
                    await self._send_stream(out)
                if reader.failed is not None:
                    self._record.error = reader.failed.kind
                    break
            await self._send_stream(reader.flush())
            await self._send_body(b"", more=False)
        finally:
            self._record.usage = reader.usage

    async def _relay_assembled(self, response: Response) -> None:
        """The engine streams, the client gets one JSON answer."""
        reader = self._stream_reader(show_usage=True)
        assembler = Assembler(self._endpoint.dialect)
        try:
            while data := await response.read():
                self._note_first_token()
                assembler.feed(reader.feed(data))
                if reader.failed is not None:
                    raise reader.failed
            assembler.feed(reader.flush())
        finally:
            self._record.usage = reader.usage
        await self._send_json(assembler.body())

    async def _send_json(self, body: bytes) -> None:
        length = (b"content-length", str(len(body)).encode())
        await self._send_head(200, [(b"content-type", _JSON.encode()), length])
        await self._send_body(body, more=False)

    def _error_event(self, error: ApiError) -> bytes:
        return error_event(self._endpoint.dialect, error)

    def _stream_reader(self, *, show_usage: bool) -> StreamReader:
        reader = self._record.reader = self._new_reader(show_usage=show_usage)
        return reader

    def _new_reader(self, *, show_usage: bool) -> StreamReader:
        choices = getattr(self._facts.request, "n", None) or 1
        if self._is_forced(self._instance):
            return ForcedCallStream(show_usage=show_usage, choices=choices)
        is_chat = self._endpoint.permission == "chat"
        return StreamReader(self._endpoint.dialect, show_usage=show_usage, is_chat=is_chat, choices=choices)

    async def _relay_body(self, response: Response) -> None:
        reader = BodyReader()
        data = await response.read()
        self._note_first_token()
        await self._stop_pings()
        if self._is_started:  # pings have promised a stream
            raise EngineError("The engine did not answer with a stream.")
        headers = [(b"content-type", response.headers.get("content-type", _JSON).encode("latin-1"))]
        if "content-length" in response.headers:
            headers.append((b"content-length", response.headers["content-length"].encode("latin-1")))
        await self._send_head(response.status, headers)
        while data:
            reader.feed(data)
            await self._send_body(data)
            data = await response.read()
        self._record.usage = reader.usage
        await self._send_body(b"", more=False)

    def _note_first_token(self) -> None:
        if self._record.first_token_seconds is None:
            self._record.first_token_seconds = self._record.elapsed()

    async def _send_stream(self, data: bytes) -> None:
        await self._stop_pings()
        if not self._is_started:
            await self._send_head(200, _STREAM_HEADERS)
        if data:
            await self._send_body(data)

    async def _send_ping(self) -> None:
        if not self._is_started:
            await self._send_head(200, _STREAM_HEADERS)
        await self._send_body(waiting_comment(self._model))

    async def _send_head(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        if self._is_muted:
            return
        seconds = self._record.first_byte_seconds = self._record.elapsed()
        timing = (b"openai-processing-ms", str(round(seconds * 1000)).encode())
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, timing]})
        # Only now: a ping that is cancelled while it waits to write has not started the answer.
        self._is_started = True
        self._is_event_stream = headers is _STREAM_HEADERS

    async def _send_body(self, data: bytes, *, more: bool = True) -> None:
        if not self._is_muted:
            await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def _stop_pings(self) -> None:
        pings, self._pings = self._pings, None
        if pings is not None:
            await pings.stop()


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
