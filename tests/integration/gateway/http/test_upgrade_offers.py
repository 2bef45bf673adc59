"""Requests that offer another protocol are answered over HTTP/1.1, with their bodies."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llm_api_server.config.models import ApiKeyConfig, AuthConfig
from tests import needs
from tests.gateway_worker import KEY, Gateway, chat_body, make_config, run_engine, run_gateway, short_run_dir

pytestmark = pytest.mark.anyio

#: As curl and the JDK send it, other protocols, and unusual ways to write it.
OFFERS = [
    ["connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABkAAQAAP__"],
    ["Connection: upgrade", "Upgrade: websocket", "sec-websocket-key: x", "sec-websocket-version: 13"],
    ["connection: keep-alive, Upgrade", "upgrade: TLS/1.2, IRC/6.9"],
    ["upgrade: h2c", "connection: keep-alive", "connection: Upgrade"],
]
BODY = json.dumps(chat_body("hello")).encode()
SECRET = "dY0p7Qm2Zx9Lr4Wv6Tb8Nc1Kf3Hs5Ga0Ej"
PLAIN = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


def request(path: str, body: bytes, *lines: str, is_chunked: bool = False) -> bytes:
    framing = "transfer-encoding: chunked" if is_chunked else f"content-length: {len(body)}"
    head = [
        f"POST {path} HTTP/1.1",
        "host: x",
        f"authorization: Bearer {KEY}",
        "content-type: application/json",
        *lines,
        framing,
        "",
        "",
    ]
    return "\r\n".join(head).encode() + (b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if is_chunked else body)


async def statuses(gateway: Gateway, reads: list[bytes], count: int) -> list[int]:
    """Send each of `reads` by itself and return the statuses of `count` responses."""
    reader, writer = await asyncio.open_connection(gateway.client.base_url.host, gateway.client.base_url.port)
    found = []
    try:
        for data in reads:
            writer.write(data)
            await writer.drain()
            await asyncio.sleep(0.01)
        for _ in range(count):
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            assert length is not None, head
            await reader.readexactly(int(length[1]))
            found.append(int(head.split()[1]))
    finally:
        writer.close()
    return found


@pytest.fixture(scope="module")
async def plain() -> AsyncIterator[Gateway]:
    """A worker with plain responses, so that each has a length, and with tokens."""
    with short_run_dir() as run_dir:
        keys = [ApiKeyConfig(key=KEY, name="all")]
        config = make_config(run_dir).model_copy(update={"auth": AuthConfig(api_keys=keys, secret_key=SECRET)})
        async with run_engine(run_dir) as engine_socket, run_gateway(run_dir, engine_socket, config) as gateway:
            gateway.use_vllm()
            yield gateway


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", BODY),
        ("/v1/embeddings", b'{"model": "m", "input": "a"}'),
        ("/v1/messages", json.dumps({**chat_body("hello"), "max_tokens": 8}).encode()),
        ("/auth/token", b'{"expires_in": 60}'),
    ],
)
async def test_offer_is_ignored_and_the_connection_goes_on(
    plain: Gateway, path: str, body: bytes, is_chunked: bool, offer: list[str]
) -> None:
    offered = request(path, body, *offer, is_chunked=is_chunked)
    follower = request(path, body)
    together = await statuses(plain, [offered + follower + offered + PLAIN], 4)
    assert together == [200, 200, 200, 200]
    end = offered.index(b"\r\n\r\n") + 4
    reads = [offered[:30], offered[30:end], offered[end:-2], offered[-2:], follower, PLAIN]
    assert await statuses(plain, reads, 3) == [200, 200, 200]


async def test_repeated_head_with_an_offer(plain: Gateway) -> None:
    before = len(plain.engine_bodies())
    assert await statuses(plain, [request("/v1/chat/completions", BODY, *OFFERS[0])] * 3, 3) == [200] * 3
    assert len(plain.engine_bodies()) == before + 3


async def test_get_with_an_offer(plain: Gateway) -> None:
    offered = "\r\n".join(["GET /health HTTP/1.1", "host: x", *OFFERS[0], "", ""]).encode()
    assert await statuses(plain, [offered + offered + PLAIN], 3) == [200] * 3
    assert await statuses(plain, [offered * 1500], 1500) == [200] * 1500  # more than the depth of the stack


async def test_connect_is_refused_and_ends_the_connection(plain: Gateway) -> None:
    reader, writer = await asyncio.open_connection(plain.client.base_url.host, plain.client.base_url.port)
    writer.write(b"CONNECT a.test:80 HTTP/1.1\r\nhost: a.test\r\n\r\n" + PLAIN)
    assert re.findall(rb"HTTP/1.1 (\d)", await reader.read()) == [b"4"]
    writer.close()


async def run(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    return output.decode()


async def test_curl_with_http2(plain: Gateway) -> None:
    curl = shutil.which("curl")
    if curl is None:
        needs.missing("curl", "curl is not installed")
    url = f"{plain.client.base_url}/v1/chat/completions"
    sent = ["-H", f"authorization: Bearer {KEY}", "-d", BODY.decode(), "-w", "\n%{http_code} %{http_version}\n"]
    output = await run(curl, "-s", "--http2", *sent, url, url)
    if "Unsupported protocol" in output or "does not support" in output:
        needs.missing("curl", "curl was built without HTTP/2")
    assert output.splitlines().count("200 1.1") == 2, output


JAVA = """
import java.net.URI;
import java.net.http.*;

public class Client {
    public static void main(String[] args) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        for (int i = 0; i < 2; i++) {
            HttpRequest request = HttpRequest.newBuilder(URI.create(args[0] + "/v1/chat/completions"))
                .header("authorization", "Bearer " + args[1])
                .POST(HttpRequest.BodyPublishers.ofString(args[2])).build();
            HttpResponse<String> response = client.send(request, HttpResponse.BodyHandlers.ofString());
            System.out.println(response.statusCode() + " " + response.version());
        }
    }
}
"""


async def test_jdk_client_over_its_default_protocol(plain: Gateway, tmp_path: Path) -> None:
    java = shutil.which("java")
    if java is None or shutil.which("javac") is None:
        needs.missing("java", "no JDK is installed")
    source = tmp_path / "Client.java"
    source.write_text(JAVA)
    output = await run(java, "-Xshare:auto", str(source), str(plain.client.base_url), KEY, BODY.decode())
    assert output.splitlines() == ["200 HTTP_1_1"] * 2, output
