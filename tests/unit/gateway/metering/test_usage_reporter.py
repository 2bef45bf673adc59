"""Usage reports of a worker, against the fake manager on a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from llm_api_server.auth.access import NO_LIMITS
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.gateway.metering.usage_reporter import UsageReporter
from llm_api_server.ipc.messages import ReportUsage
from llm_api_server.ipc.usage_events import Usage
from tests.fake_manager import FakeManager
from tests.unit.gateway.metering.records import new_record
from tests.waiting import until

pytestmark = pytest.mark.anyio


@pytest.fixture
async def usage(link: ManagerLink) -> AsyncIterator[UsageReporter]:
    one = UsageReporter(link, interval=0.02)
    await link.start()
    await until(lambda: link.is_connected)
    yield one
    one.close()


def reports(manager: FakeManager) -> list[ReportUsage]:
    return manager.received_of(ReportUsage)


async def test_rows_start_progress_and_end_once(usage: UsageReporter, manager: FakeManager) -> None:
    record = new_record(NO_LIMITS)
    usage.start(record)
    await until(lambda: reports(manager))
    record.usage = Usage(7, 3)
    await until(lambda: any(report.batch.progress for report in reports(manager)))
    record.status, record.seconds, record.instance = 200, 1.5, "i"
    usage.end(record)
    usage.end(record)
    last = new_record(NO_LIMITS)
    usage.start(last)
    usage.end(last)
    await until(lambda: any(report.batch.finished for report in reports(manager)))
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


async def test_the_estimated_prompt_counts_until_the_engine_reports_usage(
    usage: UsageReporter, manager: FakeManager
) -> None:
    record = new_record(NO_LIMITS)
    usage.start(record)
    record.prompt_estimate = 50
    record.usage = Usage(0, 4)
    assert record.usage_or_estimate() == Usage(50, 4)
    usage.end(record)
    assert record.used == Usage(50, 4)
    await until(lambda: any(report.batch.finished for report in reports(manager)))
    assert [one.usage for report in reports(manager) for one in report.batch.finished] == [Usage(50, 4)]


async def test_reports_that_no_manager_has_kept_are_sent_to_the_next_one(
    usage: UsageReporter, manager: FakeManager
) -> None:
    manager.keeps_usage = False
    record = new_record(NO_LIMITS)
    usage.start(record)
    usage.end(record)
    await until(lambda: reports(manager))
    await manager.stop()
    manager.received.clear()
    manager.keeps_usage = True
    await manager.start()
    await until(lambda: reports(manager))
    assert [one.row for one in reports(manager)[0].batch.finished] == [record.row]
    await until(lambda: not usage._unconfirmed)


async def test_closing_sends_the_last_report(link: ManagerLink, manager: FakeManager) -> None:
    usage = UsageReporter(link, interval=1000)
    await link.start()
    await until(lambda: link.is_connected)
    record = new_record(NO_LIMITS)
    usage.start(record)
    usage.end(record)
    usage.close()
    await link.close()
    await until(lambda: reports(manager))
    assert [one.row for one in reports(manager)[0].batch.finished] == [record.row]
