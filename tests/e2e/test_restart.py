"""Replacement of a server's processes under load: no request is lost, and limits per minute continue."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.test_reload import MODEL, Stream, body
from tests.running import KEY, KEYS, Server, running
from tests.waiting import wait_until

LIMITED_KEY = "sk-limited-0123456789abcdef"
LIMIT = 6


def config(smollm2_gguf: Path, workers: int) -> dict[str, Any]:
    limited = {"key": LIMITED_KEY, "name": "limited", "requests_per_minute": LIMIT}
    return {
        "server": {"workers": workers, "drain_timeout": 120},
        "auth": {"api_keys": [*KEYS, limited]},
        "models": {
            "default": MODEL,
            "preload": [MODEL],
            "available": {MODEL: {"path": str(smollm2_gguf), "max_tokens": 4096}},
        },
    }


class Load(threading.Thread):
    """Requests one after the other, each on a new connection; counts their outcomes until `stop`."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._is_over = False
        self.outcomes: Counter[str] = Counter()
        self.start()

    def run(self) -> None:
        while not self._is_over:
            try:
                with self._server.client(KEY) as client:
                    response = client.post("/v1/completions", json=body(stream=bool(self.outcomes.total() % 2)))
                whole = "[DONE]" in response.text or "finish_reason" in response.text
                self.outcomes[f"{response.status_code} {whole}"] += 1
            except httpx.TransportError as error:
                self.outcomes[repr(error)] += 1

    def stop(self) -> Counter[str]:
        self._is_over = True
        self.join()
        return self.outcomes


@pytest.mark.parametrize(
    ("command", "workers"), [pytest.param("serve", 2, marks=pytest.mark.story), ("gunicorn", 2), ("serve", 1)]
)
def test_restart_loses_no_request(tmp_path: Path, smollm2_gguf: Path, command: str, workers: int) -> None:
    with running(tmp_path, config(smollm2_gguf, workers), command=command) as server:
        wait_until(lambda: server.models()[MODEL]["state"] == "ready")
        (engine,) = server.engines()
        manager = server.manager()
        load, stream = [Load(server) for _ in range(3)], Stream(server, tokens=200)
        done = server.command("restart")
        assert done.stdout.endswith("Restarted.\n"), done.stderr
        assert len(done.stdout.splitlines()) == workers + 2
        assert stream.ends_whole()
        total = sum((one.stop() for one in load), Counter[str]())
        assert set(total) == {"200 True"}, total
        assert server.engines() == [engine]
        assert server.manager() != manager


@pytest.mark.parametrize("path", ["/livez", "/v1/completions"])
def test_accepted_connection_gets_its_response_during_shutdown(tmp_path: Path, smollm2_gguf: Path, path: str) -> None:
    """The worker gets SIGTERM after clients have connected, some of them with a part of their request sent."""
    data = json.dumps(body()).encode() if path.startswith("/v1") else b""
    method = "POST" if data else "GET"
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-length: {len(data)}\r\n\r\n"
    request = head.encode() + data
    with running(tmp_path, config(smollm2_gguf, 1)) as server:
        wait_until(lambda: server.models()[MODEL]["state"] == "ready")
        clients = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(4)]
        idle, *others = clients
        for client, part in zip(others, (0, 10, len(request) - 1), strict=True):
            client.sendall(request[:part])
        with server.client() as witness:
            witness.get("/livez")  # the worker has read what came before it
            assert server.process is not None
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: is_refused(server))
        for client, part in zip(others, (0, 10, len(request) - 1), strict=True):
            client.sendall(request[part:])
            response = everything(client)
            assert response.startswith(b"HTTP/1.1 200 ")
            assert b"\r\nconnection: close\r\n" in response.lower()
        assert everything(idle) == b""
        for client in clients:
            client.close()


def is_refused(server: Server) -> bool:
    try:
        socket.create_connection(("127.0.0.1", server.port)).close()
    except ConnectionRefusedError:
        return True
    return False


def everything(client: socket.socket) -> bytes:
    """Read until the other side closes."""
    return b"".join(iter(lambda: client.recv(65536), b""))


@pytest.mark.parametrize("way", ["kill", "restart"])
def test_limits_per_minute_outlive_the_manager(tmp_path: Path, smollm2_gguf: Path, way: str) -> None:
    with running(tmp_path, config(smollm2_gguf, 1)) as server:
        wait_until(lambda: server.models()[MODEL]["state"] == "ready")

        def ask() -> int:
            with server.client(LIMITED_KEY) as client:
                return client.post("/v1/completions", json=body()).status_code

        assert [ask() for _ in range(LIMIT - 1)] == [200] * (LIMIT - 1)
        wait_until((server.run_dir / "minutes").exists)
        before = (server.run_dir / "minutes").read_bytes()
        if way == "kill":
            assert ask() == 200
            wait_until(lambda: (server.run_dir / "minutes").read_bytes() != before)
            server.manager().kill()
            wait_until(server.has_manager)
        else:
            assert server.command("restart").returncode == 0
            assert ask() == 200
        assert [ask() for _ in range(3)] == [429] * 3
