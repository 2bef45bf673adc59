"""Words that a shell completes, by `llm-api-server --install-completion`. Quiet and quick: no server is asked."""

from __future__ import annotations

import typer


def models(context: typer.Context, incomplete: str) -> list[str]:
    """Names, aliases and adapters of the configuration file; none where it cannot be read."""
    import os
    from pathlib import Path

    import yaml

    path = context.params.get("config") or os.environ.get("LLM_API_SERVER_CONFIG") or "config.yaml"
    try:
        with Path(path).open(encoding="utf-8") as file:
            available = yaml.load(file, yaml.CSafeLoader)["models"]["available"]
        names = [word for name, entry in available.items() for word in (name, *_others(entry or {}))]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, KeyError, TypeError):
        return []
    return [name for name in names if str(name).startswith(incomplete)]


def _others(entry: dict[str, list[str]]) -> list[str]:
    return [*(entry.get("aliases") or []), *(entry.get("adapters") or [])]
