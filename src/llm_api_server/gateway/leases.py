"""Leases on instances, the latest model states, load and unload commands: what the manager decides of models.

A part of the worker's link to the manager (`link.py`). Requests under way never notice a loss of the connection.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from llm_api_server import control
from llm_api_server.control import Explained, Explanation, InstanceInfo, Models, ModelStatus
from llm_api_server.errors import ShuttingDown
from llm_api_server.gateway.link import ManagerLink
from llm_api_server.types import Task

REPORT_INTERVAL = 0.25
#: Seconds that an instance without requests is kept, unless it is to drain: traffic with short gaps asks nobody.
LINGER = 0.5


class Lease:
    """The right to run one request on `instance`; `release` exactly once (again is harmless)."""

    __slots__ = ("_held", "_owner", "instance")

    def __init__(self, owner: Leases, held: _Held) -> None:
        self._owner = owner
        self._held: _Held | None = held
        self.instance = held.info

    def release(self, *, broken: bool = False) -> None:
        """`broken`: the instance did not answer, so nothing more is started there before the manager says so."""
        held, self._held = self._held, None
        if held is not None:
            held.is_drained = held.is_drained or broken
            self._owner.on_release(held)


class _Held:
    """An instance that this worker has grants for."""

    __slots__ = ("grants", "idle_since", "in_flight", "info", "is_drained")

    def __init__(self, info: InstanceInfo) -> None:
        self.info = info
        self.grants = 0
        self.idle_since = 0.0
        self.in_flight = 0
        self.is_drained = False

    def is_usable(self, model: str, task: Task | None) -> bool:
        return self.info.model == model and self.info.does(task) and not self.is_drained


class Leases:
    """All leases of one worker. `models` is the manager's latest word on every configured model."""

    def __init__(self, link: ManagerLink) -> None:
        self.link = link
        self._held: dict[str, _Held] = {}
        #: What is asked for, by the number of the question; a lease from the moment it is granted.
        self._waiting: dict[int, Lease | None] = {}
        self._report_timer: asyncio.TimerHandle | None = None
        self.models: Mapping[str, ModelStatus] = {}
        self.handlers: dict[type, Callable[[Any], None]] = {
            control.Granted: self._on_granted,
            control.Drain: self._on_drain,
            control.Models: self._on_models,
        }
        link.add(self)

    def close(self) -> None:
        if self._report_timer is not None:
            self._report_timer.cancel()
            self._report_timer = None

    async def acquire(self, model: str, task: Task | None = None) -> Lease:
        """A lease on an instance of `model` that does `task`: at once where this worker uses one, else when ready.

        Raises the manager's refusal as an `ApiError`.
        """
        if self.link.is_closing:
            raise ShuttingDown("This server is shutting down.")
        lease = self.acquire_at_once(model, task)
        if lease is not None:
            return lease
        question = control.Acquire(self.link.number(), model, task)
        self._waiting[question.request] = None
        try:
            await self.link.ask(question)
        except asyncio.CancelledError:
            self._give_up(question.request)
            raise
        except BaseException:
            del self._waiting[question.request]
            raise
        lease = self._waiting.pop(question.request)
        assert lease is not None, "what the manager answers to that"
        return lease

    def acquire_at_once(self, model: str, task: Task | None) -> Lease | None:
        """On an instance that this worker uses."""
        if self.link.is_closing:
            return None
        best: _Held | None = None
        for held in self._held.values():
            if held.is_usable(model, task) and (best is None or held.in_flight < best.in_flight):
                best = held
        return self._lease(best) if best is not None else None

    async def load(self, model: str, *, wait: bool) -> list[ModelStatus]:
        """Raises `ApiError` when the manager refuses, for example because the load failed."""
        return await self._models_after(control.LoadModel(self.link.number(), model, wait))

    async def unload(self, model: str, *, wait: bool) -> list[ModelStatus]:
        return await self._models_after(control.UnloadModel(self.link.number(), model, wait))

    async def list_models(self) -> list[ModelStatus]:
        """Fresh figures (memory, in flight) where `models` has those of the last change."""
        return await self._models_after(control.ListModels(self.link.number()))

    async def explain(self, model: str) -> Explanation:
        """Whether it would fit. Raises `ApiError` when its files are bad."""
        answer = await self.link.ask(control.ExplainModel(self.link.number(), model), repeats=False)
        assert isinstance(answer, Explained), "what the manager answers to that"
        return answer.explanation

    async def _models_after(self, message: control.Command) -> list[ModelStatus]:
        answer = await self.link.ask(message, repeats=False)
        assert isinstance(answer, Models), "what the manager answers to these"
        return answer.models

    # ── leases ──

    def _lease(self, held: _Held) -> Lease:
        held.in_flight += 1
        self._plan_report()
        return Lease(self, held)

    def on_release(self, held: _Held) -> None:
        """Called by `Lease.release`. All grants are given back when there has been none in flight for a while."""
        held.in_flight -= 1
        held.idle_since = time.monotonic()
        self._plan_report()
        if held.is_drained:
            self._return_grants(held)

    def _return_grants(self, held: _Held) -> None:
        if held.in_flight > 0 or self._held.get(held.info.id) is not held:
            return
        del self._held[held.info.id]
        self.link.send(control.Release(held.info.id, held.grants))

    def _give_up(self, request: int) -> None:
        lease = self._waiting.pop(request)
        if lease is None:
            self.link.send(control.Cancel(request))
        else:
            lease.release()

    def _on_granted(self, granted: control.Granted) -> None:
        held = self._held.setdefault(granted.instance.id, _Held(granted.instance))
        held.grants += 1
        held.is_drained = False
        if granted.request in self._waiting:
            self._waiting[granted.request] = self._lease(held)
        else:
            self._return_grants(held)  # whoever asked has left

    def _on_drain(self, drain: control.Drain) -> None:
        held = self._held.get(drain.instance)
        if held is not None:
            held.is_drained = True
            self._return_grants(held)

    def _on_models(self, answer: Models) -> None:
        self.models = {model.id: model for model in answer.models}

    # ── the connection ──

    def greet(self, hello: control.Hello) -> None:
        for held in self._held.values():
            held.grants = 1  # what the manager takes each instance of a Hello for
        hello.in_flight = self._in_flight()

    def connected(self) -> None:
        """`greet` has said it all."""

    def _plan_report(self) -> None:
        if self._report_timer is None:
            self._report_timer = asyncio.get_running_loop().call_later(REPORT_INTERVAL, self._report)

    def _report(self) -> None:
        self._report_timer = None
        self.link.send(control.Report(self._in_flight()))
        now = time.monotonic()
        idle = [held for held in self._held.values() if held.in_flight == 0]
        for held in idle:
            if now - held.idle_since >= LINGER:
                self._return_grants(held)
            else:
                self._plan_report()

    def _in_flight(self) -> dict[str, int]:
        return {one.info.id: one.in_flight for one in self._held.values()}
