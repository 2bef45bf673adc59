"""The tables as they are now. `migrations/` makes them; a test holds that both say the same."""

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
)

#: The last migration: what `alembic_version` holds when nothing is to be done.
HEAD = "0001"

METADATA = MetaData()


class Words(TypeDecorator[str]):
    """Text from outside: what neither database can hold is shown as U+FFFD."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:  # noqa: ARG002 - SQLAlchemy's signature
        if value is None or (value.isascii() and "\0" not in value):
            return value
        return value.encode("utf-8", "replace").decode().replace("\0", "\ufffd")


#: One row. Whoever changes keys locks it first, so that revisions are committed in their order.
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
    Column("expires_at", Double),
    Column("networks", JSON, nullable=False),
    Column("enabled", Boolean, nullable=False),
    Column("hint", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("last_used_at", Double),
    Column("revoked_at", Double),
)

#: Of the secrets only this: hex SHA-256. After a rotation a key has two for a while; the current one has no end.
DIGESTS = Table(
    "digests",
    METADATA,
    Column("digest", Words, primary_key=True),
    Column("key_id", Words, ForeignKey("keys.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("valid_until", Double),
)

#: One row per revision. Keys that are gone keep theirs.
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
