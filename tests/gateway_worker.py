"""An API worker on a real socket between real clients, a fake engine process and a fake manager."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llm_api_server.config.models import ApiKeyConfig, AuthConfig, Config, ModelConfig, ModelsConfig, ServerConfig
from llm_api_server.gateway import app as gateway_app
from llm_api_server.gateway.http.body_limit import BODY_TIMEOUT
from llm_api_server.gateway.http.fast_path import HttpProtocol
from llm_api_server.gateway.manager_link.leases import Leases
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.gateway.proxy.running_requests import RunningRequests
from llm_api_server.http_client.client import HttpClient
from llm_api_server.ipc.lease_messages import InstanceInfo
from llm_api_server.ipc.model_status import ModelStatus
from llm_api_server.ipc.run_dir import RunDir
from llm_api_server.types import ModelState
from tests.fake_manager import FakeManager
from tests.pictures import data_url, png
from tests.running import TLS
from tests.waiting import until

KEY = "sk-test-0123456789abcdef"
CHAT_KEY = "sk-chat-0123456789abcdef"
EVERY_FIELD = {"message", "type", "param", "code"}
PNG = data_url(png())


@dataclass
class Gateway:
    """A running worker with its fake engine and fake manager."""

    client: httpx.AsyncClient
    manager: FakeManager
    engine_socket: Path
    leases: Leases
    server: uvicorn.Server

    def engine_log(self) -> list[str]:
        log = Path(f"{self.engine_socket}.log")
        return log.read_text().splitlines() if log.exists() else []

    def use_vllm(self) -> None:
        """Present the engine of `m` as vLLM, whose plain requests stay plain."""
        self.manager.instances["m"] = InstanceInfo("m-1", "m", "vllm", f"unix:{self.engine_socket}")

    def engine_bodies(self) -> list[dict[str, Any]]:
        return [json.loads(line.split(" ", 2)[2]) for line in self.engine_log() if line.startswith("/")]

    def open_gate(self, count: int) -> None:
        Path(f"{self.engine_socket}.go").write_text(str(count))

    async def chat(self, text: str = "hello", **more: Any) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", json=chat_body(text, **more))

    def stream(self, text: str = "hello", **more: Any) -> contextlib.AbstractAsyncContextManager[httpx.Response]:
        return self.client.stream("POST", "/v1/chat/completions", json=chat_body(text, stream=True, **more))


def chat_body(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


@contextlib.contextmanager
def short_run_dir() -> Iterator[RunDir]:
    """Make a folder whose path is short enough for unix sockets."""
    with tempfile.TemporaryDirectory(prefix="gw-") as path:
        yield RunDir(Path(path))


@contextlib.asynccontextmanager
async def run_engine(run_dir: RunDir) -> AsyncIterator[Path]:
    """Start a fake engine and yield its socket."""
    path = run_dir.path / "engine.sock"
    script = Path(__file__).parent / "fake_engine.py"
    process = await asyncio.create_subprocess_exec(sys.executable, str(script), str(path))
    try:
        await until(path.exists)
        yield path
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def make_config(run_dir: RunDir, **sections: Any) -> Config:
    return Config(
        server=sections.pop("server", ServerConfig(run_dir=str(run_dir.path))),
        auth=AuthConfig(
            api_keys=[
                ApiKeyConfig(key=KEY, name="all"),
                ApiKeyConfig(key=CHAT_KEY, name="chat", permissions=["chat"], models=["m*"]),
            ]
        ),
        models=ModelsConfig(
            default="m",
            available={
                "m": ModelConfig(path="m.gguf", aliases=["gpt-4o"], adapters={"org/lora": "lora"}),
                "org/blind": ModelConfig(path="b.gguf"),
                "org/gone": ModelConfig(path="g.gguf"),
            },
        ),
        **sections,
    )


def make_manager(run_dir: RunDir, engine_socket: Path) -> FakeManager:
    def status(name: str, **more: Any) -> ModelStatus:
        return ModelStatus(name, ModelState.READY, "llama_cpp", f"{name}.gguf", **more)

    def instance(name: str, address: str) -> InstanceInfo:
        return InstanceInfo(f"{name}-1", name, "llama_cpp", address, context_length=2000)

    models = [
        status("m", aliases=["gpt-4o"], adapters=["org/lora"], context_length=2000),
        status("org/blind", vision=False),
        status("org/gone"),
    ]
    instances = {
        "m": instance("m", f"unix:{engine_socket}"),
        "org/blind": instance("org/blind", f"unix:{engine_socket}"),
        "org/gone": instance("org/gone", "unix:/nonexistent/engine.sock"),
    }
    return FakeManager(run_dir, models, instances)


@contextlib.asynccontextmanager
async def run_gateway(
    run_dir: RunDir,
    engine_socket: Path,
    config: Config,
    http: type[HttpToolsProtocol] = HttpProtocol,
    running: RunningRequests | None = None,
    body_timeout: float = BODY_TIMEOUT,
) -> AsyncIterator[Gateway]:
    manager = make_manager(run_dir, engine_socket)
    await manager.start()
    leases = Leases(ManagerLink(run_dir, start_manager=lambda _: None))
    listener = socket.create_server(("127.0.0.1", 0))
    app = gateway_app.build_app(config, leases, HttpClient(), running=running, body_timeout=body_timeout)
    server = uvicorn.Server(
        uvicorn.Config(app, http=http, log_config=None, access_log=False, timeout_graceful_shutdown=1)
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    headers = {"authorization": f"Bearer {KEY}"}
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=30, verify=TLS) as client:
            await until(lambda: server.started and len(leases.models) > 0)
            yield Gateway(client, manager, engine_socket, leases, server)
    finally:
        server.should_exit = True
        await serving
        await manager.stop()


#: The worker's own HTTP protocol (direct), and uvicorn's with ASGI as under any other server.
both_ways = pytest.mark.parametrize("gateway", [HttpProtocol, HttpToolsProtocol], indirect=True, ids=["direct", "asgi"])


def events(text: str) -> list[Any]:
    payloads = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]


def content_of(found: list[Any]) -> str:
    chunks = [event for event in found if isinstance(event, dict) and event.get("choices")]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
