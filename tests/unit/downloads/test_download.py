"""Events of a download, and its checks before it begins."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from llm_api_server.downloads.download import Downloaded, DownloadEvent, DownloadProgress, Planned, download
from llm_api_server.downloads.source import parse_source
from llm_api_server.errors import DownloadError
from tests.hub import Hub, hub

DATA = bytes(range(256)) * 5000


@pytest.fixture
def here() -> Iterator[Hub]:
    with hub() as one:
        one.files["x.gguf"] = DATA
        yield one


def run(hub: Hub, folder: Path) -> list[DownloadEvent]:
    events: list[DownloadEvent] = []
    download(parse_source(f"{hub.url}/files/x.gguf"), folder, 1 << 40, events.append)
    return events


def test_the_plan_the_progress_and_the_result_are_events(here: Hub, tmp_path: Path) -> None:
    plan, *progress, last = run(here, tmp_path / "models")
    assert plan == Planned(f"{here.url}/files/x.gguf", None, "", {"x.gguf": len(DATA)}, len(DATA), 0, "the only file")
    assert all(isinstance(one, DownloadProgress) and one.total == len(DATA) for one in progress)
    assert last == Downloaded("x.gguf", verified=False)
    assert (tmp_path / "models" / "x.gguf").read_bytes() == DATA


def test_a_full_disk_is_an_error_before_anything_is_downloaded(
    here: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DownloadError, match="The download needs 1 MB and 268 MB to spare, but only 1 kB are free"):
        run(here, tmp_path)
    assert here.asked == []


def test_a_server_without_ranges_starts_anew(here: Hub, tmp_path: Path) -> None:
    here.knows_ranges = False
    here.breaks["x.gguf"] = [len(DATA) // 2]
    counts = [event.bytes for event in run(here, tmp_path) if isinstance(event, DownloadProgress)]
    assert max(counts) == len(DATA)
    assert (tmp_path / "x.gguf").read_bytes() == DATA


def test_an_unwritable_folder_is_an_error(here: Hub, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    with pytest.raises(DownloadError, match="cannot be written"):
        run(here, tmp_path / "models")
