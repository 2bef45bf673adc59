"""What `llm-api-server init` does before a first start: a configuration with a key of its own, and a model."""

from __future__ import annotations

import os
from pathlib import Path

from llm_api_server.auth.access import new_key
from llm_api_server.config.example import first_config
from llm_api_server.config.load import load_config
from llm_api_server.config.models import Config
from llm_api_server.downloads.starter import STARTER, Progress, ensure_starter
from llm_api_server.errors import ConfigError

STARTER_NAME = "SmolLM2-135M-Instruct"


def write_first_config(path: Path, *, with_starter: bool, progress: Progress) -> bool:
    """Write `path` unless it exists; whether it was written. A starter model that the file names is there afterwards.

    Raises `OSError` and `StarterError`; what they leave undone, the next call does.
    """
    if path.exists():
        if with_starter:
            _fetch_missing(path, progress)
        return False
    if with_starter:
        ensure_starter(path.parent / "models", progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(first_config(new_key(), STARTER_NAME if with_starter else None, STARTER.file_name))
    return True


def _fetch_missing(path: Path, progress: Progress) -> None:
    """The models folder may have been emptied since. A file with problems is for `serve` to tell about."""
    try:
        config = load_config(path)
    except ConfigError:
        return
    if _needs_starter(config):
        ensure_starter(config.models_dir, progress)


def _needs_starter(config: Config) -> bool:
    named = any(model.path == STARTER.file_name for model in config.models.available.values())
    return named and not config.resolve_model_path(STARTER.file_name).exists()
