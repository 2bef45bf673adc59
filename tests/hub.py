"""A small model hub on this machine: as much of Hugging Face's and ModelScope's protocols as their clients use, with
ranges, wrong tokens, broken connections, damaged files, and plain files under `/files/`.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_right"


@dataclass
class Repo:
    """A repository. `lfs` are the files listed with their SHA-256; the others have git's own checksum."""

    files: dict[str, bytes]
    revisions: set[str] = field(default_factory=lambda: {"main", "master", COMMIT})
    is_gated: bool = False

    def is_lfs(self, path: str) -> bool:
        return path.endswith((".gguf", ".safetensors"))


class Hub:
    """`repos` by name, for both hubs. `breaks[path]`: bytes after which its next responses end, one per entry."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.files: dict[str, bytes] = {}
        self.breaks: dict[str, list[int]] = {}
        self.damaged: set[str] = set()
        self.knows_ranges = True
        #: Requests for files: method, path, requested range, number of bytes sent.
        self.asked: list[tuple[str, str, str | None, int]] = []
        self.url = ""

    def environment(self) -> dict[str, str]:
        return {
            "HF_ENDPOINT": self.url,
            "MODELSCOPE_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
        }


@contextmanager
def hub() -> Iterator[Hub]:
    one = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": one}))
    server.daemon_threads = True
    one.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield one
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.split("/") if part]
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        match parts:
            case ["api", "v1", "models", org, name, "repo", "files"]:
                self._modelscope_list(f"{org}/{name}", query.get("Revision", ""))
            case ["api", "v1", "models", org, name, "repo"]:
                self._file_of(f"{org}/{name}", query.get("Revision", ""), query["FilePath"])
            case ["api", "models", org, name, *rest]:
                self._list(f"{org}/{name}", rest[1] if rest[:1] == ["revision"] else "main")
            case [org, name, "resolve", revision, *path] if path:
                self._file_of(f"{org}/{name}", revision, "/".join(path))
            case ["files", path] if path in self.hub.files:
                self._send_file(path, self.hub.files[path], {})
            case _:
                self._say(404, {})

    def _repo(self, name: str, revision: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None:
            self._say(404, {"x-error-code": "RepoNotFound", "x-error-message": "Repository not found"})
        elif repo.is_gated and self.headers.get("authorization") != f"Bearer {TOKEN}":
            self._say(403, {"x-error-code": "GatedRepo", "x-error-message": "Access to this model is restricted"})
        elif revision not in repo.revisions:
            self._say(404, {"x-error-code": "RevisionNotFound", "x-error-message": f"Invalid rev id: {revision}"})
        else:
            return repo
        return None

    def _list(self, name: str, revision: str) -> None:
        repo = self._repo(name, revision)
        if repo is None:
            return
        siblings = []
        for path, data in repo.files.items():
            one: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": _git_sha1(data)}
            if repo.is_lfs(path):
                one["lfs"] = {"sha256": _sha256(data), "size": len(data), "pointerSize": 134}
            siblings.append(one)
        self._say_json({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []})

    def _modelscope_list(self, name: str, revision: str) -> None:
        repo = self._repo(name, revision)
        if repo is None:
            return
        files = [
            {"Path": path, "Name": path.rpartition("/")[2], "Size": len(data), "Sha256": _sha256(data), "Type": "blob"}
            for path, data in repo.files.items()
        ]
        self._say_json({"Code": 200, "Success": True, "Data": {"Files": files}})

    def _file_of(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name, revision)
        if repo is None:
            return
        data = repo.files.get(path)
        if data is None:
            self._say(404, {"x-error-code": "EntryNotFound"})
            return
        tag = _sha256(data) if repo.is_lfs(path) else _git_sha1(data)
        self._send_file(path, data, {"x-repo-commit": COMMIT, "etag": f'"{tag}"', "x-linked-size": str(len(data))})

    def _send_file(self, path: str, data: bytes, headers: dict[str, str]) -> None:
        wanted = self.headers.get("range")
        start, end, status = 0, len(data), 200
        if wanted and self.hub.knows_ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end, status = int(first), int(last) + 1 if last else len(data), 206
            headers = {**headers, "content-range": f"bytes {start}-{end - 1}/{len(data)}"}
        sent = data[start:end]
        if path in self.hub.damaged:
            sent = sent[:-1] + bytes([sent[-1] ^ 1])
        self._head(status, {**headers, "content-length": str(len(sent)), "accept-ranges": "bytes"})
        if self.command == "HEAD":
            return
        breaks = self.hub.breaks.get(path, [])
        count = min(breaks.pop(0), len(sent)) if breaks else len(sent)
        self.hub.asked.append((self.command, path, wanted, count))
        self.wfile.write(sent[:count])
        self.close_connection = count < len(sent)

    def _say_json(self, content: Any) -> None:
        body = json.dumps(content).encode()
        self._head(200, {"content-type": "application/json", "content-length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _say(self, status: int, headers: dict[str, str]) -> None:
        self._head(status, {**headers, "content-length": "0"})

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()
