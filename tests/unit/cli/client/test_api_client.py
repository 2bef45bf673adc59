"""Choice of the server and the key by `chat` and `bench` if none is given."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from llm_api_server.cli import base
from llm_api_server.cli.client.api_client import connect
from llm_api_server.cli.main import app
from llm_api_server.lifecycle.server_lock import ServerLock
from tests.tiny_api import TinyApi

CONFIG = """
server: {{run_dir: run, port: {port}}}
auth: {{enabled: {enabled}, api_keys: [{keys}]}}
models: {{available: {{m: {{path: a.gguf}}}}}}
"""
HASHED = "{key: 'sha256:" + 64 * "0" + "', name: hashed}"
ENDED = "{key: sk-ended-0123456789, name: ended, expires_at: 2020-01-01}"
OTHER = "{key: sk-other-0123456789, name: other, permissions: [embeddings]}"
NARROW = "{key: sk-narrow-0123456789, name: narrow, models: [x]}"
GOOD = "{key: sk-good-0123456789ab, name: good, permissions: [chat], models: [m]}"


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server seems to run with every configuration."""
    monkeypatch.setattr(ServerLock, "holder", lambda _: 1)


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize(
    ("keys", "enabled", "key"),
    [
        ([HASHED, ENDED, OTHER, NARROW, GOOD], "true", "Bearer sk-good-0123456789ab"),
        ([GOOD], "false", None),
    ],
)
def test_the_first_usable_key_of_the_configuration_is_used(
    api: TinyApi, tmp_path: Path, keys: list[str], enabled: str, key: str | None
) -> None:
    port = api.url.rpartition(":")[2]
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(port=port, enabled=enabled, keys=", ".join(keys)))
    api.models = [{"id": "m"}]
    client, name = connect(path, None, None, "m")
    assert [delta.text for delta in client.stream({"model": name, "messages": []})][:2] == ["Hel", "lo"]
    assert api.keys == [key]


def run(tmp_path: Path, keys: str) -> tuple[int, str]:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(port=1, enabled="true", keys=keys))
    result = CliRunner().invoke(app, ["chat", "--config", str(path)], input="Hi")
    return result.exit_code, result.stderr


def test_without_a_running_server_the_exit_code_is_3(tmp_path: Path) -> None:
    assert run(tmp_path, GOOD)[0] == 3


@pytest.mark.usefixtures("running")
def test_without_a_usable_key_the_error_names_the_option(tmp_path: Path) -> None:
    code, errors = run(tmp_path, f"{HASHED}, {OTHER}")
    assert code == 2
    assert f"--key or {base.KEY_VARIABLE}" in errors
