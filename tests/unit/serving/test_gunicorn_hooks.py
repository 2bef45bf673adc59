"""Hooks of gunicorn's master process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from llm_api_server.config.load import CONFIG_VARIABLE
from llm_api_server.config.models import Config
from llm_api_server.lifecycle.running_server import RunningServer
from llm_api_server.serving import gunicorn_hooks
from llm_api_server.serving.gunicorn_hooks import bind_address
from tests.lock_holder import holder


def config(folder: Path, **server: object) -> Config:
    return Config.model_validate({"server": {"run_dir": str(folder), **server}, "source": folder / "config.yaml"})


@pytest.mark.parametrize(("host", "expected"), [("0.0.0.0", "0.0.0.0:81"), ("::1", "[::1]:81"), ("[::]", "[::]:81")])
def test_gunicorn_gets_an_address_in_its_own_syntax(tmp_path: Path, host: str, expected: str) -> None:
    assert bind_address(config(tmp_path, host=host, port=81).server) == expected


def test_an_invalid_file_ends_gunicorn_with_its_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("server: {prot: 1}\n")
    monkeypatch.setenv(CONFIG_VARIABLE, str(path))
    with pytest.raises(SystemExit) as caught:
        gunicorn_hooks.config_for_gunicorn()
    assert caught.value.code == 2
    assert "config.yaml:1: server.prot" in capsys.readouterr().err


@pytest.mark.parametrize(("reexec", "master", "stops"), [(0, 0, True), (7, 0, False), (0, 7, False)])
def test_a_master_that_is_replaced_or_replaces_leaves_the_manager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reexec: int, master: int, stops: bool
) -> None:
    stopped: list[RunningServer] = []

    def stop_manager(server: RunningServer) -> bool:
        stopped.append(server)
        return True

    monkeypatch.setattr(RunningServer, "stop_manager", stop_manager)
    gunicorn_hooks.on_gunicorn_exit(SimpleNamespace(reexec_pid=reexec, master_pid=master), config(tmp_path))
    assert bool(stopped) is stops


def test_only_the_first_master_takes_the_lock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with holder(tmp_path):
        gunicorn_hooks.on_gunicorn_start(SimpleNamespace(master_pid=7), config(tmp_path))
        with pytest.raises(SystemExit) as caught:
            gunicorn_hooks.on_gunicorn_start(SimpleNamespace(master_pid=0), config(tmp_path))
    assert caught.value.code == 1
    assert "running already" in capsys.readouterr().err
