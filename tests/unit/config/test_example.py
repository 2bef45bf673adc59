"""Texts generated from the declaration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from llm_api_server.config import models as declaration
from llm_api_server.config.checks import config_warnings
from llm_api_server.config.example import example, first_config, schema
from llm_api_server.config.models import Config

ROOT = Path(__file__).parents[3]

Load = Callable[[str], Config]
Problems = Callable[[str], list[str]]


def test_the_committed_example_is_current() -> None:
    assert (ROOT / "config.example.yaml").read_text(encoding="utf-8") == example()


def test_the_example_shows_every_option_and_loads(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_API_KEY", "sk-0123456789abcdef")
    config = load(example())
    shown = yaml.safe_load(example())
    for name in Config.model_fields:
        if name != "source":
            assert shown[name].keys() == type(getattr(config, name)).model_fields.keys()
    model = shown["models"]["available"]["SmolLM2-135M-Instruct"]
    assert model.keys() == declaration.ModelConfig.model_fields.keys()
    defaults = Config()
    for name in ("server", "logging", "inference", "engines"):
        assert getattr(config, name) == getattr(defaults, name)


def test_the_first_configuration_loads(load: Load) -> None:
    with_model = load(first_config("sk-0123456789abcdef", "SmolLM2", "SmolLM2.gguf"))
    assert with_model.models.default == "SmolLM2"
    assert with_model.resolve_model_path("SmolLM2.gguf").parts[-2:] == ("models", "SmolLM2.gguf")
    without = load(first_config("sk-0123456789abcdef", None, ""))
    assert without.models.available == {}
    assert config_warnings(without) == ["models.available is empty: there is nothing to serve yet."]


def test_the_schema_knows_every_section() -> None:
    document = yaml.safe_load(schema())
    assert document["properties"].keys() == Config.model_fields.keys() - {"source"}
    assert "description" in document["$defs"]["ServerConfig"]["properties"]["port"]
