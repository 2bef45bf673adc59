"""What the models' files tell, read in threads: before any load for display, and again before each. For the manager."""

from __future__ import annotations

import asyncio

from loguru import logger

from llm_api_server.engines.base import ModelFacts, ModelProblem
from llm_api_server.manager.scheduler import Scheduler
from llm_api_server.manager.tasks import Entries


class Inspection:
    """`facts` has what is known so far, by the scheduler's names; the scheduler is told as well."""

    def __init__(self, entries: Entries, scheduler: Scheduler) -> None:
        self._entries = entries
        self._scheduler = scheduler
        self.facts: dict[str, ModelFacts] = {}

    def of(self, model: str) -> ModelFacts:
        return self.facts.get(model, ModelFacts())

    async def problem_of(self, model: str) -> str | None:
        """What its files tell against loading it, read now."""
        engine, entry = self._entries[model]
        try:
            facts = self.facts[model] = await asyncio.to_thread(engine.inspect, entry)
            self._scheduler.know(model, facts)
        except ModelProblem as problem:
            return str(problem)
        except Exception:  # noqa: BLE001 - a load will run into it again and report it
            logger.exception("the files of model {} could not be inspected", model)
            self.facts.setdefault(model, ModelFacts())
        return None
