"""Files of a configured model, and their removal: only files under `models_dir` that no other model uses."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from llm_api_server.config.models import ModelConfig, ModelsConfig
from llm_api_server.engines.select import is_url, resolve_path


def files_of(available: Mapping[str, ModelConfig], models_dir: Path, name: str) -> list[Path]:
    """Return files and folders of this model alone: its folder under `models_dir`, unless other models use it, too."""
    top = models_dir.resolve()
    others = {path for other, entry in available.items() if other != name for path in _paths(entry, models_dir)}
    found: list[Path] = []
    for path in _paths(available[name], models_dir):
        if not path.is_relative_to(top) or path == top or not path.exists():
            continue
        folder = top / path.relative_to(top).parts[0]
        target = path if any(other.is_relative_to(folder) for other in others) else folder
        if target not in others and target not in found:
            found.append(target)
    return found


def why_needed(models: ModelsConfig, name: str) -> str | None:
    """Return why the configuration needs this model, or None."""
    if name in {models.default, *models.preload}:
        return f"models.default or models.preload contains {name!r}: remove it there first."
    return None


def delete(paths: Iterable[Path]) -> None:
    """Delete files and folders. Raises `OSError`."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _paths(entry: ModelConfig, models_dir: Path) -> list[Path]:
    """Return the model's absolute paths; for a hub id, the folder that it would have."""
    configured = [
        resolve_path(entry, models_dir),
        *((entry.mmproj,) if entry.mmproj else ()),
        *entry.adapters.values(),
    ]
    return [(models_dir / Path(path).expanduser()).resolve() for path in configured if not is_url(path)]
