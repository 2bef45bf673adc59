"""Paths derived from the configuration, and descriptions of options."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_api_server.config import models as declaration
from llm_api_server.config.models import Config

KEYS = "auth: {api_keys: [{key: sk-0123456789abcdef, name: me}]}\n"

Load = Callable[[str], Config]
Problems = Callable[[str], list[str]]


def test_relative_paths_start_at_the_file(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(KEYS + "models: {models_dir: weights}\nengines: {llama_cpp: {python: env/bin/python}}\n")
    monkeypatch.chdir("/")
    assert config.models_dir == tmp_path / "weights"
    assert config.log_dir == tmp_path / "logs"
    assert config.resolve_model_path("a.gguf") == tmp_path / "weights" / "a.gguf"
    assert config.resolve_model_path("/a.gguf") == Path("/a.gguf")
    assert config.llama_cpp_python == str(tmp_path / "env" / "bin" / "python")
    assert Config().llama_cpp_python == sys.executable


def test_vllms_environment_beside_the_file_is_found(load: Load, tmp_path: Path) -> None:
    python = tmp_path / ".venv-vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert load(KEYS).vllm_python == str(python)
    assert load(KEYS + "engines: {vllm: {python: python3.12}}\n").vllm_python == "python3.12"


def test_every_option_is_described() -> None:
    def undescribed(model: type, prefix: str) -> list[str]:
        fields = model.model_fields  # type: ignore[attr-defined]
        return [prefix + name for name, field in fields.items() if not field.description]

    sections = [declaration.ServerConfig, declaration.ApiKeyConfig, declaration.AuthConfig, declaration.LoggingConfig]
    sections += [declaration.ModelConfig, declaration.ModelsConfig, declaration.InferenceConfig]
    sections += [declaration.VllmConfig, declaration.LlamaCppConfig]
    assert [name for section in sections for name in undescribed(section, f"{section.__name__}.")] == []
