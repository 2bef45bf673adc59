"""Conversions: from the configuration to the state of the scheduler, and from there to the status of a model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from llm_api_server.config.models import LimitsConfig, ModelsConfig
from llm_api_server.devices.device import Device
from llm_api_server.engines.base import ModelFacts
from llm_api_server.ipc.model_status import ModelStatus
from llm_api_server.manager.instances.instance import Instance
from llm_api_server.manager.instances.model_registry import ModelSpec
from llm_api_server.manager.scheduling.refusals import ready_in
from llm_api_server.manager.scheduling.state import Model, Policy
from llm_api_server.types import ModelState


def policy_of(
    models: ModelsConfig, limits: LimitsConfig, sleep_memory: int | None, devices: Sequence[Device]
) -> Policy:
    """Return the scheduler's policy. Sleeping weights may take half of RAM unless `sleep_memory` is configured."""
    ram = sum(device.capacity for device in devices if device.kind == "ram")
    return Policy(
        max_loaded=models.max_loaded,
        min_loaded_time=models.min_loaded_time,
        max_wait_time=models.max_wait_time,
        sleep_timeout=models.sleep_timeout,
        deep_sleep_timeout=models.deep_sleep_timeout,
        sleep_bytes=ram // 2 if sleep_memory is None else sleep_memory,
        queue_per_model=limits.queue_per_model,
        queue_per_key=limits.queue_per_key,
        rejects_loading=limits.when_loading == "reject",
    )


def models_of(config: ModelsConfig, specs: Mapping[str, ModelSpec]) -> list[Model]:
    """Return the scheduler's models. A preloaded one stays loaded unless its own entry has a timeout."""
    models = []
    for name, spec in specs.items():
        is_preloaded = name in config.preload
        timeout = 0.0 if is_preloaded else config.unload_timeout
        if spec.entry.unload_timeout is not None:
            timeout = spec.entry.unload_timeout
        models.append(Model(name, timeout, is_preloaded, is_local=spec.engine.name != "remote"))
    return models


def status_of(model: Model, spec: ModelSpec, facts: ModelFacts, instance: Instance | None, now: float) -> ModelStatus:
    """Return the status of a model. `now` is the time of the scheduler's clock."""
    clock_start = time.time() - now
    failure = model.failure if model.state is ModelState.FAILED else None
    status = ModelStatus(
        id=model.name,
        state=model.state,
        engine=spec.engine.name,
        path=spec.path,
        aliases=list(spec.entry.aliases),
        adapters=list(spec.entry.adapters),
        context_length=facts.context_length,
        vision=facts.vision,
        chat_template=facts.chat_template,
        error=failure.reason if failure else None,
        retry_at=clock_start + failure.retry_at if failure else None,
        ready_at=clock_start + now + ready_in(model, now) if model.state is ModelState.STARTING else None,
        queued=len(model.queue),
        preloaded=model.preload,
        pinned=model.is_pinned,
        devices=dict(model.allocation.memory) if model.allocation else {},
    )
    if instance is not None:
        status.instance = instance.id
        status.pid = instance.process.pid or None if instance.process else None
        status.memory_bytes = instance.memory_bytes
        status.loaded_at = instance.ready_at
        status.load_seconds = instance.load_seconds
        status.progress_at = instance.progress_at
        status.phase = instance.phases.current if instance.ready_at is None else None
        status.phases = dict(instance.phases.seconds)
    return status
