"""From the configuration to the scheduler's books, and from the books to what the manager tells of its models."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from llm_api_server.config.models import Config, ModelConfig
from llm_api_server.devices.device import Device
from llm_api_server.engines.base import Engine, ModelFacts
from llm_api_server.ipc.model_status import ModelStatus
from llm_api_server.manager.instances.instance import Instance
from llm_api_server.manager.scheduling.refusals import ready_in
from llm_api_server.manager.scheduling.state import Model, Policy
from llm_api_server.types import EngineName, ModelState


def policy_of(config: Config, devices: Sequence[Device]) -> Policy:
    """Half of RAM for sleeping weights, unless configured."""
    ram = sum(device.capacity for device in devices if device.kind == "ram")
    sleep_memory = config.devices.sleep_memory
    return Policy(
        max_loaded=config.models.max_loaded,
        min_loaded_time=config.models.min_loaded_time,
        max_wait_time=config.models.max_wait_time,
        sleep_timeout=config.models.sleep_timeout,
        deep_sleep_timeout=config.models.deep_sleep_timeout,
        sleep_bytes=ram // 2 if sleep_memory is None else sleep_memory,
        queue_per_model=config.limits.queue_per_model,
        queue_per_key=config.limits.queue_per_key,
        rejects_loading=config.limits.when_loading == "reject",
    )


def models_of(config: Config, engines: Mapping[str, tuple[Engine, ModelConfig]]) -> list[Model]:
    """What the scheduler must know of each model. A preloaded one stays unless its own entry says otherwise."""
    models = []
    for name, (engine, entry) in engines.items():
        is_preloaded = name in config.models.preload
        timeout = 0.0 if is_preloaded else config.models.unload_timeout
        if entry.unload_timeout is not None:
            timeout = entry.unload_timeout
        models.append(Model(name, timeout, is_preloaded, is_local=engine.name != "remote"))
    return models


def status_of(
    model: Model, entry: ModelConfig, engine: EngineName, facts: ModelFacts, running: Instance | None, now: float
) -> ModelStatus:
    """`now` is that of the books' clock."""
    epoch = time.time() - now
    failed = model.failure if model.state is ModelState.FAILED else None
    status = ModelStatus(
        id=model.name,
        state=model.state,
        engine=engine,
        path=entry.path,
        aliases=list(entry.aliases),
        adapters=list(entry.adapters),
        context_length=facts.context_length,
        vision=facts.vision,
        chat_template=facts.chat_template,
        error=failed.reason if failed else None,
        retry_at=epoch + failed.retry_at if failed else None,
        ready_at=epoch + now + ready_in(model, now) if model.state is ModelState.STARTING else None,
        queued=len(model.queue),
        preloaded=model.preload,
        pinned=model.is_pinned,
        devices=dict(model.allocation.memory) if model.allocation else {},
    )
    if running is not None:
        status.instance = running.id
        status.pid = running.process.pid or None if running.process else None
        status.memory_bytes = running.memory_bytes
        status.loaded_at = running.ready_at
        status.load_seconds = running.load_seconds
        status.progress_at = running.progress_at
        status.phase = running.phases.current if running.ready_at is None else None
        status.phases = dict(running.phases.seconds)
    return status
