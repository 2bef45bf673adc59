"""Who leaves, and whose time is over: the request ends in any case, and its engine may say how long it was."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from llm_api_server.control import InstanceInfo
from llm_api_server.gateway import aborts
from llm_api_server.gateway.client import ClientGone, watch
from llm_api_server.gateway.openai import ENDPOINTS, RequestFacts, read_request
from llm_api_server.gateway.upstream import NoResponse, UpstreamClient

pytestmark = pytest.mark.anyio

VLLM = InstanceInfo("i", "m", "vllm", "unix:/nowhere")


async def gone() -> dict[str, Any]:
    return {"type": "http.disconnect"}


async def never() -> Any:
    await asyncio.Event().wait()


async def nothing() -> None:
    """No engine is asked."""


async def run(
    receive: Callable[[], Awaitable[Any]], wind_down: Callable[[], Awaitable[None]], *, limit: float = 60
) -> str:
    """How a request ended that goes on until it is cancelled."""
    try:
        async with watch(receive, asyncio.get_running_loop().time() + limit, wind_down):
            await never()
    except (ClientGone, TimeoutError) as end:
        return type(end).__name__
    return "went on"


async def test_a_client_that_leaves_ends_its_request() -> None:
    assert await run(gone, nothing) == "ClientGone"


async def test_time_ends_a_request() -> None:
    assert await run(never, nothing, limit=0.01) == "TimeoutError"


async def test_a_request_ends_though_its_winding_down_fails() -> None:
    async def fail() -> None:
        raise RuntimeError("unforeseen")

    failures: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    assert await run(gone, fail) == "ClientGone"


@pytest.mark.parametrize(("receive", "end"), [(gone, ClientGone), (never, TimeoutError)])
async def test_what_ends_while_it_is_wound_down_has_ended_for_the_same_reason(
    receive: Callable[[], Awaitable[Any]], end: type[Exception]
) -> None:
    last_words = asyncio.Event()

    async def wind_down() -> None:
        last_words.set()
        await never()

    with pytest.raises(end):
        async with watch(receive, asyncio.get_running_loop().time() + 0.01, wind_down):
            await last_words.wait()


async def test_a_request_that_ends_first_was_not_given_up() -> None:
    async with watch(never, asyncio.get_running_loop().time() + 60, nothing):
        await asyncio.sleep(0)


async def test_a_cancelled_request_stays_cancelled() -> None:
    task = asyncio.create_task(run(never, nothing))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def facts(path: str, body: dict[str, Any]) -> RequestFacts:
    return read_request(ENDPOINTS[path], msgspec.json.encode(body))


@pytest.mark.parametrize(
    ("path", "body", "ids"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "n": 2}, ["chatcmpl-r"]),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}, ["chatcmpl-r"]),
        ("/v1/completions", {"prompt": "a"}, ["cmpl-r-0"]),
        ("/v1/completions", {"prompt": [1, 2]}, ["cmpl-r-0"]),
        ("/v1/completions", {"prompt": ["a", "b"]}, ["cmpl-r-0", "cmpl-r-1"]),
        ("/v1/responses", {"input": "hi"}, ["resp_r_0"]),
        ("/v1/embeddings", {"input": "hi"}, []),
    ],
)
def test_the_names_of_a_request_in_vllm(path: str, body: dict[str, Any], ids: list[str]) -> None:
    assert aborts.engine_ids(facts(path, body), "r") == ids


async def test_nobody_is_asked_without_a_name_or_another_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    async def post(*_: Any, **__: Any) -> None:
        pytest.fail("an empty list would end all requests of the engine")

    upstream = UpstreamClient()
    monkeypatch.setattr(upstream, "post", post)
    assert not await aborts.abort(upstream, VLLM, [])
    assert not await aborts.abort(upstream, msgspec.structs.replace(VLLM, engine="llama_cpp"), ["chatcmpl-r"])


async def test_an_engine_that_does_not_answer_has_ended_nothing() -> None:
    upstream = UpstreamClient()
    with pytest.raises(NoResponse):
        await upstream.post(VLLM.address, "/", b"", content_type="x/y", headers={})
    assert not await aborts.abort(upstream, VLLM, ["chatcmpl-r"])
