"""`/tokenize` and `/detokenize` of llama.cpp in vLLM's format, so that clients need only one."""

from __future__ import annotations

from typing import Any

import msgspec

from llm_api_server.errors import EngineError
from llm_api_server.gateway.wire import schemas
from llm_api_server.gateway.wire.engine_errors import translate_error
from llm_api_server.gateway.wire.request import RequestFacts
from llm_api_server.http_client.client import HttpClient
from llm_api_server.ipc.lease_messages import InstanceInfo

_JSON = "application/json"
_OK = 200
_MAX_RESPONSE_BYTES = 256 * 1024 * 1024


class _Rendered(msgspec.Struct):
    prompt: str


class _Piece(msgspec.Struct):
    """Token whose `piece` is a list of bytes if it is not valid text by itself."""

    id: int
    piece: str | list[int]


class _Tokens(msgspec.Struct):
    tokens: list[int | _Piece]


class _Text(msgspec.Struct):
    content: str


def is_translated(facts: RequestFacts, instance: InstanceInfo) -> bool:
    """Return whether the instance needs the request in llama.cpp's format."""
    is_tokenizing = isinstance(facts.request, schemas.TokenizeRequest | schemas.DetokenizeRequest)
    return is_tokenizing and instance.engine == "llama_cpp"


async def to_llama_cpp(client: HttpClient, facts: RequestFacts, instance: InstanceInfo, body: bytes) -> bytes:
    """Return the body for llama.cpp. A conversation is rendered with the model's template first. Raises `ApiError`."""
    request = facts.request
    if not isinstance(request, schemas.TokenizeRequest):
        return body
    text = request.prompt if request.prompt is not None else request.content
    adds = request.add_special_tokens is not False
    if text is None:
        # llama.cpp leaves out the template's own first token when it renders; the prompt has it all the same.
        text, adds = await _render(client, instance, body), True
    wanted = {
        "content": text,
        "add_special": adds,
        "parse_special": True,
        "with_pieces": bool(request.return_token_strs),
    }
    return msgspec.json.encode(wanted)


async def _render(client: HttpClient, instance: InstanceInfo, body: bytes) -> str:
    response = await client.post(
        instance.address, "/apply-template", body, content_type=_JSON, headers=instance.headers
    )
    content = await response.read_all(_MAX_RESPONSE_BYTES)
    if response.status != _OK:
        raise translate_error(response.status, content)
    rendered: _Rendered = _decode(content, _Rendered)
    return rendered.prompt


def from_llama_cpp(facts: RequestFacts, instance: InstanceInfo, body: bytes) -> bytes:
    """Return llama.cpp's response in vLLM's format. Raises `EngineError` if it cannot be read."""
    if isinstance(facts.request, schemas.DetokenizeRequest):
        text: _Text = _decode(body, _Text)
        return msgspec.json.encode({"prompt": text.content})
    found: _Tokens = _decode(body, _Tokens)
    pieces = [one for one in found.tokens if isinstance(one, _Piece)]
    return msgspec.json.encode(
        {
            "count": len(found.tokens),
            "max_model_len": instance.context_length,
            "tokens": [one.id if isinstance(one, _Piece) else one for one in found.tokens],
            "token_strs": [_as_text(one.piece) for one in pieces] if pieces else None,
        }
    )


def _as_text(piece: str | list[int]) -> str:
    return piece if isinstance(piece, str) else bytes(piece).decode(errors="replace")


def _decode(body: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise EngineError("The engine's response could not be understood.") from error
