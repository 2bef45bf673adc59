"""Traces of real requests, through a real load, as a collector gets them, and the headers that engines get."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.collector import Collector, Seen, collecting
from tests.running import Server, running
from tests.waiting import wait_until

MODEL = "SmolLM2-135M-Instruct"
CHAT = "/v1/chat/completions"
SERVER_SPAN = f"POST {CHAT}"
PARENT = "00f067aa0ba902b7"
BODY = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as one:
        yield one


@pytest.fixture(scope="module")
def upstream() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A remote server of OpenAI's API: its address, and the headers of its requests."""
    seen: list[dict[str, str]] = []
    message = {"role": "assistant", "content": "Hello"}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    response = json.dumps(
        {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}
    )

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            seen.append({name.lower(): value for name, value in self.headers.items()})
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(response)))
            self.end_headers()
            self.wfile.write(response.encode())

        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", seen
    server.shutdown()
    server.server_close()
    thread.join()


def config(gguf: Path, remote: str, tracing: dict[str, Any]) -> dict[str, Any]:
    models = {MODEL: {"path": str(gguf), "max_tokens": 512}, "far": {"path": remote}}
    return {
        "models": {"default": MODEL, "available": models},
        "tracing": tracing,
    }


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: Path, collector: Collector, upstream: tuple[str, Any]
) -> Iterator[Server]:
    tracing = {"endpoint": collector.url, "service_name": "test"}
    with running(tmp_path_factory.mktemp("tracing"), config(smollm2_gguf, upstream[0], tracing)) as one:
        yield one


def new_trace() -> str:
    return secrets.token_hex(16)


def ask(server: Server, trace: str, flags: str = "01", *, key: str | None = None, **more: Any) -> int:
    headers = {"traceparent": f"00-{trace}-{PARENT}-{flags}", "tracestate": "vendor=1"}
    with server.client(*([key] if key else [])) as client:
        return client.post(CHAT, json={**BODY, **more}, headers=headers).status_code


def trace_of(collector: Collector, trace: str, *names: str) -> dict[str, Seen]:
    wait_until(lambda: {SERVER_SPAN, *names} <= set(collector.trace(trace)))
    return collector.trace(trace)


@pytest.mark.story
def test_trace_of_a_loading_request_has_queue_load_and_engine_spans(server: Server, collector: Collector) -> None:
    with server.client() as client:
        client.post(f"/admin/api/models/{MODEL}/unload")
    trace = new_trace()
    assert ask(server, trace) == 200
    found = trace_of(collector, trace, "queue", f"load {MODEL}", f"chat {MODEL}")
    whole, queue, load, engine = (found[name] for name in (SERVER_SPAN, "queue", f"load {MODEL}", f"chat {MODEL}"))
    assert (whole.parent_id, whole.kind, whole.service) == (PARENT, "SERVER", "test")
    assert {queue.parent_id, engine.parent_id} == {whole.span_id}
    assert load.parent_id == queue.span_id
    assert found["process"].parent_id == load.span_id
    assert whole.start <= queue.start <= load.end <= queue.end + 0.5
    assert queue.end == pytest.approx(engine.start)
    assert engine.end <= whole.end + 0.001
    assert engine.events == ["first token"]
    assert engine.attributes["gen_ai.usage.output_tokens"] == 4
    assert not any(span.has_failed for span in found.values())


def test_engine_gets_the_parent_span(
    server: Server, collector: Collector, upstream: tuple[str, list[dict[str, str]]]
) -> None:
    trace = new_trace()
    assert ask(server, trace, model="far") == 200
    engine = trace_of(collector, trace, "chat far")["chat far"]
    assert upstream[1][-1]["traceparent"] == f"00-{trace}-{engine.span_id}-01"
    assert upstream[1][-1]["tracestate"] == "vendor=1"


def test_unsampled_request_is_not_traced(
    server: Server, collector: Collector, upstream: tuple[str, list[dict[str, str]]]
) -> None:
    quiet, loud = new_trace(), new_trace()
    assert ask(server, quiet, "00", model="far") == 200
    assert upstream[1][-1]["traceparent"] == f"00-{quiet}-{PARENT}-00"
    assert ask(server, loud, model="far") == 200
    trace_of(collector, loud)
    assert collector.trace(quiet) == {}


def test_refusal_is_traced(server: Server, collector: Collector) -> None:
    trace = new_trace()
    assert ask(server, trace, model="nothing") == 404
    found = trace_of(collector, trace)
    assert found[SERVER_SPAN].attributes["error.type"] == "model_not_found"
    assert set(found) == {SERVER_SPAN}
    unknown = new_trace()
    assert ask(server, unknown, key="sk-unknown-0123456789") == 401
    assert trace_of(collector, unknown)[SERVER_SPAN].attributes["http.response.status_code"] == 401


def test_no_prompt_and_no_key_is_in_a_trace(server: Server, collector: Collector) -> None:
    trace = new_trace()
    messages = [{"role": "user", "content": "a planted prompt"}]
    assert ask(server, trace, messages=messages) == 200
    shown = repr(trace_of(collector, trace, f"chat {MODEL}"))
    assert "planted" not in shown
    assert "sk-" not in shown


def test_reload_turns_tracing_off_and_on(
    server: Server, collector: Collector, smollm2_gguf: Path, upstream: tuple[str, Any]
) -> None:
    tracing = {"endpoint": collector.url, "service_name": "test"}
    server.configure(config(smollm2_gguf, upstream[0], {}))
    assert server.command("reload").returncode == 0
    off, on = new_trace(), new_trace()
    assert ask(server, off, model="far") == 200
    server.configure(config(smollm2_gguf, upstream[0], tracing))
    assert server.command("reload").returncode == 0
    assert ask(server, on, model="far") == 200
    trace_of(collector, on, "chat far")
    assert collector.trace(off) == {}


@pytest.mark.vllm
@pytest.mark.timeout(1200)
def test_vllm_spans_are_part_of_the_trace(
    tmp_path: Path, collector: Collector, smollm2_folder: Path, vllm_python: Path
) -> None:
    model = {
        "path": str(smollm2_folder),
        "max_tokens": 512,
        "engine_args": {"otlp-traces-endpoint": f"{collector.url}/v1/traces"},
        "env": {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"},
    }
    trace = new_trace()
    with running(
        tmp_path,
        {
            "models": {"default": MODEL, "available": {MODEL: model}},
            "engines": {"vllm": {"python": str(vllm_python)}},
            "tracing": {"endpoint": collector.url},
        },
    ) as server:
        assert ask(server, trace) == 200
        found = trace_of(collector, trace, f"chat {MODEL}", "llm_request")
    assert found["llm_request"].parent_id == found[f"chat {MODEL}"].span_id
    assert found["weights"].parent_id == found[f"load {MODEL}"].span_id
