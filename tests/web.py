"""A web server with TLS for all names of `*.example.com`, on this machine, and the fetcher that finds it there."""

from __future__ import annotations

import asyncio
import datetime as dt
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from llm_api_server.config.models import MediaConfig
from llm_api_server.gateway.media.fetcher import MediaFetcher
from llm_api_server.gateway.media.public_addresses import is_public
from tests.pictures import png

PICTURE = png(3, 2)
HERE = "127.0.0.1"


def make_certificate(folder: Path) -> Path:
    """Make a self-signed certificate of `*.example.com`, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = dt.datetime.now(dt.UTC)
    built = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("*.example.com")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "both.pem"
    plain = serialization.NoEncryption()
    path.write_bytes(
        built.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    )
    return path


def response(status: int, body: bytes = b"", **headers: str) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} x\r\n{lines}content-length: {len(body)}\r\n\r\n".encode() + body


def ok(body: bytes) -> bytes:
    return response(200, body, content_type="text/html")


class Web:
    """A web server for all names, with the resolver and fetcher that reach it."""

    def __init__(self, certificate: Path) -> None:
        self._certificate = certificate
        self.port = 0
        self.asked: list[str] = []
        self.resolved: list[str] = []
        self.connections = 0
        #: By path: what to write, in pieces; None at the end keeps the connection open.
        self.responses: dict[str, list[bytes | None]] = {"/a.png": [ok(PICTURE)]}
        self.addresses: dict[str, Sequence[str]] = {}

    async def start(self) -> None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(self._certificate)
        self._server = await asyncio.start_server(self._serve, HERE, 0, ssl=tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self._server.close()

    def url(self, path: str, host: str = "img.example.com") -> str:
        return f"https://{host}:{self.port}{path}"

    def fetcher(self, **config: Any) -> MediaFetcher:
        settings = MediaConfig(**{"hosts": ["*"], "timeout": 5.0, **config})
        return MediaFetcher(
            settings,
            resolve=self.resolve,
            may_connect=lambda address: address == HERE or is_public(address),
            tls=ssl.create_default_context(cafile=str(self._certificate)),
        )

    async def fetch(self, path: str, **config: Any) -> str:
        return await self.fetcher(**config).fetch(self.url(path), "messages[0]")

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        self.resolved.append(host)
        return self.addresses.get(host, [HERE])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.asked.append(head)
            for piece in self.responses.get(head.split(" ")[1], [response(404)]):
                if piece is None:
                    await reader.read()
                else:
                    writer.write(piece)
                    await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort() if writer.transport.is_closing() else writer.close()
