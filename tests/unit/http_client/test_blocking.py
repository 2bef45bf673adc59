"""Blocking requests against a real server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from llm_api_server.http_client import blocking


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status = {"/missing": 404, "/moved": 302}.get(self.path, 200)
        body = f"{self.command} {self.path} {self.headers.get('x-key')}".encode()
        self._respond(status, body)

    def do_POST(self) -> None:
        self._respond(200, self.rfile.read(int(self.headers["content-length"])))

    def _respond(self, status: int, body: bytes) -> None:
        self.send_response(status)
        if status == 302:
            self.send_header("location", "/elsewhere")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    with server:
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
    thread.join()


@pytest.mark.parametrize(("path", "target"), [("", "/"), ("/a?b=c", "/a?b=c"), ("?b=c", "/?b=c")])
def test_a_request_has_its_target_and_headers(url: str, path: str, target: str) -> None:
    with blocking.request("GET", url + path, timeout=10, headers={"x-key": "k"}) as response:
        assert (response.status, response.read()) == (200, f"GET {target} k".encode())


def test_a_request_has_its_body(url: str) -> None:
    with blocking.request("POST", url, timeout=10, body=b"hello") as response:
        assert response.read() == b"hello"


def test_redirects_are_not_followed(url: str) -> None:
    with blocking.request("GET", f"{url}/moved", timeout=10) as response:
        assert (response.status, response.headers["location"]) == (302, "/elsewhere")


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "http://[::1]:1", "http://name.invalid"])
def test_a_server_that_cannot_be_reached_is_reported(address: str) -> None:
    with pytest.raises(blocking.ConnectFailed), blocking.request("GET", address, timeout=10):
        pass


def test_get_returns_the_body(url: str) -> None:
    assert blocking.get(f"{url}/a", timeout=10, max_bytes=11) == b"GET /a None"


@pytest.mark.parametrize(("path", "limit", "words"), [("/missing", 99, "status 404"), ("/a", 10, "larger than 10")])
def test_get_refuses_other_statuses_and_large_bodies(url: str, path: str, limit: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        blocking.get(url + path, timeout=10, max_bytes=limit)
