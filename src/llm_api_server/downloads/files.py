"""The files of a configured model, and their removal: only what is under `models_dir` and no other model's."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from llm_api_server.config.models import Config
from llm_api_server.engines.select import is_url, resolve_path


def files_of(config: Config, name: str) -> list[Path]:
    """Files and folders that only this model has. A folder under `models_dir` is one model's unless others name it."""
    top = config.models_dir.resolve()
    others = {path for other in config.models.available if other != name for path in _paths(config, other)}
    found: list[Path] = []
    for path in _paths(config, name):
        if not path.is_relative_to(top) or path == top or not path.exists():
            continue
        whole = top / path.relative_to(top).parts[0]
        target = path if any(other.is_relative_to(whole) for other in others) else whole
        if target not in others and target not in found:
            found.append(target)
    return found


def why_needed(config: Config, name: str) -> str | None:
    """Why the configuration cannot do without this model, else None."""
    if name in {config.models.default, *config.models.preload}:
        return f"{name!r} is named by models.default or models.preload; take it out there first."
    return None


def delete(paths: Iterable[Path]) -> None:
    """Raises `OSError`."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _paths(config: Config, name: str) -> list[Path]:
    """Absolute ones; those of hub ids are where such a folder would be."""
    entry = config.models.available[name]
    named = [
        resolve_path(entry, config.models_dir),
        *((entry.mmproj,) if entry.mmproj else ()),
        *entry.adapters.values(),
    ]
    return [config.resolve_model_path(path).resolve() for path in named if not is_url(path)]
