"""Choice of the engine for each model, and resolution of the model's paths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_api_server.config.models import Config, ModelConfig
from llm_api_server.devices.host import Host, this_host
from llm_api_server.engines.base import Engine
from llm_api_server.engines.llama_cpp.adapter import LlamaCppEngine
from llm_api_server.engines.remote import RemoteEngine
from llm_api_server.engines.settings import EngineSettings
from llm_api_server.engines.vllm.adapter import VllmEngine
from llm_api_server.types import EngineName

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def engine_for(model: ModelConfig) -> EngineName:
    """Return the engine of a model; `auto` means remote for a URL, llama.cpp for a `.gguf`, vLLM for the rest."""
    if model.engine != "auto":
        return model.engine
    if is_url(model.path):
        return "remote"
    return "llama_cpp" if model.path.lower().endswith(".gguf") else "vllm"


def is_url(path: str) -> bool:
    return path.lower().startswith(("http://", "https://"))


def build_engines(config: Config, host: Host | None = None) -> Mapping[EngineName, Engine]:
    """Build one adapter per engine, for this machine unless `host` is given."""
    host = host or this_host()
    folders = (config.models_dir, config.folder)
    llama_cpp, vllm = config.engines.llama_cpp, config.engines.vllm
    return {
        "llama_cpp": LlamaCppEngine(
            EngineSettings(config.llama_cpp_python, config.inference, folders), host, threads=llama_cpp.threads
        ),
        "vllm": VllmEngine(EngineSettings(config.vllm_python, config.inference, folders), host, zygote=vllm.zygote),
        "remote": RemoteEngine(),
    }


def engines_by_model(config: Config) -> Mapping[str, tuple[Engine, ModelConfig]]:
    """Return the adapter of each configured model, and its entry with resolved paths."""
    engines = build_engines(config)
    return {
        name: (engines[engine_for(model)], _with_paths(model, config.models_dir))
        for name, model in config.models.available.items()
    }


def resolve_path(model: ModelConfig, models_dir: Path) -> str:
    """Return the absolute path of the model's files; URLs and hub ids stay as they are.

    Relative paths start at `models_dir`. `org/name` is a hub id unless a folder of that name exists.
    """
    if is_url(model.path):
        return model.path
    path = models_dir / Path(model.path).expanduser()
    is_hub_id = _HUB_ID.fullmatch(model.path) is not None and engine_for(model) == "vllm"
    if is_hub_id and not path.exists() and not (models_dir.parent / model.path).exists():
        first = model.path.split("/")[0]
        if first not in {"models", models_dir.name}:
            return model.path
    return str(path)


def _with_paths(model: ModelConfig, models_dir: Path) -> ModelConfig:
    paths: dict[str, Any] = {
        "path": resolve_path(model, models_dir),
        "adapters": {name: str(models_dir / Path(path).expanduser()) for name, path in model.adapters.items()},
    }
    if model.mmproj:
        paths["mmproj"] = str(models_dir / Path(model.mmproj).expanduser())
    return model.model_copy(update=paths)
