"""A client's request as engines get it, and the kind of response that it leads to. Pure."""

from __future__ import annotations

import time
from functools import partial
from typing import Any
from uuid import uuid4

from llm_api_server.auth.access import Key
from llm_api_server.config.models import InferenceConfig
from llm_api_server.errors import BadEngineResponse, NotSupported
from llm_api_server.gateway.engine_calls import tokenize_adapter
from llm_api_server.gateway.http.request_head import RequestHead
from llm_api_server.gateway.media.content_parts import check_images
from llm_api_server.gateway.proxy.head_decisions import ResolvedModel, decisions_of
from llm_api_server.gateway.tools import forced_tool_choice
from llm_api_server.gateway.tools.forced_tool_choice import ForcedCallStream
from llm_api_server.gateway.wire import rewrite, schemas, token_estimates
from llm_api_server.gateway.wire.engine_errors import NO_CHAT_TEMPLATE, retry_after_seconds
from llm_api_server.gateway.wire.multipart import Form
from llm_api_server.gateway.wire.remote_stream import RemoteStreamReader
from llm_api_server.gateway.wire.request import RequestFacts
from llm_api_server.gateway.wire.responses import (
    EVENT_STREAM,
    FIRST_ERROR_STATUS,
    JSON,
    AssembledResponse,
    CheckedResponse,
    ConvertedResponse,
    EngineResponse,
    ErrorResponse,
    PlainResponse,
    StreamResponse,
)
from llm_api_server.gateway.wire.stream_reader import StreamReader, message_start
from llm_api_server.http_client.address import encode_head
from llm_api_server.ipc.lease_messages import Claim, InstanceInfo

_FIRST_REDIRECT = 300
#: Statuses of success without a response.
_WITHOUT_BODY = frozenset({204, 205})
#: Types of a body that is no event stream, whatever was asked for.
_PLAIN_KINDS = (JSON, "text/html", "application/problem+json")
_CHAT = frozenset({"chat", "responses", "messages"})


class EngineRequest:
    """Body and facts of a request, with the model that it is for. `form` is set for multipart bodies.

    `row` identifies it in the ledger and at the engine, and is set when it is admitted. `trace_lines` are the headers
    of its trace. Unless `may_need_adapting`, every instance of its model supports it unadapted.
    """

    __slots__ = (
        "_form", "_head", "_is_forced", "body", "endpoint", "facts", "key", "may_need_adapting", "model",
        "prompt_tokens", "row", "trace_lines",
    )  # fmt: skip

    def __init__(
        self, head: RequestHead, key: Key, body: bytes, facts: RequestFacts, model: ResolvedModel, form: Form | None
    ) -> None:
        endpoint = self.endpoint = decisions_of(head).endpoint
        self.key = key
        self.body = body
        self.facts = facts
        self.model = model
        self.prompt_tokens = token_estimates.prompt_tokens(endpoint, facts, len(body))
        self.row = ""
        self.trace_lines = b""
        self._head = head
        self._form = form
        request = facts.request
        #: Whether a tool call is demanded, which some engines do not enforce.
        self._is_forced = False
        self.may_need_adapting = True
        if isinstance(request, schemas.ChatRequest):
            self._is_forced = self.may_need_adapting = request.tool_choice is not None and forced_tool_choice.is_forced(
                facts
            )

    def check(self, inference: InferenceConfig) -> None:
        """Raise `ApiError` if the model is known not to support the request."""
        model = self.model
        if not model.is_checked:
            if model.adapter and self.endpoint.task not in {None, "generate"}:
                raise NotSupported(f"The adapter '{model.adapter}' generates text only; use '{model.model}' for this.")
            # llama.cpp would chat in a format that the model was never trained on; vLLM refuses by itself.
            has_no_template = model.status is not None and model.status.chat_template is False
            if has_no_template and self.endpoint.permission in _CHAT:
                raise NotSupported(NO_CHAT_TEMPLATE)
            model.is_checked = True
        if self.facts.media:
            self._check_media(inference)

    def _check_media(self, inference: InferenceConfig) -> None:
        check_images(self.facts.media, limit=inference.max_images, pixels=inference.max_image_pixels)
        status = self.model.status
        if status is None or status.vision is not False:
            return
        for media in self.facts.media:
            if media.kind == "image":
                raise NotSupported(f"The model '{self.model.model}' cannot see images.", param=media.param)

    def output_tokens(self) -> tuple[int, int]:
        """Return the output tokens that the request asks for, and those that it leaves optional."""
        return token_estimates.output_tokens(self.endpoint, self.facts, self.model.context_length)

    def claim(self) -> Claim:
        """Return the cost and the priority that the manager schedules the request by."""
        request, key = self.facts.request, self.key
        is_light = self.endpoint.task is None or isinstance(request, schemas.CountTokensRequest)
        requested, optional = self.output_tokens()
        is_batch = key.priority_class == "batch" or getattr(request, "service_tier", None) == "flex"
        cost = 0 if is_light else token_estimates.expected_cost(self.prompt_tokens, requested, optional)
        prefill_tokens = self.prompt_tokens if self.endpoint.streams and not is_light else 0
        return Claim(key.key_id, key.priority, cost, prefill_tokens, is_batch, is_light)

    def prompt_text(self) -> str | None:
        """Return the text of the prompt for its row; None if there is none."""
        return token_estimates.prompt_text(self.body) if self._form is None else None

    def streams_from(self, instance: InstanceInfo) -> bool:
        """Return whether the instance is asked for a stream.

        Some JSON responses are assembled from one: llama.cpp notices a disconnect only while it streams.
        """
        if self.facts.stream or not self.endpoint.streams:
            return self.facts.stream
        return instance.engine == "llama_cpp" or self.is_forced_at(instance)

    def is_forced_at(self, instance: InstanceInfo) -> bool:
        """Return whether a tool call is demanded of an engine that does not enforce it."""
        return self._is_forced and instance.engine != "remote"

    def is_translated_at(self, instance: InstanceInfo) -> bool:
        """Return whether the instance serves the endpoint in a format of its own."""
        return self.endpoint.task is None and tokenize_adapter.is_translated(self.facts, instance)

    # The request to an instance.

    def body_for(self, instance: InstanceInfo) -> bytes:
        """Return the body with what this instance needs changed; usually the client's own."""
        facts, endpoint = self.facts, self.endpoint
        name = self.model.adapter or instance.upstream_model or instance.model
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
            changes["request_id"] = f"resp_{self.row}"
        if facts.has_developer_role and instance.engine != "remote" and not self.model.knows_developer:
            changes.update(rewrite.developer_changes(facts, self.body))
        return rewrite.rewrite(self.body, changes) if changes else self.body

    def frame(self, instance: InstanceInfo, body: bytes) -> bytes:
        """Return head and body for this instance."""
        heads = self.model.heads
        head = heads.get(instance.id)
        if head is None:
            head = heads[instance.id] = self._head_for(instance)
        if instance.engine == "remote":
            return b"%b%bcontent-length: %d\r\n\r\n%b" % (head, self.trace_lines, len(body), body)
        lines = b"%bx-request-id: %b\r\n%bcontent-length: %d\r\n\r\n%b"
        return lines % (head, self.row.encode(), self.trace_lines, len(body), body)

    def _head_for(self, instance: InstanceInfo) -> bytes:
        """Return the lines that all requests with this head share."""
        headers = {
            "accept": self._head.get(b"accept", "*/*"),
            "content-type": JSON if self._form is None else self._head.get(b"content-type"),
        }
        headers |= instance.headers
        if instance.engine == "remote" and self.endpoint.dialect == "anthropic":
            # Anthropic's version headers select the form of a response, so a remote gets the client's.
            for name in ("anthropic-version", "anthropic-beta"):
                if name.encode() in self._head.headers:
                    headers[name] = self._head.get(name.encode())
        return encode_head(instance.address, self.endpoint.path_on(instance.engine), headers)

    # The response from an instance.

    def response(self, status: int, headers: dict[str, str], instance: InstanceInfo) -> EngineResponse:
        """Return the reader for a response that begins with this head. Raises `BadEngineResponse`."""
        coding = headers.get("content-encoding")
        if status >= FIRST_ERROR_STATUS:
            retry_after = retry_after_seconds(headers.get("retry-after"), time.time())
            return ErrorResponse(status, retry_after=retry_after, is_readable=coding is None)
        if instance.engine == "remote":
            return self._remote_response(status, headers, instance)
        if self.may_need_adapting and self.is_translated_at(instance):
            return ConvertedResponse(partial(tokenize_adapter.from_llama_cpp, self.facts, instance))
        kind = headers.get("content-type")
        if kind is None or not kind.startswith(EVENT_STREAM):
            return PlainResponse(status, headers)
        if self.facts.stream:
            return StreamResponse(self._reader(instance, show_usage=self.facts.wants_usage), self.endpoint.dialect)
        return AssembledResponse(self._reader(instance, show_usage=True), self.endpoint.dialect)

    def _remote_response(self, status: int, headers: dict[str, str], instance: InstanceInfo) -> EngineResponse:
        """Return the reader for a remote's response, which is checked as far as possible."""
        source = f"The upstream of the model '{self.model.model}'"
        if (coding := headers.get("content-encoding")) is not None:
            raise BadEngineResponse(f"{source} compressed its response ({coding!r:.40}), which was not asked for.")
        if status >= _FIRST_REDIRECT:
            raise BadEngineResponse(
                f"{source} responded with a redirect (status {status}); the operator of this server has to set the "
                "model's path to the final URL."
            )
        if status in _WITHOUT_BODY:
            raise BadEngineResponse(f"{source} responded with status {status} and no body.")
        kind = headers.get("content-type", "").lower()
        is_json = kind.startswith(_PLAIN_KINDS)
        if kind.startswith(EVENT_STREAM) or (self.facts.stream and not is_json):
            show_usage = self.facts.wants_usage or not self.facts.stream
            reader = self._reader(instance, show_usage=show_usage)
            if self.facts.stream:
                return StreamResponse(reader, self.endpoint.dialect)
            return AssembledResponse(reader, self.endpoint.dialect)
        if self._form is not None and not is_json:  # a transcript may be any text, or none
            return PlainResponse(200, headers)
        return CheckedResponse(
            source,
            has_choices=isinstance(self.facts.request, schemas.ChatRequest | schemas.CompletionRequest),
            is_list_allowed=self.endpoint.task != "generate",
            expects_stream=self.facts.stream,
        )

    def _reader(self, instance: InstanceInfo, *, show_usage: bool) -> StreamReader:
        choices = getattr(self.facts.request, "n", None) or 1
        reader = RemoteStreamReader if instance.engine == "remote" else StreamReader
        if self.is_forced_at(instance):
            return ForcedCallStream(show_usage=show_usage, choices=choices)
        if self.endpoint.dialect == "anthropic":
            # Engines that leave out the opening event report no prompt tokens either, so these are estimated.
            opening = message_start(f"msg_{uuid4().hex}", instance.model, self.prompt_tokens)
            return reader("anthropic", opening=opening)
        is_chat = self.endpoint.permission == "chat"
        return reader(self.endpoint.dialect, show_usage=show_usage, is_chat=is_chat, choices=choices)
