"""Commands of the server: checks of the configuration, first start, and stop. Running servers are in tests/e2e."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from llm_api_server import __version__
from llm_api_server.cli.server import reload_text
from llm_api_server.config.change import Change
from llm_api_server.config.load import load_config
from llm_api_server.downloads.starter import StarterError
from llm_api_server.ipc.messages import Reloaded
from llm_api_server.serving import first_run
from tests.unit.cli.conftest import CONFIG, Run


def test_check_config_prints_ok_and_warnings(run: Run, folder: Path) -> None:
    result = run("check-config")
    assert result.stdout == f"{folder / 'config.yaml'}: ok\n"
    assert "warning: The model 'good' cannot be loaded" in result.stderr


def test_serve_checks_its_options_like_the_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONFIG", "PORT", "WORKERS"):
        monkeypatch.setenv(f"LLM_API_SERVER_{name}", "")  # restored afterwards
    result = run("serve", "--port", "99999", "--workers", "0", code=2)
    assert "LLM_API_SERVER_PORT: server.port: must be at most 65535" in result.stderr
    assert "LLM_API_SERVER_WORKERS: server.workers: must be at least 1" in result.stderr


def test_generated_texts_are_printed(run: Run) -> None:
    assert yaml.safe_load(run("config", "example").stdout)["server"]["port"] == 8050
    assert "properties" in json.loads(run("config", "schema").stdout)
    assert run("version").stdout.strip() == __version__


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that the starter model was requested for; nothing is downloaded."""
    calls: list[Path] = []

    def ensure_starter(models_dir: Path, _progress: object) -> Path:
        calls.append(models_dir)
        return models_dir / "model.gguf"

    monkeypatch.setattr(first_run, "ensure_starter", ensure_starter)
    return calls


def test_init_writes_a_private_file_with_a_key_of_its_own(run: Run, folder: Path, downloads: list[Path]) -> None:
    paths = [folder / "one" / "config.yaml", folder / "two" / "config.yaml"]
    for path in paths:
        run("init", "--config", str(path))
        assert path.stat().st_mode & 0o777 == 0o600
    one, two = (load_config(path) for path in paths)
    assert one.auth.api_keys[0].key != two.auth.api_keys[0].key
    assert len(one.auth.api_keys[0].key) == 46
    assert one.models.default == "SmolLM2-135M-Instruct"
    assert downloads == [path.parent / "models" for path in paths]
    assert one.models_dir == downloads[0]


def test_init_keeps_a_file_and_downloads_nothing_for_it(run: Run, folder: Path, downloads: list[Path]) -> None:
    assert "was not changed" in run("init").stdout
    assert (folder / "config.yaml").read_text() == CONFIG
    assert downloads == []


def test_init_downloads_a_missing_starter_again(run: Run, folder: Path, downloads: list[Path]) -> None:
    (folder / "config.yaml").unlink()
    run("init")
    run("init")
    assert downloads == [folder / "models"] * 2


def test_init_without_a_starter_downloads_nothing(run: Run, folder: Path, downloads: list[Path]) -> None:
    run("init", "--no-starter", "--config", "new.yaml")
    assert load_config(folder / "new.yaml").models.available == {}
    assert downloads == []


def test_init_that_cannot_download_writes_nothing(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Path:
        raise StarterError("no network; check the connection")

    monkeypatch.setattr(first_run, "ensure_starter", fail)
    assert run("init", "--config", "new.yaml", code=1).stderr == "no network; check the connection\n"
    assert not (folder / "new.yaml").exists()


NOW = Change("models.max_loaded", "1", "2", "now")
LATER = Change("server.port", "1", "2", "restart")


@pytest.mark.parametrize(
    ("changes", "applied", "last_line"),
    [
        ([], True, "Nothing changes."),
        ([NOW], False, "Dry run: nothing was changed."),
        ([NOW], True, "Applied."),
        ([NOW, LATER], True, "Applied, except for 1 that take effect when the server is restarted."),
    ],
)
def test_reload_prints_each_change_and_the_outcome(changes: list[Change], applied: bool, last_line: str) -> None:
    lines = reload_text(Reloaded(1, changes, applied=applied)).splitlines()
    assert lines == [*map(str, changes), last_line]


def test_reload_reports_late_workers() -> None:
    assert "2 workers have not applied the changes yet" in reload_text(Reloaded(1, [NOW], applied=True, late=2))
