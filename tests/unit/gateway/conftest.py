"""A fake manager on a real socket, and a worker's link to it."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.ipc.lease_messages import InstanceInfo
from llm_api_server.ipc.model_status import ModelStatus
from llm_api_server.ipc.run_dir import RunDir
from llm_api_server.types import ModelState
from tests.fake_manager import FakeManager


@pytest.fixture
async def manager() -> AsyncIterator[FakeManager]:
    with tempfile.TemporaryDirectory(prefix="gw-") as path:
        info = InstanceInfo("m-1", "m", "llama_cpp", "unix:/x")
        one = FakeManager(RunDir(Path(path)), [ModelStatus("m", ModelState.STOPPED, "llama_cpp", "m")], {"m": info})
        await one.start()
        yield one
        await one.stop()


@pytest.fixture
async def link(manager: FakeManager) -> AsyncIterator[ManagerLink]:
    """Not started: the parts of a worker register first."""
    one = ManagerLink(manager.run_dir, lambda _: None)
    yield one
    await one.close()
