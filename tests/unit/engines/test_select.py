"""Choice of engines, and resolution of paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_api_server.config.models import Config, ModelConfig, ModelsConfig
from llm_api_server.devices.host import Host
from llm_api_server.engines.select import build_engines, engine_for, engines_by_model, resolve_path
from llm_api_server.types import EngineChoice


def config_in(folder: Path, **models: ModelConfig) -> Config:
    return Config(models=ModelsConfig(available=models), source=folder / "config.yaml")


@pytest.mark.parametrize(
    ("path", "choice", "engine"),
    [
        ("a/b.gguf", "auto", "llama_cpp"),
        ("a/B.GGUF", "auto", "llama_cpp"),
        ("org/name", "auto", "vllm"),
        ("/folder", "auto", "vllm"),
        ("https://host/v1", "auto", "remote"),
        ("HTTP://host/v1", "auto", "remote"),
        ("a/b.gguf", "vllm", "vllm"),
        ("a/b.bin", "llama_cpp", "llama_cpp"),
    ],
)
def test_engine_for(path: str, choice: EngineChoice, engine: str) -> None:
    assert engine_for(ModelConfig(path=path, engine=choice)) == engine


def test_relative_paths_start_at_models_dir(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    assert resolve_path(ModelConfig(path="x.gguf"), config.models_dir) == str(tmp_path / "models" / "x.gguf")
    assert resolve_path(ModelConfig(path="/abs/x.gguf"), config.models_dir) == "/abs/x.gguf"
    assert resolve_path(ModelConfig(path="folder"), config.models_dir) == str(tmp_path / "models" / "folder")


def test_org_name_is_a_hub_id_unless_there_is_such_a_folder(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    model = ModelConfig(path="org/name")
    assert resolve_path(model, config.models_dir) == "org/name"
    (tmp_path / "models" / "org" / "name").mkdir(parents=True)
    assert resolve_path(model, config.models_dir) == str(tmp_path / "models" / "org" / "name")


@pytest.mark.parametrize("path", ["models/x", "./org/name", "org/name/more", "name"])
def test_paths_are_no_hub_ids(tmp_path: Path, path: str) -> None:
    assert resolve_path(ModelConfig(path=path), config_in(tmp_path).models_dir).startswith(str(tmp_path))


def test_models_come_with_their_adapter_and_resolved_paths(tmp_path: Path) -> None:
    config = config_in(tmp_path, a=ModelConfig(path="a.gguf", mmproj="p.gguf"), b=ModelConfig(path="http://h/v1"))
    by_model = engines_by_model(config)
    engine, model = by_model["a"]
    assert engine.name == "llama_cpp"
    assert (model.path, model.mmproj) == (str(tmp_path / "models/a.gguf"), str(tmp_path / "models/p.gguf"))
    assert by_model["b"][0].name == "remote"


def test_every_engine_has_an_adapter_of_its_name(tmp_path: Path) -> None:
    engines = build_engines(config_in(tmp_path), Host(2**34, 4, has_nvidia=False))
    assert {name: engine.name for name, engine in engines.items()} == {n: n for n in ("llama_cpp", "vllm", "remote")}
