"""Reading a request body into `RequestFacts`. Pure.

Only the members that `schemas` declares are checked; all others pass to the engine unread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec

from llm_api_server.errors import InvalidRequest
from llm_api_server.gateway.media.content_parts import Media, find_media, may_have_media
from llm_api_server.gateway.wire import normalization, schemas
from llm_api_server.gateway.wire.endpoints import Endpoint
from llm_api_server.gateway.wire.validation import (
    check_chat,
    check_request,
    check_schema_limits,
    may_have_schema_limits,
    schema_error,
)

#: In longer bodies a search for member names takes longer than decoding.
MAX_SEARCHED_BYTES = 16 * 1024
#: OpenAI's `max_tokens` of a completion that names none; llama.cpp's is the rest of the context.
_COMPLETION_TOKENS = 16
_NO_CHANGES: Mapping[str, Any] = MappingProxyType({})


class RequestFacts(msgspec.Struct):
    """Facts about one request that decide its way.

    `stream` is the effective value, with defaults applied. `is_stream_set` is False where the body has another value.
    `request` is None for a multipart form. `changes` are the members of the body in which it differs from `request`.
    """

    request: schemas.Request | None
    model: str | None
    stream: bool = False
    is_stream_set: bool = True
    wants_usage: bool = False
    max_tokens: int | None = None
    media: Sequence[Media] = ()
    has_developer_role: bool = False
    changes: Mapping[str, Any] = _NO_CHANGES


def read_request(
    endpoint: Endpoint, body: bytes, *, stream_by_default: bool = False, may_fetch: bool = False
) -> RequestFacts:
    """Decode and check a JSON body. Raises `InvalidRequest` with OpenAI's `param`.

    Engines answer some wrong bodies with status 500 and ignore others, so none of them may reach an engine.
    """
    assert endpoint.request is not None, "multipart endpoints are read by multipart.py"
    media: Sequence[Media] = ()
    changes: dict[str, Any] = {}
    try:
        request = _read_plain(endpoint, body)
        if request is None:
            content = msgspec.json.decode(body)
            normal, request = _convert(content, endpoint.request, has_null=body.find(b"null") >= 0)
            changes = normalization.member_changes(content, normal)
            media = find_media(normal, may_fetch=may_fetch)
            check_schema_limits(normal)
    except msgspec.ValidationError as error:
        raise schema_error(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"We could not parse the JSON body of your request: {error}.") from error
    except RecursionError as error:
        raise InvalidRequest("The JSON body of your request is nested too deeply.") from error
    if request.model == "":
        raise InvalidRequest("Invalid 'model': expected a model's name.", param="model")
    requested, options, has_developer_role = None, None, False
    if isinstance(request, schemas.ChatRequest):
        has_developer_role, has_replayed = check_chat(request)
        if has_replayed:
            changes |= normalization.replayed_changes(body, changes.get("messages"))
        if request.stop is not None:
            _drop_empty_stops(request, "stop", changes)
        max_tokens = request.max_completion_tokens or request.max_tokens
        requested, options = request.stream, request.stream_options
    else:
        check_request(request)
        _change(request, changes)
        max_tokens = _max_tokens(request)
        if isinstance(request, schemas.Sampling):
            requested, options = request.stream, request.stream_options
        elif isinstance(request, schemas.MessagesRequest):
            requested = request.stream
    stream = endpoint.streams and (stream_by_default if requested is None else requested)
    if options is not None and not stream:
        raise InvalidRequest("'stream_options' is only allowed when 'stream' is true.", param="stream_options")
    wants_usage = options is not None and options.include_usage is True
    is_stream_set = bool(requested) == stream
    return RequestFacts(
        request, request.model, stream, is_stream_set, wants_usage, max_tokens, media, has_developer_role, changes
    )


def _read_plain(endpoint: Endpoint, body: bytes) -> schemas.Request | None:
    """Return the request of a body that needs no search and no change; None: unknown."""
    if len(body) >= MAX_SEARCHED_BYTES or may_have_media(body) or may_have_schema_limits(body):
        return None
    if body.find(b"null") >= 0:
        return None
    body.decode()
    try:
        return endpoint.decoder.decode(body)
    except msgspec.ValidationError:
        return None


def _convert(content: Any, kind: type[schemas.Request], *, has_null: bool) -> tuple[Any, schemas.Request]:
    """Return the content of a body, normalized where that is needed to read it, and its request."""
    if not has_null:
        try:
            return content, msgspec.convert(content, kind)
        except msgspec.ValidationError:
            pass  # perhaps a whole number is written as 8.0
    normal = normalization.normalized(content, kind)
    return normal, msgspec.convert(normal, kind)


def _change(request: schemas.Request, changes: dict[str, Any]) -> None:
    """Apply the rules that engines do not share to `request`, and add the changes of the body."""
    match request:
        case schemas.CompletionRequest():
            if request.max_tokens is None:
                request.max_tokens = changes["max_tokens"] = _COMPLETION_TOKENS
            _drop_empty_stops(request, "stop", changes)
        case schemas.ResponsesRequest():
            if isinstance(request.input, list):
                changes |= normalization.replayed_items(request.input)
            _drop_empty_stops(request, "stop", changes)
        case schemas.MessagesRequest():
            _drop_empty_stops(request, "stop_sequences", changes)
            _drop_empty_stops(request, "stop", changes)


def _drop_empty_stops(request: schemas.Request, name: str, changes: dict[str, Any]) -> None:
    given = getattr(request, name)
    if given is None:
        return
    kept = normalization.without_empty_stops(given)
    if kept != given:
        changes[name] = kept
        setattr(request, name, None if kept is msgspec.UNSET else kept)


def _max_tokens(request: schemas.Request) -> int | None:
    match request:
        case schemas.CompletionRequest() | schemas.MessagesRequest():
            return request.max_tokens
        case schemas.ResponsesRequest():
            return request.max_output_tokens
    return None
