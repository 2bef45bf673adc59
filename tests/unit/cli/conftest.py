"""Folder with a small configuration, and a runner of commands in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from llm_api_server.cli.main import app

CONFIG = """
server: {run_dir: run, port: 1}
auth: {api_keys: [{key: sk-0123456789abcdef, name: fixed}]}
models: {available: {good: {path: a.gguf, aliases: [fine], adapters: {tuned: lora}}, bad: {path: b.gguf}}}
"""
Run = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a `config.yaml`."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder: Path) -> Run:
    """Runs a command, which must end with `code` and print no traceback."""

    def invoke(*words: str, code: int = 0) -> Result:
        result = CliRunner().invoke(app, list(words))
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return result

    return invoke
