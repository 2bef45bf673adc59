"""Download of one file over HTTP that resumes: after a lost connection at once, after a killed process next time.

Partial data is kept in `FILE.TAG.part` beside the target; the tag identifies URL and content. urllib follows redirects
and uses proxies, which hubs need.
"""

from __future__ import annotations

import hashlib
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

from llm_api_server.downloads.hub import TIMEOUT, OnBytes

#: Consecutive tries without any data before an error is raised.
_MAX_EMPTY_TRIES = 6
#: Longest pause between two tries, in seconds.
_MAX_PAUSE = 5.0
_BLOCK = 1 << 20
_PARTIAL_CONTENT = 206
_SERVER_ERROR = 500


def fetch(
    url: str,
    target: Path,
    size: int,
    on_bytes: OnBytes,
    *,
    tag: str = "",
    token: str | None = None,
    max_pause: float = _MAX_PAUSE,
) -> None:
    """Download a file of `size` bytes; `tag` changes with its content. Raises `OSError` and `HTTPException`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    identity = hashlib.sha256(f"{url} {tag} {size}".encode()).hexdigest()[:12]
    part = target.with_name(f"{target.name}.{identity}.part")
    on_bytes(_size(part))
    empty_tries = 0
    while (before := _size(part)) < size:
        try:
            _resume(url, part, token, on_bytes)
        except (OSError, HTTPException) as error:
            if not _is_transient(error) or empty_tries >= _MAX_EMPTY_TRIES:
                raise
        if _size(part) > before:
            empty_tries = 0
            continue
        empty_tries += 1
        if empty_tries > _MAX_EMPTY_TRIES:
            raise ConnectionError("the connection ends before any data arrives")
        time.sleep(min(2.0**empty_tries / 8, max_pause))
    part.replace(target)
    for other in target.parent.glob(f"{_escape(target.name)}.*.part"):
        other.unlink()


def head(url: str) -> Any:
    """Return the headers of the file. Raises `OSError` and `HTTPException`."""
    with _open(url, method="HEAD") as response:
        return response.headers


def _is_transient(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= _SERVER_ERROR
    return isinstance(error, urllib.error.URLError | HTTPException | ConnectionError | TimeoutError)


def _resume(url: str, part: Path, token: str | None, on_bytes: OnBytes) -> None:
    """Append to the partial file, or write it anew if the server ignores ranges."""
    here = _size(part)
    with _open(url, token=token, headers={"Range": f"bytes={here}-"} if here else {}) as response:
        appends = here > 0 and response.status == _PARTIAL_CONTENT
        if here and not appends:
            on_bytes(-here)
        with part.open("ab" if appends else "wb") as file:
            while block := response.read(_BLOCK):
                file.write(block)
                on_bytes(len(block))


def _open(url: str, *, method: str = "GET", token: str | None = None, headers: dict[str, str] | None = None) -> Any:
    request = urllib.request.Request(  # noqa: S310 - http and https only: `source.py` and the hub's own address
        url, method=method, headers={"User-Agent": "llm-api-server", **(headers or {})}
    )
    if token:  # the host that a hub redirects to must not get it
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return urllib.request.urlopen(request, timeout=TIMEOUT)  # noqa: S310


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _escape(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)
