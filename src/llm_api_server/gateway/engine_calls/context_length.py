"""Limits on the tokens of a prompt, counted by the engine's own tokenizer if its bytes alone do not settle them.

An engine that cannot count a prompt has to refuse it itself.
"""

from __future__ import annotations

from typing import Any

import msgspec

from llm_api_server.config.models import InferenceConfig
from llm_api_server.errors import ContextLengthExceeded
from llm_api_server.gateway.wire import schemas
from llm_api_server.gateway.wire.request import RequestFacts
from llm_api_server.http_client.client import HttpClient
from llm_api_server.http_client.response import UpstreamError
from llm_api_server.ipc.lease_messages import InstanceInfo

_JSON = "application/json"
_MAX_RESPONSE_BYTES = 256 * 1024 * 1024


class ContextLimits:
    """Refuses prompts that cannot fit before the engine spends time on them."""

    def __init__(self, inference: InferenceConfig, client: HttpClient) -> None:
        self._max_input = inference.max_input_tokens
        self._max_total = inference.max_total_tokens
        self._client = client

    def may_exceed(self, facts: RequestFacts, instance: InstanceInfo, body: bytes) -> bool:
        """Return whether `check` must ask the engine: short bodies fit by their bytes alone."""
        most, own, wanted = self._max_input, instance.context_length, facts.max_tokens or 1
        if facts.media:
            # Images may have more tokens than bytes. vLLM counts them by processing them once more, so only for the
            # limit that it does not enforce by itself.
            return most is not None and instance.engine == "vllm"
        size = len(body)  # a token is at least one byte
        is_short = (
            (most is None or size <= most)
            and (own is None or size + wanted <= own)
            and (self._max_total is None or size + wanted <= self._max_total)
        )
        return not is_short and instance.engine != "remote"

    async def check(self, facts: RequestFacts, instance: InstanceInfo, body: bytes) -> None:
        """Raise `ContextLengthExceeded` if the prompt exceeds a limit. `body` is what the engine will get."""
        if not self.may_exceed(facts, instance, body):
            return
        count = await self._count(facts.request, instance, body)
        total = self._total(instance)
        if count is not None and not _fits(count, _wanted(facts), self._max_input, total):
            raise _exceeded(count, facts, self._max_input, total)

    def _total(self, instance: InstanceInfo) -> int | None:
        total, own = self._max_total, instance.context_length
        return own if total is None or (own is not None and own < total) else total

    async def _count(self, request: schemas.Request | None, instance: InstanceInfo, body: bytes) -> int | None:
        """Return the tokens of the prompt; None if this engine cannot count them."""
        match request:
            case schemas.ChatRequest():
                return await self._count_messages(instance, body)
            case schemas.CompletionRequest():
                return await self._count_texts(instance, request.prompt)
            case schemas.EmbeddingRequest() if request.input is not None:
                return await self._count_texts(instance, request.input)
            case schemas.ResponsesRequest():
                return await self._count_messages(instance, msgspec.json.encode({"messages": _as_messages(request)}))
            case schemas.MessagesRequest():
                reply = await self._ask(instance, "/v1/messages/count_tokens", body)
                count = reply.get("input_tokens")
                return count if isinstance(count, int) else None
        return None

    async def _count_messages(self, instance: InstanceInfo, body: bytes) -> int | None:
        if instance.engine == "vllm":
            return _length(await self._ask(instance, "/tokenize", body))
        prompt = (await self._ask(instance, "/apply-template", body)).get("prompt")
        return await self._count_text(instance, prompt) if isinstance(prompt, str) else None

    async def _count_texts(self, instance: InstanceInfo, prompt: str | list[str | int | list[int]]) -> int | None:
        """Return the tokens of the longest prompt: each has a context of its own."""
        if isinstance(prompt, str):
            return await self._count_text(instance, prompt)
        if all(isinstance(item, int) for item in prompt):
            return len(prompt)
        longest = max(prompt, key=lambda item: len(item) if isinstance(item, str | list) else 1)
        return await self._count_text(instance, longest) if isinstance(longest, str) else _size(longest)

    async def _count_text(self, instance: InstanceInfo, text: str) -> int | None:
        if instance.engine == "vllm":
            wanted: dict[str, Any] = {"model": instance.upstream_model or instance.model, "prompt": text}
        else:
            wanted = {"content": text, "add_special": True, "parse_special": True}
        return _length(await self._ask(instance, "/tokenize", msgspec.json.encode(wanted)))

    async def _ask(self, instance: InstanceInfo, path: str, body: bytes) -> dict[str, Any]:
        """Return the engine's response; empty on failure, so that the engine decides without our count."""
        try:
            response = await self._client.post(
                instance.address, path, body, content_type=_JSON, headers=instance.headers
            )
            content = await response.read_all(_MAX_RESPONSE_BYTES)
        except UpstreamError:
            return {}
        if response.status != 200:  # noqa: PLR2004
            return {}
        try:
            return msgspec.json.decode(content, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError):
            return {}


def _wanted(facts: RequestFacts) -> int:
    """Return the output tokens that the context must have left: at least one, none for embeddings."""
    return 0 if isinstance(facts.request, schemas.EmbeddingRequest) else max(facts.max_tokens or 0, 1)


def _fits(prompt_tokens: int, wanted: int, max_input: int | None, total: int | None) -> bool:
    if max_input is not None and prompt_tokens > max_input:
        return False
    return total is None or prompt_tokens + wanted <= total


def _exceeded(
    prompt_tokens: int, facts: RequestFacts, max_input: int | None, total: int | None
) -> ContextLengthExceeded:
    param = "prompt" if isinstance(facts.request, schemas.CompletionRequest) else "messages"
    if isinstance(facts.request, schemas.EmbeddingRequest | schemas.ResponsesRequest):
        param = "input"
    if max_input is not None and prompt_tokens > max_input:
        return ContextLengthExceeded(
            f"At most {max_input} input tokens are allowed. However, your {param} resulted in {prompt_tokens} tokens. "
            f"Please reduce the length of the {param}.",
            param=param,
        )
    wanted = facts.max_tokens or 0
    requested = (
        f"you requested {prompt_tokens + wanted} tokens ({prompt_tokens} in the {param}, {wanted} in the completion)"
        if wanted
        else f"your {param} resulted in {prompt_tokens} tokens"
    )
    return ContextLengthExceeded(
        f"This model's maximum context length is {total} tokens. However, {requested}. "
        f"Please reduce the length of the {param}{' or completion' if wanted else ''}.",
        param=param,
    )


def _as_messages(request: schemas.ResponsesRequest) -> list[dict[str, Any]]:
    """Return the chat that a Responses request becomes, approximately."""
    messages: list[dict[str, Any]] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    for item in request.input:
        content = item.get("content", item.get("output", item.get("arguments", "")))
        role = item.get("role")
        messages.append({"role": role if role in ("system", "assistant") else "user", "content": _as_content(content)})
    return messages


def _as_content(content: Any) -> str | list[dict[str, Any]]:
    """Return plain text if there are no images, for templates that do not support parts."""
    if not isinstance(content, list):
        return str(content)
    parts = [part for part in content if isinstance(part, dict)]
    if not any("image_url" in part for part in parts):
        return "".join(str(part.get("text", "")) for part in parts)
    return [
        {"type": "image_url", "image_url": {"url": part["image_url"]}}
        if "image_url" in part
        else {"type": "text", "text": str(part.get("text", ""))}
        for part in parts
    ]


def _length(reply: dict[str, Any]) -> int | None:
    """Return vLLM's `count`, or the number of tokens."""
    count, tokens = reply.get("count"), reply.get("tokens")
    if isinstance(count, int):
        return count
    return len(tokens) if isinstance(tokens, list) else None


def _size(prompt: list[int] | int) -> int:
    return len(prompt) if isinstance(prompt, list) else 1
