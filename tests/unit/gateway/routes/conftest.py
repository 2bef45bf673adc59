"""A gateway app over a real SQLite file, without a manager."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from loguru import logger

from llm_api_server.config.models import ApiKeyConfig, AuthConfig, Config, ServerConfig, StorageConfig
from llm_api_server.gateway.app import build_app
from llm_api_server.gateway.manager_link.leases import Leases
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.http_client.client import HttpClient
from llm_api_server.ipc.run_dir import RunDir
from llm_api_server.store.database import Database
from tests.admin_api import CHAT_KEY, KEY


@pytest.fixture
def config(tmp_path: Path) -> Config:
    keys = [
        ApiKeyConfig(key=KEY, name="boss", permissions=["admin"]),
        ApiKeyConfig(key=CHAT_KEY, name="chatter", permissions=["chat"]),
    ]
    return Config(
        server=ServerConfig(cors_origins=["https://console.example"]),
        storage=StorageConfig(url=f"sqlite:///{tmp_path / 'keys.db'}"),
        auth=AuthConfig(api_keys=keys),
    )


@pytest.fixture
def database(config: Config) -> Iterator[Database]:
    one = Database(config.storage_url)
    yield one
    one.close()


@pytest.fixture
async def client(config: Config) -> AsyncIterator[httpx.AsyncClient]:
    with tempfile.TemporaryDirectory(prefix="gw-") as path:
        upstream = HttpClient()
        app = build_app(config, Leases(ManagerLink(RunDir(Path(path)), lambda _: None)), upstream)
        headers = {"Authorization": f"Bearer {KEY}"}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as one:
            yield one
        upstream.close()


@pytest.fixture
def logged() -> Iterator[list[str]]:
    lines: list[str] = []
    sink = logger.add(lines.append, level="TRACE", format="{message} {exception}")
    yield lines
    logger.remove(sink)
