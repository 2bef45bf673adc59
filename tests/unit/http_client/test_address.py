"""Addresses of servers, and requests as they are sent there."""

from __future__ import annotations

import pytest

from llm_api_server.http_client.address import Address, encode_request


@pytest.mark.parametrize(
    ("text", "host", "target"),
    [
        ("unix:/run/x.sock", "localhost", "/v1/x"),
        ("http://h:80", "h", "/v1/x"),
        ("http://h:81/", "h:81", "/v1/x"),
        ("https://h/v1", "h", "/v1/x"),
        ("https://h:443/openai/v1/", "h", "/openai/v1/x"),
        ("https://[::1]/", "[::1]", "/v1/x"),
        ("http://[::1]:81", "[::1]:81", "/v1/x"),
    ],
)
def test_an_address_has_a_host_header_and_a_target(text: str, host: str, target: str) -> None:
    address = Address.parse(text)
    assert (address.host_header, address.target("/v1/x")) == (host, target)


@pytest.mark.parametrize(
    ("body", "rest"), [(None, b"\r\n"), (b"", b"content-length: 0\r\n\r\n"), (b"ab", b"content-length: 2\r\n\r\nab")]
)
def test_a_request_has_its_headers_and_the_length_of_its_body(body: bytes | None, rest: bytes) -> None:
    head = b"GET /v1/x HTTP/1.1\r\nhost: h:81\r\naccept-encoding: identity\r\nx-key: k\r\n"
    assert encode_request("GET", "http://h:81", "/v1/x", {"x-key": "k"}, body) == head + rest
