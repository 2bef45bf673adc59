"""`/console`: the web console's files, public. The console reads its data from the API with its user's key."""

from __future__ import annotations

import hashlib
from importlib import resources
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Request
from fastapi.responses import Response

CONSOLE = "/console"
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_INDEX = "index.html"
#: Only the console's own files, no inline code or style, no frames.
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cache-control": "no-cache",  # browsers revalidate by etag, so they load a new version at once
    "referrer-policy": "no-referrer",
}


class ConsoleFiles:
    """Files of the console by URL path, in memory."""

    def __init__(self) -> None:
        root = resources.files("llm_api_server") / "console"
        self._files = dict(_files(root, CONSOLE))
        self._files[CONSOLE] = self._files[f"{CONSOLE}/"] = self._files.pop(f"{CONSOLE}/{_INDEX}")

    @property
    def paths(self) -> frozenset[str]:
        return frozenset(self._files)

    def response(self, path: str, known_etag: str | None) -> Response:
        """Return the file, or status 304 if its etag is `known_etag`."""
        content, media_type = self._files[path]
        etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        headers = {**_HEADERS, "etag": etag}
        if known_etag == etag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=f"{media_type}; charset=utf-8")


def console_routes(files: ConsoleFiles) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    async def read(request: Request) -> Response:
        return files.response(request.url.path, request.headers.get("if-none-match"))

    for path in sorted(files.paths):
        router.add_api_route(path, read)
    return router


def _files(folder: Traversable, prefix: str) -> list[tuple[str, tuple[bytes, str]]]:
    found = []
    for entry in folder.iterdir():
        path = f"{prefix}/{entry.name}"
        if entry.is_dir():
            found += _files(entry, path)
        elif media_type := _TYPES.get(f".{entry.name.rpartition('.')[2]}"):
            found.append((path, (entry.read_bytes(), media_type)))
    return found
