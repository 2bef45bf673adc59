"""What keys used in the last minute, on disk: the next manager goes on counting, however this one ends.

The times are those of the machine's clock that never jumps, which all its processes share.
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
from llm_api_server.manager.limits.key_quota import MINUTE, Used

#: Seconds between two looks; more where there is so much that writing takes long.
_INTERVAL = 0.25
_PART_OF_TIME = 20


class _Saved(msgspec.Struct):
    """`at`, in Unix seconds: an older file is of no use, and after a restart of the machine its times mean nothing."""

    at: float
    keys: dict[str, Used]


class QuotaSnapshot:
    """The file `path`."""

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
        """What is still in its minute counts again."""
        try:
            saved = msgspec.msgpack.decode(self._path.read_bytes(), type=_Saved)
        except (OSError, msgspec.DecodeError):
            return
        if 0 <= time.time() - saved.at < MINUTE:
            self._admissions.restore_used(saved.keys)

    async def _run(self) -> None:
        """Write what has changed, for as long as the manager lives."""
        while True:
            began = time.monotonic()
            await self.save()
            await asyncio.sleep(max(_INTERVAL, _PART_OF_TIME * (time.monotonic() - began)))

    async def save(self) -> None:
        used = self._admissions.used()
        if used != self._written:
            try:
                await asyncio.to_thread(self._write, _Saved(time.time(), used))
            except OSError as error:
                logger.warning("cannot write {}: {}; a new manager would not know the last minute", self._path, error)
            self._written = used

    def _write(self, saved: _Saved) -> None:
        temporary = self._path.with_suffix(".tmp")
        with open(temporary, "wb", opener=_private) as file:
            file.write(msgspec.msgpack.encode(saved))
        temporary.replace(self._path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
