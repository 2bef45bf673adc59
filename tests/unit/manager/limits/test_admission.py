"""Limits over several workers that hold shares: as exact as if the manager were asked for every request."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_api_server.auth.access import Limits
from llm_api_server.gateway.metering.quota_grant import HeldQuota
from llm_api_server.ipc import messages, quota_messages
from llm_api_server.ipc.quota_messages import NO_GRANT
from llm_api_server.manager.limits import admission as module
from llm_api_server.manager.limits.admission import AdmissionController
from llm_api_server.manager.limits.key_quota import MINUTE, KeyQuota

KEY = "id"
#: What was used of a share counts from the moment it is told, here at most this much later; windows step by 0.1.
LATE = 0.7


class Clock:
    now = 1000.0


class Worker:
    """Takes from its share where it can, as `gateway/accounts.py` does, and answers to the manager at once."""

    def __init__(self, admissions: AdmissionController) -> None:
        self.admissions = admissions
        self.share: HeldQuota | None = None
        self.numbers = iter(range(1, 1_000_000))
        self.answers: dict[int, Any] = {}
        self.taken: dict[int, tuple[HeldQuota, int]] = {}
        self.asked = 0
        admissions.hello(cast("Any", self), [])

    def send(self, message: Any) -> None:
        match message:
            case quota_messages.RevokeQuota():
                if self.share is not None:
                    self.share.is_revoked = True
                spend = self.share.report(returns=True, is_reply=True) if self.share else None
                self.tell(spend or quota_messages.ReportQuota(KEY, is_reply=True))
            case quota_messages.Admitted() | messages.Refused():
                self.answers[message.request] = message

    def tell(self, spend: quota_messages.ReportQuota | None) -> None:
        if spend is not None:
            self.admissions.spend(cast("Any", self), spend)

    def admit(self, limits: Limits, tokens: int = 0) -> int | None:
        """The number of an admitted request."""
        number = next(self.numbers)
        if self.share is not None and self.share.take(tokens):
            self.taken[number] = self.share, tokens
            return number
        self.asked += 1
        self.admissions.admit(cast("Any", self), quota_messages.Admit(number, KEY, "k", limits, tokens))
        answer = self.answers.pop(number)
        if isinstance(answer, messages.Refused):
            return None
        if answer.grant != NO_GRANT:
            self.share = self.share or HeldQuota(KEY, limits)
            self.share.add(answer.grant, answer.rate_limits)
        return number

    def settle(self, number: int, used: int) -> None:
        if number in self.taken:
            share, reserved = self.taken.pop(number)
            share.settle(reserved, used)
            if share.is_revoked:
                self.tell(share.report(returns=True))
        else:
            self.admissions.settle(cast("Any", self), number, used)

    def report(self) -> None:
        if self.share is not None:
            self.tell(self.share.report(returns=self.share.is_idle or self.share.is_revoked))


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_now", lambda: Clock.now)


def simulate(work: Any) -> None:
    """With the event loop that the manager's timers need."""

    async def run() -> None:
        Clock.now = 1000.0
        work(AdmissionController(cast("Any", None), lambda _key, _limit: None))

    asyncio.run(run())


steps = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30), st.floats(0, 12)), max_size=40)


@given(st.integers(1, 200), steps)
@settings(deadline=None)
def test_requests_per_minute_are_exact_over_workers(most: int, bursts: list[tuple[int, int, float]]) -> None:
    limits = Limits(requests_per_minute=most)

    def work(admissions: AdmissionController) -> None:
        workers = [Worker(admissions) for _ in range(4)]
        passed: list[float] = []
        for index, count, gap in bursts:
            for _ in range(count):
                number = workers[index].admit(limits)
                if number is None:
                    assert len([at for at in passed if at > Clock.now - MINUTE - LATE]) >= most
                else:
                    passed.append(Clock.now)
                    workers[index].settle(number, 0)
            Clock.now += min(gap, 0.5)
            for worker in workers:
                worker.report()
            Clock.now += max(0.0, gap - 0.5)
        for first, last in zip(passed, passed[most:], strict=False):
            assert last - first >= MINUTE

    simulate(work)


@given(st.integers(1, 60), st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=200))
@settings(deadline=None)
def test_concurrent_requests_are_exact_over_workers(most: int, moves: list[tuple[int, bool]]) -> None:
    limits = Limits(max_concurrent=most)

    def work(admissions: AdmissionController) -> None:
        workers = [Worker(admissions) for _ in range(4)]
        running: list[tuple[Worker, int]] = []
        for index, ends in moves:
            if ends and running:
                worker, number = running.pop(index % len(running))
                worker.settle(number, 0)
            else:
                found = workers[index].admit(limits)
                assert (found is not None) == (len(running) < most)
                if found is not None:
                    running.append((workers[index], found))

    simulate(work)


@given(
    st.integers(100, 5000), st.lists(st.tuples(st.integers(0, 3), st.integers(1, 50), st.integers(0, 50)), max_size=150)
)
@settings(deadline=None)
def test_budgets_are_spent_whole_and_not_exceeded(budget: int, requests: list[tuple[int, int, int]]) -> None:
    limits = Limits(tokens_per_minute=budget)

    def work(admissions: AdmissionController) -> None:
        workers = [Worker(admissions) for _ in range(4)]
        spent = 0
        for index, tokens, used in requests:
            number = workers[index].admit(limits, tokens)
            assert (number is not None) == (spent + tokens <= budget)
            if number is not None:
                workers[index].settle(number, min(used, tokens))
                spent += min(used, tokens)
        for worker in workers:
            worker.report()
        account: KeyQuota = admissions._opened[KEY].account if requests else KeyQuota()
        assert account.tokens.total(Clock.now) <= budget

    simulate(work)


def test_far_limits_are_seldom_asked_about() -> None:
    def work(admissions: AdmissionController) -> None:
        worker = Worker(admissions)
        limits = Limits(requests_per_minute=10**6, tokens_per_minute=10**9, max_concurrent=10**4)
        for _ in range(5000):
            number = worker.admit(limits, 500)
            assert number is not None
            worker.settle(number, 20)
        assert worker.asked < 50
        assert worker.share is not None
        for _ in range(3):
            worker.report()
        account = admissions._opened[KEY].account
        assert (account.running, account.shared_requests, account.shared_tokens) == (0, 0, 0)
        assert account.requests.total(Clock.now) == 5000
        assert account.tokens.total(Clock.now) == 5000 * 20

    simulate(work)


def test_a_worker_that_is_lost_gives_back_all_but_requests_that_may_have_passed() -> None:
    def work(admissions: AdmissionController) -> None:
        lost, other = Worker(admissions), Worker(admissions)
        limits = Limits(requests_per_minute=100, tokens_per_minute=10_000, max_concurrent=50)
        numbers = [lost.admit(limits, 10) for _ in range(3)]
        assert None not in numbers
        admissions.disconnected(cast("Any", lost))
        account = admissions._opened[KEY].account
        assert (account.running, account.shared_requests, account.shared_tokens) == (0, 0, 0)
        assert 3 <= account.requests.total(Clock.now) <= 3 + 100 // 8
        assert other.admit(limits, 10) is not None

    simulate(work)


def test_a_worker_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RECALL_TIMEOUT", 0.01)

    async def run() -> None:
        admissions = AdmissionController(cast("Any", None), lambda _key, _limit: None)
        frozen, other = Worker(admissions), Worker(admissions)
        limits = Limits(max_concurrent=20)
        assert frozen.admit(limits) is not None
        monkeypatch.setattr(frozen, "send", lambda _: None)
        for number in range(1000, 1020):
            admissions.admit(cast("Any", other), quota_messages.Admit(number, KEY, "k", limits))
            other.share = None
        while 1019 not in other.answers:
            await asyncio.sleep(0.005)
        kinds = [type(other.answers[number]) for number in range(1000, 1020)]
        assert kinds.count(quota_messages.Admitted) >= 10
        assert kinds[-1] is messages.Refused

    asyncio.run(run())
