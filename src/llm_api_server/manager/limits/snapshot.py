"""Snapshot of what keys used in the last minute, in a file: the next manager counts on however this one ends.

Times are those of the machine's monotonic clock, which all its processes share.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import msgspec
from loguru import logger

from llm_api_server.event_loop.background import run_restarting
from llm_api_server.manager.limits.admission import AdmissionController
from llm_api_server.manager.limits.key_quota import Used
from llm_api_server.manager.limits.sliding_window import MINUTE

#: Seconds between two saves.
_INTERVAL = 0.25
#: A save may take at most this part of the time: with very many keys, saves are further apart.
_PART_OF_TIME = 20


class _Saved(msgspec.Struct):
    """`at` is Unix time: a file of an earlier minute, or from before a restart of the machine, is of no use."""

    at: float
    keys: dict[str, Used]


class QuotaSnapshot:
    """The file at `path`."""

    def __init__(self, path: Path, admissions: AdmissionController) -> None:
        self._path = path
        self._admissions = admissions
        self._written: dict[str, Used] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Restore the counts of an earlier manager and save them from now on."""
        self.restore()
        self._task = asyncio.create_task(run_restarting(self._run))

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        await self.save()

    def restore(self) -> None:
        """Count what the file has, unless it is older than a minute or cannot be read."""
        try:
            saved = msgspec.msgpack.decode(self._path.read_bytes(), type=_Saved)
        except (OSError, msgspec.DecodeError):
            return
        if 0 <= time.time() - saved.at < MINUTE:
            self._admissions.restore_used(saved.keys)

    async def save(self) -> None:
        """Write the file if anything has changed. Without it a new manager would not know the last minute."""
        used = self._admissions.used()
        if used != self._written:
            try:
                await asyncio.to_thread(self._write, _Saved(time.time(), used))
            except OSError as error:
                logger.warning("cannot write {}: {}; a new manager would not know the last minute", self._path, error)
            self._written = used

    async def _run(self) -> None:
        while True:
            began = time.monotonic()
            await self.save()
            await asyncio.sleep(max(_INTERVAL, _PART_OF_TIME * (time.monotonic() - began)))

    def _write(self, saved: _Saved) -> None:
        temporary = self._path.with_suffix(".tmp")
        with open(temporary, "wb", opener=_private) as file:
            file.write(msgspec.msgpack.encode(saved))
        temporary.replace(self._path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
