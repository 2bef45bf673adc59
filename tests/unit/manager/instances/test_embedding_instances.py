"""Embedding instances: names, entries, tasks and refusals, without any process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from llm_api_server.config.models import ModelConfig
from llm_api_server.devices.host import Host
from llm_api_server.engines.base import Engine, ModelFacts
from llm_api_server.engines.remote import RemoteEngine
from llm_api_server.engines.settings import EngineSettings
from llm_api_server.engines.vllm.adapter import VllmEngine
from llm_api_server.manager.instances.embedding_instances import EmbeddingInstances, refusal
from llm_api_server.types import Task

CHAT = ModelFacts(tasks=("generate",), embedding_tasks=("embed", "rank"))
EMBEDDING = ModelFacts(tasks=("embed", "rank"))


def instances_of(engine: Engine | None = None, **options: Any) -> EmbeddingInstances:
    """Return the embedding instances of one model, `m`."""
    vllm = VllmEngine(EngineSettings(), Host(1, 1, has_nvidia=False))
    return EmbeddingInstances({"m": (engine or vllm, ModelConfig(path="/m", **options))})


@pytest.mark.parametrize(
    ("facts", "task", "chosen"),
    [
        (CHAT, "generate", "m"),
        (CHAT, "embed", "m (embeddings)"),
        (CHAT, "rank", "m (embeddings)"),
        (CHAT, "classify", None),
        (EMBEDDING, "embed", "m"),
        (EMBEDDING, "generate", None),
        (ModelFacts(), "classify", "m"),
    ],
)
def test_a_task_chooses_the_model_or_its_embedding_instance(facts: ModelFacts, task: Task, chosen: str | None) -> None:
    assert instances_of().choose("m", task, facts) == chosen


def test_an_embedding_instance_has_the_models_entry_without_its_aliases() -> None:
    made = instances_of(aliases=["a"], max_tokens=512, unload_timeout=9)
    _, entry = made.entries["m (embeddings)"]
    assert (entry.task, entry.aliases, entry.max_tokens, entry.unload_timeout) == ("embed", [], 512, 9)
    assert (made.name_of("m"), made.model_of("m (embeddings)")) == ("m (embeddings)", "m")


@pytest.mark.parametrize("options", [{"task": "generate"}, {"task": "embed"}, {"engine": RemoteEngine()}])
def test_a_model_with_a_configured_task_or_a_remote_one_has_no_embedding_instance(options: dict[str, Any]) -> None:
    made = instances_of(**options)
    assert made.entries == {}
    assert made.choose("m", "embed", CHAT) is None
    assert made.all_tasks("m", CHAT) == ("generate",)


def test_an_embedding_instance_never_takes_the_name_of_a_configured_model() -> None:
    engine, entry = instances_of().entries["m (embeddings)"]
    both = {"m": (engine, ModelConfig(path="/m")), "m (embeddings)": (engine, entry)}
    assert EmbeddingInstances(both).name_of("m") is None


def test_all_tasks_count_the_instances_of() -> None:
    made = instances_of()
    assert made.all_tasks("m", CHAT) == ("generate", "embed", "rank")
    assert made.all_tasks("m (embeddings)", EMBEDDING) == ("embed", "rank")
    assert made.all_tasks("m", ModelFacts()) is None


@pytest.mark.parametrize(
    ("task", "tasks", "message"),
    [
        (
            "generate",
            ("embed", "rank", "score", "pool"),
            (
                "The model 'm' is an embedding model; it does not generate text. "
                "Use /v1/embeddings, /v1/rerank or /v1/score."
            ),
        ),
        ("embed", ("rank",), "The model 'm' is a ranking model; it does not embed. Use /v1/rerank."),
        (
            "rank",
            ("generate", "embed"),
            (
                "The model 'm' is a generating model; it does not rank documents. "
                "Use /v1/chat/completions or /v1/embeddings."
            ),
        ),
        ("score", ("pool",), "The model 'm' is a classifier; it does not score pairs of texts."),
    ],
)
def test_a_refusal_names_the_endpoints_to_use(task: Task, tasks: Sequence[Task], message: str) -> None:
    assert refusal("m", task, tasks) == message
