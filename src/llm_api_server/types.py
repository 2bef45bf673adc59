"""Words shared by every layer: model states, engines, permissions, model families. Pure; imports nothing of ours."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, get_args


class ModelState(StrEnum):
    """Where a model is in its life; `failed` keeps the reason and the time of the next try."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    SLEEPING = "sleeping"
    DRAINING = "draining"
    STOPPING = "stopping"
    FAILED = "failed"


EngineName = Literal["vllm", "llama_cpp", "remote"]
EngineChoice = Literal["auto", "vllm", "llama_cpp", "remote"]

Permission = Literal[
    "all",
    "chat",
    "completions",
    "embeddings",
    "rerank",
    "audio",
    "responses",
    "messages",
    "tokenize",
    "batch",
    "models",
    "admin",
]
PERMISSIONS: frozenset[str] = frozenset(get_args(Permission))

ModelType = Literal[
    "auto",
    "qwen",
    "deepseek",
    "llama",
    "mistral",
    "gemma",
    "glm",
    "gpt-oss",
    "phi",
    "bert",
    "other",
]
