"""Failed loads, engines that die, timeouts and shutdown, as clients see them: a response, or an event of the stream."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_api_server.config.models import ServerConfig
from llm_api_server.gateway.proxy.running_requests import RunningRequests
from llm_api_server.ipc import lease_messages
from llm_api_server.ipc import messages as control
from llm_api_server.ipc.lease_messages import InstanceInfo
from llm_api_server.ipc.run_dir import RunDir
from tests.gateway_worker import EVERY_FIELD, Gateway, both_ways, content_of, events, make_config, run_gateway
from tests.waiting import until

pytestmark = pytest.mark.anyio


async def test_stream_that_waits_for_a_load_gets_comments_and_then_its_chunks(
    run_dir: RunDir, engine_socket: Path, fast_pings: RunningRequests
) -> None:
    async with run_gateway(run_dir, engine_socket, make_config(run_dir), running=fast_pings) as gateway:
        gateway.manager.hold = True
        async with gateway.stream() as response:
            lines = response.aiter_lines()
            assert response.status_code == 200
            assert [await anext(lines) for _ in range(2)] == [": waiting for m", ": waiting for m"]
            gateway.manager.grant_all()
            rest = "\n".join([line async for line in lines])
    assert content_of(events(rest)) == "Hello there!"


async def test_stream_that_waits_for_its_first_token_gets_comments(
    run_dir: RunDir, engine_socket: Path, fast_pings: RunningRequests
) -> None:
    async with (
        run_gateway(run_dir, engine_socket, make_config(run_dir), running=fast_pings) as gateway,
        gateway.stream("head-only") as response,
    ):
        assert await anext(response.aiter_lines()) == ": waiting for m"


async def test_failed_load_after_a_comment_is_an_error_event(
    run_dir: RunDir, engine_socket: Path, fast_pings: RunningRequests
) -> None:
    async with run_gateway(run_dir, engine_socket, make_config(run_dir), running=fast_pings) as gateway:
        gateway.manager.hold = True
        async with gateway.stream() as response:
            lines = response.aiter_lines()
            await anext(lines)
            request = gateway.manager.received_of(lease_messages.Acquire)[0].request
            for client in gateway.manager._clients:
                client.send(control.Refused(request, "model_load_failed", "the file is cut off"))
            found = events("\n".join([line async for line in lines]))
    assert found == [
        {
            "error": {
                "message": "the file is cut off",
                "type": "service_unavailable_error",
                "param": None,
                "code": "model_load_failed",
            }
        }
    ]


@both_ways
async def test_refused_load_gets_a_response_with_the_reason(gateway: Gateway) -> None:
    gateway.manager.refusal = lambda request: control.Refused(request, "model_load_failed", "no room", retry_after=7.2)
    response = await gateway.chat()
    assert response.status_code == 503
    assert response.headers["retry-after"] == "8"
    assert response.json()["error"]["code"] == "model_load_failed"


@both_ways
async def test_engine_that_dies_in_a_stream_ends_it_with_an_error_event(gateway: Gateway) -> None:
    found = events((await gateway.chat("die-mid", stream=True)).text)
    assert content_of(found) == "Hello"
    assert set(found[-1]["error"]) == EVERY_FIELD
    assert found[-1]["error"]["code"] == "engine_error"


@both_ways
async def test_error_event_before_any_chunk_becomes_a_response(gateway: Gateway) -> None:
    """vLLM refuses a schema in a stream like this."""
    response = await gateway.chat("error-first", stream=True)
    assert (response.status_code, response.json()["error"]["message"]) == (400, "Grammar error: no")


async def test_engines_error_event_is_translated_and_ends_the_stream(gateway: Gateway) -> None:
    text = (await gateway.chat("error-event", stream=True)).text
    error = events(text)[-1]["error"]
    assert "[DONE]" not in text
    assert set(error) == EVERY_FIELD
    assert error["code"] == "engine_error"
    assert "/opt/" not in error["message"]


async def test_anthropic_streams_fail_in_their_own_form(gateway: Gateway) -> None:
    body = {"model": "m", "max_tokens": 5, "stream": True, "messages": [{"role": "user", "content": "die-mid"}]}
    text = (await gateway.client.post("/v1/messages", json=body)).text
    assert text.rstrip().split("\n")[-2] == "event: error"
    assert events(text)[-1]["type"] == "error"


async def test_responses_streams_fail_in_their_own_form(gateway: Gateway) -> None:
    body = {"model": "m", "stream": True, "input": "die-mid"}
    assert events((await gateway.client.post("/v1/responses", json=body)).text)[-1]["type"] == "error"


@both_ways
async def test_engine_without_a_response_is_tried_twice_then_unavailable(gateway: Gateway) -> None:
    response = await gateway.chat("die")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_unavailable"
    assert len(gateway.engine_log()) == 2
    assert len(gateway.manager.received_of(lease_messages.Acquire)) == 2


async def test_instance_that_cannot_be_reached_is_unavailable(gateway: Gateway) -> None:
    response = await gateway.chat(model="org/gone")
    assert response.status_code == 503
    assert "nonexistent" not in response.text


async def test_instance_that_moved_is_found_at_the_second_try(gateway: Gateway) -> None:
    gone = gateway.manager.instances["org/gone"]
    asked: list[int] = []
    grant_all = gateway.manager.grant_all

    def grant() -> None:
        asked.append(1)
        if len(asked) == 2:
            gateway.manager.instances["org/gone"] = InstanceInfo(
                "org/gone-2", "org/gone", "llama_cpp", f"unix:{gateway.engine_socket}"
            )
        grant_all()

    gateway.manager.grant_all = grant  # type: ignore[method-assign]
    assert (await gateway.chat(model="org/gone")).status_code == 200
    assert gone.id in [release.instance for release in gateway.manager.received_of(lease_messages.ReturnSlots)]


async def test_timeout_covers_the_queue_and_the_engine(run_dir: RunDir, engine_socket: Path) -> None:
    config = make_config(run_dir, server=ServerConfig(run_dir=str(run_dir.path), timeout=0.2))
    async with run_gateway(run_dir, engine_socket, config) as gateway:
        gateway.manager.hold = True
        queued = await gateway.chat()
        gateway.manager.hold = False
        unanswered = await gateway.chat("silent")
        await until(lambda: "aborted" in gateway.engine_log())
        streaming = await gateway.chat("head-only", stream=True)
    assert (queued.status_code, unanswered.status_code) == (503, 504)
    assert queued.json()["error"]["code"] == "server_overloaded"
    assert int(queued.headers["retry-after"]) >= 1
    assert unanswered.json()["error"]["code"] == "timeout"
    assert gateway.manager.received_of(lease_messages.Cancel)
    assert (streaming.status_code, streaming.json()["error"]["code"]) == (504, "timeout")


async def test_timeout_of_a_started_stream_is_an_error_event(
    run_dir: RunDir, engine_socket: Path, fast_pings: RunningRequests
) -> None:
    config = make_config(run_dir, server=ServerConfig(run_dir=str(run_dir.path), timeout=0.4))
    async with run_gateway(run_dir, engine_socket, config, running=fast_pings) as gateway:
        found = events((await gateway.chat("head-only", stream=True)).text)
    assert found[-1]["error"]["code"] == "timeout"


@both_ways
async def test_stream_that_outlasts_the_drain_time_ends_with_an_error_event(gateway: Gateway) -> None:
    gateway.open_gate(1)
    async with gateway.stream("chunks:2") as response:
        lines = response.aiter_lines()
        await anext(lines)
        gateway.server.should_exit = True
        found = events("\n".join([line async for line in lines]))
    assert found[-1]["error"]["code"] == "server_shutting_down"


@pytest.mark.parametrize(
    ("engine_status", "status", "code"),
    [(400, 400, None), (401, 500, "engine_error"), (404, 400, "not_supported"), (429, 429, "rate_limit_exceeded"),
     (500, 500, "engine_error"), (501, 400, "not_supported"), (503, 503, "engine_unavailable")],
)  # fmt: skip
async def test_engine_errors_are_translated(
    gateway: Gateway, engine_status: int, status: int, code: str | None
) -> None:
    response = await gateway.chat(f"status:{engine_status}")
    error = response.json()["error"]
    assert response.status_code == status
    assert set(error) == EVERY_FIELD
    assert error["code"] == code
    assert "/home/" not in response.text
