"""Changes to a request body before it goes to an engine. Pure. Members that do not change keep their bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from llm_api_server.gateway.wire import schemas
from llm_api_server.gateway.wire.request import MAX_SEARCHED_BYTES, RequestFacts
from llm_api_server.types import EngineName

#: An escape may hide a member name.
_ESCAPED_ASCII = b"\\u00"


class _StreamOptionsOnly(msgspec.Struct):
    stream_options: dict[str, Any] | None = None


class _MessagesOnly(msgspec.Struct):
    messages: list[dict[str, msgspec.Raw]]


def rewrite(body: bytes, changes: Mapping[str, Any]) -> bytes:
    """Return `body` with top-level members replaced or added; `msgspec.UNSET` removes a member."""
    if not changes:
        return body
    if _certainly_lacks(body, changes):
        return b"%b,%b" % (body.rstrip()[:-1], msgspec.json.encode(changes)[1:])
    members: dict[str, Any] = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    members.update(changes)
    return msgspec.json.encode({key: value for key, value in members.items() if value is not msgspec.UNSET})


def _certainly_lacks(body: bytes, changes: Mapping[str, Any]) -> bool:
    """Return whether `body` is a non-empty object with none of these members, so they can be appended."""
    if len(body) > MAX_SEARCHED_BYTES or body.find(b'"') < 0 or body.find(_ESCAPED_ASCII) >= 0:
        return False
    return all(body.find(b'"%b"' % name.encode()) < 0 and value is not msgspec.UNSET for name, value in changes.items())


def with_usage_included(facts: RequestFacts, body: bytes) -> dict[str, Any]:
    """Return the `stream_options` of `body` with `include_usage` set."""
    if isinstance(facts.request, schemas.Sampling) and facts.request.stream_options is None:
        return {"include_usage": True}
    options = msgspec.json.decode(body, type=_StreamOptionsOnly).stream_options or {}
    return {**options, "include_usage": True}


def developer_changes(facts: RequestFacts, body: bytes) -> dict[str, Any]:
    """Return `messages` with the role `developer` renamed to `system`, the only name most chat templates know."""
    request = facts.request
    if not facts.has_developer_role or not isinstance(request, schemas.ChatRequest):
        return {}
    messages = msgspec.json.decode(body, type=_MessagesOnly).messages
    for read, message in zip(request.messages, messages, strict=True):
        if read.role == "developer":
            message["role"] = msgspec.Raw(b'"system"')
    return {"messages": messages}


def tokenize_changes(facts: RequestFacts, engine: EngineName) -> dict[str, Any]:
    """Rename `content` (llama.cpp's name for the text) to `prompt` for vLLM; clients may send either."""
    request = facts.request
    if not isinstance(request, schemas.TokenizeRequest) or engine != "vllm":
        return {}
    if request.prompt is None and request.content is not None:
        return {"prompt": request.content, "content": msgspec.UNSET}
    return {}
