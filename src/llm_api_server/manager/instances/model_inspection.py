"""What the models' files tell, read in threads: before any load for display, and again before each. For the manager."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping

from loguru import logger

from llm_api_server.engines.base import ModelFacts, ModelProblem
from llm_api_server.manager.instances.embedding_instances import Entries
from llm_api_server.manager.scheduling.scheduler import Scheduler

_NOTHING = ModelFacts()


class ModelInspection:
    """`facts` has what is known so far, by the scheduler's names; the scheduler is told as well."""

    def __init__(self, entries: Entries, scheduler: Scheduler) -> None:
        self._entries = entries
        self._scheduler = scheduler
        self.facts: dict[str, ModelFacts] = {}

    def of(self, model: str) -> ModelFacts:
        return self.facts.get(model, _NOTHING)

    async def read(self, entries: Entries) -> dict[str, ModelFacts]:
        """What the files of these entries tell, which need not be ours yet; of unusable ones nothing."""
        facts = {}
        for name, (engine, entry) in entries.items():
            with contextlib.suppress(Exception):  # told where the model is looked at as one of ours
                facts[name] = await asyncio.to_thread(engine.inspect, entry)
        return facts

    def follow(self, changed: Iterable[str], facts: Mapping[str, ModelFacts]) -> None:
        """Our entries are others now; `facts` are of those that are `changed`."""
        kept = {name: known for name, known in self.facts.items() if name in self._entries and name not in {*changed}}
        self.facts = {**kept, **facts}

    async def problem_of(self, model: str) -> str | None:
        """What its files tell against loading it, read now. Nothing of one that is not configured any more."""
        engine, entry = self._entries.get(model, (None, None))
        if engine is None or entry is None:
            return None
        try:
            facts = await asyncio.to_thread(engine.inspect, entry)
            if self._entries.get(model, (None, None))[1] is entry:  # else it is another by now
                self.facts[model] = facts
                self._scheduler.update_facts(model, facts)
        except ModelProblem as problem:
            return str(problem)
        except Exception:  # noqa: BLE001 - a load will run into it again and report it
            logger.exception("the files of model {} could not be inspected", model)
            self.facts.setdefault(model, ModelFacts())
        return None
