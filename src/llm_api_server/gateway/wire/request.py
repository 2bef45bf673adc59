"""Reading a request body into `RequestFacts`. Pure.

Only the members that `schemas` declares are checked; all others pass to the engine unread.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from llm_api_server.errors import InvalidRequest
from llm_api_server.gateway.media.content_parts import Media, find_media, may_have_media
from llm_api_server.gateway.wire import schemas
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


class RequestFacts(msgspec.Struct):
    """Facts about one request that decide its way.

    `stream` is the effective value, with defaults applied. `is_stream_set` is False where the body has another value.
    `request` is None for a multipart form.
    """

    request: schemas.Request | None
    model: str | None
    stream: bool = False
    is_stream_set: bool = True
    wants_usage: bool = False
    max_tokens: int | None = None
    media: Sequence[Media] = ()
    has_developer_role: bool = False


def read_request(
    endpoint: Endpoint, body: bytes, *, stream_by_default: bool = False, may_fetch: bool = False
) -> RequestFacts:
    """Decode and check a JSON body. Raises `InvalidRequest` with OpenAI's `param`.

    Engines answer some wrong bodies with status 500 and ignore others, so none of them may reach an engine.
    """
    assert endpoint.request is not None, "multipart endpoints are read by multipart.py"
    media: Sequence[Media] = ()
    try:
        if len(body) < MAX_SEARCHED_BYTES and not (may_have_media(body) or may_have_schema_limits(body)):
            body.decode()
            request = endpoint.decoder.decode(body)
        else:
            content = msgspec.json.decode(body)
            request = msgspec.convert(content, endpoint.request)
            media = find_media(content, may_fetch=may_fetch)
            check_schema_limits(content)
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
        has_developer_role = check_chat(request)
        max_tokens = request.max_completion_tokens or request.max_tokens
        requested, options = request.stream, request.stream_options
    else:
        check_request(request)
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
        request, request.model, stream, is_stream_set, wants_usage, max_tokens, media, has_developer_role
    )


def _max_tokens(request: schemas.Request) -> int | None:
    match request:
        case schemas.CompletionRequest() | schemas.MessagesRequest():
            return request.max_tokens
        case schemas.ResponsesRequest():
            return request.max_output_tokens
    return None
