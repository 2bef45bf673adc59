"""Random bytes in place of a key, on a real server's socket: 4xx or a closed connection, never 2xx or 5xx."""

from __future__ import annotations

import random
import socket
from pathlib import Path

import pytest

from tests.running import KEY, Server, running

REQUESTS = 600
PARTS = [
    b"Bearer", b"bearer", b"Basic", b" ", b"\t", b"  ", b":", b",", b"sk-", KEY[:-1].encode(), KEY.upper().encode(),
    b"eyJhbGciOiJub25lIn0", b".", b"..", b"e30.e30.", b"\x00", b"\xff\xfe", "é新".encode(), b"%00", b"'--", b"null",
    b"\r\n ", b"=" * 50, b"A" * 300,
]  # fmt: skip


def ask(server: Server, headers: bytes) -> int:
    """Return the status, or 0 if the connection was closed without one."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" + headers + b"\r\n\r\n")
        response = b""
        try:
            while data := connection.recv(65536):
                response += data
        except ConnectionError:
            return 0
    return int(response.split(b" ", 2)[1]) if response.startswith(b"HTTP/1.1 ") else 0


def test_only_a_valid_key_is_accepted(tmp_path: Path) -> None:
    chance = random.Random(20261122)
    with running(tmp_path, {"auth": {"secret_key": "dY0p7Qm2Zx9Lr4Wv6Tb8Nc1Kf3Hs5Ga0Ej"}}) as server:
        seen = set()
        for _ in range(REQUESTS):
            lines = []
            for _ in range(chance.randint(1, 3)):
                name = chance.choice([b"authorization", b"Authorization", b"x-api-key", b"X-API-KEY"])
                value = b"".join(chance.choices(PARTS, k=chance.randint(0, 5))) + chance.randbytes(chance.randint(0, 8))
                lines.append(name + b": " + value)
            status = ask(server, b"\r\n".join(lines))
            assert status == 0 or 400 <= status < 500, (status, lines)
            seen.add(status)
        assert 401 in seen
        assert ask(server, b"authorization: Bearer " + KEY.encode()) == 200
        log = (server.folder / "logs" / "gateway.log").read_text()
        assert "Traceback" not in log


@pytest.mark.parametrize("command", ["serve", "gunicorn"])
@pytest.mark.parametrize(("trusted", "status"), [([], 403), (["127.0.0.0/8"], 200), (["10.0.0.0/8"], 403)])
def test_only_a_trusted_proxy_states_the_clients_address(
    tmp_path: Path, command: str, trusted: list[str], status: int
) -> None:
    key = {"key": KEY, "name": "away", "networks": ["203.0.113.0/24"]}
    config = {"server": {"trusted_proxies": trusted}, "auth": {"api_keys": [key]}}
    with running(tmp_path, config, command=command) as server:
        forwarded = b"\r\nx-forwarded-for: 203.0.113.7"
        assert ask(server, b"authorization: Bearer " + KEY.encode() + forwarded) == status
        assert ask(server, b"authorization: Bearer " + KEY.encode()) == 403
