"""Time that each stage of a request and of a chunk takes in a worker: its real code between fake transports.

`make bench-stages`. One process without sockets, so the kernel's time is not included. A stage is a set of functions;
its time excludes that of the stages it calls. The table is the median of `--rounds`; the last line is one JSON object,
times in microseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import uvicorn
import uvloop
from uvicorn.server import ServerState

from llm_api_server.auth.authenticator import Authenticator
from llm_api_server.config.models import (
    ApiKeyConfig,
    AuthConfig,
    Config,
    LoggingConfig,
    ModelConfig,
    ModelsConfig,
    ServerConfig,
)
from llm_api_server.event_loop.gc_tuning import tune_gc
from llm_api_server.event_loop.write_buffer import BufferedTransport, WriteBuffer
from llm_api_server.gateway.app import build_worker
from llm_api_server.gateway.http.direct import DirectResponder
from llm_api_server.gateway.http.fast_path import HttpProtocol
from llm_api_server.gateway.http.responder import REQUEST_HANDLER
from llm_api_server.gateway.manager_link.leases import HeldSlots, Lease, Leases
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.gateway.metering.access_log import AccessLog
from llm_api_server.gateway.metering.admission import AdmissionClient
from llm_api_server.gateway.metering.usage_reporter import UsageReporter
from llm_api_server.gateway.proxy.engine_request import EngineRequest
from llm_api_server.gateway.proxy.exchange import Exchange
from llm_api_server.gateway.proxy.front_door import EngineProxy
from llm_api_server.gateway.proxy.head_decisions import HeadDecisions
from llm_api_server.gateway.proxy.relay import Relay
from llm_api_server.gateway.proxy.running_requests import RunningRequests
from llm_api_server.gateway.wire.stream_reader import BodyReader, StreamReader
from llm_api_server.http_client.client import HttpClient
from llm_api_server.http_client.connection import Connection
from llm_api_server.ipc import messages, quota_messages
from llm_api_server.ipc.lease_messages import InstanceInfo
from llm_api_server.ipc.quota_messages import QuotaGrant, RateLimit, RateLimits
from llm_api_server.ipc.run_dir import RunDir
from llm_api_server.log import setup_logging

KEY = "sk-profile-0123456789abcdefghijklmnopqr"
LIMITS = {"requests_per_minute": 10**9, "tokens_per_minute": 10**12, "max_concurrent": 10**6}
PLAIN = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":{"role":'
    b'"assistant","content":"Hello! How can I help you today?"},"finish_reason":"stop"}],"usage":{"prompt_tokens":9,'
    b'"completion_tokens":9,"total_tokens":18}}'
)
CHUNK = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,'
    b'"delta":{"role":"assistant","content":" word"},"finish_reason":null}]}\n\n'
)
CHUNKS = 64


class Transport:
    """Passes writes to `on_write`."""

    def __init__(self, on_write: Callable[[bytes], None]) -> None:
        self._on_write = on_write

    def write(self, data: bytes) -> None:
        self._on_write(data)

    def get_extra_info(self, name: str, _default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else None

    def is_closing(self) -> bool:
        return False

    def nothing(self) -> None: ...

    close = abort = pause_reading = resume_reading = nothing


class Worker:
    """Data path of one worker, with one connection to a client and one to an engine."""

    def __init__(self, folder: Path) -> None:
        config = Config(
            server=ServerConfig(run_dir=str(folder)),
            auth=AuthConfig(api_keys=[ApiKeyConfig(key=KEY, name="profile", **cast("Any", LIMITS))]),
            models=ModelsConfig(default="m", available={"m": ModelConfig(path="org/m", engine="vllm")}),
            logging=LoggingConfig(path=str(folder / "logs"), console=False),
        )
        setup_logging(config, "gateway")
        self.link = ManagerLink(RunDir(folder), lambda _: None)
        self.link._transport = cast("asyncio.Transport", Transport(self.reply))  # noqa: SLF001
        leases = Leases(self.link)
        held = leases._held["i"] = HeldSlots(InstanceInfo("i", "m", "vllm", "unix:/engine", context_length=32768))  # noqa: SLF001
        held.slots, held.until_revoked = 1000, True
        upstream = HttpClient()
        self.flush = upstream.write_buffer.flush
        handler = build_worker(config, leases, upstream, RunningRequests()).proxy
        settings = uvicorn.Config(_no_app, http=HttpProtocol, ws="none", log_config=None)
        settings.load()
        self.protocol = HttpProtocol(settings, ServerState(), {REQUEST_HANDLER: handler}, asyncio.get_running_loop())
        self.to_client: list[bytes] = []
        self.to_engine: list[bytes] = []
        self.protocol.connection_made(cast("Any", Transport(self.to_client.append)))
        pool = upstream._pool("unix:/engine")  # noqa: SLF001
        self.engine = Connection(pool)
        self.engine.connection_made(cast("Any", Transport(self.to_engine.append)))
        self.engine.idle_since = float("inf")
        pool.release(self.engine)
        pool._all.add(self.engine)  # noqa: SLF001

    def reply(self, data: bytes) -> None:
        """Reply as a manager does: confirm reports, grant quota."""
        for message in messages.to_manager_decoder().feed(data):
            if isinstance(message, messages.ReportUsage):
                self.link.on_message(messages.UsageKept(message.number))
            elif isinstance(message, quota_messages.Admit):
                standing = RateLimits(RateLimit(10**9, 10**9 - 1, 1.0), RateLimit(10**12, 10**12 - 100, 1.0))
                share = QuotaGrant(
                    requests=256, tokens=256 * (message.tokens + message.optional_tokens), concurrent=256
                )
                self.link.on_message(quota_messages.Admitted(message.request, standing, message.tokens, share))

    async def exchange(self, request: bytes, response: list[bytes]) -> None:
        """Pass one request and its response as reads of the two sockets."""
        self.protocol.data_received(request)
        self.flush()
        if not self.to_engine:  # its quota is used up: the grant arrives in the next iterations of the loop
            for _ in range(5):
                await asyncio.sleep(0)
        for data in response:
            self.engine.data_received(data)
            self.flush()
        self.to_engine.clear()
        self.to_client.clear()


async def _no_app(scope: Any, receive: Any, send: Any) -> None:
    """Stand-in: engine endpoints bypass the app."""


def request_of(**more: Any) -> bytes:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hello there!"}], **more}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nuser-agent: bench\r\naccept: */*\r\n"
        f"content-type: application/json\r\nauthorization: Bearer {KEY}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def plain_response() -> list[bytes]:
    head = (
        "HTTP/1.1 200 OK\r\ndate: Mon, 23 Nov 2026 00:00:00 GMT\r\nserver: uvicorn\r\n"
        f"content-length: {len(PLAIN)}\r\ncontent-type: application/json\r\n\r\n"
    )
    return [head.encode() + PLAIN]


def stream_response() -> list[bytes]:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    last = b"data: [DONE]\n\n"
    return [head, *[_framed(CHUNK)] * CHUNKS, _framed(last) + b"0\r\n\r\n"]


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def measure(worker: Worker, request: bytes, response: list[bytes], count: int) -> float:
    """Return microseconds per request."""
    started = time.perf_counter()
    for number in range(count):
        await worker.exchange(request, response)
        if number % 100 == 0:
            await asyncio.sleep(0)
    return (time.perf_counter() - started) / count * 1e6


#: Functions of each stage.
STAGES: dict[str, list[tuple[type, str]]] = {
    "read the request": [(HttpProtocol, "data_received")],
    "open the exchange": [(EngineProxy, "_exchange")],
    "decide": [(Exchange, "begin")],
    "recognize the key": [(Authenticator, "check")],
    "read and check the body": [(EngineRequest, "__init__"), (HeadDecisions, "resolve"), (EngineRequest, "check")],
    "limits": [(AdmissionClient, "admit_from_held"), (AdmissionClient, "admit"), (AdmissionClient, "settle")],
    "ledger": [(UsageReporter, "start"), (UsageReporter, "end")],
    "lease": [(Leases, "take"), (Lease, "release")],
    "write the engine's request": [(EngineRequest, "body_for"), (EngineRequest, "frame"), (HttpClient, "send_on_idle")],
    "parse the response": [(Connection, "data_received")],
    "relay": [(Relay, "on_head"), (Relay, "on_data"), (Relay, "on_chunks")],
    "usage and errors": [
        (BodyReader, "feed"),
        (StreamReader, "feed"),
        (StreamReader, "passes"),
        (StreamReader, "flush"),
    ],
    "write to the client": [
        (DirectResponder, "start"),
        (DirectResponder, "write"),
        (DirectResponder, "forward"),
        (DirectResponder, "flush"),
    ],
    "hold and send": [
        (BufferedTransport, "write"),
        (BufferedTransport, "flush"),
        (WriteBuffer, "add"),
        (WriteBuffer, "flush"),
    ],
    "finish": [(Exchange, "_finish")],
    "log": [(AccessLog, "add"), (AccessLog, "flush")],
}


class Stopwatch:
    """Time of each stage without that of nested stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self._inner = [0.0]

    def watch(self) -> None:
        for stage, functions in STAGES.items():
            for owner, name in functions:
                setattr(owner, name, self._timed(stage, getattr(owner, name)))

    def _timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def end(started: float) -> None:
            whole = time.perf_counter() - started
            self.seconds[stage] += whole - self._inner.pop()
            self._inner[-1] += whole

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                end(started)

        async def timed_async(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            self._inner.append(0.0)
            try:
                return await function(*args, **kwargs)
            finally:
                end(started)

        return timed_async if inspect.iscoroutinefunction(function) else timed


async def run(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    worker = Worker(folder)
    cases = {"plain": (request_of(), plain_response()), "stream": (request_of(stream=True), stream_response())}
    tune_gc()
    whole: dict[str, float] = {}
    for name, (request, response) in cases.items():
        await measure(worker, request, response, count // 5)
        whole[name] = statistics.median([await measure(worker, request, response, count) for _ in range(rounds)])
    watch = Stopwatch()
    watch.watch()
    stages: dict[str, dict[str, float]] = {}
    for name, (request, response) in cases.items():
        watch.seconds = dict.fromkeys(STAGES, 0.0)
        await measure(worker, request, response, count)
        stages[name] = {stage: seconds / count * 1e6 for stage, seconds in watch.seconds.items()}
    return {"request_us": whole["plain"], "chunk_us": (whole["stream"] - whole["plain"]) / CHUNKS, "stages": stages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        seen = runner.run(run(Path(folder), arguments.count, arguments.rounds))
    print(f"{'stage':32} {'plain request, us':>18} {f'stream of {CHUNKS}, us':>18}")
    for stage in STAGES:
        print(f"{stage:32} {seen['stages']['plain'][stage]:18.1f} {seen['stages']['stream'][stage]:18.1f}")
    print(f"a request without the clocks: {seen['request_us']:.1f} us; a chunk: {seen['chunk_us']:.2f} us")
    seen["stages"] = {
        name: {stage: round(cost, 2) for stage, cost in of.items()} for name, of in seen["stages"].items()
    }
    print(json.dumps({"bench": "stages", **seen}))


if __name__ == "__main__":
    main()
