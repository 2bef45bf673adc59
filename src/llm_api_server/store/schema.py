"""Tables of the current version. `migrations/` creates them; a test compares both."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    text,
)

#: The last migration, as in `alembic_version` of an up-to-date database.
HEAD = "0003"

METADATA = MetaData()

#: Ids that grow with time.
_Counter = BigInteger().with_variant(Integer, "sqlite")


class Words(TypeDecorator[str]):
    """Text from outside; characters that a database cannot store become U+FFFD."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:  # noqa: ARG002 - SQLAlchemy's signature
        return cleaned(value)


def cleaned(value: str | None) -> str | None:
    if value is None or (value.isascii() and "\0" not in value):
        return value
    return value.encode("utf-8", "replace").decode().replace("\0", "\ufffd")


#: One row. Changes of keys lock it first, so that revisions are committed in their order.
REVISION = Table(
    "revision",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("value", BigInteger, nullable=False),
)

KEYS = Table(
    "keys",
    METADATA,
    Column("id", Words, primary_key=True),
    Column("name", Words, nullable=False, unique=True),
    Column("note", Words),
    Column("permissions", JSON, nullable=False),
    Column("models", JSON, nullable=False),
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("max_concurrent", BigInteger),
    Column("tokens_per_day", BigInteger),
    Column("tokens_per_month", BigInteger),
    Column("priority", Double, nullable=False),
    Column("priority_class", Text, nullable=False, server_default="interactive"),
    Column("expires_at", Double),
    Column("networks", JSON, nullable=False),
    Column("enabled", Boolean, nullable=False),
    Column("hint", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("last_used_at", Double),
    Column("revoked_at", Double),
)

#: Hex SHA-256 of the secrets. After a rotation a key has two for a while; the current one has no end.
DIGESTS = Table(
    "digests",
    METADATA,
    Column("digest", Words, primary_key=True),
    Column("key_id", Words, ForeignKey("keys.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("valid_until", Double),
)

#: One row per revision. Rows outlive their keys.
AUDIT = Table(
    "audit",
    METADATA,
    Column("revision", BigInteger, primary_key=True, autoincrement=False),
    Column("at", Double, nullable=False),
    Column("actor", Words, nullable=False),
    Column("actor_key_id", Words),
    Column("request_id", Words),
    Column("action", Text, nullable=False),
    Column("key_id", Words, nullable=False),
    Column("key_name", Words, nullable=False),
    Column("changes", JSON, nullable=False),
    Index("ix_audit_key_id", "key_id", "revision"),
    Index("ix_audit_key_name", "key_name", "revision"),
)

#: One row per request, open until it has an end. No foreign key: rows outlive keys, and some keys are in the
#: configuration.
REQUESTS = Table(
    "requests",
    METADATA,
    Column("id", _Counter, primary_key=True),
    Column("row", Words, nullable=False, unique=True),
    Column("worker", Words, nullable=False),
    Column("request_id", Words, nullable=False),
    Column("key_id", Words, nullable=False),
    Column("key_name", Words, nullable=False),
    Column("model", Words, nullable=False),
    Column("endpoint", Words, nullable=False),
    Column("stream", Boolean, nullable=False),
    Column("prompt", Words),
    Column("started_at", Double, nullable=False),
    Column("ended_at", Double),
    Column("status", Integer),
    Column("error", Words),
    Column("instance", Words),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("reasoning_tokens", BigInteger, nullable=False),
    Column("queued", Double),
    Column("first_token", Double),
    Column("duration", Double),
    Index("ix_requests_started_at", "started_at"),
    Index("ix_requests_key_id", "key_id", "id"),
    Index(
        "ix_requests_open",
        "key_id",
        sqlite_where=text("ended_at IS NULL"),
        postgresql_where=text("ended_at IS NULL"),
    ),
)


def _sums(name: str) -> Table:
    """Return a table of sums of ended requests by the hour or day (UTC, Unix seconds of its start) they started in."""
    return Table(
        name,
        METADATA,
        Column("key_id", Words, primary_key=True),
        Column("start", BigInteger, primary_key=True, autoincrement=False),
        Column("model", Words, primary_key=True),
        Column("key_name", Words, nullable=False),
        Column("requests", BigInteger, nullable=False),
        Column("errors", BigInteger, nullable=False),
        Column("aborted", BigInteger, nullable=False),
        Column("prompt_tokens", BigInteger, nullable=False),
        Column("cached_tokens", BigInteger, nullable=False),
        Column("completion_tokens", BigInteger, nullable=False),
        Column("reasoning_tokens", BigInteger, nullable=False),
        Column("seconds", Double, nullable=False),
        Column("queued_seconds", Double, nullable=False),
        Column("queued_count", BigInteger, nullable=False),
        Column("first_token_seconds", Double, nullable=False),
        Column("first_token_count", BigInteger, nullable=False),
        Index(f"ix_{name}_start", "start"),
    )


HOURS = _sums("usage_hours")
DAYS = _sums("usage_days")
