"""Configurations of reverse proxies in `deploy/`, without TLS, between real clients and a real server.

An engine sends each chunk only after the client has read the one before, so that any buffering hangs.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from llm_api_server.config.models import ServerConfig
from llm_api_server.lifecycle.server_lock import KEEP_ALIVE_TIMEOUT
from tests.fake_engine import Engine
from tests.needs import missing
from tests.running import KEY, KEYS, ROOT, TLS, Server, free_port, running
from tests.waiting import wait_until

NGINX_FILE = ROOT / "deploy/nginx/llm-api-server.conf"
CADDY_FILE = ROOT / "deploy/caddy/Caddyfile"
#: On Linux all of 127.0.0.0/8 is this machine: clients can have addresses that are not the proxy's.
HOME, ELSEWHERE = "127.0.0.2", "127.0.0.3"
HELD_KEY = "sk-held-0123456789abcdef"
PIECES = 4


class SlowEngine:
    """A remote engine; `let(n)` allows it to send its first `n` chunks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loop = asyncio.new_event_loop()
        self.port = free_port()
        self._is_ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._is_ready.wait()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._is_over = asyncio.Event()
        engine = Engine(self._folder / "engine")
        async with await asyncio.start_server(engine.serve, "127.0.0.1", self.port):
            self._is_ready.set()
            await self._is_over.wait()

    def let(self, count: int) -> None:
        fresh = self._folder / "next"
        fresh.write_text(str(count))
        fresh.replace(self._folder / "engine.go")

    def log(self) -> list[str]:
        file = self._folder / "engine.log"
        return file.read_text().splitlines() if file.exists() else []

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._is_over.set)
        self._thread.join()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[SlowEngine]:
    one = SlowEngine(tmp_path)
    yield one
    one.close()


@pytest.fixture
def server(tmp_path: Path, engine: SlowEngine) -> Iterator[Server]:
    held = {"key": HELD_KEY, "name": "held", "networks": [f"{HOME}/32"]}
    config = {
        "server": {"trusted_proxies": ["127.0.0.1"], "max_body_bytes": 100_000},
        "auth": {"api_keys": [*KEYS, held]},
        "models": {"default": "slow", "available": {"slow": {"path": f"http://127.0.0.1:{engine.port}/v1"}}},
    }
    with running(tmp_path, config) as one:
        yield one


def is_open(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


def substituted(text: str, *pairs: tuple[str, str]) -> str:
    """Replace each first string of `pairs` with the second; remove its lines if the second is empty."""
    for old, new in pairs:
        assert old in text, f"{old!r} is no longer in the file"
        lines = text.splitlines(keepends=True)
        text = text.replace(old, new) if new else "".join(line for line in lines if old not in line)
    return text


def nginx(folder: Path, port: int, server: Server) -> list[str]:
    program = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    program = program or missing("nginx", "nginx is not installed (apt-get install nginx-light)")
    site = substituted(
        NGINX_FILE.read_text(),
        ("listen [::]:443", ""),
        ("listen 443 ssl http2;", f"listen 127.0.0.1:{port};"),
        ("ssl_", ""),
        ("127.0.0.1:8050", f"127.0.0.1:{server.port}"),
    )
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    # One process, of this user.
    main = f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/errors; events {{}}"
    (folder / "nginx.conf").write_text(f"{main}\nhttp {{ access_log off; {paths}\n{site}\n}}\n")
    return [program, "-p", str(folder), "-c", str(folder / "nginx.conf")]


def caddy(folder: Path, port: int, server: Server) -> list[str]:
    program = shutil.which("caddy") or missing("caddy", "Caddy is not installed (apt-get install caddy)")
    site = substituted(
        CADDY_FILE.read_text(),
        ("llm.example.com {", f"http://127.0.0.1:{port} {{"),
        ("tls /", ""),
        ("127.0.0.1:8050", f"127.0.0.1:{server.port}"),
    )
    (folder / "Caddyfile").write_text("{\n\tadmin off\n}\n" + site)
    return [program, "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]


@contextmanager
def proxied(folder: Path, command: list[str], port: int) -> Iterator[str]:
    """Run the proxy and yield its address."""
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(folder)}
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: is_open(port) or process.poll() is not None)
        assert process.poll() is None, (folder / "output").read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture(params=[nginx, caddy], ids=["nginx", "caddy"])
def url(request: pytest.FixtureRequest, tmp_path: Path, server: Server) -> Iterator[str]:
    folder = tmp_path / "proxy"
    folder.mkdir()
    port = free_port()
    with proxied(folder, request.param(folder, port, server), port) as address:
        yield address


def client(url: str, *, address: str = HOME, key: str = KEY, **headers: str) -> httpx.Client:
    return httpx.Client(
        base_url=url,
        headers={"Authorization": f"Bearer {key}", **headers},
        transport=httpx.HTTPTransport(local_address=address, verify=TLS),
        timeout=120,
    )


def body(content: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **more}


def pieces(response: httpx.Response) -> Iterator[str]:
    for line in response.iter_lines():
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                if "content" in choice["delta"]:
                    yield choice["delta"]["content"]


def test_proxy_relays_streams_chunk_by_chunk(url: str, engine: SlowEngine) -> None:
    """The engine sends the next chunk only after this one has arrived: a proxy that buffers would hang."""
    engine.let(1)
    with (
        client(url) as one,
        one.stream("POST", "/v1/chat/completions", json=body(f"chunks:{PIECES}", stream=True)) as response,
    ):
        assert response.status_code == 200
        seen = []
        for piece in pieces(response):
            seen.append(piece)
            engine.let(len(seen) + 1)
    assert seen == [str(index) for index in range(PIECES)]


def test_client_that_leaves_the_proxy_aborts_its_request(url: str, engine: SlowEngine) -> None:
    engine.let(1)
    with (
        client(url) as one,
        one.stream("POST", "/v1/chat/completions", json=body(f"chunks:{PIECES}", stream=True)) as response,
    ):
        next(pieces(response))
    wait_until(lambda: "aborted" in engine.log())


def test_client_address_reaches_the_server(url: str, server: Server) -> None:
    def status(url: str, address: str, **headers: str) -> int:
        with client(url, address=address, key=HELD_KEY, **headers) as one:
            return one.get("/v1/models").status_code

    assert status(url, HOME) == 200
    assert status(url, ELSEWHERE) == 403
    assert status(url, ELSEWHERE, **{"X-Forwarded-For": HOME}) == 403
    assert status(server.url, ELSEWHERE, **{"X-Forwarded-For": HOME}) == 403


def test_too_large_bodies_are_refused_by_the_server_not_the_proxy(url: str) -> None:
    with client(url) as one:
        response = one.post("/v1/chat/completions", json=body("x" * 200_000))
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


def value(file: Path, word: str, unit: str) -> int:
    """Return the value of a directive in `unit`."""
    (found,) = {line.split()[1] for line in file.read_text().splitlines() if line.split()[:1] == [word]}
    return int(found.rstrip(";").removesuffix(unit))


def test_limits_of_the_proxy_exceed_those_of_the_server() -> None:
    default = ServerConfig()
    sizes = value(NGINX_FILE, "client_max_body_size", "m"), value(CADDY_FILE, "max_size", "MiB")
    assert all(size * 1024**2 > default.max_body_bytes for size in sizes)
    waits = value(NGINX_FILE, "proxy_read_timeout", "s"), value(CADDY_FILE, "response_header_timeout", "s")
    assert all(wait > default.timeout for wait in waits)
    idle = value(NGINX_FILE, "keepalive_timeout", "s"), value(CADDY_FILE, "keepalive", "s")
    assert all(seconds < KEEP_ALIVE_TIMEOUT for seconds in idle)
