"""Leases on slots of instances, and the latest state of every model, on the worker's loop.

On instances with many slots the worker holds a batch of slots until they are revoked, so that steady traffic needs no
round trip. Running requests never notice a loss of the connection.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from llm_api_server.errors import ShuttingDown
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.ipc.lease_messages import (
    NO_CLAIM,
    Acquire,
    Cancel,
    Claim,
    EndedRequest,
    Granted,
    InstanceInfo,
    PrefillDone,
    Queued,
    ReportInFlight,
    ReturnSlots,
    RevokeSlots,
)
from llm_api_server.ipc.messages import Hello, Models
from llm_api_server.ipc.model_status import ModelStatus
from llm_api_server.types import Task

#: Seconds between two reports of requests in flight.
REPORT_INTERVAL = 0.25
#: Seconds that idle slots are kept unless they are revoked, so that traffic with short gaps needs no round trip.
LINGER = 0.5


class Lease:
    """A slot for one request on `instance`. Releasing it again has no effect.

    `prefilling` is the number of the request whose prefill the manager waits for, or None.
    """

    __slots__ = ("_cost", "_held", "_is_blocked", "_key_id", "_owner", "instance", "prefilling")

    _held: HeldSlots | None

    def __init__(self, owner: Leases, held: HeldSlots, key_id: str, cost: int, prefilling: int | None) -> None:
        self._owner = owner
        self._held = held
        self._key_id = key_id
        self._cost = cost
        self.prefilling = prefilling
        self._is_blocked = False
        self.instance = held.info

    def on_prefill_done(self) -> None:
        """Report that the engine has processed the prompt, or that nothing will show when it has."""
        number, self.prefilling = self.prefilling, None
        if number is not None:
            self._owner.link.send(PrefillDone(number))

    def on_blocked(self, *, is_blocked: bool) -> None:
        """Report that the client has stopped reading the response, or has resumed."""
        if is_blocked != self._is_blocked and self._held is not None:
            self._is_blocked = is_blocked
            self._held.blocked += 1 if is_blocked else -1
            self._owner.plan_report()

    @property
    def needs_cost(self) -> bool:
        """Whether the manager schedules by the cost of this request: other requests wait for its slot."""
        return self._held is not None and not self._held.until_revoked

    def release(self, cost: int | None = None, *, is_broken: bool = False) -> None:
        """End the request. `cost` is what it cost the engine, where that is known.

        With `is_broken` the instance did not respond, so no request starts there before the manager grants a slot.
        """
        held, self._held = self._held, None
        if held is None:
            return
        try:
            if self.prefilling is not None:
                self.on_prefill_done()
        finally:
            if self._is_blocked:
                held.blocked -= 1
            if is_broken:
                held.until_revoked = False
            if not held.until_revoked:  # otherwise no request waits, and no cost decides which is next
                held.ended.append(EndedRequest(self._key_id, 0 if cost is None else cost - self._cost))
            self._owner.on_release(held)


class HeldSlots:
    """Slots of one instance that this worker holds, for one request each or until they are revoked."""

    __slots__ = ("blocked", "ended", "idle_since", "in_flight", "info", "model", "slots", "tasks", "until_revoked")

    def __init__(self, info: InstanceInfo) -> None:
        self.info = info
        self.model, self.tasks = info.model, info.tasks
        self.slots = 0
        self.in_flight = 0
        self.blocked = 0
        self.until_revoked = False
        self.ended: list[EndedRequest] = []
        self.idle_since = 0.0


class _Pending:
    """A request that waits for an instance. It has a lease from the moment it is granted one."""

    __slots__ = ("claim", "lease", "on_position")

    def __init__(self, claim: Claim, on_position: Callable[[int], None]) -> None:
        self.claim = claim
        self.on_position = on_position
        self.lease: Lease | None = None


class Leases:
    """Leases of one worker. `models` has the latest state of every configured model."""

    def __init__(self, link: ManagerLink, report_interval: float = REPORT_INTERVAL, linger: float = LINGER) -> None:
        self.link = link
        self.models: Mapping[str, ModelStatus] = {}
        self._report_interval = report_interval
        self._linger = linger
        self._held: dict[str, HeldSlots] = {}
        self._pending: dict[int, _Pending] = {}
        self._report_timer: asyncio.TimerHandle | None = None
        link.register(
            {
                Granted: self._on_granted,
                Queued: self._on_queued,
                RevokeSlots: self._on_revoke,
                Models: self._on_models,
            },
            on_connect=self._on_connect,
        )

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
        """Wait for a slot on an instance of `model` that supports `task`.

        `on_position` is called with the request's position in the queue, from 1. Raises the manager's refusal as an
        `ApiError`.
        """
        if self.link.is_closing:
            raise ShuttingDown("This server is shutting down.")
        lease = self.take(model, task, claim.key_id)
        if lease is not None:
            return lease
        number = self.link.next_number()
        self._pending[number] = pending = _Pending(claim, on_position)
        try:
            await self.link.call(Acquire(number, model, task, claim))
        except asyncio.CancelledError:
            if pending.lease is None:
                self.link.send(Cancel(number))
            else:
                pending.lease.release()
            raise
        finally:
            del self._pending[number]
        assert pending.lease is not None, "the response was Granted"
        return pending.lease

    def take(self, model: str, task: Task | None, key_id: str = "") -> Lease | None:
        """Take a free slot that this worker holds, on the instance with the fewest requests in flight."""
        if self.link.is_closing:
            return None
        best: HeldSlots | None = None
        for held in self._held.values():
            if (
                held.model == model
                and held.until_revoked
                and held.slots > held.in_flight
                and (best is None or held.in_flight < best.in_flight)
                and (held.tasks is None or task is None or task in held.tasks)
            ):
                best = held
        return self._lease(best, key_id, 0, None) if best is not None else None

    def _lease(self, held: HeldSlots, key_id: str, cost: int, prefilling: int | None) -> Lease:
        held.in_flight += 1
        if self._report_timer is None:
            self.plan_report()
        return Lease(self, held, key_id, cost, prefilling)

    def on_release(self, held: HeldSlots) -> None:
        """Count the end of a request. Slots held until they are revoked go back after they have been idle."""
        held.in_flight -= 1
        if not held.in_flight:
            held.idle_since = time.monotonic()
        if self._report_timer is None:
            self.plan_report()
        if not held.until_revoked:
            self._return_free(held)

    def _return_free(self, held: HeldSlots) -> None:
        free = held.slots - held.in_flight
        if free <= 0 or self._held.get(held.info.id) is not held:
            return
        held.slots -= free
        if not held.slots:
            del self._held[held.info.id]
        ended, held.ended = held.ended, []
        self.link.send(ReturnSlots(held.info.id, free, ended))

    def _on_granted(self, granted: Granted) -> None:
        held = self._held.setdefault(granted.instance.id, HeldSlots(granted.instance))
        held.slots += granted.slots
        held.until_revoked = granted.until_revoked
        pending = self._pending.get(granted.request)
        if pending is not None:
            prefilling = None if granted.until_revoked or not pending.claim.prefill_tokens else granted.request
            pending.lease = self._lease(held, pending.claim.key_id, pending.claim.cost, prefilling)
        else:  # the request was cancelled meanwhile
            self._lease(held, granted.key_id, 0, granted.request).release()

    def _on_queued(self, queued: Queued) -> None:
        pending = self._pending.get(queued.number)
        if pending is not None:
            pending.on_position(queued.position)

    def _on_revoke(self, revoke: RevokeSlots) -> None:
        held = self._held.get(revoke.instance)
        if held is not None:
            held.until_revoked = False
            self._return_free(held)

    def _on_models(self, message: Models) -> None:
        self.models = {model.id: model for model in message.models}

    def _on_connect(self, hello: Hello) -> None:
        """Keep only the slots in use: a new manager restores no others."""
        for held in list(self._held.values()):
            held.slots = held.in_flight
            held.ended.clear()
            if not held.slots:
                del self._held[held.info.id]
        hello.in_flight = self._in_flight()

    def plan_report(self) -> None:
        if self._report_timer is None:
            self._report_timer = asyncio.get_running_loop().call_later(self._report_interval, self._report)

    def _report(self) -> None:
        self._report_timer = None
        blocked = {one.info.id: one.blocked for one in self._held.values() if one.blocked}
        self.link.send(ReportInFlight(self._in_flight(), blocked))
        now = time.monotonic()
        idle = [held for held in self._held.values() if held.in_flight == 0]
        for held in idle:
            if now - held.idle_since >= self._linger:
                self._return_free(held)
            else:
                self.plan_report()

    def _in_flight(self) -> dict[str, int]:
        return {one.info.id: one.in_flight for one in self._held.values()}
