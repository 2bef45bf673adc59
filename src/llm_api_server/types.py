"""Types shared by all layers: model states, exit codes, engines, tasks, permissions, model families."""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Literal, Self, get_args

#: Mark in `Annotated` of struct fields that processes exchange and clients never see.
INTERNAL = "internal"


class ModelState(StrEnum):
    """State of a model; `failed` comes with a reason and the time of the next attempt."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    SLEEPING = "sleeping"
    DRAINING = "draining"
    STOPPING = "stopping"
    FAILED = "failed"


class ExitCode(IntEnum):
    """Exit code of a command or process; `meaning` is its documentation."""

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

#: Ability of a model that an endpoint needs: generate text, embed, rank documents, score pairs of texts, classify, or
#: return the output of the pooler.
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

#: `batch` requests are served only when no other request waits.
PriorityClass = Literal["interactive", "batch"]

#: Grouping of usage totals.
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
