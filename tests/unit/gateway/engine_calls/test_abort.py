"""How a generation that nobody waits for is ended at its engine."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from llm_api_server.gateway.engine_calls import abort
from llm_api_server.gateway.wire.endpoints import ENDPOINTS
from llm_api_server.gateway.wire.request import RequestFacts, read_request
from llm_api_server.http_client.client import HttpClient
from llm_api_server.http_client.response import NoResponse
from llm_api_server.ipc.lease_messages import InstanceInfo

pytestmark = pytest.mark.anyio

VLLM = InstanceInfo("i", "m", "vllm", "unix:/nowhere")


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
    assert abort.engine_ids(facts(path, body), "r") == ids


async def test_nobody_is_asked_without_a_name_or_another_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    async def post(*_: Any, **__: Any) -> None:
        pytest.fail("an empty list would end all requests of the engine")

    upstream = HttpClient()
    monkeypatch.setattr(upstream, "post", post)
    assert not await abort.abort(upstream, VLLM, [])
    assert not await abort.abort(upstream, msgspec.structs.replace(VLLM, engine="llama_cpp"), ["chatcmpl-r"])


async def test_an_engine_that_does_not_answer_has_ended_nothing() -> None:
    upstream = HttpClient()
    with pytest.raises(NoResponse):
        await upstream.post(VLLM.address, "/", b"", content_type="x/y", headers={})
    assert not await abort.abort(upstream, VLLM, ["chatcmpl-r"])
