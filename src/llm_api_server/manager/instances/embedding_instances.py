"""Embedding instances: second processes of the same weights that embed, for engines that either generate or embed.

To the scheduler an embedding instance is a model of its own; clients only use the name of the model. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llm_api_server.config.models import ModelConfig
from llm_api_server.engines.base import Engine, ModelFacts
from llm_api_server.types import Task

#: Adapter and resolved entry of each model, by name.
Entries = Mapping[str, tuple[Engine, ModelConfig]]

_VERBS: dict[Task, str] = {
    "generate": "generate text",
    "embed": "embed",
    "rank": "rank documents",
    "score": "score pairs of texts",
    "classify": "classify",
    "pool": "give pooled values",
}
_ENDPOINTS: dict[Task, str] = {
    "generate": "/v1/chat/completions",
    "embed": "/v1/embeddings",
    "rank": "/v1/rerank",
    "score": "/v1/score",
    "classify": "/classify",
}


class EmbeddingInstances:
    """Names and entries of the embedding instances that the configured models can have.

    A model uses one only for its `ModelFacts.embedding_tasks`.
    """

    def __init__(self, configured: Entries) -> None:
        self._names: dict[str, str] = {}
        self.entries: dict[str, tuple[Engine, ModelConfig]] = {}
        for model, (engine, entry) in configured.items():
            name = f"{model} (embeddings)"
            if engine.name == "vllm" and entry.task == "auto" and name not in configured:
                self._names[model] = name
                self.entries[name] = engine, entry.model_copy(update={"task": "embed", "aliases": [], "adapters": {}})
        self._models = {name: model for model, name in self._names.items()}

    def name_of(self, model: str) -> str | None:
        """Return the name of the model's embedding instance, or None."""
        return self._names.get(model)

    def model_of(self, name: str) -> str | None:
        """Return the model of an embedding instance, or None if `name` is not one."""
        return self._models.get(name)

    def choose(self, model: str, task: Task, facts: ModelFacts) -> str | None:
        """Return the name to schedule for `task`: the model, its embedding instance, or None if neither supports it."""
        if facts.tasks is None or task in facts.tasks:
            return model
        return self._names.get(model) if task in facts.embedding_tasks else None

    def all_tasks(self, name: str, facts: ModelFacts) -> tuple[Task, ...] | None:
        """Return the tasks of a model, including those of its embedding instance; None: unknown."""
        if facts.tasks is None or name not in self._names:
            return facts.tasks
        return facts.tasks + facts.embedding_tasks


def refusal(model: str, task: Task, tasks: Sequence[Task]) -> str:
    """Return the message for a request whose task is not among the `tasks` of the model."""
    endpoints = [_ENDPOINTS[one] for one in tasks if one in _ENDPOINTS]
    message = f"The model '{model}' is {_kind(tasks)}; it does not {_VERBS[task]}."
    if not endpoints:
        return message
    return f"{message} Use {' or '.join(filter(None, [', '.join(endpoints[:-1]), endpoints[-1]]))}."


def _kind(tasks: Sequence[Task]) -> str:
    if "generate" in tasks:
        return "a generating model"
    if "embed" in tasks:
        return "an embedding model"
    return "a ranking model" if "rank" in tasks else "a classifier"
