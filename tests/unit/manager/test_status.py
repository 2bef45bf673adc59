"""From the configuration to the scheduler, and from the scheduler to the status of a model."""

from __future__ import annotations

from typing import Any

from llm_api_server.config.models import Config
from llm_api_server.engines.base import ModelFacts
from llm_api_server.engines.remote import RemoteEngine
from llm_api_server.manager.instances.model_registry import ModelSpecs
from llm_api_server.manager.scheduling.scheduler import Scheduler
from llm_api_server.manager.status import models_of, policy_of, status_of
from llm_api_server.types import ModelState
from tests.machine import GIB, gpus, ram
from tests.script_engine import ScriptEngine


def configured(**models: Any) -> tuple[Config, ModelSpecs]:
    available = {
        "plain": {"path": "/plain", "aliases": ["p"]},
        "kept": {"path": "/kept"},
        "timed": {"path": "/timed", "unload_timeout": 7},
        "remote": {"path": "https://example.org"},
    }
    config = Config.model_validate({"models": {"available": available, "preload": ["kept", "timed"], **models}})
    engines = {
        name: (RemoteEngine() if name == "remote" else ScriptEngine(), entry)
        for name, entry in config.models.available.items()
    }
    return config, ModelSpecs(config, engines)


def test_preloaded_models_stay_loaded_unless_their_entries_have_a_timeout() -> None:
    config, specs = configured(unload_timeout=100)
    models = {model.name: model for model in models_of(config.models, specs)}
    assert {name: model.unload_timeout for name, model in models.items()} == {
        "plain": 100, "kept": 0, "timed": 7, "remote": 100,
    }  # fmt: skip
    assert [name for name, model in models.items() if model.preload] == ["kept", "timed"]
    assert [name for name, model in models.items() if not model.is_local] == ["remote"]


def test_sleeping_weights_may_take_half_of_ram_unless_configured() -> None:
    config, _ = configured()
    devices = [*gpus(24), ram(64)]
    assert policy_of(config.models, config.limits, None, devices).sleep_bytes == 32 * GIB
    assert policy_of(config.models, config.limits, GIB, devices).sleep_bytes == GIB


def test_the_status_has_the_path_as_configured_and_times_of_the_clock() -> None:
    config, specs = configured()
    policy = policy_of(config.models, config.limits, None, [])
    scheduler = Scheduler(policy, models_of(config.models, specs), lambda: "i1")
    model, facts = scheduler.models["plain"], ModelFacts(context_length=128)
    status = status_of(model, specs["plain"], facts, None, now=50)
    assert (status.id, status.path, status.aliases, status.context_length) == ("plain", "/plain", ["p"], 128)
    assert (status.state, status.error, status.ready_at) == (ModelState.STOPPED, None, None)
    scheduler.load(1, "plain", 50)
    loading = status_of(model, specs["plain"], facts, None, now=52)
    assert loading.state is ModelState.STARTING
    scheduler.on_exited("i1", "out of memory", 53)
    failed = status_of(model, specs["plain"], facts, None, now=53)
    assert (failed.state, failed.error) == (ModelState.FAILED, "out of memory")
    assert loading.ready_at is not None
    assert failed.retry_at is not None
    assert failed.retry_at < loading.ready_at, "2 s of back-off against 13 s of a usual load that remain"
