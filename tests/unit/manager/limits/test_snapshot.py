"""What keys used in the last minute survives the manager."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llm_api_server.auth.access import Limits
from llm_api_server.ipc.messages import Refused
from llm_api_server.ipc.quota_messages import Admit, Admitted
from llm_api_server.manager.limits.admission import AdmissionController
from llm_api_server.manager.limits.snapshot import QuotaSnapshot
from tests.manager_doubles import FakeWorkerSession

pytestmark = pytest.mark.anyio

LIMITS = Limits(requests_per_minute=2)


async def nothing_spent(_key_id: str) -> tuple[int, int]:
    return 0, 0


def outcomes(admissions: AdmissionController, count: int) -> list[Any]:
    """Return the types of the responses to as many requests."""
    worker = FakeWorkerSession()
    admissions.register(worker, [])
    for number in range(count):
        admissions.admit(worker, Admit(number, "id", "ann", LIMITS))
    return [type(message) for message in worker.sent]


def new_manager(path: Path) -> tuple[AdmissionController, QuotaSnapshot]:
    admissions = AdmissionController(nothing_spent, lambda _key, _limit: None)
    return admissions, QuotaSnapshot(path, admissions)


async def test_the_next_manager_counts_on(tmp_path: Path) -> None:
    admissions, snapshot = new_manager(tmp_path / "minutes")
    assert outcomes(admissions, 1) == [Admitted]
    await snapshot.save()
    admissions, snapshot = new_manager(tmp_path / "minutes")
    snapshot.restore()
    assert outcomes(admissions, 2) == [Admitted, Refused]


async def test_only_the_owner_can_read_the_file(tmp_path: Path) -> None:
    admissions, snapshot = new_manager(tmp_path / "minutes")
    outcomes(admissions, 1)
    await snapshot.save()
    assert (tmp_path / "minutes").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("age", [61, -5], ids=["older than a minute", "from the future"])
async def test_an_old_file_is_ignored(tmp_path: Path, age: float) -> None:
    path = tmp_path / "minutes"
    admissions, snapshot = new_manager(path)
    outcomes(admissions, 2)
    await snapshot.save()
    saved = msgspec.msgpack.decode(path.read_bytes())
    path.write_bytes(msgspec.msgpack.encode(saved | {"at": time.time() - age}))
    admissions, snapshot = new_manager(path)
    snapshot.restore()
    assert outcomes(admissions, 2) == [Admitted, Admitted]


@pytest.mark.parametrize("content", [None, b"", b"\xc1"], ids=["missing", "empty", "invalid"])
async def test_an_unreadable_file_is_ignored(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "minutes").write_bytes(content)
    admissions, snapshot = new_manager(tmp_path / "minutes")
    snapshot.restore()
    assert outcomes(admissions, 2) == [Admitted, Admitted]
