"""Keys of the database, stored as digests; each change is written with its audit entry in one transaction.

A change takes the next revision. Caches poll for the ids that changed after the revision they know.
"""

from __future__ import annotations

import builtins
import secrets
import time
from collections.abc import Callable
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, RowMapping, Select, delete, func, insert, or_, select, update

from llm_api_server.auth.access import Key, Limits, digest, new_key
from llm_api_server.errors import InvalidKeyField, KeyNotFound, KeyRevoked, NameTaken
from llm_api_server.store.database import Database
from llm_api_server.store.key_fields import Actor, AuditEntry, KeyFields, KeyRecord, check_overlap, given, with_defaults
from llm_api_server.store.schema import AUDIT, DIGESTS, KEYS, REVISION

_HINT_LENGTH = 4
_CURRENT = DIGESTS.c.valid_until.is_(None)


class Keys:
    """Keys of the database. Methods raise `StoreError` if it cannot be used."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def create(self, fields: KeyFields, actor: Actor) -> tuple[KeyRecord, str]:
        """Create a key; return it with its secret, which is not stored. Raises `InvalidKeyField` or `NameTaken`."""
        values = given(fields)
        if "name" not in values:
            raise InvalidKeyField("name", "give the key a name.")
        values = with_defaults(values)
        secret = new_key()
        key_id = f"key_{secrets.token_hex(8)}"
        with self._database.writing() as connection:
            revision = _lock(connection)
            _check_name(connection, values["name"], key_id)
            now = self._clock()
            connection.execute(insert(KEYS).values(id=key_id, hint=secret[-_HINT_LENGTH:], created_at=now, **values))
            connection.execute(insert(DIGESTS).values(digest=digest(secret), key_id=key_id))
            changes = {name: [None, value] for name, value in values.items()}
            self._record(connection, revision, actor, "create", (key_id, values["name"]), changes)
            return self._get(connection, key_id), secret

    def list(self) -> builtins.list[KeyRecord]:
        """Return all keys, sorted by name."""
        with self._database.reading() as connection:
            return [_record(row) for row in connection.execute(self._records().order_by(KEYS.c.name))]

    def get(self, name_or_id: str) -> KeyRecord:
        """Return one key. Raises `KeyNotFound`."""
        with self._database.reading() as connection:
            return self._get(connection, _row(connection, name_or_id)["id"])

    def update(self, name_or_id: str, fields: KeyFields, actor: Actor) -> KeyRecord:
        """Set the given fields. Raises `InvalidKeyField`, `NameTaken`, `KeyNotFound` or `KeyRevoked`."""
        values = given(fields)
        with self._database.writing() as connection:
            revision = _lock(connection)
            row = _row(connection, name_or_id)
            if row["revoked_at"] is not None and values.get("enabled"):
                raise KeyRevoked(f"The key {row['name']!r} was revoked for good; create another.")
            changes = {name: [row[name], new] for name, new in values.items() if row[name] != new}
            if changes:
                new = {name: values[name] for name in changes}
                if "name" in new:
                    _check_name(connection, new["name"], row["id"])
                connection.execute(update(KEYS).where(KEYS.c.id == row["id"]).values(**new))
                self._record(connection, revision, actor, "update", (row["id"], new.get("name", row["name"])), changes)
            return self._get(connection, row["id"])

    def rotate(self, name_or_id: str, overlap: float, actor: Actor) -> tuple[KeyRecord, str]:
        """Give the key a new secret. The old one stays valid for `overlap` seconds, earlier ones until their end.

        Raises `InvalidKeyField`, `KeyNotFound` or `KeyRevoked`.
        """
        check_overlap(overlap)
        secret = new_key()
        with self._database.writing() as connection:
            revision = _lock(connection)
            row = _row(connection, name_or_id)
            if row["revoked_at"] is not None:
                raise KeyRevoked(f"The key {row['name']!r} was revoked and cannot be rotated; create another.")
            now = self._clock()
            of_key = DIGESTS.c.key_id == row["id"]
            connection.execute(update(DIGESTS).where(of_key, _CURRENT).values(valid_until=now + overlap))
            connection.execute(delete(DIGESTS).where(of_key, DIGESTS.c.valid_until <= now))
            connection.execute(insert(DIGESTS).values(digest=digest(secret), key_id=row["id"]))
            hint = secret[-_HINT_LENGTH:]
            connection.execute(update(KEYS).where(KEYS.c.id == row["id"]).values(hint=hint))
            changes = {"hint": [row["hint"], hint], "old_secret_until": [None, now + overlap]}
            self._record(connection, revision, actor, "rotate", (row["id"], row["name"]), changes)
            return self._get(connection, row["id"]), secret

    def revoke(self, name_or_id: str, actor: Actor) -> KeyRecord:
        """End the key for good; its record stays. Raises `KeyNotFound`."""
        with self._database.writing() as connection:
            revision = _lock(connection)
            row = _row(connection, name_or_id)
            if row["revoked_at"] is None:
                now = self._clock()
                connection.execute(update(KEYS).where(KEYS.c.id == row["id"]).values(enabled=False, revoked_at=now))
                changes = {"enabled": [row["enabled"], False], "revoked_at": [None, now]}
                self._record(connection, revision, actor, "revoke", (row["id"], row["name"]), changes)
            return self._get(connection, row["id"])

    def delete(self, name_or_id: str, actor: Actor) -> None:
        """Remove the key; usage and audit keep its name. Raises `KeyNotFound`."""
        with self._database.writing() as connection:
            revision = _lock(connection)
            row = _row(connection, name_or_id)
            connection.execute(delete(KEYS).where(KEYS.c.id == row["id"]))
            changes = {name: [row[name], None] for name in KeyFields.__struct_fields__}
            self._record(connection, revision, actor, "delete", (row["id"], row["name"]), changes)

    def audit(
        self, *, key: str | None = None, limit: int = 100, before: int | None = None
    ) -> builtins.list[AuditEntry]:
        """Return the changes, newest first, of all keys or of one by id or any of its names. `before`: a revision."""
        wanted = select(AUDIT).order_by(AUDIT.c.revision.desc()).limit(limit)
        if key is not None:
            ids = select(AUDIT.c.key_id).where(or_(AUDIT.c.key_id == key, AUDIT.c.key_name == key))
            wanted = wanted.where(AUDIT.c.key_id.in_(ids))
        if before is not None:
            wanted = wanted.where(AUDIT.c.revision < before)
        with self._database.reading() as connection:
            return [AuditEntry(**row) for row in connection.execute(wanted).mappings()]

    def find(self, *, digest: str | None = None, key_id: str | None = None) -> Key | None:
        """Return the key with a secret's digest or with an id; None if there is none or the secret has expired.

        For a replaced secret the key expires with the secret, if that is earlier.
        """
        if digest is None:
            wanted: Select[Any] = select(KEYS).where(KEYS.c.id == key_id)
        else:
            wanted = select(KEYS, DIGESTS.c.valid_until).join(DIGESTS).where(DIGESTS.c.digest == digest)
        with self._database.reading() as connection:
            row = connection.execute(wanted).first()
        if row is None:
            return None
        key = _key(row)
        end = None if digest is None else row.valid_until
        if end is None:
            return key
        if end <= self._clock():
            return None
        return msgspec.structs.replace(key, expires_at=end if key.expires_at is None else min(end, key.expires_at))

    def revision(self) -> int:
        """Return the number of changes so far."""
        with self._database.reading() as connection:
            return int(connection.execute(select(REVISION.c.value)).scalar_one())

    def changed_since(self, revision: int) -> tuple[int, builtins.list[str]]:
        """Return the current revision and the ids of the keys that changed after `revision`, deleted ones included.

        A smaller revision than the given one means that the database was replaced: caches must be dropped.
        """
        with self._database.reading() as connection:
            now = int(connection.execute(select(REVISION.c.value)).scalar_one())
            if now == revision:
                return now, []
            # Not DISTINCT: SQLite would read the whole index of ids for it.
            ids = connection.execute(select(AUDIT.c.key_id).where(AUDIT.c.revision > revision)).scalars()
            return now, builtins.list(dict.fromkeys(ids))

    def _records(self) -> Select[Any]:
        old = (
            select(func.max(DIGESTS.c.valid_until))
            .where(DIGESTS.c.key_id == KEYS.c.id, DIGESTS.c.valid_until > self._clock())
            .scalar_subquery()
        )
        return select(KEYS, old.label("old_secret_until"))

    def _get(self, connection: Connection, key_id: str) -> KeyRecord:
        return _record(connection.execute(self._records().where(KEYS.c.id == key_id)).one())

    def _record(
        self,
        connection: Connection,
        revision: int,
        actor: Actor,
        action: str,
        key: tuple[str, str],
        changes: dict[str, builtins.list[Any]],
    ) -> None:
        """Write the audit entry under the next revision, as the last statement of a change."""
        connection.execute(update(REVISION).values(value=revision + 1))
        connection.execute(
            insert(AUDIT).values(
                revision=revision + 1,
                at=self._clock(),
                actor=actor.name,
                actor_key_id=actor.key_id,
                request_id=actor.request_id,
                action=action,
                key_id=key[0],
                key_name=key[1],
                changes=changes,
            )
        )


def _lock(connection: Connection) -> int:
    """Serialize changes; return the revision before this one. The first statement of a change."""
    return int(connection.execute(select(REVISION.c.value).with_for_update()).scalar_one())


def _row(connection: Connection, name_or_id: str) -> RowMapping:
    # No name has the form of an id.
    wanted = or_(KEYS.c.id == name_or_id, KEYS.c.name == name_or_id)
    row = connection.execute(select(KEYS).where(wanted)).mappings().first()
    if row is None:
        raise KeyNotFound(f"There is no key {name_or_id!r} in the store; `llm-api-server keys list` shows them.")
    return row


def _check_name(connection: Connection, name: str, key_id: str) -> None:
    taken = select(KEYS.c.id).where(KEYS.c.name == name, KEYS.c.id != key_id)
    if connection.execute(taken).first() is not None:
        raise NameTaken(f"Another key has the name {name!r}; choose another.", param="name")


def _record(row: Row[Any]) -> KeyRecord:
    return KeyRecord(
        key=_key(row),
        note=row.note,
        hint=row.hint,
        created_at=row.created_at,
        last_used_at=row.last_used_at,
        revoked_at=row.revoked_at,
        old_secret_until=row.old_secret_until,
    )


def _key(row: Row[Any]) -> Key:
    return Key(
        name=row.name,
        key_id=row.id,
        permissions=frozenset(row.permissions),
        models=tuple(row.models),
        limits=msgspec.convert(row, Limits, from_attributes=True),
        priority=row.priority,
        priority_class=row.priority_class,
        expires_at=row.expires_at,
        networks=tuple(row.networks),
        enabled=row.enabled,
    )
