"""What a client asks of an engine: read once, put into the form that each kind of instance understands.

`exchange.py` makes one per request. What must be known of an instance first, the instance is asked.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from llm_api_server.auth.access import Key
from llm_api_server.config.models import InferenceConfig
from llm_api_server.errors import NotSupported
from llm_api_server.gateway.engine_calls import tokenize_adapter
from llm_api_server.gateway.http.request_head import RequestHead
from llm_api_server.gateway.media.content_parts import check_images
from llm_api_server.gateway.proxy.head_decisions import ResolvedModel
from llm_api_server.gateway.tools import forced_tool_choice
from llm_api_server.gateway.tools.forced_tool_choice import ForcedCallStream
from llm_api_server.gateway.wire import rewrite, schemas, token_estimates
from llm_api_server.gateway.wire.endpoints import Endpoint
from llm_api_server.gateway.wire.engine_errors import NO_CHAT_TEMPLATE
from llm_api_server.gateway.wire.multipart import Form
from llm_api_server.gateway.wire.request import read_request
from llm_api_server.gateway.wire.responses import (
    EVENT_STREAM,
    FIRST_ERROR_STATUS,
    JSON,
    AssembledResponse,
    ConvertedResponse,
    EngineResponse,
    ErrorResponse,
    PlainResponse,
    StreamResponse,
)
from llm_api_server.gateway.wire.stream_reader import StreamReader, message_start
from llm_api_server.gateway.wire.validation import check_supported
from llm_api_server.http_client.address import encode_head
from llm_api_server.ipc.lease_messages import Claim, InstanceInfo

if TYPE_CHECKING:
    from llm_api_server.gateway.proxy.services import ProxyServices

_CHAT = frozenset({"chat", "responses", "messages"})


class EngineRequest:
    """Raises `InvalidRequest` for a body of a wrong shape."""

    _form: Form | None = None
    #: What the engine is told of the trace that this belongs to.
    trace_lines = b""
    route: ResolvedModel

    def __init__(
        self, endpoint: Endpoint, head: RequestHead, body: bytes, *, streaming_default: bool, may_fetch: bool
    ) -> None:
        self._endpoint = endpoint
        self._head = head
        self.body = body
        if endpoint.request is None:
            self._form = Form(head.get(b"content-type"), body)
            self.facts = self._form.read()
        else:
            by_default = streaming_default and EVENT_STREAM in head.get(b"accept")
            self.facts = read_request(endpoint, body, stream_by_default=by_default, may_fetch=may_fetch)
        request = self.facts.request
        self._is_chat = isinstance(request, schemas.ChatRequest)
        self._is_forced_choice = (
            isinstance(request, schemas.ChatRequest)
            and request.tool_choice is not None
            and forced_tool_choice.is_forced(self.facts)
        )

    def check(self, limits: InferenceConfig) -> None:
        """Whether the model can do that, as far as it is known. Raises `ApiError`."""
        route = self.route
        if not route.is_checked:
            self._check_endpoint(route)
            route.is_checked = True
        if self.facts.media:
            self._check_media(limits)

    def _check_endpoint(self, route: ResolvedModel) -> None:
        if route.adapter and self._endpoint.task not in {None, "generate"}:
            raise NotSupported(f"The adapter '{route.adapter}' generates text only; ask '{route.model}' for this.")
        # llama.cpp would chat with words that the model was never taught; vLLM refuses by itself.
        has_no_template = route.status is not None and route.status.chat_template is False
        if has_no_template and self._endpoint.permission in _CHAT:
            raise NotSupported(NO_CHAT_TEMPLATE)

    def _check_media(self, limits: InferenceConfig) -> None:
        check_images(self.facts.media, limit=limits.max_images, pixels=limits.max_image_pixels)
        status = self.route.status
        if status is None or status.vision is not False:
            return
        for media in self.facts.media:
            if media.kind == "image":
                raise NotSupported(f"The model '{self.route.model}' cannot see images.", param=media.param)

    def answer_tokens(self) -> tuple[int, int]:
        """That the answer may have as the request says, and as it leaves open."""
        return token_estimates.output_tokens(self._endpoint, self.facts, self.route.context_length)

    def claim(self, key: Key, prompt_tokens: int) -> Claim:
        """What it asks of an instance, and for whom."""
        request = self.facts.request
        is_light = self._endpoint.task is None or isinstance(request, schemas.CountTokensRequest)
        stated, spare = self.answer_tokens()
        is_batch = key.priority_class == "batch" or getattr(request, "service_tier", None) == "flex"
        work = 0 if is_light else token_estimates.expected_cost(prompt_tokens, stated, spare)
        reads = prompt_tokens if self._endpoint.streams and not is_light else 0
        return Claim(key.key_id, key.priority, work, reads, is_batch, is_light)

    def prompt_text(self) -> str | None:
        """For those who keep prompts; None where there is no text."""
        return token_estimates.prompt_text(self.body) if self._form is None else None

    async def encode(self, instance: InstanceInfo, row: str, proxy: ProxyServices) -> bytes:
        """The request as this instance gets it, under the name `row`. Raises `ApiError` where it cannot do that."""
        check_supported(self.facts.request, instance.engine)
        body = self._body_for(instance, row)
        if self._is_forced(instance):
            knows_tools = await proxy.templates.knows_tools(instance)
            body = rewrite.rewrite(body, forced_tool_choice.changes(self.facts, body, knows_tools=knows_tools))
        if self.is_translated(instance):
            body = await tokenize_adapter.question(proxy.upstream, self.facts, instance, body)
        if proxy.limits.may_exceed(self.facts, instance, body):
            await proxy.limits.check(self.facts, instance, body)
        return self._framed(instance, row, body)

    def encode_at_once(self, instance: InstanceInfo, row: str, proxy: ProxyServices) -> bytes | None:
        """As `encode`; None where the instance must be asked something first."""
        if self._is_forced_choice or self._endpoint.task is None:
            return None
        if not self._is_chat:
            check_supported(self.facts.request, instance.engine)
        body = self._body_for(instance, row)
        return None if proxy.limits.may_exceed(self.facts, instance, body) else self._framed(instance, row, body)

    def answer(self, status: int, headers: dict[str, str], instance: InstanceInfo) -> EngineResponse:
        """What becomes of the answer of `instance` that begins so."""
        kind = headers.get("content-type")
        if status >= FIRST_ERROR_STATUS:
            return ErrorResponse(status, headers)
        if self._endpoint.task is None and self.is_translated(instance):
            return ConvertedResponse(partial(tokenize_adapter.answer, self.facts, instance))
        if kind is None or not kind.startswith(EVENT_STREAM):
            return PlainResponse(status, headers)
        if self.facts.stream:
            return StreamResponse(self._reader(instance, show_usage=self.facts.wants_usage), self._endpoint.dialect)
        return AssembledResponse(self._reader(instance, show_usage=True), self._endpoint.dialect)

    def _reader(self, instance: InstanceInfo, *, show_usage: bool) -> StreamReader:
        choices = getattr(self.facts.request, "n", None) or 1
        if self._is_forced(instance):
            return ForcedCallStream(show_usage=show_usage, choices=choices)
        if self._endpoint.dialect == "anthropic":
            return StreamReader("anthropic", opening=self._opening(instance))
        is_chat = self._endpoint.permission == "chat"
        return StreamReader(self._endpoint.dialect, show_usage=show_usage, is_chat=is_chat, choices=choices)

    def _opening(self, instance: InstanceInfo) -> bytes:
        """Engines that leave it out tell no prompt tokens either, so they are estimated."""
        prompt = token_estimates.prompt_tokens(self._endpoint, self.facts, len(self.body))
        return message_start(f"msg_{uuid4().hex}", instance.model, prompt)

    def is_translated(self, instance: InstanceInfo) -> bool:
        """Whether the instance has the endpoint in a form of its own."""
        return tokenize_adapter.is_translated(self.facts, instance)

    def _framed(self, instance: InstanceInfo, row: str, body: bytes) -> bytes:
        heads = self.route.heads
        head = heads.get(instance.id)
        if head is None:
            head = heads[instance.id] = self._head_for(instance)
        if instance.engine == "remote":
            return b"%b%bcontent-length: %d\r\n\r\n%b" % (head, self.trace_lines, len(body), body)
        lines = b"%bx-request-id: %b\r\n%bcontent-length: %d\r\n\r\n%b"
        return lines % (head, row.encode(), self.trace_lines, len(body), body)

    def _head_for(self, instance: InstanceInfo) -> bytes:
        """What is the same for all requests with this head."""
        headers = {
            "accept": self._head.get(b"accept", "*/*"),
            "content-type": JSON if self._form is None else self._head.get(b"content-type"),
        }
        headers |= instance.headers
        if instance.engine == "remote":
            headers |= self._api_headers()
        return encode_head(instance.address, self._endpoint.path_on(instance.engine), headers)

    def _api_headers(self) -> dict[str, str]:
        """Anthropic's version headers choose the form of an answer, so a remote gets the client's."""
        if self._endpoint.dialect != "anthropic":
            return {}
        names = ("anthropic-version", "anthropic-beta")
        return {name: self._head.get(name.encode()) for name in names if name.encode() in self._head.headers}

    def _body_for(self, instance: InstanceInfo, row: str) -> bytes:
        """The body as this instance must see it; the client's own where nothing has to change."""
        facts, endpoint = self.facts, self._endpoint
        name = self.route.adapter or instance.upstream_model or instance.model
        if self._form is not None:
            return self._form.with_fields({"model": name}) if facts.model != name else self.body
        changes: dict[str, Any] = {}
        if endpoint.task is None:
            changes = rewrite.tokenize_changes(facts, instance.engine)
        if facts.model != name:
            changes["model"] = name
        streams = self.streams_from(instance)
        if not facts.is_stream_set or streams != facts.stream:
            changes["stream"] = streams
        if streams and endpoint.dialect == "openai" and not facts.wants_usage:
            changes["stream_options"] = rewrite.with_usage_included(facts, self.body)
        if endpoint.dialect == "responses" and instance.engine == "vllm":
            changes["request_id"] = f"resp_{row}"
        if facts.has_developer_role and instance.engine != "remote" and not self.route.knows_developer:
            changes.update(rewrite.developer_changes(facts, self.body))
        return rewrite.rewrite(self.body, changes) if changes else self.body

    def streams_from(self, instance: InstanceInfo) -> bool:
        """Whether the instance is asked for a stream.

        Some plain answers are made from one: llama.cpp notices only then when the client leaves.
        """
        if self.facts.stream or not self._endpoint.streams:
            return self.facts.stream
        return instance.engine == "llama_cpp" or (self._is_forced_choice and instance.engine != "remote")

    def _is_forced(self, instance: InstanceInfo) -> bool:
        """Whether a tool call is demanded of an engine that would not hold itself to it."""
        return self._is_forced_choice and instance.engine != "remote"
