"""Images by URL are fetched from hosts that the configuration allows, and never from inside, whatever the trick."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from llm_api_server.errors import InvalidRequest
from tests.web import HERE, PICTURE, Web, make_certificate, ok, response

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("tls"))


async def refusal(web: Web, url: str, **config: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        await web.fetcher(**config).fetch(url, "messages[0].content[1].image_url.url")
    assert caught.value.param == "messages[0].content[1].image_url.url"
    return caught.value.message


def redirect(to: str, status: int = 302) -> list[bytes | None]:
    return [response(status, location=to)]


@pytest.fixture
async def web(certificate: Path) -> AsyncIterator[Web]:
    server = Web(certificate)
    await server.start()
    yield server
    await server.stop()


async def test_an_image_is_returned_as_data_with_the_type_of_its_bytes(web: Web) -> None:
    expected = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
    assert await web.fetch("/a.png") == expected
    assert f"host: img.example.com:{web.port}\r\n" in web.asked[-1]
    assert not {"authorization", "cookie", "referer"} & {line.partition(":")[0] for line in web.asked[-1].splitlines()}


@pytest.mark.parametrize(
    "pieces",
    [
        [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n" % len(PICTURE), PICTURE, b"\r\n0\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\n\r\n", PICTURE],
        [ok(PICTURE)[:20], ok(PICTURE)[20:]],
    ],
)
async def test_bodies_of_every_framing_are_read(web: Web, pieces: list[bytes | None]) -> None:
    web.responses["/b"] = pieces
    assert (await web.fetch("/b")).endswith(base64.b64encode(PICTURE).decode())


async def test_redirects_are_followed_up_to_the_limit(web: Web) -> None:
    web.responses |= {"/1": redirect("/2", 301), "/2": redirect(web.url("/a.png", "cdn.example.com"), 307)}
    assert (await web.fetch("/1")).startswith("data:image/png")
    assert web.resolved == ["img.example.com", "img.example.com", "cdn.example.com"]
    assert "redirects" in await refusal(web, web.url("/1"), max_redirects=1)
    web.responses["/loop"] = redirect("/loop")
    assert "redirects" in await refusal(web, web.url("/loop"))


@pytest.mark.parametrize(
    "to",
    [
        "http://img.example.com/a.png", "file:///etc/passwd", "//inside.example.com/a.png", "https://10.0.0.1/a.png",
        "https://[::1]/a.png", "gopher://img.example.com/", "https://user:pw@img.example.com/a.png", "data:image/png,x",
        "https://inside.example.com/", "\\\\inside.example.com\\a.png", "https://img.example.com\r\nx: y/", "ftp://x/",
    ],
)  # fmt: skip
async def test_the_target_of_a_redirect_is_checked_like_the_first_url(web: Web, to: str) -> None:
    web.addresses |= {"inside.example.com": ["10.0.0.1"], "10.0.0.1": ["10.0.0.1"], "::1": ["::1"]}
    web.responses["/r"] = redirect(to)
    await refusal(web, web.url("/r"))
    assert web.connections == 1


@pytest.mark.parametrize(
    "addresses",
    [["10.0.0.1"], [HERE, "169.254.169.254"], ["::1"], ["::ffff:192.168.0.1"], ["fe80::1%lo"], ["64:ff9b::a00:1"], []],
)
async def test_a_name_with_any_private_address_is_refused(web: Web, addresses: list[str]) -> None:
    web.addresses["img.example.com"] = addresses
    assert "no public address" in await refusal(web, web.url("/a.png"))
    assert web.connections == 0


async def test_a_name_is_resolved_once_and_the_checked_address_is_connected_to(web: Web) -> None:
    """DNS rebinding: a second look-up would return a private address."""
    lookups = iter([[HERE], ["10.0.0.1"]])

    async def resolve(host: str, port: int) -> Sequence[str]:
        web.resolved.append(host)
        return next(lookups)

    fetcher = web.fetcher()
    fetcher._resolve = resolve
    assert (await fetcher.fetch(web.url("/a.png"), "p")).startswith("data:")
    assert (web.resolved, web.connections) == (["img.example.com"], 1)


@pytest.mark.parametrize(
    "url",
    [
        "http://img.example.com/a.png", "file:///etc/passwd", "ftp://img.example.com/a.png", "//img.example.com/a.png",
        "/etc/passwd", "../a.png", "https:/img.example.com/a", "https:img.example.com", "https://", "https:///a.png",
        "https://user@img.example.com/a.png", "https://user:pw@img.example.com/", "https://img.example.com@10.0.0.1/",
        "https://img.example.com:99999/", "https://img.example.com:-1/", "https://img.example.com:x/",
        "https://img.example.com\\@10.0.0.1/", "https://img.example.com\t/", "https://img.example.com /",
        "https://a b/", "https://img.example.com/\r\nhost: x", "https://img.example.com\x00/",
        "https://ｅxample.com/", "https://例え.jp/",
        "https://-img.example.com/", "https://img.example.com%2f@10.0.0.1/", "https://[::1", "https://[::1]x/",
        "https://[v1.x]/", "https://*/", "https://./", "https://%31%30.0.0.1/", "jar:https://img.example.com!/a",
        "https://img.example.com/" + "a" * 9000,
    ],
)  # fmt: skip
async def test_urls_that_are_not_plain_https_are_refused_before_any_look_up(web: Web, url: str) -> None:
    await refusal(web, url)
    assert (web.resolved, web.connections) == ([], 0)


@pytest.mark.parametrize(
    ("hosts", "host", "is_allowed"),
    [
        ([], "img.example.com", False),
        (["img.example.com"], "img.example.com", False),  # another port than https's own is to be named
        (["img.example.com:*"], "img.example.com", True),
        (["*.Example.com:*"], "IMG.example.com.", True),
        (["*.example.com:*"], "img.example.com.evil.org", False),
        (["example.com:*"], "img.example.com", False),
    ],
)
async def test_only_hosts_of_the_configuration_are_contacted(
    web: Web, hosts: list[str], host: str, is_allowed: bool
) -> None:
    url = web.url("/a.png", host)
    if is_allowed:
        assert (await web.fetcher(hosts=hosts).fetch(url, "p")).startswith("data:")
    else:
        assert "may not be fetched" in await refusal(web, url, hosts=hosts)
        assert web.resolved == []


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ([ok(PICTURE + bytes(5000))], "larger than the 1000 bytes"),
        ([b"HTTP/1.1 200 OK\r\n\r\n", *[bytes(900)] * 20, None], "larger than the 1000 bytes"),
        ([b"HTTP/1.1 200 OK\r\n", *[b"x: " + b"y" * 9000 + b"\r\n"] * 20, None], "broken response"),
        ([response(404)], "status 404"),
        ([response(500, PICTURE)], "status 500"),
        ([response(302)], "status 302"),
        ([ok(b"<html>secret</html>")], "not a PNG"),
        ([ok(b"")], "not a PNG"),
        ([ok(PICTURE[:14])], "damaged"),
        ([ok(PICTURE)[:-5]], "could not be fetched"),
        ([b"hello\r\n\r\n"], "could not be fetched"),
        ([b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"], "could not be fetched"),
        ([], "could not be fetched"),
    ],
)
async def test_a_response_without_an_image_of_an_allowed_size_is_refused(
    web: Web, pieces: list[bytes | None], words: str
) -> None:
    web.responses["/x"] = pieces
    message = await refusal(web, web.url("/x"), max_bytes=1000)
    assert words in message
    assert "secret" not in message


@pytest.mark.parametrize("pieces", [[None], [ok(PICTURE)[:-5], None], [b"HTTP/1.1 200 OK\r\n", None]])
async def test_a_fetch_ends_with_its_timeout(web: Web, pieces: list[bytes | None]) -> None:
    web.responses["/slow"] = pieces
    assert "within 0.2 seconds" in await refusal(web, web.url("/slow"), timeout=0.2)


async def test_the_certificate_must_be_for_the_host(web: Web) -> None:
    assert "could not be fetched" in await refusal(web, web.url("/a.png", "example.org"))
    assert web.asked == []


async def test_an_unreachable_host_is_reported(web: Web) -> None:
    port, web.port = web.port, 1
    assert "could not be fetched" in await refusal(web, web.url("/a.png"))
    web.port = port
