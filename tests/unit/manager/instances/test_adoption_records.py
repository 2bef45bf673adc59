"""Adoption records: a file format between versions, and the fingerprint that decides on adoption."""

from __future__ import annotations

import json
from pathlib import Path

from llm_api_server.config.models import EnginesConfig, InferenceConfig, ModelConfig
from llm_api_server.engines.base import DeviceAllocation, Placement
from llm_api_server.ipc.lease_messages import InstanceInfo
from llm_api_server.manager.instances.adoption_records import AdoptionRecord, AdoptionRecords, fingerprint, since, tail

RECORD = AdoptionRecord(
    pid=4711,
    start_time=12,
    fingerprint="f",
    info=InstanceInfo("i1", "m", "vllm", "unix:/run/i1.sock"),
    started_at=1.0,
    load_seconds=2.0,
    phases={"process": 0.1},
    placement=Placement((DeviceAllocation("gpu0", 5, 24, 0),), is_shared=True),
    model="m",
    is_pinned=True,
)


def test_a_record_is_read_as_it_was_written_and_private(tmp_path: Path) -> None:
    records = AdoptionRecords(tmp_path)
    records.write(RECORD)
    assert records.read_all() == [RECORD]
    assert (tmp_path / "i1.json").stat().st_mode & 0o777 == 0o600


def test_the_names_in_the_file_stay_those_of_version_0_1(tmp_path: Path) -> None:
    AdoptionRecords(tmp_path).write(RECORD)
    written = json.loads((tmp_path / "i1.json").read_text())
    assert list(written) == [
        "pid", "start_time", "fingerprint", "info", "started_at", "load_seconds", "phases", "placement", "may_sleep",
        "model", "is_pinned",
    ]  # fmt: skip
    assert written["placement"] == {
        "seats": [{"device": "gpu0", "taken": 5, "total": 24, "index": 0}],
        "is_shared": True,
    }


def test_an_unreadable_record_is_removed(tmp_path: Path) -> None:
    (tmp_path / "i2.json").write_text("{")
    assert AdoptionRecords(tmp_path).read_all() == []
    assert list(tmp_path.iterdir()) == []


def test_removing_a_record_removes_the_sockets_of_the_instance(tmp_path: Path) -> None:
    records = AdoptionRecords(tmp_path)
    records.write(RECORD)
    (tmp_path / "i1.sock").touch()
    (tmp_path / "i3.sock").touch()
    records.remove("i1")
    records.remove("i1")
    assert [path.name for path in tmp_path.iterdir()] == ["i3.sock"]


def test_a_full_disk_does_not_stop_the_engine(tmp_path: Path) -> None:
    AdoptionRecords(tmp_path / "missing").write(RECORD)


def test_the_fingerprint_changes_with_what_the_engine_is_started_from() -> None:
    def of(inference: dict[str, object] | None = None, **entry: object) -> str:
        model = ModelConfig.model_validate({"path": "/m", **entry})
        return fingerprint(model, InferenceConfig.model_validate(inference or {}), EnginesConfig())

    assert of() == of(aliases=["a"], unload_timeout=7)
    assert of() == of({"max_images": 7})
    assert len({of(), of(path="/other"), of(max_tokens=512), of({"max_batch_size": 3})}) == 4


def test_a_log_is_read_from_an_offset(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    assert (tail(log, 0), since(log, 0)) == ("", ("", 0))
    log.write_text("old\nnew\n")
    assert tail(log, 4) == "new\n"
    assert since(log, 4) == ("new\n", 8)
    log.write_text("x" * 100_000 + "end")
    assert len(tail(log, 0)) == 64 * 1024
    assert tail(log, 0).endswith("end")
