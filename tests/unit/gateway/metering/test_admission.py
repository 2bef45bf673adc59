"""Admissions of a worker, against the fake manager on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from llm_api_server.auth.access import NO_LIMITS, Limits
from llm_api_server.errors import InsufficientQuota
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.gateway.metering.admission import AdmissionClient
from llm_api_server.gateway.metering.ratelimit_headers import ratelimit_headers
from llm_api_server.gateway.metering.request_record import RequestRecord
from llm_api_server.ipc.messages import Hello, Refused
from llm_api_server.ipc.quota_messages import (
    NO_GRANT,
    Admit,
    Admitted,
    QuotaGrant,
    RateLimit,
    RateLimits,
    ReportQuota,
    Settle,
)
from llm_api_server.ipc.usage_events import NO_USAGE, Usage
from tests.fake_manager import FakeManager
from tests.unit.gateway.metering.records import LIMITS, new_record
from tests.waiting import until

pytestmark = pytest.mark.anyio

FAR = Limits(requests_per_minute=1000)


@pytest.fixture
async def admission(link: ManagerLink) -> AsyncIterator[AdmissionClient]:
    one = AdmissionClient(link, report_interval=0.02)
    await link.start()
    await until(lambda: link.is_connected)
    yield one
    one.close()


def end(admission: AdmissionClient, record: RequestRecord, usage: Usage = NO_USAGE) -> None:
    assert record.admission is not None
    admission.settle(record.admission, usage)


async def test_limited_requests_are_admitted_and_settled_once(admission: AdmissionClient, manager: FakeManager) -> None:
    manager.rate_limits = RateLimits(requests=RateLimit(10, 9, 60.0))
    record = new_record()
    await admission.admit(record, 100, 50)
    end(admission, record, Usage(30, 12))
    end(admission, record, Usage(30, 12))
    await until(lambda: manager.received_of(Settle))
    (admit,) = manager.received_of(Admit)
    assert (admit.key_id, admit.name, admit.limits) == ("id-of-ann", "ann", LIMITS)
    assert (admit.tokens, admit.optional_tokens) == (100, 50)
    assert manager.received_of(Settle) == [Settle(admit.request, 42)]
    assert record.limit_lines == ratelimit_headers(manager.rate_limits)


async def test_keys_without_limits_cost_no_message(
    admission: AdmissionClient, link: ManagerLink, manager: FakeManager
) -> None:
    record = new_record(NO_LIMITS)
    await admission.admit(record, 100, 50)
    assert record.key is not None
    assert await admission.peek(record.key) is None
    assert record.admission is None
    await admission.admit(new_record(), 1, 0)
    assert [type(message) for message in manager.received] == [Hello, Admit], "only that of the limited key"


async def test_a_refusal_carries_the_rate_limits(admission: AdmissionClient, manager: FakeManager) -> None:
    rate_limits = RateLimits(requests=RateLimit(10, 0, 12.5))
    manager.refusal = lambda request: Refused(
        request, "insufficient_quota", "no", 3600, should_retry=False, rate_limits=rate_limits
    )
    record = new_record()
    with pytest.raises(InsufficientQuota) as caught:
        await admission.admit(record, 1, 0)
    assert (caught.value.retry_after, caught.value.should_retry) == (3600, False)
    assert record.limit_lines == ratelimit_headers(rate_limits)


async def test_a_request_cancelled_before_the_decision_is_settled_with_nothing(
    admission: AdmissionClient, manager: FakeManager
) -> None:
    manager.hold = True
    admitting = asyncio.create_task(admission.admit(new_record(), 1, 0))
    await until(lambda: manager.received_of(Admit))
    admitting.cancel()
    await until(lambda: manager.received_of(Settle))
    (admit,) = manager.received_of(Admit)
    assert manager.received_of(Settle) == [Settle(admit.request, 0)]


async def test_requests_are_admitted_from_granted_quota_until_it_is_revoked(
    admission: AdmissionClient, manager: FakeManager
) -> None:
    limits = Limits(requests_per_minute=1000, max_concurrent=100)
    manager.rate_limits = RateLimits(requests=RateLimit(1000, 990, 60.0))
    manager.grant = QuotaGrant(requests=5, concurrent=5)
    records = [new_record(limits) for _ in range(5)]
    await admission.admit(records[0], 10, 0)
    manager.grant = NO_GRANT
    for record in records[1:]:
        await admission.admit(record, 10, 0)
    assert len(manager.received_of(Admit)) == 1
    assert records[4].limit_lines == ratelimit_headers(RateLimits(requests=RateLimit(1000, 986, 60.0)))
    for record in records[:3]:
        end(admission, record)
    manager.revoke_quota("id-of-ann")
    await until(lambda: any(one.is_reply for one in manager.received_of(ReportQuota)))
    end(admission, records[3])
    end(admission, records[4])
    await until(lambda: sum(one.returned.concurrent for one in manager.received_of(ReportQuota)) == 5)
    reports = manager.received_of(ReportQuota)
    assert (sum(one.requests for one in reports), sum(one.returned.requests for one in reports)) == (4, 1)
    assert len(manager.received_of(Settle)) == 1
    await admission.admit(new_record(limits), 10, 0)
    assert len(manager.received_of(Admit)) == 2


async def test_granted_quota_that_no_request_uses_goes_back(admission: AdmissionClient, manager: FakeManager) -> None:
    manager.grant = QuotaGrant(requests=5)
    record = new_record(FAR)
    await admission.admit(record, 10, 0)
    end(admission, record)
    await until(lambda: manager.received_of(ReportQuota))
    assert manager.received_of(ReportQuota) == [ReportQuota("id-of-ann", returned=QuotaGrant(requests=5))]
    assert not admission._held


async def test_a_new_manager_learns_of_requests_admitted_from_granted_quota(
    admission: AdmissionClient, manager: FakeManager
) -> None:
    limits = Limits(max_concurrent=100, tokens_per_minute=10_000)
    manager.grant = QuotaGrant(concurrent=5, tokens=500)
    first, second = new_record(limits), new_record(limits)
    await admission.admit(first, 10, 0)
    await admission.admit(second, 20, 0)
    await manager.stop()
    manager.received.clear()
    await manager.start()
    await until(lambda: manager.received_of(Hello))
    (hello,) = manager.received_of(Hello)
    assert sorted(one.reserved for one in hello.admitted) == [10, 20]
    end(admission, second)
    await until(lambda: manager.received_of(Settle))
    assert manager.received_of(Settle) == [Settle(second.admission or 0, 0)]


async def test_a_key_with_changed_limits_gets_nothing_from_its_old_grant(
    admission: AdmissionClient, manager: FakeManager
) -> None:
    manager.grant = QuotaGrant(requests=5)
    await admission.admit(new_record(FAR), 10, 0)
    await admission.admit(new_record(Limits(requests_per_minute=500)), 10, 0)
    assert [one.limits.requests_per_minute for one in manager.received_of(Admit)] == [1000, 500]
    await until(lambda: any(one.returned.requests == 5 for one in manager.received_of(ReportQuota)))


async def test_quota_that_is_revoked_right_behind_its_grant_goes_back(
    admission: AdmissionClient, manager: FakeManager
) -> None:
    manager.grant = QuotaGrant(requests=5)
    manager.revokes_at_once = True
    await admission.admit(new_record(FAR), 10, 0)
    await until(lambda: manager.received_of(ReportQuota))
    assert manager.received_of(ReportQuota) == [
        ReportQuota("id-of-ann", returned=QuotaGrant(requests=5), is_reply=True)
    ]
    assert not admission.admit_from_held(new_record(FAR), 10)


async def test_the_grant_of_a_request_cancelled_meanwhile_is_kept(
    admission: AdmissionClient, link: ManagerLink, manager: FakeManager
) -> None:
    manager.hold = True
    admitting = asyncio.create_task(admission.admit(new_record(FAR), 1, 0))
    await until(lambda: manager.received_of(Admit))
    admitting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await admitting
    (admit,) = manager.received_of(Admit)
    link.on_message(Admitted(admit.request, RateLimits(), 1, QuotaGrant(requests=5)))
    assert not admission._admitted
    assert admission.admit_from_held(new_record(FAR), 1)
