"""Words shared by every layer: model states, engines, permissions, model families. Pure; imports nothing of ours."""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Literal, Self, get_args


class ModelState(StrEnum):
    """Where a model is in its life; `failed` keeps the reason and the time of the next try."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    SLEEPING = "sleeping"
    DRAINING = "draining"
    STOPPING = "stopping"
    FAILED = "failed"


class ExitCode(IntEnum):
    """How a command or a process of the server ends; `meaning` is for people."""

    meaning: str

    DONE = 0, "Success."
    FAILED = 1, "Failure; the message gives the reason and what to do."
    WRONG = 2, "The configuration or the command line is invalid."
    NOT_RUNNING = 3, "No server is running, or none responds at the address."
    INTERRUPTED = 130, "Interrupted with Ctrl-C."

    def __new__(cls, code: int, meaning: str) -> Self:
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member


DeviceKind = Literal["gpu", "ram"]
EngineName = Literal["vllm", "llama_cpp", "remote"]
EngineChoice = Literal["auto", "vllm", "llama_cpp", "remote"]

#: What an endpoint needs of a model: to make text, to embed, to rank documents or score pairs of texts, to classify, or
#: to give what its pooler gives.
Task = Literal["generate", "embed", "rank", "score", "classify", "pool"]

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
    "metrics",
    "admin",
]
PERMISSIONS: frozenset[str] = frozenset(get_args(Permission))

#: Whose turn it is: `batch` comes when nothing else waits.
PriorityClass = Literal["interactive", "batch"]

#: What usage is summed up by.
UsageGroup = Literal["key", "model", "day", "hour"]

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
