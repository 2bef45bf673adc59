"""Carries out what the scheduler decides: runs instances, answers workers and commands. One loop, the single writer.

`server.py` calls the methods that take a `WorkerSession`; each instance has one task (`_run`) from its start to its
end,
and that task alone reports the end to the scheduler.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from loguru import logger

from llm_api_server.config.models import Config, ModelConfig
from llm_api_server.devices.inventory import Inventory
from llm_api_server.engines.base import Engine, ModelProblem, Placement
from llm_api_server.ipc.lease_messages import NO_CLAIM, Claim, EndedRequest, Granted, RevokeSlots
from llm_api_server.ipc.messages import Explained, Models, Refused
from llm_api_server.ipc.run_dir import RunDir
from llm_api_server.manager.instances.adoption_records import AdoptionRecord, AdoptionRecords, fingerprint
from llm_api_server.manager.instances.device_watch import RELEASE_TIMEOUT, DeviceWatch
from llm_api_server.manager.instances.embedding_instances import EmbeddingInstances, refusal
from llm_api_server.manager.instances.instance import Instance, InstanceContext, Spec, end
from llm_api_server.manager.instances.model_inspection import ModelInspection
from llm_api_server.manager.instances.process import Launcher
from llm_api_server.manager.instances.sleeping import put_to_sleep, wake
from llm_api_server.manager.instances.stall_detector import StallDetector
from llm_api_server.manager.pending_requests import PendingRequest, PendingRequests
from llm_api_server.manager.scheduling import decisions as decide
from llm_api_server.manager.scheduling.explain import explain
from llm_api_server.manager.scheduling.refusals import model_removed
from llm_api_server.manager.scheduling.scheduler import Scheduler
from llm_api_server.manager.status import models_of, policy_of
from llm_api_server.manager.status_publisher import StatusPublisher
from llm_api_server.manager.telemetry.counters import Counters
from llm_api_server.manager.telemetry.load_telemetry import LoadTelemetry
from llm_api_server.manager.telemetry.tracing import Tracing
from llm_api_server.manager.worker_session import Query, WorkerSession
from llm_api_server.types import ModelState, Task

#: The request of those who do not wait for the end of a command.
_NOBODY = 0


class Manager:
    """Built by `main.run` with everything it needs; `start` begins, `close` ends with no engine left."""

    def __init__(
        self,
        config: Config,
        engines: Mapping[str, tuple[Engine, ModelConfig]],
        launcher: Launcher,
        run_dir: RunDir,
        log_dir: Path,
        inventory: Inventory,
        *,
        release_timeout: float = RELEASE_TIMEOUT,
    ) -> None:
        """`engines` maps each configured model to its adapter and its entry with the path resolved."""
        self._config = config
        self._twins = EmbeddingInstances(engines)
        #: By the scheduler's names. Others look into it as well; it is changed in place.
        self._engines = {**engines, **self._twins.entries}
        self._records = AdoptionRecords(run_dir.engines)
        self._around = InstanceContext(launcher, self._records, run_dir.engines, log_dir, config.models.load_timeout)
        self._running: dict[str, Instance] = {}
        #: For the accounts as well.
        self.tally = Counters()
        self.tracing = Tracing()
        self.tracing.configure(config.tracing)
        self._loads = LoadTelemetry(self.tally, self.tracing)
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        policy, models = policy_of(config, inventory.devices), models_of(config, self._engines)
        self._scheduler = Scheduler(policy, models, lambda: uuid4().hex[:12], inventory.devices)
        self._waiting = PendingRequests(lambda: self._scheduler.positions(_now()))
        self._files = ModelInspection(self._engines, self._scheduler)
        self.board = StatusPublisher(config, self._engines, self._twins, self._scheduler, self._files, self._running)
        self._devices = DeviceWatch(inventory, self._scheduler, self._memory_of, release_timeout=release_timeout)
        self._stalls = StallDetector(config.limits.stall_timeout, self._running, self.board.is_at_work)
        self._background: list[asyncio.Task[None]] = []

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Adopt what an earlier manager left, end what does not fit, begin to preload."""
        for record in self._records.read_all():
            await self._adopt_or_end(record)
        self._background = [asyncio.create_task(work) for work in (self._inspect_all(), self._stalls.run())]

    async def close(self) -> None:
        """Refuse who waits, stop every engine and wait until they are gone."""
        for task in self._background:
            task.cancel()
        self._carry_out(self._scheduler.shut_down())
        tasks = [running.task for running in self._running.values() if running.task is not None]
        if tasks:
            await asyncio.wait(tasks)
        self._let_go()

    async def leave(self) -> None:
        """Give everything up as it is, for another manager to go on with. Engines that load start anew there."""
        tasks = [*self._background, *(one.task for one in self._running.values() if one.task is not None), *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._let_go()

    def _let_go(self) -> None:
        """Nobody waits any more, and nothing is timed; for when no task is left."""
        self._waiting.close()
        if self._timer is not None:
            self._timer.cancel()

    async def _adopt_or_end(self, record: AdoptionRecord) -> None:
        process = self._around.launcher.adopt(record)
        if process is None:
            self._records.remove(record.info.id)
        elif self._is_wanted(record):
            instance = self._new_instance(record.info.id, record.model, record.placement)
            instance.adopt(record, process)
            self._scheduler.adopt(instance.id, instance.model, _now(), record.placement, is_pinned=record.is_pinned)
            instance.task = asyncio.create_task(self._run(instance))
            logger.info("adopted model {} (instance {}, pid {})", instance.model, instance.id, process.pid)
        else:
            logger.info("ending instance {} of {}, left by an earlier manager", record.info.id, record.model)
            await end(process)
            self._records.remove(record.info.id)

    def _is_wanted(self, record: AdoptionRecord) -> bool:
        """It is ready and awake, its model's entry is unchanged, and no other instance of the model was adopted."""
        model = record.model
        if model not in self._engines or record.load_seconds is None or record.may_sleep:
            return False
        is_unchanged = record.fingerprint == fingerprint(self._config, self._engines[model][1])
        has_devices = {seat.device for seat in record.placement.devices} <= self._scheduler.device_ids
        return is_unchanged and has_devices and self._scheduler.models[model].allocation is None

    async def _inspect_all(self) -> None:
        """Read every model's files once, so that `/v1/models` tells what they say before any load; preloads first."""
        preloads = self._config.models.preload
        await self._inspect(preloads)
        await self._devices.observe()
        self._carry_out(self._scheduler.preload(_now()))
        await self._inspect([name for name in self._config.models.available if name not in preloads])

    async def _inspect(self, models: list[str]) -> None:
        for name in models:
            if (problem := await self._files.problem_of(name)) is not None:
                logger.warning("model {} cannot be loaded: {}", name, problem)
                self._scheduler.mark_failed(name, problem, _now())
        self.board.changed()

    async def configure(self, config: Config, engines: Mapping[str, tuple[Engine, ModelConfig]]) -> None:
        """Follow another configuration. Models whose engines would be started as before go on as they are."""
        wanted = {**engines, **EmbeddingInstances(engines).entries}
        before = {name: fingerprint(self._config, entry) for name, (_, entry) in self._engines.items()}
        changed = [name for name, (_, entry) in wanted.items() if before.get(name) != fingerprint(config, entry)]
        facts = await self._files.read({name: wanted[name] for name in changed})
        self._config = config
        self._engines.clear()
        self._engines.update(wanted)
        self._twins.configure(engines)
        self._around.load_timeout = config.models.load_timeout
        self._stalls.configure(config.limits.stall_timeout)
        self.tracing.configure(config.tracing)
        self.board.configure(config)
        self._files.follow(changed, facts)
        models = models_of(config, wanted)
        for model in models:
            model.update_facts(self._files.of(model.name), counts_memory=bool(self._scheduler.devices))
        policy = policy_of(config, self._scheduler.devices)
        self._carry_out(self._scheduler.configure(policy, models, changed, _now()))
        await self._inspect(changed)

    # ── what clients ask ─────────────────────────────────────────────────────────────────────────────────────────

    @property
    def workers(self) -> list[int]:
        """Their pids."""
        return [client.pid for client in self.board.clients if client.is_worker]

    def connected(self, client: WorkerSession) -> None:
        self.board.clients.add(client)

    def hello(self, client: WorkerSession, in_flight: dict[str, int]) -> None:
        """A worker is here. What it has in flight are the places that it holds."""
        client.is_worker = True
        client.in_flight = in_flight
        for instance, places in in_flight.items():
            if instance in self._running:
                client.grants[instance] = places
                self._scheduler.restore_slots(instance, places)
                if self._scheduler.is_revoked(instance):
                    client.send(RevokeSlots(instance))
        client.send(Models(self.board.statuses()))

    def disconnected(self, client: WorkerSession) -> None:
        """Its requests are gone with it: nobody waits, nothing is in flight."""
        self.board.clients.discard(client)
        for waiter, asked in self._waiting.pop_all_of(client):
            self._carry_out(self._scheduler.cancel(waiter, asked.model, _now()))
        for number in list(client.reading):
            self.on_read(client, number)
        for instance, places in client.grants.items():
            ended = [EndedRequest(key_id) for key_id in client.running.get(instance, ())]
            self._carry_out(self._scheduler.return_slots(instance, places, _now(), ended))

    def acquire(
        self, client: WorkerSession, request: int, model: str, task: Task | None = None, claim: Claim = NO_CLAIM
    ) -> None:
        """`task` decides whether the model itself or its twin is asked for; without one either will do."""
        self.board.note_use(model)
        verb = partial(self._scheduler.acquire, claim=claim)
        self._ask(client, Query(request, model, task, claim), verb)

    def cancel(self, client: WorkerSession, request: int) -> None:
        for waiter, asked in self._waiting.pop_all_of(client, request):
            self._carry_out(self._scheduler.cancel(waiter, asked.model, _now()))

    def on_read(self, client: WorkerSession, number: int) -> None:
        """Unknown ones are ignored: another manager granted them."""
        instance, waiter = client.reading.pop(number, ("", 0))
        self._carry_out(self._scheduler.on_prefill_done(instance, waiter, _now()))

    def release(self, client: WorkerSession, instance: str, places: int, ended: Sequence[EndedRequest] = ()) -> None:
        held = client.grants.get(instance, 0)
        places = min(held, places)
        client.grants[instance] = held - places
        running = client.running.get(instance, [])
        for one in ended:
            if one.key_id in running:
                running.remove(one.key_id)
        if client.grants[instance] == 0:
            del client.grants[instance]
            client.running.pop(instance, None)
            client.in_flight.pop(instance, None)
        if user := self._running.get(instance):
            self.board.note_use(user.model)
        self._carry_out(self._scheduler.return_slots(instance, places, _now(), ended))

    def report(self, client: WorkerSession, in_flight: dict[str, int], blocked: dict[str, int]) -> None:
        client.in_flight, client.blocked = in_flight, blocked
        self.board.changed()

    def load(self, client: WorkerSession, request: int, model: str, *, wait: bool) -> None:
        self._ask(client, Query(request, model), self._scheduler.load, wait=wait)

    def unload(self, client: WorkerSession, request: int, model: str, *, wait: bool) -> None:
        """The model and its twin; the answer comes when both are gone."""
        if twin := self._twins.twin_of(model):
            waiter = self._waiting.new_id()
            if wait and self._scheduler.models[twin].allocation is not None:
                self._waiting.put(waiter, PendingRequest(client, request, twin))
            self._carry_out(self._scheduler.unload(waiter, twin, _now()))
        self._ask(client, Query(request, model), self._scheduler.unload, wait=wait)

    def pin(self, client: WorkerSession, request: int, model: str, *, is_pinned: bool) -> None:
        """The model and its twin, of which one must be there to be pinned."""
        names = [name for name in (model, self._twins.twin_of(model)) if name in self._engines]
        if is_pinned and all(self._scheduler.models[name].allocation is None for name in names):
            client.send(_cannot_pin(request, model, is_known=bool(names)))
            return
        verb = self._scheduler.pin if is_pinned else self._scheduler.unpin
        self._carry_out([decision for name in names for decision in verb(name, _now())])
        for running in self._running.values():
            if running.model in names:
                running.pin(is_pinned=is_pinned)
        client.send(Models(self.board.statuses(), request))

    async def list_models(self, client: WorkerSession, request: int) -> None:
        """With memory measured, and the devices looked at, now."""
        await self.board.measure()
        await self._devices.observe()
        client.send(Models(self.board.statuses(), request))

    async def explain(self, client: WorkerSession, request: int, model: str) -> None:
        """Answer whether it would fit, with its files and the devices looked at now."""
        if model not in self._engines:
            client.send(Refused(request, "model_not_found", f"model {model!r} is not configured"))
            return
        problem = await self._files.problem_of(model)
        if problem is not None:
            client.send(Refused(request, "model_load_failed", f"model {model!r} cannot be loaded: {problem}"))
            return
        await self._devices.observe()
        client.send(Explained(request, explain(self._scheduler, model)))

    def _ask(self, client: WorkerSession, question: Query, verb: _Verb, *, wait: bool = True) -> None:
        model = question.model
        if model not in self._engines:
            client.send(Refused(question.request, "model_not_found", f"model {model!r} is not configured"))
            return
        waiter = self._waiting.new_id()
        self._waiting.put(waiter, PendingRequest(client, question.request, model))
        target = self._target(question)
        is_unload = verb == self._scheduler.unload
        if target is not None and (is_unload or self._scheduler.models[target].allocation is not None):
            self._begin(waiter, target, verb, wait=wait)
        else:
            self._keep(self._check_and_begin(waiter, question, verb, wait=wait))

    def _target(self, question: Query) -> str | None:
        """What the scheduler is to be asked for: the model or its twin; None where nothing does it, as far as known."""
        model = question.model
        if question.claim is None:
            return model
        if question.task is not None:
            facts = self._files.facts.get(model)
            return None if facts is None else self._twins.choose(model, question.task, facts)
        twin = self._twins.twin_of(model)
        is_twin_ready = twin is not None and self._scheduler.models[twin].state is ModelState.READY
        return twin if is_twin_ready and self._scheduler.models[model].allocation is None else model

    async def _check_and_begin(self, waiter: int, question: Query, verb: _Verb, *, wait: bool) -> None:
        """What cannot be loaded, or would not help, is refused before another has to make room for it."""
        model = question.model
        problem = await self._files.problem_of(model)
        target = self._target(question)
        if target is not None and target != model:
            problem = await self._files.problem_of(target)
        await self._devices.observe()
        if waiter not in self._waiting:
            return  # it left meanwhile
        if model not in self._engines:
            self._carry_out([model_removed(waiter, model)])
            return
        if target is not None and (problem is None or self._scheduler.models[target].allocation is not None):
            self._begin(waiter, target, verb, wait=wait)
            return
        waiting = self._waiting.pop(waiter)
        assert waiting is not None, "looked at just before"
        if problem is None and question.task is not None:
            tasks = self._twins.all_tasks(model, self._files.of(model)) or ()
            message = refusal(model, question.task, tasks)
            waiting.client.send(Refused(waiting.request, "not_supported", message, should_retry=False))
            return
        self._scheduler.mark_failed(model, str(problem), _now())
        message = f"model {model!r} failed to load: {problem}"
        waiting.client.send(Refused(waiting.request, "model_load_failed", message, should_retry=False))
        self.board.changed()

    def _begin(self, waiter: int, target: str, verb: _Verb, *, wait: bool) -> None:
        waiting = self._waiting[waiter]
        self._waiting.put(waiter, PendingRequest(waiting.client, waiting.request if wait else _NOBODY, target))
        self._carry_out(verb(waiter, target, _now()))
        if not wait:
            waiting.client.send(Models(self.board.statuses(), waiting.request))

    # ── decisions ────────────────────────────────────────────────────────────────────────────────────────────────

    def _carry_out(self, decisions: list[decide.Decision]) -> None:
        for decision in decisions:
            match decision:
                case decide.Grant():
                    self._grant(decision)
                case decide.Done(waiter):
                    self._done(waiter)
                case decide.Refuse(waiter, code, message, retry_after, position):
                    if asked := self._waiting.pop(waiter):
                        should_retry = False if code == "model_load_failed" else None
                        refused = Refused(asked.request, code, message, retry_after, should_retry, position=position)
                        asked.client.send(refused)
                case _:
                    self._command(decision)
        self.board.changed()
        self._set_timer()

    def _command(self, decision: decide.Start | decide.Revoke | decide.Sleep | decide.Wake | decide.Stop) -> None:
        """What is decided of an instance."""
        match decision:
            case decide.Start(instance, model, placement):
                started = self._new_instance(instance, model, placement)
                started.task = asyncio.create_task(self._run(started))
            case decide.Revoke(instance):
                for client in self.board.clients:
                    if instance in client.grants:
                        client.send(RevokeSlots(instance))
            case decide.Sleep(instance, level, from_level):
                self._keep(self._put_to_sleep(self._running[instance], level, from_level))
            case decide.Wake(instance, level):
                self._keep(self._wake(self._running[instance], level))
            case decide.Stop(instance):
                self._running[instance].stop()

    def _grant(self, grant: decide.Grant) -> None:
        asked, instance = self._waiting.pop(grant.waiter), self._running[grant.instance]
        assert asked is not None, "the scheduler knows who left"
        client = asked.client
        client.grants[instance.id] = client.grants.get(instance.id, 0) + grant.slots
        if not grant.until_revoked:
            client.running.setdefault(instance.id, []).append(grant.key_id)
            client.reading[asked.request] = (instance.id, grant.waiter)
        assert instance.info is not None, "an instance is ready only after its plan was made"
        client.send(Granted(asked.request, instance.info, grant.slots, grant.until_revoked, grant.key_id))

    def _done(self, waiter: int) -> None:
        """A command for a model and its twin is answered with the later of the two."""
        asked = self._waiting.pop(waiter)
        if asked is not None and not self._waiting.has(asked.client, asked.request):
            asked.client.send(Models(self.board.statuses(), asked.request))

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        at = self._scheduler.next_tick(_now())
        if at is not None:
            self._timer = asyncio.get_running_loop().call_at(at, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._keep(self._tick())

    async def _tick(self) -> None:
        if self._scheduler.waiting_models():
            await self._devices.observe()
        self._carry_out(self._scheduler.tick(_now()))

    def _keep(self, work: Coroutine[None, None, None]) -> None:
        """Run it to its end; the loop itself would forget it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ── devices ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _memory_of(self, instance: str) -> int | None:
        running = self._running.get(instance)
        return running.process.memory_bytes() if running is not None and running.process is not None else None

    async def _put_to_sleep(self, instance: Instance, level: int, from_level: int) -> None:
        sleeps = await put_to_sleep(instance, level, from_level, self._devices)
        if sleeps and from_level == 0:
            self.tally.unloaded(instance.model, "asleep")
        event = self._scheduler.on_slept if sleeps else self._scheduler.on_sleep_failed
        self._carry_out(event(instance.id, _now()))

    async def _wake(self, instance: Instance, level: int) -> None:
        is_awake = await wake(instance, level)
        self.tally.load_over(instance.model, "woken" if is_awake else "failed")
        event = self._scheduler.on_ready if is_awake else self._scheduler.on_sleep_failed
        self._carry_out(event(instance.id, _now()))

    # ── instances ────────────────────────────────────────────────────────────────────────────────────────────────

    def _new_instance(self, instance_id: str, model: str, placement: Placement) -> Instance:
        engine, entry = self._engines[model]
        served_name = self._twins.model_of(model) or model
        spec = Spec(engine, entry, served_name, fingerprint(self._config, entry))
        instance = Instance(instance_id, model, spec, self._around, placement)
        instance.is_pinned = self._scheduler.models[model].is_pinned
        self._running[instance_id] = instance
        return instance

    async def _run(self, instance: Instance) -> None:
        """The life of one instance: load it, serve, and when it is over say so, whatever the way."""
        reason = ""
        try:
            if instance.ready_at is None:
                await instance.load()
                self._files.facts[instance.model] = instance.facts
                self._loads.on_ready(instance)
                self._carry_out(self._scheduler.on_ready(instance.id, _now()))
            reason = await instance.ended()
        except ModelProblem as problem:
            reason = str(problem)
        except asyncio.CancelledError:
            if not instance.is_stopping:
                raise
        except Exception:  # noqa: BLE001 - the edge of the instance's task; logged, and the model shows it
            logger.exception("instance {} of {} failed inside the manager", instance.id, instance.model)
            reason = "internal error in the manager; see its log"
        self._scheduler.on_dying(instance.id)
        await instance.clean_up()
        await self._devices.wait_freed(instance.id)
        del self._running[instance.id]
        self._loads.on_ended(instance, self._scheduler.allocations.get(instance.id))
        for client in self.board.clients:
            client.grants.pop(instance.id, None)
            client.running.pop(instance.id, None)
        if instance.is_stopping:
            logger.info("model {} unloaded", instance.model)
            self._carry_out(self._scheduler.on_stopped(instance.id, _now()))
        else:
            logger.error("model {} failed: {}", instance.model, reason)
            self._carry_out(self._scheduler.on_exited(instance.id, reason, _now()))


class _Verb(Protocol):
    def __call__(self, waiter: int, name: str, now: float, /) -> list[decide.Decision]: ...


def _cannot_pin(request: int, model: str, *, is_known: bool) -> Refused:
    if not is_known:
        return Refused(request, "model_not_found", f"model {model!r} is not configured")
    return Refused(request, "model_not_loaded", f"model {model!r} is not loaded: load it first, then pin it")


def _now() -> float:
    """The loop's own clock: it does not jump, and timers use it."""
    return asyncio.get_running_loop().time()
