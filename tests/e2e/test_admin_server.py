"""The admin API about the server itself: its processes, its configuration without secrets, its logs."""

from __future__ import annotations

from pathlib import Path

from tests.running import KEY, running
from tests.waiting import wait_until

MODEL = "org/SmolLM2"


def test_status_configuration_and_logs(tmp_path: Path, smollm2_gguf: Path) -> None:
    config = {
        "server": {"workers": 2},
        "models": {"preload": [MODEL], "available": {MODEL: {"path": str(smollm2_gguf), "max_tokens": 512}}},
    }
    with running(tmp_path, config) as server, server.client() as client:
        wait_until(lambda: server.models()[MODEL]["state"] == "ready")
        status = client.get("/admin/api/status").json()
        assert status["manager"] == server.manager().pid
        assert len(status["workers"]) == 2
        (ram,) = (device for device in status["devices"] if device["id"] == "ram")
        assert ram["taken"][MODEL] > 0
        assert ram["free"] < ram["limit"] <= ram["total"]
        found = client.get("/admin/api/config")
        assert found.json()["file"] == str(tmp_path / "config.yaml")
        assert found.json()["options"]["models"]["available"][MODEL]["max_tokens"] == 512
        assert KEY not in found.text
        logs = [log["name"] for log in client.get("/admin/api/logs").json()["data"]]
        assert {"gateway", "manager", "engines/org_SmolLM2"} <= {*logs}
        text = client.get("/admin/api/logs/manager", params={"lines": 1000}).text
        assert f"model {MODEL} ready" in text
        assert len(client.get("/admin/api/logs/manager", params={"lines": 2}).text.splitlines()) == 2
        assert "llama" in client.get("/admin/api/logs/engines/org_SmolLM2").text


def test_nothing_but_logs_can_be_read(tmp_path: Path) -> None:
    with running(tmp_path, {"models": {"available": {}}}) as server, server.client() as client:
        for name in ("nothing", "..%2f..%2fconfig", "engines%2f..%2f..%2fconfig.yaml", "%00", "..%2fgateway"):
            response = client.get(f"/admin/api/logs/{name}")
            assert response.status_code == 404, response.text
