"""Fixtures that write a configuration file and load it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llm_api_server.config.load import load_config
from llm_api_server.config.models import Config
from llm_api_server.errors import ConfigError

Load = Callable[[str], Config]
Problems = Callable[[str], list[str]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def write_and_load(text: str) -> Config:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path)

    return write_and_load


@pytest.fixture
def problems(load: Load) -> Problems:
    """Return the problems of a text without the folder in front: `config.yaml:3: …`."""

    def load_and_fail(text: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(text)
        return [problem[problem.index("config.yaml") :] for problem in caught.value.problems]

    return load_and_fail
