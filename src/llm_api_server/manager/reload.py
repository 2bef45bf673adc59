"""The configuration that the server follows, and its reload: read, checked, compared, and applied by all processes.

A file that cannot be used changes nothing. Workers follow after the manager, so that it knows every model that they
request. Runs on the manager's one loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from loguru import logger

from llm_api_server.config.change import Change
from llm_api_server.config.diff import diff, without_restart
from llm_api_server.config.load import load_config
from llm_api_server.config.models import Config
from llm_api_server.engines.config_problems import engine_checks
from llm_api_server.errors import ConfigError
from llm_api_server.ipc.messages import Configure, Configured, CurrentConfig, GetConfig, Refused, ReloadConfig, Reloaded
from llm_api_server.lifecycle.config_handover import digest, pack
from llm_api_server.manager.worker_session import WorkerSession, WorkerSessions

#: Seconds that workers have to follow.
FOLLOW_TIMEOUT = 10.0


class Reloader:
    """Configuration of all processes. `follow` applies a new one to the manager."""

    def __init__(
        self,
        config: Config,
        follow: Callable[[Config], Awaitable[None]],
        sessions: WorkerSessions,
        follow_timeout: float = FOLLOW_TIMEOUT,
    ) -> None:
        self._config = config
        self._packed = pack(config)
        self._follow = follow
        self._one_at_a_time = asyncio.Lock()
        self._sessions = sessions
        self._follow_timeout = follow_timeout
        self._changed = asyncio.Event()

    def register(self, worker: WorkerSession) -> None:
        """Send the configuration to a new worker that follows another."""
        if worker.config_digest != digest(self._packed):
            worker.send(Configure(self._packed))

    def on_configured(self, worker: WorkerSession, message: Configured) -> None:
        worker.config_digest = message.digest
        self._changed.set()

    def disconnect(self) -> None:
        """Count the workers again: one has disconnected."""
        self._changed.set()

    def send_config(self, client: WorkerSession, message: GetConfig) -> None:
        client.send(CurrentConfig(message.request, self._packed))

    async def reload(self, client: WorkerSession, message: ReloadConfig) -> None:
        """Send what has changed once all workers follow, or what is wrong with the file."""
        client.send(await self._reload(message.request, dry_run=message.dry_run))

    async def follow_file(self) -> str | None:
        """Follow the file as it is now; return what is wrong with it, if anything."""
        response = await self._reload(0, dry_run=False)
        return response.message if isinstance(response, Refused) else None

    async def _reload(self, request: int, *, dry_run: bool) -> Reloaded | Refused:
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
        """Return how many workers do not follow in time."""
        for change in changes:
            logger.info("configuration: {}", change)
        self._config, self._packed = config, pack(config)
        await self._follow(config)
        self._sessions.publish(Configure(self._packed))
        try:
            async with asyncio.timeout(self._follow_timeout):
                while self._late():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            logger.error("{} workers did not follow the new configuration in time", self._late())
        logger.info("configuration reloaded: {} changes", len(changes))
        return self._late()

    def _late(self) -> int:
        wanted = digest(self._packed)
        return sum(1 for worker in self._sessions.workers if worker.config_digest != wanted)
