"""A generating model and its embedding instance in the manager, with scripts as engines in real processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from llm_api_server.config.models import ModelConfig
from llm_api_server.engines.base import LaunchPlan, ModelFacts, Placement
from llm_api_server.ipc.lease_messages import Granted
from llm_api_server.ipc.messages import Models, Refused
from llm_api_server.ipc.model_status import ModelStatus
from llm_api_server.manager.instances.process import process_start_time
from llm_api_server.manager.manager import Manager
from llm_api_server.types import EngineName, ModelState, Task
from tests.script_engine import (
    FAILS,
    SERVES,
    Recorder,
    ScriptEngine,
    World,
    connect,
    pid_of,
    state,
)
from tests.waiting import until

pytestmark = pytest.mark.anyio

EMBEDDING = "a (embeddings)"


class EitherEngine(ScriptEngine):
    """An engine like vLLM, whose processes generate or embed. `rank` in the path makes it a ranking model."""

    name: EngineName = "vllm"

    def inspect(self, model: ModelConfig) -> ModelFacts:
        super().inspect(model)
        if "rank" in model.path:
            return ModelFacts(tasks=("rank", "score"))
        if model.task == "embed":
            return ModelFacts(tasks=("embed",))
        return ModelFacts(tasks=("generate",), embedding_tasks=("embed",))

    def plan(self, name: str, model: ModelConfig, socket: Path, placement: Placement | None = None) -> LaunchPlan:
        plan = super().plan(name, model, socket)
        plan.argv[2] = f"print('serves', {name!r}, 'to', {model.task!r}, flush=True)\n{plan.argv[2]}"
        return plan


class NoEmbeddingEngine(EitherEngine):
    """Fails to start to embed."""

    def plan(self, name: str, model: ModelConfig, socket: Path, placement: Placement | None = None) -> LaunchPlan:
        plan = super().plan(name, model, socket)
        if model.task == "embed":
            plan.argv[2] = FAILS
        return plan


class EmbeddingWorld(World):
    engine = EitherEngine()


async def ask(manager: Manager, client: Recorder, task: Task | None, request: int = 1, model: str = "a") -> Granted:
    manager.acquire(client, request, model, task)
    message = await client.next()
    assert isinstance(message, Granted), message
    return message


def release(manager: Manager, client: Recorder, grant: Granted) -> None:
    manager.return_slots(client, grant.instance.id, grant.slots)


def names(manager: Manager) -> list[str]:
    return [status.id for status in manager.statuses()]


def status_of(manager: Manager, name: str) -> ModelStatus:
    return next(status for status in manager.statuses() if status.id == name)


async def test_chat_and_embeddings_are_two_processes_of_one_name(tmp_path: Path) -> None:
    async with EmbeddingWorld(tmp_path, max_loaded=2).manager(a=SERVES) as manager:
        client = connect(manager)
        chat = await ask(manager, client, "generate", 1)
        embeddings = await ask(manager, client, "embed", 2)
        assert chat.instance.id != embeddings.instance.id
        assert (chat.instance.model, embeddings.instance.model) == ("a", "a")
        assert (chat.instance.tasks, embeddings.instance.tasks) == (("generate",), ("embed",))
        assert names(manager) == ["a", EMBEDDING]
        assert pid_of(manager, "a") != pid_of(manager, EMBEDDING)
        logs = tmp_path / "logs" / "engines"
        assert "serves a to auto" in (logs / "a.log").read_text()
        assert "serves a to embed" in (logs / f"{EMBEDDING}.log").read_text()


async def test_embedding_instance_is_listed_only_while_it_is_not_stopped(tmp_path: Path) -> None:
    async with EmbeddingWorld(tmp_path, max_loaded=2).manager(a=SERVES, b=SERVES) as manager:
        client = connect(manager)
        assert names(manager) == ["a", "b"]
        await ask(manager, client, "embed")
        status = status_of(manager, EMBEDDING)
        assert (status.twin_of, status.tasks, status.state) == ("a", ("embed",), ModelState.READY)
        assert status.aliases == []
        assert status_of(manager, "a").tasks == ("generate", "embed")
        assert status_of(manager, "a").state is ModelState.STOPPED
        assert status_of(manager, "a").twin_of is None


async def test_instances_of_a_model_swap_in_one_slot(tmp_path: Path) -> None:
    async with EmbeddingWorld(tmp_path, max_loaded=1).manager(a=SERVES) as manager:
        client = connect(manager)
        for request, (task, here, gone) in enumerate([("generate", "a", EMBEDDING), ("embed", EMBEDDING, "a")] * 2, 1):
            wanted: Any = task
            grant = await ask(manager, client, wanted, request)
            assert state(manager, here) is ModelState.READY
            assert gone not in names(manager) or state(manager, gone) is ModelState.STOPPED
            release(manager, client, grant)


async def test_chat_in_flight_ends_before_the_embedding_instance_replaces_the_model(tmp_path: Path) -> None:
    async with EmbeddingWorld(tmp_path, max_loaded=1).manager(a=SERVES) as manager:
        client, other = connect(manager), connect(manager)
        chat = await ask(manager, client, "generate")
        manager.acquire(other, 1, "a", "embed")
        await until(lambda: bool(manager._scheduler.models[EMBEDDING].queue))
        assert state(manager, "a") is ModelState.READY
        assert other.messages.empty()
        release(manager, client, chat)
        assert (await other.next()).instance.tasks == ("embed",)


async def test_load_loads_the_model_and_unload_unloads_both_instances(tmp_path: Path) -> None:
    async with EmbeddingWorld(tmp_path, max_loaded=2).manager(a=SERVES) as manager:
        client = connect(manager)
        manager.load(client, 1, "a", wait=True)
        await client.next()
        assert names(manager) == ["a"]
        release(manager, client, await ask(manager, client, "embed", 2))
        pids = [pid_of(manager, "a"), pid_of(manager, EMBEDDING)]
        manager.unload(client, 3, "a", wait=True)
        response = await client.next()
        assert isinstance(response, Models)
        assert response.request == 3
        assert [(one.id, one.state) for one in response.models] == [("a", ModelState.STOPPED)]
        assert [process_start_time(pid) for pid in pids] == [None, None]
        assert client.messages.empty()


@pytest.mark.parametrize("busy", ["generate", "embed"])
async def test_unload_completes_when_both_instances_are_gone(tmp_path: Path, busy: Task) -> None:
    async with EmbeddingWorld(tmp_path, max_loaded=2).manager(a=SERVES) as manager:
        worker, client = connect(manager), connect(manager)
        held = await ask(manager, worker, busy)
        idle = await ask(manager, worker, "embed" if busy == "generate" else "generate", 2)
        release(manager, worker, idle)
        manager.unload(client, 1, "a", wait=True)
        await until(lambda: process_is_gone(manager, idle))
        assert client.messages.empty()
        release(manager, worker, held)
        assert [one.state for one in (await client.next()).models] == [ModelState.STOPPED]


async def test_unload_without_an_embedding_instance_waits_for_the_model(tmp_path: Path) -> None:
    async with EmbeddingWorld(tmp_path, max_loaded=2).manager(a=SERVES) as manager:
        worker, client = connect(manager), connect(manager)
        chat = await ask(manager, worker, "generate")
        manager.unload(client, 1, "a", wait=True)
        assert client.messages.empty()
        release(manager, worker, chat)
        assert [one.state for one in (await client.next()).models] == [ModelState.STOPPED]


async def test_load_loads_the_model_beside_its_embedding_instance(tmp_path: Path) -> None:
    async with EmbeddingWorld(tmp_path, max_loaded=2).manager(a=SERVES) as manager:
        client = connect(manager)
        await ask(manager, client, "embed")
        manager.load(client, 2, "a", wait=True)
        assert [one.state for one in (await client.next()).models] == [ModelState.READY] * 2


def process_is_gone(manager: Manager, grant: Granted) -> bool:
    return grant.instance.id not in {status.instance for status in manager.statuses()}


async def test_unload_without_waiting_gets_one_response(tmp_path: Path) -> None:
    async with EmbeddingWorld(tmp_path, max_loaded=2).manager(a=SERVES) as manager:
        client = connect(manager)
        release(manager, client, await ask(manager, client, "embed"))
        manager.unload(client, 2, "a", wait=False)
        assert (await client.next()).request == 2
        await until(lambda: names(manager) == ["a"])
        assert client.messages.empty()


async def test_idle_embedding_instance_of_a_preloaded_model_is_unloaded(tmp_path: Path) -> None:
    options = {"max_loaded": 2, "preload": ["a"], "unload_timeout": 0.2}
    async with EmbeddingWorld(tmp_path, **options).manager(a=SERVES) as manager:
        client = connect(manager)
        await until(lambda: state(manager, "a") is ModelState.READY)
        release(manager, client, await ask(manager, client, "embed"))
        assert not status_of(manager, EMBEDDING).preloaded
        await until(lambda: names(manager) == ["a"])
        assert state(manager, "a") is ModelState.READY


async def test_preload_loads_no_embedding_instance(tmp_path: Path) -> None:
    async with EmbeddingWorld(tmp_path, max_loaded=2, preload=["a"]).manager(a=SERVES) as manager:
        await until(lambda: state(manager, "a") is ModelState.READY)
        assert names(manager) == ["a"]


async def test_next_manager_adopts_both_instances(tmp_path: Path) -> None:
    world = EmbeddingWorld(tmp_path, max_loaded=2)
    async with world.manager(a=SERVES) as manager:
        client = connect(manager)
        before = [await ask(manager, client, "generate"), await ask(manager, client, "embed", 2)]
        await world.abandon(manager)
    async with world.manager(a=SERVES) as successor:
        assert names(successor) == ["a", EMBEDDING]
        again = connect(successor)
        after = [await ask(successor, again, "generate"), await ask(successor, again, "embed", 2)]
        assert [one.instance for one in after] == [one.instance for one in before]


@pytest.mark.parametrize(
    ("path", "task", "advice"),
    [
        (SERVES + " # rank", "generate", "is a ranking model; it does not generate text. Use /v1/rerank or /v1/score."),
        (SERVES + " # rank", "embed", "is a ranking model; it does not embed."),
        (SERVES, "classify", "is a generating model; it does not classify."),
    ],
)
async def test_unsupported_task_is_refused_and_evicts_nothing(
    tmp_path: Path, path: str, task: Task, advice: str
) -> None:
    async with EmbeddingWorld(tmp_path, max_loaded=1).manager(a=path, b=SERVES) as manager:
        client = connect(manager)
        release(manager, client, await ask(manager, client, "generate", model="b"))
        manager.acquire(client, 2, "a", task)
        refusal = await client.next()
        assert isinstance(refusal, Refused)
        assert refusal.code == "not_supported"
        assert advice in refusal.message
        assert state(manager, "b") is ModelState.READY
        assert state(manager, "a") is ModelState.STOPPED


async def test_unsupported_task_is_refused_while_the_model_is_loaded(tmp_path: Path) -> None:
    async with EmbeddingWorld(tmp_path).manager(a=SERVES + " # rank") as manager:
        client = connect(manager)
        await ask(manager, client, "rank")
        manager.acquire(client, 2, "a", "generate")
        assert (await client.next()).code == "not_supported"


async def test_request_without_a_task_uses_either_instance(tmp_path: Path) -> None:
    async with EmbeddingWorld(tmp_path, max_loaded=1).manager(a=SERVES) as manager:
        client = connect(manager)
        embeddings = await ask(manager, client, "embed")
        assert (await ask(manager, client, None, 2)).instance.id == embeddings.instance.id
    async with EmbeddingWorld(tmp_path, max_loaded=1).manager(a=SERVES) as manager:
        assert (await ask(manager, connect(manager), None)).instance.tasks == ("generate",)


async def test_failed_embedding_instance_leaves_its_model_alone(tmp_path: Path) -> None:
    world = EmbeddingWorld(tmp_path, max_loaded=2)
    world.engine = NoEmbeddingEngine()
    async with world.manager(a=SERVES) as manager:
        client = connect(manager)
        chat = await ask(manager, client, "generate")
        manager.acquire(client, 2, "a", "embed")
        refusal = await client.next()
        assert (refusal.code, f"model '{EMBEDDING}' failed to load" in refusal.message) == (
            "model_load_failed",
            True,
        )
        assert status_of(manager, EMBEDDING).error is not None
        assert state(manager, "a") is ModelState.READY
        release(manager, client, chat)


async def test_killed_embedding_instance_is_replaced(tmp_path: Path) -> None:
    async with EmbeddingWorld(tmp_path, max_loaded=2).manager(a=SERVES) as manager:
        client = connect(manager)
        first = await ask(manager, client, "embed")
        os.kill(pid_of(manager, EMBEDDING), signal.SIGKILL)
        await until(lambda: process_is_gone(manager, first))
        assert (await ask(manager, client, "embed", 2)).instance.id != first.instance.id


async def test_cancelled_request_leaves_the_queue_of_the_embedding_instance(tmp_path: Path) -> None:
    async with EmbeddingWorld(tmp_path, max_loaded=1).manager(a=SERVES) as manager:
        worker, client = connect(manager), connect(manager)
        chat = await ask(manager, worker, "generate")
        manager.acquire(client, 1, "a", "embed")
        await until(lambda: bool(manager._scheduler.models[EMBEDDING].queue))
        manager.cancel(client, 1)
        assert not manager._scheduler.models[EMBEDDING].queue
        release(manager, worker, chat)
        assert state(manager, "a") is ModelState.READY
