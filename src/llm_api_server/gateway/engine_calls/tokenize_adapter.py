"""`/tokenize` and `/detokenize` of llama.cpp in vLLM's form, so that clients need to know one only.

Called by `proxy.py`: `question` before the request goes out, `answer` with what came back.
"""

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
MAX_ANSWER_BYTES = 256 * 1024 * 1024


class _Rendered(msgspec.Struct):
    prompt: str


class _Piece(msgspec.Struct):
    """`piece` is a list of bytes where it is no text by itself."""

    id: int
    piece: str | list[int]


class _Tokens(msgspec.Struct):
    tokens: list[int | _Piece]


class _Text(msgspec.Struct):
    content: str


def is_translated(facts: RequestFacts, instance: InstanceInfo) -> bool:
    is_about_tokens = isinstance(facts.request, schemas.TokenizeRequest | schemas.DetokenizeRequest)
    return is_about_tokens and instance.engine == "llama_cpp"


async def question(upstream: HttpClient, facts: RequestFacts, instance: InstanceInfo, body: bytes) -> bytes:
    """The body for llama.cpp. A conversation is put into the model's template first. Raises `ApiError`."""
    request = facts.request
    if not isinstance(request, schemas.TokenizeRequest):
        return body
    text = request.prompt if request.prompt is not None else request.content
    adds = request.add_special_tokens is not False
    if text is None:
        # The template's own first token is taken out of what llama.cpp answers; it belongs to the prompt all the same.
        text, adds = await _render(upstream, instance, body), True
    wanted = {
        "content": text,
        "add_special": adds,
        "parse_special": True,
        "with_pieces": bool(request.return_token_strs),
    }
    return msgspec.json.encode(wanted)


async def _render(upstream: HttpClient, instance: InstanceInfo, body: bytes) -> str:
    response = await upstream.post(
        instance.address, "/apply-template", body, content_type=_JSON, headers=instance.headers
    )
    content = await response.read_all(MAX_ANSWER_BYTES)
    if response.status != _OK:
        raise translate_error(response.status, content)
    rendered: _Rendered = _decode(content, _Rendered)
    return rendered.prompt


def answer(facts: RequestFacts, instance: InstanceInfo, body: bytes) -> bytes:
    """llama.cpp's answer as vLLM would give it. Raises `EngineError` when it is none."""
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
        raise EngineError("The engine's answer could not be understood.") from error
