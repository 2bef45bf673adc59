"""Address of a client behind proxies, and the requests that bypass ASGI."""

from __future__ import annotations

from typing import Any, cast

import pytest

from llm_api_server.config.models import ServerConfig
from llm_api_server.event_loop.write_buffer import WriteBuffer
from llm_api_server.gateway.proxy.front_door import EngineProxy, FastPathHandler
from llm_api_server.gateway.wire.endpoints import ENDPOINTS

FORWARDED = b"x-forwarded-for"
CHAT = b"/v1/chat/completions"


class _Proxy:
    """Stand-in: no request is opened here."""

    open = None


def handler(**server: Any) -> FastPathHandler:
    return FastPathHandler(ServerConfig(**server), cast("EngineProxy", _Proxy()), WriteBuffer())


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
    assert handler(trusted_proxies=["10.0.0.0/8"]).client_address(peer, headers) == address
    assert handler().client_address(peer, headers) == peer


def test_requests_of_other_origins_need_the_cors_middleware_if_it_is_configured() -> None:
    foreign, own = [(b"origin", b"https://ui.test")], [(b"host", b"x")]
    assert handler().accepts(CHAT, foreign)
    with_cors = handler(cors_origins=["https://ui.test"])
    assert (with_cors.accepts(CHAT, foreign), with_cors.accepts(CHAT, own)) == (False, True)


def test_every_engine_endpoint_is_accepted_and_no_other_path() -> None:
    fast_path = handler()
    assert all(fast_path.accepts(path.encode(), []) for path in ENDPOINTS)
    assert not any(fast_path.accepts(path, []) for path in (b"/health", b"/v1/models", b"/", CHAT + b"?x=1"))
