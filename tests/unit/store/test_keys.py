"""Keys of the database: shown once, found by digest, changed in the order of their revisions, with an audit trail."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from llm_api_server.auth.access import Limits, digest
from llm_api_server.errors import InvalidKeyField, KeyNotFound, KeyRevoked, NameTaken
from llm_api_server.store import schema
from llm_api_server.store.database import Database
from llm_api_server.store.key_fields import Actor, KeyFields
from llm_api_server.store.keys import Keys

ALICE = Actor("cli:alice")
APP = Actor("app", "key_0011223344556677", "req-1")
EVERYTHING = KeyFields(
    name="team-新",
    note="asked for by\nBob",
    permissions=["chat", "models"],
    models=["qwen*", "small"],
    requests_per_minute=10,
    tokens_per_minute=1000,
    max_concurrent=2,
    tokens_per_day=50_000,
    tokens_per_month=2**50,
    priority=2.5,
    expires_at=2_000_000_000.5,
    networks=["10.0.0.0/8", "::1"],
    enabled=False,
)


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(database: Database, clock: Clock) -> Keys:
    return Keys(database, clock=clock)


def test_a_new_key_has_the_defaults_of_the_configuration(keys: Keys, clock: Clock) -> None:
    record, secret = keys.create(KeyFields(name="app"), ALICE)
    assert secret.startswith("sk-")
    assert record.hint == secret[-4:]
    assert (record.key.permissions, record.key.models, record.key.limits) == (frozenset({"all"}), ("*",), Limits())
    assert (record.key.priority, record.key.networks, record.key.enabled) == (1.0, (), True)
    assert (record.created_at, record.last_used_at, record.revoked_at) == (clock.now, None, None)
    assert keys.get("app") == keys.get(record.key.key_id) == record
    assert keys.find(digest=digest(secret)) == keys.find(key_id=record.key.key_id) == record.key


def test_all_fields_are_stored(keys: Keys) -> None:
    record, secret = keys.create(EVERYTHING, ALICE)
    key = keys.find(digest=digest(secret))
    assert key == record.key == keys.list()[0].key
    assert key.limits == Limits(10, 1000, 2, 50_000, 2**50)
    assert (key.permissions, key.models) == (frozenset({"chat", "models"}), ("qwen*", "small"))
    assert (key.priority, key.expires_at, key.enabled) == (2.5, 2_000_000_000.5, False)
    assert (key.networks, record.note) == (("10.0.0.0/8", "::1/128"), "asked for by\nBob")
    assert msgspec.json.decode(msgspec.json.encode(record), type=type(record)) == record


def test_no_secret_is_in_the_database(keys: Keys, database: Database) -> None:
    _, first = keys.create(KeyFields(name="app"), ALICE)
    _, second = keys.rotate("app", 60, ALICE)
    with database.reading() as connection:
        everything = "".join(
            str(connection.execute(sa.select(table)).all()) for table in schema.METADATA.tables.values()
        )
    assert digest(first) in everything
    for secret in (first, second):
        assert secret[3:-4] not in everything


def test_an_update_changes_only_the_given_fields(keys: Keys) -> None:
    record, secret = keys.create(EVERYTHING, ALICE)
    changed = keys.update("team-新", KeyFields(name="new", requests_per_minute=None, enabled=True), APP)
    limits = msgspec.structs.replace(record.key.limits, requests_per_minute=None)
    assert changed.key == msgspec.structs.replace(record.key, name="new", limits=limits, enabled=True)
    assert changed.note == record.note
    assert keys.find(digest=digest(secret)) == changed.key
    with pytest.raises(KeyNotFound):
        keys.get("team-新")


def test_the_audit_trail_has_actors_and_changes(keys: Keys, clock: Clock) -> None:
    record, _ = keys.create(KeyFields(name="app"), ALICE)
    clock.now += 1
    keys.update("app", KeyFields(name="other", models=["small"]), APP)
    keys.rotate("other", 60, ALICE)
    keys.revoke("other", ALICE)
    keys.delete("other", ALICE)
    entries = keys.audit()
    assert [entry.action for entry in entries] == ["delete", "revoke", "rotate", "update", "create"]
    assert [entry.revision for entry in entries] == [5, 4, 3, 2, 1]
    assert [entry.key_name for entry in entries] == ["other"] * 4 + ["app"]
    assert {entry.key_id for entry in entries} == {record.key.key_id}
    update = entries[3]
    assert (update.at, update.actor, update.actor_key_id, update.request_id) == (
        clock.now, "app", "key_0011223344556677", "req-1",
    )  # fmt: skip
    assert update.changes == {"name": ["app", "other"], "models": [["*"], ["small"]]}
    assert entries[4].changes["permissions"] == [None, ["all"]]
    assert entries[1].changes == {"enabled": [True, False], "revoked_at": [None, clock.now]}
    assert entries[0].changes["models"] == [["small"], None]


def test_the_audit_trail_is_read_by_key_and_in_pages(keys: Keys) -> None:
    record, _ = keys.create(KeyFields(name="one"), ALICE)
    keys.create(KeyFields(name="two"), ALICE)
    keys.update("one", KeyFields(name="uno"), ALICE)
    keys.update("uno", KeyFields(priority=2), ALICE)
    for name in ("one", "uno", record.key.key_id):
        assert [entry.revision for entry in keys.audit(key=name)] == [4, 3, 1]
    assert [entry.revision for entry in keys.audit(limit=2)] == [4, 3]
    assert [entry.revision for entry in keys.audit(limit=2, before=3)] == [2, 1]
    assert keys.audit(key="nobody") == []


def test_an_update_without_an_effect_has_no_revision(keys: Keys) -> None:
    keys.create(EVERYTHING, ALICE)
    keys.update("team-新", EVERYTHING, ALICE)
    keys.revoke("team-新", ALICE)
    keys.revoke("team-新", ALICE)
    assert [entry.action for entry in keys.audit()] == ["revoke", "create"]
    assert keys.revision() == 2


def test_a_replaced_secret_is_valid_for_its_overlap(keys: Keys, clock: Clock) -> None:
    _, old = keys.create(KeyFields(name="app"), ALICE)
    record, new = keys.rotate("app", 60, ALICE)
    assert record.old_secret_until == clock.now + 60
    assert record.hint == new[-4:]
    found = keys.find(digest=digest(old))
    assert found == msgspec.structs.replace(record.key, expires_at=clock.now + 60)
    assert keys.find(digest=digest(new)) == record.key
    clock.now += 60
    assert keys.find(digest=digest(old)) is None
    assert keys.find(digest=digest(new)) == record.key
    assert keys.get("app").old_secret_until is None


def test_a_replaced_secret_ends_with_its_key_if_that_is_earlier(keys: Keys, clock: Clock) -> None:
    end = clock.now + 10
    _, old = keys.create(KeyFields(name="app", expires_at=end), ALICE)
    keys.rotate("app", 60, ALICE)
    found = keys.find(digest=digest(old))
    assert found is not None
    assert found.expires_at == end


def test_a_second_rotation_does_not_prolong_the_first_secret(keys: Keys, clock: Clock) -> None:
    start = clock.now
    _, first = keys.create(KeyFields(name="app"), ALICE)
    _, second = keys.rotate("app", 60, ALICE)
    clock.now += 30
    keys.rotate("app", 600, ALICE)
    ends = [key.expires_at for secret in (first, second) if (key := keys.find(digest=digest(secret)))]
    assert ends == [start + 60, start + 630]


def test_expired_secrets_are_deleted_at_the_next_rotation(keys: Keys, database: Database, clock: Clock) -> None:
    secrets = [keys.create(KeyFields(name="app"), ALICE)[1]]
    for _ in range(3):
        secrets.append(keys.rotate("app", 60, ALICE)[1])
        clock.now += 60
    with database.reading() as connection:
        kept = set(connection.execute(sa.select(schema.DIGESTS.c.digest)).scalars())
    assert kept == {digest(secret) for secret in secrets[-2:]}


def test_a_rotation_without_overlap_ends_the_old_secret(keys: Keys) -> None:
    _, old = keys.create(KeyFields(name="app"), ALICE)
    record, new = keys.rotate("app", 0, ALICE)
    assert keys.find(digest=digest(old)) is None
    assert keys.find(digest=digest(new)) == record.key
    assert record.old_secret_until is None


def test_a_revoked_key_stays_revoked(keys: Keys, clock: Clock) -> None:
    _, secret = keys.create(KeyFields(name="app"), ALICE)
    record = keys.revoke("app", ALICE)
    assert record.revoked_at == clock.now
    with pytest.raises(KeyRevoked):
        keys.update("app", KeyFields(enabled=True), ALICE)
    with pytest.raises(KeyRevoked):
        keys.rotate("app", 60, ALICE)
    keys.update("app", KeyFields(note="left"), ALICE)
    found = keys.find(digest=digest(secret))
    assert found is not None
    assert not found.enabled


def test_the_name_of_a_deleted_key_is_free_again(keys: Keys) -> None:
    record, secret = keys.create(KeyFields(name="app"), ALICE)
    keys.delete("app", ALICE)
    assert keys.find(digest=digest(secret)) is None
    assert keys.find(key_id=record.key.key_id) is None
    assert keys.list() == []
    again, _ = keys.create(KeyFields(name="app"), ALICE)
    assert again.key.key_id != record.key.key_id


@pytest.mark.parametrize(
    "change",
    [
        lambda keys: keys.update("nobody", KeyFields(enabled=False), ALICE),
        lambda keys: keys.rotate("nobody", 0, ALICE),
        lambda keys: keys.revoke("nobody", ALICE),
        lambda keys: keys.delete("nobody", ALICE),
        lambda keys: keys.get("nobody\0\ud800"),
    ],
)
def test_the_error_names_an_unknown_key(keys: Keys, change: Callable[[Keys], object]) -> None:
    with pytest.raises(KeyNotFound, match="nobody"):
        change(keys)
    assert keys.revision() == 0


def test_names_are_unique(keys: Keys) -> None:
    keys.create(KeyFields(name="one"), ALICE)
    keys.create(KeyFields(name="two"), ALICE)
    with pytest.raises(NameTaken, match="one"):
        keys.create(KeyFields(name="one"), ALICE)
    with pytest.raises(NameTaken, match="one"):
        keys.update("two", KeyFields(name="one"), ALICE)
    assert keys.revision() == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "x" * 257),
        ("name", "two\nlines"),
        ("name", "\ud800"),
        ("name", "key_0011223344556677"),
        ("name", None),
        ("note", "x" * 10_001),
        ("permissions", ["fly"]),
        ("permissions", None),
        ("models", ["a\0"]),
        ("requests_per_minute", 0),
        ("tokens_per_minute", -1),
        ("max_concurrent", 1.5),
        ("tokens_per_month", 2**63),
        ("priority", 0),
        ("priority", float("nan")),
        ("priority", 1001),
        ("expires_at", float("inf")),
        ("expires_at", 1e300),
        ("expires_at", -1),
        ("networks", ["10.0.0.1/8"]),
        ("networks", ["everywhere"]),
    ],
)
def test_invalid_values_are_refused_with_their_field(keys: Keys, field: str, value: Any) -> None:
    fields: Any = {"name": "app", field: value}
    with pytest.raises(InvalidKeyField, match=f"^Invalid '{field}': .+[.]$") as caught:
        keys.create(KeyFields(**fields), ALICE)
    assert caught.value.field == field
    keys.create(KeyFields(name="app"), ALICE)
    with pytest.raises(InvalidKeyField, match=f"^Invalid '{field}': "):
        keys.update("app", KeyFields(**{field: value}), ALICE)
    assert keys.revision() == 1


def test_a_key_needs_a_name(keys: Keys) -> None:
    with pytest.raises(InvalidKeyField, match="'name': "):
        keys.create(KeyFields(), ALICE)


@pytest.mark.parametrize("overlap", [-1.0, float("nan"), float("inf")])
def test_an_overlap_is_a_duration(keys: Keys, overlap: float) -> None:
    keys.create(KeyFields(name="app"), ALICE)
    with pytest.raises(InvalidKeyField, match="overlap"):
        keys.rotate("app", overlap, ALICE)


def test_changes_are_listed_by_revision(keys: Keys) -> None:
    assert keys.changed_since(0) == (0, [])
    one = keys.create(KeyFields(name="one"), ALICE)[0].key.key_id
    two = keys.create(KeyFields(name="two"), ALICE)[0].key.key_id
    keys.delete("one", ALICE)
    keys.revoke("two", ALICE)
    now, ids = keys.changed_since(0)
    assert (now, sorted(ids)) == (4, sorted([one, two]))
    assert keys.changed_since(3) == (4, [two])
    assert keys.changed_since(4) == (4, [])
    assert keys.changed_since(9) == (4, [])


def test_changes_of_several_writers_are_committed_in_the_order_of_their_revisions(url: str, keys: Keys) -> None:
    """Who polls while others write misses none: no revision becomes visible after a later one."""
    keys.create(KeyFields(name="k0"), ALICE)
    ids = {keys.create(KeyFields(name=f"k{number}"), ALICE)[0].key.key_id for number in range(1, 4)}
    start = keys.revision()
    databases = [Database(url, lock_timeout=60) for _ in range(3)]
    done = threading.Event()
    seen: set[str] = set()
    revisions = [start]

    def write(number: int) -> None:
        own = Keys(databases[number])
        for step in range(20):
            own.update(f"k{number + 1}", KeyFields(priority=step + 2), ALICE)

    def poll() -> None:
        while True:
            last = done.is_set()
            now, changed = keys.changed_since(revisions[-1])
            entries = [entry.revision for entry in keys.audit(limit=1000) if revisions[-1] < entry.revision <= now]
            assert sorted(entries) == list(range(revisions[-1] + 1, now + 1))
            revisions.append(now)
            seen.update(changed)
            if last:
                return

    poller = threading.Thread(target=poll)
    writers = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in (poller, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    poller.join()
    for database in databases:
        database.close()
    assert revisions[-1] == keys.revision() == start + 60
    assert seen == ids


def test_of_several_writers_of_a_name_one_succeeds(url: str, database: Database) -> None:
    database.open()
    results: list[str] = []
    barrier = threading.Barrier(4)

    def create() -> None:
        barrier.wait()
        try:
            Keys(database).create(KeyFields(name="app"), ALICE)
            results.append("made")
        except NameTaken:
            results.append("taken")

    threads = [threading.Thread(target=create) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["made", "taken", "taken", "taken"]


def test_finding_uses_an_index(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    keys = Keys(database)
    keys.create(KeyFields(name="app"), ALICE)
    statements: list[tuple[str, Any]] = []
    with database.reading() as connection:
        sa.event.listen(connection.engine, "before_cursor_execute", lambda *args: statements.append((args[2], args[3])))
    keys.find(digest="0" * 64)
    keys.find(key_id="nobody")
    keys.changed_since(0)
    keys.audit(key="app")
    database.close()
    with sqlite3.connect(tmp_path / "test.db") as plain:
        plans = [
            str(row[3])
            for statement, parameters in statements
            if statement.startswith("SELECT")
            for row in plain.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
        ]
    plain.close()
    scans = [plan for plan in plans if plan.startswith("SCAN") and "revision" not in plan]
    assert plans
    assert scans == []
