"""Preparation of a first start by `llm-api-server init`: a configuration with a key of its own, and a model."""

from __future__ import annotations

import os
from pathlib import Path

from llm_api_server.auth.access import new_key
from llm_api_server.config.example import first_config
from llm_api_server.config.load import load_config
from llm_api_server.downloads.starter import STARTER, Progress, ensure_starter
from llm_api_server.errors import ConfigError

STARTER_NAME = "SmolLM2-135M-Instruct"


def write_first_config(path: Path, *, with_starter: bool, progress: Progress) -> bool:
    """Write `path` unless it exists, and download the starter model if the file names it.

    Return whether the file was written. Raises `OSError` and `StarterError`; the next call completes what they left.
    """
    if path.exists():
        if with_starter:
            _download_missing_starter(path, progress)
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


def _download_missing_starter(path: Path, progress: Progress) -> None:
    """Download the starter model again if the models folder was emptied."""
    try:
        config = load_config(path)
    except ConfigError:
        return  # `serve` reports its problems
    is_named = any(model.path == STARTER.file_name for model in config.models.available.values())
    if is_named and not config.resolve_model_path(STARTER.file_name).exists():
        ensure_starter(config.models_dir, progress)
