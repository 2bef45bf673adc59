"""The configured models and their embedding instances, by the scheduler's names, and the facts from their files.

Files are read in threads: once at the start, and again before each load. On the manager's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from loguru import logger

from llm_api_server.config.models import Config, ModelConfig
from llm_api_server.engines.base import Engine, ModelFacts, ModelProblem
from llm_api_server.manager.instances.adoption_records import fingerprint
from llm_api_server.manager.instances.embedding_instances import EmbeddingInstances, Entries
from llm_api_server.types import Task

_UNKNOWN = ModelFacts()


@dataclass(frozen=True)
class ModelSpec:
    """Configuration that an instance is started from.

    `entry` has its paths resolved; `path` is the path as configured. `served_name` is the model's name to clients.
    """

    engine: Engine
    entry: ModelConfig
    served_name: str
    path: str
    fingerprint: str


class ModelSpecs(Mapping[str, ModelSpec]):
    """The specs of one configuration: each model in its order, followed by the embedding instances. Immutable."""

    def __init__(self, config: Config, engines: Entries) -> None:
        """`engines` maps each configured model to its adapter and its entry with the paths resolved."""
        self.embedding = EmbeddingInstances(engines)
        self.models = list(engines)
        self._specs: dict[str, ModelSpec] = {}
        for name, (engine, entry) in {**engines, **self.embedding.entries}.items():
            model = self.embedding.model_of(name) or name
            started_from = fingerprint(entry, config.inference, config.engines)
            self._specs[name] = ModelSpec(engine, entry, model, config.models.available[model].path, started_from)

    def __getitem__(self, name: str) -> ModelSpec:
        return self._specs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def changed_since(self, before: ModelSpecs) -> list[str]:
        """Return the names whose engines would be started differently than by `before`."""
        return [
            name for name, spec in self.items() if name not in before or before[name].fingerprint != spec.fingerprint
        ]


class ModelRegistry:
    """Current specs and facts. `on_facts` is called with the facts of a model whenever its files were read."""

    def __init__(self, specs: ModelSpecs, on_facts: Callable[[str, ModelFacts], None]) -> None:
        self.specs = specs
        self._on_facts = on_facts
        self._facts: dict[str, ModelFacts] = {}

    def facts_of(self, name: str) -> ModelFacts:
        return self._facts.get(name, _UNKNOWN)

    def set_facts(self, name: str, facts: ModelFacts) -> None:
        self._facts[name] = facts

    def embedding_of(self, model: str) -> str | None:
        """Return the name of the model's embedding instance, or None."""
        return self.specs.embedding.name_of(model)

    def model_of(self, name: str) -> str | None:
        """Return the model of an embedding instance, or None if `name` is not one."""
        return self.specs.embedding.model_of(name)

    def choose(self, model: str, task: Task) -> str | None:
        """Return the name to schedule for `task`; None if unknown yet, or if nothing supports it."""
        facts = self._facts.get(model)
        return None if facts is None else self.specs.embedding.choose(model, task, facts)

    def all_tasks(self, name: str) -> tuple[Task, ...] | None:
        return self.specs.embedding.all_tasks(name, self.facts_of(name))

    async def problem_of(self, name: str) -> str | None:
        """Read the model's files now and return what prevents its load; None also if it is no longer configured."""
        spec = self.specs.get(name)
        if spec is None:
            return None
        try:
            facts = await asyncio.to_thread(spec.engine.inspect, spec.entry)
        except ModelProblem as problem:
            return str(problem)
        except Exception:  # noqa: BLE001 - a load will run into it again and report it
            logger.exception("the files of model {} could not be inspected", name)
            self._facts.setdefault(name, ModelFacts())
            return None
        if self.specs.get(name) is spec:  # else a reload replaced it meanwhile
            self._facts[name] = facts
            self._on_facts(name, facts)
        return None

    async def read_facts(self, specs: ModelSpecs, changed: list[str]) -> dict[str, ModelFacts]:
        """Return the facts of specs that are about to replace the current ones; unreadable models are left out."""
        facts = {}
        for name in changed:
            with contextlib.suppress(Exception):  # reported when the model is inspected as a configured one
                facts[name] = await asyncio.to_thread(specs[name].engine.inspect, specs[name].entry)
        return facts

    def replace(self, specs: ModelSpecs, changed: list[str], facts: Mapping[str, ModelFacts]) -> None:
        """Follow another configuration; `facts` are those of the `changed` models."""
        kept = {name: known for name, known in self._facts.items() if name in specs and name not in changed}
        self.specs, self._facts = specs, {**kept, **facts}
