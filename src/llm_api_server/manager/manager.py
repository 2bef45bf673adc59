"""Carries out the decisions of the scheduler: runs instances, and responds to workers and commands.

One event loop, the single writer of all state. Every event goes to the scheduler, and its decisions are carried out at
once, in order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from loguru import logger

from llm_api_server.config.models import Config, ModelConfig
from llm_api_server.devices.inventory import Inventory
from llm_api_server.engines.base import Engine
from llm_api_server.event_loop.background import TaskSet
from llm_api_server.ipc.lease_messages import NO_CLAIM, Claim, EndedRequest, Granted, InstanceInfo, RevokeSlots
from llm_api_server.ipc.messages import Explained, Hello, Models, Refused
from llm_api_server.ipc.model_status import DeviceStatus, ModelStatus
from llm_api_server.ipc.run_dir import RunDir
from llm_api_server.manager.instances.adoption_records import AdoptionRecord, AdoptionRecords
from llm_api_server.manager.instances.device_watch import RELEASE_TIMEOUT, DeviceWatch
from llm_api_server.manager.instances.embedding_instances import refusal
from llm_api_server.manager.instances.instance import Instance, InstanceContext
from llm_api_server.manager.instances.instance_runner import InstanceRunner
from llm_api_server.manager.instances.model_registry import ModelRegistry, ModelSpecs
from llm_api_server.manager.instances.process import Launcher
from llm_api_server.manager.instances.running_instances import RunningInstances
from llm_api_server.manager.instances.stall_detector import StallDetector
from llm_api_server.manager.pending_requests import PendingRequest, PendingRequests
from llm_api_server.manager.scheduling.decisions import Decision, Done, Grant, Refuse, Revoke, Sleep, Start, Stop, Wake
from llm_api_server.manager.scheduling.explain import device_statuses, explain
from llm_api_server.manager.scheduling.refusals import model_removed
from llm_api_server.manager.scheduling.scheduler import Scheduler
from llm_api_server.manager.status import models_of, policy_of
from llm_api_server.manager.status_publisher import StatusPublisher
from llm_api_server.manager.telemetry.load_telemetry import LoadTelemetry
from llm_api_server.manager.worker_session import WorkerSession, WorkerSessions
from llm_api_server.types import ModelState, Task

#: Request number of a command that got its reply when it began.
_NO_REPLY = 0


class _Action(Protocol):
    """A method of the scheduler that takes a waiter."""

    def __call__(self, waiter: int, name: str, now: float, /) -> list[Decision]: ...


@dataclass(frozen=True)
class _Submission:
    """A request, or a command to load. `choose` returns the name to schedule, or None if none is known."""

    request: int
    model: str
    action: _Action
    choose: Callable[[], str | None]
    task: Task | None = None
    wait: bool = True


class Manager:
    """The instances of all models, and the requests that wait for them."""

    def __init__(
        self,
        config: Config,
        engines: Mapping[str, tuple[Engine, ModelConfig]],
        *,
        launcher: Launcher,
        run_dir: RunDir,
        log_dir: Path,
        inventory: Inventory,
        telemetry: LoadTelemetry,
        sessions: WorkerSessions,
        release_timeout: float = RELEASE_TIMEOUT,
    ) -> None:
        """`engines` maps each configured model to its adapter and its entry with the paths resolved."""
        specs = ModelSpecs(config, engines)
        self._preloads = config.models.preload
        self._launcher = launcher
        self._telemetry = telemetry
        policy = policy_of(config.models, config.limits, config.devices.sleep_memory, inventory.devices)
        models = models_of(config.models, specs)
        self._scheduler = Scheduler(policy, models, lambda: uuid4().hex[:12], inventory.devices)
        self._registry = ModelRegistry(specs, self._scheduler.update_facts)
        self._instances = RunningInstances()
        self._devices = DeviceWatch(
            inventory, self._scheduler, self._instances.memory_of, release_timeout=release_timeout
        )
        self._records = AdoptionRecords(run_dir.engines)
        self._context = InstanceContext(launcher, self._records, run_dir.engines, log_dir, config.models.load_timeout)
        self._runner = InstanceRunner(self._context, self._instances, self._devices, events=self)
        self._sessions = sessions
        self._publisher = StatusPublisher(self._sessions, self._registry, self._scheduler, self._instances)
        self._stalls = StallDetector(config.limits.stall_timeout, self._instances, self._sessions.has_readers)
        self._pending = PendingRequests(lambda: self._scheduler.positions(_now()))
        self._background = TaskSet()
        self._tasks = TaskSet()
        self._timer: asyncio.TimerHandle | None = None

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Adopt or end the instances of an earlier manager, and begin to preload."""
        for record in self._records.read_all():
            await self._adopt_or_end(record)
        self._background.start(self._inspect_all())
        self._background.start(self._stalls.run())

    async def close(self) -> None:
        """Refuse all waiters and stop all instances; return once they are gone."""
        await self._background.cancel()
        self._carry_out(self._scheduler.shut_down())
        await self._runner.wait_all_ended()
        self._close_timers()

    async def leave(self) -> None:
        """End without stopping the instances, which the next manager adopts; those that load start again there."""
        await self._background.cancel()
        await self._tasks.cancel()
        await self._runner.leave()
        self._close_timers()

    def _close_timers(self) -> None:
        self._pending.close()
        if self._timer is not None:
            self._timer.cancel()

    async def _adopt_or_end(self, record: AdoptionRecord) -> None:
        process = self._launcher.adopt(record)
        if process is None:
            self._records.remove(record.info.id)
        elif self._is_adoptable(record):
            placement, is_pinned = record.placement, record.is_pinned
            self._scheduler.adopt(record.info.id, record.model, _now(), placement, is_pinned=is_pinned)
            self._runner.adopt(record, self._registry.specs[record.model], process)
        else:
            await self._runner.end_left_behind(record, process)

    def _is_adoptable(self, record: AdoptionRecord) -> bool:
        """Return whether it is ready and awake, its configuration and devices remain, and its model has no instance."""
        spec = self._registry.specs.get(record.model)
        if spec is None or record.load_seconds is None or record.may_sleep:
            return False
        has_devices = {device.device for device in record.placement.devices} <= self._scheduler.device_ids
        return record.fingerprint == spec.fingerprint and has_devices and not self._is_allocated(record.model)

    async def _inspect_all(self) -> None:
        """Read every model's files, so that `/v1/models` shows their facts before any load; preloads come first."""
        await self._inspect(self._preloads)
        await self._devices.observe()
        self._carry_out(self._scheduler.preload(_now()))
        await self._inspect([name for name in self._registry.specs.models if name not in self._preloads])

    async def _inspect(self, models: Sequence[str]) -> None:
        for name in models:
            if (problem := await self._registry.problem_of(name)) is not None:
                logger.warning("model {} cannot be loaded: {}", name, problem)
                self._scheduler.mark_failed(name, problem, _now())
        self._publisher.publish_changes()

    async def configure(self, config: Config, engines: Mapping[str, tuple[Engine, ModelConfig]]) -> None:
        """Follow another configuration. Models whose engines would be started as before keep their instances."""
        specs = ModelSpecs(config, engines)
        changed = specs.changed_since(self._registry.specs)
        facts = await self._registry.read_facts(specs, changed)
        self._registry.replace(specs, changed, facts)
        self._preloads = config.models.preload
        self._context.load_timeout = config.models.load_timeout
        self._stalls.configure(config.limits.stall_timeout)
        self._publisher.reset()
        devices = self._scheduler.devices
        models = models_of(config.models, specs)
        for model in models:
            model.update_facts(self._registry.facts_of(model.name), counts_memory=bool(devices))
        policy = policy_of(config.models, config.limits, config.devices.sleep_memory, devices)
        self._carry_out(self._scheduler.configure(policy, models, changed, _now()))
        await self._inspect(changed)

    # ── state ────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def workers(self) -> list[int]:
        """Process ids of the connected workers."""
        return [session.pid for session in self._sessions.workers]

    def statuses(self) -> list[ModelStatus]:
        return self._publisher.statuses()

    def device_statuses(self) -> list[DeviceStatus]:
        return device_statuses(self._scheduler)

    def ready_processes(self) -> list[InstanceInfo]:
        return self._instances.ready_processes()

    async def measure_memory(self) -> None:
        """Update the memory of all instances."""
        await self._instances.measure()

    # ── workers and commands ─────────────────────────────────────────────────────────────────────────────────────

    def connect(self, session: WorkerSession) -> None:
        self._sessions.add(session)

    def register(self, session: WorkerSession, hello: Hello) -> None:
        """Register a worker. Each of its requests in flight holds a slot."""
        session.register(hello)
        for instance, slots in hello.in_flight.items():
            if self._instances.get(instance) is not None:
                session.restore(instance, slots)
                self._scheduler.restore_slots(instance, slots)
                if self._scheduler.is_revoked(instance):
                    session.send(RevokeSlots(instance))
        session.send(Models(self.statuses()))

    def disconnect(self, session: WorkerSession) -> None:
        """Cancel the session's waiting requests and take back its slots."""
        self._sessions.remove(session)
        for waiter, pending in self._pending.pop_all_of(session):
            self._carry_out(self._scheduler.cancel(waiter, pending.model, _now()))
        for instance, waiter in session.end_all_prefills():
            self._carry_out(self._scheduler.on_prefill_done(instance, waiter, _now()))
        for instance, slots, ended in session.take_all_back():
            self._carry_out(self._scheduler.return_slots(instance, slots, _now(), ended))

    def acquire(
        self, session: WorkerSession, request: int, model: str, task: Task | None = None, claim: Claim = NO_CLAIM
    ) -> None:
        """Request a slot on an instance of `model` that supports `task`."""
        self._publisher.mark_used(model)
        action = partial(self._scheduler.acquire, claim=claim)
        self._submit(session, _Submission(request, model, action, partial(self._choose, model, task), task))

    def cancel(self, session: WorkerSession, request: int) -> None:
        for waiter, pending in self._pending.pop_all_of(session, request):
            self._carry_out(self._scheduler.cancel(waiter, pending.model, _now()))

    def on_prefill_done(self, session: WorkerSession, request: int) -> None:
        """Admit another prompt. Unknown requests are ignored: an earlier manager granted them."""
        if (prefill := session.end_prefill(request)) is not None:
            self._carry_out(self._scheduler.on_prefill_done(*prefill, _now()))

    def return_slots(
        self, session: WorkerSession, instance_id: str, slots: int, ended: Sequence[EndedRequest] = ()
    ) -> None:
        slots = session.take_back(instance_id, slots, ended)
        if (instance := self._instances.get(instance_id)) is not None:
            self._publisher.mark_used(instance.model)
        self._carry_out(self._scheduler.return_slots(instance_id, slots, _now(), ended))

    def report_in_flight(self, session: WorkerSession, in_flight: dict[str, int], blocked: dict[str, int]) -> None:
        session.report(in_flight, blocked)
        self._publisher.publish_changes()

    def load(self, session: WorkerSession, request: int, model: str, *, wait: bool) -> None:
        self._submit(session, _Submission(request, model, self._scheduler.load, lambda: model, wait=wait))

    def unload(self, session: WorkerSession, request: int, model: str, *, wait: bool) -> None:
        """Unload the model and its embedding instance; the reply follows once both are gone."""
        if model not in self._registry.specs:
            session.send(_not_configured(request, model))
            return
        embedding = self._registry.embedding_of(model)
        if embedding is not None:
            waiter = self._pending.new_id()
            if wait and self._is_allocated(embedding):
                self._pending.put(waiter, PendingRequest(session, request, embedding))
            self._carry_out(self._scheduler.unload(waiter, embedding, _now()))
        waiter = self._pending.new_id()
        self._pending.put(waiter, PendingRequest(session, request, model))
        self._begin(waiter, model, self._scheduler.unload, wait=wait)

    def pin(self, session: WorkerSession, request: int, model: str, *, is_pinned: bool) -> None:
        """Pin or unpin the model and its embedding instance, of which one must be loaded to be pinned."""
        embedding = self._registry.embedding_of(model)
        names = [name for name in (model, embedding) if name is not None and name in self._registry.specs]
        if is_pinned and not any(self._is_allocated(name) for name in names):
            message = f"model {model!r} is not loaded: load it first, then pin it"
            not_loaded = Refused(request, "model_not_loaded", message)
            session.send(not_loaded if names else _not_configured(request, model))
            return
        action = self._scheduler.pin if is_pinned else self._scheduler.unpin
        self._carry_out([decision for name in names for decision in action(name, _now())])
        for instance in self._instances:
            if instance.model in names:
                instance.pin(is_pinned=is_pinned)
        session.send(Models(self.statuses(), request))

    async def list_models(self, session: WorkerSession, request: int) -> None:
        """Send the status of all models, with the memory and the devices measured now."""
        await self.measure_memory()
        await self._devices.observe()
        session.send(Models(self.statuses(), request))

    async def explain(self, session: WorkerSession, request: int, model: str) -> None:
        """Send whether the model fits, with its files read and the devices measured now."""
        if model not in self._registry.specs:
            session.send(_not_configured(request, model))
            return
        problem = await self._registry.problem_of(model)
        if problem is not None:
            session.send(Refused(request, "model_load_failed", f"model {model!r} cannot be loaded: {problem}"))
            return
        await self._devices.observe()
        session.send(Explained(request, explain(self._scheduler, model)))

    def _submit(self, session: WorkerSession, submission: _Submission) -> None:
        """Begin at once on an instance that exists; check first if a load would follow."""
        model = submission.model
        if model not in self._registry.specs:
            session.send(_not_configured(submission.request, model))
            return
        waiter = self._pending.new_id()
        self._pending.put(waiter, PendingRequest(session, submission.request, model))
        name = submission.choose()
        if name is not None and self._is_allocated(name):
            self._begin(waiter, name, submission.action, wait=submission.wait)
        else:
            self._tasks.start(self._check_and_begin(waiter, submission))

    def _choose(self, model: str, task: Task | None) -> str | None:
        """Return the name to schedule for a request; without a task, any instance that is ready will do."""
        if task is not None:
            return self._registry.choose(model, task)
        embedding = self._registry.embedding_of(model)
        is_ready = embedding is not None and self._scheduler.models[embedding].state is ModelState.READY
        return embedding if is_ready and not self._is_allocated(model) else model

    async def _check_and_begin(self, waiter: int, submission: _Submission) -> None:
        """Refuse a load that cannot succeed, or would not help, before another model is evicted for it."""
        model = submission.model
        problem = await self._registry.problem_of(model)
        name = submission.choose()
        if name is not None and name != model:
            problem = await self._registry.problem_of(name)
        await self._devices.observe()
        if waiter not in self._pending:
            return  # cancelled meanwhile
        if model not in self._registry.specs:
            self._carry_out([model_removed(waiter, model)])
        elif name is not None and (problem is None or self._is_allocated(name)):
            self._begin(waiter, name, submission.action, wait=submission.wait)
        elif problem is None and submission.task is not None:
            message = refusal(model, submission.task, self._registry.all_tasks(model) or ())
            self._refuse_load(waiter, "not_supported", message)
        else:
            self._scheduler.mark_failed(model, str(problem), _now())
            self._refuse_load(waiter, "model_load_failed", f"model {model!r} failed to load: {problem}")
            self._publisher.publish_changes()

    def _refuse_load(self, waiter: int, code: str, message: str) -> None:
        if (pending := self._pending.pop(waiter)) is not None:
            pending.client.send(Refused(pending.request, code, message, should_retry=False))

    def _begin(self, waiter: int, name: str, action: _Action, *, wait: bool) -> None:
        pending = self._pending[waiter]
        self._pending.put(waiter, PendingRequest(pending.client, pending.request if wait else _NO_REPLY, name))
        self._carry_out(action(waiter, name, _now()))
        if not wait:
            pending.client.send(Models(self.statuses(), pending.request))

    def _is_allocated(self, name: str) -> bool:
        return self._scheduler.models[name].allocation is not None

    # ── decisions ────────────────────────────────────────────────────────────────────────────────────────────────

    def _carry_out(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            match decision:
                case Grant():
                    self._grant(decision)
                case Done(waiter):
                    self._done(waiter)
                case Refuse():
                    self._refuse(decision)
                case Start(instance, model, placement):
                    spec, is_pinned = self._registry.specs[model], self._scheduler.models[model].is_pinned
                    self._runner.start(instance, model, spec, placement, is_pinned=is_pinned)
                case Revoke(instance):
                    for session in self._sessions.holding(instance):
                        session.send(RevokeSlots(instance))
                case Sleep(instance, level, from_level):
                    self._runner.sleep(instance, level, from_level)
                case Wake(instance, level):
                    self._runner.wake(instance, level)
                case Stop(instance):
                    self._runner.stop(instance)
        self._publisher.publish_changes()
        self._set_timer()

    def _grant(self, grant: Grant) -> None:
        pending, info = self._pending.pop(grant.waiter), self._instances[grant.instance].info
        assert pending is not None, "a waiter that left was cancelled"
        assert info is not None, "an instance is ready only after its plan was made"
        session = pending.client
        if grant.until_revoked:
            session.lend(info.id, grant.slots)
        else:
            session.lend_for(pending.request, grant.key_id, info.id, grant.waiter)
        session.send(Granted(pending.request, info, grant.slots, grant.until_revoked, grant.key_id))

    def _done(self, waiter: int) -> None:
        """Send the reply to a command; one for a model and its embedding instance once both are done."""
        pending = self._pending.pop(waiter)
        if pending is not None and not self._pending.has(pending.client, pending.request):
            pending.client.send(Models(self.statuses(), pending.request))

    def _refuse(self, refuse: Refuse) -> None:
        if (pending := self._pending.pop(refuse.waiter)) is not None:
            should_retry = False if refuse.code == "model_load_failed" else None
            pending.client.send(
                Refused(
                    pending.request,
                    refuse.code,
                    refuse.message,
                    refuse.retry_after,
                    should_retry,
                    position=refuse.position,
                )
            )

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        at = self._scheduler.next_tick(_now())
        if at is not None:
            self._timer = asyncio.get_running_loop().call_at(at, lambda: self._tasks.start(self._tick()))

    async def _tick(self) -> None:
        if self._scheduler.waiting_models():
            await self._devices.observe()
        self._carry_out(self._scheduler.tick(_now()))

    # ── events of instances ──────────────────────────────────────────────────────────────────────────────────────

    def on_ready(self, instance: Instance) -> None:
        self._registry.set_facts(instance.model, instance.facts)
        self._telemetry.on_ready(instance)
        self._carry_out(self._scheduler.on_ready(instance.id, _now()))

    def on_dying(self, instance: Instance) -> None:
        self._scheduler.on_dying(instance.id)

    def on_ended(self, instance: Instance, reason: str) -> None:
        self._telemetry.on_ended(instance, self._scheduler.allocations.get(instance.id))
        self._sessions.forget(instance.id)
        if instance.is_stopping:
            self._carry_out(self._scheduler.on_stopped(instance.id, _now()))
        else:
            self._carry_out(self._scheduler.on_exited(instance.id, reason, _now()))

    def on_slept(self, instance: Instance, from_level: int, *, is_asleep: bool) -> None:
        if is_asleep and from_level == 0:
            self._telemetry.on_slept(instance)
        event = self._scheduler.on_slept if is_asleep else self._scheduler.on_sleep_failed
        self._carry_out(event(instance.id, _now()))

    def on_woken(self, instance: Instance, *, is_awake: bool) -> None:
        self._telemetry.on_woken(instance, is_awake=is_awake)
        event = self._scheduler.on_ready if is_awake else self._scheduler.on_sleep_failed
        self._carry_out(event(instance.id, _now()))


def _not_configured(request: int, model: str) -> Refused:
    return Refused(request, "model_not_found", f"model {model!r} is not configured")


def _now() -> float:
    """Return the time of the event loop's clock: it does not jump, and timers use it."""
    return asyncio.get_running_loop().time()
