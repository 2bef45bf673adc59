"""Admissions and reports of a worker, against the fake manager on a real socket."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llm_api_server.auth.access import NO_LIMITS, Key, Limits
from llm_api_server.errors import InsufficientQuota
from llm_api_server.gateway.manager_link.key_source import KeySource
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.gateway.metering import admission as module
from llm_api_server.gateway.metering.admission import AdmissionClient
from llm_api_server.gateway.metering.ratelimit_headers import ratelimit_headers
from llm_api_server.gateway.metering.request_record import RequestRecord
from llm_api_server.ipc import messages, quota_messages
from llm_api_server.ipc.quota_messages import RateLimit, RateLimits
from llm_api_server.ipc.run_dir import RunDir
from llm_api_server.ipc.usage_events import Usage
from tests.fake_manager import FakeManager
from tests.waiting import until

pytestmark = pytest.mark.anyio

LIMITS = Limits(requests_per_minute=10)


def a_record(limits: Limits = LIMITS) -> RequestRecord:
    record = RequestRecord("req", "POST", "/v1/chat/completions", time.monotonic())
    record.key = Key("ann", "id-of-ann", frozenset({"all"}), limits=limits)
    record.model = "m"
    return record


@pytest.fixture
async def manager() -> AsyncIterator[FakeManager]:
    with tempfile.TemporaryDirectory(prefix="gw-") as path:
        one = FakeManager(RunDir(Path(path)), [], {})
        await one.start()
        yield one
        await one.stop()


@pytest.fixture
async def link(manager: FakeManager, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ManagerLink]:
    monkeypatch.setattr(module, "REPORT_INTERVAL", 0.02)
    one = ManagerLink(manager.run_dir, lambda _: None)
    yield one
    await one.close()


@pytest.fixture
async def accounts(link: ManagerLink) -> AsyncIterator[AdmissionClient]:
    one = AdmissionClient(link)
    await link.start()
    await until(lambda: link.is_connected)
    yield one
    one.close()


def reports(manager: FakeManager) -> list[messages.ReportUsage]:
    return manager.heard_of(messages.ReportUsage)


async def test_limited_requests_are_admitted_and_settled(accounts: AdmissionClient, manager: FakeManager) -> None:
    manager.standing = RateLimits(requests=RateLimit(10, 9, 60.0))
    record = a_record()
    await accounts.admit(record, 100, 50)
    record.usage = Usage(30, 12)
    accounts.end(record)
    accounts.end(record)
    await until(lambda: manager.heard_of(quota_messages.Settle))
    (asked,) = manager.heard_of(quota_messages.Admit)
    assert (asked.key_id, asked.name, asked.limits, asked.tokens, asked.optional_tokens) == (
        "id-of-ann",
        "ann",
        LIMITS,
        100,
        50,
    )
    assert manager.heard_of(quota_messages.Settle) == [quota_messages.Settle(asked.request, 42)]
    assert record.limit_lines == ratelimit_headers(manager.standing)


async def test_keys_without_limits_cost_no_question(accounts: AdmissionClient, manager: FakeManager) -> None:
    record = a_record(NO_LIMITS)
    await accounts.admit(record, 100, 50)
    assert record.key is not None
    assert await accounts.look(record.key) is None
    accounts.end(record)
    await asyncio.sleep(0.05)
    assert not manager.heard_of(quota_messages.Admit) + manager.heard_of(quota_messages.Settle)


async def test_a_refusal_comes_with_the_standing(accounts: AdmissionClient, manager: FakeManager) -> None:
    standing = RateLimits(requests=RateLimit(10, 0, 12.5))
    manager.refusal = lambda request: messages.Refused(
        request, "insufficient_quota", "no", 3600, should_retry=False, rate_limits=standing
    )
    record = a_record()
    with pytest.raises(InsufficientQuota) as caught:
        await accounts.admit(record, 1, 0)
    assert (caught.value.retry_after, caught.value.should_retry) == (3600, False)
    assert record.limit_lines == ratelimit_headers(standing)
    assert ratelimit_headers(standing).splitlines() == [
        b"x-ratelimit-limit-requests: 10",
        b"x-ratelimit-remaining-requests: 0",
        b"x-ratelimit-reset-requests: 13s",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, b"0ms"), (0.12, b"120ms"), (1, b"1s"), (59.2, b"1m0s"), (360, b"6m0s")]
)
def test_durations_look_as_openai_writes_them(seconds: float, text: bytes) -> None:
    assert ratelimit_headers(RateLimits(tokens=RateLimit(1, 1, seconds))).endswith(
        b"x-ratelimit-reset-tokens: " + text + b"\r\n"
    )


async def test_who_leaves_while_asking_gives_back_what_may_be_granted(
    accounts: AdmissionClient, manager: FakeManager
) -> None:
    manager.hold = True
    asking = asyncio.create_task(accounts.admit(a_record(), 1, 0))
    await until(lambda: manager.heard_of(quota_messages.Admit))
    asking.cancel()
    await until(lambda: manager.heard_of(quota_messages.Settle))
    assert manager.heard_of(quota_messages.Settle) == [
        quota_messages.Settle(manager.heard_of(quota_messages.Admit)[0].request, 0)
    ]


async def test_rows_start_go_on_and_end_once(accounts: AdmissionClient, manager: FakeManager) -> None:
    record = a_record(NO_LIMITS)
    accounts.start(record)
    await until(lambda: reports(manager))
    record.usage = Usage(7, 3)
    await until(lambda: any(report.batch.progress for report in reports(manager)))
    record.status, record.seconds, record.instance = 200, 1.5, "i"
    accounts.end(record)
    accounts.end(record)
    await until(lambda: any(report.batch.ended for report in reports(manager)))
    await asyncio.sleep(0.1)
    started = [one for report in reports(manager) for one in report.batch.started]
    progress = [one for report in reports(manager) for one in report.batch.progress]
    ended = [one for report in reports(manager) for one in report.batch.ended]
    assert [(one.row, one.key_name, one.model, one.endpoint) for one in started] == [
        (record.row, "ann", "m", "/v1/chat/completions")
    ]
    assert [one.usage for one in progress] == [Usage(7, 3)]
    assert [(one.row, one.status, one.usage, one.duration, one.instance) for one in ended] == [
        (record.row, 200, Usage(7, 3), 1.5, "i")
    ]


async def test_the_length_of_the_prompt_counts_until_the_engine_tells(
    accounts: AdmissionClient, manager: FakeManager
) -> None:
    record = a_record(NO_LIMITS)
    accounts.start(record)
    record.prompt_estimate = 50
    record.usage = Usage(0, 4)
    assert record.usage_or_estimate() == Usage(50, 4)
    accounts.end(record)
    await until(lambda: any(report.batch.whole for report in reports(manager)))
    assert [one.usage for report in reports(manager) for one in report.batch.whole] == [Usage(50, 4)]


async def test_what_no_manager_has_kept_is_said_to_the_next_one(
    accounts: AdmissionClient, manager: FakeManager
) -> None:
    manager.keeps_usage = False
    running, over = a_record(), a_record(NO_LIMITS)
    await accounts.admit(running, 20, 0)
    accounts.start(over)
    accounts.end(over)
    await until(lambda: reports(manager))
    await manager.stop()
    manager.heard.clear()
    manager.keeps_usage = True
    await manager.start()
    await until(lambda: reports(manager))
    (hello,) = manager.heard_of(messages.Hello)
    assert [(one.key_id, one.reserved) for one in hello.admitted] == [("id-of-ann", 20)]
    assert [one.row for one in reports(manager)[0].batch.whole] == [over.row]
    await until(lambda: not accounts._sent)


async def test_closing_says_the_rest(link: ManagerLink, manager: FakeManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPORT_INTERVAL", 1000)
    accounts = AdmissionClient(link)
    await link.start()
    await until(lambda: link.is_connected)
    record = a_record(NO_LIMITS)
    accounts.start(record)
    accounts.end(record)
    accounts.close()
    await link.close()
    await until(lambda: reports(manager))
    assert [one.row for one in reports(manager)[0].batch.whole] == [record.row]


async def test_keys_are_asked_for_and_forgotten(link: ManagerLink, manager: FakeManager) -> None:
    key = Key("bob", "id-of-bob", frozenset({"chat"}), limits=LIMITS, networks=("10.0.0.0/8",), expires_at=5.0)
    manager.keys = {"d" * 64: key, "id-of-bob": key}
    source = KeySource(link)
    forgotten: list[object] = []
    source.when_changed(forgotten.append)
    await link.start()
    assert await source.find(digest="d" * 64) == key
    assert await source.find(key_id="id-of-bob") == key
    assert await source.find(digest="e" * 64) is None
    assert forgotten == [None]
    manager.change_keys(["id-of-bob"])
    await until(lambda: len(forgotten) == 2)
    assert forgotten[1] == ["id-of-bob"]
    await manager.stop()
    await manager.start()
    await until(lambda: len(forgotten) == 3)
    assert forgotten[2] is None


async def test_requests_are_admitted_from_a_share_until_it_is_recalled(
    accounts: AdmissionClient, manager: FakeManager
) -> None:
    limits = Limits(requests_per_minute=1000, max_concurrent=100)
    manager.standing = RateLimits(requests=RateLimit(1000, 990, 60.0))
    manager.share = quota_messages.QuotaGrant(requests=5, concurrent=5)
    records = [a_record(limits) for _ in range(5)]
    await accounts.admit(records[0], 10, 0)
    manager.share = quota_messages.NO_GRANT
    for record in records[1:]:
        await accounts.admit(record, 10, 0)
    assert len(manager.heard_of(quota_messages.Admit)) == 1
    assert records[4].limit_lines == ratelimit_headers(RateLimits(requests=RateLimit(1000, 986, 60.0)))
    for record in records[:3]:
        accounts.end(record)
    manager.recall("id-of-ann")
    await until(lambda: any(one.is_reply for one in manager.heard_of(quota_messages.ReportQuota)))
    accounts.end(records[3])
    accounts.end(records[4])
    await until(lambda: sum(one.returned.concurrent for one in manager.heard_of(quota_messages.ReportQuota)) == 5)
    said = manager.heard_of(quota_messages.ReportQuota)
    assert (sum(one.requests for one in said), sum(one.returned.requests for one in said)) == (4, 1)
    assert len(manager.heard_of(quota_messages.Settle)) == 1
    await accounts.admit(a_record(limits), 10, 0)
    assert len(manager.heard_of(quota_messages.Admit)) == 2


async def test_a_share_that_nobody_uses_goes_back(accounts: AdmissionClient, manager: FakeManager) -> None:
    manager.share = quota_messages.QuotaGrant(requests=5)
    record = a_record(Limits(requests_per_minute=1000))
    await accounts.admit(record, 10, 0)
    accounts.end(record)
    await until(lambda: manager.heard_of(quota_messages.ReportQuota))
    assert manager.heard_of(quota_messages.ReportQuota) == [
        quota_messages.ReportQuota("id-of-ann", returned=quota_messages.QuotaGrant(requests=5))
    ]
    assert not accounts._shares


async def test_a_new_manager_is_told_of_what_was_taken_from_a_share(
    accounts: AdmissionClient, manager: FakeManager
) -> None:
    limits = Limits(max_concurrent=100, tokens_per_minute=10_000)
    manager.share = quota_messages.QuotaGrant(concurrent=5, tokens=500)
    first, second = a_record(limits), a_record(limits)
    await accounts.admit(first, 10, 0)
    await accounts.admit(second, 20, 0)
    await manager.stop()
    manager.heard.clear()
    await manager.start()
    await until(lambda: manager.heard_of(messages.Hello))
    (hello,) = manager.heard_of(messages.Hello)
    assert sorted(one.reserved for one in hello.admitted) == [10, 20]
    accounts.end(second)
    await until(lambda: manager.heard_of(quota_messages.Settle))
    assert manager.heard_of(quota_messages.Settle) == [quota_messages.Settle(second.admission or 0, 0)]


async def test_a_key_with_other_limits_gets_no_more_from_its_old_share(
    accounts: AdmissionClient, manager: FakeManager
) -> None:
    manager.share = quota_messages.QuotaGrant(requests=5)
    await accounts.admit(a_record(Limits(requests_per_minute=1000)), 10, 0)
    await accounts.admit(a_record(Limits(requests_per_minute=500)), 10, 0)
    assert [one.limits.requests_per_minute for one in manager.heard_of(quota_messages.Admit)] == [1000, 500]
    await until(lambda: any(one.returned.requests == 5 for one in manager.heard_of(quota_messages.ReportQuota)))


async def test_a_share_that_is_recalled_right_behind_its_grant_goes_back(
    accounts: AdmissionClient, manager: FakeManager
) -> None:
    manager.share = quota_messages.QuotaGrant(requests=5)
    manager.recalls_at_once = True
    record = a_record(Limits(requests_per_minute=1000))
    await accounts.admit(record, 10, 0)
    await until(lambda: manager.heard_of(quota_messages.ReportQuota))
    assert manager.heard_of(quota_messages.ReportQuota) == [
        quota_messages.ReportQuota("id-of-ann", returned=quota_messages.QuotaGrant(requests=5), is_reply=True)
    ]
    assert not accounts.admit_at_once(a_record(Limits(requests_per_minute=1000)), 10)


async def test_the_share_of_a_request_that_left_meanwhile_is_kept(
    accounts: AdmissionClient, manager: FakeManager
) -> None:
    manager.hold = True
    limits = Limits(requests_per_minute=1000)
    asking = asyncio.create_task(accounts.admit(a_record(limits), 1, 0))
    await until(lambda: manager.heard_of(quota_messages.Admit))
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    (asked,) = manager.heard_of(quota_messages.Admit)
    accounts._on_admitted(
        quota_messages.Admitted(asked.request, RateLimits(), 1, quota_messages.QuotaGrant(requests=5))
    )
    assert not accounts._admitted
    assert accounts.admit_at_once(a_record(limits), 1)
