"""Download of one file: retries, and their end."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_api_server.downloads.hub import hub_errors
from llm_api_server.downloads.transfer import fetch
from llm_api_server.errors import DownloadError
from tests.hub import hub

DATA = bytes(range(256)) * 100


def test_a_download_resumes_after_lost_connections(tmp_path: Path) -> None:
    with hub() as server:
        server.files["x.gguf"] = DATA
        server.breaks["x.gguf"] = [1000, 0, 2000]
        counts: list[int] = []
        fetch(f"{server.url}/files/x.gguf", tmp_path / "x.gguf", len(DATA), counts.append, max_pause=0)
    assert (tmp_path / "x.gguf").read_bytes() == DATA
    assert sum(counts) == len(DATA)
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_a_server_that_never_sends_data_is_an_error(tmp_path: Path) -> None:
    with hub() as server:
        server.files["x.gguf"] = DATA
        server.breaks["x.gguf"] = [0] * 100
        with (
            pytest.raises(DownloadError, match="The hub cannot be reached"),
            hub_errors("The hub", lambda _: None),
        ):
            fetch(f"{server.url}/files/x.gguf", tmp_path / "x.gguf", len(DATA), lambda _: None, max_pause=0)
        assert len(server.asked) == 7
