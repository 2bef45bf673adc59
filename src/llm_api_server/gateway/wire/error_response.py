"""Responses to requests that fail. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llm_api_server.errors import ApiError, render

#: Status, headers and body.
Response = tuple[int, Sequence[tuple[bytes, bytes]], bytes]
#: Message of an error whose cause is in the log only.
INTERNAL_ERROR = "The server had an error while processing your request."


def error_response(error: ApiError, path: str) -> Response:
    """Return status, headers and body of `error`, in Anthropic's form under `/v1/messages`."""
    headers = [(b"content-type", b"application/json")]
    if error.retry_after is not None and math.isfinite(error.retry_after):
        headers.append((b"retry-after", str(max(1, math.ceil(error.retry_after))).encode()))
    if error.should_retry is not None:
        headers.append((b"x-should-retry", b"true" if error.should_retry else b"false"))
    if error.position is not None:
        headers.append((b"x-queue-position", str(error.position).encode()))
    if error.status == 401:  # noqa: PLR2004
        headers.append((b"www-authenticate", b'Bearer realm="llm-api-server"'))
    return error.status, headers, render(error, anthropic=is_anthropic(path))


def is_anthropic(path: str) -> bool:
    """Return whether `path` is one of Anthropic's API."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")
