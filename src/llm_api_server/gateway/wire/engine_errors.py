"""Translation of engine errors. Pure.

Engines send integer codes, flat bodies, status 500 for a client's fault, and local paths in messages.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from llm_api_server.errors import (
    ApiError,
    ContextLengthExceeded,
    EngineError,
    EngineUnavailable,
    InvalidRequest,
    NotSupported,
    RateLimited,
    RequestTimeout,
    RequestTooLarge,
)

NO_CHAT_TEMPLATE = (
    "This model has no chat template, so it cannot chat. Use /v1/completions, or set a template in the configuration: "
    "models.available.NAME.engine_args: {chat_template: FILE}."
)
_MAX_MESSAGE_CHARS = 1000
_CONTEXT = re.compile(
    r"exceeds? the available context size|maximum context length|longer than the maximum model length"
    r"|too large to process|max_model_len|maximum model length|context_length_exceeded",
    re.IGNORECASE,
)
_UNSUPPORTED = re.compile(r"(?:is|are) not supported|does not support|not support(?:ed)? by", re.IGNORECASE)
#: Messages that come with status 500 although the request is at fault: llama.cpp's, and vLLM's about a huge image.
_CLIENT_FAULT = re.compile(
    r"^(?:Failed to parse (?:messages|tools|tool_choice|grammar|json schema|input)|'[\w.]+' is required"
    r"|Missing '|Invalid |Unsupported |Cannot use |Either \"?json_schema|Expected |Image size \()",
    re.IGNORECASE,
)
#: llama.cpp's prefix of a message about a JSON schema, and its whole message about a schema that is too large.
_PARSER_PREFIX = re.compile(r"^Unable to generate parser for this template\. Automatic parser generation failed: ")
_GRAMMAR_TOO_LARGE = "Failed to initialize samplers: failed to parse grammar"
#: llama.cpp's message for a token id beyond the vocabulary in `/detokenize`.
_BEYOND_VOCABULARY = "vector::_M_range_check"
_NO_CHAT_TEMPLATE = re.compile(r"you must provide a chat template|does not have a chat template", re.IGNORECASE)
#: vLLM's suffixes, which repeat `param` and the client's value.
_NOISE = re.compile(r" \(parameter=\w+(?:, value=.*)?\)$| <_io\.BytesIO object[^>]*>", re.DOTALL)
#: llama.cpp's prefix that names the invalid member.
_FIELD = re.compile(r"^Field '(?P<name>[\w.]+)'")
_PATH = re.compile(r"(?:(?<=[\s'\"(=:])|^)/(?:[\w.@+-]+/)+[\w.@+-]*")
_INTERNAL = re.compile(r"Traceback|\bFile \"|\bat 0x[0-9a-f]+", re.IGNORECASE)


class _Problem(msgspec.Struct):
    message: str = ""
    param: str | None = None
    type: str = ""
    retry_after: float | None = None


def translate_error(status: int, body: bytes, *, retry_after: str | None = None) -> ApiError:
    """Return the error for the client of an engine's error response."""
    problem = _read(body)
    problem.retry_after = _seconds(retry_after)
    message = _cleaned(problem.message)
    if named := _FIELD.match(message):
        problem.param = named["name"]
    # A remote refused this server's key; the client's key is not at fault.
    if status in (401, 403, 402, 407):
        return EngineError("The upstream refused this server's key; ask the operator of this server to check it.")
    if status == 429:  # noqa: PLR2004
        return RateLimited(message or "The upstream limits requests; try again later.", retry_after=problem.retry_after)
    if problem.type == "exceed_context_size_error" or (status in (400, 413, 422, 500) and _CONTEXT.search(message)):
        return ContextLengthExceeded(message, param=problem.param)
    if status in (404, 405, 501):
        return _not_offered(status, message)
    if _NO_CHAT_TEMPLATE.search(message):
        return NotSupported(NO_CHAT_TEMPLATE)
    if status == 413:  # noqa: PLR2004
        return RequestTooLarge(message or "The request is too large for the engine.")
    if 400 <= status < 500:  # noqa: PLR2004
        return InvalidRequest(message or "The engine refused the request.", param=problem.param)
    return _server_fault(status, message, problem)


def _server_fault(status: int, message: str, problem: _Problem) -> ApiError:
    if message.startswith(_BEYOND_VOCABULARY):
        return InvalidRequest("A token id is beyond the model's vocabulary.", param="tokens")
    if _UNSUPPORTED.search(message):
        return NotSupported(message, param=problem.param)
    if _CLIENT_FAULT.search(message):
        return InvalidRequest(message, param=problem.param)
    if status == 503:  # noqa: PLR2004
        return EngineUnavailable(message or "The engine is not ready; try again.", retry_after=problem.retry_after or 1)
    if status == 504:  # noqa: PLR2004
        return RequestTimeout("The upstream did not respond in time.")
    return EngineError(message or "The engine failed without an error message.")


def _not_offered(status: int, message: str) -> ApiError:
    # vLLM sends 404 also for an unknown model, adapter or stored response, with a message of its own.
    if status == 404 and re.search(r"model|adapter|response", message, re.IGNORECASE):  # noqa: PLR2004
        return InvalidRequest(message)
    if status == 501 and message:  # noqa: PLR2004
        return NotSupported(f"This model does not support the request: {message}")
    return NotSupported("This model's engine does not offer this endpoint.")


def _read(body: bytes) -> _Problem:
    """Read OpenAI's and llama.cpp's `error` object, vLLM's flat body, FastAPI's `detail`, or plain text."""
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        text = body.decode(errors="replace").strip()
        return _Problem("" if text.startswith("<") else text)
    if not isinstance(content, dict):
        return _Problem()
    error = content.get("error", content)
    if isinstance(error, str):
        return _Problem(error)
    if not isinstance(error, dict):
        return _Problem()
    param = error.get("param")
    return _Problem(
        message=_message(error),
        param=param if isinstance(param, str) else None,
        type=str(error.get("type") or ""),
    )


def _message(error: dict[str, Any]) -> str:
    text = error.get("message", error.get("detail"))
    if isinstance(text, list):
        return "; ".join(_validation_line(item) for item in text[:5])
    return text if isinstance(text, str) else ""


def _validation_line(item: Any) -> str:
    if not isinstance(item, dict):
        return str(item)
    path = ".".join(str(part) for part in item.get("loc", ()) if part != "body")
    return f"{path}: {item.get('msg', '')}" if path else str(item.get("msg", ""))


def _cleaned(message: str) -> str:
    """Return `message` without tracebacks, local paths and engine noise, cut to `_MAX_MESSAGE_CHARS`."""
    message = _NOISE.sub("", message)
    if _INTERNAL.search(message):
        return ""
    if message == _GRAMMAR_TOO_LARGE:
        return "This schema or grammar is too large for the engine: it is circular, or it repeats a part too often."
    message = _PARSER_PREFIX.sub("", message)
    return _PATH.sub("...", message)[:_MAX_MESSAGE_CHARS].strip()


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        return None
