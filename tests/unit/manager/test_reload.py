"""Reloading the configuration file in the manager and its workers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from llm_api_server.config.load import load_config
from llm_api_server.config.models import Config
from llm_api_server.ipc.messages import (
    Configure,
    Configured,
    CurrentConfig,
    GetConfig,
    Hello,
    Refused,
    ReloadConfig,
    Reloaded,
)
from llm_api_server.lifecycle.config_handover import digest, pack, unpack
from llm_api_server.manager.reload import Reloader
from llm_api_server.manager.worker_session import WorkerSessions
from tests.manager_doubles import FakeWorkerSession
from tests.waiting import until

pytestmark = pytest.mark.anyio


class World:
    """A configuration file, and a manager that records what it follows."""

    def __init__(self, folder: Path, sessions: WorkerSessions, follow_timeout: float = 60) -> None:
        self.path = folder / "config.yaml"
        self.write("limits: {queue_per_model: 5}\n")
        self.followed: list[Config] = []
        self.sessions = sessions
        self.config = load_config(self.path)
        self.reloader = Reloader(self.config, self.follow, sessions, follow_timeout)

    def write(self, text: str) -> None:
        self.path.write_text(text)

    async def follow(self, config: Config) -> None:
        self.followed.append(config)

    def connect(self, config_digest: str) -> FakeWorkerSession:
        worker = FakeWorkerSession()
        worker.register(Hello(1, worker="w", config=config_digest))
        self.sessions.add(worker)
        self.reloader.register(worker)
        return worker

    async def reload(self, *, dry_run: bool = False) -> Reloaded | Refused:
        client = FakeWorkerSession()
        await self.reloader.reload(client, ReloadConfig(7, dry_run))
        (response,) = client.sent
        assert isinstance(response, Reloaded | Refused)
        assert response.request == 7
        return response


@pytest.fixture
def world(tmp_path: Path, sessions: WorkerSessions) -> World:
    return World(tmp_path, sessions)


async def test_a_worker_with_another_configuration_gets_that_of_the_manager(world: World) -> None:
    same, other = world.connect(digest(pack(world.config))), world.connect("another")
    assert same.sent == []
    (configure,) = other.of(Configure)
    assert unpack(configure.config) == world.config


async def test_a_reload_ends_when_the_manager_and_all_workers_follow(world: World) -> None:
    worker = world.connect(digest(pack(world.config)))
    world.write("limits: {queue_per_model: 6}\n")
    reloading = asyncio.create_task(world.reload())
    await until(lambda: worker.of(Configure))
    assert [config.limits.queue_per_model for config in world.followed] == [6]
    world.reloader.on_configured(worker, Configured(digest(worker.of(Configure)[0].config)))
    response = await reloading
    assert isinstance(response, Reloaded)
    assert (response.applied, response.late) == (True, 0)
    assert [change.path for change in response.changes] == ["limits.queue_per_model"]


async def test_workers_that_do_not_follow_in_time_are_counted(tmp_path: Path, sessions: WorkerSessions) -> None:
    world = World(tmp_path, sessions, follow_timeout=0.02)
    world.connect(digest(pack(world.config)))
    world.write("limits: {queue_per_model: 6}\n")
    response = await world.reload()
    assert isinstance(response, Reloaded)
    assert response.late == 1


async def test_a_dry_run_changes_nothing(world: World) -> None:
    worker = world.connect(digest(pack(world.config)))
    world.write("limits: {queue_per_model: 6}\n")
    response = await world.reload(dry_run=True)
    assert isinstance(response, Reloaded)
    assert (response.applied, len(response.changes)) == (False, 1)
    assert (world.followed, worker.sent) == ([], [])
    world.reloader.send_config(worker, GetConfig(8))
    (current,) = worker.of(CurrentConfig)
    assert unpack(current.config) == world.config


async def test_an_invalid_file_changes_nothing_and_is_explained(world: World) -> None:
    worker = world.connect(digest(pack(world.config)))
    world.write("server: {prot: 1}\n")
    response = await world.reload()
    assert isinstance(response, Refused)
    assert (response.code, "server.prot" in response.message) == ("invalid_configuration", True)
    assert (await world.reloader.follow_file()) == response.message
    assert (world.followed, worker.sent) == ([], [])
