"""Limits over several workers that hold granted quota: as exact as if the manager decided on every request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from llm_api_server.auth.access import Limits
from llm_api_server.gateway.metering.quota_grant import HeldQuota
from llm_api_server.ipc.messages import Refused
from llm_api_server.ipc.quota_messages import NO_GRANT, Admit, Admitted, ReportQuota, RevokeQuota, Settle
from llm_api_server.manager.limits.admission import AdmissionController
from llm_api_server.manager.limits.key_quota import KeyQuota
from llm_api_server.manager.limits.sliding_window import MINUTE
from llm_api_server.manager.worker_session import WorkerSession
from tests.waiting import until

KEY = "id"
#: Use of granted quota counts from the report, here at most this many seconds later; windows step by 0.1.
LATE = 0.7


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def unknown(_key_id: str) -> tuple[int, int]:
    raise AssertionError("no limit of these tests needs the database")


class Worker:
    """Takes from its quota where it can, as the gateway does, and replies to the manager at once."""

    def __init__(self, admissions: AdmissionController) -> None:
        self.admissions = admissions
        self.session = WorkerSession(self.receive)
        self.quota: HeldQuota | None = None
        self.numbers = iter(range(1, 1_000_000))
        self.responses: dict[int, Any] = {}
        self.taken: dict[int, tuple[HeldQuota, int]] = {}
        self.calls = 0
        admissions.register(self.session, [])

    def receive(self, message: Any) -> None:
        match message:
            case RevokeQuota():
                if self.quota is not None:
                    self.quota.is_revoked = True
                report = self.quota.report(returns=True, is_reply=True) if self.quota else None
                self.send(report or ReportQuota(KEY, is_reply=True))
            case Admitted() | Refused():
                self.responses[message.request] = message

    def send(self, report: ReportQuota | None) -> None:
        if report is not None:
            self.admissions.report(self.session, report)

    def admit(self, limits: Limits, tokens: int = 0) -> int | None:
        """Return the number of an admitted request."""
        number = next(self.numbers)
        if self.quota is not None and self.quota.take(tokens):
            self.taken[number] = self.quota, tokens
            return number
        self.calls += 1
        self.admissions.admit(self.session, Admit(number, KEY, "k", limits, tokens))
        response = self.responses.pop(number)
        if isinstance(response, Refused):
            return None
        if response.grant != NO_GRANT:
            self.quota = self.quota or HeldQuota(KEY, limits)
            self.quota.add(response.grant, response.rate_limits)
        return number

    def settle(self, number: int, used: int) -> None:
        if number in self.taken:
            quota, reserved = self.taken.pop(number)
            quota.settle(reserved, used)
            if quota.is_revoked:
                self.send(quota.report(returns=True))
        else:
            self.admissions.settle(self.session, Settle(number, used))

    def report(self) -> None:
        if self.quota is not None:
            self.send(self.quota.report(returns=self.quota.is_idle or self.quota.is_revoked))


def simulate(scenario: Callable[[AdmissionController, Clock], None]) -> None:
    """Run a scenario with the event loop that the manager's timers need."""

    async def run() -> None:
        clock = Clock()
        scenario(AdmissionController(unknown, lambda _key, _limit: None, clock=clock), clock)

    asyncio.run(run())


steps = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30), st.floats(0, 12)), max_size=40)


@given(st.integers(1, 200), steps)
@settings(deadline=None)
def test_requests_per_minute_are_exact_over_workers(limit: int, bursts: list[tuple[int, int, float]]) -> None:
    limits = Limits(requests_per_minute=limit)

    def scenario(admissions: AdmissionController, clock: Clock) -> None:
        workers = [Worker(admissions) for _ in range(4)]
        admitted: list[float] = []
        for index, count, gap in bursts:
            for _ in range(count):
                number = workers[index].admit(limits)
                if number is None:
                    assert len([at for at in admitted if at > clock.now - MINUTE - LATE]) >= limit
                else:
                    admitted.append(clock.now)
                    workers[index].settle(number, 0)
            clock.now += min(gap, 0.5)
            for worker in workers:
                worker.report()
            clock.now += max(0.0, gap - 0.5)
        for first, last in zip(admitted, admitted[limit:], strict=False):
            assert last - first >= MINUTE

    simulate(scenario)


@given(st.integers(1, 60), st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=200))
@settings(deadline=None)
def test_concurrent_requests_are_exact_over_workers(limit: int, moves: list[tuple[int, bool]]) -> None:
    limits = Limits(max_concurrent=limit)

    def scenario(admissions: AdmissionController, _clock: Clock) -> None:
        workers = [Worker(admissions) for _ in range(4)]
        running: list[tuple[Worker, int]] = []
        for index, ends in moves:
            if ends and running:
                worker, number = running.pop(index % len(running))
                worker.settle(number, 0)
            else:
                found = workers[index].admit(limits)
                assert (found is not None) == (len(running) < limit)
                if found is not None:
                    running.append((workers[index], found))

    simulate(scenario)


@given(
    st.integers(100, 5000), st.lists(st.tuples(st.integers(0, 3), st.integers(1, 50), st.integers(0, 50)), max_size=150)
)
@settings(deadline=None)
def test_budgets_are_spent_whole_and_not_exceeded(budget: int, requests: list[tuple[int, int, int]]) -> None:
    limits = Limits(tokens_per_minute=budget)

    def scenario(admissions: AdmissionController, clock: Clock) -> None:
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
        quota = admissions._quota(KEY) if requests else KeyQuota()
        assert quota.tokens.total(clock.now) <= budget

    simulate(scenario)


def test_a_key_far_from_its_limits_is_seldom_asked_about() -> None:
    def scenario(admissions: AdmissionController, clock: Clock) -> None:
        worker = Worker(admissions)
        limits = Limits(requests_per_minute=10**6, tokens_per_minute=10**9, max_concurrent=10**4)
        for _ in range(5000):
            number = worker.admit(limits, 500)
            assert number is not None
            worker.settle(number, 20)
        assert worker.calls < 50
        assert worker.quota is not None
        for _ in range(3):
            worker.report()
        quota = admissions._quota(KEY)
        assert (quota.running, quota.granted_requests, quota.granted_tokens) == (0, 0, 0)
        assert quota.requests.total(clock.now) == 5000
        assert quota.tokens.total(clock.now) == 5000 * 20

    simulate(scenario)


def test_a_lost_worker_gives_back_all_but_requests_that_it_may_have_admitted() -> None:
    def scenario(admissions: AdmissionController, clock: Clock) -> None:
        lost, other = Worker(admissions), Worker(admissions)
        limits = Limits(requests_per_minute=100, tokens_per_minute=10_000, max_concurrent=50)
        numbers = [lost.admit(limits, 10) for _ in range(3)]
        assert None not in numbers
        admissions.disconnect(lost.session)
        quota = admissions._quota(KEY)
        assert (quota.running, quota.granted_requests, quota.granted_tokens) == (0, 0, 0)
        assert 3 <= quota.requests.total(clock.now) <= 3 + 100 // 8
        assert other.admit(limits, 10) is not None

    simulate(scenario)


def test_a_worker_that_does_not_return_its_quota_is_not_waited_for() -> None:
    async def run() -> None:
        admissions = AdmissionController(unknown, lambda _key, _limit: None, revoke_timeout=0.01)
        frozen, other = Worker(admissions), Worker(admissions)
        limits = Limits(max_concurrent=20)
        assert frozen.admit(limits) is not None
        frozen.session.send = lambda _: None
        for number in range(1000, 1020):
            admissions.admit(other.session, Admit(number, KEY, "k", limits))
            other.quota = None
        await until(lambda: 1019 in other.responses)
        kinds = [type(other.responses[number]) for number in range(1000, 1020)]
        assert kinds.count(Admitted) >= 10
        assert kinds[-1] is Refused

    asyncio.run(run())
