"""Lines shown when the server is ready: its address, and on this machine only, a key and a command that works."""

from __future__ import annotations

import json
import shlex
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from llm_api_server.config.load import load_config
from llm_api_server.config.models import Config
from llm_api_server.serving.banner import Banner, banner

KEY = "sk-0123456789abcdef"
OTHER_KEY = "sk-other-0123456789"
Load = Callable[[str], Config]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def write_and_load(text: str) -> Config:
        (tmp_path / "config.yaml").write_text(text)
        return load_config(tmp_path / "config.yaml")

    return write_and_load


def text_of(
    key: str = KEY, *, host: str = "127.0.0.1", more: str = "", models: str = "available: {m: {path: a.gguf}}"
) -> str:
    return f"server: {{host: '{host}'}}\nauth: {{api_keys: [{{key: '{key}', name: a{more}}}]}}\nmodels: {{{models}}}\n"


def test_the_command_is_one_line_of_shell_words(load: Load) -> None:
    name = "it's a model"
    text = banner(load(text_of(models=f'default: "{name}", available: {{"{name}": {{path: a.gguf}}}}')), 8050)
    (line,) = [line for line in text.splitlines() if "curl" in line]
    command = shlex.split(line)
    assert command[:2] == ["curl", "http://127.0.0.1:8050/v1/chat/completions"]
    assert f"Authorization: Bearer {KEY}" in command
    body = json.loads(command[command.index("-d") + 1])
    assert body["model"] == name
    assert f"Key: {KEY}" in text


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1"])
def test_no_key_is_shown_if_other_machines_can_connect(load: Load, host: str) -> None:
    text = banner(load(text_of(host=host)), 8050)
    assert KEY not in text
    assert ":8050/v1" in text


def test_addresses_are_urls(load: Load) -> None:
    assert "http://[::1]:80/v1" in banner(load(text_of(host="::1")), 80)
    assert "http://127.0.0.1:80/v1" in banner(load(text_of(host="0.0.0.0")), 80)


def test_a_key_from_the_environment_is_not_shown(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", OTHER_KEY)
    text = banner(load(text_of("${A_KEY}")), 8050)
    assert OTHER_KEY not in text
    assert "curl" not in text


def test_a_hashed_key_is_not_shown(load: Load) -> None:
    assert "Key" not in banner(load(text_of("sha256:" + "0" * 64)), 8050)


@pytest.mark.parametrize(
    "text",
    [
        text_of(more=", permissions: [embeddings]"),
        text_of(more=", models: [other]"),
        text_of(models=""),
        text_of(models="available: {m: {path: a, task: embed}}"),
    ],
)
def test_a_command_that_would_fail_is_not_shown(load: Load, text: str) -> None:
    shown = banner(load(text), 8050)
    assert "curl" not in shown
    assert f"Key: {KEY}" in shown


def test_without_authentication_the_command_has_no_key(load: Load) -> None:
    text = banner(load("auth: {enabled: false}\nmodels: {available: {m: {path: a.gguf}}}\n"), 8050)
    assert "curl" in text
    assert "Authorization" not in text


def test_the_banner_is_shown_once_when_the_server_responds() -> None:
    class Live(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    paths: list[str] = []
    shown: list[str] = []
    with HTTPServer(("127.0.0.1", 0), Live) as server:
        thread = Banner(f"http://127.0.0.1:{server.server_port}", lambda: shown.append("banner"))
        thread.start()
        assert shown == [], "no response yet"
        threading.Thread(target=server.handle_request).start()
        thread.join()
    assert paths == ["/livez"]
    assert shown == ["banner"]


def test_a_server_that_never_responds_has_no_banner() -> None:
    shown: list[str] = []
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        Banner(f"http://127.0.0.1:{unused.getsockname()[1]}", lambda: shown.append("banner")).run()
    assert shown == []
