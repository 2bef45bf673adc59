"""Translation of engine errors. Pure.

Engines send integer codes, flat bodies, status 500 for a client's fault, and local paths in messages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC
from email.utils import parsedate_to_datetime
from math import isfinite
from typing import Any

import msgspec

from llm_api_server.errors import (
    ApiError,
    BadEngineResponse,
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
#: Seconds. A longer `Retry-After` is cut to it.
MAX_RETRY_AFTER = 86_400.0
#: Statuses that clients may retry (request timeout, conflict, too early, client closed request of a proxy; overloads
#: of Anthropic and Cloudflare), and those of a server that another one waited for in vain.
_RETRYABLE = frozenset({409, 425, 499, 503, 521, 529, 530})
_TIMEOUTS = frozenset({408, 504, 522, 524, 598})
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
#: Words of a 403 that is about the request and not about this server's key.
_MODERATION = re.compile(r"moderat|flagged|content (?:policy|filter)|safety", re.IGNORECASE)
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


def translate_error(status: int, body: bytes, *, retry_after: float | None = None) -> ApiError:
    """Return the error for the client of an engine's error response."""
    problem = _read(body)
    problem.retry_after = retry_after
    message = _cleaned(problem.message)
    if named := _FIELD.match(message):
        problem.param = named["name"]
    if status in (401, 403, 402, 407):
        return _refused(status, message)
    if status == 429 or status in _RETRYABLE or status in _TIMEOUTS:  # noqa: PLR2004
        return _retryable(status, message, problem.retry_after)
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
    return _server_fault(message, problem)


def _refused(status: int, message: str) -> ApiError:
    if status == 403 and _MODERATION.search(message):  # noqa: PLR2004
        return InvalidRequest(message)
    # A remote refused this server's key; the client's key is not at fault.
    return EngineError("The upstream refused this server's key; ask the operator of this server to check it.")


def _retryable(status: int, message: str, retry_after: float | None) -> ApiError:
    if status in _TIMEOUTS:
        return RequestTimeout("The upstream did not respond in time.", retry_after=retry_after)
    if status in _RETRYABLE:
        return EngineUnavailable(message or "The engine is not ready; try again.", retry_after=retry_after or 1)
    return RateLimited(message or "The upstream limits requests; try again later.", retry_after=retry_after)


def error_in_response(error: Any, body: bytes, what: str) -> ApiError:
    """Return the error that `body` reports although its status is 200; `what` begins a message without words.

    The error's own integer `code` decides the kind: a client's fault stays one, so that SDKs do not retry it.
    """
    status = error_status(error)
    if status is not None:
        return translate_error(status, body)
    return BadEngineResponse(_cleaned(_read(body).message) or f"{what} reported an error without a message.")


def error_status(error: Any) -> int | None:
    """Return the HTTP status that an error object has as its `code`; None if it has none."""
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) and 400 <= code <= 599 else None  # noqa: PLR2004


def retry_after_seconds(text: str | None, now: float) -> float | None:
    """Return the seconds of a `Retry-After` (a number, or a date; `now` is Unix time), at most `MAX_RETRY_AFTER`.

    None if there is none or it is neither: a remote may send `inf`.
    """
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            date = parsedate_to_datetime(text)
            seconds = (date if date.tzinfo is not None else date.replace(tzinfo=UTC)).timestamp() - now
        except (ValueError, OverflowError):
            return None
    return min(max(0.0, seconds), MAX_RETRY_AFTER) if isfinite(seconds) else None


def _server_fault(message: str, problem: _Problem) -> ApiError:
    if message.startswith(_BEYOND_VOCABULARY):
        return InvalidRequest("A token id is beyond the model's vocabulary.", param="tokens")
    if _UNSUPPORTED.search(message):
        return NotSupported(message, param=problem.param)
    if _CLIENT_FAULT.search(message):
        return InvalidRequest(message, param=problem.param)
    return EngineError(message or "The engine failed without an error message.")


def _not_offered(status: int, message: str) -> ApiError:
    # vLLM sends 404 also for an unknown model, adapter or stored response, with a message of its own.
    if status == 404 and re.search(r"model|adapter|response", message, re.IGNORECASE):  # noqa: PLR2004
        return InvalidRequest(message)
    if status == 501 and message:  # noqa: PLR2004
        return NotSupported(f"This model does not support the request: {message}")
    return NotSupported("This model's engine does not offer this endpoint.")


def _read(body: bytes) -> _Problem:
    """Read OpenAI's and llama.cpp's `error` object, vLLM's flat body, FastAPI's `detail`, or plain text.

    Google sends the object in a list, Cloudflare a list of `errors`.
    """
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        text = body.decode(errors="replace").strip()
        return _Problem("" if text.startswith("<") else text)
    if isinstance(content, list):
        content = next((item for item in content if isinstance(item, dict)), None)
    if not isinstance(content, dict):
        return _Problem()
    error = content.get("error") or content.get("errors") or content
    if isinstance(error, list):
        return _Problem("; ".join(_texts(error[:5])))
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


def _texts(errors: list[Any]) -> Iterable[str]:
    """Yield the messages of a list of errors."""
    for error in errors:
        text = _message(error) if isinstance(error, dict) else error
        if isinstance(text, str) and text:
            yield text


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
