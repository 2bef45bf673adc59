"""Probes of an engine against real sockets that respond well, slowly, in chunks, badly or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from llm_api_server.engines import readiness
from llm_api_server.engines.base import LaunchPlan, ModelProblem, Warmup

pytestmark = pytest.mark.anyio

Handler = Callable[[bytes], Awaitable[bytes]]


@asynccontextmanager
async def serving(path: Path, responses: list[bytes]) -> AsyncIterator[list[bytes]]:
    """Serve one response per connection, the last one repeatedly. Yield the requests received."""
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
        requests.append(head + await reader.readexactly(length))
        writer.write(responses.pop(0) if len(responses) > 1 else responses[0])
        await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    async with server:
        yield requests


def response(body: str, status: int = 200) -> bytes:
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


@pytest.mark.parametrize(
    "raw",
    [
        response("hello"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nhello",
    ],
)
async def test_responses_of_every_framing_are_read(tmp_path: Path, raw: bytes) -> None:
    async with serving(tmp_path / "s", [raw]) as requests:
        got = await readiness.request(f"unix:{tmp_path / 's'}", "POST", "/p", {"a": 1})
    assert (got.status, got.body) == (200, b"hello")
    assert requests[0].startswith(b"POST /p HTTP/1.1\r\n")
    assert requests[0].endswith(b'{"a": 1}')


@pytest.mark.parametrize(
    "raw", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\ncut", b"HTTP/1.1 200 OK\r\n"]
)
async def test_a_broken_response_is_a_failed_probe(tmp_path: Path, raw: bytes) -> None:
    async with serving(tmp_path / "s", [raw]):
        with pytest.raises(readiness.ProbeFailed):
            await readiness.request(f"unix:{tmp_path / 's'}", "GET", "/")


async def test_a_missing_socket_is_a_failed_probe(tmp_path: Path) -> None:
    with pytest.raises(readiness.ProbeFailed):
        await readiness.request(f"unix:{tmp_path / 'none'}", "GET", "/")


async def test_engines_are_reached_over_tcp() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(response("tcp"))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        assert (await readiness.request(f"http://127.0.0.1:{port}", "GET", "/")).body == b"tcp"


async def test_an_engine_is_healthy_with_its_first_200(tmp_path: Path) -> None:
    waiting = asyncio.create_task(readiness.wait_healthy(f"unix:{tmp_path / 's'}", interval=0.001))
    async with serving(tmp_path / "s", [response("loading", 503), b"", response("ok")]) as requests:
        await waiting
    assert len(requests) == 3


async def test_the_warm_up_sends_the_request_of_the_plan(tmp_path: Path) -> None:
    plan = LaunchPlan([], f"unix:{tmp_path / 's'}", warmup=Warmup("/v1/completions", {"prompt": "Hi"}))
    async with serving(tmp_path / "s", [response("{}")]) as requests:
        await readiness.warm_up(plan)
    assert requests[0].startswith(b"POST /v1/completions ")


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (response('{"error": {"message": "no room in /srv/x"}}', 500), "first request failed: no room in x"),
        (response('{"error": "flat"}', 400), "failed: flat"),
        (response("<html>", 502), "failed: status 502"),
        (b"", "broke the connection"),
    ],
)
async def test_a_failed_warm_up_is_a_model_problem_with_its_reason(tmp_path: Path, raw: bytes, reason: str) -> None:
    plan = LaunchPlan([], f"unix:{tmp_path / 's'}", warmup=Warmup("/x", {}))
    async with serving(tmp_path / "s", [raw]):
        with pytest.raises(ModelProblem, match=reason):
            await readiness.warm_up(plan)


async def test_without_a_warm_up_nothing_is_sent(tmp_path: Path) -> None:
    async with serving(tmp_path / "s", [response("{}")]) as requests:
        await readiness.warm_up(LaunchPlan([], f"unix:{tmp_path / 's'}"))
    assert requests == []
