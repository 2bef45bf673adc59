"""Settings that an engine adapter gets from the configuration."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from llm_api_server.config.models import InferenceConfig


@dataclass(frozen=True)
class EngineSettings:
    """`python` is the interpreter of the engine; `template_folders` are searched for chat templates, in order."""

    python: str = sys.executable
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    template_folders: tuple[Path, ...] = ()
