"""Addresses of HTTP servers and the heads of requests to them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Address:
    """`unix:/path` or `http(s)://host[:port][/prefix]`, parsed."""

    host: str
    port: int = 0
    socket_path: str | None = None
    tls: bool = False
    prefix: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        if text.startswith("unix:"):
            return cls(host="localhost", socket_path=text.removeprefix("unix:"))
        url = urlsplit(text)
        tls = url.scheme == "https"
        return cls(url.hostname or "", url.port or (443 if tls else 80), None, tls, url.path.rstrip("/"))

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        if self.socket_path is not None or self.port == (443 if self.tls else 80):
            return host
        return f"{host}:{self.port}"

    def target(self, path: str) -> str:
        """Return `path` below the prefix; a prefix that ends in `/v1`, as OpenAI base URLs do, is not doubled."""
        if self.prefix.endswith("/v1") and path.startswith("/v1/"):
            path = path.removeprefix("/v1")
        return self.prefix + path


parse_address = lru_cache(1024)(Address.parse)


def encode_request(method: str, address: str, path: str, headers: Mapping[str, str], body: bytes | None) -> bytes:
    """Return head and body in one piece. Without a body (None) the request has no content-length."""
    head = encode_head(address, path, headers, method=method)
    return head + (b"\r\n" if body is None else b"content-length: %d\r\n\r\n%b" % (len(body), body))


def encode_head(address: str, path: str, headers: Mapping[str, str], *, method: str = "POST") -> bytes:
    """Return the request line and header lines; the body's length and the empty line are the caller's to add."""
    target = parse_address(address)
    first = f"{method} {target.target(path)} HTTP/1.1\r\nhost: {target.host_header}\r\naccept-encoding: identity\r\n"
    return (first + "".join([f"{name}: {value}\r\n" for name, value in headers.items()])).encode("latin-1")
