"""Records of instances on disk, by which the next manager finds and adopts them, and reads of their logs."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import msgspec
from loguru import logger

from llm_api_server.config.diff import ENGINES_INFERENCE, NOT_THE_ENGINES
from llm_api_server.config.models import EnginesConfig, InferenceConfig, ModelConfig
from llm_api_server.engines.base import NO_PLACEMENT, Placement
from llm_api_server.ipc.lease_messages import InstanceInfo

#: Raise it with every change in how an engine is started from the same configuration: a new version of the server
#: adopts the engines of an older one only if this number is the same.
ENGINES_VERSION = 1
_TAIL_BYTES = 64 * 1024


class AdoptionRecord(msgspec.Struct, frozen=True):
    """Everything needed to adopt an instance. The field names are a file format between versions.

    `model` is its name to the scheduler; an instance without one (from an older version) is ended. `start_time` (clock
    ticks since boot) distinguishes its process from a later one with the same pid. `fingerprint` is that of the
    configuration it was started from: if it has changed, the instance is not adopted. `load_seconds` is None until
    the instance is ready.
    """

    pid: int
    start_time: int
    fingerprint: str
    info: InstanceInfo
    started_at: float
    load_seconds: float | None = None
    phases: dict[str, float] = {}
    placement: Placement = NO_PLACEMENT
    #: It may be asleep, at an unknown level, and is not adopted.
    may_sleep: bool = False
    model: str = ""
    is_pinned: bool = False


class AdoptionRecords:
    """The folder `engines` of the run directory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, record: AdoptionRecord) -> None:
        """Replace the record atomically, with mode 0600: it may contain a remote's headers.

        If it cannot be written, as on a full disk, the engine serves, but the next manager will not find it.
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
        """Return all readable records and remove the others."""
        records = []
        for path in sorted(self._folder.glob("*.json")):
            try:
                records.append(msgspec.json.decode(path.read_bytes(), type=AdoptionRecord))
            except (OSError, msgspec.DecodeError):
                path.unlink(missing_ok=True)
        return records

    def remove(self, instance: str) -> None:
        """Remove the record and the sockets of an instance, if they exist."""
        with contextlib.suppress(OSError):
            for path in self._folder.glob(f"{instance}*"):
                path.unlink(missing_ok=True)


def fingerprint(model: ModelConfig, inference: InferenceConfig, engines: EnginesConfig) -> str:
    """Return a digest of every option that the model's engine is started from."""
    parts = (  # without defaults, so that a new option of a later version changes nothing
        str(ENGINES_VERSION),
        model.model_dump_json(exclude=set(NOT_THE_ENGINES), exclude_defaults=True),
        inference.model_dump_json(include=set(ENGINES_INFERENCE), exclude_defaults=True),
        engines.model_dump_json(exclude_defaults=True),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def tail(log: Path, offset: int) -> str:
    """Return the end of what was logged since `offset`, at most 64 KiB."""
    try:
        with log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(min(offset, end), end - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def since(log: Path, offset: int) -> tuple[str, int]:
    """Return what was logged since `offset`, and the offset of its end."""
    try:
        with log.open("rb") as file:
            file.seek(offset)
            data = file.read()
    except OSError:
        return "", offset
    return data.decode(errors="replace"), offset + len(data)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
