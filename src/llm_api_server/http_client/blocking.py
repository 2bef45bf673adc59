"""Blocking HTTP requests for rare callers: the command line, downloads, an issuer's keys. Runs on any thread.

One connection per request, no redirects; `http.client` does the work. Raises `OSError` or `http.client.HTTPException`,
which callers turn into their own errors (`FAILURES` holds both).
"""

from __future__ import annotations

import http.client
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit

OK = 200
FAILURES = (OSError, http.client.HTTPException)


class ConnectFailed(OSError):
    """Opening the connection failed; the message is the reason."""


@contextmanager
def request(
    method: str, url: str, *, timeout: float, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> Iterator[http.client.HTTPResponse]:
    """Send one request to an http(s) URL and lend its response, unread; leaving the block closes the connection.

    `timeout` limits each read and write, in seconds. TLS uses the system's certificates. The status is the caller's to
    check. Raises `ConnectFailed` if nobody accepts the connection, and any of `FAILURES` while reading.
    """
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=timeout)
    try:
        try:
            connection.connect()
        except OSError as error:
            raise ConnectFailed(error.strerror or str(error)) from error
        connection.request(
            method, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), body, {**(headers or {})}
        )
        with connection.getresponse() as response:
            yield response
    finally:
        connection.close()


def get(url: str, *, timeout: float, max_bytes: int) -> bytes:
    """Return the body of a 200. Raises `FAILURES`, or `ValueError` for another status or more than `max_bytes`."""
    with request("GET", url, timeout=timeout) as response:
        if response.status != OK:
            raise ValueError(f"the server responded with status {response.status}")
        body = response.read(max_bytes + 1)
    if len(body) > max_bytes:
        raise ValueError(f"the response is larger than {max_bytes} bytes")
    return body
