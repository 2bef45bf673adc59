"""Ids and log lines of requests."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from loguru import logger

from llm_api_server.gateway.metering.access_log import MAX_ID_CHARS, AccessLog
from llm_api_server.gateway.metering.request_record import RequestRecord
from llm_api_server.ipc.usage_events import Usage

pytestmark = pytest.mark.anyio


@pytest.fixture
def written() -> Iterator[list[tuple[str, str]]]:
    """Level and text of the lines."""
    lines: list[tuple[str, str]] = []
    handler = logger.add(
        lambda message: lines.append((message.record["level"].name, message.record["message"])), level="DEBUG"
    )
    yield lines
    logger.remove(handler)


@pytest.mark.parametrize("value", [b"a", b"req-1~!", b"x" * MAX_ID_CHARS])
def test_the_id_of_a_client_is_kept(value: bytes) -> None:
    assert AccessLog().id_of({b"x-request-id": value}) == value.decode()


@pytest.mark.parametrize("value", [None, b"", b"two words", b"caf\xc3\xa9", b"a\r\nb", b"x" * (MAX_ID_CHARS + 1)])
def test_any_other_request_gets_a_new_id(value: bytes | None) -> None:
    log = AccessLog()
    headers = {} if value is None else {b"x-request-id": value}
    ids = {log.id_of(headers) for _ in range(3)} | {AccessLog().id_of(headers)}
    assert len(ids) == 4
    assert all(one.startswith("req_") and len(one) == 36 for one in ids)


async def test_a_line_has_the_facts_of_its_request(written: list[tuple[str, str]]) -> None:
    log, record = AccessLog(), RequestRecord("req-1", "POST", "/v1/completions", time.monotonic())
    record.model, record.status, record.seconds, record.first_byte_seconds = "m", 200, 1.5, 0.25
    record.usage, record.error = Usage(7, 5), "engine_error"
    log.add(record)
    log.flush()
    facts = "model=m prompt_tokens=7 completion_tokens=5 ttft=0.250s seconds=1.500 id=req-1 error=engine_error"
    assert written == [("INFO", f"POST /v1/completions 200 key=- {facts}")]


async def test_a_line_is_printable_and_short(written: list[tuple[str, str]]) -> None:
    log, record = AccessLog(), RequestRecord("req-1", "GET", "/a\nb" + "c" * 9000, time.monotonic())
    record.model = "m\x1b[31m"
    log.add(record)
    log.flush()
    ((_, line),) = written
    assert line.isprintable()
    assert line.startswith("GET /a?bccc")
    assert " model=m?[31m " in line
    assert len(line) < 500


async def test_a_request_without_a_model_is_logged_at_level_debug(written: list[tuple[str, str]]) -> None:
    log, record = AccessLog(), RequestRecord("req-1", "GET", "/livez", time.monotonic())
    log.add(record)
    log.flush()
    log.flush()
    assert [level for level, _ in written] == ["DEBUG"]
