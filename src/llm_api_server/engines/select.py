"""Which engine runs a model, and where its files are. Called by the manager when it starts or reloads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llm_api_server.config.models import Config, ModelConfig
from llm_api_server.devices.host import Host, this_host
from llm_api_server.engines.base import Engine
from llm_api_server.engines.llama_cpp.adapter import LlamaCppEngine
from llm_api_server.engines.remote import RemoteEngine
from llm_api_server.engines.vllm.adapter import VllmEngine
from llm_api_server.types import EngineName

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def engine_for(model: ModelConfig) -> EngineName:
    """`auto`: a URL is remote, a `.gguf` is llama.cpp's, anything else is vLLM's."""
    if model.engine != "auto":
        return model.engine
    if is_url(model.path):
        return "remote"
    return "llama_cpp" if model.path.lower().endswith(".gguf") else "vllm"


def is_url(path: str) -> bool:
    return path.lower().startswith(("http://", "https://"))


def build_engines(config: Config, host: Host | None = None) -> Mapping[EngineName, Engine]:
    """One adapter each. Without `host`, for this machine."""
    host = host or this_host()
    return {"llama_cpp": LlamaCppEngine(config, host), "vllm": VllmEngine(config, host), "remote": RemoteEngine()}


def engines_by_model(config: Config) -> Mapping[str, tuple[Engine, ModelConfig]]:
    """Each configured model's adapter, and its entry with the paths resolved."""
    engines = build_engines(config)
    return {
        name: (engines[engine_for(model)], _with_paths(config, model))
        for name, model in config.models.available.items()
    }


def resolve_path(config: Config, model: ModelConfig) -> str:
    """The absolute path of the model's files; URLs and hub ids as they are.

    Relative paths start at `models_dir`. `org/name` is a hub id unless there is such a folder.
    """
    if is_url(model.path):
        return model.path
    path = config.resolve_model_path(model.path)
    is_hub_id = _HUB_ID.fullmatch(model.path) is not None and engine_for(model) == "vllm"
    if is_hub_id and not path.exists() and not (config.models_dir.parent / model.path).exists():
        first = model.path.split("/")[0]
        if first not in {"models", config.models_dir.name}:
            return model.path
    return str(path)


def _with_paths(config: Config, model: ModelConfig) -> ModelConfig:
    paths: dict[str, Any] = {"path": resolve_path(config, model)}
    paths["adapters"] = {name: str(config.resolve_model_path(path)) for name, path in model.adapters.items()}
    if model.mmproj:
        paths["mmproj"] = str(config.resolve_model_path(model.mmproj))
    return model.model_copy(update=paths)
