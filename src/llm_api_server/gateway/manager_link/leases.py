"""Leases on instances, the latest model states, load and unload commands: what the manager decides of models.

A part of the worker's link to the manager (`link.py`). Requests under way never notice a loss of the connection.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from llm_api_server.errors import ShuttingDown
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.gateway.metering.request_record import RequestRecord
from llm_api_server.ipc import lease_messages, messages
from llm_api_server.ipc.lease_messages import NO_CLAIM, Claim, InstanceInfo
from llm_api_server.ipc.messages import Explained, Models
from llm_api_server.ipc.model_status import Explanation, ModelStatus
from llm_api_server.types import Task

REPORT_INTERVAL = 0.25
#: Seconds that places without requests are kept, unless they are reclaimed: traffic with short gaps asks nobody.
LINGER = 0.5


class Lease:
    """The right to run one request on `instance`; `release` exactly once (again is harmless)."""

    __slots__ = ("_held", "_is_blocked", "_key_id", "_owner", "_work", "instance", "number")

    _held: _Held | None

    def __init__(self, owner: Leases, held: _Held, key_id: str, work: int, number: int | None) -> None:
        """`number` is that of the question, as long as its first token is of interest."""
        self._owner = owner
        self._held = held
        self._key_id = key_id
        self._work = work
        self.number = number
        self._is_blocked = False
        self.instance = held.info

    def on_read(self) -> None:
        """The engine has read the prompt, or it will not be seen when it has."""
        number, self.number = self.number, None
        if number is not None:
            self._owner.link.send(lease_messages.PrefillDone(number))

    def on_blocked(self, *, is_blocked: bool) -> None:
        """The client does not read what has come, or does again."""
        if is_blocked != self._is_blocked and self._held is not None:
            self._is_blocked = is_blocked
            self._held.blocked += 1 if is_blocked else -1
            self._owner.plan_report()

    def release(self, record: RequestRecord | None = None, *, broken: bool = False) -> None:
        """`record` tells what the request made of the work, where that is known.

        `broken`: the instance did not answer, so nothing more is started there before the manager says so.
        """
        held, self._held = self._held, None
        if held is None:
            return
        if self.number is not None:
            self.on_read()
        if self._is_blocked:
            held.blocked -= 1
        if broken:
            held.keeps = False
        if not held.keeps:  # else nobody waits, and no work decides on whose turn is next
            more = 0 if record is None else record.usage_or_estimate().work - self._work
            held.ended.append(lease_messages.EndedRequest(self._key_id, more))
        self._owner.on_release(held)


class _Held:
    """An instance that this worker has places on. It `keeps` them until they are reclaimed."""

    __slots__ = ("blocked", "ended", "idle_since", "in_flight", "info", "keeps", "model", "places", "tasks")

    def __init__(self, info: InstanceInfo) -> None:
        self.info = info
        self.model, self.tasks = info.model, info.tasks
        self.places = 0
        self.in_flight = 0
        self.blocked = 0
        self.keeps = False
        self.ended: list[lease_messages.EndedRequest] = []
        self.idle_since = 0.0


class _Asked:
    """What waits for an instance; it has a lease from the moment it is granted."""

    __slots__ = ("claim", "lease", "on_position")

    def __init__(self, claim: Claim, on_position: Callable[[int], None]) -> None:
        self.claim = claim
        self.on_position = on_position
        self.lease: Lease | None = None


class Leases:
    """All leases of one worker. `models` is the manager's latest word on every configured model."""

    def __init__(self, link: ManagerLink) -> None:
        self.link = link
        self._held: dict[str, _Held] = {}
        #: What is asked for, by the number of the question.
        self._waiting: dict[int, _Asked] = {}
        self._report_timer: asyncio.TimerHandle | None = None
        self.models: Mapping[str, ModelStatus] = {}
        self.handlers: dict[type, Callable[[Any], None]] = {
            lease_messages.Granted: self._on_granted,
            lease_messages.Queued: self._on_queued,
            lease_messages.RevokeSlots: self._on_reclaim,
            messages.Models: self._on_models,
        }
        link.add(self)

    def close(self) -> None:
        if self._report_timer is not None:
            self._report_timer.cancel()
            self._report_timer = None

    async def acquire(
        self,
        model: str,
        task: Task | None = None,
        claim: Claim = NO_CLAIM,
        on_position: Callable[[int], None] = lambda _: None,
    ) -> Lease:
        """A lease on an instance of `model` that does `task`, when it is this request's turn there.

        `on_position` hears how many are served before it, itself included. Raises the manager's refusal as an
        `ApiError`.
        """
        if self.link.is_closing:
            raise ShuttingDown("This server is shutting down.")
        lease = self.acquire_at_once(model, task, claim.key_id)
        if lease is not None:
            return lease
        question = lease_messages.Acquire(self.link.number(), model, task, claim)
        self._waiting[question.request] = asked = _Asked(claim, on_position)
        try:
            await self.link.ask(question)
        except asyncio.CancelledError:
            self._give_up(question.request)
            raise
        except BaseException:
            del self._waiting[question.request]
            raise
        del self._waiting[question.request]
        assert asked.lease is not None, "what the manager answers to that"
        return asked.lease

    def acquire_at_once(self, model: str, task: Task | None, key_id: str = "") -> Lease | None:
        """Where this worker has a place to itself."""
        if self.link.is_closing:
            return None
        best: _Held | None = None
        for held in self._held.values():
            if (
                held.model == model
                and held.keeps
                and held.places > held.in_flight
                and (best is None or held.in_flight < best.in_flight)
                and (held.tasks is None or task is None or task in held.tasks)
            ):
                best = held
        return self._lease(best, key_id, 0, None) if best is not None else None

    async def load(self, model: str, *, wait: bool) -> list[ModelStatus]:
        """Raises `ApiError` when the manager refuses, for example because the load failed."""
        return await self._models_after(messages.LoadModel(self.link.number(), model, wait))

    async def unload(self, model: str, *, wait: bool) -> list[ModelStatus]:
        return await self._models_after(messages.UnloadModel(self.link.number(), model, wait))

    async def pin(self, model: str, *, is_pinned: bool) -> list[ModelStatus]:
        """Raises `ApiError` where a model that is not loaded is to be pinned."""
        return await self._models_after(messages.PinModel(self.link.number(), model, is_pinned))

    async def list_models(self) -> list[ModelStatus]:
        """Fresh figures (memory, in flight) where `models` has those of the last change."""
        return await self._models_after(messages.ListModels(self.link.number()))

    async def explain(self, model: str) -> Explanation:
        """Whether it would fit. Raises `ApiError` when its files are bad."""
        answer = await self.link.ask(messages.ExplainModel(self.link.number(), model), repeats=False)
        assert isinstance(answer, Explained), "what the manager answers to that"
        return answer.explanation

    async def _models_after(self, message: messages.Command) -> list[ModelStatus]:
        answer = await self.link.ask(message, repeats=False)
        assert isinstance(answer, Models), "what the manager answers to these"
        return answer.models

    # ── leases ──

    def _lease(self, held: _Held, key_id: str, work: int, number: int | None) -> Lease:
        held.in_flight += 1
        if self._report_timer is None:
            self.plan_report()
        return Lease(self, held, key_id, work, number)

    def on_release(self, held: _Held) -> None:
        """Called by `SlotMessage.release`. Places that are kept are given back when none was used for a while."""
        held.in_flight -= 1
        if not held.in_flight:
            held.idle_since = time.monotonic()
        if self._report_timer is None:
            self.plan_report()
        if not held.keeps:
            self._give_back(held)

    def _give_back(self, held: _Held) -> None:
        """What is free."""
        free = held.places - held.in_flight
        if free <= 0 or self._held.get(held.info.id) is not held:
            return
        held.places -= free
        if not held.places:
            del self._held[held.info.id]
        ended, held.ended = held.ended, []
        self.link.send(lease_messages.ReturnSlots(held.info.id, free, ended))

    def _give_up(self, request: int) -> None:
        asked = self._waiting.pop(request)
        if asked.lease is None:
            self.link.send(lease_messages.Cancel(request))
        else:
            asked.lease.release()

    def _on_granted(self, granted: lease_messages.Granted) -> None:
        held = self._held.setdefault(granted.instance.id, _Held(granted.instance))
        held.places += granted.slots
        held.keeps = granted.until_revoked
        asked = self._waiting.get(granted.request)
        if asked is not None:
            number = None if granted.until_revoked or not asked.claim.prefill_tokens else granted.request
            asked.lease = self._lease(held, asked.claim.key_id, asked.claim.cost, number)
        else:  # whoever asked has left
            self._lease(held, granted.key_id, 0, granted.request).release()

    def _on_queued(self, queued: lease_messages.Queued) -> None:
        asked = self._waiting.get(queued.number)
        if asked is not None:
            asked.on_position(queued.position)

    def _on_reclaim(self, reclaim: lease_messages.RevokeSlots) -> None:
        held = self._held.get(reclaim.instance)
        if held is not None:
            held.keeps = False
            self._give_back(held)

    def _on_models(self, answer: Models) -> None:
        self.models = {model.id: model for model in answer.models}

    # ── the connection ──

    def greet(self, hello: messages.Hello) -> None:
        for held in list(self._held.values()):
            held.places = held.in_flight  # what the manager takes it to hold
            held.ended.clear()
            if not held.places:
                del self._held[held.info.id]
        hello.in_flight = self._in_flight()

    def connected(self) -> None:
        """`greet` has said it all."""

    def plan_report(self) -> None:
        if self._report_timer is None:
            self._report_timer = asyncio.get_running_loop().call_later(REPORT_INTERVAL, self._report)

    def _report(self) -> None:
        self._report_timer = None
        blocked = {one.info.id: one.blocked for one in self._held.values() if one.blocked}
        self.link.send(lease_messages.ReportInFlight(self._in_flight(), blocked))
        now = time.monotonic()
        idle = [held for held in self._held.values() if held.in_flight == 0]
        for held in idle:
            if now - held.idle_since >= LINGER:
                self._give_back(held)
            else:
                self.plan_report()

    def _in_flight(self) -> dict[str, int]:
        return {one.info.id: one.in_flight for one in self._held.values()}
