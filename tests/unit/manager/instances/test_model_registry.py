"""The configured models: their specs, their facts, and what a reload changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llm_api_server.config.models import Config, ModelConfig
from llm_api_server.engines.base import ModelFacts, ModelProblem
from llm_api_server.manager.instances.model_registry import ModelRegistry, ModelSpecs
from llm_api_server.types import EngineName
from tests.script_engine import ScriptEngine

pytestmark = pytest.mark.anyio

EMBEDDING = "a (embeddings)"


class Inspected(ScriptEngine):
    """Returns facts by the model's path; `missing` and `broken` raise. `on_inspect` is called before."""

    name: EngineName = "vllm"

    def __init__(self, on_inspect: Callable[[], None] = lambda: None) -> None:
        self.on_inspect = on_inspect

    def inspect(self, model: ModelConfig) -> ModelFacts:
        self.on_inspect()
        if model.path == "missing":
            raise ModelProblem("the file does not exist")
        if model.path == "broken":
            raise ValueError("a bug")
        if model.task == "embed":
            return ModelFacts(tasks=("embed",))
        return ModelFacts(context_length=len(model.path), tasks=("generate",), embedding_tasks=("embed",))


def specs(engine: ScriptEngine | None = None, *, max_batch_size: int | None = None, **paths: str) -> ModelSpecs:
    available = {name: {"path": path} for name, path in paths.items()}
    inference = {"max_batch_size": max_batch_size}
    config = Config.model_validate({"models": {"available": available}, "inference": inference})
    adapter = engine or Inspected()
    return ModelSpecs(config, {name: (adapter, entry) for name, entry in config.models.available.items()})


def registry(engine: ScriptEngine | None = None, **paths: str) -> tuple[ModelRegistry, dict[str, ModelFacts]]:
    """Return a registry and the facts that it reported."""
    reported: dict[str, ModelFacts] = {}
    return ModelRegistry(specs(engine, max_batch_size=None, **paths), reported.__setitem__), reported


def test_each_model_has_a_spec_and_so_has_its_embedding_instance() -> None:
    found = specs(a="/m", b="/n")
    assert list(found) == ["a", "b", EMBEDDING, "b (embeddings)"]
    assert found.models == ["a", "b"]
    assert (found[EMBEDDING].served_name, found[EMBEDDING].path) == ("a", "/m")
    assert found[EMBEDDING].fingerprint != found["a"].fingerprint


def test_only_models_whose_engines_would_start_differently_have_changed() -> None:
    before = specs(a="/m", b="/n")
    assert specs(a="/m", b="/n").changed_since(before) == []
    assert specs(a="/m", b="/other").changed_since(before) == ["b", "b (embeddings)"]
    assert specs(a="/m", c="/o").changed_since(before) == ["c", "c (embeddings)"]
    assert len(specs(max_batch_size=3, a="/m", b="/n").changed_since(before)) == 4


async def test_files_are_read_before_a_task_can_be_chosen() -> None:
    models, reported = registry(a="/m")
    assert models.choose("a", "generate") is None
    assert await models.problem_of("a") is None
    assert models.choose("a", "generate") == "a"
    assert models.choose("a", "embed") == EMBEDDING
    assert models.choose("a", "rank") is None
    assert models.all_tasks("a") == ("generate", "embed")
    assert reported == {"a": models.facts_of("a")}


async def test_a_problem_with_the_files_is_returned_and_a_fault_of_the_adapter_is_not() -> None:
    models, reported = registry(a="missing", b="broken")
    assert await models.problem_of("a") == "the file does not exist"
    assert await models.problem_of("b") is None
    assert await models.problem_of("unknown") is None
    assert reported == {}


async def test_facts_of_a_model_that_a_reload_replaced_meanwhile_are_dropped() -> None:
    engine = Inspected()
    models, reported = registry(engine, a="/m")
    after = specs(a="/other")
    engine.on_inspect = lambda: models.replace(after, ["a", EMBEDDING], {})
    assert await models.problem_of("a") is None
    assert models.facts_of("a") == ModelFacts()
    assert reported == {}


async def test_a_reload_keeps_the_facts_of_unchanged_models() -> None:
    models, _ = registry(a="/m", b="/n")
    for name in ("a", "b"):
        await models.problem_of(name)
    after = specs(a="/m", b="/longer", c="missing")
    changed = after.changed_since(models.specs)
    facts = await models.read_facts(after, changed)
    models.replace(after, changed, facts)
    assert [models.facts_of(name).context_length for name in ("a", "b", "c")] == [2, 7, None]
