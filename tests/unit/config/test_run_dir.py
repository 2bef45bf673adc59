"""Location and privacy of the run directory."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llm_api_server.config.models import Config
from llm_api_server.errors import ConfigError

KEYS = "auth: {api_keys: [{key: sk-0123456789abcdef, name: me}]}\n"

Load = Callable[[str], Config]
Problems = Callable[[str], list[str]]


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A private folder with a path short enough for unix sockets."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_the_run_directory_is_one_per_file_and_private(
    load: Load, short_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = short_folder
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    config = load(KEYS)
    name = hashlib.sha256(os.fsencode(tmp_path / "config.yaml")).hexdigest()[:8]
    assert config.run_dir == runtime / "llm-api-server" / name
    assert config.ensure_run_dir() == config.run_dir
    assert config.run_dir.stat().st_mode & 0o777 == 0o700
    assert config.run_dir.parent.stat().st_mode & 0o777 == 0o700
    assert config.ensure_run_dir() == config.run_dir


@pytest.mark.parametrize("runtime", ["", "/nonexistent"])
def test_without_a_runtime_directory_the_run_directory_is_under_tmp(
    load: Load, short_folder: Path, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(short_folder))
    assert load(KEYS).run_dir.parent == short_folder / f"llm-api-server-{os.getuid()}"


def test_a_run_directory_that_others_can_write_is_refused(load: Load, tmp_path: Path) -> None:
    config = load(KEYS + "server: {run_dir: run}\n")
    config.ensure_run_dir()
    config.run_dir.chmod(0o777)
    with pytest.raises(ConfigError, match="others may write"):
        config.ensure_run_dir()
    config.run_dir.rmdir()
    (tmp_path / "elsewhere").mkdir()
    config.run_dir.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="others may write"):
        config.ensure_run_dir()
    config.run_dir.unlink()
    config.run_dir.touch()
    with pytest.raises(ConfigError, match="cannot be made"):
        config.ensure_run_dir()
