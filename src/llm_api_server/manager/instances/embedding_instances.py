"""Which process of a model does what a request needs: its own, its twin or none. Pure; the manager asks.

A twin is a second process of the same weights that embeds, for an engine whose process either generates or embeds. To
the scheduler it is a model of its own; clients only ever say the name of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llm_api_server.config.models import ModelConfig
from llm_api_server.engines.base import Engine, ModelFacts
from llm_api_server.types import Task

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
    """The twins of the configured models. `ModelFacts.embedding_tasks` lists what one is good for."""

    def __init__(self, configured: Entries) -> None:
        self.configure(configured)

    def configure(self, configured: Entries) -> None:
        self._names: dict[str, str] = {}
        #: By the twin's name, like the configured models by theirs.
        self.entries: dict[str, tuple[Engine, ModelConfig]] = {}
        for model, (engine, entry) in configured.items():
            name = f"{model} (embeddings)"
            if engine.name == "vllm" and entry.task == "auto" and name not in configured:
                self._names[model] = name
                self.entries[name] = engine, entry.model_copy(update={"task": "embed", "aliases": [], "adapters": {}})
        self._models = {twin: model for model, twin in self._names.items()}

    def twin_of(self, model: str) -> str | None:
        return self._names.get(model)

    def model_of(self, twin: str) -> str | None:
        return self._models.get(twin)

    def choose(self, model: str, task: Task, facts: ModelFacts) -> str | None:
        """The name under which the scheduler knows what does `task` for `model`, or None when nothing does."""
        if facts.tasks is None or task in facts.tasks:
            return model
        return self._names.get(model) if task in facts.embedding_tasks else None

    def all_tasks(self, name: str, facts: ModelFacts) -> tuple[Task, ...] | None:
        """What the model can be asked for, be it by its twin."""
        if facts.tasks is None or name not in self._names:
            return facts.tasks
        return facts.tasks + facts.embedding_tasks


def refusal(model: str, task: Task, tasks: Sequence[Task]) -> str:
    """What to tell a client that asks `model` for `task`, when `tasks` is all that it does."""
    places = [_ENDPOINTS[one] for one in tasks if one in _ENDPOINTS]
    what = f"The model '{model}' is {_kind(tasks)}"
    if not places:
        return f"{what}; it does not {_VERBS[task]}."
    listed = " or ".join(filter(None, [", ".join(places[:-1]), places[-1]]))
    return f"{what}; it does not {_VERBS[task]}. Use {listed}."


def _kind(tasks: Sequence[Task]) -> str:
    if "generate" in tasks:
        return "a generating model"
    if "embed" in tasks:
        return "an embedding model"
    return "a ranking model" if "rank" in tasks else "a classifier"
