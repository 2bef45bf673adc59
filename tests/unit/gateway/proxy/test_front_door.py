"""Address of a client behind proxies, and the requests that bypass ASGI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_api_server.config.models import Config, ServerConfig
from llm_api_server.gateway.app import build_worker
from llm_api_server.gateway.manager_link.leases import Leases
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.gateway.proxy.front_door import EngineProxy
from llm_api_server.gateway.proxy.running_requests import RunningRequests
from llm_api_server.gateway.wire.endpoints import ENDPOINTS
from llm_api_server.http_client.client import HttpClient
from llm_api_server.ipc.run_dir import RunDir

FORWARDED = b"x-forwarded-for"
CHAT = b"/v1/chat/completions"


def proxy(**server: Any) -> EngineProxy:
    leases = Leases(ManagerLink(RunDir(Path("/nonexistent")), lambda _: None))
    return build_worker(Config(server=ServerConfig(**server)), leases, HttpClient(), RunningRequests()).proxy


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("10.0.0.1", [b"203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", [b"203.0.113.9, 10.0.0.2"], "203.0.113.9"),
        # The client's own header comes first, that of the proxy last.
        ("10.0.0.1", [b"192.0.2.1", b"203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", [b"192.0.2.1", b"10.0.0.2"], "192.0.2.1"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", [b""], "10.0.0.1"),
        ("198.51.100.7", [b"203.0.113.9"], "198.51.100.7"),
        (None, [b"203.0.113.9"], None),
    ],
)
def test_only_trusted_proxies_forward_an_address(peer: str | None, forwarded: list[bytes], address: str | None) -> None:
    headers = [(FORWARDED, value) for value in forwarded]
    assert proxy(trusted_proxies=["10.0.0.0/8"]).client_address(peer, headers) == address
    assert proxy().client_address(peer, headers) == peer


def test_requests_of_other_origins_need_the_cors_middleware_if_it_is_configured() -> None:
    foreign, own = [(b"origin", b"https://ui.test")], [(b"host", b"x")]
    assert proxy().accepts(CHAT, foreign)
    with_cors = proxy(cors_origins=["https://ui.test"])
    assert (with_cors.accepts(CHAT, foreign), with_cors.accepts(CHAT, own)) == (False, True)


def test_every_engine_endpoint_is_accepted_and_no_other_path() -> None:
    engine_proxy = proxy()
    assert all(engine_proxy.accepts(path.encode(), []) for path in ENDPOINTS)
    assert not any(engine_proxy.accepts(path, []) for path in (b"/health", b"/v1/models", b"/", CHAT + b"?x=1"))
