"""Whose address counts, and which requests need a middleware, where ASGI is passed by."""

from __future__ import annotations

from typing import Any, cast

import pytest

from llm_api_server.config.models import Config, ServerConfig
from llm_api_server.gateway.proxy.services import FastPathHandler, ProxyServices

FORWARDED = b"x-forwarded-for"


class _Proxy:
    max_body_bytes = 1000


def door(**server: Any) -> FastPathHandler:
    return FastPathHandler(Config(server=ServerConfig(**server)), cast("ProxyServices", _Proxy()))


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("10.0.0.1", [b"203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", [b"203.0.113.9, 10.0.0.2"], "203.0.113.9"),
        # A client's own header comes first, the proxy's word last.
        ("10.0.0.1", [b"192.0.2.1", b"203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", [b"192.0.2.1", b"10.0.0.2"], "192.0.2.1"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", [b""], "10.0.0.1"),
        ("198.51.100.7", [b"203.0.113.9"], "198.51.100.7"),
        (None, [b"203.0.113.9"], None),
    ],
)
def test_the_word_of_trusted_proxies_counts(peer: str | None, forwarded: list[bytes], address: str | None) -> None:
    headers = [(FORWARDED, value) for value in forwarded]
    assert door(trusted_proxies=["10.0.0.0/8"]).address(peer, headers) == address
    assert door().address(peer, headers) == peer


def test_browsers_of_other_origins_need_the_middleware_where_it_is_configured() -> None:
    foreign, own = [(b"origin", b"https://ui.test")], [(b"host", b"x")]
    assert door().takes(foreign)
    open_door = door(cors_origins=["https://ui.test"])
    assert (open_door.takes(foreign), open_door.takes(own)) == (False, True)


def test_every_engine_endpoint_has_this_way_in() -> None:
    endpoints = door().endpoints
    assert endpoints[b"/v1/chat/completions"].permission == "chat"
    assert all(path.decode() == endpoint.path for path, endpoint in endpoints.items())
