"""The configuration that the server follows, and how it gets another: read, checked, compared, applied by all together.

A file that cannot be used changes nothing. Workers hear of a new configuration after the manager follows it, so that
what they ask for is known to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from loguru import logger

from llm_api_server.config.change import Change
from llm_api_server.config.diff import diff, without_restart
from llm_api_server.config.load import load_config
from llm_api_server.config.models import Config
from llm_api_server.engines.config_problems import engine_checks
from llm_api_server.errors import ConfigError
from llm_api_server.ipc.messages import Configure, CurrentConfig, Refused, Reloaded, ToClient
from llm_api_server.lifecycle.config_handover import digest, pack

#: Seconds that workers have to follow.
FOLLOW_TIMEOUT = 10.0


class Follower(Protocol):
    def send(self, message: ToClient) -> None: ...


class Reloader:
    """`follow` makes the manager do what a configuration says."""

    def __init__(self, config: Config, follow: Callable[[Config], Awaitable[None]]) -> None:
        self._config = config
        self._packed = pack(config)
        self._follow = follow
        self._one_at_a_time = asyncio.Lock()
        #: The workers that are connected, and whose configuration each has.
        self._workers: dict[Follower, str] = {}
        self._changed = asyncio.Event()

    def hello(self, worker: Follower, digest_of_its: str) -> None:
        """A worker is here, with this configuration; it gets ours if that is another."""
        self._workers[worker] = digest_of_its
        if digest_of_its != digest(self._packed):
            worker.send(Configure(self._packed))

    def on_configured(self, worker: Follower, digest_of_its: str) -> None:
        self._workers[worker] = digest_of_its
        self._changed.set()

    def disconnected(self, client: Follower) -> None:
        self._workers.pop(client, None)
        self._changed.set()

    def tell(self, client: Follower, request: int) -> None:
        client.send(CurrentConfig(request, self._packed))

    async def reload(self, client: Follower, request: int, *, dry_run: bool) -> None:
        """Answers what changes when all follow, or what is wrong with the file."""
        client.send(await self.follow_file(request, dry_run=dry_run))

    async def follow_file(self, request: int = 0, *, dry_run: bool = False) -> Reloaded | Refused:
        """What `reload` answers."""
        async with self._one_at_a_time:
            try:
                after = await asyncio.to_thread(load_config, self._config.source, engine_checks(may_import=False))
            except ConfigError as error:
                logger.error("the configuration is not reloaded: {}", "; ".join(error.problems))
                return Refused(request, "invalid_configuration", str(error))
            changes = diff(self._config, after)
            late = 0 if dry_run else await self._apply(without_restart(self._config, after), changes)
            return Reloaded(request, changes, applied=not dry_run, late=late)

    async def _apply(self, config: Config, changes: list[Change]) -> int:
        """How many workers do not follow in time."""
        for change in changes:
            logger.info("configuration: {}", change)
        self._config, self._packed = config, pack(config)
        await self._follow(config)
        for worker in self._workers:
            worker.send(Configure(self._packed))
        try:
            async with asyncio.timeout(FOLLOW_TIMEOUT):
                while self._late():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            logger.error("{} workers did not follow the new configuration in time", self._late())
        logger.info("configuration reloaded: {} changes", len(changes))
        return self._late()

    def _late(self) -> int:
        wanted = digest(self._packed)
        return sum(1 for theirs in self._workers.values() if theirs != wanted)
