"""Carries out what the scheduler decides: runs instances, answers workers and commands. One loop, the single writer.

`server.py` calls the methods that take a `Client`; each instance has one task (`_run`) from its start to its end,
and that task alone reports the end to the scheduler.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from loguru import logger

from llm_api_server.config import Config, ModelConfig
from llm_api_server.control import Drain, Explained, Granted, Models, ModelStatus, Refused, RunDir, ToClient
from llm_api_server.engines.base import Engine, ModelFacts, ModelProblem, Placement
from llm_api_server.engines.sleep import SleepFailed
from llm_api_server.manager import booking as decide
from llm_api_server.manager.devices import DeviceWatch, Inventory
from llm_api_server.manager.explain import explain
from llm_api_server.manager.instance import Instance, Surroundings, end
from llm_api_server.manager.process import Launcher
from llm_api_server.manager.records import Record, Records, fingerprint
from llm_api_server.manager.scheduler import Scheduler
from llm_api_server.manager.status import models_of, policy_of, status_of
from llm_api_server.types import ModelState

#: The request of those who do not wait for the end of a command.
_NOBODY = 0
#: Seconds between two pushes of counters that changed; a change of state is pushed at once.
_COUNTER_INTERVAL = 0.25
#: Seconds that falling asleep or waking may take.
_SLEEP_TIMEOUT = 120.0


class Client(Protocol):
    """A connected worker or command line."""

    is_worker: bool
    #: Leases it holds per instance, and what it says is in flight there.
    grants: dict[str, int]
    in_flight: dict[str, int]

    def send(self, message: ToClient) -> None: ...


@dataclass(frozen=True)
class _Waiting:
    """Whom to answer when the scheduler grants, refuses or is done."""

    client: Client
    request: int
    model: str


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
    ) -> None:
        """`engines` maps each configured model to its adapter and its entry with the path resolved."""
        self._config = config
        self._engines = engines
        self._records = Records(run_dir.engines)
        self._around = Surroundings(
            launcher, self._records, run_dir.engines, log_dir / "engines", config.models.load_timeout
        )
        self._facts: dict[str, ModelFacts] = {}
        self._running: dict[str, Instance] = {}
        self._last_used: dict[str, float] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._waiter_ids = count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._clients: set[Client] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._push: asyncio.TimerHandle | None = None
        self._pushed_states: list[tuple[str, ModelState, str | None]] = []
        policy, models = policy_of(config, inventory.devices), models_of(config, engines)
        self._scheduler = Scheduler(policy, models, lambda: uuid4().hex[:12], inventory.devices)
        self._devices = DeviceWatch(inventory, self._scheduler, self._memory_of)
        self._inspection: asyncio.Task[None] | None = None

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Adopt what an earlier manager left, end what does not fit, begin to preload."""
        for record in self._records.read_all():
            await self._adopt_or_end(record)
        self._inspection = asyncio.create_task(self._inspect_all())

    async def close(self) -> None:
        """Refuse who waits, stop every engine and wait until they are gone."""
        if self._inspection is not None:
            self._inspection.cancel()
        self._carry_out(self._scheduler.shut_down())
        tasks = [running.task for running in self._running.values() if running.task is not None]
        if tasks:
            await asyncio.wait(tasks)
        for handle in (self._timer, self._push):
            if handle is not None:
                handle.cancel()

    async def _adopt_or_end(self, record: Record) -> None:
        process = self._around.launcher.adopt(record)
        if process is None:
            self._records.remove(record.info.id)
        elif self._is_wanted(record):
            instance = self._new_instance(record.info.id, record.info.model, record.placement)
            instance.adopt(record, process)
            self._scheduler.adopt(instance.id, instance.model, _now(), record.placement)
            instance.task = asyncio.create_task(self._run(instance))
            logger.info("adopted model {} (instance {}, pid {})", instance.model, instance.id, process.pid)
        else:
            logger.info("ending instance {} of {}, left by an earlier manager", record.info.id, record.info.model)
            await end(process)
            self._records.remove(record.info.id)

    def _is_wanted(self, record: Record) -> bool:
        """It is ready and awake, its model's entry is unchanged, and no other instance of the model was adopted."""
        model = record.info.model
        if model not in self._engines or record.load_seconds is None or record.may_sleep:
            return False
        is_unchanged = record.fingerprint == fingerprint(self._config, self._engines[model][1])
        has_devices = {seat.device for seat in record.placement.seats} <= {
            device.id for device in self._scheduler.devices
        }
        return is_unchanged and has_devices and self._scheduler.models[model].booking is None

    async def _inspect_all(self) -> None:
        """Read every model's files once, so that `/v1/models` can tell context and problems before any load. Preloads
        begin as soon as theirs are read.
        """
        first = [name for name in self._config.models.preload if name in self._engines]
        for name in [*first, None, *(name for name in self._engines if name not in first)]:
            if name is None:
                await self._devices.observe()
                self._carry_out(self._scheduler.preload(_now()))
                continue
            if (problem := await self._problem_of(name)) is not None:
                logger.warning("model {} cannot be loaded: {}", name, problem)
                self._scheduler.mark_failed(name, problem, _now())
        self._changed()

    async def _problem_of(self, model: str) -> str | None:
        """What its files tell against loading it, read now."""
        engine, entry = self._engines[model]
        try:
            facts = self._facts[model] = await asyncio.to_thread(engine.inspect, entry)
            self._scheduler.know(model, facts)
        except ModelProblem as problem:
            return str(problem)
        except Exception:  # noqa: BLE001 - a load will run into it again and report it
            logger.exception("the files of model {} could not be inspected", model)
        return None

    # ── what clients ask ─────────────────────────────────────────────────────────────────────────────────────────

    @property
    def has_workers(self) -> bool:
        return any(client.is_worker for client in self._clients)

    def connected(self, client: Client) -> None:
        self._clients.add(client)

    def hello(self, client: Client, in_flight: dict[str, int]) -> None:
        """A worker is here. What it has in flight counts as one grant per instance, given back with its last one."""
        client.is_worker = True
        client.in_flight = in_flight
        for instance in in_flight:
            if instance in self._running:
                client.grants[instance] = 1
                self._scheduler.restore(instance, 1)
                if self._scheduler.is_draining(instance):
                    client.send(Drain(instance))
        client.send(Models(self.statuses()))

    def disconnected(self, client: Client) -> None:
        """Its requests are gone with it: nobody waits, nothing is in flight."""
        self._clients.discard(client)
        for waiter, waiting in list(self._waiting.items()):
            if waiting.client is client:
                del self._waiting[waiter]
                self._carry_out(self._scheduler.cancel(waiter, waiting.model, _now()))
        for instance, grants in client.grants.items():
            self._carry_out(self._scheduler.release(instance, grants, _now()))

    def acquire(self, client: Client, request: int, model: str) -> None:
        self._last_used[model] = time.time()
        self._ask(client, request, model, self._scheduler.acquire)

    def cancel(self, client: Client, request: int) -> None:
        for waiter, waiting in self._waiting.items():
            if waiting.client is client and waiting.request == request:
                del self._waiting[waiter]
                self._carry_out(self._scheduler.cancel(waiter, waiting.model, _now()))
                return

    def release(self, client: Client, instance: str, grants: int) -> None:
        held = client.grants.get(instance, 0)
        client.grants[instance] = held - min(held, grants)
        if client.grants[instance] == 0:
            del client.grants[instance]
            client.in_flight.pop(instance, None)
        if running := self._running.get(instance):
            self._last_used[running.model] = time.time()
        self._carry_out(self._scheduler.release(instance, min(held, grants), _now()))

    def report(self, client: Client, in_flight: dict[str, int]) -> None:
        client.in_flight = in_flight
        self._changed()

    def load(self, client: Client, request: int, model: str, *, wait: bool) -> None:
        self._ask(client, request, model, self._scheduler.load, wait=wait)

    def unload(self, client: Client, request: int, model: str, *, wait: bool) -> None:
        self._ask(client, request, model, self._scheduler.unload, wait=wait)

    async def list_models(self, client: Client, request: int) -> None:
        """Answer with memory measured now (which takes milliseconds per process, so in a thread)."""
        for running in list(self._running.values()):
            if running.process is not None:
                running.memory_bytes = await asyncio.to_thread(running.process.memory_bytes)
        client.send(Models(self.statuses(), request))

    async def explain(self, client: Client, request: int, model: str) -> None:
        """Answer whether it would fit, with its files and the devices looked at now."""
        if model not in self._scheduler.models:
            client.send(Refused(request, "model_not_found", f"model {model!r} is not configured"))
            return
        problem = await self._problem_of(model)
        if problem is not None:
            client.send(Refused(request, "model_load_failed", f"model {model!r} cannot be loaded: {problem}"))
            return
        await self._devices.observe()
        client.send(Explained(request, explain(self._scheduler, model)))

    def _ask(self, client: Client, request: int, model: str, verb: _Verb, *, wait: bool = True) -> None:
        if model not in self._scheduler.models:
            client.send(Refused(request, "model_not_found", f"model {model!r} is not configured"))
            return
        waiter = next(self._waiter_ids)
        self._waiting[waiter] = _Waiting(client, request, model)
        is_unload = verb == self._scheduler.unload
        if is_unload or self._scheduler.models[model].booking is not None:
            self._begin(waiter, verb, wait=wait)
        else:
            self._keep(self._check_and_begin(waiter, model, verb, wait=wait))

    async def _check_and_begin(self, waiter: int, model: str, verb: _Verb, *, wait: bool) -> None:
        """A model that cannot be loaded is refused before another has to make room for it."""
        problem = await self._problem_of(model)
        await self._devices.observe()
        if waiter not in self._waiting:
            return  # it left meanwhile
        if problem is None or self._scheduler.models[model].booking is not None:
            self._begin(waiter, verb, wait=wait)
            return
        waiting = self._waiting.pop(waiter)
        self._scheduler.mark_failed(model, problem, _now())
        message = f"model {model!r} failed to load: {problem}"
        waiting.client.send(Refused(waiting.request, "model_load_failed", message, should_retry=False))
        self._changed()

    def _begin(self, waiter: int, verb: _Verb, *, wait: bool) -> None:
        waiting = self._waiting[waiter]
        if not wait:
            self._waiting[waiter] = _Waiting(waiting.client, _NOBODY, waiting.model)
        self._carry_out(verb(waiter, waiting.model, _now()))
        if not wait:
            waiting.client.send(Models(self.statuses(), waiting.request))

    # ── decisions ────────────────────────────────────────────────────────────────────────────────────────────────

    def _carry_out(self, decisions: list[decide.Decision]) -> None:
        for decision in decisions:
            match decision:
                case decide.Grant(waiter, instance):
                    self._grant(waiter, self._running[instance])
                case decide.Done(waiter):
                    if waiting := self._waiting.pop(waiter, None):
                        waiting.client.send(Models(self.statuses(), waiting.request))
                case decide.Refuse(waiter, code, message, retry_after):
                    if waiting := self._waiting.pop(waiter, None):
                        should_retry = False if code == "model_load_failed" else None
                        waiting.client.send(Refused(waiting.request, code, message, retry_after, should_retry))
                case _:
                    self._command(decision)
        self._changed()
        self._set_timer()

    def _command(self, decision: decide.Start | decide.Drain | decide.Sleep | decide.Wake | decide.Stop) -> None:
        """What is decided of an instance."""
        match decision:
            case decide.Start(instance, model, placement):
                started = self._new_instance(instance, model, placement)
                started.task = asyncio.create_task(self._run(started))
            case decide.Drain(instance):
                for client in self._clients:
                    if instance in client.grants:
                        client.send(Drain(instance))
            case decide.Sleep(instance, level, from_level):
                self._keep(self._put_to_sleep(self._running[instance], level, from_level))
            case decide.Wake(instance, level):
                self._keep(self._wake(self._running[instance], level))
            case decide.Stop(instance):
                self._running[instance].stop()

    def _grant(self, waiter: int, instance: Instance) -> None:
        waiting = self._waiting.pop(waiter)
        grants = waiting.client.grants
        grants[instance.id] = grants.get(instance.id, 0) + 1
        assert instance.info is not None, "an instance is ready only after its plan was made"
        waiting.client.send(Granted(waiting.request, instance.info))

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        at = self._scheduler.next_tick(_now())
        if at is not None:
            self._timer = asyncio.get_running_loop().call_at(at, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._scheduler.waiting():
            self._keep(self._look_and_tick())
        else:
            self._carry_out(self._scheduler.tick(_now()))

    async def _look_and_tick(self) -> None:
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
        try:
            async with asyncio.timeout(_SLEEP_TIMEOUT):
                await instance.sleep(level, from_level=from_level)
            problem = None if await self._devices.see_free(instance.id) else "its memory was not seen free"
        except (SleepFailed, TimeoutError) as error:
            problem = str(error) or "it took too long"
        if problem is None:
            logger.info("model {} sleeps (level {})", instance.model, level)
            self._carry_out(self._scheduler.on_slept(instance.id, _now()))
        else:
            logger.warning("model {} does not sleep, so it is unloaded: {}", instance.model, problem)
            self._carry_out(self._scheduler.on_sleep_failed(instance.id, _now()))

    async def _wake(self, instance: Instance, level: int) -> None:
        started = time.time()
        try:
            async with asyncio.timeout(_SLEEP_TIMEOUT):
                await instance.wake(level)
        except (SleepFailed, TimeoutError) as error:
            logger.warning("model {} does not wake, so it is loaded anew: {}", instance.model, str(error) or "too slow")
            self._carry_out(self._scheduler.on_sleep_failed(instance.id, _now()))
            return
        logger.info("model {} awake after {:.1f} s", instance.model, time.time() - started)
        self._carry_out(self._scheduler.on_ready(instance.id, _now()))

    # ── instances ────────────────────────────────────────────────────────────────────────────────────────────────

    def _new_instance(self, instance_id: str, model: str, placement: Placement) -> Instance:
        engine, entry = self._engines[model]
        instance = Instance(
            instance_id, model, engine, entry, fingerprint(self._config, entry), self._around, placement=placement
        )
        self._running[instance_id] = instance
        return instance

    async def _run(self, instance: Instance) -> None:
        """The life of one instance: load it, serve, and when it is over say so, whatever the way."""
        reason = ""
        try:
            if instance.ready_at is None:
                await instance.load()
                self._facts[instance.model] = instance.facts
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
        await self._devices.see_free(instance.id)
        del self._running[instance.id]
        for client in self._clients:
            client.grants.pop(instance.id, None)
        if instance.is_stopping:
            logger.info("model {} unloaded", instance.model)
            self._carry_out(self._scheduler.on_stopped(instance.id, _now()))
        else:
            logger.error("model {} failed: {}", instance.model, reason)
            self._carry_out(self._scheduler.on_exited(instance.id, reason, _now()))

    # ── status ───────────────────────────────────────────────────────────────────────────────────────────────────

    def statuses(self) -> list[ModelStatus]:
        return [self._status(name) for name in self._engines]

    def _status(self, name: str) -> ModelStatus:
        """The path as configured, not as resolved."""
        model = self._scheduler.models[name]
        running = self._running.get(model.booking.id) if model.booking else None
        entry, engine = self._config.models.available[name], self._engines[name][0].name
        status = status_of(model, entry, engine, self._facts.get(name, ModelFacts()), running, time.time() - _now())
        status.last_used = self._last_used.get(name)
        if running is not None:
            status.in_flight = self._in_flight(running.id)
        return status

    def _in_flight(self, instance: str) -> int:
        """What the workers report; a lease whose report is still to come counts as one."""
        return sum(
            max(client.in_flight.get(instance, 0), min(1, client.grants.get(instance, 0))) for client in self._clients
        )

    def _changed(self) -> None:
        """Tell the workers: at once when a state changed, else a few times a second."""
        states = [
            (name, model.state, model.failure.reason if model.failure else None)
            for name, model in self._scheduler.models.items()
        ]
        if states != self._pushed_states:
            self._pushed_states = states
            self._push_now()
        elif self._push is None:
            self._push = asyncio.get_running_loop().call_later(_COUNTER_INTERVAL, self._push_now)

    def _push_now(self) -> None:
        if self._push is not None:
            self._push.cancel()
            self._push = None
        message = Models(self.statuses())
        for client in self._clients:
            if client.is_worker:
                client.send(message)


class _Verb(Protocol):
    def __call__(self, waiter: int, name: str, now: float) -> list[decide.Decision]: ...


def _now() -> float:
    """The loop's own clock: it does not jump, and timers use it."""
    return asyncio.get_running_loop().time()
