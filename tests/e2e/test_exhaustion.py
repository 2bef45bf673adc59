"""Exhausted resources: a full disk, no free descriptors, clients that send too much, too deep or too slowly."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.running import KEY, Server, running
from tests.waiting import wait_until

MODEL = "SmolLM2-135M-Instruct"
MIB = 2**20
BODY = {"prompt": "hi", "max_tokens": 2}
DEEP = b"[" * 200_000 + b"]" * 200_000


@pytest.fixture
def server(tmp_path: Path, smollm2_gguf: Path) -> Iterator[Server]:
    available = {MODEL: {"path": str(smollm2_gguf), "max_tokens": 512}}
    config: dict[str, Any] = {
        "auth": {"secret_key": "dY0p7Qm2Zx9Lr4Wv6Tb8Nc1Kf3Hs5Ga0Ej"},
        "models": {"default": MODEL, "available": available},
    }
    with running(tmp_path, config) as one:
        yield one


def limit(process: psutil.Process, kind: int, value: int) -> None:
    """Lower a soft limit of the server's processes, so that they run out of the resource."""
    process.rlimit(kind, (value, process.rlimit(kind)[1]))


def gateway(server: Server) -> psutil.Process:
    assert server.process is not None
    return psutil.Process(server.process.pid)


def statuses(client: httpx.Client, count: int) -> set[int]:
    return {client.post("/v1/completions", json=BODY).status_code for _ in range(count)}


def test_full_disk_stops_no_request(server: Server) -> None:
    """No file can grow: logs, database, adoption records. Requests that need the database fail, and recover later."""
    with server.client() as client:
        assert statuses(client, 1) == {200}
        for process in (gateway(server), server.manager()):
            limit(process, resource.RLIMIT_FSIZE, 0)
        assert client.post(f"/admin/api/models/{MODEL}/unload").status_code == 200
        assert statuses(client, 3) == {200}  # the first of them loads the model again
        refused = client.post("/admin/api/keys", json={"name": "new"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert client.get("/readyz").status_code == 200
        for process in (gateway(server), server.manager()):
            limit(process, resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)
        assert client.post("/admin/api/keys", json={"name": "new"}).status_code == 201
        wait_until(lambda: sum(row["requests"] for row in client.get("/v1/usage").json()["data"]) == 4)


def test_connections_wait_while_no_descriptor_is_free(server: Server) -> None:
    with server.client() as client:
        assert statuses(client, 1) == {200}
        process = gateway(server)
        limit(process, resource.RLIMIT_NOFILE, process.num_fds() + 20)
        with ExitStack() as crowd:
            for _ in range(100):
                crowd.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            wait_until(lambda: "connections wait: Too many open files" in server.output())
            assert client.post(f"/admin/api/models/{MODEL}/unload").status_code == 200
            assert statuses(client, 3) == {200}  # an open connection is served, by an engine that is new to the worker
    with server.client() as client:
        assert statuses(client, 3) == {200}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/admin/api/keys"])
def test_deep_json_is_refused(server: Server, path: str) -> None:
    with server.client() as client:
        hidden = b'{"messages":[{"role":"user","content":"x"}],"x":' + DEEP + b"}"
        for body in (DEEP, b'{"messages":' + DEEP + b"}", hidden):
            assert client.post(path, content=body).status_code == 400
    assert "Traceback" not in server.output()


def test_large_bodies_are_refused_where_small_ones_are_expected(server: Server) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * 65536

    with server.client() as client:
        for path in ("/auth/token", "/admin/api/keys", "/admin/api/reload"):
            for body in (b" " * (2 << 20), chunks()):
                assert client.post(path, content=body).status_code == 413


def test_slow_clients_do_not_delay_others(server: Server) -> None:
    """Hundreds of connections have sent half a head or half a body when another client sends a request."""
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n".encode()
    with ExitStack() as slow, server.client() as client:
        assert statuses(client, 1) == {200}
        before = gateway(server).memory_info().rss
        for number in range(300):
            one = slow.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            one.sendall(head if number % 2 else head + b"content-length: 100000\r\n\r\n{" + b" " * 1000)
        assert statuses(client, 5) == {200}
        assert client.get("/readyz").status_code == 200
        assert gateway(server).memory_info().rss - before < 30 * MIB
    with server.client() as client:
        wait_until(lambda: client.get(f"/admin/api/models/{MODEL}").json()["in_flight"] == 0)
