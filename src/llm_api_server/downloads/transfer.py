"""One file over HTTP, gone on with where it broke: after a lost connection at once, after a killed process next time.

What has come is in `FILE.TAG.part` beside its place, where the tag stands for the URL and the content.
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

#: In a row that bring nothing.
_TRIES = 6
_LONGEST_PAUSE = 5.0
_BLOCK = 1 << 20
_PARTIAL = 206
_SERVER_ERROR = 500


def fetch(url: str, target: Path, size: int, on_bytes: OnBytes, *, tag: str = "", token: str | None = None) -> None:
    """`tag` changes with the content. Raises `OSError` and `HTTPException`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = hashlib.sha256(f"{url} {tag} {size}".encode()).hexdigest()[:12]
    part = target.with_name(f"{target.name}.{mark}.part")
    on_bytes(_size(part))
    fruitless = 0
    while (before := _size(part)) < size:
        try:
            _go_on(url, part, token, on_bytes)
        except (OSError, HTTPException) as error:
            if not is_passing(error) or fruitless >= _TRIES:
                raise
        if _size(part) > before:
            fruitless = 0
        elif (fruitless := fruitless + 1) > _TRIES:
            raise ConnectionError("the connection ends before anything comes")
        else:
            time.sleep(min(2.0**fruitless / 8, _LONGEST_PAUSE))
    part.replace(target)
    for other in target.parent.glob(f"{_escaped(target.name)}.*.part"):
        other.unlink()


def head(url: str) -> Any:
    """The headers of the file. Raises `OSError` and `HTTPException`."""
    with _open(url, method="HEAD") as answer:
        return answer.headers


def is_passing(error: Exception) -> bool:
    """Whether another try may help: of the network, or the server's own fault."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= _SERVER_ERROR
    return isinstance(error, urllib.error.URLError | HTTPException | ConnectionError | TimeoutError)


def _go_on(url: str, part: Path, token: str | None, on_bytes: OnBytes) -> None:
    """A server that knows no ranges begins anew."""
    here = _size(part)
    with _open(url, token=token, headers={"Range": f"bytes={here}-"} if here else {}) as answer:
        goes_on = here > 0 and answer.status == _PARTIAL
        if here and not goes_on:
            on_bytes(-here)
        with part.open("ab" if goes_on else "wb") as file:
            while block := answer.read(_BLOCK):
                file.write(block)
                on_bytes(len(block))


def _open(url: str, *, method: str = "GET", token: str | None = None, headers: dict[str, str] | None = None) -> Any:
    request = urllib.request.Request(  # noqa: S310 - http and https only: `source.py` and the hub's own address
        url, method=method, headers={"User-Agent": "llm-api-server", **(headers or {})}
    )
    if token:  # not for whom a hub redirects to
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return urllib.request.urlopen(request, timeout=TIMEOUT)  # noqa: S310


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _escaped(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)
