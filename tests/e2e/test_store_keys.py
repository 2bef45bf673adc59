"""Keys of the store on every worker and with a lost database, and the ledger after faults."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.postgres import Cluster
from tests.running import BIN, Server, running
from tests.waiting import wait_until

MODEL = "SmolLM2-135M-Instruct"
WORKERS = 4


def make_config(smollm2_gguf: Path, **storage: Any) -> dict[str, Any]:
    return {
        "server": {"workers": WORKERS},
        "auth": {"secret_key": "dY0p7Qm2Zx9Lr4Wv6Tb8Nc1Kf3Hs5Ga0Ej"},
        "models": {
            "default": MODEL,
            "preload": [MODEL],
            "available": {MODEL: {"path": str(smollm2_gguf), "max_tokens": 2048}},
        },
        "storage": storage,
    }


@pytest.fixture
def server(tmp_path: Path, smollm2_gguf: Path) -> Iterator[Server]:
    with running(tmp_path, make_config(smollm2_gguf, key_grace=15)) as one:
        wait_until(lambda: one.models()[MODEL]["state"] == "ready")
        yield one


def command(server: Server, *words: str) -> str:
    done = subprocess.run(
        [str(BIN / "llm-api-server"), *words], cwd=server.folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def statuses(clients: list[httpx.Client]) -> set[int]:
    return {client.get("/v1/models").status_code for client in clients}


@contextlib.contextmanager
def many(server: Server, key: str) -> Iterator[list[httpx.Client]]:
    """Yield clients with open connections, enough that every worker has some."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(server.client(key)) for _ in range(8 * WORKERS)]


@pytest.mark.story
def test_every_change_of_a_key_reaches_every_worker(server: Server) -> None:
    key = command(server, "keys", "create", "--name", "ann", "-q")
    with many(server, key) as clients:
        wait_until(lambda: statuses(clients) == {200})
        token = httpx.post(f"{server.url}/auth/token", headers={"x-api-key": key}).json()["access_token"]
        with many(server, token) as holders:
            assert statuses(holders) == {200}
            command(server, "keys", "update", "ann", "--network", "10.0.0.0/8")
            wait_until(lambda: statuses(clients) | statuses(holders) == {403})
            command(server, "keys", "update", "ann", "--network", "none", "--disabled")
            wait_until(lambda: statuses(clients) | statuses(holders) == {401})
            command(server, "keys", "update", "ann", "--enabled")
            wait_until(lambda: statuses(clients) | statuses(holders) == {200})
            new = command(server, "keys", "rotate", "ann", "--overlap", "0", "-q")
            wait_until(lambda: statuses(clients) == {401})
            assert statuses(holders) == {200}
            with many(server, new) as others:
                assert statuses(others) == {200}
                command(server, "keys", "revoke", "ann")
                wait_until(lambda: statuses(clients) | statuses(holders) | statuses(others) == {401})


def test_permissions_models_and_limits_of_a_store_key_hold(server: Server) -> None:
    words = ("--permission", "chat", "--model", "other*", "--requests-per-minute", "3")
    key = command(server, "keys", "create", "--name", "bob", *words, "-q")
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    with server.client(key) as client:
        assert client.post("/v1/completions", json={"prompt": "a"}).json()["error"]["code"] == "permission_denied"
        assert client.post("/v1/chat/completions", json=chat).json()["error"]["code"] == "permission_denied"
        assert client.get("/v1/models").json()["data"] == []
        command(server, "keys", "update", "bob", "--model", "*")
        wait_until(lambda: client.get("/v1/models").json()["data"] != [])
        codes = [client.post("/v1/chat/completions", json=chat).status_code for _ in range(5)]
        assert codes == [200, 200, 200, 429, 429]


def test_cached_keys_work_while_the_database_is_lost(server: Server) -> None:
    """A folder takes the place of the file, which can then be neither read nor created."""
    seen = command(server, "keys", "create", "--name", "seen", "-q")
    unseen = command(server, "keys", "create", "--name", "unseen", "-q")
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    file = server.folder / "llm-api-server.db"
    with many(server, seen) as clients, server.client() as configured, server.client(unseen) as other:
        wait_until(lambda: statuses(clients) == {200})
        wait_until(lambda: configured.get("/admin/api/requests").json()["data"] == [])
        assert configured.post("/v1/chat/completions", json=chat).status_code == 200
        wait_until(lambda: len(configured.get("/admin/api/requests").json()["data"]) == 1)
        shutil.copy(file, server.folder / "copy.db")
        for part in server.folder.glob("llm-api-server.db*"):
            part.rename(server.folder / f"away-{part.name}")
        file.mkdir()
        wait_until(lambda: "cannot be used" in server.output())
        assert statuses(clients) == {200}
        refused = other.get("/v1/models")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert configured.post("/v1/chat/completions", json=chat).status_code == 200
        assert clients[0].post("/v1/chat/completions", json=chat).status_code == 200
        # After storage.key_grace only keys of the configuration work.
        wait_until(lambda: statuses(clients) == {503})
        assert configured.post("/v1/chat/completions", json=chat).status_code == 200
        file.rmdir()
        for part in server.folder.glob("away-*"):
            part.rename(server.folder / part.name.removeprefix("away-"))
        wait_until(lambda: statuses(clients) == {200})
        wait_until(lambda: other.get("/v1/models").status_code == 200)
        # Usage of the meantime was not lost.
        wait_until(lambda: len(configured.get("/admin/api/requests").json()["data"]) == 4)


def test_postgresql_may_stop_and_start_again(tmp_path: Path, smollm2_gguf: Path, postgres_cluster: Cluster) -> None:
    config = make_config(smollm2_gguf, url=postgres_cluster.new_database())
    with running(tmp_path, config) as server:
        wait_until(lambda: server.models()[MODEL]["state"] == "ready")
        key = command(server, "keys", "create", "--name", "ann", "--tokens-per-day", "1000", "-q")
        body = {"prompt": "Once", "max_tokens": 2, "ignore_eos": True}
        with many(server, key) as clients, server.client() as configured:
            wait_until(lambda: statuses(clients) == {200})
            assert clients[0].post("/v1/completions", json=body).status_code == 200
            postgres_cluster.stop()
            try:
                wait_until(lambda: "cannot be used" in server.output())
                assert statuses(clients) == {200}
                assert clients[1].post("/v1/completions", json=body).status_code == 200
                assert configured.post("/v1/completions", json=body).status_code == 200
                unknown = httpx.get(f"{server.url}/v1/models", headers={"x-api-key": "sk-unknown"})
                assert unknown.json()["error"]["code"] == "store_unavailable"
            finally:
                postgres_cluster.start()
            wait_until(lambda: "is back" in server.output())

            def used() -> list[tuple[str, int]]:
                rows = configured.get("/admin/api/usage", params={"group_by": "key"}).json().get("data", [])
                return sorted((row["key_name"], row["completion_tokens"]) for row in rows)

            wait_until(lambda: used() == [("all", 2), ("ann", 4)])
            command(server, "keys", "delete", "ann")
            wait_until(lambda: statuses(clients) == {401})


def rows(server: Server) -> list[dict[str, Any]]:
    with server.client() as client:
        found: list[dict[str, Any]] = client.get("/admin/api/requests").raise_for_status().json()["data"]
        return found


def open_stream(server: Server, tokens: int = 1500) -> tuple[socket.socket, int]:
    """Start a stream on a bare socket; return it and the pid of the worker that serves it."""
    body = json.dumps({"prompt": "Once", "max_tokens": tokens, "ignore_eos": True, "stream": True}).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-test-0123456789abcdef\r\n"
    connection.sendall(head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body)
    while b'"text"' not in connection.recv(65536):
        pass
    port = connection.getsockname()[1]
    for process in server.processes():
        for found in process.net_connections("tcp"):
            if found.laddr.port == server.port and getattr(found.raddr, "port", 0) == port:
                return connection, process.pid
    raise AssertionError("nobody serves this connection")


def progress_of(server: Server) -> int:
    """Return the completion tokens of the only row of the ledger."""
    (row,) = rows(server)
    return int(row["completion_tokens"])


@pytest.mark.story
def test_killed_worker_loses_at_most_its_unreported_usage(server: Server) -> None:
    connection, worker = open_stream(server)
    with connection:
        wait_until(lambda: len(rows(server)) == 1 and progress_of(server) > 0)
        reported = progress_of(server)
        psutil.Process(worker).send_signal(signal.SIGKILL)
        wait_until(lambda: rows(server)[0]["error"] == "worker_lost")
    (row,) = rows(server)
    assert row["completion_tokens"] >= reported
    assert row["prompt_tokens"] > 0
    assert "a worker was lost with 1 requests" in server.output()


def test_killed_engine_settles_the_tokens_it_sent(server: Server) -> None:
    connection, _ = open_stream(server)
    with connection:
        (engine,) = server.engines()
        engine.kill()
        wait_until(lambda: [row["error"] for row in rows(server)] == ["engine_error"])
    (row,) = rows(server)
    assert row["status"] == 200
    assert row["completion_tokens"] > 0
    assert row["instance"]


def test_killed_manager_loses_no_row_and_counts_none_twice(server: Server) -> None:
    done = threading.Event()
    responses: list[int] = []

    def ask() -> None:
        body = {"prompt": "Once", "max_tokens": 5, "ignore_eos": True}
        with server.client() as client:
            while not done.is_set():
                responses.append(client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            before = len(responses)
            wait_until(lambda before=before: len(responses) > before + 8)
            old = server.manager()
            old.kill()
            wait_until(lambda pid=old.pid: _has_manager(server, but=pid))
    finally:
        done.set()
        for thread in threads:
            thread.join()

    def total() -> dict[str, Any]:
        with server.client() as client:
            return dict(client.get("/admin/api/usage").json()["total"] or {})

    wait_until(lambda: total().get("completion_tokens") == sum(responses))
    assert total()["requests"] == len(responses)
    assert total()["errors"] == 0


def _has_manager(server: Server, *, but: int) -> bool:
    with contextlib.suppress(ValueError, psutil.Error):
        return server.manager().pid != but
    return False
