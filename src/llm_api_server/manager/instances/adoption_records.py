"""What an instance leaves on disk: the record by which the next manager finds it, and its log. Used by the manager."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import msgspec
from loguru import logger

from llm_api_server.config.diff import ENGINES_INFERENCE, NOT_THE_ENGINES
from llm_api_server.config.models import Config, ModelConfig
from llm_api_server.engines.base import NO_PLACEMENT, Placement
from llm_api_server.ipc.lease_messages import InstanceInfo

#: Raise it with every change in how an engine is started from the same configuration: a new version of the server takes
#: over the engines of an older one where this is the same.
ENGINES_VERSION = 1
_TAIL_BYTES = 64 * 1024


class AdoptionRecord(msgspec.Struct, frozen=True):
    """Enough to adopt an instance. `model` is its name to the scheduler; without one (by an older version) it is ended.

    `start_time` (clock ticks since boot) tells its process from a later one with the same pid; `fingerprint` stands for
    the entry it was started from: after a change of that it is not adopted, nor when it may be asleep.
    `load_seconds` is None until it is ready.
    """

    pid: int
    start_time: int
    fingerprint: str
    info: InstanceInfo
    started_at: float
    load_seconds: float | None = None
    phases: dict[str, float] = {}
    placement: Placement = NO_PLACEMENT
    #: It was told to sleep; how deep it got is not known.
    may_sleep: bool = False
    model: str = ""
    is_pinned: bool = False


class AdoptionRecords:
    """The folder `engines` of the run directory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, record: AdoptionRecord) -> None:
        """Replaces the record atomically. Mode 0600: a remote's headers may be in it.

        Where it cannot be written, as on a full disk, the engine serves, but a next manager will not find it.
        """
        final = self._folder / f"{record.info.id}.json"
        temporary = final.with_suffix(".tmp")
        try:
            with open(temporary, "wb", opener=_private) as file:
                file.write(msgspec.json.encode(record))
            temporary.replace(final)
        except OSError as error:
            logger.warning("the record of {} cannot be written: {}", record.model, error)

    def read_all(self) -> list[AdoptionRecord]:
        """All that can be read; what cannot is removed."""
        records = []
        for path in sorted(self._folder.glob("*.json")):
            try:
                records.append(msgspec.json.decode(path.read_bytes(), type=AdoptionRecord))
            except (OSError, msgspec.DecodeError):
                path.unlink(missing_ok=True)
        return records

    def remove(self, instance: str) -> None:
        """Record and sockets; harmless when they are gone."""
        with contextlib.suppress(OSError):
            for path in self._folder.glob(f"{instance}*"):
                path.unlink(missing_ok=True)


def fingerprint(config: Config, model: ModelConfig) -> str:
    """Changes with anything that an engine is started from."""
    parts = (  # without defaults, so that an option more in a later version changes nothing
        str(ENGINES_VERSION),
        model.model_dump_json(exclude=set(NOT_THE_ENGINES), exclude_defaults=True),
        config.inference.model_dump_json(include=set(ENGINES_INFERENCE), exclude_defaults=True),
        config.engines.model_dump_json(exclude_defaults=True),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def tail(log: Path | None, offset: int) -> str:
    """The end of what was logged since `offset`."""
    if log is None:
        return ""
    try:
        with log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(min(offset, end), end - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def since(log: Path, offset: int) -> tuple[str, int]:
    """What was logged since `offset`, and where that ends."""
    try:
        with log.open("rb") as file:
            file.seek(offset)
            data = file.read()
    except OSError:
        return "", offset
    return data.decode(errors="replace"), offset + len(data)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
