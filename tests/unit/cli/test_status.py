"""`status`: content of the screen. Real servers are in tests/e2e."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llm_api_server import __version__
from llm_api_server.cli import base
from llm_api_server.cli.main import app
from llm_api_server.cli.status import StatusReport, as_text
from llm_api_server.ipc.model_status import DeviceStatus, ModelStatus
from llm_api_server.types import ModelState

GIB = 1024**3


def report(**more: Any) -> StatusReport:
    good = ModelStatus(
        "good",
        ModelState.READY,
        "vllm",
        "a",
        memory_bytes=GIB,
        in_flight=3,
        queued=2,
        devices={"gpu0": 12 * GIB, "ram": 1},
    )
    status = StatusReport(
        version=__version__, url="http://127.0.0.1:8050", config="/x/config.yaml", pid=1, manager=2, workers=[4, 3],
        started_at=time.time() - 7500, in_flight=3, queued=2, models=[good],
        devices=[DeviceStatus("gpu0", "H200", 139 * GIB, 139 * GIB, 2 * GIB, {"good": 12 * GIB}, 125 * GIB)],
    )  # fmt: skip
    return replace(status, **more)


def rows(text: str, first: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"{first} ")]
    return line.split("  ")


def cells(text: str, first: str) -> list[str]:
    return [cell.strip() for cell in rows(text, first) if cell.strip()]


def test_the_screen_has_processes_requests_models_and_devices() -> None:
    text = as_text(report())
    head = text.splitlines()[:4]
    assert head[0].startswith(f"LLM API Server {__version__} at http://127.0.0.1:8050/v1, up 2 h 5 min")
    assert head[2] == "processes: manager 2, workers 3 4"
    assert head[3] == "requests: 3 in flight, 2 waiting"
    assert cells(text, "good") == ["good", "ready", "3", "2", "12.0 GiB gpu0, 1.0 GiB ram"]
    assert cells(text, "gpu0") == ["gpu0", "H200", "139.0 GiB", "12.0 GiB", "2.0 GiB", "125.0 GiB"]
    assert "is installed" not in text


def test_a_loading_model_shows_its_phase_and_the_time_left() -> None:
    model = ModelStatus("m", ModelState.STARTING, "vllm", "a", phase="weights")
    assert cells(as_text(report(models=[model])), "m")[1] == "starting (weights)"
    model.ready_at = time.time() + 1000
    assert cells(as_text(report(models=[model])), "m")[1].startswith("starting (weights, about ")


def test_failures_are_shown_with_their_reasons_on_one_line() -> None:
    model = ModelStatus("m", ModelState.FAILED, "vllm", "a", error="no such\nfile")
    assert as_text(report(models=[model])).endswith("\n\nm: no such\\nfile")


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"version": "0.0.1"}, "llm-api-server restart"),
        ({"workers": []}, "none: clients cannot connect"),
        ({"url": None}, "server.port: 0"),
        ({"models": []}, "models.available"),
    ],
)
def test_unusual_states_are_explained(state: dict[str, Any], text: str) -> None:
    assert text not in as_text(report())
    assert text in as_text(report(**state))


def test_without_a_start_time_no_uptime_is_shown() -> None:
    assert ", up " not in as_text(report(pid=None, started_at=None))


def test_json_has_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    base.show("", report(), as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["url"], found["queued"], found["workers"]) == ("http://127.0.0.1:8050", 2, [4, 3])
    assert found["models"][0]["devices"]["gpu0"] == found["devices"][0]["taken"]["good"] == 12 * GIB


@pytest.mark.parametrize(("options", "code"), [([], 3), (["--json"], 3), (["--watch"], 3), (["--watch", "--json"], 2)])
def test_without_a_server_the_code_is_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], code: int
) -> None:
    (tmp_path / "config.yaml").write_text(
        "server: {run_dir: run}\nauth: {api_keys: [{key: sk-0123456789abcdef, name: me}]}"
    )
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["status", *options])
    assert (result.exit_code, bool(result.stdout)) == (code, "--json" in options)
