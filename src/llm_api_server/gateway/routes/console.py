"""`/console`: the console's files, which anybody may read. What it shows comes from the API, by the key of its user."""

from __future__ import annotations

import hashlib
from importlib import resources
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Request
from fastapi.responses import Response

CONSOLE = "/console"
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_INDEX = "index.html"
#: Everything of its own, nothing of others, no code or style in the page itself, in no frame.
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cache-control": "no-cache",  # asked for again, by their tags: a new version is there at once
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class ConsoleFiles:
    """By their paths, in memory: they are few and small."""

    def __init__(self) -> None:
        root = resources.files("llm_api_server") / "console"
        self._files = dict(_files(root, CONSOLE))
        self._files[CONSOLE] = self._files[f"{CONSOLE}/"] = self._files.pop(f"{CONSOLE}/{_INDEX}")

    @property
    def paths(self) -> frozenset[str]:
        return frozenset(self._files)

    def answer(self, path: str, tag: str | None) -> Response:
        content, kind = self._files[path]
        etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        headers = {**_HEADERS, "etag": etag}
        if tag == etag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=f"{kind}; charset=utf-8")


def console_routes(files: ConsoleFiles) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    async def read(request: Request) -> Response:
        return files.answer(request.url.path, request.headers.get("if-none-match"))

    for path in sorted(files.paths):
        router.add_api_route(path, read)
    return router


def _files(folder: Traversable, prefix: str) -> list[tuple[str, tuple[bytes, str]]]:
    found = []
    for one in folder.iterdir():
        path = f"{prefix}/{one.name}"
        if one.is_dir():
            found += _files(one, path)
        elif kind := _TYPES.get(f".{one.name.rpartition('.')[2]}"):
            found.append((path, (one.read_bytes(), kind)))
    return found
