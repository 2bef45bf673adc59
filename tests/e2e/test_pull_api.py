"""Downloads by the admin API: watched, cancelled, added, and available on all workers at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.hub import COMMIT, Hub, Repo, hub
from tests.running import RESTRICTED_KEY, Server, running
from tests.waiting import wait_until

REPO = "tests/tiny-GGUF"
GGUF = "model-Q4_K_M.gguf"
PATH = f"tiny-GGUF/{GGUF}"
PULL = "/admin/api/models/pull"
MIB = 1 << 20


@pytest.fixture(scope="module")
def here(smollm2_gguf: Path) -> Iterator[Hub]:
    with hub() as one:
        one.repos[REPO] = Repo({GGUF: smollm2_gguf.read_bytes()})
        yield one


@pytest.fixture
def server(tmp_path: Path, here: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    here.breaks.clear()
    here.asked.clear()
    for name, value in {**here.environment(), "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    config: dict[str, Any] = {
        "server": {"workers": 2},
        "models": {"available": {}},
    }
    with running(tmp_path, config) as one:
        yield one


def events(client: httpx.Client, pull: str) -> list[dict[str, Any]]:
    """Return all events of a download, until the stream ends."""
    with client.stream("GET", f"/admin/api/pulls/{pull}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        return [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line]


def available(server: Server) -> dict[str, Any]:
    content = yaml.safe_load((server.folder / "config.yaml").read_text())
    found: dict[str, Any] = content["models"]["available"]
    return found


@pytest.mark.story
def test_model_is_downloaded_and_used(server: Server, here: Hub) -> None:
    with server.client() as client:
        begun = client.post(PULL, json={"source": REPO})
        assert begun.status_code == 202, begun.text
        progress = events(client, begun.json()["id"])
        counts = [one["bytes"] for one in progress]
        assert counts == sorted(counts)
        last = progress[-1]
        size = len(here.repos[REPO].files[GGUF])
        assert (last["state"], last["bytes"], last["total"]) == ("done", size, size)
        assert (last["revision"], last["model"], last["added"], last["error"]) == (COMMIT, "tiny", True, None)
        assert last["entry"] == {"path": PATH, "engine": "llama_cpp", "type": "llama"} == available(server)["tiny"]
        assert client.get("/admin/api/pulls").json()["data"] == [last]
    for _ in range(4):  # either worker
        with server.client() as client:
            response = client.post("/v1/completions", json={"model": "tiny", "prompt": "Hi", "max_tokens": 2})
            assert response.status_code == 200, response.text


def test_download_without_add_changes_no_configuration(server: Server) -> None:
    with server.client() as client:
        pull = client.post(PULL, json={"source": REPO, "add": False}).json()["id"]
        last = events(client, pull)[-1]
        assert (last["state"], last["model"], last["added"]) == ("done", "tiny", False)
        assert available(server) == {}
        added = client.post(f"/admin/api/pulls/{pull}/add", json={"name": "mine"})
        assert added.json()["added"], added.text
        assert list(available(server)) == ["mine"]
        again = client.post(f"/admin/api/pulls/{pull}/add", json={"name": "mine"})
        assert (again.status_code, again.json()["error"]["code"]) == (400, "invalid_configuration")
        assert client.delete(f"/admin/api/pulls/{pull}").json()["state"] == "done"
        assert client.get(f"/admin/api/pulls/{pull}").status_code == 404


def test_cancelled_download_is_resumed(server: Server, here: Hub) -> None:
    here.breaks[GGUF] = [40 * MIB] + [0] * 1000
    with server.client() as client:
        pull = client.post(PULL, json={"source": REPO}).json()["id"]
        wait_until(lambda: any(count == 0 for *_, count in here.asked))
        busy = client.post(PULL, json={"source": REPO}).json()["id"]
        assert "is already being downloaded" in events(client, busy)[-1]["error"]
        assert client.delete(f"/admin/api/pulls/{pull}").json()["state"] == "cancelled"
        wait_until(lambda: server.downloads() == [])
        assert available(server) == {}
        here.breaks.clear()
        here.asked.clear()
        pull = client.post(PULL, json={"source": REPO}).json()["id"]
        assert events(client, pull)[-1]["state"] == "done"
    assert sum(count for *_, count in here.asked) < len(here.repos[REPO].files[GGUF]) - 39 * MIB


def test_failed_downloads_are_explained(server: Server) -> None:
    with server.client() as client:
        wrong = client.post(PULL, json={"source": "nonsense"})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "source")
        for source, reason in (
            ("tests/nothing", "does not exist on Hugging Face"),
            (f"{REPO}:Q9_9", "has no file 'Q9_9'"),
            ("--help/me", "is not a source of models"),
        ):
            response = client.post(PULL, json={"source": source})
            if response.status_code == 202:
                last = events(client, response.json()["id"])[-1]
                assert last["state"] == "failed"
                assert reason in last["error"]
            else:
                assert reason in response.json()["error"]["message"]
        for method, path in (("GET", "x"), ("DELETE", "x"), ("GET", "x/events"), ("POST", "x/add")):
            response = client.request(method, f"/admin/api/pulls/{path}")
            assert (response.status_code, response.json()["error"]["code"]) == (404, "pull_not_found")
    with server.client(RESTRICTED_KEY) as client:
        assert client.post(PULL, json={"source": REPO}).status_code == 403


def test_download_ends_with_its_manager(server: Server, here: Hub) -> None:
    here.breaks[GGUF] = [MIB] + [0] * 1000
    with server.client() as client:
        client.post(PULL, json={"source": REPO})
        wait_until(lambda: server.downloads() != [])
        server.manager().kill()
        wait_until(server.has_manager)
        wait_until(lambda: server.downloads() == [])
        here.breaks[GGUF] = [MIB] + [0] * 1000
        client.post(PULL, json={"source": REPO})
        wait_until(lambda: server.downloads() != [])  # `running` checks that it ends with the server


def test_model_is_removed_with_its_files(server: Server) -> None:
    with server.client() as client:
        assert events(client, client.post(PULL, json={"source": REPO}).json()["id"])[-1]["added"]
        file = server.folder / "models" / PATH
        assert file.exists()
        assert client.post("/admin/api/models/tiny/load").status_code == 200
        loaded = client.delete("/admin/api/models/tiny")
        assert (loaded.status_code, loaded.json()["error"]["code"]) == (409, "model_not_removable")
        assert "unload it first" in loaded.json()["error"]["message"]
        client.post("/admin/api/models/tiny/unload")
        gone = client.delete("/admin/api/models/tiny")
        assert gone.json() == {"id": "tiny", "deleted": True, "files": [str(file.parent)]}
        assert not file.parent.exists()
        assert available(server) == {}
        assert client.get("/v1/models").json()["data"] == []
        assert client.delete("/admin/api/models/tiny").json()["error"]["code"] == "model_not_found"


def test_model_with_files_elsewhere_is_only_removed_from_the_configuration(server: Server, smollm2_gguf: Path) -> None:
    server.configure({"models": {"available": {"elsewhere": {"path": str(smollm2_gguf)}, "kept": {"path": "x.gguf"}}}})
    with server.client() as client:
        assert client.post("/admin/api/reload").status_code == 200
        refused = client.delete("/admin/api/models/elsewhere")
        assert refused.status_code == 409
        assert "keep_files=true" in refused.json()["error"]["message"]
        assert client.delete("/admin/api/models/elsewhere?keep_files=true").json()["files"] == []
        assert smollm2_gguf.exists()
        assert list(available(server)) == ["kept"]
