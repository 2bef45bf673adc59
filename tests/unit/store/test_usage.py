"""The ledger counts each request once, however often it is reported; its sums agree with the rows and outlive them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_api_server import store
from llm_api_server.ipc.usage_events import (
    CLIENT_CLOSED,
    NO_USAGE,
    WORKER_LOST,
    Batch,
    RequestEnded,
    RequestProgress,
    RequestStarted,
    Usage,
    finish,
)
from llm_api_server.store import schema
from llm_api_server.store.database import Database
from llm_api_server.store.key_fields import Actor, KeyFields
from llm_api_server.store.keys import Keys
from llm_api_server.store.ledger_rows import RequestRow, UsageQuery, UsageSum
from llm_api_server.store.usage import UsageLedger
from llm_api_server.store.usage_query import month_of, start_of
from llm_api_server.types import UsageGroup

SOURCE = Path(store.__file__).parents[2]
DAY = 86400
NOON = datetime(2026, 2, 28, 12, tzinfo=UTC).timestamp()
MIDNIGHT = NOON - DAY / 2


def started(row: str, at: float = NOON, *, key: str = "k1", model: str = "m1", **more: Any) -> RequestStarted:
    return RequestStarted(row, f"req-{row}", key, f"name-{key}", model, "chat", stream=True, at=at, **more)


def ended(row: str, usage: Usage = NO_USAGE, status: int = 200, error: str | None = None, **more: Any) -> RequestEnded:
    rest: dict[str, Any] = {"instance": "m1", "queued": 0.5, "first_token": 1.0, "duration": 2.0} | more
    return RequestEnded(row, status, error, usage=usage, **rest)


def whole(row: str, at: float = NOON, usage: Usage = NO_USAGE, **more: Any) -> Batch:
    return Batch(finished=[finish(started(row, at, **more), ended(row, usage))])


@pytest.fixture
def ledger(database: Database) -> UsageLedger:
    return UsageLedger(database, clock=lambda: NOON + 100)


def usage_of(row: RequestRow) -> Usage:
    return Usage(row.prompt_tokens, row.completion_tokens, row.cached_tokens, row.reasoning_tokens)


def total(ledger: UsageLedger, **wanted: Any) -> UsageSum | None:
    sums = ledger.query(UsageQuery(**wanted))
    assert len(sums) <= 1
    return sums[0] if sums else None


def test_a_row_exists_from_the_start_and_is_settled_once(ledger: UsageLedger) -> None:
    ledger.write(Batch([started("a", prompt="Hello")]), "w1")
    (row,) = ledger.rows()
    assert (row.row, row.request_id, row.key_id, row.key_name) == ("a", "req-a", "k1", "name-k1")
    assert (row.model, row.endpoint, row.stream, row.prompt, row.worker) == ("m1", "chat", True, "Hello", "w1")
    assert (row.started_at, row.ended_at, row.status, usage_of(row)) == (NOON, None, None, NO_USAGE)
    assert total(ledger) is None

    ledger.write(Batch(progress=[RequestProgress("a", Usage(10, 3))]), "w1")
    assert usage_of(ledger.rows()[0]) == Usage(10, 3)

    ledger.write(Batch(ended=[ended("a", Usage(10, 7, 4, 2))]), "w1")
    ledger.write(Batch(progress=[RequestProgress("a", Usage(99, 99))], ended=[ended("a", Usage(99, 99), 500)]), "w1")
    (row,) = ledger.rows()
    assert (row.status, row.error, row.instance, usage_of(row)) == (200, None, "m1", Usage(10, 7, 4, 2))
    assert (row.queued, row.first_token, row.duration, row.ended_at) == (0.5, 1.0, 2.0, NOON + 2)
    assert total(ledger) == UsageSum(
        requests=1, errors=0, aborted=0, prompt_tokens=10, cached_tokens=4, completion_tokens=7, reasoning_tokens=2,
        seconds=2.0, first_token=1.0, queued=0.5,
    )  # fmt: skip


def test_an_end_without_a_start_is_ignored(ledger: UsageLedger) -> None:
    ledger.write(Batch(progress=[RequestProgress("a", Usage(1, 1))], ended=[ended("a")]), "w1")
    assert ledger.rows() == []
    assert total(ledger) is None


def test_of_two_ends_in_a_batch_the_first_counts(ledger: UsageLedger) -> None:
    ledger.write(Batch([started("a")], [], [ended("a", Usage(1, 1)), ended("a", Usage(2, 2))]), "w1")
    assert usage_of(ledger.rows()[0]) == Usage(1, 1)


def test_errors_and_aborted_requests_are_counted_apart(ledger: UsageLedger) -> None:
    ends = [
        ended("ok"),
        ended("failed", status=500, error="engine_error", queued=None, first_token=None),
        ended("refused", status=429),
        ended("broken-stream", status=200, error="engine_error"),
        ended("left", status=200, error=CLIENT_CLOSED, first_token=4.0),
        ended("left-early", status=499, error=CLIENT_CLOSED, queued=None, first_token=None),
    ]
    ledger.write(Batch([started(end.row) for end in ends], [], ends), "w1")
    found = total(ledger)
    assert found is not None
    assert (found.requests, found.errors, found.aborted) == (6, 3, 2)
    assert (found.first_token, found.queued, found.seconds) == (1.75, 0.5, 12.0)


def test_texts_and_counts_are_made_to_fit_the_database(ledger: UsageLedger) -> None:
    odd = RequestStarted("a", "\0\ud800\n新", "k1", "n" * 9000, "m" * 9000, "chat", stream=False, at=NOON, prompt="\0")
    ledger.write(Batch([odd], [], [ended("a", Usage(2**70, -5))]), "w1")
    (row,) = ledger.rows()
    assert (row.request_id, row.prompt) == ("\ufffd?\n新", "\ufffd")
    assert usage_of(row) == Usage(2**53, 0)
    assert len(row.model) == len(row.key_name) == 512


def test_rows_of_lost_workers_are_settled_with_their_last_usage(ledger: UsageLedger) -> None:
    for worker in ("w1", "w2", "w3"):
        ledger.write(Batch([started(worker)], [RequestProgress(worker, Usage(10, 4))]), worker)
    ledger.write(whole("done"), "w1")
    assert ledger.settle_lost(except_workers=["w2", "w3"]) == 1
    assert ledger.settle_lost(except_workers=["w1", "w2"]) == 1
    rows = {row.row: row for row in ledger.rows()}
    for row in ("w1", "w3"):
        assert (rows[row].error, rows[row].status, usage_of(rows[row])) == (WORKER_LOST, None, Usage(10, 4))
        assert rows[row].ended_at == NOON + 100
    assert rows["w2"].ended_at is None
    assert rows["done"].error is None
    found = total(ledger)
    assert found is not None
    assert (found.requests, found.errors, found.completion_tokens) == (3, 2, 8)
    ledger.write(Batch(ended=[ended("w1", Usage(10, 9))]), "w1")
    assert total(ledger) == found
    assert ledger.settle_lost() == 1
    assert ledger.settle_lost() == 0


def test_repeated_progress_does_not_lower_counts(ledger: UsageLedger) -> None:
    first = Batch([started("a")], [RequestProgress("a", Usage(10, 3))])
    ledger.write(first, "w1")
    ledger.write(Batch(progress=[RequestProgress("a", Usage(10, 9))]), "w1")
    ledger.write(first, "w1")
    assert usage_of(ledger.rows()[0]) == Usage(10, 9)


EVENTS = st.tuples(
    st.sampled_from(["a", "b", "c", "d"]),
    st.sampled_from(["k1", "k2"]),
    st.sampled_from([MIDNIGHT - 1, MIDNIGHT, NOON, NOON + 3600]),
    st.integers(0, 50),
    st.sampled_from([(200, None), (500, "engine_error"), (499, CLIENT_CLOSED), (200, CLIENT_CLOSED)]),
    st.booleans(),
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), requests=st.lists(EVENTS, min_size=1, unique_by=lambda event: event[0]))
def test_any_split_and_repetition_gives_the_same_sums(
    database: Database, data: st.DataObject, requests: list[tuple[str, str, float, int, tuple[int, str | None], bool]]
) -> None:
    """The messages of a request keep their order; requests interleave, batches are cut anywhere and sent again."""
    with database.writing() as connection:
        for table in (schema.REQUESTS, schema.HOURS, schema.DAYS):
            connection.execute(sa.delete(table))
    ledger = UsageLedger(database)
    messages: list[RequestStarted | RequestProgress | RequestEnded] = []
    for row, key, at, tokens, (status, error), finished in requests:
        own: list[RequestStarted | RequestProgress | RequestEnded] = [
            started(row, at, key=key),
            RequestProgress(row, Usage(tokens, tokens // 2)),
        ]
        if finished:
            own.append(ended(row, Usage(tokens, tokens), status, error))
        # Later requests may come in anywhere, as long as their own order stays.
        positions = sorted(data.draw(st.lists(st.integers(0, len(messages)), min_size=len(own), max_size=len(own))))
        for offset, (position, message) in enumerate(zip(positions, own, strict=True)):
            messages.insert(position + offset, message)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(messages) - 1, 1)))))
    batches = [batch_of(messages[a:b]) for a, b in zip([0, *cuts], [*cuts, len(messages)], strict=True) if a < b]
    for number, batch in enumerate(batches):
        ledger.write(batch, "w1")
        for again in data.draw(st.lists(st.integers(0, number), max_size=2)):
            ledger.write(batches[again], "w1")
    open_rows = {request[0] for request in requests if not request[-1]}
    for kept in ledger.rows():
        assert (kept.ended_at is None) == (kept.row in open_rows)
    assert ledger.settle_lost() == len(open_rows)
    check_sums(ledger, requests)


def batch_of(messages: Sequence[RequestStarted | RequestProgress | RequestEnded]) -> Batch:
    """Return a batch as a worker makes it: a request that starts and ends in it is one event."""
    begun = {message.row: message for message in messages if isinstance(message, RequestStarted)}
    over = {message.row: message for message in messages if isinstance(message, RequestEnded)}
    return Batch(
        [message for row, message in begun.items() if row not in over],
        [message for message in messages if isinstance(message, RequestProgress)],
        [message for row, message in over.items() if row not in begun],
        [finish(begun[row], over[row]) for row in begun.keys() & over.keys()],
    )


def check_sums(ledger: UsageLedger, requests: list[tuple[str, str, float, int, tuple[int, str | None], bool]]) -> None:
    for seconds, group in ((3600, "hour"), (DAY, "day")):
        expected: dict[tuple[str, int], Counter[str]] = {}
        for _, key, at, tokens, (_, error), finished in requests:
            sum_ = expected.setdefault((key, start_of(at, seconds)), Counter())
            aborted = finished and error == CLIENT_CLOSED
            sum_["requests"] += 1
            sum_["aborted"] += aborted
            sum_["errors"] += not aborted and (not finished or error is not None)
            sum_["prompt_tokens"] += tokens
            sum_["completion_tokens"] += tokens if finished else tokens // 2
        found = {
            (sum_.key_id, parsed(getattr(sum_, group))): Counter(
                {name: getattr(sum_, name) for name in ("requests", "aborted", "errors", "prompt_tokens",
                                                         "completion_tokens")}
            )
            for sum_ in ledger.query(UsageQuery(group_by=("key", group)))  # type: ignore[arg-type]
        }  # fmt: skip
        assert found == expected


def parsed(time: str) -> int:
    return int(datetime.fromisoformat(time).replace(tzinfo=UTC).timestamp())


def test_several_writers_of_the_same_batches_count_them_once(url: str, database: Database) -> None:
    database.open()
    batches = [
        Batch(
            [started(f"{n}-{m}") for m in range(20)],
            ended=[ended(f"{n - 1}-{m}", Usage(1, 1)) for m in range(20)],
            finished=[finish(started(f"whole-{n}-{m}"), ended(f"whole-{n}-{m}", Usage(1, 1))) for m in range(20)],
        )
        for n in range(11)
    ]
    databases = [Database(url, lock_timeout=60) for _ in range(3)]

    def write(own: Database) -> None:
        for batch in batches:
            UsageLedger(own).write(batch, "w1")

    threads = [threading.Thread(target=write, args=(own,)) for own in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own in databases:
        own.close()
    ledger = UsageLedger(database)
    found = total(ledger)
    assert found is not None
    assert (found.requests, found.prompt_tokens) == (420, 420)
    assert ledger.settle_lost() == 20


def test_the_ledger_and_changes_of_keys_do_not_block_each_other(url: str, database: Database) -> None:
    """Both touch keys: one writes when they were last used, the other all the rest."""
    keys = Keys(database)
    ids = [keys.create(KeyFields(name=f"k{n}"), Actor("cli:alice"))[0].key.key_id for n in range(5)]
    other = Database(url, lock_timeout=60)

    def write() -> None:
        for number in range(30):
            UsageLedger(other).write(Batch([started(f"{number}-{key}", NOON + number, key=key) for key in ids]), "w1")

    thread = threading.Thread(target=write)
    thread.start()
    for number in range(30):
        keys.update(f"k{4 - number % 5}", KeyFields(priority=number + 2), Actor("cli:alice"))
    thread.join()
    other.close()
    assert [record.last_used_at for record in keys.list()] == [NOON + 29] * 5
    assert [record.key.priority for record in keys.list()] == [31, 30, 29, 28, 27]


def test_a_killed_writer_leaves_whole_batches(url: str, database: Database) -> None:
    program = """
import sys
from llm_api_server.store.database import Database
from llm_api_server.store.usage import UsageLedger
from llm_api_server.ipc.usage_events import Batch, RequestEnded, RequestStarted, Usage
ledger = UsageLedger(Database(sys.argv[1]))
number = 0
while True:
    rows = [f"{number}-{n}" for n in range(50)]
    started = [RequestStarted(row, "r", "k1", "k1", "m1", "chat", False, 1e9) for row in rows]
    ended = [RequestEnded(row, 200, None, None, Usage(1, 2), None, None, 1.0) for row in rows]
    ledger.write(Batch(started, [], ended), "w1")
    number += 1
    print(number, flush=True)
"""
    database.open()
    ledger = UsageLedger(database)
    written = 0
    for wait_for in (1, 3, 7):
        process = subprocess.Popen(
            [sys.executable, "-c", program.replace("number = 0", f"number = {written + 1000 * wait_for}"), url],
            env={"PYTHONPATH": str(SOURCE)}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(wait_for)]
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
        process.stdout.close()
        process.wait()
        written += len(lines)
        # A server finishes or rolls back on its own; this waits for it.
        with database.writing(5_021_101):
            pass
        found = total(ledger)
        rows = ledger.rows(limit=100_000)
        assert found is not None
        assert len(rows) % 50 == 0
        assert len(rows) >= written * 50
        assert found.requests == found.prompt_tokens == len(rows)
        assert {usage_of(row) for row in rows} == {Usage(1, 2)}
        written = len(rows) // 50


def test_spent_counts_day_and_month_in_utc_and_open_requests(ledger: UsageLedger) -> None:
    month = datetime(2026, 2, 1, tzinfo=UTC).timestamp()
    end = datetime(2026, 3, 1, tzinfo=UTC).timestamp()
    assert ledger.spent("k1", NOON) == (0, 0)
    for row, at, tokens in (
        ("before", month - 1, 1),
        ("first", month, 10),
        ("yesterday", MIDNIGHT - 1, 100),
        ("today", MIDNIGHT, 1000),
        ("tomorrow", end, 10_000),
    ):
        ledger.write(whole(row, at, Usage(tokens, tokens)), "w1")
        ledger.write(Batch([started(f"{row}-open", at)], [RequestProgress(f"{row}-open", Usage(tokens))]), "w1")
    ledger.write(whole("other", NOON, Usage(5, 5), key="k2"), "w1")
    assert ledger.spent("k1", NOON) == (3000, 3330)
    assert ledger.spent("k1", end - 0.001) == (3000, 3330)
    assert ledger.spent("k1", end) == (30_000, 30_000)
    assert ledger.spent("k2", NOON) == (10, 10)


@pytest.mark.parametrize(
    ("at", "first", "following"),
    [("2026-12-31T23:59:59", "2026-12-01", "2027-01-01"), ("2028-02-29T00:00:00", "2028-02-01", "2028-03-01")],
)
def test_months_begin_and_end_in_utc(at: str, first: str, following: str) -> None:
    assert month_of(parsed(at)) == (parsed(first), parsed(following))


def test_sums_are_grouped_and_filtered(ledger: UsageLedger) -> None:
    ledger.write(whole("a", MIDNIGHT, Usage(1), key="k1", model="m1"), "w1")
    ledger.write(whole("b", NOON, Usage(2), key="k1", model="m2"), "w1")
    ledger.write(whole("c", NOON + DAY, Usage(4), key="k2", model="m1"), "w1")

    def query(*group_by: str, **wanted: Any) -> list[tuple[Any, ...]]:
        sums = ledger.query(msgspec.convert({"group_by": group_by, **wanted}, UsageQuery))
        return [
            (
                *tuple(value for value in (s.key_id, s.key_name, s.model, s.day, s.hour) if value is not None),
                s.requests,
                s.prompt_tokens,
            )
            for s in sums
        ]

    assert query() == [(3, 7)]
    assert query("key") == [("k1", "name-k1", 2, 3), ("k2", "name-k2", 1, 4)]
    assert query("model") == [("m1", 2, 5), ("m2", 1, 2)]
    assert query("day") == [("2026-02-28", 2, 3), ("2026-03-01", 1, 4)]
    assert query("hour", model="m1") == [("2026-02-28T00:00:00Z", 1, 1), ("2026-03-01T12:00:00Z", 1, 4)]
    assert query("model", "day", key_id="k1") == [("m1", "2026-02-28", 1, 1), ("m2", "2026-02-28", 1, 2)]
    assert query(key_name="name-k2") == [(1, 4)]
    assert query(key_name="nobody") == []


@pytest.mark.parametrize("group_by", [(), ("day",), ("hour",)])
def test_any_range_of_whole_hours_is_summed_exactly(ledger: UsageLedger, group_by: tuple[UsageGroup, ...]) -> None:
    """Of each hour of three days, the tables that are read give it once or not at all."""
    hours = range(-24, 48)
    rows = [(f"r{hour}", MIDNIGHT + hour * 3600) for hour in hours]
    ledger.write(Batch([started(row, at) for row, at in rows], [], [ended(row) for row, _ in rows]), "w1")
    for since in (None, -30, -24, -23, -1, 0, 1, 23, 24, 30, 60):
        for until in (None, -30, -24, -20, 0, 1, 5, 24, 25, 47, 48, 60):
            wanted = UsageQuery(
                since=None if since is None else MIDNIGHT + since * 3600 + 1,
                until=None if until is None else MIDNIGHT + until * 3600 - 1,
                group_by=group_by,
            )
            found = sum(sum_.requests for sum_ in ledger.query(wanted))
            expected = [hour for hour in hours if since is None or hour >= since if until is None or hour < until]
            assert found == len(expected), (since, until)


def test_rows_are_read_in_pages_and_by_key_or_model(ledger: UsageLedger, database: Database) -> None:
    keys = Keys(database)
    key = keys.create(KeyFields(name="app"), Actor("cli:alice"))[0].key.key_id
    for number in range(4):
        ledger.write(whole(f"r{number}", key=key if number % 2 else "k1", model=f"m{number // 2}"), "w1")
    page = ledger.rows(limit=3)
    assert [row.row for row in page] == ["r3", "r2", "r1"]
    assert [row.row for row in ledger.rows(before=page[-1].id)] == ["r0"]
    assert [row.row for row in ledger.rows(key_id=key, model="m1")] == ["r3"]
    assert [row.row for row in ledger.rows(key_name="app")] == ["r3", "r1"]
    assert [row.row for row in ledger.rows(key_name="name-k1")] == ["r2", "r0"]


def test_usage_has_the_current_name_of_a_key_or_its_last(ledger: UsageLedger, database: Database) -> None:
    keys, alice = Keys(database), Actor("cli:alice")
    key = keys.create(KeyFields(name="old"), alice)[0].key.key_id
    ledger.write(
        Batch([RequestStarted("a", "r", key, "old", "m1", "chat", stream=False, at=NOON)], [], [ended("a")]), "w1"
    )
    keys.update("old", KeyFields(name="new"), alice)
    assert [sum_.key_name for sum_ in ledger.query(UsageQuery(group_by=("key",)))] == ["new"]
    assert total(ledger, key_name="new") is not None
    assert total(ledger, key_name="old") is None
    assert (len(ledger.rows(key_name="new")), len(ledger.rows(key_name="old"))) == (1, 0)
    keys.delete("new", alice)
    assert [sum_.key_name for sum_ in ledger.query(UsageQuery(group_by=("key",)))] == ["old"]
    assert total(ledger, key_name="old") is not None
    assert len(ledger.rows(key_name="old")) == 1


def test_a_key_shows_when_it_was_last_used(ledger: UsageLedger, database: Database) -> None:
    keys = Keys(database)
    key = keys.create(KeyFields(name="app"), Actor("cli:alice"))[0].key.key_id
    ledger.write(Batch([started("a", NOON + 5, key=key), started("b", NOON, key=key)]), "w1")
    ledger.write(Batch([started("c", NOON - 5, key=key)]), "w1")
    assert keys.get("app").last_used_at == NOON + 5
    assert keys.revision() == 1


def test_pruning_keeps_sums_longer_than_rows_and_all_open_rows(database: Database) -> None:
    ledger = UsageLedger(database, clock=lambda: NOON + 100, prune_chunk=2)
    now = NOON + 40 * DAY
    for number, age in enumerate((0, 5, 15, 16, 17, 18, 39, 40)):
        ledger.write(whole(f"r{number}", now - age * DAY, Usage(1)), "w1")
    ledger.write(Batch([started("open", now - 40 * DAY)]), "w1")
    assert ledger.prune(now, 10, 20, 39) == 6 + 2 + 1
    assert [row.row for row in ledger.rows()] == ["open", "r1", "r0"]
    assert len(ledger.query(UsageQuery(group_by=("hour",)))) == 6
    assert len(ledger.query(UsageQuery(group_by=("day",)))) == 7
    assert ledger.prune(now, 10, 20, 39) == 0


def test_an_empty_batch_writes_nothing(ledger: UsageLedger) -> None:
    ledger.write(Batch(), "w1")
    assert ledger.rows() == []


def test_large_batches_are_written(ledger: UsageLedger) -> None:
    rows = [f"r{number}" for number in range(3000)]
    ledger.write(Batch([started(row, key=f"k{row[-2:]}") for row in rows], [], []), "w1")
    ledger.write(
        Batch([], [RequestProgress(row, Usage(1)) for row in rows], [ended(row, Usage(1, 1)) for row in rows]), "w1"
    )
    found = total(ledger)
    assert found is not None
    assert (found.requests, found.completion_tokens) == (3000, 3000)


def test_sums_are_encodable_as_json(ledger: UsageLedger) -> None:
    ledger.write(whole("a"), "w1")
    (sum_,) = json.loads(msgspec.json.encode(ledger.query(UsageQuery(group_by=("day",)))))
    assert (sum_["day"], sum_["requests"]) == ("2026-02-28", 1)
    assert msgspec.json.encode(ledger.rows())
